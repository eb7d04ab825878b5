"""One tile of the backward on TPU, shared by the one-pass kernel (`backward`) and the pair of kernels (`backward_two`).

Scores are held transposed, keys along sublanes and queries along lanes, because log-sum-exp and delta are one number a
query: as rows [1, block_q] they broadcast over sublanes for nothing, and HBM holds them compactly. With

    s = K Q^T    p = 2^(s - lse)    dp = V dO^T    ds = p (dp - delta)          all [keys, queries]
    dV += p dO                      dK += ds Q          dQ += ds^T K

(FlashAttention-2, arXiv:2307.08691, algorithm 2) a tile takes 5 matmuls and one transpose, of ds. In a matrix unit of
256 x 256 (v6e, TPU7x) the last three products of h = 128 would fill half of the columns. There the sums are `turned`:

    dV^T += dO^T p^T                dK^T += Q^T ds^T    dQ^T += K^T ds          [h, keys], [h, keys], [h, queries]

the scores are the operand that sits in the unit, filling it, and the h rows are streamed; ds needs no transpose, Q and dO
do, which are smaller. Ours, compiled (libtpu 0.0.51, v6e, h=128, G=4): 8.8k instead of 10.9k bundles for 4 x 512 x 1024
scores. Units of 128 x 128 (v5e, v5p) are full either way and gain nothing.

What is visible in a tile depends on the distance of its blocks alone, so a tile is one of a few programs made when the
kernel is compiled: interior (nothing masked), one for every block diagonal that an edge of the window crosses (parts that
cannot count are not computed, only parts that the edge crosses are masked), and one with all masks at run time for what
is known only then (segments, first_key, padded keys).
"""

from __future__ import annotations

import dataclasses
import functools
from types import SimpleNamespace

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float

from neo.kernels.attention.kernel import Extras
from neo.kernels.attention.tpu import tiles as geometry
from neo.kernels.attention.tpu.tiles import EMPTY, FULL, LANES, PARTIAL, Tiles

ROWS = (((1,), (1,)), ((), ()))  # A B^T
PLAIN = (((1,), (0,)), ((), ()))  # A B


@dataclasses.dataclass(frozen=True)
class Call:
    """The static facts of one backward call; what both paths and every program of a tile read.

    kv_heads: K, to find the batch of a group. part: granularity, in scores, of what an edge tile leaves out.
    columns: of one piece of a tile of which all counts.
    unroll: query heads of a group whose programs are laid out one after the other; the rest is a loop.
    turned: sums of dq, dk, dv are kept as [h, positions], see the module's text.
    """

    tiles: Tiles
    kv_heads: int
    scale: float
    softcap: float | None
    dtype: jnp.dtype
    segments: bool
    slopes: bool
    first_key: bool
    part: int
    columns: int
    unroll: int
    turned: bool
    interpret: object

    @property
    def num_kv(self) -> int:
        """Rows of key blocks in the grid: every query block has its diagonal in one, though all its keys be padding."""
        t = self.tiles
        return max(t.num_kv, t.last_kv(t.num_q - 1) + 1) if t.causal else t.num_kv

    def summed(self, positions: int) -> tuple[int, int]:
        """Shape of the sum of dq, dk or dv over some positions."""
        return (self.tiles.head, positions) if self.turned else (positions, self.tiles.head)

    @property
    def late(self) -> bool:
        """Whether some masks are known only at run time."""
        return self.segments or self.first_key or self.tiles.hides_padded_keys

    @functools.cached_property
    def edges(self) -> tuple[int, ...]:
        """Distances (query block - first query block that sees the key block) that an edge of the window crosses."""
        return tuple(u for u in range(self.reach) if self.tiles.kind(self.tiles.key_delta(u)) == PARTIAL)

    @functools.cached_property
    def reach(self) -> int:
        """Number of such distances at which anything is visible; where all is visible from some on, that many."""
        t, u = self.tiles, 0
        while (kind := t.kind(t.key_delta(u))) != EMPTY and not (t.window is None and kind == FULL):
            u += 1
        return u

    # ---- names of the kernels' references, in order
    @property
    def scalars(self) -> tuple[str, ...]:
        """In SMEM, before the grid begins."""
        ranges = ("q_low", "q_high", "kv_low", "kv_high", "q_from", "q_to", "kv_from", "kv_to") if self.segments else ()
        return ("first_key",) * self.first_key + ("slopes",) * self.slopes + ranges

    @property
    def inputs(self) -> tuple[str, ...]:
        """Blocks in VMEM."""
        return ("q", "k", "v", "dout", "rows") + (("q_ids", "kv_ids") if self.segments else ())


def operands(
    call: Call, q: Array, k: Array, v: Array, lse: Array, delta: Array, dout: Array, extras: Extras
) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
    """(scalars, inputs) in the order of `Call.scalars` and `Call.inputs`.

    q, dout [B*K, G, Tp, h] (q pre-scaled as in the forward), k, v [B*K, Sp, h], rows [B*K, G, 2, Tp] fp32: lse in base 2
    and delta, ids [B, 1, Tp] and [B, 1, Sp] int32. Padded queries have lse = +inf, so that their p is 0.
    """
    t = call.tiles
    batch, seq_len, heads, head = q.shape
    keys = call.num_kv * t.block_kv

    def queries(x: Array) -> Array:
        x = x.reshape(batch, seq_len, call.kv_heads, t.stack, head).transpose(0, 2, 3, 1, 4)
        return geometry.pad_to(x.reshape(t.groups, t.stack, seq_len, head), 2, t.padded_seq_len)

    def rows(x: Array, fill: float) -> Array:
        pad = ((0, 0), (0, 0), (0, 0), (0, t.padded_seq_len - seq_len))
        return jnp.pad(x.astype(jnp.float32).reshape(t.groups, t.stack, 1, seq_len), pad, constant_values=fill)

    def key_values(x: Array) -> Array:
        return geometry.pad_to(x.transpose(0, 2, 1, 3).reshape(t.groups, t.kv_len, head), 1, keys)

    named = {
        "q": queries(geometry.prescale(q, call.scale, call.softcap)),
        "k": key_values(k),
        "v": key_values(v),
        "dout": queries(dout.astype(q.dtype)),
        "rows": jnp.concatenate([rows(lse * geometry.LOG2_E, jnp.inf), rows(delta, 0.0)], 2),
    }
    if call.first_key:
        named["first_key"] = jnp.asarray(extras.first_key, jnp.int32).reshape(1)
    if call.slopes:
        named["slopes"] = extras.slopes.astype(jnp.float32) * geometry.LOG2_E
    if call.segments:
        named |= _segment_operands(call, extras)
    return tuple(named[n] for n in call.scalars), tuple(named[n] for n in call.inputs)


def _segment_operands(call: Call, extras: Extras) -> dict[str, Array]:
    """Ids, their range in every block, and for every block the first and last block of the other kind it can meet."""
    t = call.tiles
    q_ids, kv_ids = geometry.pad_segments(t, extras.segment_ids, extras.kv_segment_ids)
    ranges = geometry.segment_ranges(t, q_ids, kv_ids)
    meet = ranges.meet()
    extra = ((0, 0), (0, 0), (0, call.num_kv - t.num_kv))
    meet = jnp.pad(meet, extra)
    i, j = jnp.arange(t.num_q)[:, None], jnp.arange(call.num_kv)[None]

    def span(index: Array, size: int, axis: int) -> tuple[Array, Array]:
        return jnp.where(meet, index, size - 1).min(axis), jnp.where(meet, index, 0).max(axis)

    q_from, q_to = span(i, t.num_q, 1)
    kv_from, kv_to = span(j, call.num_kv, 2)

    def blocks(x: Array) -> Array:
        return jnp.pad(x, ((0, 0), (0, call.num_kv - t.num_kv)), mode="edge")

    flat = {"q_low": ranges.q_low, "q_high": ranges.q_high, "kv_low": blocks(ranges.kv_low)}
    flat |= {"kv_high": blocks(ranges.kv_high), "q_from": q_from, "q_to": q_to, "kv_from": kv_from, "kv_to": kv_to}
    flat = {name: x.astype(jnp.int32).reshape(-1) for name, x in flat.items()}
    kv_ids = geometry.pad_to(kv_ids, 1, call.num_kv * t.block_kv, "edge")
    return flat | {"q_ids": q_ids[:, None], "kv_ids": kv_ids[:, None]}


def input_specs(call: Call, place) -> list[pl.BlockSpec]:
    """Block specs of `Call.inputs`. place(b, x, y, scalars) -> (query block, key block) of a grid step."""
    t = call.tiles
    heads = call.kv_heads

    def at(kind: str, shape: tuple):
        def index(b, x, y, *scalars):
            i, j = place(b, x, y, SimpleNamespace(**dict(zip(call.scalars, scalars, strict=True))))
            if kind.endswith("ids"):
                return lax.div(b, heads), 0, i if kind == "q_ids" else j
            return {"q": (b, 0, i, 0), "kv": (b, j, 0), "row": (b, 0, 0, i)}[kind]

        return pl.BlockSpec(shape, index)

    q = at("q", (None, t.stack, t.block_q, t.head))
    kv = at("kv", (None, t.block_kv, t.head))
    row = at("row", (None, t.stack, 2, t.block_q))
    ids = [at("q_ids", (None, 1, t.block_q)), at("kv_ids", (None, 1, t.block_kv))] if call.segments else []
    return [q, kv, kv, q, row, *ids]


# ---- inside a kernel


def accumulate(call: Call, refs: SimpleNamespace, group, i, j, live) -> None:
    """Adds the tile of query block i and key block j to refs.dq, refs.dk, refs.dv; those that are None are left out.

    refs: inputs by name; dq [G, block_q, h], dk, dv [block_kv, h] fp32 accumulators. live: whether the tile is in the
    grid at all (a traced bool). A tile in which nothing is visible is not computed.
    """
    t = call.tiles
    distance = i - t.first_q(j)
    live = live & (j < t.num_kv)
    late = None
    if call.first_key:
        first = refs.first_key[0]
        live = live & ((j + 1) * t.block_kv > first)
        late = j * t.block_kv < first
    if call.segments:
        batch = lax.div(group, call.kv_heads)
        q, kv = batch * t.num_q + jnp.clip(i, 0, t.num_q - 1), batch * call.num_kv + j
        low, high = refs.q_low[q], refs.q_high[q]
        live = live & (low <= refs.kv_high[kv]) & (refs.kv_low[kv] <= high)
        mixed = (low != high) | (refs.kv_low[kv] != low) | (refs.kv_high[kv] != low)
        late = mixed if late is None else late | mixed
    if t.hides_padded_keys:
        last = j == t.num_kv - 1
        late = last if late is None else late | last
    inside = live
    if t.causal:
        live = live & (distance >= 0)
        inside = live & (distance < call.reach) if t.window is not None else live
        live = inside
        for edge in call.edges:
            inside = inside & (distance != edge)
    tile = functools.partial(_tile, call, refs, group, j)
    if late is not None:
        pl.when(live & late)(lambda: tile(whole(t, call.columns), t.offset + i * t.block_q - j * t.block_kv, late=True))
        live, inside = live & ~late, inside & ~late
    for edge in call.edges:
        delta = t.key_delta(edge)
        pl.when(live & (distance == edge))(functools.partial(tile, parts(t, delta, call.part), delta))
    if t.window is None or len(call.edges) < call.reach:
        pl.when(inside)(lambda: tile(whole(t, call.columns), t.offset + i * t.block_q - j * t.block_kv))


Piece = tuple[tuple[int, int], tuple[int, int], tuple[tuple[int, int], ...]]  # rows, columns, rows to mask


def whole(t: Tiles, step: int) -> tuple[Piece, ...]:
    """All of a tile, in pieces of `step` columns."""
    step = min(step, t.block_kv)
    return tuple(((0, t.block_q), (c, c + step), ()) for c in range(0, t.block_kv, step))


def parts(t: Tiles, delta: int, step: int) -> tuple[Piece, ...]:
    """Rows x columns that cover what is visible in a tile, cut at multiples of `step`, and which of the rows to mask."""
    found = []
    row_step, column_step = min(step, t.block_q), min(step, t.block_kv)
    for c in range(0, t.block_kv, column_step):
        columns = (c, c + column_step)
        low, high = t.rows(delta, columns, row_step)
        cuts = [(r, r + row_step) for r in range(low, high, row_step)]
        if cuts:
            found.append(((low, high), columns, tuple(r for r in cuts if t.kind(delta, r, columns) == PARTIAL)))
    return tuple(found)


def _tile(call: Call, refs: SimpleNamespace, group, j, pieces: tuple[Piece, ...], delta, late: bool = False) -> None:
    """The pieces of a tile, for every query head of the group."""
    stack, unroll = call.tiles.stack, call.unroll

    def several(n, _):
        """Scores of the next piece are begun before this one's are used, so that the matrix unit does not wait."""
        heads = [_Head(call, refs, n * unroll + g) for g in range(unroll)]
        todo = [(head, *piece) for head in heads for piece in pieces]
        ready = _products(refs, *todo[0])
        for now, following in zip(todo, todo[1:] + [None], strict=True):
            ahead = following and _products(refs, *following)
            _gradients(call, refs, group, j, delta, late, *now, *ready)
            ready = ahead
        return _

    if stack == unroll:
        several(0, None)
    else:
        lax.fori_loop(0, stack // unroll, several, None)


class _Head:
    """Query head g of the group. turned: its queries and dO as [h, queries], for the products that want them so."""

    def __init__(self, call: Call, refs: SimpleNamespace, g) -> None:
        self.g = g
        self.turned = (refs.q[g].T, refs.dout[g].T) if call.turned and refs.dk is not None else None


def _products(refs: SimpleNamespace, head: _Head, rows, columns, _masked) -> tuple[Array, Array]:
    """K Q^T and V dO^T, [columns, rows]."""
    row, column = slice(*rows), slice(*columns)
    return dot(refs.k[column], refs.q[head.g, row], ROWS), dot(refs.v[column], refs.dout[head.g, row], ROWS)


def _gradients(call: Call, refs, group, j, delta, late: bool, head: _Head, rows, columns, masked, s, dp) -> None:
    """What rows x columns of the tile, one query head, add to dq, dk and dv."""
    t, g = call.tiles, head.g
    row, column = slice(*rows), slice(*columns)
    if call.softcap is not None:
        capped = jnp.tanh(s)
        s = capped * (call.softcap * geometry.LOG2_E)
    if call.slopes:
        distance = lax.broadcasted_iota(jnp.int32, s.shape, 1) - lax.broadcasted_iota(jnp.int32, s.shape, 0)
        distance = (distance + (delta + rows[0] - columns[0])).astype(jnp.float32)
        s = s - refs.slopes[lax.rem(group, call.kv_heads) * t.stack + g] * distance
    p = jnp.exp2(s - refs.rows[g, :1, row])
    if masked or late:
        p = _hide(call, refs, j, rows, columns, (rows,) if late else masked, delta, late, p)
    ds = p * (dp - refs.rows[g, 1:, row])
    if call.softcap is not None:
        ds = ds * (1.0 - capped * capped)
    p, ds = p.astype(call.dtype), ds.astype(call.dtype)
    if call.turned:
        if refs.dk is not None:
            q, dout = (x[:, row] for x in head.turned)
            refs.dv[:, column] += dot(dout, p, ROWS)
            refs.dk[:, column] += dot(q, ds, ROWS)
        if refs.dq is not None:
            refs.dq[g, :, row] += dot(refs.k_turned[:, column], ds, PLAIN)
        return
    if refs.dk is not None:
        refs.dv[column] += dot(p, refs.dout[g, row], PLAIN)
        refs.dk[column] += dot(ds, refs.q[g, row], PLAIN)
    if refs.dq is not None:
        refs.dq[g, row] += dot(ds.T, refs.k[column], PLAIN)


def _hide(call: Call, refs, j, rows, columns, masked, delta, late: bool, p: Array) -> Array:
    """p with 0 for what is hidden; only the rows `masked` are touched."""
    done, out = rows[0], []
    for low, high in masked:
        if done < low:
            out.append(p[:, done - rows[0] : low - rows[0]])
        seen = _visible(call, refs, j, (low, high), columns, delta, late)
        inside = p[:, low - rows[0] : high - rows[0]]
        out.append(inside if seen is None else jnp.where(seen, inside, 0.0))
        done = high
    if done < rows[1]:
        out.append(p[:, done - rows[0] :])
    return out[0] if len(out) == 1 else jnp.concatenate(out, 1)


def _visible(call: Call, refs, j, rows, columns, delta, late: bool) -> Bool[Array, "C R"] | None:
    t = call.tiles
    seen = [t.visible(delta, rows, columns, transposed=True)]
    if late:
        shape = (columns[1] - columns[0], 1)
        key = j * t.block_kv + columns[0] + lax.broadcasted_iota(jnp.int32, shape, 0)
        if call.first_key:
            seen.append(key >= refs.first_key[0])
        if t.hides_padded_keys:
            seen.append(key < t.kv_len)
        if call.segments:
            ids = refs.kv_ids[:, slice(*columns)]
            ids = jnp.broadcast_to(ids, (LANES, ids.shape[1])).T[:, :1]
            seen.append(ids == refs.q_ids[:, slice(*rows)])
    seen = [x for x in seen if x is not None]
    return functools.reduce(jnp.logical_and, seen) if seen else None


def first_query(t: Tiles, j):
    """First query block in the row of key block j."""
    return jnp.maximum(t.first_q(j), 0) if t.offset else t.first_q(j)


def query_of_row(call: Call, b, j, u, scalars):
    """(query block, key block) to have in VMEM: a step with nothing to do keeps what is there, so that nothing moves."""
    t = call.tiles
    i = first_query(t, j) + u
    if t.offset:  # a row that begins before query 0 goes on beyond what the key block sees
        i = jnp.clip(i, 0, t.last_q(j))
    i = jnp.minimum(i, t.num_q - 1)
    if call.segments:
        kv = lax.div(b, call.kv_heads) * call.num_kv + j
        i = jnp.clip(i, scalars.q_from[kv], scalars.q_to[kv])
    return i, j


def begin_keys(call: Call, refs: SimpleNamespace, first) -> None:
    """Zeroes dk and dv on the first step of a row of the grid."""

    @pl.when(first)
    def _():
        refs.dk[...] = jnp.zeros_like(refs.dk)
        refs.dv[...] = jnp.zeros_like(refs.dv)
        turn_keys(call, refs)


def turn_keys(call: Call, refs: SimpleNamespace) -> None:
    """K^T, once for all query blocks that see the key block."""
    if call.turned and refs.dq is not None:
        refs.k_turned[...] = refs.k[...].T


def end_keys(call: Call, refs: SimpleNamespace, last) -> None:
    """Writes dk and dv on the last step of a row of the grid."""

    @pl.when(last)
    def _():
        # ds^T q holds the pre-scaled q
        factor = call.scale / geometry.query_factor(call.scale, call.softcap)
        dk, dv = refs.dk[...] * factor, refs.dv[...]
        refs.dk_out[...] = (dk.T if call.turned else dk).astype(call.dtype)
        refs.dv_out[...] = (dv.T if call.turned else dv).astype(call.dtype)


def write_queries(call: Call, refs: SimpleNamespace, last) -> None:
    """Writes dq on the last visit of a query block."""

    @pl.when(last)
    def _():
        dq = refs.dq[...] * call.scale
        refs.dq_out[...] = (dq.swapaxes(1, 2) if call.turned else dq).astype(call.dtype)


def dot(a: Array, b: Array, dimensions) -> Float[Array, "..."]:
    """A product in fp32: of bf16 operands as the matrix unit does it, of fp32 operands a true one."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, dimensions, preferred_element_type=jnp.float32, precision=precision)


def refs_by_name(call: Call, names: tuple[str, ...], refs) -> SimpleNamespace:
    """The references of a kernel by name: scalars, inputs, then `names` (outputs and scratch)."""
    return SimpleNamespace(**dict(zip(call.scalars + call.inputs + names, refs, strict=True)))


def compiler_params(vmem_limit: int) -> pltpu.CompilerParams:
    """Groups may run on any core; the two inner dimensions are in order. vmem_limit in bytes."""
    return pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=vmem_limit)


def unstack(call: Call, dq: Array, batch: int) -> Float[Array, "B T H h"]:
    """dq [B*K, G, Tp, h] -> [B, T, H, h]."""
    t = call.tiles
    dq = dq[:, :, : t.seq_len].reshape(batch, call.kv_heads, t.stack, t.seq_len, t.head)
    return dq.transpose(0, 3, 1, 2, 4).reshape(batch, t.seq_len, call.kv_heads * t.stack, t.head)


def unstack_keys(call: Call, dk: Array, batch: int) -> Float[Array, "B S K h"]:
    """dk or dv [B*K, Sp, h] -> [B, S, K, h]."""
    t = call.tiles
    return dk[:, : t.kv_len].reshape(batch, call.kv_heads, t.kv_len, t.head).transpose(0, 2, 1, 3)
