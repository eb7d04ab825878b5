"""Dense attention: the oracle of every other implementation. O(T*S) memory."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neo.kernels.attention.spec import Mask, distance_bias, visible


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
    platform: str | None = None,  # the same form is fast enough everywhere
) -> Float[Array, "B T H h"]:
    """softmax(cap(scale * q k^T) + bias) v over the visible keys; the softmax is fp32 whatever the inputs are.

    Query head n reads key/value head n // (H / K). A query that sees no key at all gets zeros.
    """
    B, T, H, h = q.shape
    S, K = k.shape[1], k.shape[2]
    G = H // K
    # The G query heads of one key head are more rows of its matmul: no repeated keys, and none of the 5-D grouped
    # einsums that are slow on XLA:CPU.
    rows = q.reshape(B, T, K, G, h).transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, h)
    scores = jnp.einsum("bkrh,bskh->bkrs", rows, k, preferred_element_type=jnp.float32) * scale
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

    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    p = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0.0))
    total = p.sum(-1, keepdims=True)
    p = (p / jnp.where(total > 0, total, 1.0)).astype(v.dtype)

    out = jnp.einsum("bkrs,bskh->bkrh", p.reshape(B, K, G * T, S), v, preferred_element_type=jnp.float32)
    return out.reshape(B, K, G, T, h).transpose(0, 3, 1, 2, 4).reshape(B, T, H, h).astype(q.dtype)
