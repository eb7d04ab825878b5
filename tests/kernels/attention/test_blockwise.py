"""Blockwise attention against an explicit float64 numpy reference and against the dense implementation."""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.ad_checkpoint import checkpoint_policies

from neo.errors import InputError
from neo.kernels.attention import Mask, attention
from neo.kernels.attention import dense as dense_module
from neo.kernels.attention.blockwise import KERNEL, Bands, backward, choose_block, forward
from neo.kernels.attention.kernel import LSE_NAME, OUT_NAME, Extras, Kernel, Plan

# fp32 sums of up to a few hundred terms of size ~1 in another order: 1e-5 is about 100 units in the last place.
FORWARD_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 3e-5


def dense(q, k, v, **options):
    return dense_module.dense(q, k, v, **options)[0]


def blockwise(
    q, k, v, *, mask, segment_ids, kv_segment_ids, q_offset, scale, alibi_slopes=None, softcap=None, block=None
):
    """The kernel with blocks of a given size, behind dense's arguments."""
    assert q_offset is None
    kernel = KERNEL
    if block is not None:
        kernel = Kernel(f"blocks of {block}", functools.partial(forward, block=block),
                        functools.partial(backward, block=block), KERNEL.lacks)  # fmt: skip
    plan = Plan(scale=scale, causal=mask.causal, window=mask.window, softcap=softcap)
    return kernel.attend(q, k, v, Extras(segment_ids, kv_segment_ids, alibi_slopes), plan)[0]


def numpy_attention(
    q, k, v, *, causal=True, window=None, segment_ids=None, kv_segment_ids=None, offset=None, scale=None
):
    """float64, one loop per query; written from the definitions in DESIGN, shares nothing with the implementations."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (B, T, H, h), (_, S, K, _) = q.shape, k.shape
    out = np.zeros_like(q)
    for b, t, n in itertools.product(range(B), range(T), range(H)):
        i = t + (0 if offset is None else int(offset[b]))
        keys = [
            j
            for j in range(S)
            if (not causal or j <= i)
            and (window is None or i - window < j <= i)
            and (segment_ids is None or segment_ids[b, t] == kv_segment_ids[b, j])
        ]
        if not keys:
            continue
        logits = k[b, keys, n // (H // K)] @ q[b, t, n] * (h**-0.5 if scale is None else scale)
        p = np.exp(logits - logits.max())
        out[b, t, n] = p @ v[b, keys, n // (H // K)] / p.sum()
    return out


def inputs(seed, B, T, H, K, h, dtype=jnp.float32, spread=1.0):
    rng = np.random.default_rng(seed)
    shapes = [(B, T, H, h), (B, T, K, h), (B, T, K, h), (B, T, H, h)]
    q, k, v, do = (jnp.asarray(rng.normal(size=s), dtype) for s in shapes)
    return q * spread, k, v, do


def segments(seed, B, T):
    """Packed documents: non-decreasing ids with a few changes."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(1 + np.cumsum(rng.random((B, T)) < 3 / T, axis=1), jnp.int32)


def run(implementation, q, k, v, do, window, segment_ids, **options):
    """Output and the gradients of sum(output * do)."""

    def loss(q, k, v):
        out = implementation(
            q, k, v, mask=Mask(True, window), segment_ids=segment_ids, kv_segment_ids=segment_ids, q_offset=None,
            scale=q.shape[-1] ** -0.5, **options,
        )  # fmt: skip
        return (out.astype(jnp.float32) * do.astype(jnp.float32)).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return out, gradients


@pytest.mark.parametrize("length", [1, 8, 13])
def test_every_window_boundary_against_numpy(length):
    q, k, v, _ = inputs(0, 1, length, 2, 1, 4)
    for window in [*range(1, length + 3), None]:
        want = numpy_attention(q, k, v, window=window)
        got = blockwise(
            q, k, v, mask=Mask(True, window), segment_ids=None, kv_segment_ids=None, q_offset=None, scale=0.5, block=4
        )
        np.testing.assert_allclose(got, want, atol=FORWARD_TOLERANCE, err_msg=f"T={length} W={window}")


@given(
    length=st.integers(1, 70),
    window=st.one_of(st.none(), st.integers(1, 80)),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 3)]),
    block=st.sampled_from([1, 3, 8, 16, 64, 100]),
    packed=st.booleans(),
    spread=st.sampled_from([0.1, 1.0, 8.0]),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=10, deadline=None)
def test_output_and_gradients_equal_dense(length, window, heads, block, packed, spread, seed):
    q, k, v, do = inputs(seed, 2, length, *heads, 8, spread=spread)
    segment_ids = segments(seed, 2, length) if packed else None
    want, want_gradients = run(dense, q, k, v, do, window, segment_ids)
    got, got_gradients = run(blockwise, q, k, v, do, window, segment_ids, block=block)
    np.testing.assert_allclose(got, want, atol=FORWARD_TOLERANCE)
    for name, a, b in zip("qkv", got_gradients, want_gradients, strict=True):
        # Large logits make large gradients: the tolerance is relative to the largest one.
        bound = GRADIENT_TOLERANCE * max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=bound, err_msg=f"d{name}")


@pytest.mark.parametrize("window", [1, 5, 8, 33, None])
def test_output_against_numpy_with_segments(window):
    q, k, v, _ = inputs(3, 2, 45, 4, 2, 8)
    segment_ids = segments(3, 2, 45)
    want = numpy_attention(q, k, v, window=window, segment_ids=segment_ids, kv_segment_ids=segment_ids)
    got, _ = run(blockwise, q, k, v, jnp.ones_like(q), window, segment_ids, block=8)
    np.testing.assert_allclose(got, want, atol=FORWARD_TOLERANCE)


@pytest.mark.parametrize("window", [20, None])
def test_bfloat16_is_as_exact_as_dense_bfloat16(window):
    """The error against fp32 is at most twice that of the dense form in the same dtype (FlashAttention's rule)."""
    q, k, v, do = inputs(4, 2, 70, 4, 2, 16, jnp.bfloat16)
    exact = run(dense, *(x.astype(jnp.float32) for x in (q, k, v, do)), window, None)
    ours = run(blockwise, q, k, v, do, window, None, block=16)
    plain = run(dense, q, k, v, do, window, None)
    for a, b, c in zip(*map(jax.tree.leaves, (ours, plain, exact)), strict=True):
        assert a.dtype == jnp.bfloat16

        def error(x, c=c):
            return float(jnp.abs(x.astype(jnp.float32) - c).max())

        assert error(a) <= 2 * error(b) + 2**-9


def test_rows_that_see_nothing_are_zero_and_pass_no_gradient():
    q, k, v, do = inputs(5, 1, 20, 2, 1, 8)
    mine, other = jnp.ones((1, 20), jnp.int32), jnp.full((1, 20), 2, jnp.int32).at[0, 15].set(1)
    for implementation in (dense, blockwise):

        def loss(q, k, v, implementation=implementation):
            out = implementation(q, k, v, mask=Mask(), segment_ids=mine, kv_segment_ids=other, q_offset=None, scale=1.0)
            return (out * do).sum(), out

        (_, out), (dq, dk, dv) = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)
        assert not out[0, :15].any() and out[0, 15:].any()
        assert not dq[0, :15].any() and not dk[0, :15].any() and not dv[0, :15].any()
        assert dv[0, 15].any() and np.isfinite(dk).all()


@pytest.mark.parametrize("window", [1, 9, None])
def test_gradients_reach_exactly_the_visible_keys(window):
    """The gradient of one output row is exactly zero at every key it must not see, and not zero at one it sees."""
    T, row = 40, 29
    q, k, v, _ = inputs(6, 1, T, 2, 1, 8)
    segment_ids = jnp.asarray([[1] * 11 + [2] * (T - 11)])

    def loss(k, v):
        out = blockwise(
            q, k, v, mask=Mask(True, window), segment_ids=segment_ids, kv_segment_ids=segment_ids, q_offset=None,
            scale=0.3, block=8,
        )  # fmt: skip
        return (out[0, row] ** 2).sum()

    dk, dv = jax.grad(loss, (0, 1))(k, v)
    seen = [j for j in range(T) if j <= row and j >= 11 and (window is None or j > row - window)]
    for j in range(T):
        assert bool(dv[0, j].any()) == (j in seen), j
        assert bool(dk[0, j].any()) == (j in seen and len(seen) > 1), j  # with one key the softmax is constant


def test_keys_out_of_reach_leave_the_row_as_it_is():
    """Bit for bit, also when they are NaN: they stand outside the band and are never read."""
    q, k, v, _ = inputs(7, 1, 64, 2, 1, 8)

    def call(k, v):
        return blockwise(
            q, k, v, mask=Mask(True, 4), segment_ids=None, kv_segment_ids=None, q_offset=None, scale=1.0, block=8
        )

    poisoned = call(k.at[0, :8].set(jnp.nan), v.at[0, :8].set(jnp.nan))
    assert (poisoned[0, 16:] == call(k, v)[0, 16:]).all()


def _memory(implementation, length, window, backward):
    shapes = [jax.ShapeDtypeStruct((1, length, n, 64), jnp.float32) for n in (4, 2, 2)]

    def call(q, k, v):
        return attention(q, k, v, mask=Mask(True, window), implementation=implementation).sum()

    function = jax.grad(call, (0, 1, 2)) if backward else call
    return jax.jit(function).lower(*shapes).compile().memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("backward", [False, True])
def test_no_quadratic_temporaries(backward):
    T, W, H, h = 4096, 256, 4, 64
    arrays = (12 if backward else 6) * T * H * h * 4  # copies of q, k, v, out, their gradients and rearrangements
    band = 4 * H * 128 * (W + 128) * 4  # scores, probabilities and their gradients of one block
    used = _memory("blockwise", T, W, backward)
    assert used < arrays + band < H * T * T * 4 / 4
    assert used < 1.2 * 2 * _memory("blockwise", T // 2, W, backward)  # linear in T
    assert _memory("dense", T, W, backward) > H * T * T * 4  # the measure does see a quadratic array


@given(blocks=st.integers(1, 200), block=st.sampled_from([1, 8, 128]), window=st.integers(1, 30_000))
@settings(max_examples=60, deadline=None)
def test_groups_cover_every_visible_key_and_little_else(blocks, block, window):
    length = blocks * block
    window = min(window, length)
    bands = Bands(block, length, length, window=window)
    groups = bands.groups()
    assert groups[0][0] == 0 and groups[-1][1] == blocks
    assert all(a[1] == b[0] for a, b in itertools.pairwise(groups))
    for first, end, band in groups:
        for index in (first, end - 1):
            start = max(0, (index + 1) * block - band)
            assert start + band <= length and start + band >= (index + 1) * block
            assert start <= max(0, index * block - window + 1)  # the first key its first query sees
    covered = sum((end - first) * band for first, end, band in groups)
    if blocks >= 16 and window == length:
        assert covered <= 0.7 * blocks * length  # 0.5 is what is useful
    assert covered <= blocks * (window + 2 * block)  # O(T * W)


def test_block_choice():
    assert choose_block(8, 8192, 512, "cpu") == 64
    assert choose_block(32, 512, 512, "cpu") == 32
    assert choose_block(1, 512, 512, "cpu") == 128
    assert choose_block(8, 8192, 512, "gpu") == choose_block(8, 8192, 512, "tpu") == 128


def test_remat_policy_keeps_the_residuals_and_skips_the_forward():
    """With both names saved, the gradient of a checkpointed block runs the forward loop once, else twice."""
    q, k, v, do = inputs(8, 1, 64, 2, 1, 8)

    def loops(policy):
        def loss(q, k, v):
            return (attention(q, k, v, mask=Mask(True, 8), implementation="blockwise") * do).sum()

        jaxpr = jax.make_jaxpr(jax.grad(jax.checkpoint(loss, policy=policy, prevent_cse=False), (0, 1, 2)))(q, k, v)
        return str(jaxpr).count("scan[")

    assert loops(checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME)) == 2
    assert loops(checkpoint_policies.nothing_saveable) == 3


def test_inside_scan_checkpoint_and_jit():
    q, k, v, do = inputs(9, 2, 50, 4, 2, 8)

    def loss(implementation, q, k, v):
        def layer(x, _):
            return x + attention(x, k, v, mask=Mask(True, 9), implementation=implementation), None

        x, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), q, None, length=3)
        return (x * do).sum()

    got = jax.jit(jax.grad(lambda *a: loss("blockwise", *a), (0, 1, 2)))(q, k, v)
    want = jax.jit(jax.grad(lambda *a: loss("dense", *a), (0, 1, 2)))(q, k, v)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=GRADIENT_TOLERANCE * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({"mask": Mask(causal=False), "alibi_slopes": jnp.ones(2)}, "alibi_slopes with causal=False"),
        ({"q_offset": jnp.zeros(1, jnp.int32)}, "q_offset"),
        ({"S": 24}, "24 keys"),
    ],
)
def test_what_it_lacks_is_named_with_who_has_it(change, lacks):
    S = change.pop("S", 16)
    q, k = jnp.ones((1, 16, 2, 8)), jnp.ones((1, S, 2, 8))
    with pytest.raises(InputError, match=rf"lacks {lacks}.*implementation='dense'"):
        attention(q, k, k, **({"mask": Mask()} | change), implementation="blockwise")
