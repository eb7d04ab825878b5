"""The ledger against brute force: which documents a step saw, and which steps saw a document."""

from __future__ import annotations

import collections
import dataclasses
import json

import numpy as np
import pytest

from neo.config import to_dict
from neo.config.schema import Config, DataConfig, ModelConfig, PhaseConfig
from neo.data import amendments, store
from neo.data.amendments import Amendment
from neo.data.ledger import Ledger
from neo.data.loader import TrainData, open_sources
from neo.data.store_writer import write_source
from neo.data.synthetic import synthetic_source
from neo.data.trace import COMMAND, run
from neo.errors import InputError

VOCAB, EOD, SHA = 60_000, 3, "f" * 64
PHASES = (PhaseConfig(name="one", tokens=12 * 4 * 20, seq_len=12, global_batch=4, mixture={"a": 2.0, "b": 1.0}),
          PhaseConfig(name="two", tokens=20 * 6 * 8, seq_len=20, global_batch=6, mixture={"b": 1.0, "c": 1.0}))


def documents(name):
    """(id, tokens) of a source: no token twice, so that a token tells its place."""
    rng = np.random.default_rng(ord(name))
    first = {"a": 10, "b": 20_000, "c": 40_000}[name]
    found = []
    for i in range(16):
        length = int(rng.integers(1, 30)) if i % 5 else 1
        found.append((f"{name}/{i}" if i % 2 else f"{name}-{i}", list(range(first, first + length))))
        first += length
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    for name in "abc":
        write_source(str(folder / name), name, {"train": documents(name), "validation": [("held", [7, 8])]}, vocab_size=VOCAB,
                     eod_id=EOD, tokenizer_sha256=SHA, shard_documents=7)
    return folder


def write_run(workdir, config, data, step=None):
    """What a run leaves behind, as far as the ledger reads it."""
    (workdir / "metrics").mkdir(parents=True)
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    if data.amendments:
        (workdir / amendments.FILE).write_text(json.dumps(amendments.to_json(data.amendments)))
    if step is not None:
        (workdir / "checkpoints" / str(step) / "data").mkdir(parents=True)
        (workdir / "checkpoints" / str(step) / "data" / "data.json").write_text(json.dumps({"order": data.state(step)}))


@pytest.fixture(scope="module")
def ran(folder, tmp_path_factory):
    """(TrainData, Ledger) of a run of 28 steps over three sources, several epochs, with two amendments, 13 steps done."""
    config = Config(name="tiny", model=ModelConfig(vocab_size=VOCAB), phases=PHASES,
                    data=DataConfig(store=str(folder), max_epochs=0))
    data = TrainData(config, open_sources(config))
    data.amend(Amendment(5, data.order.first_index(5), "one", {"a": 0.1, "b": 0.9}, amendments.BY_REWEIGHTING))
    data.amend(Amendment(9, data.order.first_index(9), "one", {"a": 0.8, "b": 0.2}, amendments.BY_REWEIGHTING))
    workdir = tmp_path_factory.mktemp("run")
    write_run(workdir, config, data, step=10)
    (workdir / "events.jsonl").write_text('{"event": "start", "step": 0}\n{"event": "save", "step": 10}\n')
    (workdir / "metrics" / "0.jsonl").write_text('{"start": "x", "first_step": 0}\n{"step": 12}\n{"step": 13}\n{"step": 1')
    return data, Ledger.of(str(workdir))


def by_tokens(data):
    """(step, row) -> [(source, id, first, last, place)], by looking each row's tokens up in the documents' own."""
    texts = {name: [token for _, tokens in documents(name) for token in (*tokens, EOD)] for name in "abc"}
    at = {token: (name, i) for name, text in texts.items() for i, token in enumerate(text) if token != EOD}
    owner = {name: [(i, k) for i, (_, tokens) in enumerate(documents(name)) for k in range(len(tokens) + 1)] for name in "abc"}
    found = {}
    for step in range(data.order.num_steps):
        batch = data.host_batch(step)
        for row, (inputs, targets) in enumerate(zip(batch["inputs"], batch["targets"], strict=True)):
            window = [*inputs.tolist(), int(targets[-1])]
            known = next(i for i, token in enumerate(window) if token != EOD)
            name, place = at[window[known]]
            start = place - known
            assert window == texts[name][start:start + len(window)]
            parts = collections.defaultdict(list)
            for place, (i, k) in enumerate(owner[name][start:start + len(window)]):
                parts[i].append((k, place))
            found[step + 1, row] = [(name, documents(name)[i][0], held[0][0], held[-1][0] + 1, held[0][1])
                                    for i, held in parts.items()]
    return found


def test_every_row_is_what_brute_force_finds(ran):
    data, ledger = ran
    expected = by_tokens(data)
    got = {(row.step, row.row): [(row.address.source, part.document, part.first, part.last, part.place) for part in row.parts]
           for step in range(1, data.order.num_steps + 1) for row in ledger.batch(step)}
    assert got == expected
    lengths = {(name, one): len(tokens) + 1 for name in "abc" for one, tokens in documents(name)}
    assert all(part.tokens == lengths[row.address.source, part.document] for row in ledger.batch(3) for part in row.parts)
    assert max(ledger.order.address(i).epoch for i in range(ledger.order.num_sequences)) >= 2, "the test has several epochs"


def test_every_document_is_seen_where_brute_force_finds_it(ran):
    data, ledger = ran
    expected = collections.defaultdict(list)
    for (step, row), parts in by_tokens(data).items():
        for name, document, *span in parts:
            expected[name, document].append((step, row, *span))
    for name in "abc":
        for document, _ in documents(name):
            seen = ledger.document(name, document)
            assert [(s.step, s.row, s.part.first, s.part.last, s.part.place) for s in seen] == sorted(expected[name, document])
            assert all(ledger.order.address(s.index).epoch == s.epoch for s in seen)


def test_finding(ran):
    _, ledger = ran
    assert [one[:2] for one in ledger.find("a/1")] == [("a", "a/1")], "an id with a slash, though a source is called a"
    assert ledger.find("a/a/1") == ledger.find("a/1")
    assert [one.source for one in ledger.find("b-0")] == ["b"]
    assert ledger.document("a", "nothing") == []
    for name, message in (("a/held", r"^document 'held' of source 'a' is held out: no step trains on it$"),
                          ("b-00", r"^no source of the run has a document 'b-00' \(did you mean 'b/b-0'\?\); the first one is"),
                          ("", "has a document ''")):
        with pytest.raises(InputError, match=message):
            ledger.find(name)


def test_ids_of_equal_length_and_across_pieces(tmp_path, monkeypatch):
    """Ids that are parts of each other, empty search pieces, not ASCII, and one that stands twice."""
    monkeypatch.setattr(store, "SEARCHED_IDS", 5)
    ids = ["x", "xx", "xxx", "yx", "xy", "é", "日本", "twice", "x" * 300, "zz", "twice", *(f"n{i:03}" for i in range(40))]
    write_source(str(tmp_path / "s"), "s", {"train": [(one, [5] * (i + 1)) for i, one in enumerate(ids)], "validation": []},
                 vocab_size=VOCAB, eod_id=EOD, tokenizer_sha256=SHA, shard_documents=17)
    split = store.open_source(str(tmp_path / "s")).split("train")
    ends = np.cumsum([i + 2 for i in range(len(ids))]).tolist()
    for one in ids:
        assert split.find_id(one) == [(([0, *ends])[i], ends[i]) for i, other in enumerate(ids) if other == one]
    for missing in ("", "X", "xxxx", "n040", "n00", "日", "twic"):
        assert split.find_id(missing) == []


def test_steps_done_are_those_of_the_newest_start(ran, tmp_path):
    data, ledger = ran
    assert ledger.steps_done == 13
    write_run(tmp_path / "run", data.config, data, step=4)
    (tmp_path / "run" / "events.jsonl").write_text('{"event": "start", "step": 0}\n{"event": "resume", "step": 4}\n{"event"')
    (tmp_path / "run" / "metrics" / "0.jsonl").write_text('{"step": 9}\n')   # of the start that was killed
    (tmp_path / "run" / "metrics" / "4.jsonl").write_text('{"step": 6}\n')
    assert Ledger.of(tmp_path / "run").steps_done == 6


def test_a_mixture_amended_by_hand(folder, tmp_path):
    """config.json has the new weights; the first steps had those of the checkpoint."""
    config = Config(name="tiny", model=ModelConfig(vocab_size=VOCAB), phases=PHASES,
                    data=DataConfig(store=str(folder), max_epochs=0))
    before = TrainData(config, open_sources(config))
    one = dataclasses.replace(PHASES[0], mixture={"a": 1.0, "c": 3.0})
    changed = dataclasses.replace(config, phases=(one, PHASES[1]), data=dataclasses.replace(config.data, amend=True))
    after = TrainData(changed, open_sources(changed, ("b",)), before.state(6))
    write_run(tmp_path / "run", changed, after)
    (tmp_path / "run" / "checkpoints" / "6" / "data").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "6" / "data" / "data.json").write_text(json.dumps({"order": before.state(6)}))
    expected = by_tokens(after)
    ledger = Ledger.of(tmp_path / "run")
    for step in (1, 6, 7, 20, 28):
        for row in ledger.batch(step):
            assert [(row.address.source, *part[:3], part.place) for part in row.parts] == expected[step, row.row]
    assert expected[1, 0] == by_tokens(before)[1, 0] and expected != by_tokens(before)


def test_synthetic_tokens_have_documents_too(tmp_path):
    config = Config(name="burn", model=ModelConfig(vocab_size=100), data=DataConfig(synthetic=True), phases=PHASES)
    data = TrainData(config, open_sources(config))
    write_run(tmp_path / "run", config, data)
    ledger = Ledger.of(tmp_path / "run")
    assert ledger.steps_done == 0
    for row in ledger.batch(3):
        for part in row.parts:
            assert row.step in {seen.step for seen in ledger.document(row.address.source, part.document)}
    split = synthetic_source("a", vocab_size=9, seed=1).split("validation")
    everything = split.documents(0, split.num_tokens)
    assert everything[0][0] == 0 and everything[-1][1] == split.num_tokens
    assert [first for first, _, _ in everything[1:]] == [last for _, last, _ in everything[:-1]]
    assert all(split.find_id(name) == [(first, last)] for first, last, name in everything[::50] + everything[-1:])
    assert split.find_id("validation-01") == split.find_id("validation-1024") == split.find_id("train-1") == []


def test_a_packed_source_names_pieces_and_no_padding(tmp_path):
    rng = np.random.default_rng(5)
    texts = {f"d{i}": list(range(100 * i + 10, 100 * i + 10 + int(rng.integers(1, 40)))) for i in range(30)}
    write_source(str(tmp_path / "store" / "p"), "p", {"train": list(texts.items()), "validation": []}, vocab_size=VOCAB,
                 eod_id=EOD, tokenizer_sha256=SHA, shard_documents=11, pack=16)
    phases = (PhaseConfig(name="one", tokens=16 * 4 * 12, seq_len=16, global_batch=4, mixture={"p": 1.0}),)
    config = Config(name="tiny", model=ModelConfig(vocab_size=VOCAB), phases=phases,
                    data=DataConfig(store=str(tmp_path / "store"), max_epochs=0))
    data = TrainData(config, open_sources(config))
    write_run(tmp_path / "run", config, data)
    ledger = Ledger.of(tmp_path / "run")
    seen = collections.defaultdict(set)
    for step in range(1, 13):
        for row in ledger.batch(step):
            batch = data.host_batch(step - 1, rows=[row.row])
            window = [*batch["inputs"][0].tolist(), int(batch["targets"][0, -1])]
            named = {part.document for part in row.parts}
            assert {f"d{token // 100}" for token in window if token != EOD} <= named <= set(texts)
            for part in row.parts:
                piece = [token for token in window[part.place:part.place + part.last - part.first] if token != EOD]
                assert set(piece) <= set(texts[part.document])
                seen[part.document].add((row.step, row.row, part.place))
    for name in texts:
        assert {(one.step, one.row, one.part.place) for one in ledger.document("p", name)} == seen[name]


def test_a_workdir_behind_an_address(ran, tmp_path):
    fsspec = pytest.importorskip("fsspec")
    data, ledger = ran
    memory = fsspec.filesystem("memory")
    memory.put(ledger.workdir, "/ledger/run", recursive=True)
    try:
        remote = Ledger.of("memory://ledger/run")
        assert (remote.steps_done, list(remote.batch(7))) == (ledger.steps_done, list(ledger.batch(7)))
        with pytest.raises(InputError, match="^memory://ledger/none is not a run"):
            Ledger.of("memory://ledger/none")
    finally:
        memory.rm("/ledger", recursive=True)


@pytest.fixture
def real(store, tmp_path):
    """A workdir over the store with real text."""
    phases = (PhaseConfig(name="main", tokens=32 * 2 * 30, seq_len=32, global_batch=2, mixture={"a": 1.0, "b": 1.0}),)
    config = Config(name="tiny", model=ModelConfig(vocab_size=320), data=DataConfig(store=str(store)), phases=phases)
    data = TrainData(config, open_sources(config))
    write_run(tmp_path / "run", config, data, step=8)
    return tmp_path / "run", data


def test_command_shows_a_step(real, invoked):
    workdir, data = real
    ended = invoked(COMMAND, run, [workdir, "--step=2", "--json"])
    assert ended.code == 0
    told = json.loads(ended.out)
    assert (told["step"], told["phase"], told["planned"], len(told["rows"])) == (2, "main", False, 2)
    names = {f"{row['source']}/{part['document']}" for row in told["rows"] for part in row["documents"]}
    assert names == set(data.documents(1))
    full = json.loads(invoked(COMMAND, run, [workdir, "--step=2", "--row=1", "--json", "--full"]).out)["rows"]
    assert [row["row"] for row in full] == [1]
    tokenizer = Ledger.of(workdir).tokenizer
    batch = data.host_batch(1, rows=[1])
    window = [*batch["inputs"][0].tolist(), int(batch["targets"][0, -1])]
    for part in full[0]["documents"]:
        assert part["text"] == tokenizer.decode(window[part["place"]:part["place"] + part["last"] - part["first"]])
    plain = invoked(COMMAND, run, [workdir, "--step=9"])
    assert plain.code == 0 and "\x1b" not in plain.out
    assert plain.out.startswith("step 9 of 30, phase main: 2 sequences; planned: the run has done 8 steps\nrow 0  ")


def test_command_shows_a_document(real, invoked):
    workdir, _ = real
    ledger = Ledger.of(workdir)
    part = next(ledger.batch(8)).parts[0]
    ended = invoked(COMMAND, run, [workdir, f"--document={part.document}", "--json"])
    told = json.loads(ended.out)["documents"]
    assert len(told) == 1 and 8 in [seen["step"] for seen in told[0]["seen"]]
    assert all(seen["step"] <= 8 for seen in told[0]["seen"]) and all(seen["step"] > 8 for seen in told[0]["planned"])
    assert len(told[0]["seen"] + told[0]["planned"]) == len(ledger.document(told[0]["source"], part.document))
    plain = invoked(COMMAND, run, [workdir, f"--document={part.document}", "--full"])
    assert plain.code == 0 and "step 8, row 0, epoch 0: " in plain.out and "steps done:" in plain.out


def test_nothing_in_a_text_or_id_steers_the_terminal(real, invoked, monkeypatch):
    workdir, _ = real
    monkeypatch.setattr(Ledger, "text", lambda *_: "red \x1b[31m\u202etext\nline\ttwo")
    row = Ledger.of(workdir).row(3, 0)
    named = row._replace(parts=(row.parts[0]._replace(document="a\x1b]0;b"),))
    monkeypatch.setattr(Ledger, "row", lambda *_: named)
    out = invoked(COMMAND, run, [workdir, "--step=3", "--row=0"]).out
    assert "  a\\x1b]0;b  tokens" in out and "    red \\x1b[31m\\u202etext\\nline\\ttwo\n" in out
    out = invoked(COMMAND, run, [workdir, "--step=3", "--row=0", "--full"]).out
    assert "    red \\x1b[31m\\u202etext\n    line    two\n" in out


def test_bad_input(real, invoked, tmp_path):
    workdir, _ = real
    for flags, message in (
            ([], "give one of --step=N and --document=ID"),
            (["--step=1", "--document=x"], "give one of --step=N and --document=ID"),
            (["--document=x", "--row=1"], "--row needs --step"),
            (["--step=0"], "step 0 is outside the run's steps 1 to 30"),
            (["--step=31"], "step 31 is outside the run's steps 1 to 30"),
            (["--step=3", "--row=2"], "row 2: the batch of step 3 has rows 0 to 1"),
            (["--step=3", "--row=-1"], "row -1: the batch of step 3 has rows 0 to 1")):
        ended = invoked(COMMAND, run, [workdir, *flags])
        assert ended.code == 2 and message in ended.error
    ended = invoked(COMMAND, run, [tmp_path, "--step=1"])
    assert ended.code == 2 and f"{tmp_path} is not a run: it has no config.json" in ended.error
    ended = invoked(COMMAND, run, [workdir, "--step=1", f"--store={tmp_path / 'gone'}"])
    assert ended.code == 2 and "gone: the run's token store is not there; " in ended.error
    (workdir / "amendments.json").write_text('[{"version": 9}]')
    assert "run/amendments.json: amendments are damaged" in invoked(COMMAND, run, [workdir, "--step=1"]).error
    (workdir / "amendments.json").unlink()
    state = workdir / "checkpoints" / "8" / "data" / "data.json"
    for order, message in (({"version": 1}, "checkpoint 8 has version 1, this neo reads 2"), ({"version": 2}, "8 is damaged"),
                           (None, "has version None")):
        state.write_text(json.dumps({"order": order}))
        assert message in invoked(COMMAND, run, [workdir, "--step=1"]).error


def test_a_store_that_has_changed(real, invoked):
    workdir, _ = real
    path = workdir / "checkpoints" / "8" / "data" / "data.json"
    saved = json.loads(path.read_text())
    for field, value in (("tokens", 17), ("tokenizer_sha256", "0" * 64)):
        changed = json.loads(json.dumps(saved))
        changed["order"]["sources"]["b"][field] = value
        path.write_text(json.dumps(changed))
        ended = invoked(COMMAND, run, [workdir, "--step=1"])
        assert ended.code == 2 and "source 'b' (" in ended.error and f"{field} was {value} and is " in ended.error
