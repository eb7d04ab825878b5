"""What an attention kernel is: a forward and a backward over local arrays, made differentiable here, once for all.

A kernel writes two pure functions and says what it lacks. Everything around them is common: the residuals and their
names for remat policies, delta = rowsum(out * dout), the cotangent of the log-sum-exp, the gradient of the sinks.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

OUT_NAME = "attention_out"
LSE_NAME = "attention_lse"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The static facts of one local call.

    causal: key j is visible to query i only if j <= offset + i. Otherwise every key is (segments apart).
    window: ... and only if j > offset + i - window; None where it would hide nothing. Needs causal.
    scale: factor on q k^T.
    softcap: scores become softcap * tanh(score / softcap), before bias and mask.
    offset: index among the keys of query 0. Causal calls have S = offset + T keys.
    device_kind: of the device it will run on, as JAX names it ("TPU v5 lite", "NVIDIA H200"); "" not known. What block
        sizes are looked up by; a program compiled ahead of time has no device to ask.
    platform: "cpu", "gpu" or "tpu"; "" takes JAX's default backend.
    interpret: run on any platform, slowly: True takes Pallas' plain interpreter, an object (`pltpu.InterpretParams`,
        `plgpu.InterpretGPUParams`) that one.
    """

    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    offset: int = 0
    device_kind: str = ""
    platform: str = ""
    interpret: object = False


class Extras(NamedTuple):
    """The optional arrays of one local call.

    segment_ids, kv_segment_ids: a query sees only keys of its own id; both or none.
    slopes: ALiBi; slope * (j - (offset + i)) is added to the score. Constants.
    sinks: a learned logit a head that takes part in the softmax and has no value.
    first_key: keys with a smaller index are hidden; a number of the device, not static. What `ring` needs on the first
        shards, where part of the halo does not exist.
    """

    segment_ids: Int[Array, "B T"] | None = None
    kv_segment_ids: Int[Array, "B S"] | None = None
    slopes: Float[Array, "H"] | None = None
    sinks: Float[Array, "H"] | None = None
    first_key: Int[Array, ""] | None = None


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of an implementation, for `lacks`: local shapes, options, and where it is to run.

    platform: "cpu", "gpu" or "tpu". device_kind: as JAX names the device ("TPU v5 lite", "NVIDIA H200"), "" unknown.
    lse: the caller wants the log-sum-exp. q_offset: queries stand elsewhere among the keys in each row (decoding).
    sequence_shards: the sequence is split over so many devices (`ring`).
    """

    platform: str
    dtype: str
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    device_kind: str = ""
    kv_len: int | None = None
    causal: bool = True
    window: int | None = None
    softcap: bool = False
    segments: bool = False
    alibi: bool = False
    sinks: bool = False
    q_offset: bool = False
    lse: bool = False
    sequence_shards: int = 1
    interpret: bool = False


Forward = Callable[..., tuple[Array, Array]]
Backward = Callable[..., tuple[Array, Array, Array]]


@dataclasses.dataclass(frozen=True)
class Kernel:
    """An attention implementation with a backward of its own.

    forward(q, k, v, extras, plan) -> (out, lse): q [B, T, H, h], k and v [B, S, K, h]; out like q; lse [B, H, T] fp32,
        log sum_j exp(score_ij) with the sink in it, -inf for a row that sees nothing and has no sink (its out is 0).
    backward(q, k, v, lse, delta, dout, extras, plan) -> (dq, dk, dv), each with shape and dtype of its primal.
        lse: as the forward's, but +inf where that was -inf, so that exp(score - lse) is 0. delta [B, H, T] fp32:
        rowsum(out * dout) less the cotangent of lse, so that dscore = p * (dp - delta) is all there is.
    lacks(request): "" if it can do that, else what it lacks, as the end of "attention 'name' lacks ...".
    """

    name: str
    forward: Forward
    backward: Backward
    lacks: Callable[[Request], str]

    def attend(self, q: Array, k: Array, v: Array, extras: Extras, plan: Plan) -> tuple[Array, Array]:
        """(out, lse), differentiable in q, k, v and the sinks."""
        return _attend(q, k, v, extras, plan, self)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q: Array, k: Array, v: Array, extras: Extras, plan: Plan, kernel: Kernel) -> tuple[Array, Array]:
    return kernel.forward(q, k, v, extras, plan)


def _attend_forward(q: Array, k: Array, v: Array, extras: Extras, plan: Plan, kernel: Kernel):
    out, lse = kernel.forward(q, k, v, extras, plan)
    out, lse = _named(out, OUT_NAME), _named(lse, LSE_NAME)
    return (out, lse), (q, k, v, extras, out, lse)


def _named(x: Array, name: str) -> Array:
    """`checkpoint_name`, of the bits: JAX rounds floating-point values that are kept (`reduce_precision`), which after a
    kernel is a pass over memory of its own (0.6 % of a 7B step on v5p by the compiler's account)."""
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return jax.lax.bitcast_convert_type(checkpoint_name(bits, name), x.dtype)


def _attend_backward(plan: Plan, kernel: Kernel, residuals, cotangents):
    q, k, v, extras, out, lse = residuals
    dout, dlse = cotangents
    delta = row_delta(out, dout) - dlse
    dq, dk, dv = kernel.backward(q, k, v, hide_empty_rows(lse), delta, dout, extras, plan)
    return dq, dk, dv, Extras(sinks=sink_gradient(extras.sinks, lse, delta))


_attend.defvjp(_attend_forward, _attend_backward)


def row_delta(out: Float[Array, "B T H h"], dout: Float[Array, "B T H h"]) -> Float[Array, "B H T"]:
    """sum_j p_ij dp_ij = out_i . dout_i, one number a row (FlashAttention-2, arXiv:2307.08691, algorithm 2, line 4)."""
    return (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1).swapaxes(1, 2)


def hide_empty_rows(lse: Float[Array, "B H T"]) -> Float[Array, "B H T"]:
    """+inf instead of -inf: exp(score - lse) of a row that sees nothing is then 0 and not NaN."""
    return jnp.where(lse == -jnp.inf, jnp.inf, lse)


def sink_gradient(
    sinks: Float[Array, "H"] | None, lse: Float[Array, "B H T"], delta: Float[Array, "B H T"]
) -> Float[Array, "H"] | None:
    """The sink is one more key whose value is 0: dp = 0, so its share of dscore = p (dp - delta) is -p delta."""
    if sinks is None:
        return None
    return -(jnp.exp(sinks[:, None] - lse) * delta).sum((0, 2)).astype(sinks.dtype)
