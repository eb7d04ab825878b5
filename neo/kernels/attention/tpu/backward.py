"""Backward of attention on TPU in one pass: 5 matmuls a tile, no partial sums of dq in HBM.

The grid goes over key blocks and, for each, over the query blocks that see it. dk and dv of the key block stay in VMEM
until all of those have been; dq of a query block stays in a ring of VMEM blocks, one for each query block that the
current key block can be seen by: its first key block (the left edge of its window) zeroes it, its last (the diagonal)
writes it. That is what makes the window cheap: work, memory and grid grow with T * W. A call whose ring does not fit
the chip's VMEM takes two kernels (`backward_two`, 7 matmuls).
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from neo.errors import InputError
from neo.kernels.attention.kernel import Extras, Plan
from neo.kernels.attention.tpu import backward_tile as tile
from neo.kernels.attention.tpu import backward_two
from neo.kernels.attention.tpu.backward_tile import Call
from neo.kernels.attention.tpu.blocks import BackwardBlocks, backward_blocks
from neo.kernels.attention.tpu.tiles import LANES, Tiles, round_up


def backward(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    lse: Float[Array, "B H T"],
    delta: Float[Array, "B H T"],
    dout: Float[Array, "B T H h"],
    extras: Extras,
    plan: Plan,
    blocks: BackwardBlocks | None = None,
    one_pass: bool | None = None,
) -> tuple[Float[Array, "B T H h"], Float[Array, "B S K h"], Float[Array, "B S K h"]]:
    """(dq, dk, dv), as `kernel.Kernel.backward`.

    blocks: the sizes of tiles; None takes the table's. one_pass: None takes it where its ring fits into VMEM.
    """
    if blocks is None:
        stack = q.shape[2] // k.shape[2]
        wide = q.dtype == jnp.float32
        blocks = backward_blocks(q.shape[1], plan.window, q.shape[3], stack, wide, plan.device_kind)
    call = make_call(q, k, extras, plan, blocks)
    scalars, inputs = tile.operands(call, q, k, v, lse, delta, dout, extras)
    if one_pass is None:
        one_pass = one_pass_bytes(call) <= blocks.vmem
    run = one_pass_call if one_pass else backward_two.two_kernels
    dq, dk, dv = run(call, scalars, inputs, blocks.vmem)
    return tile.unstack(call, dq, q.shape[0]), *(tile.unstack_keys(call, x, q.shape[0]) for x in (dk, dv))


def make_call(q: Array, k: Array, extras: Extras, plan: Plan, blocks: BackwardBlocks) -> Call:
    """The static facts of a call on arrays of these shapes. InputError if block_q does not divide block_kv."""
    if blocks.block_kv % blocks.block_q:
        raise InputError(f"attention backward blocks {blocks.block_q} x {blocks.block_kv}: block_q must divide block_kv")
    batch, seq_len, heads, head = q.shape
    kv_len, kv_heads = k.shape[1:3]
    stack = heads // kv_heads
    tiles = Tiles(
        groups=batch * kv_heads,
        stack=stack,
        seq_len=seq_len,
        kv_len=kv_len,
        head=head,
        block_q=blocks.block_q,
        block_kv=blocks.block_kv,
        causal=plan.causal,
        window=plan.window,
        offset=plan.offset,
    )
    return Call(
        tiles=tiles,
        kv_heads=kv_heads,
        scale=plan.scale,
        softcap=plan.softcap,
        dtype=jnp.dtype(q.dtype),
        segments=extras.segment_ids is not None,
        slopes=extras.slopes is not None,
        first_key=extras.first_key is not None,
        part=blocks.part,
        columns=blocks.columns,
        unroll=max(n for n in range(1, min(blocks.unroll, stack) + 1) if stack % n == 0),
        turned=blocks.turned,
        interpret=plan.interpret,
    )


def one_pass_bytes(call: Call) -> int:
    """VMEM that the one-pass kernel needs: its ring, accumulators, blocks (two of each) and a tile's intermediates."""
    t, size = call.tiles, call.dtype.itemsize
    head = round_up(t.head, LANES)
    q, kv = t.stack * t.block_q * head, t.block_kv * head
    rows = 2 * t.stack * 8 * t.block_q * 4
    blocks = 2 * ((3 * q + 4 * kv) * size + rows)
    # ours, compiled: s, p, dp and ds of the heads that are laid out together are the most that is spilled
    spilled = 4 * min(t.stack, call.unroll) * t.block_q * t.block_kv * 4
    return ring_bytes(call) + 2 * kv * 4 + blocks + spilled


def ring_bytes(call: Call) -> int:
    """dq of every query block that one key block can be seen by, fp32."""
    t = call.tiles
    return t.key_band * t.stack * t.block_q * round_up(t.head, LANES) * 4


def one_pass_call(call: Call, scalars: tuple, inputs: tuple, vmem: int) -> tuple[Array, Array, Array]:
    """(dq [B*K, G, Tp, h], dk, dv [B*K, Sp, h])."""
    t = call.tiles
    q_shape, kv_shape = (t.groups, t.stack, t.padded_seq_len, t.head), (t.groups, call.num_kv * t.block_kv, t.head)
    kv_spec = pl.BlockSpec((None, t.block_kv, t.head), lambda b, j, u, *_: (b, j, 0))
    q_spec = pl.BlockSpec((None, t.stack, t.block_q, t.head), lambda b, j, u, *_: (b, 0, _written_q(call, j, u), 0))
    return pl.pallas_call(
        functools.partial(_kernel, call),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(call.scalars),
            grid=(t.groups, call.num_kv, t.key_band),
            in_specs=tile.input_specs(call, functools.partial(tile.query_of_row, call)),
            out_specs=[q_spec, kv_spec, kv_spec],
            scratch_shapes=[
                pltpu.VMEM((t.key_band, t.stack, *call.summed(t.block_q)), jnp.float32),
                *[pltpu.VMEM(call.summed(t.block_kv), jnp.float32)] * 2,
                *[pltpu.VMEM(call.summed(t.block_kv), call.dtype)] * call.turned,
            ],
        ),
        out_shape=[jax.ShapeDtypeStruct(s, call.dtype) for s in (q_shape, kv_shape, kv_shape)],
        compiler_params=tile.compiler_params(vmem),
        interpret=call.interpret,
        name="neo_attention_backward",
    )(*scalars, *inputs)


def _kernel(call: Call, *refs) -> None:
    t = call.tiles
    r = tile.refs_by_name(call, ("dq_out", "dk_out", "dv_out", "ring", "dk", "dv") + ("k_turned",) * call.turned, refs)
    group, j, u = (pl.program_id(axis) for axis in range(3))
    i = tile.first_query(t, j) + u
    r.dq = r.ring.at[lax.rem(i, t.key_band)]

    tile.begin_keys(call, r, u == 0)
    exists = i < t.num_q

    @pl.when(exists & ((j == 0) | (i >= tile.first_query(t, j - 1) + t.key_band)))
    def _():
        r.dq[...] = jnp.zeros(r.ring.shape[1:], jnp.float32)

    tile.accumulate(call, r, group, i, j, exists)

    tile.write_queries(call, r, exists & _last_visit(call, i, j))
    tile.end_keys(call, r, u == t.key_band - 1)


def _last_visit(call: Call, i, j):
    """Whether j is the last key block that query block i sees."""
    t = call.tiles
    if not t.causal:
        return j == call.num_kv - 1
    distance = i - t.first_q(j)
    return (distance >= 0) & (distance < t.block_kv // t.block_q)


def _written_q(call: Call, j, u):
    """The query block whose dq is in the output buffer: of the steps of a row only the first, diagonal ones write."""
    t = call.tiles
    if not t.causal:
        return jnp.where(j == call.num_kv - 1, u, 0)
    i = jnp.minimum(t.first_q(j) + t.block_kv // t.block_q - 1, tile.first_query(t, j) + u)
    return jnp.clip(i, 0, t.num_q - 1) if t.offset else jnp.minimum(i, t.num_q - 1)
