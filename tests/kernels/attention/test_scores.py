"""What is done to the scores before the softmax, ALiBi and soft-cap, against float64 numpy and between implementations."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo.errors import InputError
from neo.kernels.attention import Mask, attention
from neo.kernels.attention import dense as dense_module
from neo.kernels.attention.blockwise import KERNEL, backward, forward
from neo.kernels.attention.kernel import Extras, Kernel, Plan
from neo.kernels.attention.spec import distance_bias

IMPLEMENTATIONS = ("dense", "blockwise")  # on any device; the rules for the others are in test_numerics.py

# fp32 sums of up to a few hundred terms of size ~1 in another order: 1e-5 is about 100 units in the last place.
FORWARD_TOLERANCE = 1e-5
GRADIENT_TOLERANCE = 3e-5


def oracle(
    q, k, v, *, mask, scale, segment_ids=None, kv_segment_ids=None, q_offset=None, alibi_slopes=None, softcap=None
):
    """Whole matrices in float64, from the formulas of the papers; shares nothing with the implementations."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    (B, T, H, _), (S, K) = q.shape, k.shape[1:3]
    i = np.zeros((B, 1, T, 1)) + np.arange(T)[:, None]
    if q_offset is not None:
        i = i + np.asarray(q_offset).reshape(B, 1, 1, 1)
    j = np.arange(S)
    s = np.einsum("bthx,bshx->bhts", q, np.repeat(k, H // K, 2)) * scale
    if softcap is not None:
        s = softcap * np.tanh(s / softcap)
    if alibi_slopes is not None:
        s = s + np.asarray(alibi_slopes, np.float64)[:, None, None] * np.minimum(j - i, i - j)
    hidden = np.zeros_like(s, bool)
    if mask.causal:
        hidden |= j > i
    if mask.window is not None:
        hidden |= j <= i - mask.window
    if segment_ids is not None:
        kv_segment_ids = segment_ids if kv_segment_ids is None else kv_segment_ids
        hidden |= (np.asarray(segment_ids)[:, :, None] != np.asarray(kv_segment_ids)[:, None, :])[:, None]
    p = np.where(hidden, 0.0, np.exp(s - s.max(-1, keepdims=True, where=~hidden, initial=-1e300)))
    p /= np.maximum(p.sum(-1, keepdims=True), 1e-300)
    return np.einsum("bhts,bshx->bthx", p, np.repeat(v, H // K, 2))


def dense(q, k, v, **options):
    return dense_module.dense(q, k, v, **options)[0]


def blockwise(q, k, v, *, mask, segment_ids, kv_segment_ids, q_offset, scale, alibi_slopes, softcap, block):
    """The kernel with blocks of a given size, behind dense's arguments."""
    kernel = Kernel(f"blocks of {block}", functools.partial(forward, block=block),
                    functools.partial(backward, block=block), KERNEL.lacks)  # fmt: skip
    plan = Plan(scale=scale, causal=mask.causal, window=mask.window, softcap=softcap)
    return kernel.attend(q, k, v, Extras(segment_ids, kv_segment_ids, alibi_slopes), plan)[0]


def inputs(seed, B, T, H, K, h, S=None, spread=2.0):
    """q, k, v and the gradient of the output; the scores are spread, so that a cap of 2 bends them."""
    rng = np.random.default_rng(seed)
    shapes = [(B, T, H, h), (B, S or T, K, h), (B, S or T, K, h), (B, T, H, h)]
    q, k, v, do = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes)
    return q * spread, k, v, do


def slopes(H):
    """All different, neither falling nor rising, so that no permutation of the heads goes unseen."""
    return np.asarray([0.02 * 1.7 ** ((5 * n + 3) % (2 * H + 1)) for n in range(H)], np.float32)


def packed(seed, B, T):
    """Segment ids of packed documents."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(1 + np.cumsum(rng.random((B, T)) < 3 / T, axis=1), jnp.int32)


@pytest.mark.parametrize(("alibi", "softcap"), [(True, None), (False, 2.0), (True, 2.0)])
@pytest.mark.parametrize("heads", [(3, 3), (6, 2)])
def test_dense_equals_numpy(heads, alibi, softcap):
    q, k, v, _ = inputs(0, 2, 24, *heads, 8)
    given = {"alibi_slopes": slopes(heads[0]) if alibi else None, "softcap": softcap, "scale": 0.4}
    for window in (None, 7):
        for segment_ids in (None, packed(1, 2, 24)):
            case = {"mask": Mask(window=window), "segment_ids": segment_ids} | given
            np.testing.assert_allclose(
                attention(q, k, v, **case, implementation="dense"), oracle(q, k, v, **case), atol=FORWARD_TOLERANCE
            )


@pytest.mark.parametrize("window", [None, 5])
def test_distance_counts_from_the_offset(window):
    """Rows of a cache at different offsets: the bias is that of the index in the key array, as in the full forward."""
    q, k, v, _ = inputs(2, 3, 4, 4, 2, 8, S=20)
    ids = packed(3, 3, 20)
    offsets = jnp.asarray([0, 7, 16], jnp.int32)
    mine = jnp.stack([ids[b, offset : offset + 4] for b, offset in enumerate(offsets)])
    case = {"mask": Mask(window=window), "scale": 0.3, "alibi_slopes": slopes(4), "softcap": 2.0, "q_offset": offsets}
    for segments in ({}, {"segment_ids": mine, "kv_segment_ids": ids}):
        got = attention(q, k, v, **case, **segments)
        np.testing.assert_allclose(got, oracle(q, k, v, **case, **segments), atol=FORWARD_TOLERANCE)


def test_without_causality_distance_counts_on_both_sides():
    q, k, v, _ = inputs(4, 2, 6, 4, 2, 8, S=9)
    case = {"mask": Mask(causal=False), "scale": 0.3, "alibi_slopes": slopes(4)}
    np.testing.assert_allclose(attention(q, k, v, **case), oracle(q, k, v, **case), atol=FORWARD_TOLERANCE)
    bias = distance_bias(jnp.asarray([2.0]), jnp.arange(3), jnp.arange(3))
    assert bias.tolist() == [[[0, -2, -4], [-2, 0, -2], [-4, -2, 0]]]
    far = distance_bias(jnp.ones(1), jnp.asarray([100_001]), jnp.arange(1))
    assert far.dtype == jnp.float32 and far.item() == -100_001


def test_packed_documents_equal_documents_alone():
    q, k, v, _ = inputs(5, 1, 20, 4, 2, 8)
    given = {"mask": Mask(), "alibi_slopes": slopes(4), "softcap": 3.0}
    for name in IMPLEMENTATIONS:
        call = jax.jit(functools.partial(attention, **given, implementation=name))
        together = call(q, k, v, segment_ids=jnp.asarray([[1] * 10 + [2] * 10]))
        for part in (slice(0, 10), slice(10, 20)):
            np.testing.assert_allclose(
                together[:, part], call(q[:, part], k[:, part], v[:, part]), atol=FORWARD_TOLERANCE, err_msg=name
            )


@pytest.mark.parametrize(
    ("length", "window", "heads", "block", "documents", "alibi", "softcap", "spread"),
    [
        (45, None, (4, 2), 8, True, True, None, 1.0),
        (45, 13, (6, 2), 8, False, True, None, 8.0),
        (33, None, (4, 1), 16, True, False, 0.5, 8.0),
        (70, 20, (6, 2), 16, True, True, 5.0, 8.0),
        (7, None, (4, 2), 100, False, True, 0.5, 1.0),
    ],
)
def test_blockwise_equals_dense_and_numpy(length, window, heads, block, documents, alibi, softcap, spread):
    q, k, v, do = inputs(length, 2, length, *heads, 8, spread=spread)
    ids = packed(length, 2, length) if documents else None
    case = {"mask": Mask(window=window), "scale": 8**-0.5, "segment_ids": ids, "softcap": softcap,
            "alibi_slopes": jnp.asarray(slopes(heads[0])) if alibi else None}  # fmt: skip

    def gradients(implementation, **options):
        def loss(q, k, v):
            out = implementation(q, k, v, kv_segment_ids=ids, q_offset=None, **({"alibi_slopes": None} | case), **options)
            return (out * do).sum(), out

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    ((_, got), got_gradients), ((_, want), want_gradients) = jax.jit(
        lambda: (gradients(blockwise, block=block), gradients(dense))
    )()
    np.testing.assert_allclose(got, want, atol=FORWARD_TOLERANCE)
    np.testing.assert_allclose(got, oracle(q, k, v, **case), atol=FORWARD_TOLERANCE)
    for name, a, b in zip("qkv", got_gradients, want_gradients, strict=True):
        # Large logits make large gradients: the tolerance is relative to the largest one.
        bound = GRADIENT_TOLERANCE * max(1.0, float(jnp.abs(b).max()))
        np.testing.assert_allclose(a, b, atol=bound, err_msg=f"d{name}")


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_gradients_equal_finite_differences(name):
    """In the direction of the gradient itself, of the float64 oracle: the derivative of the tanh is there, and right."""
    q, k, v, do = inputs(6, 1, 11, 4, 2, 8)
    case = {"mask": Mask(window=6), "scale": 0.5, "alibi_slopes": slopes(4), "softcap": 1.5}

    def loss(q, k, v):
        return (attention(q, k, v, **case, implementation=name) * do).sum()

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)
    step = 1e-4
    for number, gradient in enumerate(gradients):
        direction = np.asarray(gradient, np.float64)
        sides = []
        for sign in (1, -1):
            moved = [np.asarray(x, np.float64) for x in (q, k, v)]
            moved[number] = moved[number] + sign * step * direction
            sides.append((oracle(*moved, **case) * np.asarray(do, np.float64)).sum())
        np.testing.assert_allclose((sides[0] - sides[1]) / (2 * step), (direction**2).sum(), rtol=1e-4, err_msg="qkv"[number])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_slopes_are_constants(name):
    q, k, v, do = inputs(7, 1, 12, 2, 1, 8)

    def loss(q, m):
        return (attention(q, k, v, mask=Mask(), alibi_slopes=m, implementation=name) * do).sum()

    dq, dm = jax.jit(jax.grad(loss, (0, 1)))(q, jnp.asarray(slopes(2)))
    assert dq.any() and dm.shape == (2,) and not dm.any()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_bias_and_cap_are_float32_for_bfloat16_inputs(name):
    """In bf16 a bias of 250 slopes would be off by up to half a slope and a cap of 50 by a tenth: over 3 % each."""
    T = 256
    q, k = jnp.ones((1, T, 1, 8), jnp.bfloat16), jnp.ones((1, T, 1, 8), jnp.bfloat16)
    k = k * jnp.asarray(np.random.default_rng(8).integers(-7, 7, size=(1, T, 1, 1)), jnp.bfloat16)
    v = jnp.asarray(np.random.default_rng(9).normal(size=(1, T, 1, 8)), jnp.bfloat16)
    case = {"mask": Mask(), "scale": 1.0, "alibi_slopes": np.asarray([0.37]), "softcap": 50.0}
    got = attention(q, k, v, **case, implementation=name)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(got, np.float32), oracle(q, k, v, **case), rtol=2**-7, atol=2**-7)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_rows_that_see_nothing_and_huge_scores_stay_finite(name):
    q, k, v, do = inputs(10, 1, 20, 2, 1, 8, spread=1e6)
    mine, other = jnp.ones((1, 20), jnp.int32), jnp.full((1, 20), 2, jnp.int32).at[0, 15].set(1)

    def loss(q, k, v):
        out = attention(q, k, v, mask=Mask(), segment_ids=mine, kv_segment_ids=other, implementation=name, softcap=30.0,
                        alibi_slopes=jnp.asarray([1e4, 1.0]))  # fmt: skip
        return (out * do).sum(), out

    (_, out), gradients = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    assert not out[0, :15].any()
    np.testing.assert_allclose(out[0, 15:], jnp.broadcast_to(v[:, 15], (5, 2, 8)), atol=1e-6)
    assert all(np.isfinite(g).all() for g in gradients)


def test_blockwise_memory_stays_linear_with_both():
    """No T x T bias: temporaries at T=2048 stay far below one such array of the 4 heads."""
    T = 2048
    shapes = [jax.ShapeDtypeStruct((1, T, n, 16), jnp.float32) for n in (4, 2, 2)]

    def loss(q, k, v):
        return attention(q, k, v, mask=Mask(window=256), implementation="blockwise", alibi_slopes=slopes(4),
                         softcap=20.0).sum()  # fmt: skip

    used = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert used < 4 * T * T * 4 / 4


@pytest.mark.parametrize("softcap", [0, 0.0, -30.0, float("inf"), float("nan"), True])
def test_impossible_caps_are_refused(softcap):
    q = jnp.ones((1, 4, 2, 8))
    with pytest.raises(InputError, match="softcap is .* a number above 0, or None") as error:
        attention(q, q, q, mask=Mask(), softcap=softcap)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("wrong", [[0.5], [[0.5, 0.25]], 0.5])
def test_slopes_are_one_a_query_head(wrong):
    q, k = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 4, 1, 8))
    with pytest.raises(InputError, match=r"alibi_slopes has shape .*; \(2,\) would be right"):
        attention(q, k, k, mask=Mask(), alibi_slopes=wrong)
