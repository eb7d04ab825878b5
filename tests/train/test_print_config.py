"""`python -m neo.train --print_config`: the resolved config, sizes and memory, without allocating anything."""

from __future__ import annotations

import json

import pytest

from neo.cli import invoke
from neo.config import load
from neo.train.__main__ import COMMAND, run


@pytest.fixture
def show(capfd):
    def start(*argv):
        capfd.readouterr()
        assert invoke(COMMAND, run, [*argv, "--print_config"]) == 0
        out, err = capfd.readouterr()
        assert err == ""
        return out
    return start


@pytest.mark.parametrize("recipe", ["neo_7b", "neo_colab", "moxin_7b"])
def test_text_reads_back_and_tells_the_sizes(show, tmp_path, monkeypatch, recipe):
    monkeypatch.chdir(tmp_path)
    text = show(f"--config={recipe}", "--config.train.steps=5")
    (tmp_path / "again.py").write_text(text)
    assert load(tmp_path / "again.py") == load(recipe, {"train.steps": 5})
    assert "train.steps = 5   # from the command line" in text
    for part in ("parameters: ", "training FLOPs per token", "memory per device on this machine", "on 64 devices",
                 "micro-batch"):
        assert part in text
    assert list(tmp_path.iterdir()) == [tmp_path / "again.py"], "nothing else is written"


def test_neo_7b_in_numbers(show):
    facts = json.loads(show("--config=neo_7b", "--json", "--config.phases.fundamental.tokens=1e11"))
    assert facts["overridden"] == ["phases.fundamental.tokens"]
    assert facts["parameters"]["total"] == pytest.approx(7.794e9, rel=1e-4)
    [phase] = facts["phases"]
    assert (phase["tokens_per_step"], phase["steps"], phase["tokens"]) == (2**23, 11921, 11921 * 2**23)
    # 6 FLOPs per parameter outside the embedding table and token, and attention on top.
    assert phase["flops_per_token"]["full"] > phase["flops_per_token"]["causal"] > 6 * 7.39e9
    here, *larger = facts["memory"]
    assert here["bytes_per_device"] > here["capacity"] or here["capacity"] is None or here["capacity"] > 100e9
    totals = [plan["bytes_per_device"] for plan in larger]
    assert totals == sorted(totals, reverse=True) and len(totals) == 3
    assert facts["config"]["phases"][0]["tokens"] == 10**11


def test_an_impossible_mesh_is_told_beside_the_sizes(show, tiny):
    text = show(f"--config={tiny}", "--config.phases.long.global_batch=3")
    assert "impossible: config.phases.long.global_batch=3 is not divisible" in text and "parameters: " in text
