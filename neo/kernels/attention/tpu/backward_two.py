"""Backward of attention on TPU in two kernels, 7 matmuls a tile: where dq of a whole row of tiles does not fit VMEM.

One goes over key blocks and sums dk and dv, the other over query blocks and sums dq. Both run the tile programs of
`backward_tile`, each without the products it has no use for.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array

from neo.kernels.attention.tpu import backward_tile as tile
from neo.kernels.attention.tpu.backward_tile import Call
from neo.kernels.attention.tpu.tiles import Tiles


def two_kernels(call: Call, scalars: tuple, inputs: tuple, vmem: int) -> tuple[Array, Array, Array]:
    """(dq [B*K, G, Tp, h], dk, dv [B*K, Sp, h])."""
    return _queries(call, scalars, inputs, vmem), *_keys(call, scalars, inputs, vmem)


def _keys(call: Call, scalars: tuple, inputs: tuple, vmem: int) -> tuple[Array, Array]:
    t = call.tiles
    spec = pl.BlockSpec((None, t.block_kv, t.head), lambda b, j, u, *_: (b, j, 0))
    shape = jax.ShapeDtypeStruct((t.groups, call.num_kv * t.block_kv, t.head), call.dtype)
    return pl.pallas_call(
        functools.partial(_keys_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(call.scalars),
            grid=(t.groups, call.num_kv, t.key_band),
            in_specs=tile.input_specs(call, functools.partial(tile.query_of_row, call)),
            out_specs=[spec, spec],
            scratch_shapes=[pltpu.VMEM(call.summed(t.block_kv), jnp.float32)] * 2,
        ),
        out_shape=[shape, shape],
        compiler_params=tile.compiler_params(vmem),
        interpret=call.interpret,
        name="neo_attention_backward_dkv",
    )(*scalars, *inputs)


def _keys_kernel(call: Call, *refs) -> None:
    t = call.tiles
    r = tile.refs_by_name(call, ("dk_out", "dv_out", "dk", "dv"), refs)
    r.dq = None
    group, j, u = (pl.program_id(axis) for axis in range(3))
    i = tile.first_query(t, j) + u
    tile.begin_keys(call, r, u == 0)
    tile.accumulate(call, r, group, i, j, i < t.num_q)
    tile.end_keys(call, r, u == t.key_band - 1)


def _queries(call: Call, scalars: tuple, inputs: tuple, vmem: int) -> Array:
    t = call.tiles
    band = query_band(t)
    block = (None, t.stack, t.block_q, t.head)
    return pl.pallas_call(
        functools.partial(_queries_kernel, call, band),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(call.scalars),
            grid=(t.groups, t.num_q, band),
            in_specs=tile.input_specs(call, functools.partial(_key_of_row, call, band)),
            out_specs=pl.BlockSpec(block, lambda b, i, u, *_: (b, 0, i, 0)),
            scratch_shapes=[
                pltpu.VMEM((t.stack, *call.summed(t.block_q)), jnp.float32),
                *[pltpu.VMEM(call.summed(t.block_kv), call.dtype)] * call.turned,
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((t.groups, t.stack, t.padded_seq_len, t.head), call.dtype),
        compiler_params=tile.compiler_params(vmem),
        interpret=call.interpret,
        name="neo_attention_backward_dq",
    )(*scalars, *inputs)


def _queries_kernel(call: Call, band: int, *refs) -> None:
    r = tile.refs_by_name(call, ("dq_out", "dq") + ("k_turned",) * call.turned, refs)
    r.dk = r.dv = None
    group, i, u = (pl.program_id(axis) for axis in range(3))

    @pl.when(u == 0)
    def _():
        r.dq[...] = jnp.zeros_like(r.dq)

    j = call.tiles.last_kv(i) - (band - 1) + u
    tile.turn_keys(call, r)
    tile.accumulate(call, r, group, i, jnp.maximum(j, 0), j >= 0)
    tile.write_queries(call, r, u == band - 1)


def query_band(t: Tiles) -> int:
    """Most key blocks in the row of one query block."""
    if not t.causal:
        return t.num_kv
    return max(t.last_kv(i) - max(t.first_kv(i), 0) + 1 for i in range(t.num_q))


def _key_of_row(call: Call, band: int, b, i, u, scalars):
    """(query block, key block) to have in VMEM; a step with nothing to do keeps what is there or is next."""
    t = call.tiles
    j = jnp.clip(t.last_kv(i) - (band - 1) + u, jnp.maximum(t.first_kv(i), 0), call.num_kv - 1)
    if call.segments:
        q = lax.div(b, call.kv_heads) * t.num_q + i
        j = jnp.clip(j, scalars.kv_from[q], scalars.kv_to[q])
    if call.first_key:
        j = jnp.maximum(j, jnp.minimum(lax.div(scalars.first_key[0], t.block_kv), call.num_kv - 1))
    return i, j
