"""Dynamic weights on planted domains: they move where they should, stay within the epoch limits, and resume exactly.

a: cycles of 8 tokens, which the model learns; its reference asks for that. b: random tokens, whose reference is the
entropy it can never beat. c: a small source that a reference of 0 pulls to its epoch limit.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from neo.config import load
from neo.config.schema import Config, DataConfig, PhaseConfig
from neo.data import amendments
from neo.data.ledger import Ledger
from neo.data.order import Order
from neo.data.reweight import updated
from neo.data.store_writer import write_source
from neo.data.tokenizer import Tokenizer
from neo.errors import InputError, StoppedForPerson
from neo.train.metrics import known_metric
from neo.train.reweighting import Reweighting, check
from neo.train.workdir import Run

RANDOM = 64  # tokens to draw from in b
STEPS, STOP = 44, 24  # 40 of the first phase, then 4
FIELDS = {"phases.short.tokens": 40 * 8 * 32, "phases.short.mixture.c": 0.1, "phases.short.mixture.a": 0.2,
          "phases.short.mixture.b": 0.7, "data.max_epochs": 0, "data.max_epochs_of.c": 2, "data.reweight_steps": 8,
          "data.reweight_reference.a": 0.5, "data.reweight_reference.b": math.log(RANDOM), "data.reweight_reference.c": 0,
          "eval.every_steps": STOP, "checkpoint.every_steps": 0}


@pytest.fixture(scope="module")
def planted(store, tmp_path_factory):
    """The store with the three sources."""
    folder = tmp_path_factory.mktemp("planted")
    shutil.copytree(store / "tokenizer", folder / "tokenizer")
    tokenizer = Tokenizer.load(str(folder))
    draw = np.random.default_rng(0)

    def cycle():
        return np.tile(100 + draw.permutation(8), 12).tolist()

    def noise():
        return draw.integers(100, 100 + RANDOM, 90).tolist()

    def write(name, make, train, held_out=6):
        write_source(str(folder / name), name,
                     {split: [(f"{name}{split}{i}", make()) for i in range(count)]
                      for split, count in (("train", train), ("validation", held_out))},
                     vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id, tokenizer_sha256=tokenizer.sha256)

    write("a", cycle, 120)
    write("b", noise, 120)
    write("c", noise, 6)
    write("unheld", noise, 20, held_out=0)
    return folder


@pytest.fixture
def train(command, planted):
    """train(workdir, **more fields) -> Ended."""
    def start(workdir, fields=None):
        return command(workdir, data__store=planted, **{name.replace(".", "__"): value for name, value in
                                                        {**FIELDS, **(fields or {})}.items()})
    return start


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Where the uninterrupted run goes; the first test that asks for it makes it."""
    return tmp_path_factory.mktemp("whole") / "run"


@pytest.fixture
def uninterrupted(whole, train):
    if not whole.exists():
        ended = train(whole)
        assert ended.code == 0, ended.err
    return whole


def decisions(workdir):
    """Step -> {source: new weight}, from the metrics."""
    return {r["step"]: {name.rsplit("/", 1)[1]: value for name, value in r.items() if name.startswith("data/weight/")}
            for r in Run(workdir).records() if "data/weight/a" in r}


def test_weights_move_to_what_is_still_to_learn(uninterrupted):
    """Only at multiples of 8 with at least 8 steps of the phase to come: 32 + 8 is its end, and the next phase has 4."""
    told = decisions(uninterrupted)
    assert list(told) == [8, 16, 24]
    shares = [{"a": 0.2, "b": 0.7, "c": 0.1}, *told.values()]
    for before, after in itertools.pairwise(shares):
        assert after["a"] > before["a"] and after["b"] < before["b"]
    listed = amendments.from_json(json.loads((uninterrupted / "amendments.json").read_text()))
    assert [(one.step, one.index, one.phase, one.reason) for one in listed] == [
        (step, step * 8, "short", "reweight") for step in (16, 24, 32)]
    assert [one.mixture for one in listed] == list(told.values())


def test_events_tell_why(uninterrupted):
    told = decisions(uninterrupted)
    events = [event for event in Run(uninterrupted).events() if event["event"] == "amendment"]
    assert [(event["step"], event["effective"]) for event in events] == [(8, 16), (16, 24), (24, 32)]
    before = {"a": 0.2, "b": 0.7, "c": 0.1}
    for event in events:
        assert event["before"] == pytest.approx(before) and event["mixture"] == told[event["step"]]
        new = updated(before, event["losses"], {"a": 0.5, "b": math.log(RANDOM), "c": 0.0}, rate=1, floor=1e-4, clip=1)
        if event["step"] == 8:  # the limit does not bite yet
            assert event["mixture"] == pytest.approx(new, rel=1e-9)
        before = event["mixture"]


def test_epoch_limits_hold(uninterrupted):
    ledger = Ledger.of(uninterrupted)
    tokens = ledger.sources["c"].split("train").num_tokens
    used = ledger.order.tokens_by_source(STEPS)["c"]
    assert 2 * tokens - 5 * 32 < used <= 2 * tokens
    assert decisions(uninterrupted)[24]["c"] < 0.1 * decisions(uninterrupted)[16]["c"]


def test_a_due_evaluation_is_used_not_repeated(uninterrupted):
    records = [(r["step"], "eval/loss" in r, "data/weight/a" in r) for r in Run(uninterrupted).records()
               if "eval/loss" in r or "data/weight/a" in r]
    assert records == [(8, True, True), (16, True, True), (24, True, False), (24, False, True), (44, True, False)]
    assert all(known_metric(name) for r in Run(uninterrupted).records() for name in r if "/" in name)


def test_a_resumed_run_reads_the_same_stream(uninterrupted, train, same_end, saved, tmp_path):
    """Stopped with new weights decided and not yet in effect; what a killed start left in amendments.json is void."""
    folder = tmp_path / "run"
    assert train(folder, {"train.steps": STOP}).code == 0
    _, state = saved(folder, STOP)
    assert [one["step"] for one in state["order"]["amendments"]] == [16, 24, 32]
    listed = json.loads((folder / "amendments.json").read_text())
    assert listed == state["order"]["amendments"]
    (folder / "amendments.json").write_text(json.dumps([*listed, {**listed[-1], "step": 39, "index": 39 * 8}]))
    ended = train(folder)
    assert ended.code == 0, ended.err
    same_end(folder, uninterrupted, STEPS)
    one, other = Ledger.of(folder).order, Ledger.of(uninterrupted).order
    assert one.num_sequences == other.num_sequences
    assert all(one.address(i) == other.address(i) for i in range(one.num_sequences))
    first = json.loads((uninterrupted / "amendments.json").read_text())
    assert json.loads((folder / "amendments.json").read_text()) == first


def opened(**splits):
    return {name: SimpleNamespace(split=lambda kind, sizes=sizes: SimpleNamespace(num_tokens=sizes[kind == "validation"]))
            for name, sizes in splits.items()}


@pytest.mark.parametrize("data, message", [
    (dict(reweight_steps=20, synthetic=True), "random tokens .data.synthetic. have no held-out loss"),
    (dict(reweight_steps=20), "the held-out loss of each source, and 'b', 'c' holds no documents out: prepare it with")])
def test_bad_input(data, message):
    with pytest.raises(InputError, match=message):
        check(Config(data=DataConfig(**data)), opened(a=(100, 10), b=(100, 0), c=(9, 0)))
    check(Config(data=DataConfig(**{**data, "reweight_steps": 0})), opened(b=(100, 0)))


@pytest.mark.parametrize("steps, prefetch, lead", [(20, 8, 8), (5, 5, 5)])
def test_more_batches_ahead_than_the_lead_are_refused(tiny, steps, prefetch, lead):
    given = {"data.reweight_steps": steps, "data.prefetch": prefetch, "data.reweight_reference": "a=1,b=1"}
    with pytest.raises(InputError, match=f"data.prefetch={prefetch}: .* act {lead} steps after .*: make at most {lead - 1}"):
        load(tiny, given)
    assert load(tiny, {**given, "data.prefetch": lead - 1}).data.reweight_lead == lead


def test_a_source_without_held_out_documents_is_refused(train, tmp_path):
    ended = train(tmp_path / "run", {"phases.long.mixture.unheld": 1, "data.reweight_reference.unheld": 1})
    assert ended.code == 2 and "'unheld' holds no documents out" in ended.error


class Measured:
    """Stands for Evaluation."""

    def __init__(self, **losses):
        self._losses = {f"eval/loss/{name}": value for name, value in losses.items()}

    def measured(self, step, state):
        return self._losses, True


def test_stops_for_a_person():
    phases = (PhaseConfig(name="main", tokens=32 * 8 * 100, seq_len=32, global_batch=8, mixture={"a": 1.0, "b": 1.0}),)
    config = Config(phases=phases, data=DataConfig(reweight_steps=10, max_epochs=1, reweight_reference={"a": 1, "b": 1}))
    order = Order.create(phases, "ab", {"a": 3000, "b": 3000}, 0)
    session = SimpleNamespace(config=config, sources=opened(a=(3000, 9), b=(3000, 9)), data=SimpleNamespace(order=order))
    with pytest.raises(StoppedForPerson, match=r"too few tokens left for the next 10 steps .*\(a 0.85 of 1, b 0.85 of 1\)"):
        Reweighting(session, Measured(a=1.0, b=2.0)).act(20, {})
    with pytest.raises(StoppedForPerson, match="no new weights at step 10: the loss of source 'b' is nan"):
        Reweighting(session, Measured(a=1.0, b=math.nan)).act(10, {})
