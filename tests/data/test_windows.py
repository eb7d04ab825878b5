"""Rows from windows: compared with a token-by-token reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.data import store, store_writer
from neo.data.synthetic import synthetic_source
from neo.data.windows import Window, assemble, read_window, split_rows

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


def source_of(folder, documents, shard_documents=3):
    store_writer.write_source(str(folder), "x", {"train": documents}, vocab_size=9000, eod_id=EOD, tokenizer_sha256="ab" * 32,
                              shard_documents=shard_documents)
    return store.open_source(str(folder))


def test_read_window_without_extras(tmp_path):
    for split in (source_of(tmp_path, [("a", [1, 2, 3]), ("b", [4]), ("c", [5, 6])]).split("train"),
                  synthetic_source("s", vocab_size=50, seed=1).split("train")):
        read = read_window(split, 1, 6, 3)
        assert read.tokens.tolist() == split.tokens(1, 8).tolist() and read.source == 3
        assert read.ends.tolist() == (split.document_ends(1, 8) - 1).tolist()
        assert read.borders is None and read.masked is None
    with pytest.raises(IndexError):
        read_window(source_of(tmp_path / "y", [("a", [1, 2, 3])]).split("train"), 1, 3, 0)


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5), st.booleans()), min_size=1, max_size=12), st.booleans(),
       st.booleans(), st.integers(1, 4), st.integers(0, 200), st.integers(1, 15))
@settings(max_examples=80, deadline=None)
def test_prompts_and_groups_against_reference(tmp_path_factory, shapes, cross, mask_eod, shard_documents, start, length):
    """Rows of windows anywhere, against the documents laid out token by token."""
    documents = [(f"d{i}", list(range(1, n + 1)), min(prompt, n + 1), joined) for i, (n, prompt, joined) in enumerate(shapes)]
    split = source_of(tmp_path_factory.mktemp("s"), documents, shard_documents).split("train")
    tokens, first, prompted, group = [], [], [], []
    for _, body, prompt, joined in documents:
        tokens += [*body, EOD]
        first += [True] + [False] * len(body)
        prompted += [i < prompt for i in range(len(body) + 1)]
        group += [not joined] + [False] * len(body)
    length = min(length, len(tokens) - 1)
    if not length:
        return
    start %= len(tokens) - length
    row = assemble([window([1] * (length + 1)), read_window(split, start, length, 0)], cross_document_attention=cross,
                   mask_end_of_document=mask_eod)
    place = range(start, start + length)
    assert row["inputs"][1].tolist() == tokens[start:start + length]
    assert row["loss_mask"][1].tolist() == [
        float(not (prompted[i + 1] or (mask_eod and first[i + 1]))) for i in place]
    segments, positions, segment, position = [], [], 1, 0
    for i in place:
        if group[i] and i > start and not cross:
            segment, position = segment + 1, 0
        segments.append(segment)
        positions.append(position)
        position += 1
    assert row["segment_ids"][1].tolist() == segments and row["positions"][1].tolist() == positions


def test_the_first_token_after_a_prompt_counts(tmp_path):
    """It is predicted from the prompt's last token; a prompt that a window begins in goes on being left out."""
    split = source_of(tmp_path, [("a", [1, 2, 3, 4, 5, 6], 4), ("b", [7, 8], 1)]).split("train")
    masks = [assemble([read_window(split, start, 5, 0)], cross_document_attention=False,
                      mask_end_of_document=False)["loss_mask"][0].tolist() for start in (0, 2, 4)]
    assert masks == [[0, 0, 0, 1, 1], [0, 1, 1, 1, 0], [1, 1, 0, 1, 1]]


def test_rows_that_repeat_themselves_are_left_out():
    repeated, plain = [7] * 40 + list(range(100, 161)), list(range(100, 201))
    for mask, expected in ((False, [100, 100]), (True, [0, 100])):
        rows = assemble([window(repeated), window(plain)], cross_document_attention=False, mask_end_of_document=False,
                        mask_repetition=mask)
        assert rows["loss_mask"].sum(axis=1).tolist() == expected
        assert rows["inputs"].tolist() == [repeated[:-1], plain[:-1]]


def test_only_tokens_that_count_can_repeat():
    """40 equal tokens of which 10 are a prompt: 30 are too few; the target after the last input is not looked at."""
    tokens = [7] * 40 + list(range(100, 161))
    last = [*range(100, 170), *[7] * 32]
    rows = [window(tokens)._replace(masked=np.array([[0, 10]])), window(tokens)._replace(masked=np.array([[0, 8]])),
            window(last[1:])._replace(masked=np.array([[100, 101]]))]
    batch = assemble(rows, cross_document_attention=False, mask_end_of_document=False, mask_repetition=True)
    assert batch["loss_mask"].sum(axis=1).tolist() == [91, 0, 99]
