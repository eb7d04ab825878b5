"""Processes killed with -9 at bad moments; the same command then ends in the state of a run never stopped."""

from __future__ import annotations

import json
import signal

import pytest

from neo.train.workdir import Run, read_records

# Each moment patches one function of the run so that the process kills itself inside it: a real SIGKILL, at a known place.
PRELUDE = """
import os, signal
def die():
    os.kill(os.getpid(), signal.SIGKILL)
"""
MOMENTS = {
    # Between two checkpoints, with the steps after the last one recorded.
    "in_step_7": """
import time
from neo.train.hooks import MetricsFile
record = MetricsFile.record
def recorded(self, values):
    record(self, values)
    if values["step"] == 7 and "train/loss" in values:
        while not (self._file._path.parent.parent / "checkpoints" / "4").exists():
            time.sleep(0.01)
        die()
MetricsFile.record = recorded
""",
    # The save of step 8 hangs in its background thread while training goes on, and dies with the process.
    "in_async_save": """
from neo.train import checkpoint_format, hooks
save = checkpoint_format.JsonFiles.save
async def slow(self, directory):
    write = await save(self, directory)
    async def late():
        if b'"step": 8' in self.files.get("data.json", b""):
            import asyncio
            await asyncio.sleep(1000)
        await write
    return late()
checkpoint_format.JsonFiles.save = slow
record = hooks.MetricsFile.record
def recorded(self, values):
    record(self, values)
    if values["step"] == 10 and "train/loss" in values:
        die()
hooks.MetricsFile.record = recorded
""",
    # Half of the run's config is on disk.
    "while_writing_config": """
from neo.train.workdir import Workdir
write = Workdir.write_text
def half(self, name, text):
    if name == "config.json":
        (self.path / f".{name}.new").write_text(text[:len(text) // 2])
        die()
    write(self, name, text)
Workdir.write_text = half
""",
    # All is trained and saved, the result is not written.
    "before_result": """
from neo.train import runner
runner._result = lambda *_: die()
""",
    # Half a line in the metrics and in the events.
    "in_a_line": """
from neo.train import workdir
write = workdir.JsonLines.write
def half(self, record):
    if record.get("event") == "save" and record["step"] == 8:
        with open(self._path, "a") as file:
            file.write('{"event": "sa')
        die()
    write(self, record)
workdir.JsonLines.write = half
""",
}
MAIN = """
from neo.cli import main
from neo.train.__main__ import COMMAND, run
main(COMMAND, run)
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny, store):
    from neo.config import load
    from neo.train.runner import run
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(load(tiny, {"data.store": str(store)}), folder)
    return folder


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_runs_end_as_if_never_stopped(whole, spawn, command, same_end, tmp_path, moment):
    process = spawn(tmp_path / "run", script=PRELUDE + MOMENTS[moment] + MAIN)
    _, err = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, err
    steps = {"in_step_7": 4, "in_async_save": 4, "while_writing_config": 0, "before_result": 12}
    again = command(tmp_path / "run")
    assert again.code == 0, again.err
    if moment in steps:
        assert (f"(step {steps[moment]}," in again.err) == (steps[moment] > 0), again.err
    same_end(whole, tmp_path / "run")
    assert [event["event"] for event in Run(tmp_path / "run").events()][-1] == "finish"
    for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines():
        assert line == '{"event": "sa' or json.loads(line)
    # What the killed start recorded past its last checkpoint is replaced, not doubled.
    steps = [record["step"] for record in read_records(tmp_path / "run") if "train/loss" in record]
    assert steps == list(range(1, 13))


def wait_for(process, text):
    """Read stderr until a line holds `text`."""
    seen = []
    for line in process.stderr:
        seen.append(line)
        if text in line:
            return
    raise AssertionError("".join(seen))


def test_sigterm_and_ctrl_c_from_outside(spawn, tmp_path):
    """Signals from another process, as a scheduler and a person send them."""
    long = dict(data__synthetic=True, phases__short__tokens=256 * 10**6, checkpoint__every_steps=0)
    process = spawn(tmp_path / "run", **long)
    wait_for(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 75 and out == "", err
    last = err.strip().splitlines()[-1]
    assert last.startswith("neo.train: error: stopped by SIGTERM at step ")
    step = int(last.split("at step ")[1].split(",")[0])
    process = spawn(tmp_path / "run", **long)
    wait_for(process, f"resuming from {tmp_path / 'run' / 'checkpoints' / str(step)}")
    wait_for(process, f"step {step + 3}/")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and out == "", err
    assert "Traceback" not in err and "saved" in err.strip().splitlines()[-1]
    assert [event["event"] for event in Run(tmp_path / "run").events()] == ["start", "save", "stop", "resume", "save", "stop"]
