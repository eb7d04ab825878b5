"""Checkpoints: what is written, how it is found, and each way in which it can be wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo.config.schema import Config, ModelConfig, PhaseConfig
from neo.errors import InputError
from neo.models.decoder import Decoder
from neo.train.checkpoint_format import CHECKPOINT_VERSION, checkpoints_in, open_checkpoint, resolve
from neo.train.checkpoints import Checkpoints, flatten, restore
from neo.train.optimizer import Optimizer
from neo.train.step import abstract_state

MODEL = ModelConfig(vocab_size=48, num_layers=3, d_model=16, num_heads=2, num_kv_heads=1, d_ff=24, max_seq_len=32)
PHASE = PhaseConfig(tokens=4096, seq_len=32, global_batch=2, mixture={"a": 1.0})
CONFIG = Config(name="tiny", model=MODEL, phases=(PHASE,))
FILES = {"tokenizer.model": b"\x00\x01model", "neo_tokenizer.json": b"{}"}
BILLION = 10**9


@functools.cache
def state_of():
    """A state of the right shapes, of numbers that are all different; drawn by NumPy, which compiles nothing."""
    decoder, rng = Decoder(MODEL), np.random.default_rng(0)
    def draw(leaf):
        values = rng.standard_normal(leaf.shape) if leaf.dtype == jnp.float32 else rng.integers(1, 99, leaf.shape)
        return jnp.asarray(values, leaf.dtype)
    return jax.tree.map(draw, abstract_state(decoder, Optimizer(CONFIG.optimizer, decoder.axes())))


def abstract_of(model=MODEL):
    decoder, place = Decoder(model), jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
                        abstract_state(decoder, Optimizer(CONFIG.optimizer, decoder.axes())))


def save(workdir, steps, keep_last=5, permanent=0, files=FILES, state=None):
    """Checkpoints at `steps`, of 1 B tokens a step."""
    checkpoints = Checkpoints(workdir, keep_last, permanent)
    for step in steps:
        data = {"step": step, "tokens": step * BILLION, "phase": "main", "synthetic": False, "order": {"next": 2**62}}
        checkpoints.save(state or state_of(), data, CONFIG, files)
    checkpoints.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A workdir with checkpoints at steps 10, 20 and 30; not to be changed."""
    path = tmp_path_factory.mktemp("run")
    save(path, (10, 20, 30))
    return path


@pytest.fixture
def copy(run, tmp_path):
    """A checkpoint folder of one's own to damage, far from its workdir."""
    shutil.copytree(run / "checkpoints" / "20", tmp_path / "mine")
    return tmp_path / "mine"


def equal(a, b):
    assert flatten(a).keys() == flatten(b).keys()
    for name, value in flatten(a).items():
        np.testing.assert_array_equal(value, flatten(b)[name], err_msg=name)


def test_what_is_saved_comes_back(run):
    found = resolve(str(run))
    abstract = abstract_of()
    loaded = restore(found, {"params": abstract["params"], "opt": abstract["opt"]})
    equal(loaded["params"], state_of()["params"])
    equal(loaded["opt"], state_of()["opt"])
    assert loaded["opt"]["count"].dtype == jnp.int32
    assert found.config() == CONFIG
    assert found.tokenizer_files() == FILES
    assert found.data() == {"version": CHECKPOINT_VERSION, "step": 30, "tokens": 30 * BILLION, "phase": "main",
                            "synthetic": False, "order": {"next": 2**62}}


def test_parameters_alone(run):
    loaded = restore(resolve(str(run)), {"params": abstract_of()["params"]})
    assert set(loaded) == {"params"}
    equal(loaded["params"], state_of()["params"])


def test_a_copied_folder_stands_alone(copy):
    found = resolve(str(copy))
    assert (found.step, found.config(), found.tokenizer_files()) == (20, CONFIG, FILES)
    equal(restore(found, {"params": abstract_of()["params"]})["params"], state_of()["params"])


@pytest.mark.parametrize("at,step", [("", 30), ("@10", 10), ("@20", 20), ("@20B", 20), ("@29.99B", 20), ("@0.01T", 10),
                                     ("@25000M", 20), ("@7t", 30)])
def test_resolve(run, at, step):
    found = resolve(f"{run}{at}")
    assert (found.step, found.tokens, found.path.name) == (step, step * BILLION, str(step))
    assert resolve(str(found.path)).step == step


@pytest.mark.parametrize("at,named", [
    ("@15", "no checkpoint at step 15; it has step 10 .*, step 20 .*, step 30"),
    ("@9.9B", r"at or below 9.9B tokens; it has step 10 \(10,000,000,000 tokens\)"),
    ("@abc", "@abc: a step .*@5000.* or tokens with a unit .*@16.78B"), ("@1.5X", "@1.5X"), ("@", "@"), ("@-1B", "-1B"),
    ("@NaNB", "@NaNB"), ("@infT", "@infT"), ("@1e999999999B", "@1e999999999B")])
def test_resolve_names_what_is_there(run, at, named):
    with pytest.raises(InputError, match=named):
        resolve(f"{run}{at}")


def test_an_at_sign_in_a_folder_name(run, tmp_path):
    for name in ("me@home/run", "run@5"):
        shutil.copytree(run, tmp_path / name)
    assert resolve(str(tmp_path / "me@home" / "run")).step == 30
    assert resolve(str(tmp_path / "me@home" / "run") + "@10").step == 10
    assert resolve(str(tmp_path / "run@5")).step == 30


@pytest.mark.parametrize("make,named", [
    (lambda path: None, "does not exist"),
    (lambda path: path.mkdir(), "has no checkpoint"),
    (lambda path: path.write_text("x"), "x: a file|is a file|not a checkpoint|has no checkpoint"),
    (lambda path: (path / "params").mkdir(parents=True), "is not a checkpoint: it has no params/ and data/data.json"),
    (lambda path: [path.mkdir(), (path / "config.json").write_text('{"model_type": "llama"}')],
     "config.json of a Hugging Face model and no"),
    (lambda path: [path.mkdir(), (path / "config.json").write_text('{"model_type": "llama"}'), (path / "a.bin").write_text("")],
     r"has pickled weights only \(a.bin\)"),
])
def test_resolve_of_something_else(tmp_path, make, named):
    make(tmp_path / "place")
    with pytest.raises(InputError, match=named):
        resolve(str(tmp_path / "place"))


def test_unfinished_folders_are_not_checkpoints(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    shutil.copytree(folder / "30", folder / "40.orbax-checkpoint-tmp")
    (folder / "notes").mkdir()
    assert [one.step for one in checkpoints_in(tmp_path / "run")] == [10, 20, 30]
    assert resolve(str(tmp_path / "run")).step == 30


def test_which_checkpoints_are_kept(tmp_path):
    save(tmp_path, range(1, 8), keep_last=2, permanent=3)
    assert [one.step for one in checkpoints_in(tmp_path)] == [3, 6, 7]


def test_saving_a_step_twice_is_once(tmp_path):
    save(tmp_path, (4, 4))
    again = Checkpoints(tmp_path, 2)
    assert again.latest_step == 4 and again.latest().step == 4
    again.close()
    save(tmp_path, (4,))
    assert [one.step for one in checkpoints_in(tmp_path)] == [4]


def test_synthetic_runs_have_no_tokenizer(tmp_path):
    save(tmp_path, (1,), files={})
    assert resolve(str(tmp_path)).tokenizer_files() == {}


def test_one_layer_is_one_chunk(run):
    """So that a reader can take slices: from the arrays' own metadata on disk."""
    from orbax.checkpoint import v1 as ocp
    metadata = flatten(ocp.checkpointables_metadata(run / "checkpoints" / "30").metadata["params"])
    stacked = {name: m for name, m in metadata.items() if name.startswith("layers/")}
    assert len(stacked) == 9
    for name, one in stacked.items():
        assert tuple(one.storage_metadata.chunk_shape) == (1, *one.shape[1:]), name
    table = metadata["embed/table"]
    assert tuple(table.storage_metadata.chunk_shape) == tuple(table.shape)


@pytest.mark.parametrize("changes,named", [
    (dict(num_layers=4), r"params/layers/.* has shape \(3, .*needs \(4, "),
    (dict(vocab_size=64), r"params/embed/table has shape \(48, 16\), the model of this config needs \(64, 16\)"),
    (dict(tied_embeddings=True), "holds params/head/kernel, which the model of this config has not"),
])
def test_a_misfit_is_named(run, changes, named):
    with pytest.raises(InputError, match=named):
        restore(resolve(str(run)), {"params": abstract_of(dataclasses.replace(MODEL, **changes))["params"]})


def test_a_missing_array_is_named(tmp_path):
    headless = {name: part for name, part in state_of()["params"].items() if name != "head"}
    save(tmp_path, (1,), state={**state_of(), "params": headless})
    with pytest.raises(InputError, match="params/head/kernel is missing"):
        restore(resolve(str(tmp_path)), {"params": abstract_of()["params"]})


def test_weights_only(copy):
    shutil.rmtree(copy / "opt")
    abstract = abstract_of()
    equal(restore(resolve(str(copy)), {"params": abstract["params"]})["params"], state_of()["params"])
    with pytest.raises(InputError, match="has no opt/: it was saved with weights only"):
        restore(resolve(str(copy)), {"params": abstract["params"], "opt": abstract["opt"]})


def test_a_truncated_file_is_named_with_the_way_on(copy):
    biggest = max((p for p in (copy / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    biggest.write_bytes(biggest.read_bytes()[:biggest.stat().st_size // 2])
    with pytest.raises(InputError, match=r"mine cannot be read, a file is damaged .*move the folder mine away"):
        restore(resolve(str(copy)), {"params": abstract_of()["params"]})


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_a_missing_file_is_named(copy, name):
    assert (copy / "params" / name).exists()
    (copy / "params" / name).unlink()
    with pytest.raises(InputError, match="mine cannot be read, a file is damaged or missing"):
        restore(resolve(str(copy)), {"params": abstract_of()["params"]})


@pytest.mark.parametrize("change,named", [
    (dict(version=CHECKPOINT_VERSION + 1), f"version {CHECKPOINT_VERSION + 1} .*reads version {CHECKPOINT_VERSION}"),
    (dict(version=None), "has version None"),
])
def test_versions(copy, change, named):
    file = copy / "data" / "data.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(InputError, match=named):
        open_checkpoint(copy)


@pytest.mark.parametrize("text", ["{", "[]", "{\"version\": 1}", "\udcff"])
def test_damaged_json(copy, text):
    (copy / "data" / "data.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match="data.json"):
        open_checkpoint(copy)


def test_damaged_config(copy):
    (copy / "config" / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json cannot be read"):
        open_checkpoint(copy).config()
    (copy / "config" / "config.json").unlink()
    with pytest.raises(InputError, match="is incomplete: config/config.json is missing"):
        open_checkpoint(copy).config()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_restoring_in_another_dtype(run, dtype):
    cast = lambda s: jax.ShapeDtypeStruct(s.shape, dtype, sharding=s.sharding)   # noqa: E731
    abstract = jax.tree.map(cast, abstract_of()["params"])
    loaded = restore(resolve(str(run)), {"params": abstract})["params"]
    equal(loaded, jax.tree.map(lambda x: x.astype(dtype), state_of()["params"]))
