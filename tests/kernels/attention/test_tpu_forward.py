"""The TPU forward kernel under both interpreters, with tiles so small that every kind of step exists in 512 positions."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from neo.errors import InputError
from neo.kernels.attention.kernel import Extras, Plan
from neo.kernels.attention.tpu.blocks import ForwardBlocks
from neo.kernels.attention.tpu.forward import forward
from neo.kernels.attention.tpu.tiles import EMPTY, FULL, Tiles, row_grid, row_step

from . import oracle

SQUARE = ForwardBlocks(128, 128, 128, 1, 128, 2)
TALL = ForwardBlocks(256, 128, 256, 1, 128, 2)  # two key blocks on the diagonal, edges in lower chunks than the interior
NOTHING = Extras()
RACES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)


def inputs(T, S, heads=4, kv_heads=2, h=64, B=1, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, heads, h), (B, S, kv_heads, h), (B, S, kv_heads, h))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


@functools.cache
def compiled(blocks, plan):
    return jax.jit(lambda q, k, v, extras: forward(q, k, v, extras, plan, blocks))


def run(q, k, v, blocks, extras=NOTHING, interpret=True, **plan):
    return compiled(blocks, Plan(scale=q.shape[-1] ** -0.5, interpret=interpret, **plan))(q, k, v, extras)


def check(q, k, v, blocks, extras=NOTHING, tolerance=1e-5, interpret=True, **plan):
    out, lse = run(q, k, v, blocks, extras, interpret, **plan)
    assert lse.dtype == jnp.float32 and out.dtype == q.dtype
    wide = [np.asarray(x, np.float64) for x in (q, k, v)]
    named = {name: np.asarray(x) for name, x in extras._asdict().items() if x is not None}
    want = oracle.attention(*wide, scale=q.shape[-1] ** -0.5, **plan, **named)
    np.testing.assert_allclose(np.asarray(out, np.float64), want.out, rtol=0, atol=tolerance)
    np.testing.assert_allclose(lse, want.lse, rtol=0, atol=tolerance)


def packed(rng, B, length, documents):
    return np.sort(rng.integers(0, documents, (B, length)), axis=1).astype(np.int32)


@pytest.mark.parametrize(
    "blocks, T, plan",
    [
        (SQUARE, 512, {}),
        (SQUARE, 397, {"window": 129}),
        (TALL, 768, {"window": 300}),
        (TALL, 640, {}),
        (TALL, 397, {"window": 1}),
        (TALL, 256, {"window": 200, "offset": 300}),
    ],
    ids=str,
)
def test_tiles_of_every_kind(blocks, T, plan):
    check(*inputs(T, T + plan.get("offset", 0)), blocks, **plan)


@pytest.mark.parametrize("h", [80, 96, 128, 192, 256])
def test_head_sizes(h):
    check(*inputs(256, 256, heads=2, kv_heads=1, h=h), SQUARE, window=150)


def test_bf16_chunks_of_stacked_heads():
    blocks = ForwardBlocks(256, 128, 128, 4, 128, 3)  # 3 does not divide 4 heads: 2 are taken
    check(*inputs(512, 512, heads=4, kv_heads=1, dtype=jnp.bfloat16), blocks, tolerance=0.02, window=200)


@pytest.mark.parametrize("T, S", [(256, 384), (200, 300)])
def test_all_keys(T, S):
    check(*inputs(T, S, B=2), SQUARE, causal=False)


@pytest.mark.parametrize("blocks, T, plan", [(SQUARE, 512, {"window": 150}), (TALL, 300, {"offset": 111})], ids=str)
def test_segments(blocks, T, plan):
    S = T + plan.get("offset", 0)
    ids = packed(np.random.default_rng(1), 2, S, 4)
    extras = Extras(segment_ids=jnp.asarray(ids[:, S - T :]), kv_segment_ids=jnp.asarray(ids))
    check(*inputs(T, S, B=2), blocks, extras, **plan)


def test_queries_that_see_nothing():
    rng = np.random.default_rng(2)
    ids = [rng.integers(low, high, (2, n)).astype(np.int32) for low, high, n in ((0, 9, 200), (3, 6, 300))]
    extras = Extras(segment_ids=jnp.asarray(ids[0]), kv_segment_ids=jnp.asarray(ids[1]))
    q, k, v = inputs(200, 300, B=2)
    check(q, k, v, SQUARE, extras, causal=False)
    out, lse = run(q, k, v, SQUARE, extras, causal=False)
    unseen = ~np.isin(ids[0], ids[1])
    assert unseen.any() and (np.asarray(out)[unseen] == 0).all()
    assert (np.asarray(lse).transpose(0, 2, 1)[unseen] == -np.inf).all()


@pytest.mark.parametrize("first_key", [0, 200, 256, 5000])
def test_first_key(first_key):
    q, k, v = inputs(512, 512)
    extras = Extras(first_key=jnp.int32(first_key))
    check(q, k, v, SQUARE, extras, window=300)
    k = k.at[:, : first_key // 128 * 128].set(jnp.nan)  # whole hidden blocks are not read
    v = v.at[:, : first_key // 128 * 128].set(jnp.nan)
    out, lse = run(q, k, v, SQUARE, extras, window=300)
    assert np.isfinite(out).all() and np.isfinite(lse[..., first_key:]).all()


def test_sinks_slopes_and_softcap():
    rng = np.random.default_rng(3)
    sinks = jnp.asarray(rng.normal(size=4), jnp.float32)
    slopes = jnp.asarray([0.5, 0.25, 0.1, 0.03], jnp.float32)
    check(*inputs(512, 512), TALL, Extras(sinks=sinks, slopes=slopes), window=300, softcap=3.0)
    check(*inputs(256, 256), SQUARE, Extras(sinks=sinks, first_key=jnp.int32(150)))  # some see their sink alone


@pytest.mark.parametrize("segments", [False, True])
def test_races(segments):
    ids = jnp.asarray(packed(np.random.default_rng(1), 2, 256, 3))
    extras = Extras(segment_ids=ids, kv_segment_ids=ids) if segments else NOTHING
    q, k, v = inputs(256, 256, B=2, heads=2, kv_heads=1, h=32)
    out, lse = run(q, k, v, SQUARE, extras, RACES, window=140)
    plain = run(q, k, v, SQUARE, extras, window=140)
    np.testing.assert_array_equal(out, plain[0])
    np.testing.assert_array_equal(lse, plain[1])


def test_unseen_blocks_are_not_read():
    """NaN in key blocks that only one query block sees reaches that block alone, and no block sees the first with W=129."""
    q, k, v = inputs(512, 512)
    clean, _ = run(q, k, v, SQUARE, window=129)
    out, lse = run(q, k.at[:, :128].set(jnp.nan), v.at[:, :128].set(jnp.nan), SQUARE, window=129)
    touched = np.isnan(np.asarray(out)).any((0, 2, 3))
    assert touched[:128].all() and not touched[256:].any() and np.isfinite(lse[..., 256:]).all()
    np.testing.assert_array_equal(out[:, 256:], clean[:, 256:])

    ids = jnp.asarray(np.repeat([0, 1], (320, 192))[None].astype(np.int32))  # blocks of another document
    extras = Extras(segment_ids=ids, kv_segment_ids=ids)
    clean, _ = run(q, k, v, SQUARE, extras)
    out, _ = run(q, k.at[:, :256].set(jnp.nan), v.at[:, :256].set(jnp.nan), SQUARE, extras)
    np.testing.assert_array_equal(out[:, 384:], clean[:, 384:])


def test_large_scores():
    q, k, v = inputs(256, 256)
    out, lse = run(100 * q, 10 * k, v, SQUARE, window=130)
    want = oracle.attention(*(np.asarray(x, np.float64) for x in (100 * q, 10 * k, v)), scale=0.125, window=130)
    np.testing.assert_allclose(lse, want.lse, rtol=1e-5)
    assert np.abs(np.asarray(out, np.float64) - want.out).mean() < 1e-3


def test_blocks_that_do_not_divide():
    with pytest.raises(InputError, match="one must divide the other"):
        run(*inputs(256, 256), ForwardBlocks(384, 256))
    with pytest.raises(InputError, match="multiple of 128"):
        run(*inputs(256, 256), ForwardBlocks(64, 64))


# ---- the geometry, against a mask of every position

GEOMETRIES = [
    Tiles(1, 1, T, offset + T, 64, bq, bkv, True, W, offset)
    for (bq, bkv), W, offset, T in itertools.product(
        ((128, 128), (256, 128), (128, 256)), (None, 1, 128, 129, 300), (0, 77, 384), (128, 500, 1024)
    )
]


def seen(tiles: Tiles) -> np.ndarray:
    """[padded T, whole key blocks] bool."""
    i = tiles.offset + np.arange(tiles.padded_seq_len)[:, None]
    j = np.arange((tiles.last_kv(tiles.num_q - 1) + 1) * tiles.block_kv)[None]
    return (j <= i) & (i - j < (tiles.window or 10**9))


def test_every_visible_tile_has_a_step_and_only_one():
    for tiles in GEOMETRIES:
        grid, mask = row_grid(tiles), seen(tiles)
        steps = []
        for g, t in itertools.product(range(grid.rows), range(grid.width)):
            i, u = (int(x) for x in row_step(tiles, grid, g, t))
            j = tiles.last_kv(i) - u
            if u < tiles.band and j >= 0:
                steps.append((i, j))
        assert len(set(steps)) == len(steps), tiles
        blocks = mask.reshape(tiles.num_q, tiles.block_q, -1, tiles.block_kv).any((1, 3))
        assert set(map(tuple, np.argwhere(blocks).tolist())) <= set(steps), tiles
        assert all(i < tiles.num_q for i, _ in steps)


def test_steps_are_few():
    def steps(T, W, b=512):
        grid = row_grid(Tiles(1, 1, T, T, 128, b, b, True, W))
        return grid.rows * grid.width

    assert steps(8192, None) == 16 * 17 // 2  # not one of a full causal call computes nothing
    assert steps(8192 - 512, None) <= 15 * 16 // 2 + 8  # a row of the grid for the block in the middle
    for T in (8192, 16384, 32768):
        assert steps(T, 4096) <= T // 512 * 9


def test_parts_of_tiles():
    for tiles in GEOMETRIES:
        mask = seen(tiles)
        static = tiles.block_q % tiles.block_kv == 0
        for i, j in itertools.product(range(tiles.num_q), range(mask.shape[1] // tiles.block_kv)):
            delta = tiles.offset + i * tiles.block_q - j * tiles.block_kv
            tile = mask[i * tiles.block_q :, j * tiles.block_kv :][: tiles.block_q, : tiles.block_kv]
            assert tiles.kind(delta) == (EMPTY if not tile.any() else FULL if tile.all() else "partial"), (tiles, i, j)
            u = tiles.last_kv(i) - j
            if static and 0 <= u < tiles.band:
                assert tiles.query_delta(u) == delta
            rows, columns = (0, 128), (tiles.block_kv - 128, tiles.block_kv)
            got = tiles.visible(delta, rows, columns)
            part = tile[slice(*rows), slice(*columns)]
            np.testing.assert_array_equal(np.broadcast_to(True if got is None else got, part.shape), part)
            low, high = tiles.columns(delta, rows)
            assert not tile[slice(*rows), :low].any() and not tile[slice(*rows), high:].any()
            low, high = tiles.rows(delta, columns)
            assert not tile[:low, slice(*columns)].any() and not tile[high:, slice(*columns)].any()
