"""cuDNN behind the entry point: what it refuses, and that the window it is given is the window that was asked for."""

from __future__ import annotations

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo.errors import InputError
from neo.kernels.attention.cudnn import KERNEL, CuDNN, window_size
from neo.kernels.attention.kernel import Extras, Plan, Request

FINE = Request(platform="gpu", dtype="bfloat16", seq_len=2048, num_heads=8, num_kv_heads=2, head_size=128,
               device_kind="NVIDIA H200", kv_len=2048, window=512)  # fmt: skip


@pytest.mark.parametrize("change", [
    {},
    dict(window=None),
    dict(head_size=80),
    dict(head_size=256),
    dict(head_size=128, device_kind="NVIDIA A100-SXM4-80GB"),
    dict(head_size=128, device_kind=""),
    dict(num_heads=8, num_kv_heads=8, seq_len=1001, kv_len=1001),
    dict(kv_len=None),
    dict(causal=False, window=None, kv_len=512),
])  # fmt: skip
def test_takes(change):
    assert KERNEL.lacks(dataclasses.replace(FINE, **change)) == ""


@pytest.mark.parametrize(("change", "named"), [
    (dict(platform="cpu", device_kind="cpu"), "on cpu"),
    (dict(platform="tpu", device_kind="TPU v5 lite"), "on TPU v5 lite"),
    (dict(device_kind="AMD Instinct MI300X"), "AMD Instinct MI300X"),
    (dict(device_kind="Tesla T4", head_size=64), "Tesla T4"),
    (dict(device_kind="Tesla V100-SXM2-16GB"), "Ampere or later"),
    (dict(dtype="float32"), "float32"),
    (dict(head_size=257), "head size 257"),
    (dict(head_size=192, device_kind="NVIDIA A100-SXM4-80GB"), "head size 192"),
    (dict(head_size=192, device_kind="NVIDIA GeForce RTX 4090"), "head size 192"),
    (dict(head_size=192, device_kind="NVIDIA B200"), "head size 192"),
    (dict(head_size=192, device_kind=""), "head size 192"),
    (dict(head_size=100), "multiples of 8"),
    (dict(segments=True), "segment ids"),
    (dict(alibi=True), "ALiBi"),
    (dict(softcap=True), "soft-cap"),
    (dict(sinks=True), "sinks"),
    (dict(q_offset=True), "q_offset"),
    (dict(kv_len=4096), "q_offset"),
    (dict(causal=False), "causal=False"),
    (dict(lse=True), "the log-sum-exp"),
    (dict(sequence_shards=2), "split over devices"),
    (dict(interpret=True), "interpretation"),
])  # fmt: skip
def test_says_what_it_lacks(change, named):
    assert named in KERNEL.lacks(dataclasses.replace(FINE, **change))


@pytest.mark.parametrize(("extras", "plan", "named"), [
    (dict(segment_ids=jnp.zeros((1, 8), jnp.int32)), {}, "segment ids"),
    (dict(slopes=jnp.ones(4)), {}, "ALiBi"),
    (dict(sinks=jnp.ones(4)), {}, "sinks"),
    (dict(first_key=jnp.int32(1)), {}, "q_offset"),
    ({}, dict(softcap=1.0), "soft-cap"),
    ({}, dict(offset=1), "q_offset"),
    ({}, dict(causal=False, window=3), "causal=False"),
    ({}, dict(interpret=True), "interpretation"),
])  # fmt: skip
def test_never_leaves_an_option_out(extras, plan, named):
    """Whoever asks without `lacks` gets an error and not an answer to another question."""
    q = jnp.ones((1, 8, 4, 8))
    with pytest.raises(InputError, match=named):
        CuDNN(jax_nn="xla").attend(q, q, q, Extras(**extras), Plan(scale=1.0, **plan))


def test_keys_behind_the_queries_are_refused():
    q, k = jnp.ones((1, 4, 2, 8)), jnp.ones((1, 8, 2, 8))
    with pytest.raises(InputError, match="q_offset"):
        CuDNN(jax_nn="xla").attend(q, k, k, Extras(), Plan(scale=1.0))


T, H, K, h = 12, 4, 2, 8


def reference(q, k, v, window):
    """float64, written from the definition: query i sees i - W < j <= i."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, H // K, axis=2) for x in (k, v))
    scores = np.einsum("bihd,bjhd->bhij", q, k) * 0.3
    i, j = np.arange(T)[:, None], np.arange(T)[None, :]
    seen = (j <= i) & (i - (window or T) < j)
    p = np.where(seen, np.exp(scores - scores.max()), 0.0)
    return np.einsum("bhij,bjhd->bihd", p / p.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("window", [None, 1, 2, 3, T - 1, T, T + 1, 4 * T])
def test_window_is_the_number_of_visible_keys(window):
    """Through jax.nn's XLA form, which takes the same arguments. A window of one key more or less is far off."""
    keys = jax.random.split(jax.random.key(0), 4)
    q, k, v, weights = (jax.random.normal(key, (2, T, n, h)) for key, n in zip(keys, (H, K, K, H), strict=True))

    def weighted(q, k, v):
        out, lse = CuDNN(jax_nn="xla").attend(q, k, v, Extras(), Plan(scale=0.3, window=window))
        assert lse is None
        return (out * weights).sum(), out

    (_, out), gradients = jax.value_and_grad(weighted, (0, 1, 2), has_aux=True)(q, k, v)
    np.testing.assert_allclose(out, reference(q, k, v, window), atol=2e-6)
    # The gradient by v is the probabilities, so it shows which keys took part: key j of the queries j .. j + W - 1.
    visible = min(window or T, T)
    for at in range(T):
        one = np.zeros((2, T, H, h), np.float32)
        one[:, at] = 1.0
        dv = jax.grad(lambda v, one=one: (CuDNN(jax_nn="xla").attend(q, k, v, Extras(), Plan(scale=0.3, window=window))[0]
                                          * one).sum())(v)  # fmt: skip
        took_part = np.flatnonzero(np.abs(np.asarray(dv)).sum((0, 2, 3)) > 0)
        assert took_part.tolist() == list(range(max(0, at - visible + 1), at + 1))
    assert all(np.isfinite(np.asarray(g)).all() for g in gradients)


def test_all_keys_without_causality():
    keys = jax.random.split(jax.random.key(1), 3)
    q, k, v = (jax.random.normal(key, (1, s, n, h)) for key, s, n in zip(keys, (3, 5, 5), (H, K, K), strict=True))
    out, _ = CuDNN(jax_nn="xla").attend(q, k, v, Extras(), Plan(scale=0.3, causal=False))
    k, v = (jnp.repeat(x, H // K, axis=2) for x in (k, v))
    p = jax.nn.softmax(jnp.einsum("bihd,bjhd->bhij", q, k) * 0.3)
    np.testing.assert_allclose(out, jnp.einsum("bhij,bjhd->bihd", p, v), atol=2e-6)


@pytest.mark.parametrize("window", [None, 1, 7])
def test_what_jax_nn_is_asked(window, monkeypatch):
    """is_causal=True stands beside every window (without it cuDNN would see the future), and cuDNN is named."""
    asked = {}

    def fake(q, k, v, **options):
        asked.update(options)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", fake)
    q = jnp.ones((1, T, H, h), jnp.bfloat16)
    KERNEL.attend(q, q, q, Extras(), Plan(scale=0.3, window=window))
    assert asked == {"scale": 0.3, "is_causal": True, "local_window_size": window_size(window), "implementation": "cudnn"}
    assert window_size(7) == (6, 0)
    assert window_size(1) == (0, 0)


@pytest.mark.parametrize("window", [None, 1, 7])
def test_lowers_to_cudnn_with_that_window(window, monkeypatch):
    """The program for CUDA, made without a GPU: cuDNN's own window is W, forward and backward, and both are causal."""
    from jax._src.cudnn import fused_attention_stablehlo

    version = types.SimpleNamespace(cudnn_get_version=lambda: 91800)
    monkeypatch.setattr(fused_attention_stablehlo, "cuda_versions", version)
    q, k = (jax.ShapeDtypeStruct((1, 64, n, 128), jnp.bfloat16) for n in (H, K))

    def loss(q, k, v):
        return KERNEL.attend(q, k, v, Extras(), Plan(scale=0.1, window=window))[0].astype(jnp.float32).sum()

    text = jax.jit(jax.grad(loss, (0, 1, 2))).trace(q, k, k).lower(lowering_platforms=("cuda",)).as_text()
    text = text.replace(r"\22", '"')
    assert "fmhaSoftmax" in text and "fmhaSoftmaxBackward" in text
    assert re.findall(r'"sliding_window_length": (\d+)', text) == [str(window or 0)] * 2
    assert re.findall(r'"mask_type": "(\w+)"', text) == ["CAUSAL"] * 2
