"""A disk that is full for real: a small tmpfs in a user namespace. Checkpoint bytes are written by C++ threads."""

from __future__ import annotations

import re
import subprocess
import sys
import types

import pytest

SCRIPT = """
set -u
mount -t tmpfs -o size={small} none "$1"
"$2" -m neo.train --config="$3" --workdir="$1/run" --config.data.store="$4" {flags}
echo "first: $?" >&2
ls "$1/run/checkpoints" >&2
mount -o remount,size=64m "$1"
"$2" -m neo.train --config="$3" --workdir="$1/run" --config.data.store="$4" {flags}
echo "second: $?" >&2
cp -r "$1/run" "$5"
"""


@pytest.fixture(scope="module", autouse=True)
def namespaces():
    tried = subprocess.run(["unshare", "-rm", "sh", "-c", "mount -t tmpfs none /mnt"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no user namespaces with mounts here: {tried.stderr.strip()}")


# A checkpoint of the tiny model takes some 500 KB. The first size has room for one; the second for none.
@pytest.mark.parametrize(("size", "flags", "good"), [
    ("1000k", "--config.checkpoint.every_steps=4 --config.checkpoint.keep_last=9", True),
    ("300k", "--config.checkpoint.every_steps=4", False),
], ids=["one_checkpoint", "no_checkpoint"])
def test_full_disk_stops_for_a_person_and_goes_on_when_there_is_room(tiny, store, environment, same_end, tmp_path, size, flags,
                                                                     good):
    from neo.config import load
    from neo.train.runner import run
    mount, copy = tmp_path / "disk", tmp_path / "copy"
    mount.mkdir()
    ended = subprocess.run(
        ["unshare", "-rm", "bash", "-c", SCRIPT.format(small=size, flags=flags), "bash", mount, sys.executable, tiny, store,
         copy], env=environment, capture_output=True, text=True, timeout=300)
    first, second = ended.stderr.split("first: ")
    lines = [line for line in first.strip().splitlines() if line.startswith("neo.train: error: ")]
    assert lines, first
    assert "Traceback" not in ended.stderr, ended.stderr
    assert second.startswith("3\n"), ended.stderr
    assert lines[-1].startswith("neo.train: error: the disk of ") and "is full" in lines[-1]
    assert sum("error" in line.lower() for line in first.splitlines()) == 1, first
    if good:
        step = re.search(r"last good checkpoint is \S+/checkpoints/(\d+);", lines[-1])[1]
        assert step in second.split("neo.train")[0].splitlines()
        assert f"(step {step}," in second, "resumed from the last good one"
    else:
        assert "no checkpoint was written yet" in lines[-1]
    assert "second: 0" in second, second
    whole = tmp_path / "whole"
    run(load(tiny, {"data.store": str(store)}), whole)
    same_end(whole, copy)


def test_only_late_writers_are_silent(monkeypatch):
    from neo.train import checkpoints
    passed = []
    monkeypatch.setattr(checkpoints, "_unraisable", passed.append)
    for error in (RuntimeError("Event loop is closed"), RuntimeError("other"), ValueError("Event loop is closed")):
        checkpoints._without_late_writers(types.SimpleNamespace(exc_value=error))
    assert [str(one.exc_value) for one in passed] == ["other", "Event loop is closed"]
