"""bench/train_gpu.py runs from end to end without a GPU, with the same numbers on both sides, and concludes rightly."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import train_gpu as bench

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(ROOT / "bench/train_gpu.py"), *arguments], capture_output=True, text=True,
                          check=False, timeout=600, env={**os.environ, **environment})


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="this machine may have a GPU")
def test_without_a_gpu():
    done = run()
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "needs an NVIDIA GPU" in done.stderr


def test_dry_run(tmp_path):
    """The code that a GPU will run, on a toy: both contenders, and they compute the same."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    out = tmp_path / "figures.json"
    done = run("--dry", f"--out={out}")
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-3000:]
    assert done.stdout.splitlines()[-1].startswith("ratio: ")
    (shape,) = json.loads(out.read_text())["shapes"]
    losses = shape["results"]["ours"]["losses"]
    # bfloat16 in another order; one step later the loss is another one by far more.
    assert shape["loss_gap"] < 2e-3 < min(abs(a - b) for a, b in zip(losses, losses[1:], strict=False))
    assert abs(losses[0] - math.log(bench.TOY.vocab)) < 0.1
    assert shape["results"]["again"]["losses"] == losses
    assert shape["results"]["torch"]["parameters"] == shape["parameters"] + (2 * bench.TOY.layers + 1) * bench.TOY.d
    assert shape["ratio"] == min(shape["tokens_per_s"][name] for name in ("ours", "again")) / shape["tokens_per_s"]["torch"]


def test_shapes_are_the_published_models():
    # Parameters of the model cards, norm gains included: they are the rest.
    for shape, published in zip(bench.SHAPES, (1.2358e9, 3.2127e9, 7.2417e9), strict=True):
        assert abs(shape.parameters() + (2 * shape.layers + 1) * shape.d - published) < 1e-4 * published
        assert shape.tokens == 32768


@pytest.mark.parametrize("gigabytes, layers", [(73, 12), (129, 23), (400, 32)])
def test_7b_is_as_deep_as_the_card_allows(gigabytes, layers):
    deep = bench.as_deep_as_fits(bench.SHAPES[2], gigabytes * 1e9)
    assert deep.layers == layers
    assert layers == 32 or deep.parameters() * 18 < gigabytes * 0.75e9 < deep.parameters(layers + 1) * 18
    assert bench.as_deep_as_fits(bench.SHAPES[0], 73e9) == bench.SHAPES[0]


def test_settings_are_tried_until_one_fits(monkeypatch):
    tried = []

    def attempt(contender, shape, setting, args, cache):
        tried.append(setting)
        return {"step_s": 1.0} if setting == {"micro_batch": 8, "recompute": False} else {"out_of_memory": "Tried to allocate"}
    monkeypatch.setattr(bench, "attempt", attempt)
    shape, args = bench.SHAPES[0], argparse.Namespace()
    assert bench.first_that_fits("torch", shape, args, "", 1e15) == {"step_s": 1.0}
    assert tried == [{"micro_batch": 16, "recompute": False}, {"micro_batch": 8, "recompute": False}]
    tried.clear()
    failed = bench.first_that_fits("ours", shape, args, "", 1e15)["error"]
    assert [setting["remat"] for setting in tried] == ["none", "minimal", "lean", "attention", "full"]
    assert "no setting fits" in failed and "Tried to allocate" in failed
    tried.clear()   # what cannot fit is not compiled
    assert "by the estimate" in bench.first_that_fits("torch", shape, args, "", 1e9)["error"] and not tried


def test_memory_errors_are_told_from_others(monkeypatch):
    def broken(text):
        def prepare(*_):
            raise RuntimeError(text)
        return prepare
    for text in ("CUDA out of memory. Tried", "RESOURCE_EXHAUSTED: Out of memory", "needs 9 GB per device, which has 8"):
        monkeypatch.setitem(bench.CONTENDERS, "ours", (broken(text), None, None))
        assert "out_of_memory" in bench.work("ours", bench.TOY, {}, 1, 0.0, True)
    monkeypatch.setitem(bench.CONTENDERS, "ours", (broken("shapes differ"), None, None))
    with pytest.raises(RuntimeError, match="shapes differ"):
        bench.work("ours", bench.TOY, {}, 1, 0.0, True)


def test_the_slower_of_our_two_figures_counts_and_other_losses_fail(capsys):
    def result(step_s, losses=(6.0, 5.9)):
        return {"step_s": step_s, "losses": list(losses), "peak_flops": 1e12}

    shape = bench.SHAPES[0]
    good = bench.figures(shape, {"ours": result(1.0), "torch": result(1.5), "again": result(1.2)})
    assert good["ratio"] == pytest.approx(1.5 / 1.2)
    assert good["mfu"]["ours"] == pytest.approx(1.2 * good["mfu"]["again"])
    assert bench.conclude([good]) == 0
    other = bench.figures(shape, {"ours": result(1.0), "torch": result(1.5, (6.0, 5.6)), "again": result(1.0)})
    assert bench.conclude([good, other]) == 1
    assert "losses differ by 0.300" in capsys.readouterr().out
    assert bench.conclude([{"shape": {"name": "1b"}, "error": "it ended"}]) == 1
    assert capsys.readouterr().out.splitlines() == ["failed: it ended", "ratio: none"]
