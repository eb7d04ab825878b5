"""Which pairs of blocks the GPU backward visits, in what order, and how scores become gradients of scores.

Two kernels walk the same band of (query block, key block) pairs, one along each side. A walk is: first the blocks that
need a mask (the left edge and the diagonal), then those seen whole. Where only static facts decide (`causal`, `window`,
ragged lengths) the walk is closed-form integer arithmetic in the kernel. Where data decide too (segments, `first_key`)
XLA makes a list for every stationary block, of which the kernel reads one number a step: O(T W) work and memory as well.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float, Int

from neo.kernels.attention.gpu import mosaic

# States of a pair of blocks in `pair_states`.
SKIPPED, MASKED, WHOLE = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Band:
    """The static shape of what is visible, in blocks. Query i is key `offset + i`; lengths are those before padding."""

    block_q: int
    block_kv: int
    num_q: int
    num_kv: int
    kv_len: int
    causal: bool
    window: int | None
    offset: int

    def __post_init__(self):
        assert self.window is None or self.causal, self

    @property
    def padded(self) -> bool:
        """Whether the last block of keys has some that do not exist."""
        return self.kv_len < self.num_kv * self.block_kv

    @property
    def longest_q_walk(self) -> int:
        """The most query blocks that one key block meets."""
        if self.window is None:
            return self.num_q
        return min(self.num_q, (self.block_kv + self.window - 2) // self.block_q + 2)

    @property
    def longest_kv_walk(self) -> int:
        """The most key blocks that one query block meets."""
        if self.window is None:
            return self.num_kv
        return min(self.num_kv, (self.block_q + self.window - 2) // self.block_kv + 2)

    def q_walk(self, n) -> Walk:
        """The query blocks that see key block n: a number, or one of a device."""
        first, last = n * self.block_kv - self.offset, (n + 1) * self.block_kv - 1 - self.offset  # as queries
        if not self.causal:
            padded = last + self.offset >= self.kv_len
            return Walk(0, _choose(padded, self.num_q, 0), _choose(padded, self.num_q, self.num_q), self.num_q).tidy()
        low = _divide(first, self.block_q)
        whole_low = _divide(last + self.block_q - 1, self.block_q)
        if self.window is None:
            high = whole_high = self.num_q
        else:
            high = _divide(last + self.window - 1, self.block_q, 1)
            whole_high = _divide(first + self.window, self.block_q)
        return Walk(*(_least(x, self.num_q) for x in (low, whole_low, whole_high, high))).tidy()

    def kv_walk(self, m) -> Walk:
        """The key blocks that query block m sees."""
        first, last = m * self.block_q + self.offset, (m + 1) * self.block_q - 1 + self.offset  # as keys
        if not self.causal:
            return Walk(0, 0, self.kv_len // self.block_kv, self.num_kv).tidy()
        high, whole_high = _divide(last, self.block_kv, 1), _divide(first + 1, self.block_kv)
        if self.window is None:
            low = whole_low = 0
        else:
            low = _divide(first - self.window + 1, self.block_kv)
            whole_low = _divide(last - self.window + self.block_kv, self.block_kv)
        return Walk(*(_least(x, self.num_kv) for x in (low, whole_low, whole_high, high))).tidy()


class Walk(NamedTuple):
    """Blocks low..high-1 of one stationary block; those of whole_low..whole_high-1 are seen whole."""

    low: object
    whole_low: object
    whole_high: object
    high: object

    def tidy(self) -> Walk:
        """Bounds in order: low <= whole_low <= whole_high <= high."""
        high = _most(self.high, self.low)
        whole_low = _least(_most(self.whole_low, self.low), high)
        return Walk(self.low, whole_low, _least(_most(self.whole_high, whole_low), high), high)

    @property
    def masked(self):
        """How many blocks need a mask; the walk begins with them."""
        return self.whole_low - self.low + self.high - self.whole_high

    @property
    def total(self):
        """How many blocks there are."""
        return self.high - self.low

    def block(self, step, masked: bool | None = None):
        """The block of a step: left edge, diagonal, interior. masked: which of the two it is known to be in."""
        left = self.whole_low - self.low
        edge = _choose(step < left, self.low + step, self.whole_high + step - left)
        whole = self.whole_low + step - self.masked
        return _choose(step < self.masked, edge, whole) if masked is None else edge if masked else whole


class ListedWalk(NamedTuple):
    """The walk that `list_walks` made, read from device memory."""

    blocks: object
    masked: object
    total: object

    def block(self, step, masked: bool | None = None):
        """The block of a step."""
        del masked
        return self.blocks[step]


def pair_states(
    band: Band,
    q_ids: Int[Array, "B T"] | None,
    kv_ids: Int[Array, "B S"] | None,
    first_key: Int[Array, ""] | None,
    q_block: Int[Array, "..."],
    kv_block: Int[Array, "..."],
    batch: int,
) -> Int[Array, "B ..."]:
    """SKIPPED, MASKED or WHOLE of pairs of blocks, for every batch row. Ids padded to whole blocks."""
    walk = band.kv_walk(q_block)
    state = jnp.where((kv_block >= walk.low) & (kv_block < walk.high), MASKED, SKIPPED)
    state = jnp.where((kv_block >= walk.whole_low) & (kv_block < walk.whole_high), WHOLE, state)
    state = jnp.where((q_block < band.num_q) & (kv_block < band.num_kv), state, SKIPPED)
    q_block, kv_block = jnp.minimum(q_block, band.num_q - 1), jnp.minimum(kv_block, band.num_kv - 1)
    if first_key is not None:
        state = jnp.where((kv_block + 1) * band.block_kv <= first_key, SKIPPED, state)
        state = jnp.where(kv_block * band.block_kv < first_key, jnp.minimum(state, MASKED), state)
    state = jnp.broadcast_to(state, (batch, *state.shape))
    if q_ids is not None:
        q_least, q_most = _id_range(q_ids, band.block_q)
        kv_least, kv_most = _id_range(kv_ids, band.block_kv)
        q_least, q_most, kv_least, kv_most = (
            q_least[:, q_block], q_most[:, q_block], kv_least[:, kv_block], kv_most[:, kv_block],
        )  # fmt: skip
        meet = (q_least <= kv_most) & (kv_least <= q_most)
        one = (q_least == q_most) & (kv_least == kv_most)
        state = jnp.where(meet, jnp.where(one, state, jnp.minimum(state, MASKED)), SKIPPED)
    return state


def list_walks(
    band: Band,
    stationary: str,
    q_ids: Int[Array, "B T"] | None,
    kv_ids: Int[Array, "B S"] | None,
    first_key: Int[Array, ""] | None,
    batch: int,
) -> tuple[Int[Array, "B N L"], Int[Array, "B N 2"]]:
    """(blocks, counts) for every stationary block ("q" or "kv"): the blocks to visit, masked ones first, each kind in
    ascending order; counts are (masked, total). L is the longest static walk."""
    if stationary == "kv":
        block, length = jnp.arange(band.num_kv, dtype=jnp.int32), band.longest_q_walk
        other = jax.vmap(band.q_walk)(block).low[:, None] + jnp.arange(length, dtype=jnp.int32)
        pairs = (other, jnp.broadcast_to(block[:, None], other.shape))
    else:
        block, length = jnp.arange(band.num_q, dtype=jnp.int32), band.longest_kv_walk
        low = jnp.broadcast_to(jnp.asarray(band.kv_walk(block).low, jnp.int32), block.shape)
        other = low[:, None] + jnp.arange(length, dtype=jnp.int32)
        pairs = (jnp.broadcast_to(block[:, None], other.shape), other)
    state = pair_states(band, q_ids, kv_ids, first_key, *pairs, batch)
    rank = jnp.where(state == SKIPPED, 2, jnp.where(state == MASKED, 0, 1))
    order = jnp.argsort(rank, axis=-1, stable=True)
    blocks = jnp.take_along_axis(jnp.broadcast_to(other, state.shape), order, axis=-1).astype(jnp.int32)
    counts = jnp.stack([(state == MASKED).sum(-1), (state != SKIPPED).sum(-1)], axis=-1).astype(jnp.int32)
    return blocks, counts


def _id_range(ids: Int[Array, "B T"], block: int) -> tuple[Int[Array, "B N"], Int[Array, "B N"]]:
    grouped = ids.reshape(ids.shape[0], -1, block)
    return grouped.min(-1), grouped.max(-1)


def _is_number(*values) -> bool:
    return all(isinstance(x, int) for x in values)


def _divide(x, block: int, plus: int = 0):
    """max(0, floor(x / block) + plus), exact for negative x as well."""
    if _is_number(x):
        return max(0, x // block + plus)
    return lax.div(_most(x + plus * block, 0), _number(block, x))  # plus * block < 0 never: plus is 0 or 1


def _number(value, like):
    return jnp.asarray(value, like.dtype) if _is_number(value) else value


def _most(a, b):
    if _is_number(a, b):
        return max(a, b)
    return jnp.maximum(a, b)


def _least(a, b):
    if _is_number(a, b):
        return min(a, b)
    return jnp.minimum(a, b)


def _choose(condition, a, b):
    if isinstance(condition, bool):
        return a if condition else b
    return jnp.where(condition, a, b)


@dataclasses.dataclass(frozen=True)
class Spec:
    """The static facts of one call that both kernels need. group: query heads of one key head."""

    band: Band
    scale: float
    softcap: float | None
    group: int
    segments: bool
    first_key: bool
    alibi: bool
    interpret: object

    @property
    def listed(self) -> bool:
        """Whether the walks are lists of the device ("blocks", "counts" among the inputs)."""
        return self.segments or self.first_key

    @property
    def has_masks(self) -> bool:
        """Whether a tile can need a mask at all."""
        return self.band.causal or self.listed or self.band.padded

    def both_products(self, masked: bool) -> bool:
        """Whether a step makes q k^T and dout v^T one right after the other, or the second when the probabilities are
        there: what a mask needs meanwhile, and a soft-cap with ALiBi, is its 32 registers (ours, compiled: spills)."""
        return not masked and not (self.alibi and self.softcap is not None)

    def walk(self, stationary: str, inputs: dict, batch, block) -> Walk | ListedWalk:
        """The walk along a stationary block ("q" or "kv") inside a kernel."""
        if not self.listed:
            return self.band.q_walk(block) if stationary == "kv" else self.band.kv_walk(block)
        counts = inputs["counts"]
        return ListedWalk(inputs["blocks"].at[batch, block], counts[batch, block, 0], counts[batch, block, 1])


class Place(NamedTuple):
    """Where a tile of scores lies: its first query and key, and whether its rows are keys. zero: an `opaque_zero`."""

    batch: object
    head: object
    first_query: object
    first_key: object
    zero: object
    transposed: bool


def probabilities(scores, lse, inputs: dict, place: Place | None, masked: bool, spec: Spec):
    """(p, weight): exp(score - lse), 0 where hidden, and d score / d (scale q.k) times it, so that weight (dp - delta) is
    the gradient of scale q.k. The two are one but for the soft-cap, whose derivative is 1 - tanh^2.

    scores: q.k - lse / scale, since the products start from `lse` = -lse / scale: p = exp2(scores scale log2 e), one
    multiplication and one exp2 a score. With a soft-cap q.k, and `lse` is -lse log2 e. Either is -inf for an empty or
    padded row.
    """
    tanh = None
    if spec.softcap is None:
        exponent = scores * (spec.scale * mosaic.LOG2E)
    else:
        tanh = _tanh(scores, spec.scale / spec.softcap)
        exponent = tanh * (spec.softcap * mosaic.LOG2E) + lse
    if spec.alibi:
        exponent = exponent - _distance(place, scores, spec) * inputs["slopes2"][place.head]
    p = jnp.exp2(exponent)
    if masked:
        p = jnp.where(_visible(inputs, place, scores, spec), p, 0.0)
    return p, p if tanh is None else p - p * tanh * tanh


def _tanh(scores, factor: float):
    """tanh(factor * scores) = 1 - 2 / (exp(2 x) + 1), in 3 multiply-adds, exp2 and rsqrt.

    tanh.approx.f32 has a relative error of 2^-11 (PTX ISA), half a per cent of a probability at a cap of 50 with large
    scores; this has 2^-22 of 1. 1 / y is rsqrt(y)^2, since a float division is a subroutine there.
    """
    root = lax.rsqrt(jnp.exp2(scores * (2.0 * factor * mosaic.LOG2E)) + 1.0)
    return 1.0 - 2.0 * root * root


# A thread has 2 rows and 16 or 32 columns of a tile. What depends on the step is put into the rows, and the columns are
# compared with that. Written as one difference of positions, LLVM moves all 32 differences out of the loop and ptxas spills;
# the zero in the columns keeps those from being moved too (ours, compiled: 8 bytes at h = 128 with a soft-cap).
def _row_and_columns(place: Place, like) -> tuple[Int[Array, "rows"], Int[Array, "rows columns"]]:
    row = plgpu.broadcasted_iota(jnp.int32, (like.shape[0],), 0, layout=mosaic.ROW_VECTOR)
    return row, plgpu.broadcasted_iota(jnp.int32, like.shape, 1, layout=mosaic.ACCUMULATOR) + place.zero


def _distance(place: Place, like, spec: Spec) -> Float[Array, "rows columns"]:
    """Keys from each score's key up to its query's own place, offset + i - j, as fp32."""
    row, column = _row_and_columns(place, like)
    apart = spec.band.offset + place.first_query - place.first_key
    if place.transposed:
        return column.astype(jnp.float32) + mosaic.rows((apart - row).astype(jnp.float32), like)
    return mosaic.rows((row + apart).astype(jnp.float32), like) - column.astype(jnp.float32)


def _visible(inputs: dict, place: Place, like, spec: Spec) -> Bool[Array, "rows columns"]:
    """The mask of one tile: each row sees the columns low..high-1, and of those its own segment's."""
    band = spec.band
    row, column = _row_and_columns(place, like)
    apart = band.offset + place.first_query - place.first_key
    low = high = None
    if band.causal and place.transposed:  # 0 <= apart + column - row < window
        low, high = row - apart, None if band.window is None else row + (band.window - apart)
    elif band.causal:  # 0 <= apart + row - column < window
        low, high = None if band.window is None else row + (apart - band.window + 1), row + (apart + 1)
    first = inputs["first_key"][0] - place.first_key if spec.first_key else None
    last = band.kv_len - place.first_key if not band.causal and band.padded else None
    if place.transposed:  # a row is a key: all of it is hidden, or nothing
        exists = [x for x in (None if first is None else row >= first, None if last is None else row < last) if x is not None]
        if exists:
            start = row * 0 if low is None else low
            low = jnp.where(functools.reduce(jnp.logical_and, exists), start, like.shape[1])
    else:
        if first is not None:
            low = row * 0 + first if low is None else jnp.maximum(low, first)
        if last is not None:
            high = row * 0 + last
    if spec.alibi:  # the column numbers are there as fp32: compared as such, they are not kept twice
        column = column.astype(jnp.float32)
        low, high = (x if x is None else jnp.clip(x, 0, like.shape[1]).astype(jnp.float32) for x in (low, high))
    tests = []
    if low is not None:
        tests.append(column >= mosaic.rows(low, like))
    if high is not None:
        tests.append(column < mosaic.rows(high, like))
    if spec.segments:
        vectors, over = (mosaic.ROW_VECTOR, mosaic.COLUMN_VECTOR), (mosaic.rows, mosaic.columns)
        q_axis = int(place.transposed)
        q_ids = load_global(inputs["q_ids"].at[place.batch, pl.ds(place.first_query, like.shape[q_axis])], vectors[q_axis])
        kv_rows = pl.ds(place.first_key, like.shape[1 - q_axis])
        kv_ids = load_global(inputs["kv_ids"].at[place.batch, kv_rows], vectors[1 - q_axis])
        tests.append(over[q_axis](q_ids, like) == over[1 - q_axis](kv_ids, like))
    return functools.reduce(jnp.logical_and, tests)


def load_global(ref, layout) -> jax.Array:
    """A vector of device memory in registers, thread by thread."""
    if mosaic.can_interpret():
        return plgpu.load(ref, layout=layout, optimized=False)
    return plgpu.load(ref, (), layout=layout, optimized=False)


def with_sums(body, shapes, interpreted):
    """body(*sums) with fp32 accumulators of these [64, n] shapes, zero at first; `add_product` adds to them.

    On hardware they are registers that wgmma writes. The interpreter has no wgmma with a left operand in registers, so
    there they are blocks of shared memory: `interpreted` [len(shapes), 64, n].
    """
    if interpreted is None:
        return pl.run_scoped(body, *(plgpu.ACC(shape, jnp.float32) for shape in shapes))
    sums = [interpreted.at[i] for i in range(len(shapes))]
    for ref in sums:
        ref[...] = jnp.zeros(ref.shape, jnp.float32)
    return body(*sums)


def add_product(total, a, b, interpret: object) -> None:
    """total += a @ b, a in registers and b in shared memory; not waited for on hardware."""
    if interpret:
        total[...] = total[...] + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # the interpreter wants a fence between this read and the next write of TMA
    else:
        plgpu.wgmma(total, a, b)


def start_sum(total, start, interpret: object) -> None:
    """What an accumulator begins with: `start` [m, n] in registers, None for 0.

    What every score of a row is to have subtracted is then in the sum from the beginning, and costs neither an
    instruction a score nor registers while the product runs. To be called before any product is in flight, since ptxas
    waits for those where registers of an accumulator are written (C7517).
    """
    if start is not None and not interpret:
        total[...] = start


def finish_sum(total, in_flight: int, start, interpret: object) -> jax.Array:
    """The accumulator's value once no more than `in_flight` later products run. The interpreter adds `start` here."""
    value = plgpu.wgmma_accumulator_load(total, wait_n=in_flight)
    return value + start if interpret and start is not None else value


def next_slot(slot, slots: int):
    """The slot after this one. Carried, not step % slots: for 3 slots that division costs more registers than there are."""
    return jnp.where(slot == slots - 1, 0, slot + 1)


def opaque_zero(slot, slots: int):
    """0, which LLVM cannot know. An index of the operands that stay has it added, or else LLVM moves the descriptors of
    all their wgmma (8 bytes for each 16 columns) out of the loop, where they take 64 registers at h = 256."""
    return lax.div(slot, jnp.int32(slots))


def drain(free, turns, slots: int) -> None:
    """Waits for the arrivals that no later copy waits for, as the interpreter wants: it lets no barrier go before."""

    @pl.loop(jnp.maximum(turns - slots, 0), turns)
    def _(turn):
        plgpu.barrier_wait(free.at[lax.rem(turn, jnp.int32(slots))])
