"""Held-out windows: each token a target once, the masks of training, and bytes for the tokens that are scored."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np

from neo.data import store, store_writer
from neo.data.validation import ValidationBatches

EOD = 2


@hypothesis.given(
    shapes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), min_size=1, max_size=10),
    seq_len=st.integers(1, 12), batch_size=st.integers(1, 3), max_tokens=st.integers(0, 60), mask_eod=st.booleans(),
    packed=st.booleans())
@hypothesis.settings(max_examples=70)
def test_each_token_is_scored_as_in_training(tmp_path_factory, shapes, seq_len, batch_size, max_tokens, mask_eod, packed):
    documents = [(f"d{d}", [10 + 100 * d + i for i in range(length)], min(prompt, length + 1), joined)
                 for d, (length, prompt, joined) in enumerate(shapes)]
    folder = str(tmp_path_factory.mktemp("s"))
    store_writer.write_source(folder, "x", {"train": documents, "validation": documents}, vocab_size=9000, eod_id=EOD,
                              tokenizer_sha256="ab" * 32, shard_documents=3, pack=8 * packed)
    split = store.open_source(folder).split("validation")
    batches = ValidationBatches(split, 4, EOD, seq_len, batch_size, max_tokens, False, mask_eod)
    rows = list(batches)
    inputs, targets, mask = (np.concatenate([b[name].reshape(-1) for b in rows]) for name in ("inputs", "targets", "loss_mask"))
    tokens = [t for _, body, _, _ in documents for t in (*body, EOD)]
    scored = [not (i < prompt or (mask_eod and i == 0)) for _, body, prompt, _ in documents for i in range(len(body) + 1)]
    count = min(len(tokens), max_tokens) if max_tokens else len(tokens)
    assert batches.num_targets == count
    assert targets[:count].tolist() == tokens[:count] and inputs[:count].tolist() == [EOD, *tokens][:count]
    assert mask.tolist() == [float(s) for s in scored[:count]] + [0.0] * (len(mask) - count)
    assert batches.num_scored == mask.sum()
    assert batches.num_bytes == split.num_bytes * (sum(scored[:count]) / len(tokens))
    # Segments: one more where a document begins that may not see the one before it; the first sees none.
    borders = [i == 0 and not (joined and d) for d, (_, body, _, joined) in enumerate(documents) for i in range(len(body) + 1)]
    segments = np.concatenate([b["segment_ids"] for b in rows])
    for row, at in enumerate(range(0, count, seq_len)):
        begins = [False, *borders[at:at + seq_len - 1]][:count - at]  # input i is token i - 1
        assert segments[row][:len(begins)].tolist() == (1 + np.cumsum(begins)).tolist()
    assert all((batch["source"] == 4).all() for batch in rows)
