"""Real processes train together; and what goes wrong between processes is told in one line by each."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from neo.train.workdir import Run

# What a process runs; the waiting times are those of a test.
SCRIPT = """
from neo.parallel import distributed
distributed.SHARED_SECONDS = 4
{prelude}
from neo.cli import main
from neo.train.__main__ import COMMAND, run
main(COMMAND, run)
"""


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


@pytest.fixture
def together(tiny, environment, tmp_path):
    """together(n, workdir, **fields) -> [(exit code, stdout, stderr)] of n processes.

    `folders`: each in its own; `own`: fields of single processes; `prelude`: run before anything else.
    """
    running = []

    def start(count, workdir, folders=None, port=None, processes=None, own=None, prelude="", **fields):
        port = port or free_port()
        running.clear()
        for i in processes or range(count):
            argv = [f"--config={tiny}", f"--workdir={workdir}", f"--coordinator=localhost:{port}",
                    f"--num_processes={count}", f"--process_id={i}"]
            chosen = {"data__synthetic": True, "train__steps": 6, "train__join_seconds": 120, "train__heartbeat_seconds": 30,
                      **fields, **(own or {}).get(i, {})}
            argv += [f"--config.{name.replace('__', '.')}={value}" for name, value in chosen.items()]
            out, err = (open(tmp_path / f"{kind}{i}", "w+") for kind in ("out", "err"))   # noqa: SIM115
            running.append((subprocess.Popen([sys.executable, "-c", SCRIPT.format(prelude=prelude), *argv], env=environment,
                                             cwd=folders[i] if folders else tmp_path, stdout=out, stderr=err), out, err))
        ended = []
        for process, out, err in running:
            code = process.wait(240)
            out.seek(0), err.seek(0)
            # Gloo, the collectives of CPU devices, greets on stdout from C++.
            said = "".join(line for line in out if not line.startswith("[Gloo]"))
            ended.append((code, said, err.read()))
        return ended
    yield start
    for process, out, err in running:
        process.kill()
        process.wait()
        out.close(), err.close()


@pytest.fixture
def alone(together):
    """alone(workdir, **fields) -> Run of one process on one device. Not in this process, which may have more devices."""
    def start(workdir, **fields):
        ((code, _, err),) = together(1, workdir, **fields)
        assert code == 0, err
        return Run(workdir)
    return start


def error_of(err):
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("neo.train: error: ") and "Traceback" not in err, err
    return lines[0]


def test_two_processes_train_what_one_trains(together, alone, tmp_path):
    ended = together(2, tmp_path / "two")
    assert [code for code, *_ in ended] == [0, 0], ended
    assert "step 6 of 12" in ended[0][1] and ended[1][1] == "", "process 0 alone prints the result"
    assert "step 6/" in ended[0][2] and "step 6/" not in ended[1][2]

    two = Run(tmp_path / "two")
    assert [path.name for path in (tmp_path / "two" / "metrics").iterdir()] == ["0.jsonl"]
    assert [event["event"] for event in two.events()] == ["start", "save", "save", "finish"]
    assert two.events()[0]["devices"] == 2
    assert sorted(path.name for path in (tmp_path / "two" / "logs").iterdir()) == ["process_000.log", "process_001.log"]
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["processes"] == 2

    one = alone(tmp_path / "one")
    losses = [[record["train/loss"] for record in each.records() if "train/loss" in record] for each in (two, one)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)   # sums over devices are added in another order

    # The checkpoint is complete: one process goes on from it, on one device.
    more = alone(tmp_path / "two", train__steps=7)
    assert more.events()[-3]["event"] == "resume" and more.events()[-3]["step"] == 6


def test_a_sequence_on_two_processes(together, alone, tmp_path):
    """Each reads the rows of all sequences and places its half of their tokens; keys travel between the processes."""
    small = {"model__num_layers": 1, "model__windows": "(0,)", "train__steps": 3}
    ended = together(2, tmp_path / "two", **small, mesh__fsdp=1, mesh__context=2)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert re.search("mesh +context=2", ended[0][2])

    one = alone(tmp_path / "one", **small)
    losses = [[record["train/loss"] for record in each.records() if "train/loss" in record]
              for each in (Run(tmp_path / "two"), one)]
    assert len(losses[0]) == 3
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)


def test_a_workdir_that_is_not_shared_names_the_process(together, tmp_path):
    folders = [tmp_path / "host0", tmp_path / "host1"]
    for folder in folders:
        folder.mkdir()
    for code, out, err in together(2, "runs/x", folders):
        assert code == 2 and out == ""
        text = error_of(err)
        assert "workdir runs/x is not shared: process 1 cannot read what process 0 wrote" in text and "gs://" in text
    assert not any(path.is_file() for path in tmp_path.glob("host*/**/*")), "nothing is left behind"


# A signal, by the process that begins step {step} and is number {process}: to the one that watches over it, as a
# scheduler sends it to what it has started. What came before has been saved.
AT_STEP = """
import os, pathlib, signal, sys, time
from neo.parallel.watch import Channel
begin = Channel.begin
def begun(self, step):
    stopping = begin(self, step)
    if step == {step} and self._process == {process}:
        while {saved} and not pathlib.Path({workdir!r}, "checkpoints", "{saved}").exists():
            time.sleep(0.05)
        os.kill(os.getppid(), signal.{signal})
    return stopping
Channel.begin = begun
"""


def losses_of(workdir):
    return {record["step"]: record["train/loss"] for record in Run(workdir).records() if "train/loss" in record}


def step_in(line):
    return int(line.split(" at step ")[1].split(",")[0])


def test_one_curve_through_kills_signals_and_other_numbers_of_processes(together, alone, tmp_path):
    """Two processes, one is killed; four go on, one gets SIGTERM; two go on, one gets Ctrl-C; one goes on to the end."""
    def leg(count, step, process, number, saved=0):
        begun = time.monotonic()
        ended = together(count, tmp_path / "run", train__steps=0, checkpoint__every_steps=4, prelude=AT_STEP.format(
            step=step, process=process, signal=number, saved=saved, workdir=str(tmp_path / "run")))
        return ended, time.monotonic() - begun

    (first, second), seconds = leg(2, 6, 1, "SIGKILL", saved=4)
    assert second[0] == -signal.SIGKILL and first[0] == 75, (first, second)
    line = error_of(first[2])
    assert "process 1 of 2 (" in line and "ended without a word" in line and "start the same command again" in line
    assert max(losses_of(tmp_path / "run")) < 12 and seconds < 240, "long before the run's own end; see together()"

    ended, _ = leg(4, 6, 2, "SIGTERM")
    assert [code for code, *_ in ended] == [75] * 4, ended
    assert f"resuming from {tmp_path / 'run' / 'checkpoints' / '4'}" in ended[0][2]
    lines = [error_of(err) for _, _, err in ended]
    [stopped] = set(map(step_in, lines))
    assert 6 <= stopped <= 8, lines
    assert [("SIGTERM on process 2 of 4 (" in line, "SIGTERM at step" in line) for line in lines] == [
        (True, False), (True, False), (False, True), (True, False)]
    assert [(event["event"], event["step"]) for event in Run(tmp_path / "run").events()][-3:] == [
        ("resume", 4), ("save", stopped), ("stop", stopped)]

    ended, _ = leg(2, stopped + 1, 0, "SIGINT")
    assert [code for code, *_ in ended] == [130] * 2, ended
    lines = [[line for line in err.splitlines() if line.startswith("neo.train: stopped by SIGINT")][-1] for *_, err in ended]
    assert step_in(lines[0]) == step_in(lines[1]) > stopped and "SIGINT on process 0 of 2" in lines[1]

    assert alone(tmp_path / "run", train__steps=12).result()["step"] == 12
    alone(tmp_path / "one", train__steps=12)
    moved, one = losses_of(tmp_path / "run"), losses_of(tmp_path / "one")
    assert sorted(moved) == sorted(one) == list(range(1, 13))
    # Sums over devices are added in another order; nothing else differs, or later steps would be far off.
    np.testing.assert_allclose([moved[i] for i in sorted(one)], [one[i] for i in sorted(one)], rtol=2e-4)


def test_a_process_that_never_comes_is_named(together, tmp_path):
    ended = together(4, tmp_path / "x", processes=[0, 2], train__join_seconds=4)
    for code, out, err in ended:
        assert code == 2 and out == ""
        assert "processes 1, 3 of 4 did not join within 4 s (here: 0 on " in error_of(err), err
    assert not (tmp_path / "x").exists()


def test_a_process_with_another_config_is_named(together, tmp_path):
    for code, out, err in together(2, tmp_path / "x", own={1: {"optimizer__clip_norm": 0.25}}):
        assert code == 2 and out == ""
        text = error_of(err)
        assert "process 1 (" in text and "config.optimizer.clip_norm is 0.25 there and 1.0 on process 0" in text
    assert not (tmp_path / "x").exists()


def test_a_clock_that_is_off_is_named(together, tmp_path):
    off = """
import sys, time
from neo.parallel import distributed, rendezvous
if "--process_id=1" in sys.argv:
    meet = rendezvous.meet
    distributed.rendezvous.meet = lambda *given: meet(*given, clock=lambda: time.time() - 3600)
"""
    for code, _, err in together(2, tmp_path / "x", prelude=off):
        assert code == 2 and "the clock of process 1 (" in error_of(err) and "3600 s behind" in error_of(err)
    assert not (tmp_path / "x").exists()


def test_a_coordinator_that_does_not_answer(together, tmp_path):
    port = free_port()
    [(code, out, err)] = together(2, tmp_path / "x", port=port, processes=[1], train__join_seconds=3)
    assert code == 2 and out == ""
    assert f"localhost:{port}" in error_of(err) and "cannot be reached" in error_of(err)


def test_a_port_that_is_taken(together, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        [(code, out, err)] = together(2, tmp_path / "x", port=port, processes=[0], train__join_seconds=3)
    assert code == 2 and out == ""
    assert f"localhost:{port}" in error_of(err) and "port" in error_of(err)
