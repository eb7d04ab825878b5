"""Synthetic tokens: any window, any time, the same; documents as the index says."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.data.synthetic import BLOCK, TRAIN_TOKENS, VALIDATION_TOKENS, synthetic_source


@given(st.sampled_from(["train", "validation"]), st.floats(0, 1), st.integers(0, 5000), st.integers(0, 5000))
@settings(max_examples=60, deadline=None)
def test_every_window_agrees_with_every_other(split_name, at, before, length):
    split = synthetic_source("a", vocab_size=300, seed=1).split(split_name)
    start = min(int(at * split.num_tokens), split.num_tokens - 12_000)
    whole = split.tokens(start, start + 12_000)
    part = split.tokens(start + before, start + before + length)
    assert np.array_equal(part, whole[before:before + length])
    ends = split.document_ends(start, start + 12_000)
    assert np.array_equal(ends, np.flatnonzero(whole[:-1] == 0) + start + 1)
    assert 9 <= len(ends) <= 13
    stop = start + before + length
    if length:
        inside = split.document_ends(start + before, stop)
        ids = split.document_ids(start + before, stop)
        assert len(ids) == len(inside) + 1 == len(set(ids))
        assert [int(i.rsplit("-", 1)[1]) for i in ids] == list(range(int(ids[0].rsplit("-", 1)[1]),
                                                                     int(ids[0].rsplit("-", 1)[1]) + len(ids)))


def test_ids_change_where_documents_end():
    split = synthetic_source("a", vocab_size=300, seed=1).split("train")
    end = int(split.document_ends(5 * BLOCK, 9 * BLOCK)[0])
    assert split.document_ids(end - 1, end) != split.document_ids(end, end + 1)
    assert split.document_ids(end - 1, end + 1) == split.document_ids(end - 1, end) + split.document_ids(end, end + 1)


def test_the_last_token_ends_a_document():
    split = synthetic_source("a", vocab_size=300, seed=1).split("validation")
    assert split.num_tokens == VALIDATION_TOKENS
    assert split.tokens(VALIDATION_TOKENS - 1, VALIDATION_TOKENS).tolist() == [0]
    assert split.document_ids(VALIDATION_TOKENS - 1, VALIDATION_TOKENS) == [f"validation-{split.num_documents - 1}"]


def test_uniform_and_different_by_seed_source_and_split():
    draws = [synthetic_source(name, vocab_size=50, seed=seed).split(split).tokens(10**15 % n, 10**15 % n + 100_000)
             for name, seed, split, n in (("a", 0, "train", TRAIN_TOKENS), ("a", 1, "train", TRAIN_TOKENS),
                                          ("b", 0, "train", TRAIN_TOKENS), ("a", 0, "validation", 100_000))]
    for i, tokens in enumerate(draws):
        assert all((tokens == other).mean() < 0.05 for other in draws[:i])
        counts = np.bincount(tokens[tokens > 0], minlength=50)[1:]
        expected = counts.sum() / 49
        assert ((counts - expected) ** 2 / expected).sum() < 48 + 6 * 96**0.5
        assert tokens.min() == 0 and tokens.max() == 49


def test_golden_values():
    """May never change."""
    split = synthetic_source("a", vocab_size=64_000, seed=3).split("train")
    assert split.tokens(10**12, 10**12 + 4).tolist() == [27508, 2748, 17229, 17661]
    assert split.document_ends(0, 4096).tolist() == [410, 1665, 2850, 4007]
