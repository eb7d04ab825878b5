"""Samples during training are those of the checkpoint that the same step saves."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace

import pytest

import neo
from neo.config.schema import EvalConfig
from neo.models.decoder import Decoder
from neo.train.hooks import LAZY_HOOKS, lazy_hook
from neo.train.workdir import Workdir


@pytest.fixture
def session(tmp_path, config, tokenizer, saved):
    """What the hook takes of a training session."""
    sampling = EvalConfig(sample_every_steps=2, sample_prompts=("the quick ", "", "fox " * 300), sample_tokens=12)
    phase = config.phases[0]
    return SimpleNamespace(config=dataclasses.replace(config, eval=sampling), workdir=Workdir(tmp_path),
                           tokenizer=tokenizer, decoder=Decoder(config.model, remat="full"),
                           phase_after=lambda step: phase)


def test_samples_are_those_of_the_checkpoint(session, saved):
    workdir, params = saved
    hook = lazy_hook("sample", session)
    assert LAZY_HOOKS["sample"] == "neo.infer.hook:SampleHook"
    assert [step for step in range(1, 6) if hook.due(step, last=step == 5)] == [2, 4, 5]
    for step in (2, 4):
        hook.act(step, {"params": params})
    lines = [json.loads(line) for line in (session.workdir.path / "samples.jsonl").read_text().splitlines()]
    places = [(line["step"], line["tokens"], line["phase"]) for line in lines]
    assert places == [(2, 128, "short")] * 3 + [(4, 256, "short")] * 3
    model = neo.load(workdir)
    wanted = model.generate(["the quick ", ""], max_new_tokens=12)
    assert [line["text"] for line in lines[:2]] == ["the quick " + wanted[0], wanted[1]]
    assert lines[2]["new_tokens"] == 12   # the prompt was cut to what the model can take


def test_no_tokens_no_samples(session):
    none = dataclasses.replace(session.config, eval=dataclasses.replace(session.config.eval, sample_tokens=0))
    session.config = none
    assert not lazy_hook("sample", session).due(2, last=True)
