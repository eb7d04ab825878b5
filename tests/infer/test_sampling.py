"""The filters against their definitions in NumPy; the draws against the probabilities."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.errors import InputError
from neo.infer.sampling import Sampling, likeliest, row_keys, sample

V = 13
draw = jax.jit(sample)
filters = jax.jit(likeliest)
numbers = st.lists(st.integers(-40, 40), min_size=V, max_size=V)
rows = numbers.map(lambda x: np.array([x], np.float32) / 4)   # ties are frequent


def keys(count, seed=0):
    return row_keys(jnp.uint32(seed), jnp.arange(count))


def kept_tokens(scores, top_k, top_p):
    order, kept = filters(scores, top_k, np.float32(top_p))
    return set(np.asarray(order)[0][np.asarray(kept)[0]].tolist())


@settings(deadline=None)
@given(rows, st.integers(0, V + 3))
def test_top_k_keeps_k_likeliest(scores, top_k):
    kept = kept_tokens(scores, top_k, 1.0)
    assert len(kept) == (min(top_k, V) or V)
    left_out = set(range(V)) - kept
    assert not left_out or min(scores[0][list(kept)]) >= max(scores[0][list(left_out)])


@settings(deadline=None)
@given(rows, st.integers(0, V), st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_is_likely_enough(scores, top_k, top_p):
    kept = kept_tokens(scores, top_k, top_p)
    allowed = kept_tokens(scores, top_k, 1.0)
    assert kept and kept <= allowed
    p = {t: np.exp(np.float64(scores[0][t])) for t in allowed}
    total = sum(p.values())
    mass = sum(p[t] for t in kept) / total
    slack = 1e-5   # float32 sums
    assert mass >= top_p - slack
    assert len(kept) == 1 or mass - min(p[t] for t in kept) / total < top_p + slack
    assert all(p[t] <= min(p[k] for k in kept) for t in allowed - kept)


@settings(deadline=None)
@given(rows, st.integers(0, V), st.floats(0.05, 1.0), st.floats(0.01, 5.0), st.integers(0, 1000))
def test_filters_only_take_away(scores, top_k, top_p, temperature, seed):
    """A draw is one of the kept tokens; where the unfiltered draw is kept, it is the same."""
    free = int(draw(scores, keys(1, seed), Sampling(temperature).knobs(V))[0])
    token = int(draw(scores, keys(1, seed), Sampling(temperature, top_k, top_p).knobs(V))[0])
    kept = kept_tokens((scores - scores.max()) / np.float32(temperature), top_k, top_p)
    assert token in kept
    assert free not in kept or token == free


@settings(deadline=None)
@given(rows, st.integers(0, V), st.floats(0.05, 1.0), st.integers(0, 1000))
def test_temperature_zero_is_the_likeliest(scores, top_k, top_p, seed):
    assert int(draw(scores, keys(1, seed), Sampling(0.0, top_k, top_p).knobs(V))[0]) == int(np.argmax(scores))


@settings(deadline=None)
@given(rows, st.integers(1, V - 1), st.integers(0, 1000), st.sampled_from([0.0, 1.0, 30.0]))
def test_ids_past_the_vocabulary_are_never_drawn(scores, vocab_size, seed, temperature):
    assert int(draw(scores, keys(1, seed), Sampling(temperature).knobs(vocab_size))[0]) < vocab_size
    assert int(draw(scores, keys(1, seed), Sampling(temperature, top_p=0.99).knobs(vocab_size))[0]) < vocab_size


@pytest.mark.parametrize("temperature,top_k,top_p", [
    (1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 3, 1.0), (1.0, 0, 0.7), (1.5, 4, 0.8)])
def test_draws_have_the_probabilities_asked_for(temperature, top_k, top_p):
    logits = np.array([[2.0, 1.5, 1.0, 0.5, 0.0, -1.0]], np.float32)
    count = 20_000
    tokens = draw(jnp.repeat(logits, count, 0), keys(count, 5), Sampling(temperature, top_k, top_p).knobs(6))
    found = np.bincount(np.asarray(tokens), minlength=6) / count
    scaled = logits[0] / temperature
    kept = kept_tokens(scaled[None], top_k, top_p)
    p = np.array([np.exp(scaled[t]) if t in kept else 0.0 for t in range(6)])
    p /= p.sum()
    np.testing.assert_allclose(found, p, atol=5 * 0.5 / count**0.5)   # five standard deviations at most
    assert not found[p == 0].any()


def test_tiny_temperatures_make_no_infinities():
    logits = np.array([[100.0, -100.0, 99.0]], np.float32)
    for temperature in (1e-3, 1e-30):
        assert draw(logits, keys(1), Sampling(temperature, top_k=2, top_p=0.9).knobs(3)).tolist() == [0]
        assert draw(logits, keys(1), Sampling(temperature).knobs(3)).tolist() == [0]


def test_keys_belong_to_seed_and_index():
    logits = jnp.zeros((8, 1000))
    knobs = Sampling(1.0).knobs(1000)
    eight = draw(logits, keys(8), knobs).tolist()
    assert len(set(eight)) > 4
    three = draw(logits[:3], row_keys(jnp.uint32(0), jnp.arange(5, 8)), knobs).tolist()
    assert three == eight[5:]
    assert draw(logits, keys(8, 1), knobs).tolist() != eight


@pytest.mark.parametrize("wrong,named", [
    (dict(temperature=-1.0), "temperature=-1.0"), (dict(temperature=float("nan")), "temperature=nan"),
    (dict(top_k=-1), "top_k=-1"), (dict(top_p=0.0), "top_p=0.0"), (dict(top_p=1.5), "top_p=1.5"),
    (dict(seed=-1), "seed=-1"), (dict(seed=2**32), "seed=4294967296")])
def test_settings_out_of_range(wrong, named):
    with pytest.raises(InputError, match=named):
        Sampling(**wrong)
