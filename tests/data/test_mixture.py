"""The mixture schedule: contiguous per source, close to its weights at every prefix."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.data.mixture import SCALE, Mixture

weights_strategy = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 10.0)), min_size=1, max_size=40).filter(any)


@given(weights_strategy)
@settings(max_examples=60, deadline=None)
def test_each_source_is_read_in_order_and_near_its_weight(weights):
    mixture = Mixture({f"s{i}": w for i, w in enumerate(weights)})
    assert sum(mixture.weights) == SCALE
    seen = [0] * len(mixture.names)
    total = sum(weights)
    for k in range(400):
        source, n = mixture.select(k)
        assert n == seen[source]
        seen[source] += 1
        assert mixture.counts(k + 1) == seen
        for name, count in zip(mixture.names, seen, strict=True):
            assert abs(count - (k + 1) * weights[int(name[1:])] / total) <= 2


@given(weights_strategy, st.integers(0, 10**12))
@settings(max_examples=100, deadline=None)
def test_select_agrees_with_counts_anywhere(weights, index):
    mixture = Mixture({f"s{i}": w for i, w in enumerate(weights)})
    before, after = mixture.counts(index), mixture.counts(index + 1)
    source, n = mixture.select(index)
    assert sum(before) == index
    assert n == before[source]
    assert [b - a for a, b in zip(before, after, strict=True)] == [int(i == source) for i in range(len(before))]
    assert mixture.index_of(source, n) == index


def test_long_prefix_of_many_sources():
    """291 sources (YuLan-Mini's number), 1e9 sequences: within 2, plus quantisation."""
    rng = random.Random(0)
    weights = {f"source{i:03d}": rng.random() ** 4 for i in range(291)}
    mixture = Mixture(weights)
    total = math.fsum(weights.values())
    for k in (1, 4_500, 10**6, 10**9):
        for name, count in zip(mixture.names, mixture.counts(k), strict=True):
            assert abs(count - k * weights[name] / total) <= 2 + k / SCALE


def test_order_of_the_names_and_zeros_do_not_matter():
    a = Mixture({"x": 0.2, "y": 0.3, "z": 0.5})
    b = Mixture({"z": 5.0, "none": 0.0, "y": 3.0, "x": 2.0})
    assert a.names == b.names
    assert [a.select(i) for i in range(300)] == [b.select(i) for i in range(300)]


def test_golden_values():
    """May never change."""
    mixture = Mixture({"a": 0.6, "b": 0.15, "c": 0.25})
    assert "".join(mixture.names[mixture.select(i)[0]] for i in range(20)) == "acabaacacaabacaabaca"
    assert mixture.select(10**9) == (0, 600000000)


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": -1.0, "b": 2.0}, {"a": math.nan}, {"a": math.inf}])
def test_bad_weights(weights):
    with pytest.raises(ValueError):
        Mixture(weights)
