"""Decoding against the cache equals the full forward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo.models.cache import KVCache


@pytest.mark.parametrize("windows,layers", [((0,), 2), ((3,), 3), ((3, 0), 5)])
@pytest.mark.parametrize("cuts", [(5, 1, 1, 1, 4), (1,) * 12, (12,)])
def test_prefill_and_steps_equal_the_full_forward(build, tokens, windows, layers, cuts):
    decoder, params = build(num_layers=layers, windows=windows)
    batch = tokens(2, 12)
    cache = KVCache.empty(decoder.config, batch=2, capacity=16)
    decode = jax.jit(decoder.decode)
    parts, start = [], 0
    for n in cuts:
        logits, cache = decode(params, batch[:, start:start + n], cache)
        parts.append(logits)
        start += n
    np.testing.assert_allclose(jnp.concatenate(parts, 1), decoder.apply(params, batch), atol=2e-5)
    assert cache.length.tolist() == [12, 12]


def test_rows_of_different_length(build, tokens):
    """Each row goes on from its own length; what stands behind it in the cache is not seen."""
    decoder, params = build(windows=(4, 0))
    batch = tokens(2, 10)
    cache = KVCache.empty(decoder.config, batch=2, capacity=12)
    _, cache = decoder.decode(params, batch[:, :6], cache)
    cache = KVCache(cache.key, cache.value, jnp.asarray([6, 3]))   # row 1: only its first three tokens count
    new = jnp.stack([batch[0, 6:9], batch[1, 3:6]])
    logits, cache = decoder.decode(params, new, cache)
    full = decoder.apply(params, batch)
    np.testing.assert_allclose(logits[0], full[0, 6:9], atol=2e-5)
    np.testing.assert_allclose(logits[1], full[1, 3:6], atol=2e-5)
    assert cache.length.tolist() == [9, 6]


def test_bfloat16_cache_is_near(build, tokens):
    decoder, params = build()
    cache = KVCache.empty(decoder.config, 1, 8, jnp.bfloat16)
    logits, cache = decoder.decode(params, tokens(1, 8), cache)
    assert cache.key.dtype == jnp.bfloat16
    exact = decoder.apply(params, tokens(1, 8))
    assert float(jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact)) < 0.03
