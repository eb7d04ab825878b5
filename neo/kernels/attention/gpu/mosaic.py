"""Pallas' Mosaic GPU as JAX 0.10 and 0.12 both have it, and what its interpreter cannot do.

The differences: `load` lost its index argument, `lowering_semantics` changed its default, the interpreter became public
in 0.12 (0.10's has no rule for `layout_cast` and is not used). What the interpreter of 0.12 lacks: a `wgmma` whose left
operand is in registers, `pl.run_state` over an accumulator, `inline_mgpu`. The functions here that have an argument
`interpret` stand for these, and do the same sums in plain JAX there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

LOG2E = math.log2(math.e)
LN2 = math.log(2.0)
# What a hidden score becomes (exp2 gives an exact 0), and the row maximum that every row starts with: finite, so that a
# row which has seen nothing yet has no inf - inf.
MASKED = -math.inf
NO_MAXIMUM = -1e30

ROWS = 64  # of one wgmma, and of one warpgroup (128 threads) here
# Shared memory of one block: 227 KiB (CUDA C++ programming guide, technical specifications, compute capability 9.0).
SMEM_BYTES = 232_448
# Registers a thread, of the 504 = 3 * 168 that three warpgroups are launched with (65,536 / 384, in steps of 8, which
# setmaxnreg wants). FlashAttention-3's split for one producer and two consumers: 24 + 2 * 240. With 40 + 2 * 232 the
# forward spills (ours, compiled).
PRODUCER_REGISTERS, CONSUMER_REGISTERS = 24, 240

ACCUMULATOR = plgpu.Layout.WGMMA  # [64, n] fp32: a thread holds two rows and n / 4 columns
ROW_VECTOR = plgpu.Layout.WGMMA.reduce(1)  # [64]: a number a row
COLUMN_VECTOR = plgpu.Layout.WGMMA.reduce(0)  # [n]: a number a column

HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # every device kind of compute capability 9.0 holds one of these


def is_hopper(device_kind: str) -> bool:
    """Whether JAX's name of a device ("NVIDIA H200") is one of compute capability 9.0 (wgmma, TMA, setmaxnreg)."""
    return any(name in device_kind for name in HOPPER)


def can_interpret() -> bool:
    """Whether this JAX interprets Mosaic GPU kernels well enough for these (0.12 does, 0.10 does not)."""
    return hasattr(plgpu, "InterpretGPUParams")


def interpreter(interpret: object) -> object:
    """`Plan.interpret` as `plgpu.kernel(interpret=)` takes it: False on hardware, True means the default parameters."""
    if interpret is True:
        return plgpu.InterpretGPUParams()
    return interpret or False


def padded_head_size(h: int) -> int:
    """h rounded up to 64 elements of 2 bytes: the 128 bytes of one swizzled row of shared memory."""
    return -(-h // 64) * 64


def tiles(shape: tuple[int, ...], dtype):
    """Shared memory for bf16 blocks [..., rows, columns] as TMA writes and wgmma reads it: 8x64 tiles, 128-byte swizzle."""
    return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128)))


def compiler_params(**changes) -> plgpu.CompilerParams:
    """What all kernels here are compiled with: exp2 as `ex2.approx.ftz` (2 ulp, PTX ISA), and the semantics spelt out."""
    settings = {"approx_math": True, "lowering_semantics": plgpu.LoweringSemantics.Lane} | changes
    return plgpu.CompilerParams(**settings)


def load(ref, layout=None) -> jax.Array:
    """The whole of `ref` (`ref.at[...]` for a part) in registers, in `layout`."""
    if can_interpret():  # JAX 0.11 took the index away
        return plgpu.load(ref, layout=layout)
    return plgpu.load(ref, (), layout=layout)


def full(shape: tuple[int, ...], value, layout) -> Float[Array, "..."]:
    """One fp32 number in all of `shape`, in registers."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def zeros(shape: tuple[int, ...], layout) -> Float[Array, "..."]:
    """fp32 zeros in registers."""
    return full(shape, 0.0, layout)


def rows(vector: jax.Array, like: jax.Array) -> jax.Array:
    """[rows] over the columns of `like` [rows, columns]."""
    return lax.broadcast_in_dim(vector, like.shape, [0])


def columns(vector: jax.Array, like: jax.Array) -> jax.Array:
    """[columns] over the rows of `like` [rows, columns]."""
    return lax.broadcast_in_dim(vector, like.shape, [1])


def row_index() -> Int[Array, "64"]:
    """0, 1, ..., int32."""
    return plgpu.broadcasted_iota(jnp.int32, (ROWS,), 0, layout=ROW_VECTOR)


def column_index(count: int, interpret: object) -> tuple[Int[Array, "count"], Int[Array, "count"]]:
    """(own, rest), int32: column = own + rest, where `own` is one number a thread and `rest` a constant a register.

    own is the first column that a thread holds. `rest <= limit - own` is one instruction a score, with the constant in it,
    where `column <= limit` takes a register and one more; rest in fp32 needs no conversion.
    """
    column = plgpu.broadcasted_iota(jnp.int32, (count,), 0, layout=COLUMN_VECTOR)
    if interpret:
        return jnp.zeros_like(column), column

    @plgpu.inline_mgpu(
        arg_types=(COLUMN_VECTOR,), return_type=plgpu.ShapeDtypeStruct((count,), jnp.int32, layout=COLUMN_VECTOR)
    )
    def first(_, array):
        held = []
        return array.foreach(lambda value, _: held.append(value) or held[0], create_array=True, is_signed=True)

    own = first(column)  # lane % 4 * 2
    return own, column ^ own  # their bits differ; LLVM sees through ^ to the constants, through - it does not


def product(a, b, shape: tuple[int, int]) -> Float[Array, "64 n"]:
    """a @ b in fp32, waited for; both are blocks of shared memory (`ref.T` for a transposed one)."""

    def body(acc):
        plgpu.wgmma(acc, a, b)
        return acc[...]

    return pl.run_scoped(body, plgpu.ACC(shape, jnp.float32))


def accumulate(acc: Float[Array, "64 n"], a: jax.Array, b, interpret: object) -> Float[Array, "64 n"]:
    """acc + a @ b, waited for; a in registers, b in shared memory."""
    if interpret:
        acc = acc + jnp.dot(a, b[...], preferred_element_type=jnp.float32)
        plgpu.commit_smem()  # the interpreter wants a fence between this read and the next write of TMA
        return acc

    def body(ref):
        plgpu.wgmma(ref, a, b)

    return pl.run_state(body)(plgpu.ACC.init(acc))


def two_products(
    acc: Float[Array, "64 n"], p: jax.Array, v, q, k, between: Callable, shapes: tuple, interpret: object, overlap: bool = True
) -> tuple[Float[Array, "64 n"], tuple[jax.Array, ...]]:
    """(acc + p @ v, between(scores)), where `between` runs while the tensor cores work.

    scores() waits for q @ k, and for that only: p @ v, issued behind it, is still in flight. p in registers; q, k, v
    blocks of shared memory. shapes: of what `between` returns, as (shape, layout) pairs, fp32. `between` has to end with a
    barrier wait or a branch: ptxas moves the wait for p @ v up to the last of these, and the arithmetic behind it (seen in
    the SASS of ptxas 12.9, 13.0 and 13.4). overlap=False: one after the other, which holds p no longer than its product.
    """
    if interpret or not overlap:
        acc = accumulate(acc, p, v, interpret)
        scores = product(q, k, (p.shape[0], k.shape[1]))
        return acc, between(lambda: scores)

    def body(refs):
        acc_ref, score_ref, *result_refs = refs
        plgpu.wgmma(score_ref, q, k)
        plgpu.wgmma(acc_ref, p, v)
        for ref, value in zip(result_refs, between(lambda: plgpu.wgmma_accumulator_load(score_ref, wait_n=1)), strict=True):
            ref[...] = value

    empty = [zeros(shape, layout) for shape, layout in shapes]
    scores = zeros((p.shape[0], k.shape[1]), ACCUMULATOR)  # costs nothing: ptxas makes the first wgmma ignore them
    acc, _, *results = pl.run_state(body)((plgpu.ACC.init(acc), plgpu.ACC.init(scores), *empty))
    return acc, tuple(results)
