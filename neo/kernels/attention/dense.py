"""Dense attention: the readable form that every other implementation is held against. O(T*S) memory."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neo.kernels.attention.spec import Mask, distance_bias, full_precision, visible


def dense(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    *,
    mask: Mask,
    segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B S"] | None,
    q_offset: Int[Array, "B"] | None,
    scale: float,
    alibi_slopes: Float[Array, "H"] | None = None,
    softcap: float | None = None,
    sinks: Float[Array, "H"] | None = None,
) -> tuple[Float[Array, "B T H h"], Float[Array, "B H T"]]:
    """softmax(cap(scale * q k^T) + bias) v over the visible keys, and its log-sum-exp; the softmax is fp32 whatever the
    inputs are.

    Query head n reads key/value head n // (H / K). A query that sees no key at all gets zeros, and lse -inf (without a
    sink).
    """
    B, T, H, h = q.shape
    S, K = k.shape[1], k.shape[2]
    G = H // K
    # The G query heads of one key head are more rows of its matmul: no repeated keys, and none of the 5-D grouped
    # einsums that are slow on XLA:CPU.
    rows = q.reshape(B, T, K, G, h).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, h)
    product = functools.partial(jnp.einsum, precision=full_precision(q.dtype), preferred_element_type=jnp.float32)
    scores = product("bkrh,bskh->bkrs", rows, k) * scale
    scores = scores.reshape(B, K, G, T, S)
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)

    query_index = jnp.arange(T) if q_offset is None else q_offset[:, None] + jnp.arange(T)
    if alibi_slopes is not None:
        scores = scores + distance_bias(alibi_slopes, query_index, jnp.arange(S)).reshape(-1, K, G, T, S)
    seen = visible(mask, query_index, jnp.arange(S), segment_ids, kv_segment_ids)
    if seen is not None:
        seen = seen.reshape(-1, 1, 1, T, S)
        scores = jnp.where(seen, scores, -jnp.inf)

    sink = None if sinks is None else sinks.astype(jnp.float32).reshape(1, K, G, 1, 1)
    top = scores.max(-1, keepdims=True)
    top = jax.lax.stop_gradient(top if sink is None else jnp.maximum(top, sink))
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    p = jnp.exp(scores - top)
    total = p.sum(-1, keepdims=True)
    total = total if sink is None else total + jnp.exp(sink - top)
    some = total > 0
    safe = jnp.where(some, total, 1.0)
    p = (p / safe).astype(v.dtype)

    out = product("bkrs,bskh->bkrh", p.reshape(B, K, G * T, S), v)
    out = out.reshape(B, K, G, T, h).transpose(0, 3, 1, 2, 4).reshape(B, T, H, h).astype(q.dtype)
    lse = jnp.where(some, top + jnp.log(safe), -jnp.inf)
    return out, lse.reshape(B, H, T)
