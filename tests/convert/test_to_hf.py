"""to-hf: what the folder holds, that transformers computes the same with it, and that nothing is lost on the way."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time

import ml_dtypes
import numpy as np
import pytest

from .conftest import ROWS, parameters, save, tiny_config

DTYPES = {"fp32": np.float32, "bf16": ml_dtypes.bfloat16, "fp16": np.float16}


def flat(tree, prefix=""):
    return {path: leaf for name, value in tree.items()
            for path, leaf in (flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {prefix + name: value}).items()}


def read_all(checkpoint) -> dict[str, np.ndarray]:
    """Every parameter of a checkpoint, as stored."""
    from neo.models.weights import parameter_shapes
    from neo.train.checkpoint_format import resolve
    weights = resolve(str(checkpoint)).weights()
    return {path: weights.read(path) for path in parameter_shapes(weights.config)}


def tree_of(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_is_exact(convert, workdir, tmp_path, dtype):
    """neo -> HF -> neo: every parameter bit for bit, in the type that was asked for; the tokenizer and the model too."""
    from neo.data.tokenizer import load_tokenizer
    from neo.train.checkpoint_format import resolve
    assert convert("to-hf", workdir, tmp_path / "hf", f"--dtype={dtype}").code == 0
    assert convert("from-hf", tmp_path / "hf", tmp_path / "back").code == 0
    before, after = read_all(workdir), read_all(tmp_path / "back")
    assert before.keys() == after.keys()
    for path, array in before.items():
        assert after[path].dtype == DTYPES[dtype]
        np.testing.assert_array_equal(array.astype(DTYPES[dtype]).astype(np.float32), after[path].astype(np.float32), path)
    one, other = resolve(str(workdir)), resolve(str(tmp_path / "back"))
    assert one.config().model == other.config().model
    texts = "the quick brown fox", "  日本  9\n"
    tokenizers = [load_tokenizer(found.tokenizer_files()) for found in (one, other)]
    for text in texts:
        assert tokenizers[0].encode(text) == tokenizers[1].encode(text)
    assert tokenizers[0].eod_id == tokenizers[1].eod_id


def test_types_that_are_kept(convert, workdir, tmp_path):
    """A folder in bfloat16 stays so with --dtype=source, and gives the same tensors in other shards."""
    from neo.models.hf.files import SafetensorsFolder
    assert convert("to-hf", workdir, tmp_path / "one").code == 0
    ended = convert("to-hf", tmp_path / "one", tmp_path / "two", "--dtype=source", "--shard_size=20KB")
    assert ended.code == 0, ended.err
    one, two = SafetensorsFolder(tmp_path / "one"), SafetensorsFolder(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("model-*-of-*.safetensors"))) > 2
    assert set(one.tensors) == set(two.tensors)
    for name in one.tensors:
        assert two[name].dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(one.read(name).view(np.uint16), two.read(name).view(np.uint16), name)
    for name in ("tokenizer.json", "generation_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_types_that_are_kept_when_folded(convert, tokenizer, tmp_path):
    """Multiplying in float32 does not make float32 files: also the head that a tied model gets keeps the table's type."""
    from neo.models.hf.files import SafetensorsFolder
    run = save(tmp_path / "run", tiny_config(windows=(0,), tied_embeddings=True, embedding_multiplier=3.0), tokenizer)
    assert convert("to-hf", run, tmp_path / "granite").code == 0
    assert convert("to-hf", tmp_path / "granite", tmp_path / "llama", "--model_type=llama", "--dtype=source").code == 0
    folder = SafetensorsFolder(tmp_path / "llama")
    assert "lm_head.weight" in folder and {folder[name].dtype for name in folder.tensors} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((tmp_path / "llama/config.json").read_text())["dtype"] == "bfloat16"


def test_folder_and_card(convert, workdir, tmp_path):
    ended = convert("to-hf", workdir, tmp_path / "tiny-model")
    assert ended.code == 0, ended.err
    folder = tmp_path / "tiny-model"
    assert {path.name for path in folder.iterdir()} >= {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
        "special_tokens_map.json", "tokenizer.model", "README.md", "neo_conversion.json"}
    assert not list(tmp_path.glob("*.partial"))
    config = json.loads((folder / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["architectures"] == ["MistralForCausalLM"] and config["sliding_window"] == 40
    assert config["vocab_size"] == ROWS
    generation = json.loads((folder / "generation_config.json").read_text())
    assert {"eos_token_id", "pad_token_id", "do_sample"} <= generation.keys() and "max_length" not in generation
    card = (folder / "README.md").read_text()
    front, _, rest = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: transformers" in front and "pipeline_tag: text-generation" in front
    assert not [line for line in front.splitlines() if line.startswith("license:")]   # left to who publishes it
    assert "# tiny" in rest and "700,000,000" in rest and "step 7" in rest
    assert "| short |" in rest and "web 0.75, code 0.25" in rest and '"seq_len": 32' in rest   # recipe and resolved config
    assert "to-hf tiny tiny-model --dtype=bf16" in rest
    assert str(tmp_path) not in card and str(workdir) not in card   # where somebody keeps files is nobody's business
    # What it wrote, and how to load, serve and upload it.
    for part in ("Wrote", "pipeline('text-generation'", "vllm serve", "hf upload", "neo.convert verify"):
        assert part in ended.out


def test_rope_base_of_the_phase(convert, tokenizer, tmp_path):
    """A checkpoint of a phase with another rope base is exported with it."""
    run = save(tmp_path / "run", tiny_config(), tokenizer, phase="long")
    assert convert("to-hf", run, tmp_path / "hf").code == 0
    assert json.loads((tmp_path / "hf/config.json").read_text())["rope_theta"] == 500.0


def test_run_again(convert, workdir, tmp_path):
    """A finished folder is left alone by the same command, refused to another one, replaced with --overwrite."""
    out = tmp_path / "out"
    assert convert("to-hf", workdir, out).code == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    ended = convert("to-hf", workdir, out)
    assert ended.code == 0 and "finished already" in ended.err
    assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    for other in (("--dtype=fp32",), ()):
        source = workdir if other else f"{workdir}@3"
        ended = convert("to-hf", source, out, *other)
        assert ended.code == 2 and "is not empty" in ended.error and "--overwrite" in ended.error
        assert {path.name: path.stat().st_mtime_ns for path in out.iterdir()} == before
    assert convert("to-hf", workdir, out, "--dtype=fp32", "--overwrite").code == 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"
    assert not list(tmp_path.glob("out.*"))


def test_finished_and_damaged_since(convert, workdir, tmp_path):
    """A finished folder that lost a part is not called finished; --overwrite makes it again."""
    out = tmp_path / "out"
    assert convert("to-hf", workdir, out).code == 0
    whole = (out / "model.safetensors").read_bytes()
    (out / "model.safetensors").write_bytes(whole[:-10])
    ended = convert("to-hf", workdir, out)
    assert ended.code == 2 and "damaged since" in ended.error and "--overwrite" in ended.error
    assert convert("to-hf", workdir, out, "--overwrite").code == 0
    assert (out / "model.safetensors").read_bytes() == whole


def test_overwrite_spares_what_is_no_model(convert, workdir, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter1.txt").write_text("years of work")
    for flags in ((), ("--overwrite",)):
        assert convert("to-hf", workdir, tmp_path / "thesis", *flags).code == 2
    assert (tmp_path / "thesis/chapter1.txt").read_text() == "years of work"


def test_every_checkpoint(convert, workdir, tmp_path):
    """--all: a folder per checkpoint, named by its tokens; started again, only what is missing is made."""
    import shutil
    out = tmp_path / "all"
    assert convert("to-hf", workdir, out, "--all").code == 0
    assert sorted(path.name for path in out.iterdir()) == ["300.00M", "700.00M"]
    assert convert("to-hf", f"{workdir}@3", tmp_path / "three").code == 0
    same = ("model.safetensors", "config.json", "tokenizer.json")
    for name in same:
        assert (out / "300.00M" / name).read_bytes() == (tmp_path / "three" / name).read_bytes()
    assert (out / "300.00M/model.safetensors").read_bytes() != (out / "700.00M/model.safetensors").read_bytes()
    first = (out / "300.00M/model.safetensors").stat().st_mtime_ns
    shutil.rmtree(out / "700.00M")
    ended = convert("to-hf", workdir, out, "--all")
    assert ended.code == 0 and ended.err.count("finished already") == 1
    assert (out / "300.00M/model.safetensors").stat().st_mtime_ns == first and (out / "700.00M/config.json").exists()


@pytest.mark.parametrize("tokens, name", [
    (512, "512"), (1_228_800, "1.23M"), (16_777_216_000, "16.78B"), (33_554_432_000, "33.55B"),
    (999_996_000, "1.00B"), (3_700_000_000_000, "3700.00B")])
def test_names_of_intermediate_checkpoints(tokens, name):
    """As MAP-NEO's: 16.78B, 33.55B."""
    from neo.convert.every import token_name
    assert token_name(tokens) == name


def test_equal_names_get_their_step():
    from types import SimpleNamespace

    from neo.convert.every import token_names
    found = [SimpleNamespace(tokens=1_000_000_000 + i, step=i) for i in range(3)]
    assert token_names(found) == ["1.00B", "1.00B-step1", "1.00B-step2"]


# A conversion that stops after a few tensors, as a power cut would.
STOPS = """
import os, signal, sys
from neo.models.hf.files import ShardWriter
plain, count = ShardWriter.write, 0
def write(self, name, array):
    global count
    plain(self, name, array)
    count += 1
    if count == {after}:
        os.kill(os.getpid(), signal.{signal})
ShardWriter.write = write
from neo.convert.__main__ import COMMAND, run
from neo.cli import main
main(COMMAND, run)
"""


@pytest.fixture
def stopped(tmp_path, environment):
    """stopped("SIGKILL", argument, ...) -> the process that got the signal after 9 tensors, run in tmp_path."""
    def start(name, *argv):
        return subprocess.run([sys.executable, "-c", STOPS.format(after=9, signal=name), *map(str, argv)], cwd=tmp_path,
                              env=environment, capture_output=True, text=True)
    return start


def test_killed_and_started_again(convert, stopped, workdir, tmp_path):
    """kill -9 in the middle: OUT is not there, and the same command goes on behind the shards that are complete."""
    child = stopped("SIGKILL", "to-hf", workdir, "out", "--shard_size=10KB")
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert not (tmp_path / "out").exists()
    shards = {path: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").glob("*.safetensors")}
    assert shards
    time.sleep(0.01)
    out = tmp_path / "out"
    ended = convert("to-hf", workdir, out, "--shard_size=10KB")
    assert ended.code == 0 and "going on" in ended.err, ended.err
    for path, before in shards.items():
        assert (out / path.name).stat().st_mtime_ns == before
    assert convert("to-hf", workdir, tmp_path / "whole", "--shard_size=10KB").code == 0
    one, other = tree_of(out), tree_of(tmp_path / "whole")
    one.pop("README.md"), other.pop("README.md")   # it says its own name
    assert one == other


def test_interrupted(stopped, workdir, tmp_path):
    """Ctrl-C: exit code 130, and a line that says how to go on."""
    child = stopped("SIGINT", "to-hf", workdir, "out")
    assert child.returncode == 130 and "Traceback" not in child.stderr, child.stderr
    assert child.stderr.splitlines()[-1] == "neo.convert: interrupted; the same command goes on from here"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.partial"]


def test_partial_of_another_conversion(convert, stopped, workdir, tmp_path):
    """What is left of another dtype's start is not mixed in."""
    stopped("SIGKILL", "to-hf", workdir, "out", "--dtype=fp32", "--shard_size=10KB")
    assert (tmp_path / "out.partial").exists()
    assert convert("to-hf", workdir, tmp_path / "out", "--shard_size=10KB").code == 0
    assert convert("to-hf", workdir, tmp_path / "clean", "--shard_size=10KB").code == 0
    assert {name: content for name, content in tree_of(tmp_path / "out").items() if name != "README.md"} == {
        name: content for name, content in tree_of(tmp_path / "clean").items() if name != "README.md"}


def test_parameters_differ_between_the_steps():
    """Else the tests above would compare nothing."""
    one, other = (flat(parameters(tiny_config().model, step)) for step in (3, 7))
    assert any(np.any(np.asarray(one[path]) != np.asarray(other[path])) for path in one)
