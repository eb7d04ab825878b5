"""The table of metric names is what runs write: no more, no less."""

from __future__ import annotations

import numpy as np
import pytest

from neo.config import load
from neo.parallel import devices
from neo.parallel.devices import Peak
from neo.train.metrics import METRICS, known_metric, step_values
from neo.train.runner import run


@pytest.fixture(scope="module")
def records(tmp_path_factory, tiny, store):
    """Records of a run that has everything on: evaluation, z-loss, saves, and a device whose peak is known."""
    patch = pytest.MonkeyPatch()
    patch.setattr(devices, "PEAKS", (Peak("cpu", 1e12, "a test"),))
    config = load(tiny, {"data.store": str(store), "optimizer.z_loss": 1e-4, "log.tensorboard": True, "log.plot": True})
    try:
        return run(config, tmp_path_factory.mktemp("metrics") / "run")
    finally:
        patch.undo()


def test_names_of_records_are_the_table(records):
    written = {name for record in records.records() for name in record if name not in ("step", "tokens", "phase", "time")}
    assert all(known_metric(name) for name in written)
    general = {f"{name.rsplit('/', 1)[0]}/<source>" if name.endswith(("/a", "/b")) else name for name in written}
    assert general == set(METRICS) - {"data/weight/<source>"}, "which tests/train/test_reweighting.py has"


def test_every_record_is_stamped(records):
    for record in records.records():
        assert record["phase"] in ("short", "long")
        assert record["time"].endswith("+00:00")
        assert record["tokens"] == min(record["step"], 12) * 256
        assert all(np.isfinite(value) for name, value in record.items() if "/" in name)


def test_values_fit_together(records):
    metrics = records.metrics()
    trained = ~np.isnan(metrics["train/loss"])
    parts = [name for name in METRICS if name.startswith("goodput/")]
    shares = sum(metrics[name][trained] for name in parts)
    assert ((shares > 0.5) & (shares <= 1 + 1e-9)).all()
    assert (metrics["perf/mfu"][trained] >= metrics["perf/mfu_causal"][trained]).all()
    np.testing.assert_allclose(metrics["perf/tokens_per_s"][trained] * metrics["perf/step_s"][trained], 256, rtol=1e-6)
    held_out = ~np.isnan(metrics["eval/loss"])
    low = np.minimum(metrics["eval/loss/a"], metrics["eval/loss/b"])[held_out]
    high = np.maximum(metrics["eval/loss/a"], metrics["eval/loss/b"])[held_out]
    assert ((low <= metrics["eval/loss"][held_out]) & (metrics["eval/loss"][held_out] <= high)).all()
    assert metrics["optim/lr"][trained][:3].tolist() == pytest.approx([5e-3, 1e-2, 9.397e-3], rel=1e-3)


def test_pictures_and_scalars_are_written(records):
    folder = records.workdir.path
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    scalars = b"".join(file.read_bytes() for file in (folder / "tensorboard").iterdir())
    assert b"train/loss" in scalars and b"eval/bits_per_byte/a" in scalars


def test_sources_without_tokens_are_left_out():
    values = {"loss": 1.0, "accuracy": 0.5, "grad_norm": 1.0, "param_norm": 1.0, "z_loss": 0.0,
              "source_loss": [2.0, 0.0], "source_accuracy": [0.1, 0.0], "source_tokens": [3.0, 0.0]}
    record = step_values(values, ["a", "b"])
    assert record["train/loss/a"] == 2.0 and "train/loss/b" not in record and "train/z_loss" not in record


def test_unknown_names_are_unknown():
    assert known_metric("train/loss") and known_metric("train/loss/web") and not known_metric("train/los")
    assert not known_metric("optim/lr/web") and not known_metric("loss")
