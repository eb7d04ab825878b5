"""Repositories by name: from the hub's cache alone, and one line for whatever is wrong. The network is never asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from neo.errors import InputError
from neo.models.hf.hub import local_folder

pytest.importorskip("huggingface_hub")

ASK = "import sys; from neo.models.hf.hub import local_folder; print(local_folder(*sys.argv[1:]))"


@pytest.fixture
def cached(tmp_path):
    """A cache of the hub with one repository that was downloaded before, and commands that see it and no network."""
    snapshot = tmp_path / "hub/models--me--model/snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    refs = tmp_path / "hub/models--me--model/refs"
    refs.mkdir()
    (refs / "main").write_text("0" * 40)
    (snapshot / "config.json").write_text("{}")

    def ask(*argv) -> subprocess.CompletedProcess:
        root = Path(__file__).resolve().parents[3]
        environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1",
                       "PYTHONPATH": str(root)}
        return subprocess.run([sys.executable, "-c", ASK, *argv], env=environment, capture_output=True, text=True, cwd=tmp_path)
    return snapshot, ask


def test_repository_in_the_cache(cached):
    snapshot, ask = cached
    index = {"weight_map": {"a": "x.safetensors", "b": "y.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    for name in ("x.safetensors", "y.safetensors"):
        (snapshot / name).write_bytes(b"")
    assert ask("me/model").stdout.strip() == str(snapshot)
    assert ask("me/model", "main").stdout.strip() == str(snapshot)
    (snapshot / "y.safetensors").unlink()
    assert "y.safetensors is not there" in ask("me/model").stderr.splitlines()[-1]


def test_repository_that_is_not_there(cached):
    _, ask = cached
    last = ask("somebody/else").stderr.splitlines()[-1]
    assert "InputError: somebody/else is no folder here" in last and "cannot be reached" in last


def test_index_that_names_files_elsewhere(cached):
    snapshot, ask = cached
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    assert "not a safetensors index" in ask("me/model").stderr.splitlines()[-1]


@pytest.mark.parametrize("text, revision, part", [
    ("no/such/folder", "", "does not exist"), ("white space", "", "does not exist"), ("", "", "does not exist")])
def test_neither_folder_nor_repository(tmp_path, monkeypatch, text, revision, part):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=part):
        local_folder(text, revision)


def test_folders(tmp_path):
    assert local_folder(str(tmp_path)) == tmp_path
    with pytest.raises(InputError, match="is a folder of this machine"):
        local_folder(str(tmp_path), "main")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="is a file"):
        local_folder(str(tmp_path / "file"))
