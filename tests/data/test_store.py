from __future__ import annotations

import json
import os
import pickle
import shutil

import fsspec
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from neo.data import store, store_files, store_writer
from neo.errors import InputError

FIXTURES = os.path.join(os.path.dirname(__file__), "fixtures")
EOD = 2


def make(folder, documents, *, vocab_size=300, shard_documents=2, layout="flat", validation=()):
    store_writer.write_source(str(folder), "tiny", {"train": documents, "validation": validation},
                              vocab_size=vocab_size, eod_id=EOD, tokenizer_sha256="ab" * 32, layout=layout,
                              shard_documents=shard_documents)
    return store.open_source(str(folder))


def some_documents(lengths):
    rng = np.random.default_rng(0)
    return [(f"folder/döc {i}", rng.integers(3, 300, n).tolist()) for i, n in enumerate(lengths)]


def flat(documents):
    tokens = [t for _, body in documents for t in (*body, EOD)]
    ends = list(np.cumsum([len(body) + 1 for _, body in documents]))
    return np.array(tokens, np.int32), [int(e) for e in ends]


@hypothesis.given(lengths=st.lists(st.integers(0, 12), min_size=1, max_size=12), shard_documents=st.integers(1, 5),
                  a=st.integers(0, 200), b=st.integers(0, 200), layout=st.sampled_from(store.LAYOUTS))
@hypothesis.settings(max_examples=60, deadline=None)
def test_any_range_equals_the_concatenated_documents(tmp_path_factory, lengths, shard_documents, a, b, layout):
    documents = some_documents(lengths)
    split = make(tmp_path_factory.mktemp("s"), documents, shard_documents=shard_documents, layout=layout).split("train")
    tokens, ends = flat(documents)
    assert (split.num_tokens, split.num_documents, split.num_bytes) == (len(tokens), len(documents), sum(lengths))
    start, stop = sorted((a % (len(tokens) + 1), b % (len(tokens) + 1)))
    got = split.tokens(start, stop)
    assert got.dtype == np.int32 and got.tolist() == tokens[start:stop].tolist()
    found = split.document_ends(start, stop)
    assert found.dtype == np.int64 and found.tolist() == [e for e in ends if start < e < stop]
    begins = [0, *ends[:-1]]
    assert split.document_ids(start, stop) == [name for (name, _), s, e in zip(documents, begins, ends, strict=True)
                                              if s < stop and e > start and start < stop]


def test_large_vocabularies_need_four_bytes(tmp_path):
    source = make(tmp_path, [("a", [65536, 5])], vocab_size=65537)
    assert source.dtype == "uint32" and source.split("train").tokens(0, 3).tolist() == [65536, 5, EOD]
    assert store.dtype_for(65536) == "uint16"


def test_tokens_outside_the_vocabulary_are_refused(tmp_path):
    with pytest.raises(InputError, match="outside"):
        make(tmp_path, [("a", [300])])


def test_ranges_outside_the_split_raise(tmp_path):
    split = make(tmp_path, some_documents([3])).split("train")
    for start, stop in ((-1, 2), (0, 5), (3, 2)):
        with pytest.raises(IndexError):
            split.tokens(start, stop)


def test_array_record_of_several_records(tmp_path):
    documents = some_documents([store_files.RECORD_TOKENS + 10, 5, 2 * store_files.RECORD_TOKENS])
    split = make(tmp_path, documents, layout="array_record", shard_documents=3).split("train")
    tokens, _ = flat(documents)
    for start, stop in ((0, len(tokens)), (8190, 8195), (16380, 16400)):
        assert split.tokens(start, stop).tolist() == tokens[start:stop].tolist()


def test_a_split_pickles_without_its_files(tmp_path):
    documents = some_documents([5, 6, 7])
    for layout in store.LAYOUTS:
        split = make(tmp_path / layout, documents, layout=layout).split("train")
        before = len(pickle.dumps(split))
        split.tokens(0, 10)
        split.document_ids(0, 10)
        assert len(pickle.dumps(split)) == before
        copy = pickle.loads(pickle.dumps(split))  # noqa: S301  (our own bytes)
        assert copy.tokens(0, copy.num_tokens).tolist() == split.tokens(0, split.num_tokens).tolist()


@pytest.mark.parametrize("layout", store.LAYOUTS)
def test_urls_are_read_by_range(tmp_path, layout, monkeypatch):
    monkeypatch.setattr(store_files, "BLOCK_BYTES", 16)
    documents = [(name, body, 3 * (name[-1] == "2"), name[-1] == "3") for name, body in some_documents([50, 0, 20, 31])]
    local = make(tmp_path / "x", documents, layout=layout)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "x"), f"/{layout}-test/tiny", recursive=True)
    remote = store.open_source(f"memory://{layout}-test/tiny")
    a, b = local.split("train"), remote.split("train")
    assert store.list_sources(f"memory://{layout}-test") == ["tiny"]
    for start, stop in ((0, 105), (7, 60), (50, 52), (105, 105)):
        assert a.tokens(start, stop).tolist() == b.tokens(start, stop).tolist()
        assert a.document_ends(start, stop).tolist() == b.document_ends(start, stop).tolist()
        assert a.document_ids(start, stop) == b.document_ids(start, stop)
        assert all(x.tolist() == y.tolist() for x, y in zip(a.extras(start, stop), b.extras(start, stop), strict=True))
    assert b.extras(50, 72).prompts.tolist() == [0, 0, 3]
    store.verify(remote)


def test_a_remote_read_fetches_only_the_blocks_it_needs(tmp_path, monkeypatch):
    monkeypatch.setattr(store_files, "BLOCK_BYTES", 64)
    make(tmp_path / "x", [("a", [5] * 5000)])
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / "x"), "/range-test/tiny", recursive=True)
    fetched = []
    read = type(memory).cat_file
    monkeypatch.setattr(type(memory), "cat_file", lambda self, path, start=None, end=None, **kw: (
        fetched.append((start, end)), read(self, path, start=start, end=end, **kw))[1])
    split = store.open_source("memory://range-test/tiny").split("train")
    fetched.clear()
    assert split.tokens(1000, 1020).tolist() == [5] * 20
    assert fetched == [(1984, 2048)]
    split.tokens(1000, 1020)
    assert len(fetched) == 1


def test_verify_names_the_file_that_differs(tmp_path):
    source = make(tmp_path, some_documents([5, 6]))
    store.verify(source)
    path = tmp_path / source.split("train").shards[0].tokens
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=path.name):
        store.verify(source)


def edit_manifest(folder, change):
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def test_bad_stores_are_refused_in_one_line(tmp_path):
    good = tmp_path / "store" / "good"
    make(good, some_documents([5, 6, 7]))

    def broken(name, action):
        folder = tmp_path / "store" / name
        shutil.copytree(good, folder)
        action(folder)
        with pytest.raises(InputError) as caught:
            store.open_source(str(folder))
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)
        return str(caught.value)

    first = "train-00000-of-00002.tokens"
    assert "truncated" in broken("a", lambda f: os.truncate(f / first, 3))
    assert "missing" in broken("b", lambda f: os.remove(f / first))
    assert "version 3" in broken("c", lambda f: edit_manifest(f, lambda m: m.update(version=3)))
    assert "not a token store" in broken("d", lambda f: edit_manifest(f, lambda m: m.update(format="other")))
    assert "not JSON" in broken("e", lambda f: os.truncate(f / "manifest.json", 100))
    assert "damaged" in broken("f", lambda f: edit_manifest(f, lambda m: m.pop("dtype")))
    assert "damaged" in broken("g", lambda f: edit_manifest(f, lambda m: m["splits"]["train"].update(tokens=99)))
    assert "damaged" in broken("h", lambda f: edit_manifest(
        f, lambda m: m["splits"]["train"]["shards"][0].update(tokens="../good/" + first)))
    assert "not a token store" in broken("i", lambda f: os.remove(f / "manifest.json"))
    assert "longer" in broken("j", lambda f: (f / first).write_bytes(bytes(100)))
    with pytest.raises(InputError, match="no such folder"):
        store.open_source(str(tmp_path / "nowhere"))
    with pytest.raises(InputError, match="its sources are .*good"):
        store.open_source(str(tmp_path / "store"))


def test_a_foreign_document_index_is_refused(tmp_path):
    split = make(tmp_path, some_documents([5, 6])).split("train")
    path = tmp_path / split.shards[0].documents
    path.write_bytes(b"X" + path.read_bytes()[1:])
    with pytest.raises(InputError, match="document index"):
        split.document_ends(0, 5)


def test_version_1_stays_readable():
    source = store.open_source(os.path.join(FIXTURES, "store_v1", "tiny"))
    store.verify(source)
    train, validation = source.split("train"), source.split("validation")
    assert (source.name, source.dtype, source.vocab_size, source.eod_id) == ("tiny", "uint16", 300, 2)
    assert (train.num_tokens, train.num_documents, validation.num_documents) == (13, 3, 1)
    assert train.tokens(0, 13).tolist() == [10, 11, 12, 2, 20, 21, 2, 299, 298, 297, 296, 295, 2]
    assert train.document_ends(0, 13).tolist() == [4, 7]
    assert train.document_ids(4, 8) == ["b/zwei", "c/三"]
    assert validation.tokens(0, 2).tolist() == [30, 2]
    assert not train.has_extras and source.packing is None and source.alignment == 1
    begins, prompts, joined = train.extras(4, 8)
    assert (begins.tolist(), prompts.tolist(), joined.tolist()) == ([4, 7], [0, 0], [False, False])


def test_version_2_stays_readable():
    source = store.open_source(os.path.join(FIXTURES, "store_v2", "tiny"))
    store.verify(source)
    train, validation = source.split("train"), source.split("validation")
    assert source.packing == {"kind": "best_fit", "seq_len": 8} and source.alignment == 8
    assert train.tokens(0, 33).tolist() == [10, 11, 12, 2, 2, 2, 2, 2, 20, 21, 2, 22, 23, 24, 2, 2,
                                            299, 298, 297, 296, 295, 294, 293, 292, 291, 2, 2, 2, 2, 2, 2, 2, 2]
    assert train.document_ids(0, 33) == ["a/eins", "b/zwei", "b/zwei#2", "c/三"]
    begins, prompts, joined = train.extras(0, 33)
    assert begins.tolist() == [0, 4, 8, 11, 15, 16, 26, 32] and prompts.tolist() == [1, 4, 2, 0, 1, 1, 6, 1]
    assert np.flatnonzero(joined).tolist() == [3]
    assert validation.extras(0, 3).prompts.tolist() == [1] and not validation.packed


@hypothesis.given(shapes=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), min_size=1, max_size=12),
                  shard_documents=st.integers(1, 5), a=st.integers(0, 120), b=st.integers(0, 120))
@hypothesis.settings(max_examples=40, deadline=None)
def test_extras_of_any_range(tmp_path_factory, shapes, shard_documents, a, b):
    folder = tmp_path_factory.mktemp("s")
    documents = [(f"d{i}", [5] * n, min(prompt, n + 1), joined) for i, (n, prompt, joined) in enumerate(shapes)]
    split = make(folder, documents, shard_documents=shard_documents).split("train")
    used = any(prompt or joined for _, _, prompt, joined in documents)
    assert split.has_extras == used and (folder / "manifest.json").read_text().count('"version": 2') == used
    ends = np.cumsum([n + 1 for n, _, _ in shapes])
    start, stop = sorted((a % (ends[-1] + 1), b % (ends[-1] + 1)))
    expected = [(int(end - n - 1), prompt, joined) for (n, _, _), (_, _, prompt, joined), end
                in zip(shapes, documents, ends, strict=True) if end > start and end - n - 1 < stop and start < stop]
    begins, prompts, joined = split.extras(start, stop)
    assert list(zip(begins.tolist(), prompts.tolist(), joined.tolist(), strict=True)) == expected
    assert (begins.dtype, prompts.dtype, joined.dtype) == (np.int64, np.int64, np.bool_)


def test_a_prompt_longer_than_its_document_is_refused(tmp_path):
    for prompt in (-1, 4):
        with pytest.raises(ValueError, match="document 'a' of 3 tokens cannot have a prompt of"):
            make(tmp_path, [("a", [5, 6], prompt)])


def test_damaged_extras_are_refused(tmp_path):
    def made(name, change):
        documents = [("a", [5, 6], 2), ("b", [7])]
        make(tmp_path / name, documents)
        file = "train-00000-of-00001.extras"
        assert (tmp_path / name / file).read_bytes() == bytes([2, 0, 0, 0, 0, 0, 0, 0])
        change(tmp_path / name, tmp_path / name / file)
        with pytest.raises(InputError, match=file if name != "d" else "damaged") as caught:
            store.verify(store.open_source(str(tmp_path / name)))
        return str(caught.value)

    def shard(manifest):
        return manifest["splits"]["train"]["shards"][0]

    assert "missing" in made("a", lambda folder, file: file.unlink())
    assert "truncated" in made("b", lambda folder, file: os.truncate(file, 4))
    assert "content differs" in made("c", lambda folder, file: file.write_bytes(bytes(8)))
    made("d", lambda folder, file: edit_manifest(folder, lambda m: shard(m)["size"].update({file.name: 4})))
    assert "damaged" in made("e", lambda folder, file: edit_manifest(
        folder, lambda m: shard(m).update(extras="../" + file.name)))


def test_a_packed_store_says_how(tmp_path):
    make(tmp_path / "x", [("a", [5, 6])])
    edit_manifest(tmp_path / "x", lambda m: m.update(packing={"kind": "other", "seq_len": 3}))
    with pytest.raises(InputError, match="packing"):
        store.open_source(str(tmp_path / "x"))
