"""Inputs that hold token ids in place of text."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from neo.data import preparation, prepare, store, tokenizer_training
from neo.data.preparation import Request
from neo.data.records import ReadOptions
from neo.data.tokenizer import Tokenizer

TEXTS = [f"the {word} fox jumps over {number} lazy dogs" for number in range(20) for word in ("quick", "slow", "naïve")]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return tokenizer_training.train(TEXTS, 300)


def read_back(folder: Path) -> dict[str, tuple[str, list[int]]]:
    """id -> (split, tokens)."""
    source = store.open_source(str(folder))
    found = {}
    for name, split in source.splits.items():
        ends = [0, *split.document_ends(0, split.num_tokens).tolist(), split.num_tokens]
        for document_id, start, stop in zip(split.document_ids(0, split.num_tokens), ends, ends[1:], strict=False):
            found[document_id] = (name, split.tokens(start, stop).tolist())
    return found


def request(folder: Path, out: Path, tokenizer: Tokenizer, **options: str) -> Request:
    return Request((str(folder),), str(out), "web", tokenizer, ReadOptions(id_field="id", **options), 0.2, workers=1,
                   bucket_bytes=2000, piece_bytes=1000)


@pytest.mark.parametrize("kind", ["jsonl", "list", "large_list", "fixed"])
def test_ids_give_the_store_that_their_text_gives(tokenizer, tmp_path, kind):
    for name in ("text", "ids"):
        (tmp_path / name).mkdir()
    texts = TEXTS if kind != "fixed" else [text for text in TEXTS if len(tokenizer.encode(text)) == 34]
    assert len(texts) > 9
    (tmp_path / "text" / "a.jsonl").write_text(
        "".join(json.dumps({"text": text, "id": f"d{i}"}) + "\n" for i, text in enumerate(texts)))
    # Some with, some without their end-of-document token.
    ids = [tokenizer.encode(text) + [tokenizer.eod_id] * (i % 2 and kind != "fixed") for i, text in enumerate(texts)]
    if kind == "jsonl":
        (tmp_path / "ids" / "a.jsonl").write_text(
            "".join(json.dumps({"input_ids": one, "id": f"d{i}"}) + "\n" for i, one in enumerate(ids)))
    else:
        types = {"list": pyarrow.list_(pyarrow.uint16()), "large_list": pyarrow.large_list(pyarrow.int64()),
                 "fixed": pyarrow.list_(pyarrow.int32(), 34)}
        table = pyarrow.table({"input_ids": pyarrow.array(ids, types[kind]), "id": [f"d{i}" for i in range(len(ids))]})
        pyarrow.parquet.write_table(table, tmp_path / "ids" / "a.parquet", row_group_size=4)
    from_text, _ = preparation.prepare(request(tmp_path / "text", tmp_path / "a", tokenizer))
    from_ids, _ = preparation.prepare(request(tmp_path / "ids", tmp_path / "b", tokenizer, tokens_field="input_ids"))
    expected = read_back(tmp_path / "a" / "web")
    assert {name for name, _ in expected.values()} == {"train", "validation"}
    assert read_back(tmp_path / "b" / "web") == expected
    assert from_ids["splits"]["train"]["bytes"] == from_text["splits"]["train"]["bytes"] > 0
    assert from_ids["prepare"]["arguments"]["tokens_field"] == "input_ids"
    assert "tokens_field" not in from_text["prepare"]["arguments"]


def test_bytes_of_text_may_be_given(tokenizer, tmp_path):
    ids = tokenizer.encode("the fox")
    lines = [{"ids": ids, "n": 100}, {"ids": ids, "n": -1}, {"ids": ids}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    job = Request((str(tmp_path / "a.jsonl"),), str(tmp_path / "out"), "web", tokenizer,
                  ReadOptions(tokens_field="ids", bytes_field="n"), 0.0)
    manifest, _ = preparation.prepare(job)
    assert manifest["splits"]["train"]["bytes"] == 100 + 2 * len("the fox")
    assert manifest["prepare"]["repaired"] == {
        "no size in field 'n', bytes of the tokens used": {"documents": 2, "first": "a.jsonl:2"}}


def test_records_that_cannot_be_used_are_counted(tokenizer, tmp_path):
    bad = [{"ids": [5, 300]}, {"ids": [-1]}, {"ids": "5 6"}, {"ids": [5.5]}, {"ids": [[5]]}, {"ids": [[5], [6, 7]]},
           {"ids": []}, {"ids": [2 ** 70]},
           {"ids": 5}, {"id": [5]}, {"ids": [tokenizer.eod_id]}, {"ids": [True]}, {"ids": {"a": 1}}]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in [{"ids": [5, 6]}, *bad]))
    table = pyarrow.table({"ids": pyarrow.array([[5, None], None, [7]], pyarrow.list_(pyarrow.int32()))})
    pyarrow.parquet.write_table(table, tmp_path / "in" / "b.parquet")
    (tmp_path / "in" / "c.txt").write_text("text")
    job = Request((str(tmp_path / "in"),), str(tmp_path / "out"), "web", tokenizer, ReadOptions(tokens_field="ids"), 0.0)
    manifest, _ = preparation.prepare(job)
    assert {reason: (entry["documents"], entry["first"]) for reason, entry in manifest["prepare"]["skipped"].items()} == {
        "token id outside 0 .. 299": (2, "a.jsonl:2, id 300"),
        "field 'ids' is not a list of token ids": (9, "a.jsonl:4"),
        "empty": (2, "a.jsonl:8"),
        "no field 'ids'": (2, "a.jsonl:11 (did you mean 'id'?)"),
        "text without a field 'ids'": (1, "c.txt")}
    assert {name: tokens for name, (_, tokens) in read_back(tmp_path / "out" / "web").items()} == {
        "a.jsonl:1": [5, 6, tokenizer.eod_id], "b.parquet:3": [7, tokenizer.eod_id]}


def test_the_command_takes_ids(tokenizer, tmp_path, invoked):
    tokenizer.save(str(tmp_path / "tok"))
    table = pyarrow.table({"input_ids": [np.array(tokenizer.encode(text)) for text in TEXTS]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    arguments = [tmp_path / "a.parquet", f"--out={tmp_path / 'out'}", "--source=web", f"--tokenizer={tmp_path / 'tok'}"]
    ended = invoked(prepare.COMMAND, prepare.run, [*arguments, "--tokens_field=input_ids"])
    assert ended.code == 0 and f"{len(TEXTS) - 1:,}" in ended.out
    ended = invoked(prepare.COMMAND, prepare.run, arguments)
    assert ended.code == 2 and "tokens_field: 'input_ids' there, not used now" in ended.error
    os.truncate(tmp_path / "a.parquet", 1000)
    ended = invoked(prepare.COMMAND, prepare.run, [*arguments, "--tokens_field=input_ids", "--overwrite"])
    assert ended.code == 2 and "1 unreadable (first: a.parquet: " in ended.error
