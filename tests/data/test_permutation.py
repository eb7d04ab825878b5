"""The keyed permutation: a bijection for any n, mixing well, and the same for ever."""

from __future__ import annotations

import collections
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.data.permutation import Permutation, block_permutation, derive_key


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63))
@settings(max_examples=60, deadline=None)
def test_bijection(n, seed):
    permutation = Permutation(n, derive_key(seed))
    image = [permutation[i] for i in range(n)]
    assert sorted(image) == list(range(n))


@given(n=st.integers(1, 10**13), data=st.data())
@settings(max_examples=200, deadline=None)
def test_inverse_at_any_size(n, data):
    permutation = Permutation(n, derive_key("key", n))
    index = data.draw(st.integers(0, n - 1))
    image = permutation[index]
    assert 0 <= image < n
    assert permutation.inverse(image) == index
    assert permutation[permutation.inverse(index)] == index


def test_golden_values():
    """These numbers may never change: they are the data order of every run there is."""
    assert derive_key(7, "en", 0, 0).hex()[:32] == "2927955c28bfd14b405b82d0863119b9"
    assert [block_permutation(10, 7, "en", 8, 0, 0)[i] for i in range(10)] == [9, 0, 3, 7, 2, 5, 6, 1, 4, 8]
    big = block_permutation(10**12 + 39, 7, "code", 3, 2, 0)
    assert [big[i] for i in (0, 1, 2, 10**12)] == [731503584567, 847778596047, 902177211107, 979896794906]


def test_keys_are_unambiguous():
    keys = [derive_key(1, "2"), derive_key("1", "2"), derive_key("12"), derive_key(12), derive_key("1\nint:1:2"),
            derive_key("1", 2), derive_key(1, 2), derive_key(2, 1)]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize("n", [2, 3, 10, 31])
def test_every_place_is_equally_likely(n):
    """Chi-square of where index i goes over many keys; the bound is mean + 6 standard deviations."""
    draws = 4000
    for index in {0, n // 2, n - 1}:
        counts = collections.Counter(Permutation(n, derive_key(seed))[index] for seed in range(draws))
        chi_square = sum((counts[j] - draws / n) ** 2 / (draws / n) for j in range(n))
        assert chi_square < (n - 1) + 6 * (2 * (n - 1)) ** 0.5 + 6


def test_neighbours_part():
    """In one large permutation neither order nor distance of neighbours survives."""
    n = 20_011
    p = block_permutation(n, 0, "a", 8, 0, 0)
    image = [p[i] for i in range(n)]
    rising = sum(b > a for a, b in itertools.pairwise(image))
    assert abs(rising - n / 2) < 6 * (n / 12) ** 0.5  # runs-up variance of a random permutation is (n+1)/12
    distance = sum(abs(b - a) for a, b in itertools.pairwise(image)) / n
    assert abs(distance / (n / 3) - 1) < 0.02
    fixed = sum(i == j for i, j in enumerate(image))
    assert fixed <= 8  # Poisson(1)


def test_pairs_are_equally_likely():
    """For n = 5, each ordered pair of images of (0, 1) is as frequent as any other."""
    draws = 8000
    pairs = collections.Counter()
    for seed in range(draws):
        p = Permutation(5, derive_key("pair", seed))
        pairs[p[0], p[1]] += 1
    expected = draws / 20
    assert len(pairs) == 20
    assert sum((c - expected) ** 2 / expected for c in pairs.values()) < 19 + 6 * 38**0.5


def test_different_blocks_have_different_orders():
    orders = {tuple(block_permutation(50, seed, source, length, epoch, start)[i] for i in range(50))
              for seed in (0, 1) for source in ("a", "b") for length in (8, 9) for epoch in (0, 1) for start in (0, 400)}
    assert len(orders) == 32


def test_outside():
    with pytest.raises(IndexError):
        Permutation(5, derive_key(0))[5]
    with pytest.raises(IndexError):
        Permutation(5, derive_key(0)).inverse(-1)
    with pytest.raises(ValueError):
        Permutation(0, derive_key(0))
