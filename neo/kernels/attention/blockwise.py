"""Blockwise causal attention in plain JAX: O(T*W) time and memory, forward and backward.

Queries are cut into blocks of `block`; one `lax.scan` step takes a block against the band of keys it can see, so the
largest temporary is [B, H, block, band], band = block + W - 1 rounded up to blocks. Without a window the band grows
with the position: the blocks are cut into up to 8 groups, each with its own static band, and the time is near T*T/2.

The backward is written by hand. It keeps q, k, v, the output and the log-sum-exp of each row (the residuals of
FlashAttention-2, Dao 2023, arXiv:2307.08691, algorithm 2), recomputes the probabilities from them and sums dk and dv in
the carry of the scan. A soft-cap is one more factor there, 1 - tanh^2; the ALiBi slopes are constants. Output and
log-sum-exp carry the checkpoint names below, so that a remat policy can keep them and skip the forward in the backward.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from neo.errors import InputError
from neo.kernels.attention.spec import Mask, distance_bias, visible

OUT_NAME = "attention_out"
LSE_NAME = "attention_lse"
# Ours: without a window, G groups cover 1 + 1/G of the useful scores, and each is two more loops to compile (0.5 s on a
# CPU core): 4 up to 2,048 tokens, 8 from 4,096 on.
MIN_GROUPS, MAX_GROUPS, GROUP_TOKENS = 4, 8, 512

# Ours, measured on 2 CPU cores with 1 MiB of L2 each (T 128 to 8192, W 256 to 4096, B 1 to 16, forward and backward):
# the scores of one block should stay about in the cache; below 32 rows the loop itself costs more than it saves.
CPU_SCORES_BYTES = 3 << 19
CPU_BLOCKS = (128, 64, 32)
BLOCK = 128  # inferred, where there is no CPU cache to fit: 128 rows a head fill a matrix unit


def blockwise(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    *,
    mask: Mask,
    segment_ids: Int[Array, "B T"] | None,
    kv_segment_ids: Int[Array, "B T"] | None,
    q_offset: Int[Array, "B"] | None,
    scale: float,
    alibi_slopes: Float[Array, "H"] | None = None,
    softcap: float | None = None,
    block: int | None = None,
    platform: str | None = None,
) -> Float[Array, "B T H h"]:
    """Causal attention over keys as long as the queries; the softmax is fp32. A query that sees no key gets zeros.

    Any T and W: the last block is padded. block: queries a step; None takes `choose_block` for `platform` (default:
    JAX's own). No gradient goes to alibi_slopes. Errors: `InputError` for causal=False, for keys of another length than
    the queries and for q_offset, which only the dense implementation has.
    """
    T, S = q.shape[1], k.shape[1]
    if not mask.causal:
        raise InputError("attention 'blockwise' lacks causal=False; implementation='dense' has it")
    if q_offset is not None or S != T:
        what = "q_offset" if q_offset is not None else f"{S} keys for {T} queries"
        raise InputError(
            f"attention 'blockwise' lacks {what} (it needs one key per query); implementation='dense' has it"
        )
    window = min(mask.window or T, T)
    if block is None:
        block = choose_block(q.shape[0] * q.shape[2], T, window, platform or jax.default_backend())
    block = min(block, T)
    pad = -T % block
    if pad:
        # Padded keys stand after every real query, so causality hides them; padded queries are cut off below.
        q, k, v = (jnp.pad(x, ((0, 0), (0, pad), (0, 0), (0, 0))) for x in (q, k, v))
        if segment_ids is not None:
            segment_ids, kv_segment_ids = (jnp.pad(x, ((0, 0), (0, pad))) for x in (segment_ids, kv_segment_ids))
    plan = _Plan(window=window, block=block, scale=float(scale), softcap=softcap)
    segments = None if segment_ids is None else (segment_ids, kv_segment_ids)
    return _attend(q, k, v, segments, alibi_slopes, plan)[:, :T]


def choose_block(rows: int, length: int, window: int, platform: str) -> int:
    """Queries a block: the largest whose fp32 scores, for `rows` = B * H heads, fit what was measured to be fast."""
    if platform != "cpu":
        return BLOCK
    for block in CPU_BLOCKS:
        if 4 * rows * block * min(length, block + window - 1) <= CPU_SCORES_BYTES:
            return block
    return CPU_BLOCKS[-1]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """The static facts of one call. Lengths are padded to whole blocks."""

    window: int
    block: int
    scale: float
    softcap: float | None = None

    @property
    def reach(self) -> int:
        """Keys a block may see: its own, and the W - 1 before its first query, in whole blocks."""
        return self.block + -(-(self.window - 1) // self.block) * self.block

    def groups(self, length: int) -> list[tuple[int, int, int]]:
        """(first block, end block, band) of each group; the band of a block covers every key it can see."""
        n = length // self.block
        out: list[tuple[int, int, int]] = []
        count = min(MAX_GROUPS, max(MIN_GROUPS, length // GROUP_TOKENS))
        # A loop of one step is unrolled by XLA, and then the scores of all groups are alive at once: two steps or more.
        count = max(1, min(count, n // 2))
        edges = [n * g // count for g in range(count + 1)]
        for first, end in zip(edges[:-1], edges[1:], strict=True):
            band = min(self.reach, end * self.block)
            if first == end:
                continue
            if out and out[-1][2] == band:
                out[-1] = (out[-1][0], end, band)
            else:
                out.append((first, end, band))
        return out


def _blocks(x: Array, heads: int, block: int) -> Array:
    """[B, T, H, x] -> [n, B*K, G*block, x]: the query heads of one key head are more rows of its matmul."""
    B, T, H, d = x.shape
    n, G = T // block, H // heads
    return x.reshape(B, n, block, heads, G, d).transpose(1, 0, 3, 4, 2, 5).reshape(n, B * heads, G * block, d)


def _unblocks(x: Array, batch: int, heads: int, block: int) -> Array:
    """The inverse of `_blocks`: [n, B*K, G*block, x] -> [B, T, H, x]."""
    n, d = x.shape[0], x.shape[-1]
    G = x.shape[2] // block
    x = x.reshape(n, batch, heads, G, block, d).transpose(1, 0, 4, 2, 3, 5)
    return x.reshape(batch, n * block, heads * G, d)


def _keys(x: Array) -> Array:
    """[B, T, K, h] -> [B*K, T, h]."""
    B, T, K, h = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B * K, T, h)


def _cut(x: Array, start: Array, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)


def _seen(index: Array, start: Array, band: int, segments, plan: _Plan) -> Array:
    """[B or 1, 1, 1, block, band] visibility of the band for the query block `index`."""
    first = index * plan.block
    pair = (None, None) if segments is None else (_cut(segments[0], first, plan.block), _cut(segments[1], start, band))
    seen = visible(Mask(True, plan.window), first + jnp.arange(plan.block), start + jnp.arange(band), *pair)
    return seen.reshape(-1, 1, 1, plan.block, band)


def _scores(
    qi: Array, kb: Array, index: Array, start: Array, slopes: Array | None, plan: _Plan, dims: tuple[int, int]
) -> tuple[Array, Array | None]:
    """Capped and biased fp32 scores of a block, [B, K, G, block, band], and the tanh of its soft-cap, None without."""
    band = kb.shape[1]
    s = jnp.einsum("nrh,nth->nrt", qi, kb, preferred_element_type=jnp.float32) * plan.scale
    s = s.reshape(*dims, -1, plan.block, band)
    tanh = None
    if plan.softcap is not None:
        tanh = jnp.tanh(s / plan.softcap)
        s = plan.softcap * tanh
    if slopes is not None:
        bias = distance_bias(slopes, index * plan.block + jnp.arange(plan.block), start + jnp.arange(band))
        s = s + bias.reshape(1, dims[1], -1, plan.block, band)
    return s, tanh


def _forward(q: Array, k: Array, v: Array, segments, slopes, plan: _Plan) -> tuple[Array, Array]:
    """Output [B, T, H, h] in q's dtype and log-sum-exp of the scores [n, B*K, G*block], fp32."""
    B, T, _, _ = q.shape
    K = k.shape[2]
    queries, keys, values = _blocks(q, K, plan.block), _keys(k), _keys(v)

    def step(band, _, x):
        index, qi = x
        start = jnp.maximum(0, (index + 1) * plan.block - band)
        kb, vb = _cut(keys, start, band), _cut(values, start, band)
        s, _ = _scores(qi, kb, index, start, slopes, plan, (B, K))
        seen = _seen(index, start, band, segments, plan)
        s = jnp.where(seen, s, -jnp.inf)
        top = s.max(-1, keepdims=True)
        top = jnp.where(top == -jnp.inf, 0.0, top)  # a row that sees nothing: exp(-inf) = 0 everywhere
        p = jnp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        total = jnp.where(total == 0.0, 1.0, total)

        def rows(a):
            return a.reshape(B * K, -1, a.shape[-1])

        o = jnp.einsum("nrt,nth->nrh", rows(p).astype(vb.dtype), vb, preferred_element_type=jnp.float32) / rows(total)
        return None, (o.astype(q.dtype), rows(top + jnp.log(total))[..., 0])

    parts = []
    for first, end, band in plan.groups(T):
        _, part = jax.lax.scan(functools.partial(step, band), None, (jnp.arange(first, end), queries[first:end]))
        parts.append(part)
    o, lse = jax.tree.map(lambda *xs: xs[0] if len(xs) == 1 else jnp.concatenate(xs), *parts)
    return _unblocks(o, B, K, plan.block), lse


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q: Array, k: Array, v: Array, segments, slopes, plan: _Plan) -> Array:
    return _forward(q, k, v, segments, slopes, plan)[0]


def _attend_forward(q: Array, k: Array, v: Array, segments, slopes, plan: _Plan):
    out, lse = _forward(q, k, v, segments, slopes, plan)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    return out, (q, k, v, segments, slopes, out, lse)


def _attend_backward(plan: _Plan, residuals, dout: Array):
    q, k, v, segments, slopes, out, lse = residuals
    B, T, _, _ = q.shape
    K = k.shape[2]
    keys, values = _keys(k), _keys(v)
    # delta_i = sum_j p_ij dp_ij = o_i . do_i, one number a row (FlashAttention-2, algorithm 2, line 4).
    delta = (out.astype(jnp.float32) * dout.astype(jnp.float32)).sum(-1, keepdims=True)

    def rows(a):
        return a.reshape(B * K, -1, a.shape[-1])

    def wide(a):
        return a.reshape(B, K, -1, plan.block, 1)

    def step(band, carry, x):
        index, qi, di, lse_i, delta_i = x
        start = jnp.maximum(0, (index + 1) * plan.block - band)
        kb, vb = _cut(keys, start, band), _cut(values, start, band)
        s, tanh = _scores(qi, kb, index, start, slopes, plan, (B, K))
        p = jnp.where(_seen(index, start, band, segments, plan), jnp.exp(s - wide(lse_i)), 0.0)
        dp = jnp.einsum("nrh,nth->nrt", di, vb, preferred_element_type=jnp.float32).reshape(p.shape)
        ds = p * (dp - wide(delta_i))
        if tanh is not None:
            ds = ds * (1.0 - tanh * tanh)
        ds = rows(ds).astype(kb.dtype)
        dv = jnp.einsum("nrt,nrh->nth", rows(p).astype(vb.dtype), di, preferred_element_type=jnp.float32)
        dk = jnp.einsum("nrt,nrh->nth", ds, qi, preferred_element_type=jnp.float32)
        dq = jnp.einsum("nrt,nth->nrh", ds, kb, preferred_element_type=jnp.float32) * plan.scale

        def add(a, b):
            return jax.lax.dynamic_update_slice_in_dim(a, _cut(a, start, band) + b, start, axis=1)

        return (add(carry[0], dk), add(carry[1], dv)), dq.astype(q.dtype)

    carry = (jnp.zeros(keys.shape, jnp.float32), jnp.zeros(values.shape, jnp.float32))
    xs = (_blocks(q, K, plan.block), _blocks(dout, K, plan.block), lse, _blocks(delta, K, plan.block))
    parts = []
    for first, end, band in plan.groups(T):
        part_xs = (jnp.arange(first, end), *(x[first:end] for x in xs))
        carry, part = jax.lax.scan(functools.partial(step, band), carry, part_xs)
        parts.append(part)
    dq = _unblocks(parts[0] if len(parts) == 1 else jnp.concatenate(parts), B, K, plan.block)

    def heads(a):
        return a.reshape(B, K, T, -1).transpose(0, 2, 1, 3)

    return dq, heads(carry[0] * plan.scale).astype(k.dtype), heads(carry[1]).astype(v.dtype), None, None


_attend.defvjp(_attend_forward, _attend_backward)
