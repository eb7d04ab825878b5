"""Whole runs of a tiny model: finish, run again, stop, resume, change, refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal

import numpy as np
import pytest

from neo.config import load
from neo.data.ledger import Ledger
from neo.errors import InputError, RestartSafe
from neo.train.workdir import Run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny, store):
    """A run that was never stopped: 12 steps, phases of 8 and 4."""
    from neo.train.runner import run
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(load(tiny, {"data.store": str(store)}), folder)
    return folder


def last_event(workdir, kind):
    return [event for event in Run(workdir).events() if event["event"] == kind][-1]


def test_a_finished_run_prints_the_same_and_touches_nothing(whole, command, tree_state):
    before = tree_state(whole)
    first, second = command(whole), command(whole)
    assert first.code == second.code == 0
    assert first.out == second.out
    for part in ("tiny: step 12 of 12, 3,072 tokens", "held-out loss", "bits per byte", "unigram", "gzip", "neo.infer"):
        assert part in first.out
    assert tree_state(whole) == before


def test_a_finished_run_has_all_its_files(whole, tiny):
    names = {path.name for path in whole.iterdir()}
    assert names >= {"config.py", "config.json", "environment.json", "checkpoints", "metrics", "events.jsonl", "logs",
                     "result.json"}
    assert [event["event"] for event in Run(whole).events()] == ["start", "save", "save", "save", "finish"]
    assert sorted(path.name for path in (whole / "checkpoints").iterdir()) == ["12", "8"]
    assert "step 12" in (whole / "logs" / "process_000.log").read_text()
    assert json.loads((whole / "environment.json").read_text())["packages"]["jax"]
    assert Run(whole).config == load(tiny, {"data.store": Run(whole).config.data.store})
    metrics = Run(whole).metrics()
    steps = metrics["step"][~np.isnan(metrics["train/loss"])]
    assert steps.tolist() == list(range(1, 13))
    assert metrics["train/loss"][-2] < metrics["train/loss"][0]
    assert metrics["tokens"][-1] == 8 * 256 + 4 * 256
    assert metrics["step"][~np.isnan(metrics["eval/loss"])].tolist() == [6, 12]


def test_result_as_json(whole, command):
    result = json.loads(command(whole, "--json").out)
    assert (result["step"], result["tokens"], result["phase"]) == (12, 3072, "long")
    assert result["held_out"]["eval/loss"] == Run(whole).records()[-1]["eval/loss"]
    assert set(result["baselines"]) == {"unigram", "gzip", "xz"}


@pytest.mark.parametrize("stop", [3, 8, 10])   # in the first phase, at its end, in the second
def test_stop_step_and_resume_are_the_run_that_was_never_stopped(whole, command, same_end, tmp_path, stop):
    part = command(tmp_path / "run", train__steps=stop)
    assert part.code == 0 and f"step {stop} of 12" in part.out
    rest = command(tmp_path / "run")
    assert rest.code == 0
    assert f"(step {stop}," in rest.err and "resuming" in rest.err
    records = Run(tmp_path / "run").records()
    extra = [r["step"] for r in records if "eval/loss" in r]
    assert extra == sorted({6, stop, 12} if stop > 6 else {stop, 6, 12})
    # An evaluation at the stop is the only thing the other run has not.
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    for file in (tmp_path / "copy" / "metrics").iterdir():
        lines = [line for line in file.read_text().splitlines() if not ("eval/loss" in line and f'"step": {stop},' in line)]
        file.write_text("\n".join(lines) + "\n")
    same_end(whole, tmp_path / "copy")
    changed = last_event(tmp_path / "run", "resume")["changed"]
    assert changed == [f"config.train.steps: {stop} -> 0"]
    assert f"config.train.steps: {stop} -> 0" in rest.err


def test_from_python_the_same_run(whole, tiny, store, tmp_path):
    import neo
    run = neo.train.run(neo.config.load(tiny, {"data.store": str(store), "train.steps": 2}), workdir=tmp_path / "run")
    np.testing.assert_array_equal(run.metrics()["train/loss"][:2], Run(whole).metrics()["train/loss"][:2])
    assert run.result()["step"] == 2
    with pytest.raises(InputError, match="another identity"):
        neo.train.run(neo.config.load(tiny, {"data.store": str(store), "init.seed": 2}), workdir=tmp_path / "run")


@pytest.fixture
def at_step(monkeypatch):
    """at_step(step, action): call `action()` in the loop, when that many steps have been recorded."""
    def arrange(step, action):
        from neo.train.hooks import MetricsFile
        record = MetricsFile.record

        def recorded(self, values):
            record(self, values)
            if values["step"] == step and "train/loss" in values:
                action()
        monkeypatch.setattr(MetricsFile, "record", recorded)
    return arrange


def test_sigterm_saves_exits_75_and_goes_on(whole, command, same_end, at_step, tmp_path, monkeypatch):
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGTERM))
    stopped = command(tmp_path / "run")
    assert stopped.code == 75
    assert "SIGTERM" in stopped.error and "saved" in stopped.error and "same command" in stopped.error
    event = last_event(tmp_path / "run", "stop")
    assert event["reason"] == "SIGTERM"
    monkeypatch.undo()
    assert command(tmp_path / "run").code == 0
    assert last_event(tmp_path / "run", "resume")["step"] == event["step"] in (5, 6, 7)
    same_end(whole, tmp_path / "run")


def test_ctrl_c_saves_exits_130_and_goes_on(whole, command, same_end, at_step, tmp_path, monkeypatch):
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGINT))
    stopped = command(tmp_path / "run")
    assert stopped.code == 130
    assert "Traceback" not in stopped.err
    assert stopped.err.splitlines()[-1] == ("neo.train: stopped by SIGINT at step "
                                            f"{last_event(tmp_path / 'run', 'stop')['step']}, saved; "
                                            "the same command goes on from there")
    assert last_event(tmp_path / "run", "stop")["reason"] == "SIGINT"
    monkeypatch.undo()
    assert command(tmp_path / "run").code == 0
    same_end(whole, tmp_path / "run")


def test_second_ctrl_c_leaves_at_once(command, at_step, tmp_path, monkeypatch):
    from neo.train.checkpoints import Checkpoints
    from neo.train.workdir import read_records
    at_step(5, lambda: os.kill(os.getpid(), signal.SIGINT))
    real = Checkpoints.wait

    def slow(self):
        os.kill(os.getpid(), signal.SIGINT)   # while the checkpoint is written
        real(self)
    monkeypatch.setattr(Checkpoints, "wait", slow)
    stopped = command(tmp_path / "run")
    assert stopped.code == 130 and "Traceback" not in stopped.err
    assert read_records(tmp_path / "run")[-1]["step"] in (5, 6, 7)


def test_restart_safe_reaches_python_as_an_exception(tiny, store, at_step, tmp_path):
    import neo
    at_step(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(RestartSafe, match="SIGTERM"):
        neo.train.run(neo.config.load(tiny, {"data.store": str(store)}), workdir=tmp_path / "run")
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_nan_keeps_the_state_and_tells_step_documents_and_checkpoint(whole, command, saved, tmp_path, monkeypatch):
    from neo.data.loader import TrainData
    real = TrainData.host_batch

    def poisoned(self, step, rows=None):
        batch = real(self, step, rows)
        if step == 5:   # the sixth step
            batch["loss_mask"][0, 0] = np.nan
        return batch
    monkeypatch.setattr(TrainData, "host_batch", poisoned)
    stopped = command(tmp_path / "run", checkpoint__every_steps=1)
    assert stopped.code == 3
    error = stopped.error
    assert "loss is nan at step 6" in error
    assert f"{tmp_path / 'run' / 'checkpoints' / '5'}" in error
    event = last_event(tmp_path / "run", "not_finite")
    assert event["step"] == 6 and event["what"] == "loss"
    assert len(event["documents"]) >= 2
    assert all(name.split("/")[0] in ("a", "b") for name in event["documents"])
    assert all(name in error for name in event["documents"][:8])
    assert f"python -m neo.data.trace {tmp_path / 'run'} --step=6" in error
    traced = [f"{row.address.source}/{part.document}" for row in Ledger.of(tmp_path / "run").batch(6) for part in row.parts]
    assert list(dict.fromkeys(traced)) == event["documents"]
    # The last good state is that of the run without the NaN, and the next one was not written.
    assert sorted(int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir()) == [4, 5]
    again = command(tmp_path / "run", checkpoint__every_steps=1)
    assert again.code == 3 and "step 6" in again.error
    monkeypatch.undo()
    assert command(tmp_path / "run", checkpoint__every_steps=4).code == 0
    arrays, others = saved(whole, 12)[0], saved(tmp_path / "run", 12)[0]
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, others[name], err_msg=name)


def test_a_store_that_goes_away_leaves_a_checkpoint_of_the_step_before(whole, command, same_end, tmp_path, monkeypatch):
    from neo.data.loader import TrainData
    real = TrainData.host_batch

    def gone(self, step, rows=None):
        if step >= 5:
            raise RestartSafe("s3://bucket/store/a/train: the store does not answer, tried for 120 s")
        return real(self, step, rows)
    monkeypatch.setattr(TrainData, "host_batch", gone)
    stopped = command(tmp_path / "run", checkpoint__every_steps=100)
    assert stopped.code == 75 and "does not answer" in stopped.error
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["5"]
    monkeypatch.undo()
    assert command(tmp_path / "run").code == 0
    same_end(whole, tmp_path / "run")


def test_diverging_run_stops_before_any_checkpoint(command, tmp_path):
    stopped = command(tmp_path / "run", phases__short__peak_lr=1e38)
    assert stopped.code == 3
    assert "not" not in stopped.error.split("at step")[0]
    assert "there is no checkpoint yet" in stopped.error


def test_another_identity_is_refused_with_a_diff(whole, command, tree_state):
    before = tree_state(whole)
    refused = command(whole, model__num_layers=3, optimizer__b1=0.8)
    assert refused.code == 2
    assert "config.model.num_layers: 2 -> 3" in refused.error
    assert "config.optimizer.b1: 0.9 -> 0.8" in refused.error
    assert str(whole) in refused.error and "--workdir" in refused.error
    assert tree_state(whole) == before


def test_past_phases_are_identity_later_ones_are_not(command, tmp_path):
    assert command(tmp_path / "run", train__steps=3).code == 0
    refused = command(tmp_path / "run", phases__short__peak_lr=5e-3)
    assert refused.code == 2 and "phases[0].peak_lr: 0.01 -> 0.005" in refused.error
    longer = command(tmp_path / "run", phases__long__tokens=2 * 256)
    assert longer.code == 0 and "step 10 of 10" in longer.out
    assert "config.phases[1].tokens: 1024 -> 512" in last_event(tmp_path / "run", "resume")["changed"]


def test_operational_changes_are_noted(whole, command, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "12")
    went_on = command(tmp_path / "run", train__micro_batch=2, log__every_steps=2)
    assert went_on.code == 0
    assert last_event(tmp_path / "run", "resume")["changed"] == ["config.log.every_steps: 1 -> 2",
                                                                 "config.train.micro_batch: 0 -> 2"]
    assert "changed since the last start: config.train.micro_batch: 0 -> 2" in went_on.err
    # Four sequences in two passes are the same update up to float rounding.
    ours, other = Run(tmp_path / "run").records()[-1], Run(whole).records()[-1]
    assert ours["eval/loss"] == pytest.approx(other["eval/loss"], rel=1e-5)


def test_start_from_the_parameters_of_another_run(whole, command, saved, tmp_path):
    given = f"{whole}@8"
    started = command(tmp_path / "run", init__checkpoint=given, train__steps=1, phases__short__peak_lr=0,
                      phases__short__final_lr=0)
    assert started.code == 0 and f"{whole / 'checkpoints' / '8'}" in started.err
    ours, theirs = saved(tmp_path / "run", 1), saved(whole, 8)
    params = [name for name in ours[0] if name.startswith("params/")]
    assert params
    for name in params:   # a step with rate 0 leaves them as they are
        np.testing.assert_array_equal(ours[0][name], theirs[0][name])
    assert ours[0]["opt/count"] == 1 and ours[1]["step"] == 1 and ours[1]["tokens"] == 256
    # A resume takes this run's own checkpoint, not the named one again.
    assert "resuming from" in command(tmp_path / "run", init__checkpoint=given, train__steps=2,
                                      phases__short__peak_lr=0, phases__short__final_lr=0).err


def test_scale_tokens_shrinks_the_whole_run(command, tmp_path):
    small = command(tmp_path / "run", train__scale_tokens=0.25)
    assert small.code == 0 and "step 3 of 3, 768 tokens" in small.out
    assert [r["phase"] for r in Run(tmp_path / "run").records() if "train/loss" in r] == ["short", "short", "long"]
    assert command(tmp_path / "run", train__scale_tokens=0.25).out == small.out


REFUSED = {
    "other_model": (dict(model__d_ff=32), ["params/layers/mlp/down", "(2, 64, 32)", "(2, 32, 32)"]),
    "more_layers": (dict(model__num_layers=3), ["(2,", "(3,"]),
    "tied": (dict(model__tied_embeddings=True), ["holds params/head/kernel"]),
    "missing": (dict(init__checkpoint="nowhere"), ["nowhere", "does not exist"]),
    "no_such_step": (dict(init__checkpoint="{whole}@5"), ["step 5", "step 8", "step 12"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_checkpoint_that_does_not_fit_is_named(whole, command, tmp_path, name):
    overrides, parts = REFUSED[name]
    given = overrides.get("init__checkpoint", "{whole}").format(whole=whole)
    refused = command(tmp_path / "run", **{**overrides, "init__checkpoint": given})
    assert refused.code == 2
    assert [part for part in parts if part not in refused.error] == []
    assert "config.init.checkpoint" in refused.error or str(whole) in refused.error or "nowhere" in refused.error


def damage(folder):
    """Cut the largest file of a checkpoint in two."""
    largest = max((path for path in folder.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:largest.stat().st_size // 2])


@pytest.mark.parametrize("how", ["cut", "data_json", "no_metadata"])
def test_a_damaged_newest_checkpoint_is_named_and_can_be_left_out(whole, command, same_end, tmp_path, how):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    newest = tmp_path / "run" / "checkpoints" / "12"
    if how == "cut":
        damage(newest)
    elif how == "data_json":
        (newest / "data" / "data.json").write_text("{")
    else:
        shutil.rmtree(newest / "params")
    refused = command(tmp_path / "run")
    assert refused.code == 2
    assert str(newest) in refused.error and "move" in refused.error
    newest.rename(tmp_path / "bad")   # what the line says
    assert command(tmp_path / "run").code == 0
    same_end(whole, tmp_path / "run")


def test_a_foreign_folder_is_refused(command, tmp_path, tree_state):
    (tmp_path / "thesis.tex").write_text("x")
    before = tree_state(tmp_path)
    refused = command(tmp_path)
    assert refused.code == 2 and "thesis.tex" in refused.error and "--workdir" in refused.error
    file = command(tmp_path / "thesis.tex")
    assert file.code == 2 and "is a file" in file.error
    assert tree_state(tmp_path) == before


def test_damaged_small_files_are_named(whole, command, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text("{")
    refused = command(tmp_path / "run")
    assert refused.code == 2 and "config.json" in refused.error


def test_synthetic_data_is_marked_everywhere(command, tmp_path):
    done = command(tmp_path / "run", data__synthetic=True, train__steps=1)
    assert done.code == 0 and "synthetic" in done.out and "neo.infer" not in done.out
    assert json.loads((tmp_path / "run" / "checkpoints" / "1" / "data" / "data.json").read_text())["synthetic"] is True


def test_two_runs_in_one_process_keep_apart(command, tmp_path, tree_state):
    assert command(tmp_path / "one", train__steps=1, data__synthetic=True).code == 0
    before = tree_state(tmp_path / "one")
    assert command(tmp_path / "two", train__steps=1, data__synthetic=True, init__seed=3).code == 0
    assert tree_state(tmp_path / "one") == before
