"""dq on Hopper: one block of queries stays, the keys it sees pass by.

Compiled and interpreted, not run on hardware.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from neo.kernels.attention.gpu import backward_tiles as tiles
from neo.kernels.attention.gpu import mosaic

CONSUMERS = 2


@dataclasses.dataclass(frozen=True)
class Config:
    """block_kv keys a step, in a ring of `slots` blocks of keys and values in turn.

    One ring, since a block of values is free a product earlier, and an odd number of blocks may be all that fits. The
    two consumer warpgroups have 64 queries each. overlap: the last product of a step runs on while the next step makes its
    scores; costs the registers of dS.
    """

    block_kv: int
    slots: int
    overlap: bool = True

    def __post_init__(self):
        # A step waits for its values before the keys of the last step are free: with 3 slots, for ever.
        assert self.slots >= (4 if self.overlap else 2), self

    @property
    def block_q(self) -> int:
        """Queries of one block of the grid."""
        return mosaic.ROWS * CONSUMERS


def dq(inputs: dict[str, jax.Array], spec: tiles.Spec, config: Config) -> jax.Array:
    """dq [B, T, H, h] from padded arrays: q, k, v, dout, lse, delta and what `tiles.Spec` says there is besides."""
    batch, seq_len, heads, h = inputs["q"].shape
    return plgpu.kernel(
        functools.partial(_entry, names=tuple(inputs), spec=spec, config=config, h=h),
        out_type=jax.ShapeDtypeStruct((batch, seq_len, heads, h), inputs["q"].dtype),
        grid=(batch, seq_len // config.block_q, heads),
        grid_names=("batch", "block", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=mosaic.compiler_params(),
        interpret=mosaic.interpreter(spec.interpret),
    )(*inputs.values())


def _entry(*refs, names, spec: tiles.Spec, config: Config, h: int):
    inputs = dict(zip(names, refs, strict=False))
    kept = mosaic.tiles((CONSUMERS, mosaic.ROWS, h), inputs["q"].dtype)
    scratch = {
        "q": kept,
        "dout": kept,
        "ring": mosaic.tiles((config.slots, config.block_kv, h), inputs["k"].dtype),
        "kept_full": plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS),
        "full": plgpu.Barrier(num_barriers=config.slots),
        "free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.slots),
    }
    if spec.interpret:
        scratch["sums"] = plgpu.SMEM((CONSUMERS, 1, mosaic.ROWS, h), jnp.float32)

    def body(*allocated):
        _Block(inputs, refs[len(names)], dict(zip(scratch, allocated, strict=True)), spec, config).run()

    pl.run_scoped(body, *scratch.values(), collective_axes="wg")


class _Block:
    """One block of the grid: 3 warpgroups, of which each calls `run`."""

    def __init__(self, inputs: dict, dq, scratch: dict, spec: tiles.Spec, config: Config):
        self.inputs, self.dq, self.scratch, self.spec, self.config = inputs, dq, scratch, spec, config
        self.wg, self.batch, self.head = lax.axis_index("wg"), lax.axis_index("batch"), lax.axis_index("head")
        # The last queries of a causal call see the most keys: they start first, so that no long block is left to the end.
        self.block = spec.band.num_q - 1 - lax.axis_index("block")

    def run(self):
        """Every warpgroup in its role, which is one branch (setmaxnreg asks for that)."""

        @pl.when(self.wg == CONSUMERS)
        def _():
            plgpu.set_max_registers(mosaic.PRODUCER_REGISTERS, action="decrease")
            self.produce()

        @pl.when(self.wg < CONSUMERS)
        def _():
            plgpu.set_max_registers(mosaic.CONSUMER_REGISTERS, action="increase")
            self.consume()

    def walk(self):
        """The blocks of keys to visit. Made in each role anew: ptxas spills what is kept over the branches."""
        return self.spec.walk("q", self.inputs, self.batch, self.block)

    def produce(self):
        """Queries and dout once, then keys and values in turn, as slots get free."""
        inputs, scratch, config = self.inputs, self.scratch, self.config
        for part in range(CONSUMERS):
            at = (self.batch, pl.ds(self.block * config.block_q + part * mosaic.ROWS, mosaic.ROWS), self.head)
            for name in ("q", "dout"):
                plgpu.copy_gmem_to_smem(inputs[name].at[at], scratch[name].at[part], scratch["kept_full"].at[part])
        kv_head = lax.div(self.head, jnp.int32(self.spec.group))
        walk = self.walk()

        def body(step, slot):
            at = (self.batch, pl.ds(walk.block(step) * config.block_kv, config.block_kv), kv_head)
            for turn, name in enumerate(("k", "v")):

                @pl.when(2 * step + turn >= config.slots)
                def _(slot=slot):
                    plgpu.barrier_wait(scratch["free"].at[slot])

                plgpu.copy_gmem_to_smem(inputs[name].at[at], scratch["ring"].at[slot], scratch["full"].at[slot])
                slot = tiles.next_slot(slot, config.slots)
            return slot

        lax.fori_loop(0, walk.total, body, jnp.int32(0))
        if self.spec.interpret:
            tiles.drain(scratch["free"], 2 * walk.total, config.slots)

    def consume(self):
        """dq of 64 queries."""
        scratch, spec = self.scratch, self.spec
        first_row = self.block * self.config.block_q + self.wg * mosaic.ROWS
        rows = pl.ds(first_row, mosaic.ROWS)
        lse, delta = (
            tiles.load_global(self.inputs[name].at[self.batch, self.head, rows], mosaic.ROW_VECTOR) for name in ("lse", "delta")
        )
        queries = scratch["q"].at[self.wg]
        walk = self.walk()
        plgpu.barrier_wait(scratch["kept_full"].at[self.wg])

        def sweep(dq_sum):
            def body(step, slots, masked):
                return self.step(walk, step, slots, masked, first_row, lse, delta, dq_sum)

            slots = (jnp.int32(0), jnp.int32(0))
            if spec.has_masks:
                slots = lax.fori_loop(0, walk.masked, functools.partial(body, masked=True), slots)
            _, last = lax.fori_loop(walk.masked, walk.total, functools.partial(body, masked=False), slots)
            total = dq_sum[...]
            if self.config.overlap:

                @pl.when(walk.total > 0)
                def _():
                    plgpu.barrier_arrive(scratch["free"].at[last])

            return total

        total = tiles.with_sums(sweep, (queries.shape,), scratch["sums"].at[self.wg] if spec.interpret else None)
        queries[...] = (total * spec.scale).astype(self.dq.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(queries, self.dq.at[self.batch, rows, self.head])
        plgpu.wait_smem_to_gmem(0)

    def step(self, walk, step, slots, masked: bool, first_row, lse, delta, dq_sum):
        """One block of keys: dS [64 queries, block_kv] is a left operand straight from registers.

        slots: those of these keys and of the last step's keys. Returns the same for the next step.
        """
        scratch, spec, block_kv = self.scratch, self.spec, self.config.block_kv
        k_slot, last_k_slot = slots
        v_slot = tiles.next_slot(k_slot, self.config.slots)
        keys, values = scratch["ring"].at[k_slot], scratch["ring"].at[v_slot]
        zero = tiles.opaque_zero(k_slot, self.config.slots)
        part = self.wg + zero

        def body(s_sum, dp_sum):
            lse_tile, delta_tile = mosaic.rows(lse, s_sum), mosaic.rows(delta, dp_sum)
            lse_start = lse_tile if spec.softcap is None else None
            tiles.start_sum(s_sum, lse_start, spec.interpret)
            early = spec.both_products(masked)
            if early:
                tiles.start_sum(dp_sum, delta_tile, spec.interpret)
            plgpu.barrier_wait(scratch["full"].at[k_slot])
            plgpu.wgmma(s_sum, scratch["q"].at[part], keys.T)
            plgpu.barrier_wait(scratch["full"].at[v_slot])
            if early:
                plgpu.wgmma(dp_sum, scratch["dout"].at[part], values.T)
            scores = tiles.finish_sum(s_sum, int(early), lse_start, spec.interpret)
            if self.config.overlap:  # at most dP is unfinished here: the product of the last step is done with its keys

                @pl.when(step > 0)
                def _():
                    plgpu.barrier_arrive(scratch["free"].at[last_k_slot])

            place = None
            if masked or spec.alibi:
                first_key = walk.block(step, masked) * block_kv
                place = tiles.Place(self.batch, self.head, first_row, first_key, zero, transposed=False)
            _, weight = tiles.probabilities(scores, lse_tile, self.inputs, place, masked, spec)
            if not early:
                tiles.start_sum(dp_sum, delta_tile, spec.interpret)
                plgpu.wgmma(dp_sum, scratch["dout"].at[part], values.T)
            dp = tiles.finish_sum(dp_sum, 0, delta_tile, spec.interpret)
            plgpu.barrier_arrive(scratch["free"].at[v_slot])
            tiles.add_product(dq_sum, (weight * dp).astype(keys.dtype), keys, spec.interpret)
            if not self.config.overlap:
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(scratch["free"].at[k_slot])

        pl.run_scoped(body, *(plgpu.ACC((mosaic.ROWS, block_kv), jnp.float32),) * 2)
        return tiles.next_slot(v_slot, self.config.slots), k_slot
