"""What the backward pass keeps of a block instead of computing it again, by name.

The names are the `checkpoint_name`s in attention.py, mlp.py, decoder.py and the attention kernels.
"""

from __future__ import annotations

from collections.abc import Callable

import jax

_ATTENTION = ("attention_out", "attention_lse")

# Largest memory first. None: no rematerialisation at all.
SAVED_NAMES: dict[str, tuple[str, ...] | None] = {
    "none": None,
    # Only element-wise work and the down projection are repeated (measured best on v5p: see docs).
    "minimal": ("query", "key", "value", *_ATTENTION, "residual_mid", "mlp_gate", "mlp_up"),
    # Everything but the attention kernel is repeated.
    "attention": _ATTENTION,
    "full": (),
}


def rematerialise(function: Callable, policy: str, in_loop: bool) -> Callable:
    """Wrap a block so that its backward pass keeps only what the policy names.

    Args:
        in_loop: whether the block runs inside `lax.scan`. Then forward and backward are two loops, and
            the compiler cannot merge the recomputation with the original; elsewhere it must be kept from
            it, by a barrier that costs some fusion (measured on v5p: 3 % of a step).
    """
    names = SAVED_NAMES[policy]
    if names is None:
        return function
    keep = jax.checkpoint_policies.save_only_these_names(*names)
    return jax.checkpoint(function, policy=keep, prevent_cse=not in_loop)
