"""Rows from windows: compared with a token-by-token reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.data.windows import Window, assemble, split_rows

EOD = 0


def reference(tokens, cross, mask_eod):
    """One row, in plain Python, from the tokens alone."""
    t = len(tokens) - 1
    segment, position, segments, positions, mask = 1, 0, [], [], []
    for i in range(t):
        segments.append(1 if cross else segment)
        positions.append(i if cross else position)
        mask.append(0.0 if mask_eod and tokens[i] == EOD else 1.0)
        position += 1
        if tokens[i] == EOD:
            segment, position = segment + 1, 0
    return segments, positions, mask


def window(tokens, source=0):
    tokens = np.asarray(tokens, np.int32)
    return Window(tokens, np.flatnonzero(tokens[:-1] == EOD).astype(np.int64) + 1, source)


rows_strategy = st.integers(1, 20).flatmap(lambda t: st.lists(
    st.lists(st.sampled_from([EOD, 1, 2, 3]), min_size=t + 1, max_size=t + 1), min_size=1, max_size=6))


@given(rows_strategy, st.booleans(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_against_reference(rows, cross, mask_eod):
    batch = assemble([window(r, i) for i, r in enumerate(rows)], cross_document_attention=cross,
                     mask_end_of_document=mask_eod)
    for i, tokens in enumerate(rows):
        segments, positions, mask = reference(tokens, cross, mask_eod)
        assert batch["inputs"][i].tolist() == tokens[:-1]
        assert batch["targets"][i].tolist() == tokens[1:]
        assert batch["segment_ids"][i].tolist() == segments
        assert batch["positions"][i].tolist() == positions
        assert batch["loss_mask"][i].tolist() == mask
    assert batch["source"].tolist() == list(range(len(rows)))


def test_types_shapes_and_rows():
    batch = assemble([window([1, 2, EOD, 3, 4]), window([1, 2, 3, 4, EOD], 5)], cross_document_attention=False,
                     mask_end_of_document=True)
    assert {k: (v.dtype.name, v.shape) for k, v in batch.items()} == {
        "inputs": ("int32", (2, 4)), "targets": ("int32", (2, 4)), "segment_ids": ("int32", (2, 4)),
        "positions": ("int32", (2, 4)), "loss_mask": ("float32", (2, 4)), "source": ("int32", (2,))}
    rows = split_rows(batch)
    assert rows[0]["segment_ids"].tolist() == [1, 1, 1, 2] and rows[0]["positions"].tolist() == [0, 1, 2, 0]
    assert rows[0]["loss_mask"].tolist() == [1, 1, 0, 1]
    assert rows[1]["source"].shape == () and rows[1]["source"] == 5


def test_a_document_ends_at_the_last_input():
    """The last target is the first token of the next document: left out of the loss, in no segment of its own."""
    batch = assemble([window([1, 2, EOD, 7])], cross_document_attention=False, mask_end_of_document=True)
    assert batch["loss_mask"].tolist() == [[1, 1, 0]]
    assert batch["segment_ids"].tolist() == [[1, 1, 1]]


def test_rows_must_have_one_length():
    with pytest.raises(ValueError):
        assemble([window([1, 2, 3]), window([1, 2])], cross_document_attention=False, mask_end_of_document=False)
