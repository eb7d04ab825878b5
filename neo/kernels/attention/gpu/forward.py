"""Attention forward on Hopper: one kernel, three warpgroups, the products of one step hidden behind the softmax of another.

A block of the grid is 128 queries of one head. One warpgroup (the producer) has TMA bring the blocks of K and V that the
queries see into a ring of shared memory; two (the consumers) have 64 queries each. [B, T, H, h] arrays are read and
written as they are; query head n reads kv head n // G, and the G heads of a kv head run side by side, so that L2 serves
all but one of them.

Step t of a consumer issues q k_t^T and p_(t-1) v_(t-1) to the tensor cores at once, waits for the first only, and does
the softmax of t while the second runs. P never leaves the registers. The two consumers take turns issuing, so that one
has its softmax while the other has the tensor cores (FlashAttention-3, Shah et al. 2024, arXiv:2407.08608, sections 3.1
and 3.2). Blocks that need a mask come first (`backward_tiles.Walk`: left edge, diagonal, what segments cut); the others
branch around it. One loop with that branch, since two loops hold more in registers and spill (ours, compiled: 4 to 212
bytes at h = 128).

Softmax in base 2: p = exp2(s c - m) with c = scale log2 e, one multiply-add and one exp2 a score.

Compiled for H200 (ptxas 13.0.88) without spills: at h = 128 a step over an unmasked block is 478 instructions for the
64 x 128 scores of a warpgroup, among them 16 HGMMA, 66 MUFU, 64 FFMA, 64 FMNMX, 64 FADD and the 64 FMUL of the output's
rescaling; a mask is 267 more. Between the wait for q k^T and the one for p v lies the whole softmax, and nothing writes a
register that p v reads. Interpreted with race detection. Not run on hardware.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from neo.kernels.attention.gpu import backward_tiles as tiles
from neo.kernels.attention.gpu import mosaic
from neo.kernels.attention.gpu.mosaic import ACCUMULATOR, LN2, LOG2E, MASKED, NO_MAXIMUM, ROW_VECTOR, ROWS
from neo.kernels.attention.kernel import Extras, Plan

CONSUMERS = 2
BLOCK_Q = CONSUMERS * ROWS


@dataclasses.dataclass(frozen=True)
class Tile:
    """block_kv keys a step, `stages` blocks of K and as many of V in flight. overlap: the softmax beside p v."""

    block_kv: int
    stages: int
    overlap: bool = True


# Ours, compiled (ptxas 13.0.88, 240 registers a consumer): the most keys a step of which no feature spills. A block is a
# multiple of 64 keys, the rows of one swizzled wgmma operand; then as many stages, two at least, as 227 KiB hold, up to 3.
# Bytes spilled with more keys: h 64: 192 keys, 736 (segments, soft-cap, sinks). h 128: 192 keys, 1,864. h 192: 128 keys,
# 760. h 256: 128 keys, 1,696. Not timed: the tiles of FlashAttention-3 (hopper/tile_size.h, windows: 128 x 128 at h 128,
# 128 x 96 at 192, 128 x 64 at 256) are near.
TILES = {64: Tile(128, 3), 128: Tile(128, 2), 192: Tile(64, 3), 256: Tile(64, 2)}
# ALiBi beside segments, first_key, sinks or a soft-cap: the tiles above spill 4 to 36 bytes.
CROWDED = {64: Tile(64, 4), 128: Tile(64, 4), 256: Tile(64, 2, overlap=False)}


def choose_tile(h: int, extras: Extras, plan: Plan) -> Tile:
    """The tile for a (padded) head size and what is asked for."""
    more = (extras.segment_ids, extras.first_key, extras.sinks, plan.softcap)
    crowded = extras.slopes is not None and any(x is not None for x in more)
    return CROWDED[h] if crowded and h in CROWDED else TILES[h]


def forward(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    extras: Extras,
    plan: Plan,
    chosen: Tile | None = None,
) -> tuple[Float[Array, "B T H h"], Float[Array, "B H T"]]:
    """(out, lse), as `kernel.Kernel.forward` says. bf16 arrays. chosen: a tile to use instead of `choose_tile`'s."""
    (batch, seq_len, _, h), kv_len = q.shape, k.shape[1]
    padded_h = mosaic.padded_head_size(h)
    tile = chosen or choose_tile(padded_h, extras, plan)
    q, k, v = (_padded(x, padded_h) for x in (q, k, v))
    num_q, num_kv = -(-seq_len // BLOCK_Q), -(-kv_len // tile.block_kv)
    band = tiles.Band(BLOCK_Q, tile.block_kv, num_q, num_kv, kv_len, plan.causal, plan.window, plan.offset)
    inputs = {}
    if extras.segment_ids is not None:
        # The last id again: a range of ids that no new id widens.
        ends = num_q * BLOCK_Q - seq_len, num_kv * tile.block_kv - kv_len
        inputs["q_ids"] = jnp.pad(extras.segment_ids.astype(jnp.int32), ((0, 0), (0, ends[0])), mode="edge")
        inputs["kv_ids"] = jnp.pad(extras.kv_segment_ids.astype(jnp.int32), ((0, 0), (0, ends[1])), mode="edge")
    if extras.segment_ids is not None or extras.first_key is not None:
        inputs |= _lists(band, inputs.get("q_ids"), inputs.get("kv_ids"), extras.first_key, batch)
    if extras.first_key is not None:
        inputs["first_key"] = jnp.reshape(extras.first_key, (1,)).astype(jnp.int32)
    if extras.slopes is not None:
        inputs["slopes2"] = extras.slopes.astype(jnp.float32) * LOG2E
    if extras.sinks is not None:
        inputs["sinks2"] = jnp.maximum(extras.sinks.astype(jnp.float32) * LOG2E, NO_MAXIMUM)
    out, lse = _call(q, k, v, inputs, plan, tile, band)
    return out[:, :seq_len, :, :h], lse[..., :seq_len]


def _lists(band: tiles.Band, q_ids, kv_ids, first_key, batch: int) -> dict[str, jax.Array]:
    """What the kernel reads of `tiles.list_walks`: blocks [B, N, L]; counts [B, N, 3] of masked, of all, "none at all".

    A block of queries with nothing to see gets one step, masked whole, whose values are dropped at the end.
    """
    blocks, counts = tiles.list_walks(band, "q", q_ids, kv_ids, first_key, batch)
    masked, total = counts[..., 0], counts[..., 1]
    none = (total == 0).astype(jnp.int32)
    return {
        "blocks": jnp.minimum(blocks, band.num_kv - 1),
        "counts": jnp.stack([jnp.maximum(masked, none), jnp.maximum(total, 1), none], axis=-1),
    }


def _padded(x: Float[Array, "B T H h"], h: int) -> Float[Array, "B S H g"]:
    """Whole rows of 128 bytes, and whole tiles of 8 rows. Blocks need not be whole: TMA reads zeros past the end of an
    array, and drops what is written there."""
    rows, columns = -x.shape[1] % 8, h - x.shape[3]
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, columns))) if rows or columns else x


def _call(q, k, v, inputs: dict[str, jax.Array], plan: Plan, tile: Tile, band: tiles.Band):
    (batch, _, heads, h), kv_heads = q.shape, k.shape[2]
    names = ("q", "k", "v", *inputs)
    ring = mosaic.tiles((tile.stages, tile.block_kv, h), q.dtype)
    per_stage = plgpu.Barrier(num_barriers=tile.stages)
    released = plgpu.Barrier(num_barriers=tile.stages, num_arrivals=CONSUMERS)
    per_consumer = plgpu.Barrier(num_barriers=CONSUMERS)
    scratch = {
        "q_block": mosaic.tiles((CONSUMERS, ROWS, h), q.dtype),  # and the output, once q is done with
        "lse_block": plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
        "k_ring": ring,
        "v_ring": ring,
        "q_full": per_consumer,
        "k_full": per_stage,
        "v_full": per_stage,
        "k_free": released,
        "v_free": released,
        "turn": per_consumer,
    }
    if "kv_ids" in inputs:
        scratch["ids_ring"] = plgpu.SMEM((tile.stages, tile.block_kv), jnp.int32)
        scratch["k_full"] = plgpu.Barrier(num_barriers=tile.stages, num_arrivals=2)

    def body(*refs):
        named = dict(zip((*names, "out", "lse"), refs, strict=True))

        def run(*allocated):
            _Block(named | dict(zip(scratch, allocated, strict=True)), plan, tile, band, heads // kv_heads).run()

        pl.run_scoped(run, *scratch.values(), collective_axes="wg")

    return plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct(q.shape, q.dtype),
            # Whole blocks, for a copy of 64 numbers at a time.
            jax.ShapeDtypeStruct((batch, heads, band.num_q * BLOCK_Q), jnp.float32),
        ),
        # The last axis varies fastest: the G heads of a kv head, then the blocks of queries.
        grid=(batch, kv_heads, band.num_q, heads // kv_heads),
        grid_names=("batch", "kv_head", "block", "group"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=mosaic.compiler_params(),
        interpret=mosaic.interpreter(plan.interpret),
    )(q, k, v, *inputs.values())


class _Block:
    """One block of the grid, traced once: what all three warpgroups know, and what each does."""

    def __init__(self, refs: dict, plan: Plan, tile: Tile, band: tiles.Band, group: int):
        self.refs, self.plan, self.tile, self.band = refs, plan, tile, band
        self.batch, self.kv_head = lax.axis_index("batch"), lax.axis_index("kv_head")
        self.head = self.kv_head * group + lax.axis_index("group")
        self.wg = lax.axis_index("wg")
        # The last queries of a causal call see the most keys: they start first, so that no long block is left to the end.
        self.block = band.num_q - 1 - lax.axis_index("block")
        self.listed = "blocks" in refs
        if self.listed:
            self.masked, self.total = (refs["counts"][self.batch, self.block, i] for i in range(2))
        else:
            self.walk = band.kv_walk(self.block)
            self.masked, self.total = jnp.asarray(self.walk.masked, jnp.int32), jnp.asarray(self.walk.total, jnp.int32)
        self.dtype, self.h = refs["q"].dtype, refs["q"].shape[-1]

    def first_key_of(self, step):
        """Where the block of keys of a step begins."""
        block = self.refs["blocks"][self.batch, self.block, step] if self.listed else self.walk.block(step)
        return block * self.tile.block_kv

    def slot(self, step):
        """Where in the ring the block of a step lies."""
        return lax.rem(step, jnp.int32(self.tile.stages))

    def run(self):
        """All there is to do."""

        def produce():
            plgpu.set_max_registers(mosaic.PRODUCER_REGISTERS, action="decrease")
            self.produce()

        def consume():
            plgpu.set_max_registers(mosaic.CONSUMER_REGISTERS, action="increase")
            self.consume()

        # One branch for both, or what the second needs would keep its registers through the first.
        lax.cond(self.wg == CONSUMERS, produce, consume)

    def produce(self):
        """Fetches q, then K and V block by block as the ring gets free."""
        refs, block_kv, stages = self.refs, self.tile.block_kv, self.tile.stages
        for part in range(CONSUMERS):
            rows = pl.ds(self.block * BLOCK_Q + part * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(
                refs["q"].at[self.batch, rows, self.head], refs["q_block"].at[part], refs["q_full"].at[part]
            )

        @pl.loop(0, self.total)
        def _(step):
            slot = self.slot(step)
            at = (self.batch, pl.ds(self.first_key_of(step), block_kv), self.kv_head)
            for x in ("k", "v"):

                @pl.when(step >= stages)
                def _(x=x):
                    plgpu.barrier_wait(refs[f"{x}_free"].at[slot])

                if x == "k" and "kv_ids" in refs:
                    plgpu.copy_gmem_to_smem(refs["kv_ids"].at[at[:2]], refs["ids_ring"].at[slot], refs["k_full"].at[slot])
                plgpu.copy_gmem_to_smem(refs[x].at[at], refs[f"{x}_ring"].at[slot], refs[f"{x}_full"].at[slot])

        if self.plan.interpret:  # which wants every arrival waited for; hardware does not care
            for x in ("k", "v"):
                tiles.drain(refs[f"{x}_free"], self.total, stages)

    def consume(self):
        """The attention of 64 queries."""
        refs, wg, interpret = self.refs, self.wg, self.plan.interpret
        rows = pl.ds(self.block * BLOCK_Q + wg * ROWS, ROWS)
        q = refs["q_block"].at[wg]
        if "q_ids" in refs:
            self.q_ids = tiles.load_global(refs["q_ids"].at[self.batch, rows], ROW_VECTOR)
        pl.when(wg == 1)(self.pass_turn)  # the first turn is consumer 0's
        m, total = self.start()
        plgpu.barrier_wait(refs["q_full"].at[wg])
        self.wait_for_keys(jnp.int32(0))
        self.wait_for_turn()
        scores = mosaic.product(q, refs["k_ring"].at[0].T, (ROWS, self.tile.block_kv))
        self.pass_turn()
        if "kv_ids" not in refs:
            plgpu.barrier_arrive(refs["k_free"].at[0])
        p, m, total, _ = self.softmax(scores, m, total, jnp.int32(0))
        p = p.astype(self.dtype)
        self.wait_for_keys(jnp.int32(1))
        carry = (mosaic.zeros((ROWS, self.h), ACCUMULATOR), p, m, total)
        acc, p, m, total = lax.fori_loop(1, self.total, self.step, carry)
        last = self.slot(_anew(self.total) - 1)
        plgpu.barrier_wait(refs["v_full"].at[last])
        self.wait_for_turn()
        acc = mosaic.accumulate(acc, p, refs["v_ring"].at[last], interpret)
        pl.when(wg == 0)(self.pass_turn)
        plgpu.barrier_arrive(refs["v_free"].at[last])
        out, lse = self.finish(acc, m, total)
        q[...] = out.astype(self.dtype)
        refs["lse_block"].at[wg][...] = lse
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q, refs["out"].at[self.batch, rows, self.head])
        plgpu.copy_smem_to_gmem(refs["lse_block"].at[wg], refs["lse"].at[self.batch, self.head, rows])
        plgpu.wait_smem_to_gmem(0)

    def step(self, step, carry):
        """q k^T and the softmax of `step`, beside p v of the one before. K of `step` has been waited for."""
        acc, p, m, total = carry
        refs, slot, before = self.refs, self.slot(step), self.slot(step - 1)
        plgpu.barrier_wait(refs["v_full"].at[before])
        self.wait_for_turn()

        def between(scores):
            self.pass_turn()
            scores = scores()
            if "kv_ids" not in refs:  # which the mask reads: `softmax` frees both
                plgpu.barrier_arrive(refs["k_free"].at[slot])
            results = self.softmax(scores, m, total, step)
            self.wait_for_keys(step + 1)
            return results

        shapes = (((ROWS, self.tile.block_kv), ACCUMULATOR),) + (((ROWS,), ROW_VECTOR),) * 3
        keys, values = refs["k_ring"].at[slot], refs["v_ring"].at[before]
        q = refs["q_block"].at[self.wg]
        acc, (p, m, total, shrink) = mosaic.two_products(
            acc, p, values, q, keys.T, between, shapes, self.plan.interpret, self.tile.overlap
        )
        plgpu.barrier_arrive(refs["v_free"].at[before])
        return acc * mosaic.rows(shrink, acc), p.astype(self.dtype), m, total

    def wait_for_keys(self, step):
        """K of a step, if there is such a step."""

        @pl.when(step < self.total)
        def _():
            plgpu.barrier_wait(self.refs["k_full"].at[self.slot(step)])

    def wait_for_turn(self):
        """To issue matrix products."""
        plgpu.barrier_wait(self.refs["turn"].at[self.wg])

    def pass_turn(self):
        """Let the other consumer issue its products."""
        plgpu.barrier_arrive(self.refs["turn"].at[1 - self.wg])

    def start(self):
        """(m, l) before the first key: nothing, or the sink, which is a key without a value."""
        if "sinks2" not in self.refs:
            return mosaic.full((ROWS,), NO_MAXIMUM, ROW_VECTOR), mosaic.zeros((ROWS,), ROW_VECTOR)
        m = mosaic.full((ROWS,), self.refs["sinks2"][self.head], ROW_VECTOR)
        if "slopes2" in self.refs:
            m = m + self.row_bias()
        return m, mosaic.full((ROWS,), 1.0, ROW_VECTOR)

    def softmax(self, scores, m, total, step):
        """(p, m, l, shrink) after the scores of one step: p = exp2(x - m), shrink = exp2(old m - m)."""
        x, factor, shift = self.logits(scores, step)
        x = lax.cond(step < self.masked, lambda x: self.mask(x, step), lambda x: x, x)
        if "kv_ids" in self.refs:
            plgpu.barrier_arrive(self.refs["k_free"].at[self.slot(step)])
        highest = x.max(axis=1) * factor
        new_m = lax.max(m, highest if shift is None else highest + shift)
        shrink = jnp.exp2(m - new_m)
        base = new_m if shift is None else new_m - shift
        p = jnp.exp2(x * factor - mosaic.rows(base, x))
        return p, new_m, total * shrink + p.sum(axis=1), shrink

    def logits(self, scores, step):
        """(x, factor, shift): the logits in base 2 are x factor + shift. factor > 0, so the largest x is the largest.

        Of ALiBi's slope (j - i), what depends on the query alone does not change the softmax: `finish` adds it to lse. The
        rest is a number a column, the same in every step, and a number a step.
        """
        cap, factor, shift = self.plan.softcap, self.plan.scale * LOG2E, None
        if cap is not None:
            # tanh(y) = 1 - 2 / (exp(2 y) + 1), exact to 2^-22 (tanh.approx: 2^-11); 1 / z = rsqrt(z)^2 for a division that
            # is no subroutine.
            root = lax.rsqrt(jnp.exp2(scores * (2.0 * factor / cap)) + 1.0)
            scores, factor = cap * LOG2E - (2.0 * cap * LOG2E) * root * root, 1.0
        if "slopes2" in self.refs:
            slope2 = self.slope2()
            own, rest = (
                mosaic.columns(c.astype(jnp.float32) * slope2, scores)
                for c in mosaic.column_index(self.tile.block_kv, self.plan.interpret)
            )
            scores, factor = (scores * factor + own) + rest, 1.0
            first_query = self.block * BLOCK_Q + self.plan.offset
            shift = slope2 * (self.first_key_of(step) - first_query).astype(jnp.float32)
        elif factor <= 0:
            scores, factor = scores * factor, 1.0
        return scores, factor, shift

    def slope2(self):
        """ALiBi's slope in base 2."""
        return _anew(self.refs["slopes2"][self.head])

    def row_bias(self):
        """slope2 (i - first query of the block of the grid): what `logits` leaves out, with the sign turned."""
        return (mosaic.row_index() + self.wg * ROWS).astype(jnp.float32) * self.slope2()

    def mask(self, x, step):
        """Hidden logits of a step become -inf."""
        first_key = self.first_key_of(step)
        plan, refs = self.plan, self.refs
        own, rest = (mosaic.columns(c, x) for c in mosaic.column_index(self.tile.block_kv, plan.interpret))
        seen = []
        if plan.causal:
            first_query = self.block * BLOCK_Q + self.wg * ROWS + plan.offset
            last = mosaic.rows(mosaic.row_index() + (first_query - first_key), x) - own
            seen.append(rest <= last)
            if plan.window is not None:
                seen.append(rest > last - plan.window)
        elif self.band.kv_len % self.tile.block_kv:
            seen.append(rest < (self.band.kv_len - first_key) - own)
        if "first_key" in refs:
            seen.append(rest >= (refs["first_key"][0] - first_key) - own)
        if "kv_ids" in refs:
            kv_ids = mosaic.load(refs["ids_ring"].at[self.slot(step)], mosaic.COLUMN_VECTOR)
            plgpu.commit_smem()  # this read comes before the next write of TMA
            seen.append(mosaic.rows(self.q_ids, x) == mosaic.columns(kv_ids, x))
        return jnp.where(functools.reduce(jnp.logical_and, seen), x, MASKED) if seen else x

    def finish(self, acc, m, total):
        """(out, lse) of 64 queries; one that saw nothing gets 0 and -inf."""
        lse = m + jnp.log2(total)
        if "slopes2" in self.refs:
            lse = lse - self.row_bias()
        seen = total > 0
        out = acc * mosaic.rows(jnp.where(seen, 1 / total, 0.0), acc)
        if self.listed:  # what stood in the block of a step that need not have been
            out = jnp.where(self.refs["counts"][_anew(self.batch), _anew(self.block), 2] > 0, 0.0, out)
        return out, lse * LN2


def _anew(x: jax.Array) -> jax.Array:
    """x, such that the compiler works out here what follows from it, and holds nothing of that in registers until then."""
    return lax.optimization_barrier(x)
