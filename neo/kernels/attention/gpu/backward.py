"""dq, dk, dv of attention on Hopper, in two deterministic kernels whose loops both stop at the window.

Seven products a pair of blocks (eight for head sizes over 128, see `backward_dkv.Config`) instead of the five of one kernel
that adds dq up in device memory in whatever order blocks finish; in return every sum has one order, so that two runs agree
bitwise, and no fp32 copy of dq exists. Neither kernel visits a pair of blocks that the window, the segments or `first_key`
hide: work is O(T W).

Compiled for H200 (ptxas: no spills) and interpreted with race detection; not run on hardware.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from neo.kernels.attention.gpu import backward_dkv, backward_dq, mosaic
from neo.kernels.attention.gpu import backward_tiles as tiles
from neo.kernels.attention.kernel import Extras, Plan


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of both kernels for one head size."""

    dq: backward_dq.Config
    dkv: backward_dkv.Config


# Ours, compiled for H200 with ptxas 13.0.88 (240 registers for a consumer, 24 for the producer): the largest tiles and the
# longest rings without a spilled register in any set of features (`FEATURES`) and within 227 KiB. What did not fit: dq with
# 128 keys at h = 64 (12 bytes of spills, 76 with ALiBi); dk and dv of 64 keys in one warpgroup at h = 192 (192 registers of
# sums before any score); at h = 256 the overlap of dq's last product with the next scores (ptxas serialises all, C7512) and
# a ring of two pairs of keys and values (three blocks of 32 KiB are all there is room for beside q and dout). Operands that
# stay and move, by head size: 96, 192, 216, 224 KiB for dq and 98, 194, 194, 194 KiB for dk and dv.
TILES = {
    64: Tiles(backward_dq.Config(64, 8), backward_dkv.Config(64, 4)),
    128: Tiles(backward_dq.Config(64, 8), backward_dkv.Config(64, 4)),
    192: Tiles(backward_dq.Config(64, 5), backward_dkv.Config(64, 3, "gradients")),
    256: Tiles(backward_dq.Config(64, 3, overlap=False), backward_dkv.Config(64, 2, "gradients")),
}


def tiles_for(h: int, crowded: bool = False) -> Tiles:
    """The tiles of a head size. crowded: a soft-cap together with ALiBi, segments or a first key, which at h = 128 leave no
    registers for both dk and dv (32 bytes of spills with segments)."""
    chosen = TILES[mosaic.padded_head_size(h)]
    if crowded and mosaic.padded_head_size(h) == 128:
        return dataclasses.replace(chosen, dkv=dataclasses.replace(chosen.dkv, split="gradients"))
    return chosen


def backward(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    lse: Float[Array, "B H T"],
    delta: Float[Array, "B H T"],
    dout: Float[Array, "B T H h"],
    extras: Extras,
    plan: Plan,
    chosen: Tiles | None = None,
) -> tuple[Float[Array, "B T H h"], Float[Array, "B S K h"], Float[Array, "B S K h"]]:
    """(dq, dk, dv), as `kernel.Kernel.backward` says. bf16 arrays. chosen: tiles to use instead of `TILES`."""
    (batch, seq_len, heads, h), (kv_len, kv_heads) = q.shape, k.shape[1:3]
    padded_h = mosaic.padded_head_size(h)
    more = (extras.slopes, extras.segment_ids, extras.first_key)
    chosen = chosen or tiles_for(h, plan.softcap is not None and any(x is not None for x in more))
    rows, columns = (-x % 128 for x in (seq_len, kv_len))  # every block divides 128
    q, dout = (_pad(x, rows, padded_h - h) for x in (q, dout.astype(q.dtype)))
    k, v = (_pad(x, columns, padded_h - h) for x in (k, v))
    # What the products q k^T and dout v^T start from. A padded query is an empty row: -inf makes its probabilities 0.
    start = -lse / plan.scale if plan.softcap is None else -lse * mosaic.LOG2E
    start = jnp.pad(start, ((0, 0), (0, 0), (0, rows)), constant_values=-jnp.inf)
    delta = jnp.pad(-delta, ((0, 0), (0, 0), (0, rows)))
    inputs = {"q": q, "k": k, "v": v, "dout": dout, "lse": start, "delta": delta}
    ids = (None, None)
    if extras.segment_ids is not None:
        # The last id again: a range of ids that no new id widens.
        ids = (jnp.pad(extras.segment_ids, ((0, 0), (0, rows)), mode="edge"),
               jnp.pad(extras.kv_segment_ids, ((0, 0), (0, columns)), mode="edge"))  # fmt: skip
        inputs |= {"q_ids": ids[0].astype(jnp.int32), "kv_ids": ids[1].astype(jnp.int32)}
    if extras.first_key is not None:
        inputs["first_key"] = jnp.reshape(extras.first_key, (1,)).astype(jnp.int32)
    if extras.slopes is not None:
        inputs["slopes2"] = extras.slopes.astype(jnp.float32) * mosaic.LOG2E

    def spec(block_q: int, block_kv: int) -> tiles.Spec:
        band = tiles.Band(block_q, block_kv, (seq_len + rows) // block_q, (kv_len + columns) // block_kv, kv_len,
                          plan.causal, plan.window, plan.offset)  # fmt: skip
        return tiles.Spec(band, plan.scale, plan.softcap, heads // kv_heads, extras.segment_ids is not None,
                          extras.first_key is not None, extras.slopes is not None, plan.interpret)  # fmt: skip

    def with_lists(spec: tiles.Spec, stationary: str) -> dict[str, jax.Array]:
        if not spec.listed:
            return inputs
        blocks, counts = tiles.list_walks(spec.band, stationary, *ids, extras.first_key, batch)
        return inputs | {"blocks": blocks, "counts": counts}

    dq_spec, dkv_spec = (spec(x.block_q, x.block_kv) for x in (chosen.dq, chosen.dkv))
    dq = backward_dq.dq(with_lists(dq_spec, "q"), dq_spec, chosen.dq)
    dk, dv = backward_dkv.dkv(with_lists(dkv_spec, "kv"), dkv_spec, chosen.dkv)
    return dq[:, :seq_len, :, :h], dk[:, :kv_len, :, :h], dv[:, :kv_len, :, :h]


def _pad(x: Array, rows: int, columns: int) -> Array:
    return jnp.pad(x, ((0, 0), (0, rows), (0, 0), (0, columns))) if rows or columns else x


@dataclasses.dataclass(frozen=True)
class Shipped:
    """One head size with one set of features, as it is compiled for hardware: what the tests lower and compile.

    features: "window", "full", "segments", "alibi", "softcap", "packed softcap" (segments too), "all of them" (and
        first_key), "not causal".
    """

    head_size: int
    features: str

    def __str__(self) -> str:
        return f"backward h={self.head_size} {self.features}"

    def lower(self, sharding: jax.sharding.Sharding | None = None) -> jax.stages.Lowered:
        """Both kernels at T = 1024, 4/2 heads; for CUDA, or for the devices of `sharding`."""
        batch, seq_len, heads, kv_heads, h = 1, 1024, 4, 2, self.head_size
        everything, packed = self.features == "all of them", self.features == "packed softcap"
        plan = Plan(
            scale=h**-0.5,
            causal=self.features != "not causal",
            window=None if self.features in ("full", "not causal") else 300,
            softcap=50.0 if everything or packed or self.features == "softcap" else None,
        )

        def array(dtype, *shape):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

        q, k = array(jnp.bfloat16, batch, seq_len, heads, h), array(jnp.bfloat16, batch, seq_len, kv_heads, h)
        rows, ids = array(jnp.float32, batch, heads, seq_len), array(jnp.int32, batch, seq_len)
        segments, alibi = everything or packed or self.features == "segments", everything or self.features == "alibi"
        extras = Extras(
            segment_ids=ids if segments else None,
            kv_segment_ids=ids if segments else None,
            slopes=array(jnp.float32, heads) if alibi else None,
            first_key=array(jnp.int32) if everything else None,
        )
        arguments = (q, k, k, rows, rows, q, extras)
        function = jax.jit(lambda *arrays: backward(*arrays, plan))
        return function.lower(*arguments) if sharding else function.trace(*arguments).lower(lowering_platforms=("cuda",))


FEATURES = ("window", "full", "segments", "alibi", "softcap", "packed softcap", "all of them", "not causal")
SHIPPED = tuple(Shipped(h, features) for h in TILES for features in FEATURES)
