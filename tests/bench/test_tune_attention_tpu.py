"""The search for block sizes, on made-up costs."""

from __future__ import annotations

import csv

import attention_tpu_static as bench
import pytest
import tune_attention_tpu as tuning

SHAPE = bench.Shape(8192, 4096)
START = {"block_q": 512, "block_kv": 512, "unroll": 1}


class FakeCompiler:
    chip = "v5e"


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Costs with their least at 1024 x 256, unroll 2; block_q 2048 does not compile, unroll 4 compiles too slowly."""
    asked = []

    def measure(compiler, shape, side, setting, direction):
        blocks = setting[direction]
        asked.append(blocks)
        if blocks["block_q"] == 2048:
            raise bench.CompileFailed("too large")
        cost = abs(blocks["block_q"] - 1024) + abs(blocks["block_kv"] - 256) + {1: 60, 2: 0, 4: -500}[blocks["unroll"]] + 1000
        return {"total": 32.0 * cost, "compile_s": 30.0 if blocks["unroll"] == 4 else 5.0}

    monkeypatch.setattr(bench, "measure", measure)
    monkeypatch.setattr(tuning, "default_blocks", lambda direction: dict(START))
    monkeypatch.setattr(tuning, "COUNTS", tmp_path / "counts.json")
    monkeypatch.setattr(tuning, "TABLE", tmp_path / "blocks.csv")
    return asked


def test_it_walks_to_the_least_and_writes_it(asked, capsys):
    counts = {}
    tuning.tune(counts, FakeCompiler, SHAPE, "forward")
    tuning.write_table(counts)
    (row,) = csv.DictReader(tuning.TABLE.open())
    assert row == {"chip": "v5e", "seq_len": "8192", "window": "4096", "head": "128", "stack": "4", "direction": "forward",
                   "blocks": "block_q=1024 block_kv=256 unroll=2", "cycles": "1000"}
    assert len(asked) < 5 * 5 * 3


def test_it_goes_on_where_it_stopped(asked, capsys):
    tuning.tune({}, FakeCompiler, SHAPE, "forward")
    before = len(asked)
    tuning.tune(tuning.load(), FakeCompiler, SHAPE, "forward")
    assert len(asked) == before


def test_of_equals_the_one_that_compiles_fastest():
    known = {"a=1": {"cycles": 1000, "compile_s": 9.0}, "a=2": {"cycles": 1009, "compile_s": 3.0},
             "a=4": {"cycles": 1020, "compile_s": 1.0}, "a=8": {"error": "no"}, "a=16": {"cycles": 10, "compile_s": 99.0}}
    assert tuning.best_of(known)[0] == "a=2"
    assert tuning.best_of({"a=8": {"error": "no"}}) is None
