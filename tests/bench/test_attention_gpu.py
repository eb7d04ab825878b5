"""bench/attention_gpu.py runs from end to end without a GPU, and counts and concludes rightly."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import attention_gpu as bench
import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "bench/attention_gpu.py"), *arguments], capture_output=True, text=True,
                          check=False, timeout=600, env=os.environ | {"JAX_PLATFORMS": "cpu"})  # fmt: skip


def test_without_a_gpu():
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "needs an NVIDIA GPU: JAX sees only cpu" in done.stderr


def test_dry_run(tmp_path):
    """The code that a GPU will run, on toys: checked, timed, written."""
    out = tmp_path / "figures.json"
    done = run("--dry_run", "--no_torch", "--rounds=1", f"--out={out}")
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("ratio: ")
    result = json.loads(out.read_text())
    assert result["versions"]["jax"]
    (checked,) = result["check"]
    for contender in ("cudnn", "blockwise"):
        assert checked[contender]["wrong"] == ""
        assert set(checked[contender]["errors"]) == {"out", "dq", "dk", "dv"}
        assert checked[contender]["errors"]["dq"][0] > 0
        for shape in result["timed"]:
            for which in ("forward", "backward"):
                assert shape[contender][which]["ms"] > 0
    ours = checked["pallas_gpu"]
    if "error" not in ours:  # JAX has an interpreter for it
        assert ours["wrong"] == ""
        assert result["ratio"] > 0
    else:
        assert " lacks " in ours["error"]
        assert done.stdout.splitlines()[-1].startswith("ratio: none  no figure for pallas_gpu")


def test_a_wrong_result_is_told(tmp_path, monkeypatch):
    """Against what another contender saved as the truth: one key more is not right."""
    import numpy as np

    small = bench.Shape(96, 10, heads=2, kv_heads=1, head_size=16)
    worker = bench.WithJax(dry=True)
    worker.truth(small, tmp_path)
    assert bench.compare(worker.results("cudnn", small), tmp_path)["wrong"] == ""
    more = dataclasses.replace(small, window=11)
    assert "out is off by" in bench.compare(worker.results("cudnn", more), tmp_path)["wrong"]
    assert np.load(tmp_path / "truth_out.npy").shape == (1, 96, 2, 16)


def test_options_are_verified(monkeypatch):
    """Of a kernel that the CPU has; what it lacks is said, not tried."""
    worker = bench.WithJax(dry=True)
    monkeypatch.setattr(bench, "OURS", "blockwise")
    assert worker.verify({"seq_len": 40, "window": 9, "head_size": 16, "segments": True}) == ""
    monkeypatch.setattr(bench, "OURS", "pallas_gpu")
    assert worker.verify({"head_size": 24}).startswith("it lacks ")
    asked = bench.requests(quick=False, dry=False)
    assert {change.get("head_size", 128) for change in asked} == {64, 80, 96, 128, 192, 256}
    assert {key for change in asked for key in change} >= {"segments", "alibi", "softcap", "sinks", "sequence_shards", "causal"}


@pytest.mark.parametrize(("length", "window"), [(7, 1), (7, 3), (7, 7), (7, 9), (7, 0)])
def test_pairs(length, window):
    W = window or length
    seen = sum(1 for i in range(length) for j in range(length) if i - W < j <= i)
    shape = bench.Shape(length, window, heads=4, kv_heads=2, head_size=8, batch=3)
    assert shape.pairs == 3 * seen
    assert shape.flops("forward") == 4 * 4 * 8 * 3 * seen
    assert shape.flops("backward") == 2.5 * shape.flops("forward")


@pytest.mark.parametrize("quick", [False, True])
def test_what_matters_most_comes_first(quick):
    check, timed = bench.shapes(quick, dry=False)
    assert str(timed[0]) == "T=32768 W=4096 h=128 heads 32/8 B=1"
    assert timed[0] in check
    assert len(set(timed)) == len(timed)
    assert {shape.batch * shape.length for shape in timed} == {32768}
    assert {shape.head_size for shape in timed} == {128, 192}
    assert all(shape.window < shape.length for shape in timed)
    if not quick:
        assert {shape.length for shape in timed} == {2048, 4096, 8192, 16384, 32768}
        assert {shape.window for shape in timed} == {1024, 4096, 0}


def test_ratio_is_the_worse_pass_of_the_first_shape():
    def entry(shape, ours, rival):
        figures = [{which: bench.figures(shape, which, [ms / 1e3]) for which, ms in zip(bench.PASSES, pair, strict=True)}
                   for pair in (ours, rival)]  # fmt: skip
        return {"shape": dataclasses.asdict(shape), bench.OURS: figures[0], bench.RIVAL: figures[1]}

    first, second, full = bench.Shape(32768, 4096), bench.Shape(8192, 1024, batch=4), bench.Shape(32768, 0)
    timed = [entry(first, (3.0, 10.0), (4.5, 12.0)), entry(second, (2.0, 4.0), (1.8, 8.0)), entry(full, (9.0, 9.0), (3.0, 3.0))]
    result, last = bench.conclude(timed)
    assert result["ratio"] == 1.2
    assert result["worst_window_ratio"] == 0.9
    assert last.startswith("ratio: 1.20  pallas_gpu/cudnn")
    assert f"forward ({first.flops('forward') / 3e-3 / 1e12:.0f}, aim 550)" in last
    result, last = bench.conclude([entry(first, (3.0, 10.0), (4.5, 12.0)) | {bench.OURS: {"error": "it broke"}}])
    assert result["ratio"] is None
    assert last.startswith("ratio: none  no figure for pallas_gpu") and last.endswith("it broke")
