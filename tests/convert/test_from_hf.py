"""from-hf: the checkpoint, what it says about itself, and that an interrupted import goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from .conftest import ROWS, save, tiny_config
from .test_to_hf import read_all


@pytest.fixture(scope="module")
def folder(workdir, tmp_path_factory):
    """A Hugging Face folder in bfloat16."""
    from neo.convert.source import open_source
    from neo.convert.to_hf import Options, write_hf
    out = tmp_path_factory.mktemp("hf") / "some_model"
    write_hf(open_source(str(workdir)), out, Options())
    return out


def test_checkpoint_stands_alone(convert, folder, tmp_path, monkeypatch):
    """Any command takes it, sampling too; it says where it is from; the same command again has nothing to do."""
    from neo.infer import load
    from neo.train.checkpoint_format import resolve
    monkeypatch.chdir(tmp_path)
    ended = convert("from-hf", folder, "imported")
    assert ended.code == 0, ended.err
    for part in ("Wrote imported", "python -m neo.infer imported", "--config.init.checkpoint=imported"):
        assert part in ended.out
    found = resolve("imported")
    assert (found.step, found.tokens) == (0, 0) and found.config().model.vocab_size == ROWS
    assert found.data()["made_from"] == ["imported from the Hugging Face model some_model"]
    assert str(folder.parent) not in (tmp_path / "imported/data/data.json").read_text()
    model = load("imported")
    assert model.logits([[1, 2, 3]]).shape == (1, 3, ROWS)
    np.testing.assert_allclose(model.logits([[5, 6, 7]]), load(str(folder)).logits([[5, 6, 7]]), atol=1e-6)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "imported").rglob("*")}
    ended = convert("from-hf", folder, "imported")
    assert ended.code == 0 and "finished already" in ended.err
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "imported").rglob("*")} == before
    (tmp_path / "another").mkdir()
    (tmp_path / "another/file").write_text("x")
    assert convert("from-hf", folder, "another").code == 2


def test_the_line_for_a_config_file(convert, folder, tmp_path):
    """What it ends with, put into a config, gives the model of the checkpoint."""
    from neo.config import load
    from neo.train.checkpoint_format import resolve
    ended = convert("from-hf", folder, tmp_path / "imported")
    [line] = [line.strip() for line in ended.out.splitlines() if line.strip().startswith("c.model.update(")]
    (tmp_path / "own.py").write_text("from neo.config import new, phase\n\ndef get_config():\n    c = new()\n"
                                     f"    {line}\n    c.phases = [phase('main', tokens=1000, seq_len=32, global_batch=2, "
                                     "mixture=dict(a=1))]\n    return c\n")
    assert load(tmp_path / "own.py").model == resolve(str(tmp_path / "imported")).config().model


STOPS = """
import os, signal
import neo.models.hf.weights as hf
plain, count = hf.HFWeights.read, 0
def read(self, path, layer=None):
    global count
    count += 1
    if count == 12:
        os.kill(os.getpid(), signal.SIGKILL)
    return plain(self, path, layer)
hf.HFWeights.read = read
from neo.convert.__main__ import COMMAND, run
from neo.cli import main
main(COMMAND, run)
"""


def test_killed_and_started_again(convert, folder, tmp_path, environment):
    """kill -9 in the middle: OUT is not there, and the same command makes what an uninterrupted one makes."""
    child = subprocess.run([sys.executable, "-c", STOPS, "from-hf", str(folder), "out"], cwd=tmp_path, env=environment,
                           capture_output=True, text=True)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not (tmp_path / "out").exists() and (tmp_path / "out.partial").exists()
    ended = convert("from-hf", folder, tmp_path / "out")
    assert ended.code == 0 and "going on" in ended.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert convert("from-hf", folder, tmp_path / "whole").code == 0
    one, other = read_all(tmp_path / "out"), read_all(tmp_path / "whole")
    for path in one:
        np.testing.assert_array_equal(one[path].astype(np.float32), other[path].astype(np.float32), path)


def test_repository_of_the_hub(folder, tmp_path, environment):
    """A repository that the hub's cache has, without a network; the checkpoint names it."""
    pytest.importorskip("huggingface_hub")
    cache = tmp_path / "hub/models--me--tiny"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs/main").write_text("1" * 40)
    shutil.copytree(folder, cache / "snapshots" / ("1" * 40))
    offline = {**environment, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}

    def start(*argv):
        return subprocess.run([sys.executable, "-m", "neo.convert", "from-hf", *argv], cwd=tmp_path, env=offline,
                              capture_output=True, text=True)
    child = start("me/tiny", "imported", "--revision=main")
    assert child.returncode == 0, child.stderr
    data = json.loads((tmp_path / "imported/data/data.json").read_text())
    assert data["made_from"] == ["imported from the Hugging Face model me/tiny at revision main"]
    child = start("me/other", "imported2")
    assert child.returncode == 2 and len(child.stderr.strip().splitlines()) == 1, child.stderr
    assert "me/other is no folder here" in child.stderr and not os.path.exists(tmp_path / "imported2")


def test_class_and_generation_settings_stay(convert, tokenizer, tmp_path):
    """A Mistral without a window leaves as one, also through a checkpoint, and says how to generate as before."""
    run = save(tmp_path / "run", tiny_config(windows=(0,)), tokenizer)
    assert convert("to-hf", run, tmp_path / "a").code == 0
    assert json.loads((tmp_path / "a/config.json").read_text())["model_type"] == "llama"   # the plainest
    assert convert("to-hf", run, tmp_path / "b", "--model_type=mistral").code == 0
    (tmp_path / "b/generation_config.json").write_text('{"eos_token_id": [2, 5], "do_sample": false}')
    (tmp_path / "b/chat_template.jinja").write_text("{{ messages }}")
    assert convert("from-hf", tmp_path / "b", tmp_path / "imported").code == 0
    for source, out in (("b", "c"), ("imported", "d")):
        assert convert("to-hf", tmp_path / source, tmp_path / out).code == 0
        assert json.loads((tmp_path / out / "config.json").read_text())["model_type"] == "mistral"
        for name in ("generation_config.json", "chat_template.jinja"):
            assert (tmp_path / out / name).read_text() == (tmp_path / "b" / name).read_text()


def test_model_without_a_tokenizer(convert, folder, tmp_path):
    """It converts to and fro, and is refused where a tokenizer is part of the file."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(folder / name, bare)
    assert convert("from-hf", bare, tmp_path / "imported").code == 0
    ended = convert("to-hf", tmp_path / "imported", tmp_path / "hf")
    assert ended.code == 0 and "without a tokenizer" in ended.out
    assert not (tmp_path / "hf/tokenizer.json").exists()
    ended = convert("to-gguf", tmp_path / "imported", tmp_path / "x.gguf")
    assert ended.code == 2 and "has no tokenizer" in ended.error
