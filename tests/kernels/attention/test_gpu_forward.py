"""The Hopper forward, interpreted with race detection, against the float64 oracle; and lowered for CUDA on every JAX.

What the interpreter cannot show is in test_gpu_compile.py beside this, or needs a GPU: it does `jnp.dot` where hardware
has a wgmma with its left operand in registers, and no race between a wgmma and the copy that overwrites its operand.
"""

from __future__ import annotations

import dataclasses
import importlib

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from neo.kernels.attention.gpu import KERNEL, mosaic
from neo.kernels.attention.gpu.backward_tiles import Band
from neo.kernels.attention.kernel import Extras, Plan, Request

from . import oracle

forward = importlib.import_module("neo.kernels.attention.gpu.forward")
interpreted = pytest.mark.skipif(not mosaic.can_interpret(), reason="JAX 0.10's Mosaic GPU interpreter lacks layout_cast")
SCALE = 0.125


def arrays(T, *, S=None, heads=(2, 1), h=64, B=1, seed=0):
    """Random q, k, v in bf16."""
    rng = np.random.default_rng(seed)
    shapes = ((B, T, heads[0], h), (B, S or T, heads[1], h), (B, S or T, heads[1], h))
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes)


NONE = Extras()


def attend(q, k, v, plan, extras=NONE, tile=None):
    """The kernel, with the races of barriers and copies looked for."""
    params = plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=8)
    return jax.jit(lambda *a: forward.forward(*a, dataclasses.replace(plan, interpret=params), tile))(q, k, v, extras)


def check(q, k, v, plan, extras=NONE, rows=slice(None), clean=None, tile=None):
    """Both outputs within bf16's rounding of P and of the output, and no further than fp32 from lse."""
    out, lse = (np.asarray(x, np.float64) for x in attend(q, k, v, plan, extras, tile))
    facts = {name: getattr(plan, name) for name in ("scale", "causal", "window", "softcap", "offset")}
    given = {name: None if x is None else np.asarray(x) for name, x in extras._asdict().items()}
    want = oracle.attention(*(np.asarray(x, np.float64) for x in (q, *(clean or (k, v)))), **facts, **given)
    # Half an ulp of bf16 (2^-9) for every p and once more for the result; |v| <= 5 here.
    np.testing.assert_allclose(out[:, rows], want.out[:, rows], rtol=2**-8, atol=2**-8)
    np.testing.assert_allclose(lse[:, :, rows], want.lse[:, :, rows], rtol=1e-6, atol=1e-5)
    return out, lse


@interpreted
@pytest.mark.parametrize("window", [1, 128, 129, 300])
def test_windows_at_the_borders_of_blocks(window):
    """One key, a whole block, one more; a length of no whole blocks (nor tiles of 8 rows), two heads to a kv head."""
    check(*arrays(261), Plan(SCALE, window=window))


@interpreted
def test_the_ring_goes_round():
    """Six steps over two slots, with ids that travel beside the keys."""
    ids = jnp.asarray(np.arange(384)[None] // 250, jnp.int32)
    check(*arrays(384, heads=(1, 1)), Plan(SCALE), Extras(ids, ids), tile=forward.Tile(64, 2))


@interpreted
@pytest.mark.parametrize(("h", "T"), [(96, 130), (192, 200), (256, 200)])
def test_other_head_sizes_and_tiles(h, T):
    check(*arrays(T, h=h, heads=(1, 1)), Plan(h**-0.5))


@interpreted
def test_all_keys_and_fewer_than_a_block():
    check(*arrays(100, S=75, B=2, heads=(4, 2)), Plan(SCALE, causal=False))


@interpreted
def test_blocks_out_of_sight_are_not_touched():
    """NaN in the first 128 keys: rows from 256 on see none of them, with a window of 129."""
    q, k, v = arrays(384, heads=(1, 1))
    poisoned = (x.at[:, :128].set(jnp.nan) for x in (k, v))
    check(q, *poisoned, Plan(SCALE, window=129), rows=slice(256, None), clean=(k, v))


@interpreted
def test_segments_skip_what_cannot_meet():
    """Document 7 comes back after another one, whose keys are NaN: nothing of them shows. Row 1: borders inside blocks,
    queries and keys that have no partner (out 0, lse -inf)."""
    q, k, v = arrays(384, B=2, heads=(1, 1))
    ids = np.zeros((2, 384), np.int32)
    ids[0, :128], ids[0, 128:256], ids[0, 256:] = 7, 3, 7
    ids[1, 50:200], ids[1, 200:] = 1, 2
    kv_ids = ids.copy()
    kv_ids[1, 200:260] = 9
    poisoned = (x.at[0, 128:256].set(jnp.nan) for x in (k, v))
    extras = Extras(segment_ids=jnp.asarray(ids), kv_segment_ids=jnp.asarray(kv_ids))
    seen = np.r_[0:128, 256:384]
    out, lse = check(q, *poisoned, Plan(SCALE), extras, rows=seen, clean=(k, v))
    assert np.isneginf(lse[1, :, 200:260]).all() and (out[1, 200:260] == 0).all()


@interpreted
@pytest.mark.parametrize("sinks", [False, True])
def test_a_block_of_queries_that_sees_nothing(sinks):
    """Its one step reads keys, here NaN, and must drop them; a sink is then all there is."""
    q, k, v = arrays(256, heads=(2, 1))
    ids = np.zeros((1, 256), np.int32)
    ids[:, 128:] = 1
    sink = jnp.array([0.5, -3.0])
    nothing = jnp.full_like(k, jnp.nan)
    extras = Extras(jnp.asarray(ids), jnp.full((1, 256), 5), sinks=sink if sinks else None, first_key=jnp.int32(40))
    out, lse = attend(q, nothing, nothing, Plan(SCALE), extras)
    np.testing.assert_array_equal(np.asarray(out, np.float32), 0)
    want = np.broadcast_to(np.asarray(sink)[None, :, None], lse.shape) if sinks else np.full(lse.shape, -np.inf)
    np.testing.assert_allclose(lse, want, rtol=1e-6)


@interpreted
def test_soft_cap_alibi_sinks_offset_and_first_key_together():
    """With large logits, which the cap holds."""
    q, k, v = arrays(140, S=240, heads=(4, 2))
    q = q * 8
    slopes, sinks = jnp.array([0.5, 0.1, 0.02, 0.004]), jnp.array([1.0, -2.0, 20.0, -200.0])
    extras = Extras(slopes=slopes, sinks=sinks, first_key=jnp.int32(93))
    plan = Plan(SCALE, window=150, softcap=20.0, offset=100)
    check(q, k, v, plan, extras)


@interpreted
def test_two_runs_agree_bitwise():
    arguments = (*arrays(200), Plan(SCALE, window=100))
    for once, again in zip(attend(*arguments), attend(*arguments), strict=True):
        np.testing.assert_array_equal(np.asarray(once, np.float32), np.asarray(again, np.float32))


@interpreted
def test_alibi_and_segments():
    """Which take a smaller tile at head size 128 (`CROWDED`)."""
    q, k, v = arrays(150, h=128, heads=(2, 2))
    ids = jnp.asarray(np.arange(150)[None] // 40, jnp.int32)
    extras = Extras(segment_ids=ids, kv_segment_ids=ids, slopes=jnp.array([0.25, 0.0625]))
    assert forward.choose_tile(128, extras, Plan(SCALE)) != forward.TILES[128]
    check(q, k, v, Plan(-SCALE), extras)


@interpreted
def test_negative_scale_and_huge_logits():
    """The largest product is then the least logit; logits of some thousands leave one key to each row."""
    q, k, v = arrays(140, heads=(1, 1))
    check(q * 100, k, v, Plan(-SCALE))


@pytest.mark.parametrize("h", sorted(forward.TILES))
def test_lowers_for_cuda(h):
    """On every JAX this runs with, for every tile: one kernel, everything asked for, and ragged lengths."""

    def sds(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    ids, numbers = sds(1, 1003, dtype=jnp.int32), sds(2, dtype=jnp.float32)
    extras = Extras(ids, ids, slopes=numbers, sinks=numbers, first_key=sds(dtype=jnp.int32))
    plan = Plan(SCALE, window=300, softcap=30.0)
    keys = sds(1, 1003, 1, h)
    traced = jax.jit(lambda *a: forward.forward(*a, plan)).trace(sds(1, 1003, 2, h), keys, keys, extras)
    assert traced.lower(lowering_platforms=("cuda",)).as_text().count("mosaic_gpu_v2") == 1


def test_steps_are_those_of_the_window():
    """T = 32k, W = 4096: no block of queries walks more than 33 or 34 blocks of keys, whatever T."""
    for h, tile in forward.TILES.items():
        for T in (8192, 32768):
            band = Band(forward.BLOCK_Q, tile.block_kv, T // forward.BLOCK_Q, T // tile.block_kv, T, True, 4096, 0)
            steps = [band.kv_walk(block).total for block in range(band.num_q)]
            assert max(steps) == (4096 + forward.BLOCK_Q) // tile.block_kv, (h, T)


REQUEST = Request("gpu", "bfloat16", 4096, 32, 8, 128, device_kind="NVIDIA H200")


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({}, ""),
        ({"device_kind": "NVIDIA GH200 480GB", "window": 1024, "segments": True, "softcap": True}, ""),
        ({"platform": "cpu", "device_kind": "cpu"}, "Hopper GPU"),
        ({"device_kind": "NVIDIA A100-SXM4-80GB"}, "compute capability 9.0"),
        ({"device_kind": "NVIDIA B200"}, "compute capability 9.0"),
        ({"dtype": "float32"}, "blockwise"),
        ({"head_size": 72}, "head size 72"),
        ({"num_kv_heads": 5}, "divide"),
        ({"causal": False, "window": 5}, "window without causal"),
    ],
)
def test_says_what_it_lacks(change, what):
    said = KERNEL.lacks(dataclasses.replace(REQUEST, **change))
    assert (what in said) if what else said == ""
