"""The TPU backward under both interpreters: one pass and two kernels, sums upright and turned, against float64."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from neo.errors import InputError
from neo.kernels.attention.kernel import Extras, Plan, hide_empty_rows
from neo.kernels.attention.tpu import backward_tile, backward_two
from neo.kernels.attention.tpu.backward import backward, make_call, one_pass_bytes, ring_bytes
from neo.kernels.attention.tpu.blocks import BackwardBlocks

from . import oracle

SQUARE = BackwardBlocks(128, 128, part=128, columns=128, unroll=2)
WIDE = BackwardBlocks(128, 256, part=128, columns=128, unroll=1)  # two query blocks on the diagonal, heads in a loop
TURNED = dataclasses.replace(SQUARE, unroll=1, turned=True)
WIDE_TURNED = dataclasses.replace(WIDE, turned=True)
RACES = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
ONE, TWO = True, False
NOTHING = Extras()


def inputs(T, S, heads=2, kv_heads=1, h=64, B=1, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    shapes = ((B, T, heads, h), (B, S, kv_heads, h), (B, S, kv_heads, h), (B, T, heads, h))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def packed(B, length, documents, seed=1):
    return np.sort(np.random.default_rng(seed).integers(0, documents, (B, length)), axis=1).astype(np.int32)


def expected(arrays, extras, plan):
    """(oracle's result, delta) for a cotangent of out and of the log-sum-exp."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in arrays)
    dlse = np.random.default_rng(2).normal(size=(q.shape[0], q.shape[2], q.shape[1]))
    named = {name: np.asarray(x) for name, x in extras._asdict().items() if x is not None}
    options = {name: getattr(plan, name) for name in ("scale", "causal", "window", "softcap", "offset")}
    want = oracle.attention(q, k, v, dout=dout, dlse=dlse, **options, **named)
    seen = np.isfinite(want.lse)
    return want, (want.out * dout).sum(-1).swapaxes(1, 2) - np.where(seen, dlse, 0)


@functools.cache
def compiled(blocks, one_pass, plan):
    def call(q, k, v, dout, lse, delta, extras):
        return backward(q, k, v, lse, delta, dout, extras, plan, blocks, one_pass)

    return jax.jit(call)


def run(arrays, blocks, one_pass, extras, plan, lse, delta):
    lse, delta = hide_empty_rows(jnp.asarray(lse, jnp.float32)), jnp.asarray(delta, jnp.float32)
    return compiled(blocks, one_pass, plan)(*arrays, lse, delta, extras)


def check(arrays, blocks, one_pass, extras=NOTHING, tolerance=1e-5, interpret=True, **plan):
    plan = Plan(scale=arrays[0].shape[-1] ** -0.5, interpret=interpret, **plan)
    want, delta = expected(arrays, extras, plan)
    got = run(arrays, blocks, one_pass, extras, plan, want.lse, delta)
    for name, x, array in zip(("dq", "dk", "dv"), got, arrays, strict=False):
        right = getattr(want, name)
        assert x.shape == array.shape and x.dtype == array.dtype
        np.testing.assert_allclose(np.asarray(x, np.float64), right, rtol=0, atol=tolerance * np.abs(right).max(), err_msg=name)
    return got


@pytest.mark.parametrize(
    "blocks, one_pass, T, plan",
    [
        (SQUARE, ONE, 512, {"window": 200}),
        (SQUARE, TWO, 397, {}),
        (TURNED, ONE, 397, {"window": 128}),
        (WIDE, ONE, 512, {}),
        (WIDE_TURNED, ONE, 512, {"window": 300}),
        (WIDE_TURNED, TWO, 397, {"window": 129}),
        (WIDE, TWO, 256, {"window": 1}),
    ],
    ids=str,
)
def test_tiles_of_every_kind(blocks, one_pass, T, plan):
    check(inputs(T, T), blocks, one_pass, **plan)


@pytest.mark.parametrize("blocks, one_pass", [(TURNED, ONE), (WIDE, TWO)], ids=str)
def test_all_that_changes_scores(blocks, one_pass):
    """Soft-cap, ALiBi, segments, an offset that no block divides, and keys hidden at run time: some queries see nothing."""
    ids = packed(2, 300, 4)
    extras = Extras(
        jnp.asarray(ids[:, 100:]), jnp.asarray(ids), slopes=jnp.asarray([0.5, 0.25, 0.1, 0.0]), first_key=jnp.int32(140)
    )
    arrays = inputs(200, 300, heads=4, kv_heads=2, B=2)
    dq, dk, dv = check(arrays, blocks, one_pass, extras, window=140, offset=100, softcap=5.0)
    hidden = np.arange(100, 300) < 140
    assert hidden.any() and not np.asarray(dq)[:, hidden].any()
    assert not np.asarray(dk)[:, :140].any() and not np.asarray(dv)[:, :140].any()


@pytest.mark.parametrize("blocks, one_pass", [(WIDE_TURNED, ONE), (SQUARE, TWO)], ids=str)
def test_all_keys(blocks, one_pass):
    """causal=False, keys that fill no block."""
    check(inputs(200, 300), blocks, one_pass, Extras(slopes=jnp.asarray([0.1, 0.02])), causal=False, offset=40)


@pytest.mark.parametrize("h, blocks", [(80, SQUARE), (192, TURNED)], ids=str)
def test_head_sizes_bf16(h, blocks):
    check(inputs(256, 256, heads=2, kv_heads=1, h=h, dtype=jnp.bfloat16), blocks, ONE, tolerance=0.02, window=150)


@pytest.mark.parametrize("one_pass", [ONE, TWO])
def test_races(one_pass):
    """dq's ring, the sums and the outputs of two groups on two cores."""
    ids = jnp.asarray(packed(1, 256, 3))
    check(inputs(256, 256, heads=2, kv_heads=2, h=32), TURNED, one_pass, Extras(ids, ids), interpret=RACES, window=150)


@pytest.mark.parametrize("one_pass", [ONE, TWO])
def test_unseen_blocks_are_not_read(one_pass):
    """NaN in key blocks before every window, before first_key and of other documents does not show."""
    T, S, offset = 256, 768, 512
    ids = np.repeat(np.array([[0, 0, 0, 1, 1, 2]]), 128, axis=1).astype(np.int32)  # key blocks 2 and 3 differ; queries: 1, 2
    arrays = inputs(T, S)
    extras = Extras(jnp.asarray(ids[:, offset:]), jnp.asarray(ids), first_key=jnp.int32(130))
    plan = Plan(scale=0.1, window=300, offset=offset, interpret=True)
    want, delta = expected(arrays, extras, plan)
    clean = run(arrays, SQUARE, one_pass, extras, plan, want.lse, delta)
    bad = np.zeros((S, 1, 1), bool)
    bad[:384] = True  # documents 0: blocks 0..2
    q, k, v, dout = arrays
    poisoned = run(
        (q, jnp.where(bad, jnp.nan, k), jnp.where(bad, jnp.nan, v), dout), SQUARE, one_pass, extras, plan, want.lse, delta
    )
    for a, b in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(a, b)
    assert not np.asarray(clean[1])[:, :384].any() and not np.asarray(clean[2])[:, :384].any()


def call_of(T, window, blocks, heads=(32, 8), h=128, offset=0, causal=True):
    q, k = (jax.ShapeDtypeStruct((1, n, H, h), jnp.bfloat16) for n, H in ((T, heads[0]), (T + offset, heads[1])))
    return make_call(q, k, Extras(), Plan(scale=1.0, window=window, offset=offset, causal=causal), blocks)


@pytest.mark.parametrize("window", [None, 1, 100, 128, 129, 300, 512])
@pytest.mark.parametrize("offset", [0, 100, 256])
@pytest.mark.parametrize(
    "blocks", [SQUARE, WIDE, BackwardBlocks(256, 512, part=128), BackwardBlocks(256, 256, part=256)], ids=str
)
def test_tile_programs_cover_what_is_visible_once(blocks, offset, window):
    """Brute force over every score: computed at most once, visible ones exactly once, and masked where a part has both."""
    call = call_of(700, window, blocks, offset=offset)
    t = call.tiles
    T, S = t.padded_seq_len, call.num_kv * t.block_kv
    count, unmasked = np.zeros((T, S), int), np.zeros((T, S), bool)
    for j in range(call.num_kv):
        for u in range(t.key_band):
            i = max(t.first_q(j), 0) + u
            distance = i - t.first_q(j)
            if i >= t.num_q or (window is not None and distance >= call.reach):
                continue
            inside = distance not in call.edges
            pieces = (
                (((0, t.block_q), (0, t.block_kv), ()),) if inside else backward_tile.parts(t, t.key_delta(distance), call.part)
            )
            for rows, columns, masked in pieces:
                at = np.s_[
                    i * t.block_q + rows[0] : i * t.block_q + rows[1], j * t.block_kv + columns[0] : j * t.block_kv + columns[1]
                ]
                count[at] += 1
                unmasked[at] = True
                for low, high in masked:
                    unmasked[i * t.block_q + low : i * t.block_q + high, at[1]] = False
    seen = oracle.visibility(1, T, S, window=window, offset=offset)[0]
    assert count.max() == 1 and (count[seen] == 1).all()
    assert not unmasked[~seen].any()


def test_work_and_memory_grow_with_the_window():
    """Grid steps linear in T; the ring depends on W alone."""
    short, long = (call_of(T, 4096, BackwardBlocks()) for T in (32768, 65536))
    assert long.num_kv * long.tiles.key_band == 2 * short.num_kv * short.tiles.key_band
    assert short.num_kv * short.tiles.key_band == 32 * 10
    assert backward_two.query_band(short.tiles) == 5
    assert ring_bytes(short) == ring_bytes(long) == 10 * 4 * 512 * 128 * 4
    full = call_of(32768, None, BackwardBlocks())
    assert ring_bytes(full) == 32768 * 4 * 128 * 4 and one_pass_bytes(short) < 32 * 2**20 < one_pass_bytes(full)


def test_ring_that_does_not_fit_takes_two_kernels():
    arrays = inputs(512, 512)
    blocks = dataclasses.replace(SQUARE, vmem=2**20)
    text = jax.make_jaxpr(lambda q, k, v, dout: backward(q, k, v, *rows(q), dout, Extras(), Plan(scale=1.0), blocks))(*arrays)
    assert "attention_backward_dq" in str(text)
    text = jax.make_jaxpr(lambda q, k, v, dout: backward(q, k, v, *rows(q), dout, Extras(), Plan(scale=1.0), SQUARE))(*arrays)
    assert "attention_backward_dq" not in str(text)


def rows(q):
    return [jnp.zeros((q.shape[0], q.shape[2], q.shape[1]))] * 2


def test_bad_blocks():
    with pytest.raises(InputError, match="block_q must divide block_kv"):
        call_of(512, None, BackwardBlocks(512, 256))
