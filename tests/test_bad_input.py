"""What a user gets wrong: exit code 2 and one line that names it, as seen from the command line.

Bad config fields are in config/test_load.py, meshes in multi_device/test_train_mesh.py, other runs' workdirs and damaged
checkpoints in train/test_run.py, processes in multi_process/test_train_processes.py, full disks in
train/test_full_disk.py. The documents that go into a store are tested in data/.
"""

from __future__ import annotations

import importlib
import json
import shutil
import subprocess
import sys

import pytest


@pytest.fixture
def neo(capfd):
    """neo("train", argument...) -> the one line of the error. Asserts exit code 2, one line, nothing on stdout."""
    from neo.cli import invoke

    def start(name, *argv):
        module = importlib.import_module(f"neo.{name}.__main__")
        capfd.readouterr()
        code = invoke(module.COMMAND, module.run, [str(word) for word in argv])
        out, err = capfd.readouterr()
        assert code == 2, err
        assert out == "" and "Traceback" not in err, err
        lines = err.strip().splitlines()
        assert lines[-1].startswith(f"neo.{name}: error: ") and sum("error" in line for line in lines) == 1, err
        return lines[-1]
    return start


@pytest.fixture
def train(neo, tiny, store, tmp_path):
    """train(store=..., **fields) -> the error of `python -m neo.train` on the tiny recipe."""
    def start(store=store, **fields):
        line = neo("train", f"--config={tiny}", f"--workdir={tmp_path / 'run'}", f"--config.data.store={store}",
                   *(f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()))
        assert not (tmp_path / "run").exists(), "nothing was changed"
        return line
    return start


@pytest.fixture
def broken(store, tmp_path):
    """A copy of the store to break."""
    shutil.copytree(store, tmp_path / "store")
    return tmp_path / "store"


def has(text, *parts):
    assert [part for part in parts if str(part) not in text] == [], text


def test_unknown_flag_field_and_config(neo, train, tiny):
    has(neo("train", "--config=neo_dmeo"), "'neo_dmeo'", "did you mean 'neo_demo'", "neo_7b")
    has(neo("train", f"--config={tiny}", "--work_dir=x"), "--work_dir", "--workdir")
    has(neo("train", f"--config={tiny}", "--train.steps=3"), "--config.train.steps")
    has(neo("train"), "--config is missing")
    has(train(train__step=3), "config.train.step", "'steps'")
    has(train(train__steps="many"), "config.train.steps='many'", "a whole number")
    has(train(model__num_heads=3), "model.num_heads=3", "model.num_kv_heads=2", "1, 3")


def test_batch_that_the_micro_batch_does_not_divide(train):
    has(train(train__micro_batch=3), "train.micro_batch=3", "8 sequences", "phases.short.global_batch=8")


def test_mesh_larger_than_the_machine(train):
    has(train(mesh__tensor=64), "tensor=64", "a multiple of 64 devices", "this run has 1")


def test_attention_that_does_not_exist(train):
    has(train(train__attention="flash"), "config.train.attention='flash'", "blockwise")


def test_missing_store_tells_how_to_make_it(train, tmp_path):
    none = tmp_path / "none"
    has(train(store=none), "2 of 2 sources", f"'a' ({none / 'a'})", f"'b' ({none / 'b'})", "python -m neo.data.prepare",
        f"--out={none} --source=NAME", "--config.data.stores.NAME=FOLDER", "--config.data.synthetic=True")
    one = train(store=none, phases__short__mixture="a=1", phases__long__mixture="a=1")
    has(one, "source 'a'", none / "a", f"--out={none} --source=a", "--config.data.synthetic=True")


def test_more_epochs_than_the_limit(train):
    line = train(phases__long__tokens=10**7)
    has(line, "more often than allowed", "'a' ", "'b' ", "limit 4", "--config.data.max_epochs_of.a=",
        "--config.data.max_epochs=0")
    has(train(phases__long__tokens=10**7, data__max_epochs_of="a=1000"), "'b' ")


def test_mixtures_that_cannot_be(train):
    has(train(phases__short__mixture="a=0,b=0"), "phases.short.mixture", "above 0")
    has(train(phases__short__mixture="a=-1,b=2"), "phases.short.mixture.a=-1", "0 or more")
    has(train(phases__short__mixture_unit="epoch"), "mixture_unit='epoch'", "did you mean 'epochs'")
    has(train(phases__short__mixture_unit="epochs", phases__short__tokens=0), "phases.short.tokens=0", "data.source_tokens")
    has(train(phases__short__batch_ramp="2,4"), "phases.short.batch_ramp_tokens=0", "more than 0")
    has(train(data__max_epochs_of="aa=2"), "data.max_epochs_of", "'aa'")


def test_mistyped_source_names_the_near_one(train, store):
    has(train(phases__short__mixture="a=0.5,bb=0.5"), "source 'bb'", store / "bb", "'b'")


def test_unfinished_source(train, broken):
    (broken / "a" / "manifest.json").unlink()
    (broken / "a" / ".work").mkdir()
    has(train(store=broken), "source 'a'", "not finished", "same command")


def test_truncated_shard(train, broken):
    [shard] = sorted((broken / "b").glob("train-*.tokens"))
    shard.write_bytes(shard.read_bytes()[:-10])
    has(train(store=broken), shard.name, str(broken / "b"))


def test_missing_shard(train, broken):
    [shard] = sorted((broken / "b").glob("train-*.documents"))
    shard.unlink()
    has(train(store=broken), shard.name, str(broken / "b"))


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "other"}', "\x00\x01"])
def test_foreign_store(train, broken, text):
    (broken / "a" / "manifest.json").write_text(text)
    has(train(store=broken), str(broken / "a"))


def test_store_of_a_later_version(train, broken):
    path = broken / "a" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "version": 9}))
    has(train(store=broken), str(broken / "a"), "version 9", "versions up to ", "a newer neo")


def test_sources_of_different_tokenizers(train, broken):
    path = broken / "b" / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_sha256": "f" * 64}))
    has(train(store=broken), "'a'", "'b'", "ffffffffffff", "--tokenizer=")


def test_tokenizer_that_is_not_the_stores(train, broken):
    for name in ("a", "b"):
        path = broken / name / "manifest.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_sha256": "f" * 64}))
    has(train(store=broken), str(broken / "tokenizer"), "ffffffffffff", "'a'")


def test_missing_and_damaged_tokenizer(train, broken):
    model = next((broken / "tokenizer").glob("*.model"))
    model.write_bytes(b"not a model")
    has(train(store=broken), str(broken / "tokenizer"))
    shutil.rmtree(broken / "tokenizer")
    has(train(store=broken), str(broken / "tokenizer"))


def test_vocabulary_larger_than_the_models(train):
    has(train(model__vocab_size=256), "vocabulary of 300", "model.vocab_size=256", "--config.model.vocab_size=300")


def test_source_shorter_than_a_window(train, broken):
    from neo.data.store_writer import write_source
    manifest = json.loads((broken / "b" / "manifest.json").read_text())
    shutil.rmtree(broken / "b")
    write_source(str(broken / "b"), "b", {"train": [("x", [5, 6, 7])]}, vocab_size=manifest["vocab_size"],
                 eod_id=manifest["eod_id"], tokenizer_sha256=manifest["tokenizer_sha256"])
    has(train(store=broken), "'b'", "4")


def test_empty_source(train, broken):
    from neo.data.store_writer import write_source
    manifest = json.loads((broken / "b" / "manifest.json").read_text())
    shutil.rmtree(broken / "b")
    write_source(str(broken / "b"), "b", {}, vocab_size=manifest["vocab_size"], eod_id=manifest["eod_id"],
                 tokenizer_sha256=manifest["tokenizer_sha256"])
    has(train(store=broken), "'b'")


def test_workdir_that_cannot_be_made(neo, tiny, tmp_path):
    (tmp_path / "file").write_text("x")
    has(neo("train", f"--config={tiny}", "--config.data.synthetic=True", f"--workdir={tmp_path / 'file' / 'run'}"),
        tmp_path / "file")


def test_device_that_is_missing(tiny, environment, tmp_path):
    """A process of its own: JAX looks for devices once."""
    flags = [f"--config={tiny}", f"--workdir={tmp_path / 'run'}", "--config.data.synthetic=True"]
    ended = subprocess.run(
        [sys.executable, "-m", "neo.train", *flags],
        env={**environment, "JAX_PLATFORMS": "tpu"}, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 2, ended.stderr
    last = ended.stderr.strip().splitlines()[-1]
    assert last.startswith("neo.train: error: ") and "Traceback" not in ended.stderr
    has(last, "JAX_PLATFORMS='tpu'", "JAX_PLATFORMS=cpu")
    assert not (tmp_path / "run").exists()


def test_distributed_flags_that_do_not_fit(neo, tiny):
    config = f"--config={tiny}"
    has(neo("train", config, "--num_processes=2"), "--coordinator", "--num_processes", "--process_id")
    has(neo("train", config, "--coordinator=x:1", "--num_processes=2", "--process_id=2"), "--process_id=2", "--num_processes=2")
    has(neo("train", config, "--coordinator=x", "--num_processes=2", "--process_id=1"), "--coordinator=x", "HOST:PORT")
    has(neo("train", config, "--distributed=on"), "'on'", "auto, off")


def test_infer_without_a_model(neo, tmp_path, store):
    has(neo("infer", tmp_path / "none", "--prompt=x"), tmp_path / "none", "does not exist")
    has(neo("infer", tmp_path, "--prompt=x"), tmp_path, "no checkpoint")
    has(neo("infer", store, "--prompt=x"), store, "no checkpoint")
    has(neo("infer", "--prompt=x"), "CHECKPOINT")
    has(neo("infer", tmp_path, "--prompt=x", "--temperature=hot"), "--temperature", "'hot'", "a number")


def test_infer_from_a_model_without_tokenizer(neo, tiny, tmp_path):
    from neo.config import load
    from neo.train.runner import run
    run(load(tiny, {"data.synthetic": True, "train.steps": 1, "log.progress": "off"}), tmp_path / "run")
    has(neo("infer", tmp_path / "run", "--prompt=x"), "tokenizer", "synthetic")
    has(neo("infer", f"{tmp_path / 'run'}@7", "--prompt=x"), "step 7", "step 1")
