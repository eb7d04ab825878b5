"""Which tiles of the score matrix the TPU kernels visit, and what is visible inside one: closed forms, no mask arrays.

The queries of one kv head are `groups` = B*K rows of work; its G query heads are stacked in the matmul. Queries are cut
in blocks of `block_q`, keys in blocks of `block_kv`; block_kv divides block_q or the other way round. With

    delta = offset + i*block_q - j*block_kv        (position of query 0 of block i, counted from key 0 of block j)

row r and column c of the tile (i, j) see each other iff 0 <= delta + r - c < W. Seen from a query block, the visible
key blocks are `last_kv(i) - u` for u = 0 (the diagonal), 1, 2, ... `band` - 1; if block_kv divides block_q then delta
depends on u alone, so what has to be masked is known when the kernel is compiled (`query_delta`). Seen from a key
block, the query blocks are `first_q(j) + u`, and delta depends on u alone if block_q divides block_kv (`key_delta`).
Equal blocks allow both.
"""

from __future__ import annotations

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from neo.errors import InputError

EMPTY, FULL, PARTIAL = "empty", "full", "partial"
LANES = 128  # lanes of a vector register of every TPU: blocks are multiples of it
HIDDEN = -0.7 * float(np.finfo(np.float32).max)  # a masked score: finite, so that (hidden - hidden) is 0 and not NaN
LOG2_E = 1.4426950408889634
# Pairing (`row_grid`) costs every step scalar instructions: it has to leave out a seventh of the steps. Ours, compiled for
# v6e at T=8192, W=4096 in tiles of 512: 149 bundles a step against 129.
PAIRING_PAYS = 0.85
LN_2 = 0.6931471805599453


def round_up(n: int, multiple: int) -> int:
    """Smallest multiple of `multiple` that is >= n."""
    return -(-n // multiple) * multiple


def whole(n, size: int):
    """n // size for n >= 0, an int or a traced one: `//` of a traced int is floor division, which asks Mosaic for the
    sign and needs a known chip; quotients here are never negative."""
    return n // size if isinstance(n, int) else lax.div(n, size)


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The static geometry of one local call. Hashable: one object is one compiled kernel.

    groups: B*K. stack: G, the query heads of one kv head. seq_len, kv_len: T, S before padding. head: h.
    window: None where it would hide nothing. offset: key index of query 0 (causal: S == offset + T).
    """

    groups: int
    stack: int
    seq_len: int
    kv_len: int
    head: int
    block_q: int
    block_kv: int
    causal: bool = True
    window: int | None = None
    offset: int = 0

    def __post_init__(self) -> None:
        for name in ("block_q", "block_kv"):
            if getattr(self, name) < LANES or getattr(self, name) % LANES:
                raise InputError(f"attention {name} is {getattr(self, name)}; a multiple of {LANES} is needed on TPU")
        if self.block_q % self.block_kv and self.block_kv % self.block_q:
            raise InputError(f"attention blocks {self.block_q} x {self.block_kv}: one must divide the other")

    # ---- blocks
    @property
    def num_q(self) -> int:
        """Query blocks."""
        return -(-self.seq_len // self.block_q)

    @property
    def num_kv(self) -> int:
        """Key blocks."""
        return -(-self.kv_len // self.block_kv)

    @property
    def padded_seq_len(self) -> int:
        """T as the kernels see it."""
        return self.num_q * self.block_q

    @property
    def padded_kv_len(self) -> int:
        """S as the kernels see it."""
        return self.num_kv * self.block_kv

    @property
    def hides_padded_keys(self) -> bool:
        """Whether a tile must compare with kv_len. Causal queries that exist see no key that does not."""
        return not self.causal and self.padded_kv_len != self.kv_len

    # ---- seen from a query block: kv block j = last_kv(i) - u, u = 0 .. band-1
    def last_kv(self, i):
        """Last key block that query block i sees, for an int or a traced int; may be >= num_kv when T was padded."""
        if not self.causal:
            return self.num_kv - 1 + i * 0
        if self.block_q % self.block_kv == 0:
            return i * (self.block_q // self.block_kv) + (self.offset + self.block_q - 1) // self.block_kv
        return whole(i * self.block_q + (self.offset + self.block_q - 1), self.block_kv)

    def first_kv(self, i):
        """First key block that query block i sees; negative where the window begins before key 0."""
        if self.window is None:
            return i * 0
        if self.block_q % self.block_kv == 0:
            return i * (self.block_q // self.block_kv) + (self.offset - self.window + 1) // self.block_kv
        # floor division of a negative number: shift by whole blocks first, so that a traced one cannot be negative
        shift = -(-max(0, self.window - 1 - self.offset) // self.block_kv)
        return whole(i * self.block_q + self.offset - self.window + 1 + shift * self.block_kv, self.block_kv) - shift

    @functools.cached_property
    def band(self) -> int:
        """Most key blocks one query block sees: min(O(W / block_kv), num_kv)."""
        last = self.num_q - 1
        widest = self.last_kv(last) + 1
        if self.window is None:
            return widest
        return min(widest, max(self.last_kv(i) - self.first_kv(i) + 1 for i in range(min(self.num_q, self._period))))

    @property
    def _period(self) -> int:
        """Blocks after which delta of the diagonal repeats."""
        return max(1, self.block_kv // self.block_q)

    def query_delta(self, u: int) -> int:
        """delta of the u-th key block before the last one, the same for every query block."""
        if self.block_q % self.block_kv:
            raise ValueError(f"delta is not static from a query block: {self.block_q} x {self.block_kv}")
        return self.offset + (u - (self.offset + self.block_q - 1) // self.block_kv) * self.block_kv

    # ---- seen from a key block: query block i = first_q(j) + u, u = 0 .. key_band-1
    def first_q(self, j):
        """First query block that sees key block j (causal); negative where it stands before query 0."""
        if not self.causal:
            return j * 0
        if self.block_kv % self.block_q == 0:
            return j * (self.block_kv // self.block_q) - -(-self.offset // self.block_q)
        shift = -(-self.offset // self.block_q)
        return whole(j * self.block_kv - self.offset + shift * self.block_q, self.block_q) - shift

    def last_q(self, j):
        """Last query block that sees key block j; may be >= num_q."""
        if self.window is None:
            return self.num_q - 1 + j * 0
        reach = self.block_kv - 1 + self.window - 1 - self.offset
        if self.block_kv % self.block_q == 0:
            return j * (self.block_kv // self.block_q) + reach // self.block_q
        shift = -(-max(0, -reach) // self.block_q)
        return whole(j * self.block_kv + reach + shift * self.block_q, self.block_q) - shift

    @functools.cached_property
    def key_band(self) -> int:
        """Most query blocks one key block is seen by."""
        first = max(0, self.first_q(0))
        widest = self.num_q - first
        if self.window is None:
            return widest
        period = max(1, self.block_q // self.block_kv)
        return min(widest, max(self.last_q(j) - self.first_q(j) + 1 for j in range(min(self.num_kv, period))))

    def key_delta(self, u: int) -> int:
        """delta of the u-th query block after the first one, the same for every key block."""
        if self.block_kv % self.block_q:
            raise ValueError(f"delta is not static from a key block: {self.block_q} x {self.block_kv}")
        return self.offset + (u - -(-self.offset // self.block_q)) * self.block_q

    # ---- inside a tile
    def kind(self, delta: int, rows: tuple[int, int] | None = None, columns: tuple[int, int] | None = None) -> str:
        """EMPTY, FULL or PARTIAL: the part rows x columns (half-open ranges; None: all) of a tile with that delta."""
        if not self.causal:
            return FULL
        r0, r1 = rows or (0, self.block_q)
        c0, c1 = columns or (0, self.block_kv)
        low, high = delta + r0 - (c1 - 1), delta + (r1 - 1) - c0  # range of the distance query - key
        window = self.window or high + 1
        if high < 0 or low >= window:
            return EMPTY
        return FULL if low >= 0 and high < window else PARTIAL

    def columns(self, delta: int, rows: tuple[int, int], step: int = LANES) -> tuple[int, int]:
        """Columns that some of these rows see, widened to multiples of `step`; (0, 0) if none."""
        if not self.causal:
            return 0, self.block_kv
        low = 0 if self.window is None else max(0, delta + rows[0] - self.window + 1)
        high = min(self.block_kv, delta + rows[1])
        return (low // step * step, min(self.block_kv, round_up(high, step))) if low < high else (0, 0)

    def rows(self, delta: int, columns: tuple[int, int], step: int = LANES) -> tuple[int, int]:
        """Rows that see some of these columns, widened to multiples of `step`; (0, 0) if none."""
        if not self.causal:
            return 0, self.block_q
        low = max(0, columns[0] - delta)
        high = self.block_q if self.window is None else min(self.block_q, columns[1] - 1 - delta + self.window)
        return (low // step * step, min(self.block_q, round_up(high, step))) if low < high else (0, 0)

    def visible(
        self, delta, rows: tuple[int, int], columns: tuple[int, int], transposed: bool = False
    ) -> Bool[Array, "R C"] | None:
        """The mask of a part of a tile (transposed: [C, R]); delta may be traced. None when all of it is visible.

        Only the comparisons that can fail are made when delta is an int. Segments, first_key and padded keys apart.
        """
        if not self.causal:
            return None
        shape = (rows[1] - rows[0], columns[1] - columns[0])
        shape = shape[::-1] if transposed else shape
        r_axis = int(transposed)
        distance = lax.broadcasted_iota(jnp.int32, shape, r_axis) - lax.broadcasted_iota(jnp.int32, shape, 1 - r_axis)
        base = delta + rows[0] - columns[0]
        static = isinstance(delta, int)
        seen = None
        if not static or base - (columns[1] - columns[0] - 1) < 0:
            seen = distance >= -base
        if self.window is not None and (not static or base + (rows[1] - rows[0] - 1) >= self.window):
            near = distance < self.window - base
            seen = near if seen is None else seen & near
        return seen


# ---- the grid of the forward: (groups, grid_rows, grid_width), closed form


@dataclasses.dataclass(frozen=True)
class RowGrid:
    """Query blocks laid out in rows of equal length.

    The first query blocks of a causal call see fewer key blocks than the others: 1, 2, 3, ... A full row of the grid
    for each would waste half of a full causal grid. Block a and block `ramp`-1-a together always take the same number
    of steps, so the `ramp` short blocks are paired; every other block has a row for itself.
    """

    ramp: int
    rows: int
    width: int


def row_grid(tiles: Tiles) -> RowGrid:
    """The pairing with the fewest steps."""
    n, band = tiles.num_q, tiles.band
    if not tiles.causal or tiles.block_q % tiles.block_kv:
        return RowGrid(0, n, band)
    ratio, head = tiles.block_q // tiles.block_kv, tiles.last_kv(0) + 1  # block i takes min(i*ratio + head, band) steps
    short = min(n, max(0, -(-(band - head) // ratio)))

    def grid(ramp: int) -> RowGrid:
        pair = (ramp - 1) * ratio + 2 * head if ramp > 1 else head
        rows = -(-ramp // 2) + n - ramp
        return RowGrid(ramp, rows, max(pair if ramp else 0, band if n > ramp else 0))

    # a block that takes exactly `band` steps still follows the ramp's formula: it may join the pairs
    last = short + 1 if short < n and short * ratio + head == band else short
    best = min((grid(ramp) for ramp in {0, short, last}), key=lambda g: (g.rows * g.width, g.ramp))
    plain = grid(0)
    return best if best.rows * best.width < PAIRING_PAYS * plain.rows * plain.width else plain


def row_step(tiles: Tiles, grid: RowGrid, g, t):
    """(i, u) of step t of grid row g, ints or traced; u >= band or a negative key block: nothing to do.

    The two blocks of a pair come one after the other; u counts key blocks back from the last one.
    """
    if grid.ramp == 0:
        return g, t
    ratio, head = tiles.block_q // tiles.block_kv, tiles.last_kv(0) + 1
    pairs = -(-grid.ramp // 2)
    paired = g < pairs
    steps = g * ratio + head  # of the first of a pair
    second = paired & (t >= steps)
    i = jnp.where(second, grid.ramp - 1 - g, jnp.where(paired, g, g + grid.ramp // 2))
    return i, jnp.where(second, t - steps, t)


# ---- segments


@dataclasses.dataclass(frozen=True)
class SegmentRanges:
    """Smallest and largest segment id of every block: [B, num_q] and [B, num_kv] int32."""

    q_low: Int[Array, "B nq"]
    q_high: Int[Array, "B nq"]
    kv_low: Int[Array, "B nk"]
    kv_high: Int[Array, "B nk"]

    def meet(self) -> Bool[Array, "B nq nk"]:
        """Whether the ids of a query and of a key block can be equal anywhere."""
        return (self.q_low[:, :, None] <= self.kv_high[:, None]) & (self.kv_low[:, None] <= self.q_high[:, :, None])


def pad_to(x: Array, axis: int, length: int, mode: str = "constant") -> Array:
    """x with zeros (or its last entry: mode "edge") behind it up to `length` along an axis."""
    if x.shape[axis] == length:
        return x
    pads = [(0, 0)] * x.ndim
    pads[axis] = (0, length - x.shape[axis])
    return jnp.pad(x, pads, mode=mode)


def pad_segments(
    tiles: Tiles, q_ids: Int[Array, "B T"], kv_ids: Int[Array, "B S"]
) -> tuple[Int[Array, "B Tp"], Int[Array, "B Sp"]]:
    """The ids of whole blocks; the last id is repeated, so that padding widens no block's range."""
    q_ids = pad_to(q_ids.astype(jnp.int32), 1, tiles.padded_seq_len, "edge")
    return q_ids, pad_to(kv_ids.astype(jnp.int32), 1, tiles.padded_kv_len, "edge")


def segment_ranges(tiles: Tiles, q_ids: Int[Array, "B Tp"], kv_ids: Int[Array, "B Sp"]) -> SegmentRanges:
    """Ranges of padded ids, one pass of XLA."""
    q = q_ids.reshape(q_ids.shape[0], tiles.num_q, tiles.block_q)
    kv = kv_ids.reshape(kv_ids.shape[0], tiles.num_kv, tiles.block_kv)
    return SegmentRanges(q.min(-1), q.max(-1), kv.min(-1), kv.max(-1))


def prescale(q: Float[Array, "..."], scale: float, softcap: float | None) -> Float[Array, "..."]:
    """q so that q k^T needs no factor afterwards: rounded once, from fp32. Forward and backward must use this one.

    Scores are then in base 2 (log2(e) is in it), or, with a soft-cap, the argument of its tanh.
    """
    return (q.astype(jnp.float32) * query_factor(scale, softcap)).astype(q.dtype)


def query_factor(scale: float, softcap: float | None) -> float:
    """The factor of `prescale`."""
    return scale * LOG2_E if softcap is None else scale / softcap
