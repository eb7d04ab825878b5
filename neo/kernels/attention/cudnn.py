"""Attention by NVIDIA's cuDNN, through `jax.nn.dot_product_attention(implementation="cudnn")`.

cuDNN has kernels of its own for forward and backward, so this is no `Kernel` but an object with the same `name`, `lacks`
and `attend`. What it can do is written in `lacks`; head sizes and cards are those of cuDNN's support matrix (SDPA,
backend 9.18: docs.nvidia.com/cudnn/operations/Attention), backward included, and of the checks in JAX.

The log-sum-exp stays inside: `return_residual=True` of jax.nn (JAX 0.10 to 0.12) rounds it to the type of the output
and drops its gradient, so neither a ring nor a test could use it.
"""

from __future__ import annotations

import dataclasses
import re

import jax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from neo.errors import InputError
from neo.kernels.attention.kernel import OUT_NAME, Extras, Plan, Request

MAX_HEAD_SIZE = 128  # forward and backward, on every card that cuDNN's attention has
# Hopper goes to 256 in both directions. Blackwell's backward does so from cuDNN 9.23 on only, and JAX does not ask.
MAX_HEAD_SIZE_HOPPER = 256
HOPPER = re.compile(r"\b(H100|H200|H800|H20|GH200)\b")
# Before Ampere (compute capability 8.0) there is no attention in cuDNN, nor bfloat16 in the matrix units.
BEFORE_AMPERE = re.compile(r"\b(T4|V100|P100|P40|P4|K80|M60|TITAN|GTX|Quadro RTX|RTX 20\d\d)\b", re.IGNORECASE)
NOT_NVIDIA = re.compile(r"\b(AMD|Radeon|Instinct|MI\d{3}X?|Intel)\b", re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class CuDNN:
    """Attention through `jax.nn.dot_product_attention`.

    jax_nn: which of its implementations; "xla" runs everywhere, in O(T*S) memory, with the same arguments: what tests
        hold the conversion of the window against.
    """

    name: str = "cudnn"
    jax_nn: str = "cudnn"

    def lacks(self, request: Request) -> str:
        """"" if cuDNN can do that, else what it lacks, as the end of "attention 'cudnn' lacks ..."."""
        where = request.device_kind or request.platform
        if request.platform != "gpu" or NOT_NVIDIA.search(where):
            return f"an NVIDIA GPU: it is to run on {where}"
        if BEFORE_AMPERE.search(where):
            return f"a card of Ampere or later: it is to run on {where}"
        if request.dtype != "bfloat16":
            return f"dtype {request.dtype}: bfloat16 is there"
        largest = MAX_HEAD_SIZE_HOPPER if HOPPER.search(where) else MAX_HEAD_SIZE
        if request.head_size > largest:
            return f"head size {request.head_size} on {where}: up to {largest} is there"
        if request.head_size % 8:
            return f"head size {request.head_size}: multiples of 8 are there"
        if request.lse:
            return "the log-sum-exp: jax.nn rounds it and drops its gradient"
        if request.sequence_shards > 1:
            return "a sequence split over devices, which needs the log-sum-exp"
        offset = request.q_offset or (request.causal and request.kv_len not in (None, request.seq_len))
        return _missing(
            segments=request.segments,
            alibi=request.alibi,
            softcap=request.softcap,
            sinks=request.sinks,
            offset=offset,
            window=request.window is not None and not request.causal,
            interpret=request.interpret,
        )

    def attend(
        self,
        q: Float[Array, "B T H h"],
        k: Float[Array, "B S K h"],
        v: Float[Array, "B S K h"],
        extras: Extras,
        plan: Plan,
    ) -> tuple[Float[Array, "B T H h"], None]:
        """(out, None): no log-sum-exp. Differentiable in q, k and v. Errors: `InputError` for what `lacks` names."""
        missing = _missing(
            segments=extras.segment_ids is not None or extras.kv_segment_ids is not None,
            alibi=extras.slopes is not None,
            softcap=plan.softcap is not None,
            sinks=extras.sinks is not None,
            offset=plan.offset != 0 or extras.first_key is not None or (plan.causal and q.shape[1] != k.shape[1]),
            window=plan.window is not None and not plan.causal,
            interpret=bool(plan.interpret),
        )
        if missing:
            raise InputError(f"attention {self.name!r} lacks {missing}")
        out = jax.nn.dot_product_attention(
            q,
            k,
            v,
            scale=plan.scale,
            # Always beside a window: with is_causal=False jax.nn's (W - 1, 0) lets cuDNN see every later key (JAX 0.10 to
            # 0.12; jax-ml/jax#39576).
            is_causal=plan.causal,
            local_window_size=window_size(plan.window),
            implementation=self.jax_nn,
        )
        return checkpoint_name(out, OUT_NAME), None


def window_size(window: int | None) -> tuple[int, int] | None:
    """jax.nn's (left, right) of W visible keys including self: left counts the earlier ones only."""
    return None if window is None else (window - 1, 0)


def _missing(
    *, segments: bool, alibi: bool, softcap: bool, sinks: bool, offset: bool, window: bool, interpret: bool
) -> str:
    """The first option asked for that jax.nn has no argument for (or that would cost a T x S array), or ""."""
    for asked, what in (
        (segments, "segment ids: it has one length a row"),
        (alibi, "ALiBi: it would take a bias of T x S"),
        (softcap, "a soft-cap"),
        (sinks, "sinks"),
        (offset, "q_offset: its first query stands at the first key"),
        (window, "a window with causal=False"),
        (interpret, "interpretation"),
    ):
        if asked:
            return what
    return ""


KERNEL = CuDNN()
