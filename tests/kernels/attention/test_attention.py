"""The entry point and the dense oracle, against numpy and against jax.nn.dot_product_attention."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.errors import InputError
from neo.kernels.attention import Mask, Request, attention, resolve
from neo.kernels.attention.spec import visible


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def picture(mask, T, S, offset=0):
    seen = visible(mask, offset + jnp.arange(T), jnp.arange(S))
    return ["".join(".x"[int(x)] for x in row) for row in np.asarray(seen)]


def test_masks_as_pictures():
    assert picture(Mask(), 4, 4) == ["x...", "xx..", "xxx.", "xxxx"]
    assert picture(Mask(window=1), 4, 4) == ["x...", ".x..", "..x.", "...x"]
    assert picture(Mask(window=2), 4, 4) == ["x...", "xx..", ".xx.", "..xx"]
    assert picture(Mask(window=9), 4, 4) == picture(Mask(), 4, 4)
    assert picture(Mask(window=3), 2, 6, offset=3) == [".xxx..", "..xxx."]
    assert visible(Mask(causal=False), jnp.arange(4), jnp.arange(4)) is None


@pytest.mark.parametrize("window", [1, 2, 3, 7, 8, 9, 15, 16, 17, None])
@pytest.mark.parametrize("heads", [(2, 2), (4, 1), (6, 2)])
def test_dense_equals_jax_nn(window, heads):
    """jax.nn counts the keys to the left: our W is its (W - 1, 0)."""
    H, K = heads
    q, k, v = normal(0, 2, 16, H, 8), normal(1, 2, 16, K, 8), normal(2, 2, 16, K, 8)
    got = attention(q, k, v, mask=Mask(window=window), implementation="dense")
    left = None if window is None else (window - 1, 0)
    want = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=left)
    np.testing.assert_allclose(got, want, atol=3e-6)


def test_dense_without_causality_equals_jax_nn():
    q, k, v = normal(0, 2, 5, 4, 8), normal(1, 2, 9, 2, 8), normal(2, 2, 9, 2, 8)
    got = attention(q, k, v, mask=Mask(causal=False), implementation="dense", scale=0.7)
    np.testing.assert_allclose(got, jax.nn.dot_product_attention(q, k, v, scale=0.7), atol=3e-6)


def test_window_as_long_as_the_sequence_is_plain_causal():
    q, k, v = normal(0, 1, 300, 2, 8), normal(1, 1, 300, 2, 8), normal(2, 1, 300, 2, 8)
    for name in ("dense", "blockwise"):
        plain = attention(q, k, v, mask=Mask(), implementation=name)
        for window in (300, 301, 10_000):
            assert (attention(q, k, v, mask=Mask(window=window), implementation=name) == plain).all(), (name, window)


@given(
    prefix=st.integers(0, 20),
    new=st.integers(1, 6),
    window=st.one_of(st.none(), st.integers(1, 30)),
    seed=st.integers(0, 999),
)
@settings(max_examples=10, deadline=None)
def test_decoding_with_offsets_equals_the_full_forward(prefix, new, window, seed):
    """Two rows with different offsets into a key array with free room behind, as in a cache."""
    total, room = prefix + new, 32
    q, k, v = normal(seed, 2, room, 4, 8), normal(seed + 1, 2, room, 2, 8), normal(seed + 2, 2, room, 2, 8)
    full = attention(q, k, v, mask=Mask(window=window), implementation="dense")
    offsets = np.asarray([prefix, max(0, prefix - 1)])
    some = jnp.stack([q[b, offsets[b] : offsets[b] + new] for b in range(2)])
    junk = jnp.arange(room)[None, :, None, None] >= total
    cached = (jnp.where(junk, 1e4, k), jnp.where(junk, 1e4, v))  # what is not written yet must not be seen
    got = attention(some, *cached, mask=Mask(window=window), q_offset=jnp.asarray(offsets, jnp.int32))
    want = jnp.stack([full[b, offsets[b] : offsets[b] + new] for b in range(2)])
    np.testing.assert_allclose(got, want, atol=3e-6)


def test_segments_and_key_segments():
    q, k, v = normal(0, 1, 6, 2, 4), normal(1, 1, 6, 2, 4), normal(2, 1, 6, 2, 4)
    packed = attention(q, k, v, mask=Mask(), segment_ids=jnp.asarray([[1, 1, 1, 2, 2, 2]]))
    for part in (slice(0, 3), slice(3, 6)):
        alone = attention(q[:, part], k[:, part], v[:, part], mask=Mask())
        np.testing.assert_allclose(packed[:, part], alone, atol=3e-6)


@pytest.mark.parametrize("name", ["dense", "blockwise"])
def test_softmax_is_float32_for_bfloat16_inputs(name):
    """257 equal keys: bf16 sums stall at 256, and a bf16 probability of 1/257 times 257 is not 1."""
    q = k = jnp.zeros((1, 1025, 1, 8), jnp.bfloat16)
    v = jnp.ones((1, 1025, 1, 8), jnp.bfloat16)
    out = attention(q, k, v, mask=Mask(), implementation=name)
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=2**-8)


def request(platform="cpu", seq_len=8192, **changes):
    facts = {"dtype": "bfloat16", "num_heads": 8, "num_kv_heads": 2, "head_size": 128} | changes
    return Request(platform=platform, seq_len=seq_len, **facts)


def test_resolve_gives_one_name_and_a_reason():
    assert resolve("dense", request("tpu", 10**6)) == ("dense", "asked for by name")
    for platform in ("cpu", "gpu"):
        name, reason = resolve("auto", request(platform))
        assert name == "blockwise" and platform in reason and "8192" in reason
    for kind in ("TPU v5 lite", "TPU v5", "TPU v6 lite", "TPU7x", ""):
        assert resolve("auto", request("tpu", device_kind=kind)) == ("pallas_tpu", f"neo's own kernel for {kind or 'tpu'}")
    assert resolve("auto", request("gpu", device_kind="NVIDIA H200"))[0] == "pallas_gpu"
    name, reason = resolve("auto", request("gpu", device_kind="NVIDIA A100-SXM4-40GB"))
    assert name == "blockwise" and "pallas_gpu lacks" in reason and "Hopper" in reason
    name, reason = resolve("auto", request("gpu", device_kind="NVIDIA H200", dtype="float32"))
    assert name == "blockwise" and "pallas_gpu lacks dtype float32" in reason
    with pytest.raises(InputError, match="'pallas_tpu' lacks .*TPU"):
        resolve("pallas_tpu", request())
    with pytest.raises(InputError, match="'pallas_gpu' lacks .*Hopper"):
        resolve("pallas_gpu", request("tpu"))
    assert resolve("auto", request(seq_len=64))[0] == "dense"
    assert resolve("auto", request("gpu", q_offset=True))[0] == "dense"
    assert resolve("auto", request("gpu", kv_len=8200))[0] == "dense"
    with pytest.raises(InputError, match="did you mean 'blockwise'"):
        resolve("blockwize", request())
    with pytest.raises(InputError, match="'dense' lacks a sequence split 4 ways .mesh axis context."):
        resolve("dense", request(sequence_shards=4))


GOOD = {"q": (2, 8, 4, 16), "k": (2, 8, 2, 16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (2, 8, 4)}, "4 dimensions"),
        ({"v": (2, 8, 4, 16)}, "keys and values of one shape"),
        ({"k": (3, 8, 2, 16)}, "batch or head size"),
        ({"k": (2, 8, 2, 8)}, "batch or head size"),
        ({"k": (2, 8, 3, 16)}, "4 query heads are not a multiple of 3"),
        ({"k": (2, 9, 2, 16), "segment_ids": (2, 8)}, "need kv_segment_ids"),
        ({"segment_ids": (2, 9)}, r"segment_ids has shape \(2, 9\); \(2, 8\)"),
        ({"kv_segment_ids": (2, 8)}, "without segment_ids"),
        ({"q_offset": (3,)}, r"q_offset has shape \(3,\); \(2,\)"),
        ({"implementation": "flash"}, "unknown attention implementation 'flash'"),
    ],
)
def test_bad_input_is_one_clear_line(change, message):
    shapes = {**GOOD, **{n: s for n, s in change.items() if n in ("q", "k", "v")}}
    q, k = jnp.ones(shapes["q"]), jnp.ones(shapes["k"])
    v = jnp.ones(shapes.get("v", shapes["k"]))
    extra = {
        n: jnp.ones(s, jnp.int32) if isinstance(s, tuple) else s for n, s in change.items() if n not in ("q", "k", "v")
    }
    with pytest.raises(InputError, match=message) as error:
        attention(q, k, v, mask=Mask(), **extra)
    assert "\n" not in str(error.value) and error.value.exit_code == 2


@pytest.mark.parametrize(("causal", "window"), [(True, 0), (True, -3), (True, 2.0), (True, True), (False, 4)])
def test_impossible_masks_are_refused(causal, window):
    with pytest.raises(InputError, match="window"):
        Mask(causal, window)
