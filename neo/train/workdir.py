"""The folder of a run: what is written where, and reading it back. Local, or any address etils knows.

    config.py config.json environment.json      as given; resolved; versions, devices, command line
    checkpoints/<step>/                         see checkpoint_format.py
    metrics/<first step>.jsonl                  one file per start
    events.jsonl                                starts, saves, resumes, changes, with reasons
    tensorboard/ logs/ samples.jsonl loss.png result.json compile_cache/ profile/
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from neo.errors import InputError


class JsonLines:
    """A growing .jsonl file. Object stores cannot append, so there it is written anew on every flush."""

    def __init__(self, path: epath.Path, keep: bool):
        self._path = path
        self._local = "://" not in str(path)
        before = path.read_text() if keep and path.exists() else ""
        self._lines = before.splitlines()
        # A killed process may have left half a line; what comes next must not be glued to it.
        self._cut = bool(before) and not before.endswith("\n")
        if self._local and not keep:
            path.write_text("")

    def write(self, record: Mapping[str, Any]) -> None:
        """Add one record and make it durable enough to be read by others."""
        line = json.dumps(record)
        self._lines.append(line)
        if self._local:
            with open(self._path, "a") as file:
                file.write("\n" * self._cut + line + "\n")
            self._cut = False
        else:
            self._path.write_text("\n".join(self._lines) + "\n")


class Workdir:
    """Paths and small files of one run."""

    def __init__(self, path: str | epath.Path):
        self.path = epath.Path(path)

    def create(self) -> None:
        """Make the folders. InputError when the place cannot be written."""
        try:
            for name in ("checkpoints", "metrics", "logs"):
                (self.path / name).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"workdir {self.path} cannot be made: {error.strerror or error}") from None

    def write_json(self, name: str, tree: Any) -> None:
        """Write a small JSON file whole: a process killed meanwhile leaves the old one."""
        self.write_text(name, json.dumps(tree, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """The same for text."""
        path = self.path / name
        if "://" in str(path):   # object stores write whole objects
            path.write_text(text)
            return
        new = self.path / f".{name}.new"
        new.write_text(text)
        new.replace(path)

    def read_json(self, name: str) -> Any | None:
        """A JSON file, or None when there is none. InputError when it is damaged."""
        path = self.path / name
        if not path.exists():
            return None
        try:
            return json.loads(path.read_text())
        except ValueError as error:
            raise InputError(f"{path} is not readable JSON ({error}); give another --workdir, or remove the file") from None

    def event(self, kind: str, step: int, **details: Any) -> None:
        """Append to events.jsonl."""
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        JsonLines(self.path / "events.jsonl", keep=True).write({"event": kind, "step": step, "time": now, **details})

    def events(self) -> list[dict[str, Any]]:
        """All events, oldest first."""
        return _read_lines(self.path / "events.jsonl")


def _read_lines(path: epath.Path) -> list[dict[str, Any]]:
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            continue   # the last line of a killed process may be cut
    return records


def read_records(path: str | epath.Path) -> list[dict[str, Any]]:
    """Metric records of all starts, by step. Where starts overlap, the newest wins.

    A start that began at step s makes every older record past s void: that stretch was trained again.
    """
    starts = []
    folder = epath.Path(path) / "metrics"
    for file in folder.glob("*.jsonl") if folder.exists() else []:
        lines = _read_lines(file)
        if lines and "start" in lines[0]:
            starts.append((lines[0]["start"], lines[0]["first_step"], lines[1:]))
    records: list[dict[str, Any]] = []
    for _, first_step, lines in sorted(starts, key=lambda one: one[0]):
        records = [record for record in records if record["step"] <= first_step] + lines
    return sorted(records, key=lambda record: record["step"])


class Run:
    """A running or finished run, for notebooks: `neo.Run("runs/neo_demo").metrics()["train/loss"]`."""

    def __init__(self, workdir: str | epath.Path):
        self.workdir = Workdir(workdir)
        if not (self.workdir.path / "config.json").exists():
            raise InputError(f"{workdir} is not a run: it has no config.json")

    @property
    def config(self) -> Any:
        """The resolved config (neo.config.Config)."""
        from neo.config import from_dict
        return from_dict(self.workdir.read_json("config.json"))

    def records(self) -> list[dict[str, Any]]:
        """Metric records by step."""
        return read_records(self.workdir.path)

    def metrics(self) -> dict[str, np.ndarray]:
        """Every metric as an array over the records; NaN where a record lacks it. Also `step` and `tokens`."""
        records = self.records()
        names = dict.fromkeys(name for record in records for name in record if name not in ("phase", "time"))
        return {name: np.array([record.get(name, np.nan) for record in records]) for name in names}

    def events(self) -> list[dict[str, Any]]:
        """events.jsonl."""
        return self.workdir.events()

    def result(self) -> dict[str, Any] | None:
        """result.json of a finished run; None before."""
        return self.workdir.read_json("result.json")
