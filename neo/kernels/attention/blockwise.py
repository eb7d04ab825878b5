"""Blockwise attention in plain JAX: O(T*W) time and memory, forward and backward.

Queries are cut into blocks of `block`; one `lax.scan` step takes a block against the band of keys it can see, so the
largest temporary is [B, H, block, band], band = block + W - 1 rounded up to blocks. Without a window the band grows
with the position: the blocks are cut into up to 8 groups, each with its own static band, and the time is near T*T/2.

The backward recomputes the probabilities from the log-sum-exp of each row (FlashAttention-2, Dao 2023,
arXiv:2307.08691, algorithm 2) and sums dk and dv in the carry of the scan. A soft-cap is one more factor there,
1 - tanh^2; the ALiBi slopes are constants.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from neo.kernels.attention.kernel import Extras, Kernel, Plan, Request
from neo.kernels.attention.spec import Mask, full_precision, visible

# Ours: without a window, G groups cover 1 + 1/G of the useful scores, and each is two more loops to compile (0.5 s on a
# CPU core): 4 up to 2,048 tokens, 8 from 4,096 on.
MIN_GROUPS, MAX_GROUPS, GROUP_TOKENS = 4, 8, 512

# Ours, measured on 2 CPU cores with 1 MiB of L2 each (T 128 to 8192, W 256 to 4096, B 1 to 16, forward and backward):
# the scores of one block should stay about in the cache; below 32 rows the loop itself costs more than it saves.
CPU_SCORES_BYTES = 3 << 19
CPU_BLOCKS = (128, 64, 32)
BLOCK = 128  # inferred, where there is no CPU cache to fit: 128 rows a head fill a matrix unit


def choose_block(rows: int, length: int, window: int, platform: str) -> int:
    """Queries a block: the largest whose fp32 scores, for `rows` = B * H heads, fit what was measured to be fast."""
    if platform != "cpu":
        return BLOCK
    for block in CPU_BLOCKS:
        if 4 * rows * block * min(length, block + window - 1) <= CPU_SCORES_BYTES:
            return block
    return CPU_BLOCKS[-1]


@dataclasses.dataclass(frozen=True)
class Bands:
    """How one call is cut: `length` queries (whole blocks, padded) against `keys` keys (padded alike)."""

    block: int
    length: int
    keys: int
    offset: int = 0
    window: int | None = None
    causal: bool = True

    @property
    def reach(self) -> int:
        """Keys a block may see: its own, and the W - 1 before its first query, in whole blocks."""
        if self.window is None or not self.causal:
            return self.keys
        return min(self.keys, self.block + -(-(self.window - 1) // self.block) * self.block)

    def end(self, index: int | Array) -> int | Array:
        """The key after the last one that block `index` may see."""
        return self.offset + (index + 1) * self.block if self.causal else self.keys

    def groups(self) -> list[tuple[int, int, int]]:
        """(first block, end block, band) of each group; the band of a block covers every key it can see."""
        n = self.length // self.block
        out: list[tuple[int, int, int]] = []
        count = min(MAX_GROUPS, max(MIN_GROUPS, self.length // GROUP_TOKENS))
        # A loop of one step is unrolled by XLA, and then the scores of all groups are alive at once: two steps or more.
        count = max(1, min(count, n // 2))
        edges = [n * g // count for g in range(count + 1)]
        for first, end in zip(edges[:-1], edges[1:], strict=True):
            band = min(self.reach, self.end(end - 1))
            if first == end:
                continue
            if out and out[-1][2] == band:
                out[-1] = (out[-1][0], end, band)
            else:
                out.append((first, end, band))
        return out


@dataclasses.dataclass(frozen=True)
class _Problem:
    """One call: padded arrays in the kernel's layout, and how to cut and score them."""

    plan: Plan
    bands: Bands
    dims: tuple[int, int]  # B, K
    keys: Array  # [B*K, S, h]
    values: Array
    extras: Extras  # padded

    def scores(self, qi: Array, kb: Array, index: Array, start: Array) -> tuple[Array, Array | None]:
        """Capped and biased fp32 scores of a block, [B, K, G, block, band], and the tanh of its soft-cap, None without."""
        band, block, softcap = kb.shape[1], self.bands.block, self.plan.softcap
        s = _product("nrh,nth->nrt", qi, kb) * self.plan.scale
        s = s.reshape(*self.dims, -1, block, band)
        tanh = None
        if softcap is not None:
            tanh = jnp.tanh(s / softcap)
            s = softcap * tanh
        if self.extras.slopes is not None:
            queries = self.bands.offset + index * block + jnp.arange(block)
            distance = (start + jnp.arange(band) - queries[:, None]).astype(jnp.float32)
            s = s + (self.extras.slopes[:, None, None] * distance).reshape(1, self.dims[1], -1, block, band)
        return s, tanh

    def seen(self, index: Array, start: Array, band: int) -> Array:
        """[B or 1, 1, 1, block, band] visibility of the band for the query block `index`."""
        block, extras = self.bands.block, self.extras
        pair = (None, None)
        if extras.segment_ids is not None:
            pair = _cut(extras.segment_ids, index * block, block), _cut(extras.kv_segment_ids, start, band)
        queries, keys = self.bands.offset + index * block + jnp.arange(block), start + jnp.arange(band)
        seen = visible(Mask(self.plan.causal, self.plan.window), queries, keys, *pair)
        if extras.first_key is not None:
            here = (keys >= extras.first_key)[None]
            seen = here if seen is None else seen & here
        if seen is None:
            seen = jnp.ones((1, 1), bool)
        return jnp.broadcast_to(seen, (*seen.shape[:-2], block, band)).reshape(-1, 1, 1, block, band)

    def band(self, index: Array, band: int) -> tuple[Array, Array, Array]:
        """(first key, keys, values) of the band of block `index`."""
        start = jnp.maximum(0, self.bands.end(index) - band)
        return start, _cut(self.keys, start, band), _cut(self.values, start, band)


def forward(
    q: Float[Array, "B T H h"], k: Float[Array, "B S K h"], v: Float[Array, "B S K h"], extras: Extras, plan: Plan,
    *, block: int | None = None,
) -> tuple[Float[Array, "B T H h"], Float[Array, "B H T"]]:  # fmt: skip
    """Output and log-sum-exp (see `Kernel`). Any T, S and W: the last block is padded.

    block: queries a step; None takes `choose_block`.
    """
    T, K = q.shape[1], k.shape[2]
    problem, (queries,) = _prepare((q,), k, v, extras, plan, block)
    bands, dims = problem.bands, problem.dims
    sinks = None if extras.sinks is None else extras.sinks.astype(jnp.float32).reshape(1, K, -1, 1, 1)

    def step(band, _, x):
        index, qi = x
        start, kb, vb = problem.band(index, band)
        s, _ = problem.scores(qi, kb, index, start)
        s = jnp.where(problem.seen(index, start, band), s, -jnp.inf)
        top = s.max(-1, keepdims=True)
        if sinks is not None:
            top = jnp.maximum(top, sinks)
        top = jnp.where(top == -jnp.inf, 0.0, top)  # a row that sees nothing: exp(-inf) = 0 everywhere
        p = jnp.exp(s - top)
        total = p.sum(-1, keepdims=True)
        if sinks is not None:
            total = total + jnp.exp(sinks - top)
        share = 1.0 / jnp.where(total == 0.0, 1.0, total)
        o = _product("nrt,nth->nrh", _rows(p).astype(vb.dtype), vb) * _rows(share)
        return None, (o.astype(q.dtype), _rows(top + jnp.log(total)))

    parts = []
    for first, end, band in bands.groups():
        _, part = jax.lax.scan(functools.partial(step, band), None, (jnp.arange(first, end), queries[first:end]))
        parts.append(part)
    o, lse = (_unblocks(_joined(part), dims, bands.block) for part in zip(*parts, strict=True))
    return o[:, :T], lse[:, :T, :, 0].swapaxes(1, 2)


def backward(
    q: Float[Array, "B T H h"], k: Float[Array, "B S K h"], v: Float[Array, "B S K h"], lse: Float[Array, "B H T"],
    delta: Float[Array, "B H T"], dout: Float[Array, "B T H h"], extras: Extras, plan: Plan, *, block: int | None = None,
) -> tuple[Float[Array, "B T H h"], Float[Array, "B S K h"], Float[Array, "B S K h"]]:  # fmt: skip
    """Gradients of q, k and v (see `Kernel`)."""
    T, S = q.shape[1], k.shape[1]
    rows = (x.swapaxes(1, 2)[..., None] for x in (lse, delta))
    problem, xs = _prepare((q, dout, *rows), k, v, extras, plan, block)
    bands, dims = problem.bands, problem.dims

    def step(band, carry, x):
        index, qi, di, lse_i, delta_i = x
        start, kb, vb = problem.band(index, band)
        s, tanh = problem.scores(qi, kb, index, start)
        wide = (*dims, -1, bands.block, 1)
        p = jnp.where(problem.seen(index, start, band), jnp.exp(s - lse_i.reshape(wide)), 0.0)
        dp = _product("nrh,nth->nrt", di, vb).reshape(p.shape)
        ds = p * (dp - delta_i.reshape(wide))
        if tanh is not None:
            ds = ds * (1.0 - tanh * tanh)
        ds = _rows(ds).astype(kb.dtype)
        dv = _product("nrt,nrh->nth", _rows(p).astype(vb.dtype), di)
        dk = _product("nrt,nrh->nth", ds, qi)
        dq = _product("nrt,nth->nrh", ds, kb) * plan.scale

        def add(a, b):
            return jax.lax.dynamic_update_slice_in_dim(a, _cut(a, start, band) + b, start, axis=1)

        return (add(carry[0], dk), add(carry[1], dv)), dq.astype(q.dtype)

    carry = (jnp.zeros(problem.keys.shape, jnp.float32), jnp.zeros(problem.values.shape, jnp.float32))
    parts = []
    for first, end, band in bands.groups():
        part_xs = (jnp.arange(first, end), *(x[first:end] for x in xs))
        carry, part = jax.lax.scan(functools.partial(step, band), carry, part_xs)
        parts.append(part)
    dq = _unblocks(_joined(parts), dims, bands.block)

    def heads(a):
        return a.reshape(*dims, bands.keys, -1).transpose(0, 2, 1, 3)[:, :S]

    return dq[:, :T], heads(carry[0] * plan.scale).astype(k.dtype), heads(carry[1]).astype(v.dtype)


def lacks(request: Request) -> str:
    """Nothing that a kernel may have."""
    return ""


KERNEL = Kernel("blockwise", forward, backward, lacks)


def _prepare(
    rows: tuple[Array, ...], k: Array, v: Array, extras: Extras, plan: Plan, block: int | None
) -> tuple[_Problem, list[Array]]:
    """Pad to whole blocks. rows: arrays [B, T, H, x], q first, returned as `_blocks`."""
    (B, T, H, _), (_, S, K, _) = rows[0].shape, k.shape
    if block is None:
        block = choose_block(B * H, S, min(plan.window or S, S), plan.platform or jax.default_backend())
    block = min(block, T)
    pad = -T % block
    # Causal: padded keys stand after every real query, which hides them. Else no key is padded. Padded queries are cut off.
    more_keys = pad if plan.causal else 0
    rows = tuple(_pad(x, pad) for x in rows)
    k, v = _pad(k, more_keys), _pad(v, more_keys)
    if extras.segment_ids is not None:
        extras = extras._replace(segment_ids=_pad(extras.segment_ids, pad),
                                 kv_segment_ids=_pad(extras.kv_segment_ids, more_keys))  # fmt: skip
    bands = Bands(block, T + pad, S + more_keys, plan.offset, plan.window, plan.causal)
    problem = _Problem(plan, bands, (B, K), _keys(k), _keys(v), extras)
    return problem, [_blocks(x, K, block) for x in rows]


def _product(letters: str, a: Array, b: Array) -> Array:
    return jnp.einsum(letters, a, b, precision=full_precision(a.dtype), preferred_element_type=jnp.float32)


def _pad(x: Array, more: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, more), *((0, 0),) * (x.ndim - 2))) if more else x


def _blocks(x: Array, heads: int, block: int) -> Array:
    """[B, T, H, x] -> [n, B*K, G*block, x]: the query heads of one key head are more rows of its matmul."""
    B, T, H, d = x.shape
    n, G = T // block, H // heads
    return x.reshape(B, n, block, heads, G, d).transpose(1, 0, 3, 4, 2, 5).reshape(n, B * heads, G * block, d)


def _unblocks(x: Array, dims: tuple[int, int], block: int) -> Array:
    """The inverse of `_blocks`: [n, B*K, G*block, x] -> [B, T, H, x]."""
    (B, K), n, d = dims, x.shape[0], x.shape[-1]
    G = x.shape[2] // block
    return x.reshape(n, B, K, G, block, d).transpose(1, 0, 4, 2, 3, 5).reshape(B, n * block, K * G, d)


def _keys(x: Array) -> Array:
    """[B, S, K, h] -> [B*K, S, h]."""
    B, S, K, h = x.shape
    return x.transpose(0, 2, 1, 3).reshape(B * K, S, h)


def _rows(x: Array) -> Array:
    """[B, K, G, block, x] -> [B*K, G*block, x]."""
    return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])


def _joined(parts: list[Array] | tuple[Array, ...]) -> Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _cut(x: Array, start: Array | int, size: int) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis=1)
