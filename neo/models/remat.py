"""What the backward pass keeps of a block instead of computing it again, by name.

The names are the `checkpoint_name`s in attention.py, mlp.py, decoder.py and the attention kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

_ATTENTION = ("attention_out", "attention_lse")


@dataclasses.dataclass(frozen=True)
class Kept:
    """Names that stay on the device, and names that wait in the host's memory."""

    device: tuple[str, ...] = ()
    host: tuple[str, ...] = ()


# Largest memory first. None: no rematerialisation at all. docs/plan.md has time and memory of each for a 7B step.
POLICIES: dict[str, Kept | None] = {
    "none": None,
    # Only element-wise work is repeated (behind a norm of its own, also the down projection).
    "minimal": Kept(("query", "key", "value", *_ATTENTION, "residual_mid", "mlp_gate", "mlp_up", "norm_scale")),
    # Also attention's output projection: 2 % more time for 7 % less memory (docs/plan.md).
    "lean": Kept(("query", "key", "value", *_ATTENTION, "mlp_gate", "mlp_up", "norm_scale")),
    # Everything but the attention kernel is repeated.
    "attention": Kept((*_ATTENTION, "norm_scale")),
    # What the attention kernel reads and writes waits in the host's memory: little more on the device than `full`.
    "offload": Kept(("attention_lse", "norm_scale"), ("query", "key", "value", "attention_out", "residual_mid")),
    "full": Kept(),
}


def rematerialise(function: Callable, policy: str, in_loop: bool) -> Callable:
    """Wrap a block so that its backward pass keeps only what the policy names.

    Args:
        in_loop: whether the block runs inside `lax.scan`. Then forward and backward are two loops, and
            the compiler cannot merge the recomputation with the original; elsewhere it must be kept from
            it, by a barrier that costs some fusion (measured on v5p: 3 % of a step).
    """
    kept = POLICIES[policy]
    if kept is None:
        return function
    if kept.host:
        keep = jax.checkpoint_policies.save_and_offload_only_these_names(
            names_which_can_be_saved=kept.device, names_which_can_be_offloaded=kept.host,
            offload_src="device", offload_dst="pinned_host")
    else:
        keep = jax.checkpoint_policies.save_only_these_names(*kept.device)
    return jax.checkpoint(function, policy=keep, prevent_cse=not in_loop)
