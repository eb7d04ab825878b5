"""Two real processes train together; and what goes wrong between processes is told in one line by each."""

from __future__ import annotations

import json
import socket
import subprocess
import sys

import numpy as np
import pytest

from neo.config import load
from neo.train.workdir import Run

# What a process runs; the waiting times are those of a test.
SCRIPT = """
from neo.parallel import distributed
distributed.SHARED_SECONDS, distributed.JOIN_SECONDS = 4, {join}
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
    """together(n, [cwd...], **fields) -> [(exit code, stdout, stderr)] of n processes; each in its own folder if asked."""
    running = []

    def start(count, workdir, folders=None, port=None, processes=None, join=120, **fields):
        fields = {"data__synthetic": True, "train__steps": 6, **fields}
        for i in processes or range(count):
            argv = [f"--config={tiny}", f"--workdir={workdir}", f"--coordinator=localhost:{port or shared}",
                    f"--num_processes={count}", f"--process_id={i}"]
            argv += [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
            out, err = (open(tmp_path / f"{kind}{i}", "w+") for kind in ("out", "err"))   # noqa: SIM115
            running.append((subprocess.Popen([sys.executable, "-c", SCRIPT.format(join=join), *argv], env=environment,
                                             cwd=folders[i] if folders else tmp_path, stdout=out, stderr=err), out, err))
        ended = []
        for process, out, err in running:
            code = process.wait(240)
            out.seek(0), err.seek(0)
            # Gloo, the collectives of CPU devices, greets on stdout from C++.
            said = "".join(line for line in out if not line.startswith("[Gloo]"))
            ended.append((code, said, err.read()))
        return ended
    shared = free_port()
    yield start
    for process, out, err in running:
        process.kill()
        process.wait()
        out.close(), err.close()


def error_of(err):
    lines = [line for line in err.splitlines() if "error:" in line]
    assert len(lines) == 1 and lines[0].startswith("neo.train: error: ") and "Traceback" not in err, err
    return lines[0]


def test_two_processes_train_what_one_trains(together, tiny, tmp_path):
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

    from neo.train.runner import run
    one = run(load(tiny, {"data.synthetic": True, "train.steps": 6}), tmp_path / "one")
    losses = [[record["train/loss"] for record in each.records() if "train/loss" in record] for each in (two, one)]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)   # sums over devices are added in another order

    # The checkpoint is complete: one process goes on from it, on one device.
    more = run(load(tiny, {"data.synthetic": True, "train.steps": 7}), tmp_path / "two")
    assert more.events()[-3]["event"] == "resume" and more.events()[-3]["step"] == 6


def test_a_sequence_on_two_processes(together, tiny, tmp_path):
    """Each reads the rows of all sequences and places its half of their tokens; keys travel between the processes."""
    small = {"model__num_layers": 1, "model__windows": "(0,)", "train__steps": 3}
    ended = together(2, tmp_path / "two", **small, mesh__fsdp=1, mesh__context=2)
    assert [code for code, *_ in ended] == [0, 0], ended
    assert "mesh context=2" in ended[0][2]

    from neo.train.runner import run
    fields = {"data.synthetic": True, **{name.replace("__", "."): value for name, value in small.items()}}
    one = run(load(tiny, fields), tmp_path / "one")
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


def test_a_coordinator_that_does_not_answer(together, tmp_path):
    port = free_port()
    [(code, out, err)] = together(2, tmp_path / "x", port=port, processes=[1], join=3)
    assert code == 2 and out == ""
    assert f"localhost:{port}" in error_of(err) and "cannot be reached" in error_of(err)


def test_a_port_that_is_taken(together, tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        [(code, out, err)] = together(2, tmp_path / "x", port=port, processes=[0], join=3)
    assert code == 2 and out == ""
    assert f"localhost:{port}" in error_of(err) and "port" in error_of(err)
