"""Small files of a run: written whole, read back, merged over starts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from neo.errors import InputError
from neo.train.workdir import JsonLines, Run, Workdir, read_records


def start(folder, name, when, first, steps, value):
    (folder / "metrics").mkdir(exist_ok=True)
    lines = [{"start": when, "first_step": first}] + [{"step": step, "train/loss": value} for step in steps]
    (folder / "metrics" / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_newest_start_wins(tmp_path):
    start(tmp_path, "0", "2026-01-01T00:00:00.1", 0, range(1, 11), 1.0)   # killed after step 10, saved at 6
    start(tmp_path, "6", "2026-01-01T00:00:00.2", 6, range(7, 9), 2.0)    # killed after step 8, nothing saved
    start(tmp_path, "4", "2026-01-02T00:00:00", 4, range(5, 13), 3.0)     # gone back to 4
    merged = {record["step"]: record["train/loss"] for record in read_records(tmp_path)}
    assert merged == {**dict.fromkeys(range(1, 5), 1.0), **dict.fromkeys(range(5, 13), 3.0)}


def test_order_is_by_time_not_by_file_name(tmp_path):
    start(tmp_path, "10", "2026-01-01T00:00:00", 10, range(11, 21), 1.0)
    start(tmp_path, "0", "2026-01-02T00:00:00", 0, range(1, 4), 2.0)
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2, 3]


def test_cut_lines_and_foreign_files_are_left_out(tmp_path):
    start(tmp_path, "0", "2026-01-01T00:00:00", 0, range(1, 3), 1.0)
    with open(tmp_path / "metrics" / "0.jsonl", "a") as file:
        file.write('{"step": 3, "train/lo')
    (tmp_path / "metrics" / "empty.jsonl").write_text("")
    (tmp_path / "metrics" / "other.jsonl").write_text('{"x": 1}\n')
    assert [record["step"] for record in read_records(tmp_path)] == [1, 2]
    assert read_records(tmp_path / "nothing") == []


@pytest.mark.parametrize("remote", [False, True])
def test_lines_are_appended_also_after_a_cut_one(tmp_path, monkeypatch, remote):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n{"b": ')
    file = JsonLines(path, keep=True)
    file._local = not remote   # an object store cannot append: there the whole file is written anew
    file.write({"c": 1})
    file.write({"d": 2})
    assert path.read_text() == '{"a": 1}\n{"b": \n{"c": 1}\n{"d": 2}\n'
    JsonLines(path, keep=False).write({"e": 3})
    assert path.read_text() == '{"e": 3}\n'


def test_json_is_replaced_whole(tmp_path, monkeypatch):
    place = Workdir(tmp_path)
    place.write_json("x.json", {"a": 1})
    with pytest.raises(TypeError):
        place.write_json("x.json", {"a": object()})
    assert place.read_json("x.json") == {"a": 1}
    place.write_json("x.json", {"a": 2})
    assert place.read_json("x.json") == {"a": 2} and [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert place.read_json("y.json") is None
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(InputError, match="x.json is not readable JSON"):
        place.read_json("x.json")


def test_run_gives_arrays_with_nan_where_a_record_lacks_a_metric(tmp_path):
    with pytest.raises(InputError, match="not a run"):
        Run(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    start(tmp_path, "0", "2026-01-01T00:00:00", 0, range(1, 3), 1.5)
    with open(tmp_path / "metrics" / "0.jsonl", "a") as file:
        file.write('{"step": 2, "eval/loss": 3.0, "phase": "x", "time": "y"}\n')
    metrics = Run(tmp_path).metrics()
    assert set(metrics) == {"step", "train/loss", "eval/loss"}
    np.testing.assert_array_equal(metrics["step"], [1, 2, 2])
    np.testing.assert_array_equal(metrics["train/loss"], [1.5, 1.5, np.nan])
    np.testing.assert_array_equal(metrics["eval/loss"], [np.nan, np.nan, 3.0])
    assert Run(tmp_path).result() is None and Run(tmp_path).events() == []
