from __future__ import annotations

import gzip
import json
import multiprocessing
import os

import hypothesis
import hypothesis.strategies as st
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from neo.data import held_out
from neo.data.documents import (
    Part,
    ReadOptions,
    Tally,
    Unreadable,
    count_lines,
    group_parts,
    read_part,
    split_file,
)
from neo.data.inputs import find_inputs
from neo.data.workers import Workers
from neo.errors import InputError, RestartSafe


def read(path, piece_bytes=1 << 30, **options):
    """All documents of what `path` names, cut into pieces, and the tally."""
    inputs, tally, documents = find_inputs([str(path)]), Tally(), []
    for number, file in enumerate(inputs.files):
        row = 0
        for part in split_file(number, file, piece_bytes):
            if part.stop >= 0 and file.kind == "jsonl":
                part = Part(part.file, part.start, part.stop, row)
                row += count_lines(file.path, part.start, part.stop)
            documents += read_part(file, part, ReadOptions(**options), tally)
    return documents, tally


def jsonl(*records):
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def test_ids_are_relative_paths_and_rows(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.TXT").write_text("one")
    (tmp_path / "a.jsonl").write_text(jsonl({"text": "two"}, {"text": "three"}))
    (tmp_path / "c.md").write_text("not read")
    (tmp_path / ".hidden.txt").write_text("not read")
    expected = [("a.jsonl:1", "two"), ("a.jsonl:2", "three"), ("b/x.TXT", "one")]
    assert [(d.id, d.text) for d in read(tmp_path)[0]] == expected
    assert find_inputs([str(tmp_path)]).ignored == 1
    # A glob's ids are relative to what stands before its first wildcard; a file's id is its name.
    assert [d.id for d in read(tmp_path / "*" / "*.TXT")[0]] == ["b/x.TXT"]
    assert [d.id for d in read(tmp_path / "b" / "?.TXT")[0]] == ["x.TXT"]
    assert [d.id for d in read(tmp_path / "**")[0]] == [name for name, _ in expected]
    assert [d.id for d in read(tmp_path / "[b]")[0]] == ["b/x.TXT"]
    assert [d.id for d in read(tmp_path / "b" / "x.TXT")[0]] == ["x.TXT"]


def test_the_same_file_named_twice_is_read_once(tmp_path):
    (tmp_path / "a.txt").write_text("one")
    os.symlink(tmp_path / "a.txt", tmp_path / "b.txt")
    assert [f.name for f in find_inputs([str(tmp_path), str(tmp_path / "*.txt")]).files] == ["a.txt"]


def test_compressed_files_equal_plain_ones(tmp_path):
    content = jsonl(*({"text": f"document {i} " + "x" * 3000} for i in range(200))).encode()
    (tmp_path / "plain.jsonl").write_bytes(content)
    (tmp_path / "gz.jsonl.gz").write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))
    frames = zstandard.compress(content[:5000]) + zstandard.compress(content[5000:])
    (tmp_path / "zst.jsonl.zst").write_bytes(frames)
    (tmp_path / "t.txt.zst").write_bytes(zstandard.compress(b"text"))
    plain = [d.text for d in read(tmp_path / "plain.jsonl")[0]]
    assert len(plain) == 200
    assert [d.text for d in read(tmp_path / "gz.jsonl.gz")[0]] == plain
    assert [d.text for d in read(tmp_path / "zst.jsonl.zst")[0]] == plain
    assert [d.text for d in read(tmp_path / "t.txt.zst")[0]] == ["text"]


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.txt.gz"])
@pytest.mark.parametrize("damage", ["truncated", "foreign"])
def test_damaged_files_are_unreadable(tmp_path, name, damage):
    content = jsonl(*({"text": os.urandom(500).hex()} for i in range(300))).encode()
    path = tmp_path / name
    if name.endswith("gz"):
        path.write_bytes(gzip.compress(content))
    elif name.endswith("zst"):
        path.write_bytes(zstandard.compress(content))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"text": ["x" * 100] * 100}), path)
    if damage == "truncated":
        os.truncate(path, path.stat().st_size - 30)
    else:
        path.write_bytes(b"something else" * 100)
    with pytest.raises(Unreadable, match=name):
        read(path)


def test_parquet_with_row_groups(tmp_path):
    table = pyarrow.table({"text": [f"t{i}" for i in range(10)] + [None, " "], "n": list(range(12))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    documents, tally = read(tmp_path, piece_bytes=1)
    assert len(split_file(0, find_inputs([str(tmp_path)]).files[0], 1)) == 3
    assert [(d.id, d.text) for d in documents] == [(f"a.parquet:{i + 1}", f"t{i}") for i in range(10)]
    skipped = {reason: count for reason, (count, _) in tally.counts["skipped"].items()}
    assert skipped == {"no field 'text'": 1, "empty": 1}
    assert [d.id for d in read(tmp_path, id_field="n")[0]] == [str(i) for i in range(10)]
    _, tally = read(tmp_path, piece_bytes=1, text_field="texts")
    assert tally.counts["skipped"] == {"no field 'texts'": [12, [0, 1, "a.parquet:1 (did you mean 'text'?)"]]}


def test_a_local_hugging_face_data_set(tmp_path, monkeypatch):
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text(jsonl(*({"text": f"t{i}", "k": f"id{i}"} for i in range(5))))
    import datasets
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    name = f"hf:{tmp_path / 'set'}"
    inputs = find_inputs([name + ":train"])
    documents = list(read_part(inputs.files[0], split_file(0, inputs.files[0], 1 << 30)[0], ReadOptions(), Tally()))
    assert [d.text for d in documents] == [f"t{i}" for i in range(5)]
    assert documents[1].id == "hf/set:train:2" and find_inputs([name]).files[0].name == "hf/set:train"
    assert len(split_file(0, inputs.files[0], 1)) == 5
    with pytest.raises(InputError, match="hf:.*nosplit"):
        find_inputs([name + ":nosplit"])


def test_records_that_cannot_be_used_are_counted_with_their_first_place(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        b'\xef\xbb\xbf{"text": "good", "id": 7}\n\nbroken\n[1]\n{"txt": "x"}\n{"text": 5}\n{"text": "  "}\nworse\n'
        b'{"text": "caf\xe9", "id": true}\n{"text": "lone \\ud800", "id": ""}\n' + b"[" * 100000 + b"\n")
    documents, tally = read(tmp_path, id_field="id")
    assert [(d.id, d.text) for d in documents] == [
        ("7", "good"), ("a.jsonl:9", "caf\ufffd"), ("a.jsonl:10", "lone \ufffd")]
    assert {reason: (count, place[2]) for reason, (count, place) in tally.counts["skipped"].items()} == {
        "not JSON": (3, "a.jsonl:3"), "not a JSON object": (1, "a.jsonl:4"),
        "no field 'text'": (1, "a.jsonl:5 (did you mean 'txt'?)"),
        "field 'text' is not text": (1, "a.jsonl:6"), "empty": (1, "a.jsonl:7")}
    assert {reason: count for reason, (count, _) in tally.counts["repaired"].items()} == {
        "bad UTF-8 replaced": 2, "no id in field 'id', file and row used": 2}
    documents, tally = read(tmp_path, on_bad_text="skip")
    assert [d.text for d in documents] == ["good"]
    assert tally.counts["skipped"]["bad UTF-8"] == [2, [0, 9, "a.jsonl:9"]]


def test_text_files_that_are_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfna\xefve\r\n")
    documents, tally = read(tmp_path)
    assert documents[0].text == "na\ufffdve\r\n" and tally.counts["repaired"]["bad UTF-8 replaced"][0] == 1
    documents, tally = read(tmp_path, on_bad_text="skip")
    assert documents == [] and tally.counts["skipped"]["bad UTF-8"][0] == 1


LINES = st.sampled_from([b"", b"{}", b'{"text":"a"}', b'{"text":"\xc3\xa9\xc3\xa9"}', b"x" * 9])


@hypothesis.given(lines=st.lists(LINES, max_size=15), end=st.booleans(), piece_bytes=st.integers(1, 40))
@hypothesis.settings(max_examples=150, deadline=None)
def test_the_cut_of_a_jsonl_file_changes_nothing(tmp_path_factory, lines, end, piece_bytes):
    path = tmp_path_factory.mktemp("j") / "a.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if end else b""))
    whole, tally = read(path)
    pieces, other = read(path, piece_bytes=piece_bytes)
    assert pieces == whole and other.counts == tally.counts


@pytest.mark.parametrize("argument, message", [
    ("nowhere.txt", "no such file"), ("no*thing", "matches nothing"), ("a.pdf", "this type is not read"),
    ("empty", "no .txt"), ("gs://bucket/x", "copy it here"), ("hf:", "needs the name"), ("*.pdf", "none of them")])
def test_inputs_that_are_not_there(tmp_path, monkeypatch, argument, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=message) as caught:
        find_inputs([argument])
    assert "\n" not in str(caught.value) and argument in str(caught.value)


def test_a_dangling_link_is_unreadable(tmp_path):
    os.symlink(tmp_path / "nothing", tmp_path / "a.txt")
    with pytest.raises(Unreadable, match="No such file"):
        read(tmp_path)


def test_parts_are_bundled_in_order():
    parts = [Part(i, size=size) for i, size in enumerate([10_000, 10_000, 50_000, 1])]
    pieces = group_parts(parts, 20_000)
    assert [[part.file for part in piece] for piece in pieces] == [[0, 1], [2], [3]]


# Held-out documents


IDS = st.lists(st.text(max_size=4), min_size=1, max_size=12)


@hypothesis.given(ids=IDS, validation=st.sampled_from([0.0, 1e-9, 0.1, 0.5, 0.9, 0.999999]))
@hypothesis.settings(max_examples=300, deadline=None)
def test_tokenizer_and_store_hold_out_the_same_documents(ids, validation):
    places = [held_out.position(name) for name in ids]
    limit = held_out.settled_limit(validation, len(ids), min(places), max(places))
    trained = sorted(name for name, place in zip(ids, places, strict=True) if place >= limit)
    assert sorted(held_out.without_held_out(((name, name) for name in ids), validation)) == trained
    assert trained, "something must be left to train on"
    if validation > 0 and len(set(ids)) > 1:
        assert len(trained) < len(ids), "something must be held out"
    if validation == 0:
        assert len(trained) == len(ids)


def test_the_share_held_out_is_the_one_asked_for():
    limit = held_out.limit(0.1)
    count = sum(held_out.position(f"document {i}") < limit for i in range(20_000))
    assert 1800 < count < 2200  # 2000 expected, standard deviation 42


def test_split_and_order_are_fixed_for_ever():
    # A change here would move documents between training and validation in existing projects.
    assert held_out.position("a.txt") == GOLDEN_POSITION
    assert held_out.shuffle_key(7, "a.txt").hex() == GOLDEN_KEY


GOLDEN_POSITION = 14748087640263160668
GOLDEN_KEY = "94f061e108247f55c57150f5bfbfff39"


# Worker processes


def _double(state, task):
    if task == "die":
        os._exit(9)
    if task == "bad":
        raise InputError("bad task")
    if task == "bug":
        raise KeyError("a bug")
    return state + task * 2, os.getpid()


def test_workers_return_every_result_once():
    with Workers(3, 100) as pool:
        for tasks in (list(range(20)), [], [5]):
            results = dict(pool.map(_double, tasks))
            assert {number: value for number, (value, _) in results.items()} == {
                i: 100 + 2 * task for i, task in enumerate(tasks)}
            pids = {pid for _, pid in results.values()}
            assert os.getpid() not in pids and len(pids) <= 3
    assert not multiprocessing.active_children()


def test_one_worker_is_this_process_unless_it_must_not_be():
    with Workers(1, 0) as here, Workers(1, 0, own_process=True) as elsewhere:
        [(_, (_, here_pid))] = here.map(_double, [1])
        [(_, (_, other_pid))] = elsewhere.map(_double, [1])
    assert here_pid == os.getpid() != other_pid


@pytest.mark.parametrize("task, error", [("bad", InputError), ("die", RestartSafe), ("bug", RuntimeError)])
def test_errors_of_workers_reach_the_caller(task, error):
    with pytest.raises(error), Workers(2, 0) as pool:
        list(pool.map(_double, [1, task, *range(5)]))
    assert not multiprocessing.active_children()
