"""Checkpoints a slice at a time: read what training saves, write what Orbax reads, average, and survive interruptions."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts

from neo.config import to_dict
from neo.config.schema import Config, ModelConfig, PhaseConfig
from neo.errors import InputError
from neo.models.decoder import Decoder
from neo.models.weights import parameter_shapes
from neo.train.checkpoint_format import JsonFiles, open_checkpoint
from neo.train.checkpoints import Checkpoints, flatten, restore
from neo.train.weights import AverageWeights, CheckpointWeights, fill_checkpoint, write_checkpoint

BF16 = np.dtype(ml_dtypes.bfloat16)
MODEL = ModelConfig(vocab_size=48, num_layers=3, d_model=16, num_heads=2, num_kv_heads=1, d_ff=24, max_seq_len=32)
CONFIG = Config(name="tiny", model=MODEL, phases=(PhaseConfig(tokens=4096, seq_len=32, global_batch=2, mixture={"a": 1.0}),))
DATA = {"step": 7, "tokens": 7 * 10**9, "phase": "main", "synthetic": False, "order": {"next": 2**62}}
FILES = {"tokenizer.model": b"\x00\x01model", "neo_tokenizer.json": b"{}"}


class Drawn:
    """Weights from memory; counts what is read."""

    def __init__(self, config=MODEL, dtype=BF16, seed=0):
        rng = np.random.default_rng(seed)
        self.config, self.reads = config, []
        self.arrays = {path: rng.standard_normal(shape).astype(dtype) for path, shape in parameter_shapes(config).items()}
        self.arrays["final_norm/scale"][...] = 0   # a chunk of zeros is a chunk too

    def dtype(self, path):
        return self.arrays[path].dtype

    def read(self, path, layer=None):
        self.reads.append((path, layer))
        array = self.arrays[path] if layer is None else self.arrays[path][layer]
        return np.asfortranarray(array)   # as transposed views of a file are


def abstract(dtype=None):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return {"params": jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=place),
                                   Decoder(MODEL).abstract_params())}


def same(arrays, found):
    assert arrays.keys() == found.keys()
    for path, array in arrays.items():
        np.testing.assert_array_equal(np.asarray(found[path]), array, strict=True, err_msg=path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A checkpoint as training saves it, and its parameters."""
    arrays = Drawn(dtype=np.float32, seed=3).arrays
    tree = jax.tree.map_with_path(lambda path, _: jax.numpy.asarray(arrays["/".join(key.key for key in path)]),
                                  Decoder(MODEL).abstract_params())
    workdir = tmp_path_factory.mktemp("run")
    checkpoints = Checkpoints(workdir, 1)
    checkpoints.save({"params": tree, "opt": {"count": jax.numpy.zeros((), "int32")}}, DATA, CONFIG, FILES)
    checkpoints.close()
    return checkpoints.latest(), arrays


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint written from Drawn() in bfloat16; not to be changed."""
    return write_checkpoint(Drawn(), tmp_path_factory.mktemp("written") / "out", CONFIG, DATA, FILES)


def test_what_training_saved_is_read_by_slices(trained):
    checkpoint, arrays = trained
    weights = CheckpointWeights(checkpoint)
    assert weights.config == MODEL
    same(arrays, {path: weights.read(path) for path in arrays})
    for layer in range(MODEL.num_layers):
        np.testing.assert_array_equal(weights.read("layers/mlp/gate", layer), arrays["layers/mlp/gate"][layer], strict=True)
    assert weights.dtype("embed/table") == np.float32
    with pytest.raises(InputError, match="has no parameter head/gain"):
        weights.read("head/gain")


def test_orbax_reads_what_is_written_bit_by_bit(written):
    from orbax.checkpoint import v1 as ocp
    arrays = Drawn().arrays
    same(arrays, flatten(ocp.load_checkpointables(written, {"params": None})["params"]))


def test_a_run_restores_what_is_written_as_float32(written):
    checkpoint = open_checkpoint(written)
    arrays = Drawn().arrays
    same({path: array.astype(np.float32) for path, array in arrays.items()}, flatten(restore(checkpoint, abstract())["params"]))
    same(arrays, flatten(restore(checkpoint, abstract(BF16))["params"]))
    assert (checkpoint.config(), checkpoint.tokenizer_files(), checkpoint.step) == (CONFIG, FILES, 7)
    assert checkpoint.data() == {"version": 1, **DATA}
    with pytest.raises(InputError, match="saved with weights only"):
        restore(checkpoint, {**abstract(), "opt": {}})


def test_what_is_written_is_read_by_slices_again(written):
    weights, arrays = CheckpointWeights(open_checkpoint(written)), Drawn().arrays
    same(arrays, {path: weights.read(path) for path in arrays})
    assert {weights.dtype(path) for path in arrays} == {BF16}


def test_one_layer_is_one_chunk(written):
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{written}/params/"}).result()
    keys = {key.decode() for key in store.list().result()}
    for path, shape in parameter_shapes(MODEL).items():
        zeros = "/0" * (len(shape) - 1)
        layers = range(shape[0]) if path.startswith("layers/") else [0]
        name = path.replace("/", ".")
        assert {key for key in keys if key.startswith(name + "/")} == {name + "/zarr.json",
                                                                       *(f"{name}/c/{i}{zeros}" for i in layers)}


def test_writing_reads_one_layer_at_a_time(tmp_path):
    weights, told = Drawn(), []
    write_checkpoint(weights, tmp_path / "out", CONFIG, DATA, {}, lambda done, total: told.append((done, total)))
    stacked = [path for path in weights.arrays if path.startswith("layers/")]
    single = [(path, None) for path in weights.arrays if path not in stacked]
    assert len(weights.reads) == len({*weights.reads})
    assert {*weights.reads} == {*single, *((path, layer) for path in stacked for layer in range(3))}
    total = sum(array.nbytes for array in weights.arrays.values())
    assert told[0] == (0, total) and told[-1] == (total, total) and len(told) == len(weights.reads) + 1
    assert os.listdir(tmp_path) == ["out"] and not (tmp_path / "out" / "tokenizer").exists()
    assert not list((tmp_path / "out").glob("*unfinished*"))


class Stops(Drawn):
    """Breaks off when a given slice is asked for."""

    at = ("layers/mlp/up", 1)

    def read(self, path, layer=None):
        if (path, layer) == self.at:
            raise ConnectionError("gone")
        return super().read(path, layer)


def test_an_interrupted_one_goes_on_where_it_was(tmp_path, written):
    first, second = Stops(), Drawn()
    with pytest.raises(ConnectionError):
        write_checkpoint(first, tmp_path / "out", CONFIG, DATA, FILES)
    assert os.listdir(tmp_path) == ["out.partial"]
    with pytest.raises(InputError, match="is not a checkpoint"):
        open_checkpoint(tmp_path / "out.partial")
    out = write_checkpoint(second, tmp_path / "out", CONFIG, DATA, FILES)
    assert len(first.reads) >= 12
    assert not {*second.reads} & {*first.reads[:-1]}   # the last one read was perhaps not written
    assert {*second.reads} | {*first.reads} >= {(path, 2) for path in first.arrays if path.startswith("layers/")}
    same(Drawn().arrays, {path: CheckpointWeights(open_checkpoint(out)).read(path) for path in first.arrays})


@pytest.mark.parametrize("change", ["config", "data", "type", "tokenizer"])
def test_an_interrupted_one_of_something_else_begins_anew(tmp_path, change):
    with pytest.raises(ConnectionError):
        write_checkpoint(Stops(), tmp_path / "out", CONFIG, DATA, FILES)
    weights = Drawn(dtype=np.float32 if change == "type" else BF16)
    config = dataclasses.replace(CONFIG, name="other") if change == "config" else CONFIG
    data = {**DATA, "step": 8} if change == "data" else DATA
    files = {**FILES, "tokenizer.model": b"other"} if change == "tokenizer" else FILES
    out = write_checkpoint(weights, tmp_path / "out", config, data, files)
    assert open_checkpoint(out).tokenizer_files() == files
    assert len(weights.reads) == len({*weights.reads}) == 3 + 9 * 3
    same(weights.arrays, {path: CheckpointWeights(open_checkpoint(out)).read(path) for path in weights.arrays})
    assert open_checkpoint(out).step == data["step"]


def test_a_move_that_was_interrupted_is_ended(tmp_path, monkeypatch):
    """The parts are put in place one by one, data/ last."""
    real, left = os.replace, [3]

    def replace(source, target):
        if "checkpoint" in str(source) and not str(source).endswith("skeleton"):
            left[0] -= 1
            if left[0] < 0:
                raise ConnectionError("gone")
        real(source, target)
    monkeypatch.setattr(os, "replace", replace)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "note.txt").write_text("stays")
    with pytest.raises(ConnectionError):
        fill_checkpoint(Drawn(), tmp_path / "out", CONFIG, DATA, FILES)
    with pytest.raises(InputError, match="is not a checkpoint"):
        open_checkpoint(tmp_path / "out")
    monkeypatch.undo()
    again = Drawn()
    fill_checkpoint(again, tmp_path / "out", CONFIG, DATA, FILES)
    assert not again.reads and (tmp_path / "out" / "note.txt").exists()
    weights = CheckpointWeights(open_checkpoint(tmp_path / "out"))
    same(again.arrays, {path: weights.read(path) for path in again.arrays})


def test_an_output_that_exists_is_refused(written, tmp_path):
    weights = Drawn()
    with pytest.raises(InputError, match="out exists"):
        write_checkpoint(weights, written, CONFIG, DATA, FILES)
    assert not weights.reads


def test_weights_that_are_not_what_they_said(tmp_path):
    weights = Drawn()
    weights.arrays["embed/table"] = weights.arrays["embed/table"].T
    with pytest.raises(ValueError, match="embed/table: read bfloat16"):
        write_checkpoint(weights, tmp_path / "out", CONFIG, DATA, FILES)


def test_a_damaged_checkpoint_is_named(written, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(written, copy)
    largest = max((copy / "params" / "d").iterdir(), key=lambda path: path.stat().st_size)
    os.truncate(largest, 100)
    with pytest.raises(InputError, match=r"copy: params/\S+ cannot be read, a file is damaged or missing"):
        weights = CheckpointWeights(open_checkpoint(copy))
        for path in parameter_shapes(MODEL):
            weights.read(path)
    (copy / "params" / "manifest.ocdbt").unlink()
    with pytest.raises(InputError, match="copy: params/embed/table cannot be read"):
        CheckpointWeights(open_checkpoint(copy))
    larger = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, num_layers=4))
    shutil.copytree(written, tmp_path / "other")
    (tmp_path / "other/config/config.json").write_bytes(JsonFiles.of("c", to_dict(larger)).files["c"])
    with pytest.raises(InputError, match=r"params/layers/attention/key has shape \(3, 16, 1, 8\), its config needs \(4,"):
        CheckpointWeights(open_checkpoint(tmp_path / "other"))
    tied = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, tied_embeddings=True))
    (tmp_path / "other/config/config.json").write_bytes(JsonFiles.of("c", to_dict(tied)).files["c"])
    with pytest.raises(InputError, match="other holds params/head/kernel, which its config has no place for"):
        CheckpointWeights(open_checkpoint(tmp_path / "other"))


def test_the_mean_of_checkpoints():
    one, other = Drawn(dtype=np.float32, seed=1), Drawn(dtype=BF16, seed=2)
    path = "layers/attention/query"
    a, b = one.arrays[path].astype(np.float64), other.arrays[path].astype(np.float64)
    for coefficients, expected in ((None, (a + b) / 2), ((3, 1), 0.75 * a + 0.25 * b), ((0, 2), b), ((2, -1), 2 * a - b)):
        mean = AverageWeights([one, other], coefficients)
        assert mean.dtype(path) == np.float32 and mean.config == MODEL
        np.testing.assert_allclose(mean.read(path), expected, rtol=3e-7, atol=3e-7)   # a few roundings to float32
        np.testing.assert_array_equal(mean.read(path, 2), mean.read(path)[2], strict=True)
    single = AverageWeights([one], [0.3])
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(single.read(name), array, strict=True)
    AverageWeights([one, other], [1, 1e-30]).read(path)
    np.testing.assert_array_equal(one.arrays[path], Drawn(dtype=np.float32, seed=1).arrays[path])   # inputs are left alone


def test_averages_that_make_no_sense():
    one = Drawn()
    other = Drawn(dataclasses.replace(MODEL, d_ff=32, rope_base=5e5))
    with pytest.raises(InputError, match="checkpoints 1 and 3 .* d_ff 24 and 32, .*rope_base 10000.0 and 500000.0"):
        AverageWeights([one, one, other])
    for coefficients in ((1,), (1, -1), (float("nan"), 1), (float("inf"), 1)):
        with pytest.raises(InputError, match="average"):
            AverageWeights([one, one], coefficients)
    with pytest.raises(InputError, match="average of 0"):
        AverageWeights([])


CHILD = """
import resource, sys, time
sys.path.insert(0, {tests!r})
import test_weights as t
from neo.errors import NeoError
class Slow(t.Drawn):
    def read(self, path, layer=None):
        if {slow}:
            print("read", flush=True)
            time.sleep(0.05)
        return super().read(path, layer)
weights = Slow()
if {limit}:
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
try:
    t.write_checkpoint(weights, {out!r}, t.CONFIG, t.DATA, t.FILES)
except NeoError as error:
    print(type(error).__name__, error, flush=True)
"""


def child(out, environment, slow=False, limit=0):
    program = CHILD.format(tests=os.path.dirname(__file__), out=str(out), slow=slow, limit=limit)
    return subprocess.Popen([sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def test_killed_on_the_way_and_started_again(tmp_path, environment):
    process = child(tmp_path / "out", environment, slow=True)
    for _ in range(12):
        assert process.stdout.readline() == "read\n", process.stderr.read()
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert os.listdir(tmp_path) == ["out.partial"]
    again = Drawn()
    out = write_checkpoint(again, tmp_path / "out", CONFIG, DATA, FILES)
    assert 10 <= len(again.reads) <= 22   # 30 slices in all; the last ones before the kill were not yet written
    same({path: array.astype(np.float32) for path, array in again.arrays.items()},
         flatten(restore(open_checkpoint(out), abstract())["params"]))


def test_a_full_disk_stops_for_a_person(tmp_path, environment):
    """A limit on the size of files comes back from the C++ threads as a full disk does; the embedding is 1536 bytes."""
    process = child(tmp_path / "out", environment, limit=1100)
    told, trouble = process.communicate(timeout=120)
    assert told.startswith("StoppedForPerson the disk of ") and "start the same command again" in told, (told, trouble)
    assert "Traceback" not in trouble
    out = write_checkpoint(Drawn(), tmp_path / "out", CONFIG, DATA, FILES)
    weights = CheckpointWeights(open_checkpoint(out))
    same(Drawn().arrays, {path: weights.read(path) for path in Drawn().arrays})
