"""Changing the mixture of a run that is going on, and runs with ramps."""

from __future__ import annotations

import json

import pytest

from neo.train.workdir import Run

OTHER = "a=0.1,b=0.9"


def shares(workdir, low, high):
    """Share of source b's tokens in the steps low < step <= high, from the data states of two checkpoints."""
    from neo.train.checkpoint_format import resolve
    one, two = (resolve(f"{workdir}@{step}").data()["order"]["sources"] for step in (low, high))
    used = {name: two[name]["tokens_used"] - one[name]["tokens_used"] for name in "ab"}
    return used["b"] / sum(used.values())


def test_a_changed_mixture_is_refused_then_amended_then_kept(command, tmp_path):
    run = tmp_path / "run"
    keep = dict(checkpoint__permanent_every_steps=4, checkpoint__every_steps=4)
    assert command(run, train__steps=4, **keep).code == 0
    refused = command(run, phases__short__mixture=OTHER, **keep)
    assert refused.code == 2
    for word in ("phases[0].mixture", "'a': 0.7", "'a': 0.1", "--config.data.amend=True"):
        assert word in refused.error
    assert not (run / "amendments.json").exists()

    amended = command(run, phases__short__mixture=OTHER, data__amend=True, train__steps=8, **keep)
    assert amended.code == 0 and "mixed by the new weights from step 5 on" in amended.err
    [one] = json.loads((run / "amendments.json").read_text())
    assert (one["step"], one["index"], one["phase"], one["reason"]) == (4, 32, "short", "config")
    assert one["mixture"] == pytest.approx({"a": 0.1, "b": 0.9})
    assert [e["effective"] for e in Run(run).events() if e["event"] == "amendment"] == [4]
    assert shares(run, 4, 8) == pytest.approx(0.9, abs=0.05)   # 32 windows

    # The same command goes on with it; the old mixture would be another change.
    back = command(run, **keep)
    assert back.code == 2 and "phases[0].mixture" in back.error
    end = command(run, phases__short__mixture=OTHER, **keep)
    assert end.code == 0 and "step 12 of 12" in end.out
    assert json.loads((run / "amendments.json").read_text()) == [one]
    assert shares(run, 8, 12) == pytest.approx(0.5, abs=0.05)   # the next phase has its own


def test_the_mixture_of_a_phase_that_is_over_stays(command, tmp_path):
    assert command(tmp_path / "run", train__steps=9).code == 0
    refused = command(tmp_path / "run", phases__short__mixture=OTHER, data__amend=True)
    assert refused.code == 2 and "phases[0].mixture" in refused.error


def test_an_amendment_may_bring_a_source(command, store, tmp_path):
    """The new source is read from its first token; the one left out keeps its place in the records."""
    (tmp_path / "store").mkdir()
    for name, there in (("a", "a"), ("c", "b"), ("tokenizer", "tokenizer")):
        (tmp_path / "store" / name).symlink_to(store / there)
    where = dict(data__store=tmp_path / "store", phases__long__mixture="a=1")
    assert command(tmp_path / "run", train__steps=4, phases__short__mixture="a=1", **where).code == 0
    ended = command(tmp_path / "run", phases__short__mixture="c=1", data__amend=True, train__steps=8, **where)
    assert ended.code == 0
    losses = {r["step"]: [key for key in r if key.startswith("train/loss/")] for r in Run(tmp_path / "run").records()
              if "train/loss" in r}
    assert losses[4] == ["train/loss/a"] and losses[5] == ["train/loss/c"]


def test_a_batch_ramp_is_the_same_when_stopped_inside(command, same_end, tmp_path):
    ramp = dict(phases__short__batch_ramp="4", phases__short__batch_ramp_tokens=512, phases__short__mixture_end="a=0.2,b=0.8",
                eval__every_steps=3)
    whole = command(tmp_path / "whole", **ramp)
    assert whole.code == 0 and "step 14 of 14" in whole.out   # 4 steps of 4 sequences, 6 of 8, and 4 of the next phase
    assert command(tmp_path / "parts", train__steps=3, **ramp).code == 0
    assert command(tmp_path / "parts", **ramp).code == 0
    same_end(tmp_path / "whole", tmp_path / "parts", 14)
    tokens = [record["tokens"] for record in Run(tmp_path / "whole").records() if "train/loss" in record]
    assert [b - a for a, b in zip(tokens, tokens[1:], strict=False)] == [128] * 3 + [256] * 10
