"""Guards and their children: real processes, sockets and signals, without JAX. With training: tests/multi_process."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from neo.errors import RestartSafe
from neo.parallel.rendezvous import Lines, Meeting
from neo.parallel.watch import Channel, Stopping

# One process of a run: it meets the others, splits, and "trains" 100 steps unless its part says otherwise.
SCRIPT = """
import sys, time, signal, os
from neo.cli import Argument, Command, main
from neo.errors import *
from neo.parallel import watch
from neo.parallel.cluster import Place
from neo.parallel.rendezvous import meet
watch.GRACE_SECONDS = watch.SAME_SECONDS = {grace}
watch.SETTLE_SECONDS, watch.CLOSING_SECONDS, watch.SECOND_SECONDS = 0.7, 10.0, 1.0

def run(args):
    me = {process}
    meeting = meet(Place("localhost:{port}", {count}, me, "flags"), {{}}, 20.0, f"host{{me}}")
    channel = watch.split(me, meeting, {heartbeat})
    got = []
    def say(text):
        print(text, flush=True)
    def train(steps=400, slow=0.01):
        signal.signal(signal.SIGTERM, lambda number, _: got.append("SIGTERM"))
        signal.signal(signal.SIGINT, lambda number, _: got.append("SIGINT"))
        def stop(why, step):
            kind = KeyboardInterrupt if why.startswith("SIGINT") else RestartSafe
            raise kind(f"stopped by {{why}} at step {{step}}, saved")
        for step in range(1, steps + 1):
            if why := channel.begin(step):
                stop(why, step - 1)
            if step == 1:
                say(f"child {{os.getpid()}} of {{os.getppid()}}")
            time.sleep(slow)
            why = channel.stop(step, got[0] if got else "")
            if why and step < steps:
                stop(why, step)
        say(f"finished {{step}}")
    with channel:
        {part}

main(Command("x", "x"), run, [])
"""
LONG = "train(10**6)"


@pytest.fixture
def processes(tmp_path):
    """processes([part, ...], heartbeat=, grace=) -> Run of that many processes."""
    runs = []

    class Run:
        def __init__(self, parts, heartbeat=5.0, grace=0.5):
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            self.all, self.files = [], []
            for i, part in enumerate(parts):
                script = SCRIPT.format(process=i, count=len(parts), port=port, part=part, heartbeat=heartbeat, grace=grace)
                files = [open(tmp_path / f"{len(runs)}-{i}-{kind}", "w+") for kind in ("out", "err")]   # noqa: SIM115
                self.files.append(files)
                self.all.append(subprocess.Popen([sys.executable, "-c", script], stdout=files[0], stderr=files[1],
                                                 env={**os.environ, "PYTHONPATH": os.getcwd()}))
            runs.append(self)

        def children(self):
            """Process ids of those that train, once all do."""
            found = []
            for process, (out, _) in zip(self.all, self.files, strict=True):
                for _ in range(3000):
                    if "\n" in (said := Path(out.name).read_text()):
                        break
                    assert process.poll() is None, self.end()
                    time.sleep(0.01)
                child, parent = re.match(r"child (\d+) of (\d+)", said).groups()
                assert int(parent) == process.pid
                found.append(int(child))
            return found

        def end(self):
            """[(exit code, stdout, stderr)]"""
            return [(process.wait(30), *(Path(file.name).read_text() for file in files))
                    for process, files in zip(self.all, self.files, strict=True)]
    yield Run
    for run in runs:
        for process in run.all:
            process.kill()
            process.wait()
        for file in itertools.chain(*run.files):
            file.close()


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch, root):
    monkeypatch.chdir(root)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{pid}/stat") as file:
        return file.read().split()[2] != "Z"


def gone(pid):
    """Wait until a process has ended, a minute at most."""
    for _ in range(600):
        if not alive(pid):
            return True
        time.sleep(0.1)
    return False


def error_of(ended, code):
    status, _, err = ended
    lines = err.strip().splitlines()
    assert status == code and "Traceback" not in err, ended
    return lines[-1]


def test_all_finish(processes):
    run = processes(["train(5)"] * 3)
    children = run.children()
    assert [(code, out.splitlines()[1:], err) for code, out, err in run.end()] == [(0, ["finished 5"], "")] * 3
    assert not any(map(alive, children))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("which", [0, 2])
def test_a_signal_to_one_stops_all_after_the_same_step(processes, number, which):
    run = processes(["train(10**6)", "train(10**6, slow=0.03)", "train(10**6)"])   # process 1 lags behind
    run.children()
    time.sleep(0.3)
    run.all[which].send_signal(number)
    code = 130 if number == signal.SIGINT else 75
    lines = [error_of(one, code) for one in run.end()]
    assert len({re.search(r"at step (\d+), saved$", line)[1] for line in lines}) == 1, lines
    for i, line in enumerate(lines):
        assert (f"{number.name} on process {which} of 3 (host{which}) at step" in line) == (i != which), lines


def test_a_signal_to_all_and_to_the_children(processes):
    run = processes([LONG] * 3)
    for child in run.children():
        os.kill(child, signal.SIGTERM)
    for process in run.all:
        process.send_signal(signal.SIGTERM)
    lines = [error_of(one, 75) for one in run.end()]
    assert len({re.search(r"at step (\d+), saved$", line)[1] for line in lines}) == 1, lines


def test_a_signal_in_the_last_steps_comes_too_late(processes):
    """Process 0 has nothing left to do when the others are told to stop: all run to the end."""
    run = processes(["train(3, slow=0.0)", "train(3, slow=0.5)"])
    run.children()
    run.all[1].send_signal(signal.SIGTERM)
    assert [(code, out.splitlines()[1:]) for code, out, _ in run.end()] == [(0, ["finished 3"])] * 2


@pytest.mark.parametrize(("victim", "which"), [("child", 0), ("child", 1), ("guard", 0), ("guard", 1)])
def test_a_killed_process_is_named_by_all_others(processes, victim, which):
    run = processes([LONG] * 3)
    children = run.children()
    os.kill(children[which] if victim == "child" else run.all[which].pid, signal.SIGKILL)
    ended = run.end()
    assert all(map(gone, children)), "a child must not outlive its guard"
    how = "was killed by SIGKILL" if victim == "child" else "ended without a word"
    for i, one in enumerate(ended):
        if i == which and victim == "guard":
            assert one[0] == -signal.SIGKILL
            continue
        line = error_of(one, 75)
        assert line.startswith(f"x: error: process {which} of 3 (host{which}) {how}") and "start the same command again" in line
        assert (f"process {i} of 3 (host{i}) was ended too" in line) == (i != which), line


def test_a_frozen_machine_is_missed(processes):
    run = processes([LONG] * 3, heartbeat=1.5)
    run.children()
    os.kill(run.all[1].pid, signal.SIGSTOP)
    for i in (0, 2):
        assert run.all[i].wait(30) == 75
        assert "process 1 of 3 (host1) has not been heard of for 1.5 s" in Path(run.files[i][1].name).read_text()
    # Woken up, it finds itself alone and ends, too.
    run.all[1].send_signal(signal.SIGCONT)
    assert run.all[1].wait(60) == 75


@pytest.mark.parametrize(("error", "code"), [("InputError", 2), ("StoppedForPerson", 3), ("RestartSafe", 75)])
def test_what_stops_one_stops_all_with_its_text(processes, error, code):
    run = processes([LONG, f"train(3); raise {error}('no good')", LONG])
    lines = [error_of(one, code) for one in run.end()]
    assert lines[1] == "x: error: no good"
    for i in (0, 2):
        assert lines[i].startswith(f"x: error: process 1 of 3 (host1): no good; process {i} of 3 (host{i}) was ended too")
        assert ("start the same command again" in lines[i]) == (code == 75)


def test_all_stop_for_the_same_reason_in_their_own_words(processes):
    run = processes([f"train(3); raise InputError('no good, says {i}')" for i in range(3)], grace=10.0)
    assert [error_of(one, 2) for one in run.end()] == [f"x: error: no good, says {i}" for i in range(3)]


def test_a_bug_shows_its_traceback_once_and_restarts_the_others(processes):
    run = processes([LONG, "train(3); 1 / 0"])
    first, second = run.end()
    assert second[0] == 1 and "ZeroDivisionError" in second[2] and "a bug in neo" in second[2]
    assert "process 1 of 2 (host1): ZeroDivisionError: division by zero" in error_of(first, 75)


def test_the_echo_of_a_loss_is_not_taken_for_a_bug(processes):
    """What collectives do when a peer is gone: one raises, another aborts from C++."""
    killed = "train(3); os.kill(os.getpid(), signal.SIGKILL)"
    for echo in ("train(40); raise RuntimeError('Connection closed by peer')", "train(40); os.abort()"):
        run = processes([killed, echo], grace=5.0)
        line = error_of(run.end()[1], 75)
        assert "process 0 of 2 (host0) was killed by SIGKILL" in line, line


def test_signals_before_training_end_all(processes):
    run = processes(["say('child %d of %d' % (os.getpid(), os.getppid())); time.sleep(60)"] * 2)
    run.children()
    run.all[1].send_signal(signal.SIGTERM)
    first, second = run.end()
    assert "x: error: stopped by SIGTERM outside training, nothing saved" in error_of(second, 75)
    assert "process 1 of 2 (host1)" in error_of(first, 75)


def test_a_second_ctrl_c_leaves_at_once(processes):
    """Even where the child does not hear it any more."""
    stuck = "say('child %d of %d' % (os.getpid(), os.getppid())); signal.signal(2, lambda *_: None); time.sleep(60)"
    run = processes([stuck, LONG])
    run.children()
    for _ in range(2):
        run.all[0].send_signal(signal.SIGINT)
        time.sleep(0.2)
    assert "stopped by SIGINT" in error_of(run.end()[0], 130)


def test_a_child_that_hangs_at_its_end_does_not_hold_the_others(processes):
    run = processes(["train(3); signal.signal(15, lambda *_: None); import atexit; atexit.register(time.sleep, 60); "
                     "raise InputError('x')", LONG])
    assert [code for code, *_ in run.end()] == [2, 2]


def test_a_process_between_two_steps_stops_before_the_next():
    """Its answer is the step it has begun, and that may become the last one after it was looked at."""
    here, there = socket.socketpair()
    channel, guard = Channel(Lines(here), Meeting(["a", "b"], {}), 0), Lines(there)
    assert channel.begin(8) == "" and channel.stop(8, "SIGINT") == ""
    assert guard.receive() == [{"want": "SIGINT"}]
    guard.send(stopping={"name": "SIGINT", "process": 0})
    assert guard.receive() == [{"at": 8}]
    guard.send(stop_after=8)
    assert channel.begin(9) == "SIGINT"
    guard.close()


def test_a_guard_that_is_gone_ends_its_child():
    here, there = socket.socketpair()
    channel, guard = Channel(Lines(here), Meeting(["a", "b"], {}), 0), Lines(there)
    assert channel.begin(1) == ""
    guard.close()
    with pytest.raises(RestartSafe, match="gone"):
        while channel.begin(2) == "":
            time.sleep(0.01)


@pytest.mark.parametrize("signalled", [False, True])
def test_those_who_are_ready_wait_for_those_who_still_write(processes, signalled):
    """JAX's own shutdown would give up on them."""
    lines = ["import atexit", "atexit.register(lambda: say(f'left {time.monotonic()}'))", "try:",
             "    train(10**6)" if signalled else "    train(3)", "finally:", "    time.sleep(SLOW)",
             "    say(f'wrote {time.monotonic()}')"]
    part = "\n        ".join(lines)
    run = processes([part.replace("SLOW", "2.0"), part.replace("SLOW", "0.0")])
    run.children()
    if signalled:
        run.all[0].send_signal(signal.SIGTERM)
    times = []
    for code, out, _ in run.end():
        assert code == (75 if signalled else 0), out
        times.append({line.split()[0]: float(line.split()[1]) for line in out.splitlines() if line[0] in "lw"})
    wrote = max(each["wrote"] for each in times)
    assert all(each["left"] >= wrote for each in times) and wrote - times[1]["wrote"] > 1.0, times


def test_the_last_step_is_the_furthest_any_has_begun():
    agreement = Stopping(3)
    assert agreement.receive(1, {"at": 7}) == []
    assert agreement.receive(2, {"want": "SIGTERM"}) == [{"stopping": {"name": "SIGTERM", "process": 2}}]
    assert agreement.receive(0, {"want": "SIGINT"}) == [], "the first one counts"
    assert agreement.receive(0, {"at": 9}) == [] and agreement.receive(2, {"at": 8}) == [{"stop_after": 9}]
    assert agreement.receive(2, {"at": 8}) == []
