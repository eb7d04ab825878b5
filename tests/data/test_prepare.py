from __future__ import annotations

import dataclasses
import errno
import gzip
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest

from neo import config
from neo.cli import invoke
from neo.data import held_out, preparation, prepare, shuffle, spill, store, tokenizer_training
from neo.data.documents import ReadOptions
from neo.data.preparation import Request
from neo.data.store_writer import write_source
from neo.data.tokenizer import Tokenizer
from neo.errors import InputError, StoppedForPerson

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    words = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "runs", "home", "again", "0123456789"]
    return tokenizer_training.train((" ".join(random.Random(i).choices(words, k=20)) for i in range(200)), 300)


def write_inputs(folder, documents=120):
    """A folder with every kind of input, awkward records included."""
    rng = random.Random(0)
    words = ["the", "quick", "brown", "fox", "jumps", "over", "naïve", "狐狸", "\n", "  ", "1984"]

    def text():
        return "a " + " ".join(rng.choices(words, k=rng.randrange(1, 60)))

    os.makedirs(folder / "sub")
    for i in range(documents // 3):
        (folder / ("sub" if i % 2 else "") / f"t{i}.txt").write_text(text())
    (folder / "bad.txt").write_bytes(b"caf\xe9 text")
    (folder / "empty.txt").write_text("")
    with open(folder / "a.jsonl", "w") as file:
        for i in range(documents // 3):
            file.write(json.dumps({"text": text(), "id": f"k{i % 30}"}) + "\n" + ("broken\n" if i % 10 == 0 else ""))
    with gzip.open(folder / "b.jsonl.gz", "wt") as file:
        for _ in range(documents // 3):
            file.write(json.dumps({"text": text()}) + "\n")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("inputs") / "corpus"
    path.mkdir()
    write_inputs(path)
    return path


def request(folder, out, tokenizer, **changes) -> Request:
    # Small buckets and pieces, so that there are several of each.
    base = Request((str(folder),), str(out), "web", tokenizer, ReadOptions(id_field="id"), 0.1, seed=3, workers=1,
                   bucket_bytes=4000, piece_bytes=2000)
    return dataclasses.replace(base, **changes)


def digests(folder) -> dict[str, str]:
    found = {}
    for base, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(base, name)
            with open(path, "rb") as file:
                found[os.path.relpath(path, folder)] = hashlib.sha256(file.read()).hexdigest()
    return found


@pytest.fixture(scope="module")
def expected(folder, tokenizer, tmp_path_factory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("expected")
    preparation.prepare(request(folder, out, tokenizer))
    return digests(out)


@pytest.mark.parametrize("changes", [
    dict(workers=2), dict(workers=3, piece_bytes=300), dict(piece_bytes=1 << 30), dict(workers=2, piece_bytes=5001)])
def test_output_is_the_same_for_any_number_of_workers_and_cut(folder, tokenizer, tmp_path, expected, changes):
    assert len(expected) > 8, "several buckets"
    preparation.prepare(request(folder, tmp_path, tokenizer, **changes))
    assert digests(tmp_path) == expected


def test_output_does_not_depend_on_memory_or_place(folder, tokenizer, tmp_path, expected, monkeypatch):
    monkeypatch.setattr(spill, "RUN_BYTES", 500)
    shutil.copytree(folder, tmp_path / "elsewhere" / "copy")
    preparation.prepare(request(tmp_path / "elsewhere" / "copy", tmp_path / "out", tokenizer))
    assert digests(tmp_path / "out") == expected


def test_content_is_every_document_once_on_its_side(folder, tokenizer, tmp_path):
    manifest, there = preparation.prepare(request(folder, tmp_path, tokenizer))
    assert not there
    source = store.open_source(str(tmp_path / "web"))
    store.verify(source)
    corpus = tokenizer_training.Corpus((str(folder),), ReadOptions(id_field="id"))
    documents = list(tokenizer_training.read_documents(corpus.find()[0], corpus.options, []))
    found = {}
    for name, split in source.splits.items():
        ends = [0, *split.document_ends(0, split.num_tokens).tolist(), split.num_tokens]
        ids = split.document_ids(0, split.num_tokens)
        assert len(ids) == split.num_documents == len(ends) - 1
        for document_id, start, stop in zip(ids, ends, ends[1:], strict=False):
            tokens = split.tokens(start, stop).tolist()
            assert tokens[-1] == tokenizer.eod_id
            found[document_id] = (name, tokenizer.decode(tokens[:-1]))
    seen: dict[str, int] = {}
    for document in documents:
        seen[document.id] = seen.get(document.id, 0) + 1
        name = document.id if seen[document.id] == 1 else f"{document.id}#{seen[document.id]}"
        side = "validation" if held_out.position(document.id) < held_out.limit(0.1) else "train"
        assert found.pop(name) == (side, document.text)
    assert not found
    assert sum(len(d.text.encode()) for d in documents) == sum(s.num_bytes for s in source.splits.values())
    train = manifest["splits"]["train"]
    assert train["documents"] + manifest["splits"]["validation"]["documents"] == len(documents)
    assert manifest["prepare"]["skipped"] == {"empty": {"documents": 1, "first": "empty.txt"},
                                              "not JSON": {"documents": 4, "first": "a.jsonl:2"}}
    assert manifest["prepare"]["repaired"]["repeated id, #2, #3, ... appended"]["documents"] == 10


def test_the_order_is_a_shuffle_that_depends_on_the_seed_and_the_split_does_not(folder, tokenizer, tmp_path):
    orders, held = [], []
    for seed in (0, 1):
        preparation.prepare(request(folder, tmp_path / str(seed), tokenizer, seed=seed))
        source = store.open_source(str(tmp_path / str(seed) / "web"))
        orders.append([split.document_ids(0, split.num_tokens) for split in source.splits.values()])
        held.append(set(orders[-1][1]))
    assert orders[0][0] != orders[1][0] and sorted(orders[0][0]) == sorted(orders[1][0])
    assert sorted(orders[0][0]) != orders[0][0]
    assert held[0] == held[1]


@pytest.mark.parametrize("count, validation, train, held", [(1, 0.001, 1, 0), (2, 0.001, 1, 1), (5, 0.001, 4, 1),
                                                            (5, 0.0, 5, 0), (3, 0.9999999, 1, 2)])
def test_small_sources_have_both_sides(tokenizer, tmp_path, count, validation, train, held):
    (tmp_path / "in").mkdir()
    for i in range(count):
        (tmp_path / "in" / f"{i}.txt").write_text(f"document {i}")
    manifest, _ = preparation.prepare(request(tmp_path / "in", tmp_path / "out", tokenizer, validation=validation))
    assert (manifest["splits"]["train"]["documents"], manifest["splits"]["validation"]["documents"]) == (train, held)


def test_array_record_layout_has_the_same_tokens(folder, tokenizer, tmp_path):
    for layout in store.LAYOUTS:
        preparation.prepare(request(folder, tmp_path / layout, tokenizer, layout=layout))
    flat, records = (store.open_source(str(tmp_path / layout / "web")) for layout in store.LAYOUTS)
    store.verify(records)
    for name, split in flat.splits.items():
        other = records.split(name)
        assert split.tokens(0, split.num_tokens).tolist() == other.tokens(0, other.num_tokens).tolist()
        assert split.document_ids(0, split.num_tokens) == other.document_ids(0, other.num_tokens)
    preparation.prepare(request(folder, tmp_path / "again", tokenizer, layout="array_record", workers=2))
    assert digests(tmp_path / "again") == digests(tmp_path / "array_record")


# Interruption


class Killed(BaseException):
    pass


@pytest.mark.parametrize("stage", ["tokenize_piece", "write_bucket"])
@pytest.mark.parametrize("after", [0, 3])
def test_finished_work_is_not_done_again(folder, tokenizer, tmp_path, expected, monkeypatch, stage, after):
    real, calls = getattr(shuffle, stage), []

    def dies(settings, task):
        calls.append(task)
        if len(calls) > after:
            raise Killed
        return real(settings, task)

    monkeypatch.setattr(shuffle, stage, dies)
    with pytest.raises(Killed):
        preparation.prepare(request(folder, tmp_path, tokenizer))
    with pytest.raises(InputError, match="has not finished"):
        store.open_source(str(tmp_path / "web"))
    done = list(calls)[:after]
    calls.clear()
    monkeypatch.setattr(shuffle, stage, lambda settings, task: (calls.append(task), real(settings, task))[1])
    preparation.prepare(request(folder, tmp_path, tokenizer))
    assert digests(tmp_path) == expected
    assert calls and not set(map(str, done)) & set(map(str, calls))


DRIVER = """
import sys, time, pickle
from neo.data import preparation, workers
if __name__ == "__main__":
    preparation.prepare(pickle.load(open(sys.argv[1], "rb")))
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_process_is_continued(tokenizer, tmp_path, number):
    import pickle

    (tmp_path / "in").mkdir()
    rng = random.Random(1)
    for i in range(12):
        lines = "\n".join(json.dumps({"text": " ".join(rng.choices(["fox", "dog", "runs", "naïve"], k=400))})
                          for _ in range(150))
        (tmp_path / "in" / f"{i:02d}.jsonl").write_text(lines)
    job = request(tmp_path / "in", tmp_path / "out", tokenizer, workers=2, piece_bytes=100_000, bucket_bytes=500_000)
    (tmp_path / "job").write_bytes(pickle.dumps(job))
    (tmp_path / "driver.py").write_text(DRIVER)
    process = subprocess.Popen([sys.executable, str(tmp_path / "driver.py"), str(tmp_path / "job")], cwd=ROOT,
                               env={**os.environ, "PYTHONPATH": ROOT}, stderr=subprocess.PIPE, start_new_session=True)
    work = tmp_path / "out" / "web" / ".work"
    deadline = time.monotonic() + 60
    while not list(work.glob("*.spill")):
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)  # to the parent alone: its workers must not outlive it for long
    process.wait()
    process.stderr.close()
    assert process.returncode != 0
    assert not (tmp_path / "out" / "web" / "manifest.json").exists()
    while _group_is_alive(process.pid):
        assert time.monotonic() < deadline, "the workers outlived their parent"
        time.sleep(0.05)
    preparation.prepare(job)
    preparation.prepare(dataclasses.replace(job, store=str(tmp_path / "fresh"), workers=1))
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


def _group_is_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
        return True
    except ProcessLookupError:
        return False


def test_a_full_disk_stops_with_the_work_kept(folder, tokenizer, tmp_path, expected, monkeypatch):
    real = spill.SpillWriter.close
    calls = []

    def full(self, summary):
        calls.append(1)
        if len(calls) > 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, summary)

    monkeypatch.setattr(spill.SpillWriter, "close", full)
    with pytest.raises(StoppedForPerson, match="disk is full"):
        preparation.prepare(request(folder, tmp_path, tokenizer))
    monkeypatch.setattr(spill.SpillWriter, "close", real)
    preparation.prepare(request(folder, tmp_path, tokenizer))
    assert digests(tmp_path) == expected


def test_half_written_files_of_a_killed_run_are_removed_first(folder, tokenizer, tmp_path, expected, monkeypatch):
    work = tmp_path / "web" / ".work"
    work.mkdir(parents=True)
    left = [tmp_path / "web" / "train-00000-of-00009.tokens.123.tmp", work / "0123.spill.123.tmp"]
    for path in left:
        path.write_bytes(bytes(1000))
    (work / "arguments.json").write_text(json.dumps(request(folder, tmp_path, tokenizer).arguments))
    real = shuffle.tokenize_piece
    monkeypatch.setattr(shuffle, "tokenize_piece", lambda *task: (
        [pytest.fail(f"{path} is still there") for path in left if path.exists()], real(*task))[1])
    preparation.prepare(request(folder, tmp_path, tokenizer))
    assert digests(tmp_path) == expected


def test_an_unfinished_output_takes_in_changed_inputs(folder, tokenizer, tmp_path, monkeypatch):
    shutil.copytree(folder, tmp_path / "in")
    real = shuffle.write_bucket
    monkeypatch.setattr(shuffle, "write_bucket", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        preparation.prepare(request(tmp_path / "in", tmp_path / "out", tokenizer))
    monkeypatch.setattr(shuffle, "write_bucket", real)
    (tmp_path / "in" / "t0.txt").write_text("something quite different")
    preparation.prepare(request(tmp_path / "in", tmp_path / "out", tokenizer))
    preparation.prepare(request(tmp_path / "in", tmp_path / "fresh", tokenizer))
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


# Existing outputs


def test_a_finished_output_is_left_and_others_are_refused(folder, tokenizer, tmp_path, expected):
    shutil.copytree(folder, tmp_path / "in")
    job = request(tmp_path / "in", tmp_path / "out", tokenizer)
    preparation.prepare(job)
    before = os.stat(tmp_path / "out" / "web" / "manifest.json").st_mtime_ns
    assert preparation.prepare(dataclasses.replace(job, workers=2, overwrite=True))[1]
    assert os.stat(tmp_path / "out" / "web" / "manifest.json").st_mtime_ns == before
    with pytest.raises(InputError, match="seed: 3 there, 4 now"):
        preparation.prepare(dataclasses.replace(job, seed=4))
    (tmp_path / "in" / "new.txt").write_text("more")
    with pytest.raises(InputError, match="names or sizes differ"):
        preparation.prepare(job)
    os.remove(tmp_path / "in" / "new.txt")
    path = tmp_path / "in" / "t0.txt"
    path.write_text("x" * path.stat().st_size)
    with pytest.raises(InputError, match="t0.txt was changed"):
        preparation.prepare(job)
    preparation.prepare(dataclasses.replace(job, overwrite=True))
    changed = digests(tmp_path / "out")
    assert set(changed) == set(expected) and changed != expected


def test_a_truncated_finished_output_is_not_called_finished(folder, tokenizer, tmp_path):
    preparation.prepare(request(folder, tmp_path, tokenizer))
    shard = next((tmp_path / "web").glob("train-*.tokens"))
    os.truncate(shard, 1)
    with pytest.raises(InputError, match="truncated"):
        preparation.prepare(request(folder, tmp_path, tokenizer))


def test_foreign_folders_are_never_touched(folder, tokenizer, tmp_path):
    (tmp_path / "web").mkdir()
    (tmp_path / "web" / "precious").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(InputError, match="not written by"):
            preparation.prepare(request(folder, tmp_path, tokenizer, overwrite=overwrite))
    assert (tmp_path / "web" / "precious").read_text() == "x" and os.listdir(tmp_path) == ["web"]


def test_a_store_has_one_tokenizer(folder, tokenizer, tmp_path):
    preparation.prepare(request(folder, tmp_path, tokenizer))
    other = dataclasses.replace(tokenizer, extra_tokens=("<x>",))
    with pytest.raises(InputError, match="one tokenizer"):
        preparation.prepare(request(folder, tmp_path, other, source="second"))
    preparation.prepare(request(folder, tmp_path, tokenizer, source="second"))
    assert store.list_sources(str(tmp_path)) == ["second", "web"]


def test_two_processes_do_not_write_the_same_source(folder, tokenizer, tmp_path):
    job = request(folder, tmp_path, tokenizer)
    work = tmp_path / "web" / ".work"
    work.mkdir(parents=True)
    with preparation._lock(str(work)), pytest.raises(InputError, match="another process"):
        preparation.prepare(job)
    preparation.prepare(job)


def test_unreadable_inputs_are_listed_and_tried_again(folder, tokenizer, tmp_path):
    shutil.copytree(folder, tmp_path / "in")
    good = (tmp_path / "in" / "b.jsonl.gz").read_bytes()
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(good[:-10])
    job = request(tmp_path / "in", tmp_path / "out", tokenizer, bucket_bytes=1 << 20)
    manifest, _ = preparation.prepare(job)
    [problem] = manifest["prepare"]["unreadable"]
    assert problem.startswith("b.jsonl.gz: ")
    split = store.open_source(str(tmp_path / "out" / "web")).split("train")
    assert not any(name.startswith("b.jsonl.gz") for name in split.document_ids(0, split.num_tokens))
    with pytest.raises(StoppedForPerson, match="1 inputs could not be read"):
        prepare.finish(str(tmp_path / "out"), [(manifest, False)])
    (tmp_path / "in" / "b.jsonl.gz").write_bytes(good)
    manifest, there = preparation.prepare(job)
    assert not there and not manifest["prepare"]["unreadable"]
    preparation.prepare(dataclasses.replace(job, store=str(tmp_path / "fresh")))
    assert digests(tmp_path / "out") == digests(tmp_path / "fresh")


# The command


def command(capsys, *argv):
    code = invoke(prepare.COMMAND, prepare.run, [str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_the_command_ends_with_table_config_lines_and_next_step(folder, tokenizer, tmp_path, capsys):
    tokenizer.save(str(tmp_path / "store" / "tokenizer"))
    arguments = (folder, f"--out={tmp_path / 'store'}", "--source=web", "--validation=0.1", "--workers=1")
    code, out, err = command(capsys, *arguments)
    assert code == 0 and "Traceback" not in err
    rows = [line.split() for line in out.splitlines()]
    assert ["source", "documents", "tokens", "bytes/token", "validation", "skipped"] in rows
    assert f"c.data.store = {str(tmp_path / 'store')!r}" in out and "mixture={'web': 1.0}" in out
    assert "c.model.vocab_size = 384   # at least 300" in out
    assert out.splitlines()[-1] == (
        f"Next: python -m neo.train --config=neo_demo --workdir=runs/store --config.data.store={tmp_path / 'store'} "
        "--config.phases.main.mixture=web=1 --config.data.max_epochs=0")
    assert "skipped 4: not JSON (first: a.jsonl:2)" in out
    code, again, err = command(capsys, *arguments)
    assert code == 0 and again.startswith(f"{tmp_path / 'store' / 'web'} is finished already")
    # A second source takes the store's tokenizer, and the lines are about the whole store.
    code, out, _ = command(capsys, folder / "a.jsonl", f"--out={tmp_path / 'store'}", "--source=more")
    assert code == 0 and "mixture={'more': 0." in out and "'web': 0." in out.split("mixture=")[1]


def test_a_large_vocabulary_is_part_of_the_command_to_try():
    assert prepare.try_command("data/my store", {"a": 0.25, "b": 0.75}, 5000) == (
        "python -m neo.train --config=neo_demo '--workdir=runs/my store' '--config.data.store=data/my store' "
        "--config.phases.main.mixture=a=0.25,b=0.75 --config.model.vocab_size=5120")
    demo = config.load("neo_demo")
    assert (demo.model.vocab_size, demo.model.max_seq_len) == (prepare.DEMO_VOCAB_SIZE, prepare.DEMO_MAX_SEQ_LEN)
    assert demo.phases[0].whole_tokens == prepare.DEMO_TOKENS


def test_the_command_to_try_allows_as_many_epochs_as_it_needs(tmp_path):
    """The demo's 1.2M tokens are many epochs of a small source: without the flag, training would refuse."""
    for name, tokens in (("large", 400_000), ("small", 5_000)):
        write_source(str(tmp_path / name), name, {"train": [("d", [5] * tokens)]}, vocab_size=10, eod_id=3,
                     tokenizer_sha256="f" * 64)
    assert "max_epochs" not in prepare.try_command(str(tmp_path), {"large": 1.0}, 10)
    for weights in ({"small": 1.0}, {"large": 0.9, "small": 0.1}):
        assert prepare.try_command(str(tmp_path), weights, 10).endswith(" --config.data.max_epochs=0")
    assert "max_epochs" not in prepare.try_command(str(tmp_path), {"large": 0.99, "small": 0.01}, 10)


def test_wrong_command_lines_are_one_line_and_write_nothing(folder, tokenizer, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer.save("tok")
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "a.txt").write_text(" \n")
    (tmp_path / "void" / "b.jsonl").write_text('{"content": "x"}\n')
    good = ["--out=out", "--source=web", "--tokenizer=tok"]
    cases = {
        ("--out=out", "--source=web", "--tokenizer=tok"): "INPUT is missing",
        (folder, "--source=web", "--tokenizer=tok"): "--out is missing",
        (folder, "--out=out", "--tokenizer=tok"): "--source is missing",
        (folder, "--out=out", "--source=web"): "--tokenizer is missing",
        (folder, "--out=out", "--source=web", "--tokenizer=nowhere"): "no such tokenizer",
        (folder, "--out=out", "--source=web", f"--tokenizer={folder}"): "no tokenizer.model in it",
        (folder, "--out=out", "--source=a/b", "--tokenizer=tok"): "--source=a/b",
        (folder, "--out=gs://b/x", "--source=web", "--tokenizer=tok"): "local folder",
        ("nowhere", *good): "nowhere: no such file",
        (folder, *good, "--validation=1"): "0 <= share < 1",
        (folder, *good, "--workers=-1"): "--workers=-1",
        (folder, *good, "--seed=-1"): "--seed=-1",
        (folder, *good, "--on_bad_text=ignore"): "replace, skip",
        (folder, *good, "--worker=2"): "did you mean '--workers'",
        (folder, *good, "--demo"): "leave out input, source, tokenizer",
        ("void", *good): "empty corpus: no document in void: 1 empty (first: a.txt); 1 no field 'text' (first: "
                         "b.jsonl:1 (fields: content))",
    }
    for argv, message in cases.items():
        code, out, err = command(capsys, *argv)
        errors = [line for line in err.splitlines() if "error:" in line]
        assert (code, len(errors)) == (2, 1) and message in errors[0] and not out, (argv, err)
        assert not os.path.exists("out"), argv
