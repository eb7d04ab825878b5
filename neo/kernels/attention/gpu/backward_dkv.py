"""dk and dv on Hopper: one block of keys stays, the queries that see it pass by, over all heads that share the keys.

Scores are made transposed, S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T, left operands of dV = P^T dO and
dK = dS^T Q, go from one product to the next in registers (as FlashAttention-3's backward does, arXiv:2407.08608).

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
    """block_q queries a step, `slots` of them in shared memory. split: what the two consumer warpgroups share out.

    "rows": 64 keys each, dk and dv of them: 4 products a tile. "gradients": the same 64 keys, one makes dv, the other dk
    (and so both make the scores: 5 products), for head sizes whose dk and dv together do not fit the registers.
    """

    block_q: int
    slots: int
    split: str = "rows"

    @property
    def parts(self) -> int:
        """How many times 64 keys a block of the grid has."""
        return CONSUMERS if self.split == "rows" else 1

    @property
    def block_kv(self) -> int:
        """Keys of one block of the grid."""
        return mosaic.ROWS * self.parts


def dkv(inputs: dict[str, jax.Array], spec: tiles.Spec, config: Config) -> tuple[jax.Array, jax.Array]:
    """(dk, dv) [B, S, K, h] from padded arrays: q, k, v, dout, lse, delta and what `tiles.Spec` says there is besides."""
    batch, kv_len, kv_heads, h = inputs["k"].shape
    out = jax.ShapeDtypeStruct((batch, kv_len, kv_heads, h), inputs["k"].dtype)
    return plgpu.kernel(
        functools.partial(_entry, names=tuple(inputs), spec=spec, config=config, h=h),
        out_type=(out, out),
        grid=(batch, kv_len // config.block_kv, kv_heads),
        grid_names=("batch", "block", "head"),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        compiler_params=mosaic.compiler_params(),
        interpret=mosaic.interpreter(spec.interpret),
    )(*inputs.values())


def _entry(*refs, names, spec: tiles.Spec, config: Config, h: int):
    inputs = dict(zip(names, refs, strict=False))
    kept = mosaic.tiles((config.parts, mosaic.ROWS, h), inputs["k"].dtype)
    ring = mosaic.tiles((config.slots, config.block_q, h), inputs["q"].dtype)
    ring_rows = plgpu.SMEM((config.slots, config.block_q), jnp.float32)
    scratch = {
        "k": kept,
        "v": kept,
        "q": ring,
        "dout": ring,
        "lse": ring_rows,
        "delta": ring_rows,
        "kept_full": plgpu.Barrier(num_arrivals=2 * config.parts, num_barriers=1),
        "full": plgpu.Barrier(num_arrivals=4, num_barriers=config.slots),
        "free": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=config.slots),
        "done": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=1),
    }
    if spec.interpret:
        scratch["sums"] = plgpu.SMEM((CONSUMERS, config.parts, mosaic.ROWS, h), jnp.float32)

    def body(*allocated):
        _Block(inputs, *refs[len(names) :], dict(zip(scratch, allocated, strict=True)), spec, config).run()

    pl.run_scoped(body, *scratch.values(), collective_axes="wg")


class _Block:
    """One block of the grid: 3 warpgroups, of which each calls `run`."""

    def __init__(self, inputs: dict, dk, dv, scratch: dict, spec: tiles.Spec, config: Config):
        self.inputs, self.dk, self.dv, self.scratch, self.spec, self.config = inputs, dk, dv, scratch, spec, config
        self.wg, self.batch = lax.axis_index("wg"), lax.axis_index("batch")
        self.block, self.head = lax.axis_index("block"), lax.axis_index("head")

    def run(self):
        """Every warpgroup in its role, which is one branch (setmaxnreg asks for that)."""

        @pl.when(self.wg == CONSUMERS)
        def _():
            plgpu.set_max_registers(mosaic.PRODUCER_REGISTERS, action="decrease")
            self.produce()

        @pl.when(self.wg < CONSUMERS)
        def _():
            plgpu.set_max_registers(mosaic.CONSUMER_REGISTERS, action="increase")
            if self.config.split == "rows":
                self.consume(part=self.wg, wants_dv=True, wants_dk=True)
            else:
                pl.when(self.wg == 0)(lambda: self.consume(part=0, wants_dv=True, wants_dk=False))
                pl.when(self.wg == 1)(lambda: self.consume(part=0, wants_dv=False, wants_dk=True))

    def walk(self):
        """(blocks of queries to visit, steps). Made in each role anew: ptxas spills what is kept over the branches."""
        walk = self.spec.walk("kv", self.inputs, self.batch, self.block)
        return walk, walk.total * self.spec.group

    def position(self, walk, step, masked: bool | None = None):
        """(query block, query head) of a step: all heads of a block in turn, then the next block."""
        group = jnp.int32(self.spec.group)
        return walk.block(lax.div(step, group), masked), self.head * self.spec.group + lax.rem(step, group)

    def produce(self):
        """Keys and values once, then queries, dout and their row numbers, as slots get free."""
        inputs, scratch, config = self.inputs, self.scratch, self.config
        for part in range(config.parts):
            at = (self.batch, pl.ds(self.block * config.block_kv + part * mosaic.ROWS, mosaic.ROWS), self.head)
            for name in ("k", "v"):
                plgpu.copy_gmem_to_smem(inputs[name].at[at], scratch[name].at[part], scratch["kept_full"].at[0])
        walk, steps = self.walk()

        def body(step, slot):
            @pl.when(step >= config.slots)
            def _():
                plgpu.barrier_wait(scratch["free"].at[slot])

            q_block, q_head = self.position(walk, step)
            rows = pl.ds(q_block * config.block_q, config.block_q)
            full = scratch["full"].at[slot]
            for name in ("q", "dout"):
                plgpu.copy_gmem_to_smem(inputs[name].at[self.batch, rows, q_head], scratch[name].at[slot], full)
            for name in ("lse", "delta"):
                plgpu.copy_gmem_to_smem(inputs[name].at[self.batch, q_head, rows], scratch[name].at[slot], full)
            return tiles.next_slot(slot, config.slots)

        lax.fori_loop(0, steps, body, jnp.int32(0))
        if self.spec.interpret:
            tiles.drain(scratch["free"], steps, config.slots)

    def consume(self, part, wants_dv: bool, wants_dk: bool):
        """dv and/or dk of 64 keys."""
        scratch, spec = self.scratch, self.spec
        keys, values = scratch["k"].at[part], scratch["v"].at[part]
        first_row = self.block * self.config.block_kv + part * mosaic.ROWS
        walk, steps = self.walk()
        masked_steps = walk.masked * spec.group
        plgpu.barrier_wait(scratch["kept_full"].at[0])

        def sweep(*sums):
            def body(step, slot, masked):
                self.step(walk, step, slot, masked, part, first_row, *sums)
                return tiles.next_slot(slot, self.config.slots)

            sums = (sums[0] if wants_dv else None, sums[-1] if wants_dk else None)
            slot = jnp.int32(0)
            if spec.has_masks:
                slot = lax.fori_loop(0, masked_steps, functools.partial(body, masked=True), slot)
            lax.fori_loop(masked_steps, steps, functools.partial(body, masked=False), slot)
            return tuple(x[...] for x in sums if x is not None)

        shapes = ((mosaic.ROWS, keys.shape[-1]),) * (wants_dv + wants_dk)
        sums = tiles.with_sums(sweep, shapes, scratch["sums"].at[self.wg] if spec.interpret else None)
        if self.config.split != "rows":  # the other warpgroup may still read what the results are about to replace
            plgpu.barrier_arrive(scratch["done"].at[0])
            plgpu.barrier_wait(scratch["done"].at[0])
        if wants_dv:
            values[...] = sums[0].astype(self.dv.dtype)
        if wants_dk:
            keys[...] = (sums[-1] * spec.scale).astype(self.dk.dtype)
        plgpu.commit_smem()
        rows = (self.batch, pl.ds(first_row, mosaic.ROWS), self.head)
        if wants_dv:
            plgpu.copy_smem_to_gmem(values, self.dv.at[rows])
        if wants_dk:
            plgpu.copy_smem_to_gmem(keys, self.dk.at[rows])
        plgpu.wait_smem_to_gmem(0)

    def step(self, walk, step, slot, masked: bool, part, first_row, dv_sum, dk_sum):
        """One block of queries of one head. The products of a step end with it: only the other warpgroup's overlap, which
        leaves the registers of P^T and dS^T to the next step's scores (with them ptxas serialises all, C7512)."""
        scratch, spec, block_q = self.scratch, self.spec, self.config.block_q
        queries, douts = scratch["q"].at[slot], scratch["dout"].at[slot]
        zero = tiles.opaque_zero(slot, self.config.slots)
        part = part + zero
        keys, values = scratch["k"].at[part], scratch["v"].at[part]

        wants_dv, wants_dk = dv_sum is not None, dk_sum is not None

        def body(s_sum, dp_sum=None):
            def row_numbers(name, like):
                return mosaic.columns(mosaic.load(scratch[name].at[slot], mosaic.COLUMN_VECTOR), like)

            def start_dp():
                delta = row_numbers("delta", dp_sum)
                tiles.start_sum(dp_sum, delta, spec.interpret)
                return delta

            plgpu.barrier_wait(scratch["full"].at[slot])
            lse_start = row_numbers("lse", s_sum) if spec.softcap is None else None
            tiles.start_sum(s_sum, lse_start, spec.interpret)
            early = wants_dk and spec.both_products(masked)
            delta = start_dp() if early else None
            plgpu.wgmma(s_sum, keys, queries.T)
            if early:
                plgpu.wgmma(dp_sum, values, douts.T)
            scores = tiles.finish_sum(s_sum, int(early), lse_start, spec.interpret)
            lse = row_numbers("lse", scores) if lse_start is None else lse_start
            place = None
            if masked or spec.alibi:
                q_block, q_head = self.position(walk, step, masked)
                place = tiles.Place(self.batch, q_head, q_block * block_q, first_row, zero, transposed=True)
            p, weight = tiles.probabilities(scores, lse, self.inputs, place, masked, spec)
            if wants_dk and not early:
                delta = start_dp()
                plgpu.wgmma(dp_sum, values, douts.T)
            if wants_dv:
                tiles.add_product(dv_sum, p.astype(douts.dtype), douts, spec.interpret)
            if wants_dk:
                dp = tiles.finish_sum(dp_sum, int(wants_dv), delta, spec.interpret)
                tiles.add_product(dk_sum, (weight * dp).astype(queries.dtype), queries, spec.interpret)
            plgpu.wgmma_wait(0)
            plgpu.barrier_arrive(scratch["free"].at[slot])

        products = 1 + wants_dk
        pl.run_scoped(body, *(plgpu.ACC((mosaic.ROWS, block_q), jnp.float32),) * products)
