"""neo.data.inspect: the plan's numbers against the order itself, text, picture, samples, stores, and bad input."""

from __future__ import annotations

import dataclasses
import json
import shutil
import struct
import subprocess
import sys
import time

import pytest

from neo.config import load, to_dict
from neo.data import amendments, inspect, inspect_samples, inspect_store
from neo.data.amendments import Amendment
from neo.data.inspect_plan import groups, label_of, make_plan, to_json
from neo.data.inspect_plot import draw
from neo.data.inspect_text import count, plan_lines
from neo.data.loader import TrainData, open_sources
from neo.data.planning import planned_order
from neo.data.store import open_source
from neo.data.store_writer import write_source
from neo.data.tokenizer import Tokenizer
from neo.data.windows import assemble, read_window

RECIPE = '''
from neo.config import new, phase

def get_config():
    c = new()
    c.model.update(vocab_size=320, num_layers=1, d_model=32, num_heads=4, num_kv_heads=2, d_ff=64, max_seq_len=64)
    c.data.mask_end_of_document = True
    c.phases = [
        phase("first", tokens=64000, seq_len=32, global_batch=20, batch_ramp=(4, 8), batch_ramp_tokens=20000,
              mixture=dict(a=3.0, b=1.0)),
        phase("second", tokens=64000, seq_len=64, global_batch=10, mixture=dict(a=0.5, b=0.5, c=0.0), rope_base=20000.0,
              mixture_end=dict(b=0.2, c=0.8))]
    return c
'''


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe with ramps of batch and mixture, in a folder of its own, without a store."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "two.py"
    path.write_text(RECIPE)
    return path


@pytest.fixture
def seen(invoked):
    """seen(*argv) -> how the command ended."""
    return lambda *argv: invoked(inspect.COMMAND, inspect.run, list(argv))


def plan_of(config):
    order, sizes = planned_order(config)
    return make_plan(config, order, sizes), order


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return struct.unpack(">II", data[16:24])


# The plan's numbers


def test_the_plan_counts_what_the_order_gives_out(recipe):
    """Sequence by sequence, with ramps of batch and mixture."""
    config = load(recipe, {"data.source_tokens": "a=20000,b=90000"})
    plan, order = plan_of(config)
    seen = {phase.name: {} for phase in plan.phases}
    for index in range(order.num_sequences):
        address = order.address(index)
        taken = seen[plan.phases[address.phase].name]
        taken[address.source] = taken.get(address.source, 0) + address.length
    assert {phase.name: {name: use.tokens for name, use in phase.sources.items()} for phase in plan.phases} == seen
    assert {name: source.tokens for name, source in plan.sources.items()} == order.tokens_by_source(order.num_steps)
    assert sum(phase.tokens for phase in plan.phases) == plan.tokens == order.num_tokens
    assert [phase.batches for phase in plan.phases] == [one.batches for one in config.phases]
    assert [phase.first_step for phase in plan.phases] == [0, config.phases[0].steps]
    assert [phase.rope_base for phase in plan.phases] == [10000.0, 20000.0]


def test_epochs_repeats_and_limits(recipe):
    config = load(recipe, {"data.source_tokens": "a=20000,b=90000", "data.max_epochs": 3, "data.max_epochs_of.b": 1})
    plan, _ = plan_of(config)
    a, b, c = (plan.sources[name] for name in "abc")
    assert a.epochs == a.tokens / 20000 > 3 and a.repeats == a.tokens - 20000
    assert (b.epochs, b.repeats) == (b.tokens / 90000, 0)
    assert (c.size, c.origin, c.epochs, c.repeats) == (None, "unknown", None, None)
    assert (a.limit, b.limit) == (3, 1) and list(plan.over_limit) == ["a"]
    uses = [phase.sources["a"] for phase in plan.phases]
    assert sum(use.repeats for use in uses) == a.repeats and uses[1].repeats == uses[1].tokens  # all of it was read by then
    assert sum(use.epochs for use in uses) == pytest.approx(a.epochs)


def test_the_areas_cover_the_run(recipe):
    plan, _ = plan_of(load(recipe))
    edges = [(area.first_token, area.first_token + area.tokens) for area in plan.areas]
    assert edges[0][0] == 0 and edges[-1][1] == plan.tokens
    assert all(before[1] == after[0] for before, after in zip(edges, edges[1:], strict=False))
    assert all(sum(area.shares.values()) == pytest.approx(1) for area in plan.areas)
    ramp = [area.shares.get("c", 0.0) for area in plan.areas if area.first_token >= plan.phases[1].first_token]
    assert len(ramp) > 20 and ramp[0] < 0.1 and ramp[-1] > 0.7


def test_groups_show_families_only_where_sources_are_many():
    few = {"code--python": 3, "code--java": 2, "web": 4}
    assert [group.label for group in groups(few, 9)[0]] == ["web", "code--python", "code--java"]
    many = {**few, **{f"book--{i}": 1 for i in range(30)}, "paper--x": 1}
    shown, rest = groups(many, 2)
    assert [(label_of(group), group.tokens) for group in shown] == [("book--* (30)", 30), ("code--* (2)", 5)]
    assert [label_of(group) for group in rest] == ["web", "paper--x"]
    assert len(groups(many, 99, fold=False)[0]) == len(many)
    assert groups(few, 2)[1] == []   # one more line would only say that one is missing


@pytest.mark.parametrize("number, text", [(0, "0"), (999_949, "999,949"), (999_951, "1.000M"), (40_183_900_000, "40.18B"),
                                          (432_653_082_199, "432.7B"), (1.0849e12, "1.085T"), (9.9996e9, "10.00B")])
def test_counts_are_short(number, text):
    assert count(number) == text


# The command on plans


def test_the_real_yulan_mini_without_a_token_on_disk(seen, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    begun = time.process_time()
    ended = seen("--config=yulan_mini")
    assert time.process_time() - begun < 10
    assert ended.code == 0, ended.err
    assert "1.085T tokens in 262,774 steps, 27 phases, 291 sources" in ended.out
    assert "291 planned" in ended.out and "no samples" in ended.out and "Wrote inspect.png" in ended.out
    lines = ended.out.splitlines()
    assert len(lines) < 70 and sum(line.startswith("mix_") for line in lines) == 27
    assert any(line.startswith("mix_27") and "28,672    144     490000" in line for line in lines)
    assert any(line.startswith("fineweb-edu ") and "432.7B" in line and "1.00" in line for line in lines)
    assert png_size(tmp_path / "inspect.png") > (1000, 400) and (tmp_path / "inspect.png").stat().st_size < 150_000
    everything = seen("--config=yulan_mini", "--all", "--samples=0").out.splitlines()
    assert sum("planned" in line for line in everything) == 292


def test_one_phase_and_overrides(seen, recipe):
    ended = seen(f"--config={recipe}", "--phase=second", "--config.data.source_tokens.c=51200",
                 "--config.phases.second.seq_len=32")
    assert ended.code == 0, ended.err
    assert "first " not in ended.out and "second" in ended.out
    assert "51,200  planned" in ended.out and "unknown" in ended.out
    assert "Next: python -m neo.train --config=" in ended.out and "--config.phases.second.seq_len=32" in ended.out


def test_a_plan_over_its_limits_is_shown_and_ends_with_3(seen, recipe, tmp_path):
    ended = seen(f"--config={recipe}", "--config.data.source_tokens=b=7000", "--out=over.png")
    assert ended.code == 3 and "max_epochs_of.b=" in ended.error
    assert "over the limit: b is read 5" in ended.out and "over 4" in ended.out
    assert png_size(tmp_path / "over.png")


def test_synthetic_sources_have_no_end(seen, recipe):
    ended = seen(f"--config={recipe}", "--config.data.synthetic=True")
    assert ended.code == 0, ended.err
    assert "3 synthetic" in ended.out and ended.out.count("endless") == 3 and "no samples" not in ended.out
    assert ended.out.endswith("--config.data.synthetic=True\n")


def test_json_holds_every_source_of_every_phase(seen, recipe):
    ended = seen(f"--config={recipe}", "--json", "--config.data.source_tokens=a=70000")
    assert ended.code == 0, ended.err
    tree = json.loads(ended.out)
    assert tree["picture"] == "inspect.png" and tree["samples"] == []
    assert tree["plan"] == json.loads(json.dumps(to_json(plan_of(load(recipe, {"data.source_tokens": "a=70000"}))[0])))
    for phase in tree["plan"]["phases"]:
        assert sum(use["share"] for use in phase["sources"].values()) == pytest.approx(1)
    assert tree["plan"]["phases"][1]["sources"]["a"]["epochs"] > 0
    assert tree["plan"]["sources"]["b"] == {"tokens": tree["plan"]["sources"]["b"]["tokens"], "size": None, "origin": "unknown",
                                            "epochs": None, "repeats": None, "limit": 4.0}


@pytest.mark.parametrize("changes", [{}, {"data.source_tokens": "a=500,b=100000", "data.max_epochs": 0},
                                     {"phases.second.mixture_end": {}}, {"train.scale_tokens": 0.02}])
def test_every_plan_can_be_drawn(recipe, tmp_path, changes):
    plan, _ = plan_of(load(recipe, changes))
    draw(plan, str(tmp_path / "x.png"))
    assert png_size(tmp_path / "x.png") == (1200, 580)
    assert plan_lines(plan, everything=True)


# Samples


def run_with_store(store, recipe, **changes):
    config = load(recipe, {"data.store": str(store), **changes})
    order, _ = planned_order(config)
    sources = {name: open_source(str(store / name)) for name in ("a", "b")}
    return config, order, sources, Tokenizer.load(str(store))


def test_samples_are_the_windows_of_the_order(store, recipe):
    """Decoded pieces are the tokens of the address, document by document, masked as in training."""
    config, order, sources, tokenizer = run_with_store(store, recipe, **{"phases.second.seq_len": 64})
    samples = list(inspect_samples.run_samples(config, order, sources, tokenizer, 40))
    assert [sample.phase for sample in samples] == ["first"] * 20 + ["second"] * 20
    assert samples[0].index == 0 and samples[0].step == 1
    borders = masked = 0
    for sample in samples:
        address = order.address(sample.index)
        assert (sample.source, sample.epoch, sample.start, sample.length) == address[1:]
        assert order.first_index(sample.step - 1) + sample.row == sample.index
        split = sources[sample.source].split("train")
        window = read_window(split, sample.start, sample.length, 0)
        row = assemble([window], cross_document_attention=False, mask_end_of_document=True)
        assert sum(piece.tokens for piece in sample.pieces) == sample.length + 1
        assert [piece.document for piece in sample.pieces] == split.document_ids(sample.start, sample.start + sample.length + 1)
        assert sum(piece.masked for piece in sample.pieces) == int((row["loss_mask"] == 0).sum())
        place = 0
        for piece in sample.pieces:
            tokens = window.tokens[place:place + piece.tokens].tolist()
            assert "".join(text for text, _ in piece.runs) == tokenizer.decode(tokens)
            place += piece.tokens
        for before, after in zip(sample.pieces, sample.pieces[1:], strict=False):
            assert before.ends and after.begins and after.segment in (before.segment, before.segment + 1)
            assert after.runs[0][1]   # the first token of a document is not learned from another one's end
            borders += 1
        masked += sum(piece.masked for piece in sample.pieces)
    assert borders > 5 and masked == borders


def test_documents_at_the_edges_of_a_window(tmp_path):
    """A window that begins or ends exactly with a document says so; one inside a document says neither."""
    tokenizer = type("Ids", (), {"decode": staticmethod(lambda ids: "".join(f"<{i}>" for i in ids))})
    documents = [("x", [1] * 9), ("y", [2] * 19), ("z", [3] * 49)]
    write_source(str(tmp_path / "s"), "s", {"train": documents, "validation": []}, vocab_size=100, eod_id=0,
                 tokenizer_sha256="0" * 64)
    split = open_source(str(tmp_path / "s")).split("train")
    data = load("neo_demo").data
    names = {start: [(piece.document, piece.tokens, piece.begins, piece.ends) for piece in
                     inspect_samples._pieces(split, start, length, tokenizer, data)]
             for start, length in ((0, 9), (0, 10), (12, 9), (10, 19), (40, 20))}
    assert names[0] == [("x", 10, True, True), ("y", 1, True, False)]
    assert names[12] == [("y", 10, False, False)]
    assert names[10] == [("y", 20, True, True)]
    assert names[40] == [("z", 21, False, False)]
    assert [(p.document, p.begins, p.ends) for p in inspect_samples._pieces(split, 60, 19, tokenizer, data)] == [
        ("z", False, True)]


@pytest.mark.parametrize("number", [1, 2, 3, 5, 27, 60])
def test_samples_are_spread_over_phases(number):
    shares = inspect_samples._shares(number, 27)
    assert sum(shares) == number and max(shares) - min(shares) <= 1 and shares[0] >= 1
    assert number == 1 or shares[-1] >= 1


def test_samples_in_the_text(seen, store, recipe):
    ended = seen(f"--config={recipe}", f"--config.data.store={store}", "--samples=4", "--phase=second", "--chars=10")
    assert ended.code == 0, ended.err
    assert "2 from the store" in ended.out and "1 unknown" in ended.out
    assert ended.out.count("phase second, step ") == 4 and "phase first, step" not in ended.out
    assert "characters ..." in ended.out and "--- " in ended.out and "\x1b" not in ended.out
    whole = seen(f"--config={recipe}", f"--config.data.store={store}", "--samples=4", "--phase=second", "--chars=0").out
    assert "characters ..." not in whole and len(whole) > len(ended.out)


def test_colours_on_a_terminal(monkeypatch, store, recipe):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    config, order, sources, tokenizer = run_with_store(store, recipe)
    sample = next(sample for sample in inspect_samples.run_samples(config, order, sources, tokenizer, 60)
                  if len(sample.pieces) > 1)
    lines = "\n".join(inspect_samples.sample_lines(sample, 400, inspect_samples.styles()))
    assert "\x1b[36m--- " in lines and "\x1b[33m--- " in lines   # two documents, two colours
    assert "\x1b[2;33m" in lines   # the masked first token of the second is dim
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in "\n".join(inspect_samples.sample_lines(sample, 400, inspect_samples.styles()))


def test_a_text_does_not_steer_the_terminal():
    lines = inspect_samples._shorten((("a\x1b[2Jb\r\n\tc", False),), 0)
    assert lines == [[("a\\x1b[2Jb\\r", False)], [("    c", False)]]


@pytest.mark.parametrize("chars", [1, 2, 40, 79, 80, 81, 159, 160, 300])
def test_shortened_text_keeps_both_ends(chars):
    runs = [("a" * 80, False), ("b" * 20, True), ("c" * 100, False)]
    lines = inspect_samples._shorten(runs, chars)
    text = ["".join(text for text, _ in line) for line in lines]
    whole = "".join(text for text, _ in runs)
    if chars >= 160:   # nothing to be won
        assert text == [whole]
        return
    head = chars * 2 // 3
    assert text == [whole[:head], f"... {200 - chars} characters ...", whole[200 - (chars - head):]]
    assert all(masked == (set(text) == {"b"}) for line in lines[::2] for text, masked in line if text)


# Runs


def test_a_run_with_an_amendment(seen, store, recipe, tmp_path):
    """The workdir's plan is the order that the run has: its amendment, what is done, samples of both."""
    config = load(recipe, {"data.store": str(store), "data.max_epochs": 0, "phases.second.mixture_end": {}})
    data = TrainData(config, open_sources(config))
    data.amend(Amendment(60, data.order.first_index(60), "first", {"a": 0.25, "b": 0.75}))
    workdir = tmp_path / "run"
    state = workdir / "checkpoints" / "80" / "data" / "data.json"
    state.parent.mkdir(parents=True)
    changed = dataclasses.replace(config.phases[0], mixture={"a": 0.25, "b": 0.75})
    now = dataclasses.replace(config, phases=(changed, config.phases[1]))
    (workdir / "config.json").write_text(json.dumps(to_dict(now)))
    (workdir / "amendments.json").write_text(json.dumps(amendments.to_json(data.amendments)))
    state.write_text(json.dumps({"order": data.state(80)}))
    ended = seen(workdir, "--json", "--samples=6", f"--out={tmp_path}/run.png")
    assert ended.code == 0, ended.err
    tree = json.loads(ended.out)
    plan, order = tree["plan"], data.order
    assert (plan["steps_done"], plan["tokens_done"]) == (80, order.tokens_before(80))
    assert plan["amended"] == [[61, "first", {"a": pytest.approx(0.25), "b": pytest.approx(0.75)}]]
    used = order.tokens_by_source(order.num_steps)
    assert {name: source["tokens"] for name, source in plan["sources"].items()} == used
    for sample in tree["samples"]:
        address = order.address(sample["index"])
        assert (sample["source"], sample["start"]) == (address.source, address.start)
    text = seen(workdir, "--phase=first", f"--out={tmp_path}/run.png")
    assert text.code == 0, text.err
    assert "amended from step 61 on (phase first): b 75.0%, a 25.0%" in text.out and "done: 80 steps" in text.out
    assert "Next: python -m neo.data.trace" in text.out and png_size(tmp_path / "run.png")
    assert "changes a plan" in seen(workdir, "--config.data.seed=1").error


# Stores


def test_a_store_and_one_of_its_sources(seen, store):
    ended = seen(store, "--verify", "--samples=2", "--json")
    assert ended.code == 0, ended.err
    tree = json.loads(ended.out)
    assert list(tree["sources"]) == ["a", "b"] and tree["verified"]
    for name, facts in tree["sources"].items():
        source = open_source(str(store / name))
        train, held = source.split("train"), source.split("validation")
        assert (facts["documents"], facts["tokens"]) == (train.num_documents, train.num_tokens)
        assert facts["held_out"] == {"documents": 20, "tokens": held.num_tokens,
                                     "share": held.num_tokens / (held.num_tokens + train.num_tokens)}
        assert facts["tokenizer_sha256"] == source.tokenizer_sha256 and facts["vocab_size"] == 300
    assert [sample["source"] for sample in tree["samples"]] == ["a", "b"]
    assert all(sample["documents"][0]["text"] for sample in tree["samples"])
    text = seen(store / "b", "--samples=1")
    assert text.code == 0 and "180" in text.out and "b, epoch 0, tokens 0 to 512" in text.out
    assert "quick" in text.out or "fox" in text.out


def test_what_preparation_left_out_is_told():
    facts = {"s": {"documents": 2, "tokens": 10, "tokens_per_document": 5, "bytes_per_token": 3.5, "vocab_size": 300,
                   "held_out": {"documents": 0, "tokens": 0, "share": 0.0}, "tokenizer_sha256": "ab" * 32,
                   "packing": {"kind": "best_fit", "seq_len": 64}, "skipped": {"no text": 3}, "repaired": {"not UTF-8": 1},
                   "unreadable": ["x.gz: cut"]}}
    text = "\n".join(inspect_store.store_lines(facts))
    assert "best_fit, T = 64" in text and "s: skipped 3: no text" in text and "s: repaired 1: not UTF-8" in text
    assert "1 inputs could not be read: x.gz: cut" in text
    other = {"t": {**facts["s"], "tokenizer_sha256": "cd" * 32}}
    assert "different tokenizers" in "\n".join(inspect_store.store_lines(facts | other))


def test_verify_names_the_file_that_changed(seen, tmp_path, store, recipe):
    shutil.copytree(store, tmp_path / "copy")
    path = next((tmp_path / "copy" / "b").glob("train*.tokens"))
    data = bytearray(path.read_bytes())
    data[7] ^= 1
    path.write_bytes(data)
    for argv in ((tmp_path / "copy", "--verify"), (f"--config={recipe}", f"--config.data.store={tmp_path}/copy", "--verify")):
        ended = seen(*argv)
        assert ended.code == 2 and str(path) in ended.error and "sha256" in ended.error
    assert seen(tmp_path / "copy" / "a", "--verify", "--samples=0").code == 0


def test_a_store_without_its_tokenizer_is_still_described(seen, tmp_path, store):
    shutil.copytree(store / "a", tmp_path / "copy" / "a")
    ended = seen(tmp_path / "copy")
    assert ended.code == 0 and "no samples: " in ended.err and "380" in ended.out


def test_a_packed_store_shows_its_padding_and_wants_its_length(seen, tmp_path, store, recipe):
    tokenizer = Tokenizer.load(str(store))
    texts = [f"the quick fox {i} " * (1 + i % 3) for i in range(60)]
    documents = [(f"d{i}", tokenizer.encode(text)) for i, text in enumerate(texts)]
    folder = tmp_path / "packed"
    tokenizer.save(str(folder / "tokenizer"))
    write_source(str(folder / "a"), "a", {"train": documents, "validation": []},
                 vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id, tokenizer_sha256=tokenizer.sha256, pack=64)
    source = open_source(str(folder / "a"))
    assert source.alignment == 64
    samples = list(inspect_samples.store_samples({"a": source}, tokenizer, 20, 512))
    assert all(sample.length == 64 and sample.start % 64 == 0 for sample in samples)
    padding = [piece for sample in samples for piece in sample.pieces if not piece.document]
    assert padding and all(piece.masked == piece.tokens for piece in padding)
    text = seen(folder, "--samples=20").out
    assert "T = 64" in text and "--- padding, " in text
    only_a = ("--config.phases.first.mixture=a=1", "--config.phases.second.mixture=a=1", "--config.phases.second.mixture_end=")
    ended = seen(f"--config={recipe}", f"--config.data.store={folder}", "--config.data.max_epochs=0", *only_a)
    assert ended.code == 2 and "packed for sequences of 64 tokens" in ended.error
    ended = seen(f"--config={recipe}", f"--config.data.store={folder}", "--config.data.max_epochs=0",
                 "--config.phases.first.seq_len=64", *only_a)
    assert ended.code == 0 and ended.out.count("phase ") >= 3


# Bad input


@pytest.mark.parametrize("argv, complaint", [
    ((), "give one of --config=FILE"),
    (("{store}", "--config=neo_demo"), "give one of --config=FILE"),
    (("--config=neo_dem",), "did you mean 'neo_demo'?"),
    (("--config=neo_demo", "--phase=mian"), "--phase=mian: there is no such phase (did you mean 'main'?); phases: main"),
    (("--config=neo_demo", "--samples=-1"), "--samples=-1: 0 or more is needed"),
    (("--config=neo_demo", "--out=nowhere/x.png"), "there is no folder"),
    (("--config=neo_demo", "--out=x.pdf"), "ends in .png"),
    (("--config=neo_demo", "--out=folder.png"), "that is a folder"),
    (("--config=neo_demo", "--out=mine.png"), "not a picture of neo.data.inspect"),
    (("--config=neo_demo", "--config.phases.main.tokns=3"), "did you mean 'tokens'?"),
    (("{store}", "--phase=main"), "--phase is of a plan"),
    (("{store}", "--out=x.png"), "--out is of a plan"),
    (("{store}", "--config.data.seed=1"), "--config.data.seed changes a plan"),
    (("nowhere",), "nowhere: no such folder"),
    (("folder.png",), "not a token store"),
    (("mine.py",), "mine.py: a file, and no token store; a plan is inspected with --config=mine.py"),
])
def test_bad_input_is_one_line(seen, store, tmp_path, monkeypatch, argv, complaint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "mine.png").write_bytes(b"holiday")
    (tmp_path / "mine.py").write_text("")
    ended = seen(*(word.format(store=store) for word in argv))
    assert ended.code == 2 and complaint in ended.error
    assert (tmp_path / "mine.png").read_bytes() == b"holiday" and not (tmp_path / "inspect.png").exists()


def test_mixtures_by_epochs_need_a_size(seen, recipe):
    ended = seen(f"--config={recipe}", "--config.phases.second.mixture_unit=epochs", "--config.phases.second.mixture_end=",
                 "--config.phases.second.mixture=a=1,b=0.5")
    assert ended.code == 2 and "source_tokens" in ended.error


def test_help_is_light(root):
    program = ("import sys, time; from neo.data import inspect; from neo.cli import help_text; help_text(inspect.COMMAND); "
               "assert not {'jax', 'numpy', 'matplotlib', 'ml_collections'} & set(sys.modules)")
    assert subprocess.run([sys.executable, "-c", program], cwd=root, check=False).returncode == 0
