"""Forward attention on TPU (Mosaic): online softmax over the band of visible tiles only.

Grid (B*K, rows, steps), see `tiles.row_grid`: one step is one tile of block_q queries of all G heads of a kv head
against block_kv keys. A query block meets its key blocks from the diagonal backwards. What a tile must mask follows
from the step alone, so there is one compiled body for tiles that see everything, one for each kind of edge with the
parts that see nothing left out, and, only where segments, first_key or padded keys ask for it, one that masks
everything. Tiles are cut in chunks of rows; a chunk's q k^T is issued before the softmax of the chunk before it.

Scores are in base 2 and q carries the scale (`tiles.prescale`): exp2(score - max) needs no multiplication. The sum of
the softmax is kept one a lane and folded at the end. The log-sum-exp leaves as [B*K, G, T] fp32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from neo.kernels.attention.kernel import Extras, Plan
from neo.kernels.attention.tpu.blocks import ForwardBlocks, forward_blocks
from neo.kernels.attention.tpu.tiles import (
    EMPTY,
    FULL,
    HIDDEN,
    LANES,
    LN_2,
    LOG2_E,
    PARTIAL,
    RowGrid,
    SegmentRanges,
    Tiles,
    pad_segments,
    pad_to,
    prescale,
    row_grid,
    row_step,
    segment_ranges,
)

_reciprocal = getattr(pltpu, "reciprocal", None) or pl.reciprocal  # it moved in JAX 0.11
QK = (((1,), (1,)), ((), ()))  # [m, h] x [n, h] -> [m, n]
PV = (((1,), (0,)), ((), ()))  # [m, n] x [n, h] -> [m, h]


Chunk = tuple[tuple[int, int], tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class _Kernel:
    """The static facts of one compiled forward. Hashable."""

    tiles: Tiles
    grid: RowGrid
    blocks: ForwardBlocks
    batch: int
    kv_heads: int
    plan: Plan
    segments: bool
    slopes: bool
    sinks: bool
    first_key: bool

    @property
    def num_kv(self) -> int:
        """Key blocks including those that only padded queries see."""
        return max(self.tiles.num_kv, self.tiles.last_kv(self.tiles.num_q - 1) + 1)

    @property
    def dynamic(self) -> bool:
        """Whether which tiles are seen depends on arrays."""
        return self.segments or self.first_key

    @property
    def may_mask_all(self) -> bool:
        """Whether the body that masks everything is needed."""
        return self.dynamic or self.tiles.hides_padded_keys

    def chunks(self, edge: bool = False, within: tuple[int, int] | None = None) -> Iterator[Chunk]:
        """(heads, rows) of each chunk of (some rows of) a query block, half-open ranges; lower ones for edges."""
        heads, length = self.blocks.chunk(self.tiles.stack, edge)
        first, last = within or (0, self.tiles.block_q)
        for row in range(first, last, length):
            for head in range(0, self.tiles.stack, heads):
                yield (head, head + heads), (row, min(row + length, last))

    def edge_chunks(self, delta: int) -> Iterator[Chunk]:
        """Those of a tile at an edge: rows that see all of it are taken as in any other tile."""
        length = self.blocks.chunk(self.tiles.stack, edge=False)[1]
        for row in range(0, self.tiles.block_q, length):
            rows = row, row + length
            yield from self.chunks(self.tiles.kind(delta, rows) != FULL, rows)

    def first_step(self, rows: tuple[int, int]) -> int:
        """The first u at which some of these rows see a key: there the softmax starts."""
        deltas = (self.tiles.query_delta(u) for u in range(self.tiles.band))
        return next((u for u, delta in enumerate(deltas) if self.tiles.kind(delta, rows) != EMPTY), 0)


def forward(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    extras: Extras,
    plan: Plan,
    blocks: ForwardBlocks | None = None,
) -> tuple[Float[Array, "B T H h"], Float[Array, "B H T"]]:
    """(out, lse) as `kernel.Kernel` asks. blocks: the sizes of tiles; None takes the table's."""
    (batch, seq_len, heads, head), (kv_len, kv_heads) = q.shape, k.shape[1:3]
    stack = heads // kv_heads
    if blocks is None:
        blocks = forward_blocks(seq_len, plan.window, head, stack, q.dtype == jnp.float32, plan.device_kind)
    tiles = Tiles(
        batch * kv_heads, stack, seq_len, kv_len, head, blocks.block_q, blocks.block_kv,
        plan.causal, plan.window, plan.offset,
    )  # fmt: skip
    segments = extras.segment_ids is not None
    spec = _Kernel(
        tiles, row_grid(tiles), blocks, batch, kv_heads, plan, segments,
        extras.slopes is not None, extras.sinks is not None, extras.first_key is not None,
    )  # fmt: skip
    q = q.reshape(batch, seq_len, kv_heads, stack, head).transpose(0, 2, 3, 1, 4)
    q = pad_to(q.reshape(batch * kv_heads, stack, seq_len, head), 2, tiles.padded_seq_len)
    padded = spec.num_kv * tiles.block_kv
    k, v = (pad_to(x.swapaxes(1, 2).reshape(batch * kv_heads, kv_len, head), 1, padded) for x in (k, v))
    facts, ids = _facts(spec, extras)
    per_head = [
        (x.astype(jnp.float32) * LOG2_E).reshape(kv_heads, stack) for x in (extras.slopes, extras.sinks) if x is not None
    ]
    out, lse = _call(spec, q, k, v, facts, ids, per_head)
    out = out.reshape(batch, kv_heads, stack, tiles.padded_seq_len, head)[..., :seq_len, :]
    lse = lse.reshape(batch, heads, tiles.padded_seq_len)[..., :seq_len]
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, seq_len, heads, head), lse


def _facts(spec: _Kernel, extras: Extras) -> tuple[Int[Array, "n"] | None, list[Array]]:
    """What the scalar core reads ahead of the tiles (`_Facts` names the parts), and the ids that the vector core reads."""
    tiles = spec.tiles
    if not spec.dynamic:
        return None, []
    first_key = jnp.zeros((), jnp.int32) if extras.first_key is None else extras.first_key.astype(jnp.int32)
    parts = [jnp.maximum(first_key, 0)[None], (jnp.maximum(first_key, 0) // tiles.block_kv)[None]]
    ids = []
    if spec.segments:
        whole = dataclasses.replace(tiles, kv_len=max(tiles.kv_len, (spec.num_kv - 1) * tiles.block_kv + 1))
        q_ids, kv_ids = pad_segments(whole, extras.segment_ids, extras.kv_segment_ids)
        ranges: SegmentRanges = segment_ranges(whole, q_ids, kv_ids)
        meet = ranges.meet()
        index = jnp.arange(spec.num_kv, dtype=jnp.int32)
        low = jnp.where(meet, index, spec.num_kv - 1).min(-1)
        high = jnp.where(meet, index, 0).max(-1)
        for part in (low, high, ranges.q_low, ranges.q_high, ranges.kv_low, ranges.kv_high):
            parts.append(part.astype(jnp.int32).reshape(-1))
        ids = [q_ids[:, None], kv_ids[:, None]]
    return jnp.concatenate(parts), ids


class _Facts:
    """Reads the scalars that `_facts` laid out one after the other."""

    def __init__(self, spec: _Kernel, ref):
        self.spec, self.ref = spec, ref
        q, kv = spec.batch * spec.tiles.num_q, spec.batch * spec.num_kv
        self.starts = [2]
        for size in (q, q, q, q, kv):
            self.starts.append(self.starts[-1] + size)

    def _q(self, part: int, group, i):
        return self.ref[self.starts[part] + lax.div(group, self.spec.kv_heads) * self.spec.tiles.num_q + i]

    def _kv(self, part: int, group, j):
        return self.ref[self.starts[part] + lax.div(group, self.spec.kv_heads) * self.spec.num_kv + j]

    def fetched(self, group, i, j):
        """The key block to have in memory at a step: steps that compute nothing keep a neighbour's, and move nothing."""
        j = jnp.maximum(j, jnp.minimum(self.ref[1], self.spec.num_kv - 1))
        if self.spec.segments:
            j = jnp.maximum(jnp.minimum(j, self._q(1, group, i)), self._q(0, group, i))
        return j

    def look(self, group, i, j):
        """(some of the tile may be seen, it must be masked for segments or first_key)."""
        first_key, start = self.ref[0], j * self.spec.tiles.block_kv
        seen, mask = start + self.spec.tiles.block_kv > first_key, start < first_key
        if self.spec.segments:
            q_low, q_high = self._q(2, group, i), self._q(3, group, i)
            kv_low, kv_high = self._kv(4, group, j), self._kv(5, group, j)
            seen &= (q_low <= kv_high) & (kv_low <= q_high)
            mask |= (q_low != q_high) | (kv_low != kv_high) | (q_low != kv_low)
        return seen, mask


def _call(spec: _Kernel, q, k, v, facts, ids, per_head) -> tuple[Array, Array]:
    """The pallas_call. q [B*K, G, Tp, h], k and v [B*K, Sp, h] -> out like q, lse [B*K, G, Tp]."""
    tiles, grid = spec.tiles, spec.grid
    stack, head, block_q, block_kv = tiles.stack, tiles.head, tiles.block_q, tiles.block_kv

    def row(g, t):
        return row_step(tiles, grid, g, t)[0]

    def key_block(n, g, t, *facts_ref):
        i, u = row_step(tiles, grid, g, t)
        j = jnp.maximum(tiles.last_kv(i) - jnp.minimum(u, tiles.band - 1), 0)
        return _Facts(spec, facts_ref[0]).fetched(n, i, j) if spec.dynamic else j

    q_spec = pl.BlockSpec((None, stack, block_q, head), lambda n, g, t, *_: (n, 0, row(g, t), 0))
    kv_spec = pl.BlockSpec((None, block_kv, head), lambda n, g, t, *f: (n, key_block(n, g, t, *f), 0))
    lse_spec = pl.BlockSpec((None, stack, block_q), lambda n, g, t, *_: (n, 0, row(g, t)))
    in_specs = [q_spec, kv_spec, kv_spec]
    if spec.segments:
        batch = functools.partial(lambda n: lax.div(n, spec.kv_heads))
        in_specs.append(pl.BlockSpec((None, 1, block_q), lambda n, g, t, *_: (batch(n), 0, row(g, t))))
        in_specs.append(pl.BlockSpec((None, 1, block_kv), lambda n, g, t, *f: (batch(n), 0, key_block(n, g, t, *f))))
    in_specs += [pl.BlockSpec(memory_space=pltpu.SMEM)] * len(per_head)
    scratch = [
        pltpu.VMEM((stack, block_q, head), q.dtype),  # q with the scale in it
        pltpu.VMEM((stack, block_q, LANES), jnp.float32),  # running maximum, the same in every lane
        pltpu.VMEM((stack, block_q, LANES), jnp.float32),  # running sum, a part in every lane
        pltpu.VMEM((stack, block_q, head), jnp.float32),  # running out
    ]
    call = pl.pallas_call(
        functools.partial(_body, spec),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=int(spec.dynamic),
            grid=(tiles.groups, grid.rows, grid.width),
            in_specs=in_specs,
            out_specs=[q_spec, lse_spec],
            scratch_shapes=scratch,
        ),
        out_shape=[
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            jax.ShapeDtypeStruct((tiles.groups, stack, tiles.padded_seq_len), jnp.float32),
        ],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=spec.blocks.vmem
        ),
        interpret=spec.plan.interpret,
        name="neo_attention_forward",
    )
    return tuple(call(*([facts] if spec.dynamic else []), q, k, v, *ids, *per_head))


@dataclasses.dataclass
class _Refs:
    """The references of one step by name; None where the call has none."""

    facts: object
    q: object
    k: object
    v: object
    q_ids: object
    kv_ids: object
    slopes: object
    sinks: object
    out: object
    lse: object
    scaled: object
    high: object
    total: object
    acc: object


def _name_refs(spec: _Kernel, refs) -> _Refs:
    left = list(refs)

    def take(there: bool):
        return left.pop(0) if there else None

    always = True
    there = (spec.dynamic, always, always, always, spec.segments, spec.segments, spec.slopes, spec.sinks) + (always,) * 6
    return _Refs(*(take(x) for x in there))


def _body(spec: _Kernel, *all_refs) -> None:
    """One grid step."""
    refs, tiles = _name_refs(spec, all_refs), spec.tiles
    group, g, t = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    i, u = row_step(tiles, spec.grid, g, t)
    j = tiles.last_kv(i) - u
    here = (j >= 0) & (u < tiles.band)

    @pl.when(u == 0)
    def _():
        refs.scaled[...] = prescale(refs.q[...], spec.plan.scale, spec.plan.softcap)
        if spec.dynamic or spec.sinks or not tiles.causal:
            _start(spec, refs, group)

    seen, mask_all = here, False
    if spec.dynamic:
        seen, mask_all = _Facts(spec, refs.facts).look(group, i, jnp.maximum(j, 0))
        seen &= here
    if tiles.hides_padded_keys:
        mask_all |= j == spec.num_kv - 1
    delta = tiles.offset + i * tiles.block_q - j * tiles.block_kv
    if spec.may_mask_all:
        pl.when(seen & mask_all)(lambda: _tile(spec, refs, group, delta, None, j))
        seen &= ~mask_all
    if not tiles.causal:
        pl.when(seen)(lambda: _tile(spec, refs, group, delta, None, None))
    else:
        edges = [e for e in range(tiles.band) if tiles.kind(tiles.query_delta(e)) == PARTIAL or _starts(spec, e)]
        inside = seen
        for e in edges:
            pl.when(seen & (u == e))(functools.partial(_tile, spec, refs, group, tiles.query_delta(e), e, None))
            inside &= u != e
        if len(edges) < tiles.band:
            pl.when(inside)(lambda: _tile(spec, refs, group, delta, None, None))
    pl.when(here & ((j == 0) | (u == tiles.band - 1)))(lambda: _finish(spec, refs))


def _starts(spec: _Kernel, u: int) -> bool:
    """Whether a softmax starts at step u (where no separate start writes the state)."""
    return any(spec.first_step(rows) == u for _, rows in spec.chunks(edge=True))


def _start(spec: _Kernel, refs: _Refs, group) -> None:
    """The state before the first tile: nothing seen, or the sink seen."""
    refs.acc[...] = jnp.zeros_like(refs.acc)
    if not spec.sinks:
        refs.high[...] = jnp.full_like(refs.high, HIDDEN)
        refs.total[...] = jnp.zeros_like(refs.total)
        return
    kv_head, shape = lax.rem(group, spec.kv_heads), refs.high.shape[1:]
    one = (lax.broadcasted_iota(jnp.int32, shape, 1) == 0).astype(jnp.float32)  # the sum is folded over the lanes
    for n in range(spec.tiles.stack):
        refs.high[n] = jnp.full(shape, refs.sinks[kv_head, n], jnp.float32)
        refs.total[n] = one


def _dot(a: Array, b: Array, dims) -> Array:
    """fp32 product; of fp32 operands a true one."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def _wide(x: Float[Array, "m 128"], width: int) -> Float[Array, "m w"]:
    """The same number in `width` lanes."""
    if width <= LANES:
        return x[:, :width]
    return jnp.concatenate([x] * (width // LANES) + ([x[:, : width % LANES]] if width % LANES else []), axis=1)


def _tile(spec: _Kernel, refs: _Refs, group, delta, step: int | None, key_block) -> None:
    """Takes one tile into the running softmax.

    step: u where delta is an int and the body is of an edge; None: nothing is hidden by the band here, or everything is
    masked. key_block: None, or the block's index: mask everything that can hide a key.
    """
    tiles = spec.tiles
    jobs = []
    for heads, rows in spec.chunks() if step is None else spec.edge_chunks(delta):
        columns = (0, tiles.block_kv) if step is None else tiles.columns(delta, rows)
        if columns[0] < columns[1]:
            jobs.append((heads, rows, columns))

    def scores(job):
        heads, rows, columns = job
        q = refs.scaled[heads[0] : heads[1], rows[0] : rows[1]]
        return _dot(q.reshape(-1, tiles.head), refs.k[columns[0] : columns[1]], QK)

    ahead = scores(jobs[0])
    for index, job in enumerate(jobs):
        now = ahead
        if index + 1 < len(jobs):
            ahead = scores(jobs[index + 1])
        heads, rows, columns = job
        now = _bias_and_mask(spec, refs, group, delta, step, key_block, job, now)
        fresh = step is not None and not (spec.dynamic or spec.sinks) and spec.first_step(rows) == step
        _accumulate(spec, refs, heads, rows, columns, now, fresh)


def _bias_and_mask(spec: _Kernel, refs: _Refs, group, delta, step, key_block, job, s):
    """Soft-cap, ALiBi and masks of a chunk of scores."""
    tiles, plan = spec.tiles, spec.plan
    heads, rows, columns = job
    count, length, width = heads[1] - heads[0], rows[1] - rows[0], columns[1] - columns[0]
    if plan.softcap is not None:
        s = jnp.tanh(s) * (plan.softcap * LOG2_E)
    if spec.slopes:
        kv_head = lax.rem(group, spec.kv_heads)
        far = lax.broadcasted_iota(jnp.int32, (length, width), 1) - lax.broadcasted_iota(jnp.int32, (length, width), 0)
        far = (far + (columns[0] - rows[0] - delta)).astype(jnp.float32)
        s = s.reshape(count, length, width)
        s = jnp.concatenate([s[n] + far * refs.slopes[kv_head, heads[0] + n] for n in range(count)], axis=0)
    if key_block is not None:
        seen = tiles.visible(delta, rows, columns)
        for term in _array_masks(spec, refs, rows, columns, key_block):
            seen = term if seen is None else seen & term
        return _hide(s, seen, count)
    if step is None:
        return s
    parts = []  # columns that all rows see need no mask
    for column in range(*columns, LANES):
        part = s[:, column - columns[0] : column - columns[0] + LANES]
        if tiles.kind(delta, rows, (column, column + LANES)) != FULL:
            part = _hide(part, tiles.visible(delta, rows, (column, column + LANES)), count)
        parts.append(part)
    return jnp.concatenate(parts, axis=1)


def _hide(s: Float[Array, "m n"], seen, count: int) -> Float[Array, "m n"]:
    """Scores of `count` heads stacked, hidden where the heads' common mask says so."""
    if seen is None:
        return s
    return jnp.where(seen[None], s.reshape(count, -1, s.shape[1]), HIDDEN).reshape(s.shape)


def _array_masks(spec: _Kernel, refs: _Refs, rows, columns, key_block):
    """Masks that depend on arrays, and of padded keys."""
    shape = (rows[1] - rows[0], columns[1] - columns[0])
    if spec.segments:
        q_ids = jnp.broadcast_to(refs.q_ids[:, rows[0] : rows[1]], (LANES, shape[0])).T
        q_ids = jnp.concatenate([q_ids] * (shape[1] // LANES), axis=1)
        yield q_ids == jnp.broadcast_to(refs.kv_ids[:, columns[0] : columns[1]], shape)
    if spec.first_key or spec.tiles.hides_padded_keys:
        key = lax.broadcasted_iota(jnp.int32, shape, 1) + (key_block * spec.tiles.block_kv + columns[0])
        if spec.first_key:
            yield key >= refs.facts[0]
        if spec.tiles.hides_padded_keys:
            yield key < spec.tiles.kv_len


def _accumulate(spec: _Kernel, refs: _Refs, heads, rows, columns, s: Float[Array, "m n"], fresh: bool) -> None:
    """One step of the online softmax for a chunk. fresh: it is the first, the state holds nothing yet."""
    head = spec.tiles.head
    at = (slice(*heads), slice(*rows))
    shape = (heads[1] - heads[0], rows[1] - rows[0])
    high = jnp.broadcast_to(s.max(axis=1, keepdims=True), (s.shape[0], LANES))
    if not fresh:
        before = refs.high[at].reshape(-1, LANES)
        high = jnp.maximum(before, high)
    p = jnp.exp2(s - _wide(high, s.shape[1]))
    total = sum(p[:, n : n + LANES] for n in range(0, s.shape[1], LANES))
    v = refs.v[columns[0] : columns[1]]
    acc = _dot(p.astype(v.dtype), v, PV)
    if not fresh:
        decay = jnp.exp2(before - high)
        total += refs.total[at].reshape(-1, LANES) * decay
        acc += refs.acc[at].reshape(-1, head) * _wide(decay, head)
    refs.high[at] = high.reshape(*shape, LANES)
    refs.total[at] = total.reshape(*shape, LANES)
    refs.acc[at] = acc.reshape(*shape, head)


def _inverse(spec: _Kernel, x: Float[Array, "..."]) -> Float[Array, "..."]:
    """1 / x of positive finite numbers to fp32. On v5 a division spends 14 vector operations, most of them on infinities
    and subnormals; its one Newton step alone is 3. Interpreters take a coarser guess than the chip's: they divide.
    """
    if not spec.blocks.newton or spec.plan.interpret:
        return 1.0 / x
    guess = _reciprocal(x, approx=True)
    return guess * (2.0 - x * guess)


def _finish(spec: _Kernel, refs: _Refs) -> None:
    """Writes out and lse of a query block. A row that saw nothing gives 0 and -inf."""
    head = spec.tiles.head
    may_be_empty = spec.dynamic and not spec.sinks
    diagonal = lax.broadcasted_iota(jnp.int32, (LANES, LANES), 0) == lax.broadcasted_iota(jnp.int32, (LANES, LANES), 1)

    def row(x: Float[Array, "128 128"]) -> Float[Array, "1 128"]:
        """A column, the same in every lane, laid along the lanes: cheaper than a transpose."""
        return jnp.where(diagonal, x, 0.0).sum(axis=0, keepdims=True)

    for n in range(spec.tiles.stack):
        for start in range(0, spec.tiles.block_q, LANES):
            at = slice(start, start + LANES)
            high, total = refs.high[n, at], refs.total[n, at].sum(axis=1, keepdims=True)
            total = jnp.broadcast_to(total, high.shape)
            factor, high_row = _inverse(spec, total), row(high)
            lse = (high_row + jnp.log2(row(total))) * LN_2
            if may_be_empty:
                factor = jnp.where(high < HIDDEN / 2, 0.0, factor)
                lse = jnp.where(high_row < HIDDEN / 2, -jnp.inf, lse)
            refs.out[n, at] = (refs.acc[n, at] * _wide(factor, head)).astype(refs.out.dtype)
            refs.lse[n : n + 1, at] = lse
