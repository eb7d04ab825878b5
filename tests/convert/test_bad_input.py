"""What cannot be converted: one line that names it, exit code 2, nothing written, nothing lost."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from .conftest import save, tiny_config


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    """A good Hugging Face folder in several shards, to be copied and broken."""
    from neo.convert.source import open_source
    from neo.convert.to_hf import Options, write_hf
    out = tmp_path_factory.mktemp("good") / "hf"
    write_hf(open_source(str(workdir)), out, Options(shard_bytes=20_000))
    return out


@pytest.fixture
def broken(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "hf")


@pytest.fixture
def refused(convert, tmp_path):
    """refused(verb, source, *flags) -> the line. Asserts exit code 2 and that nothing new lies in the folder."""
    def start(verb, source, *flags):
        before = sorted(tmp_path.rglob("*"))
        ended = convert(verb, source, tmp_path / "new" / ("out.gguf" if verb == "to-gguf" else "out"), *flags)
        assert ended.code == 2, ended.err
        assert ended.out == ""
        line = ended.error
        left = [path for path in sorted(tmp_path.rglob("*")) if path not in before and path.is_file()]
        assert not left, left
        return line
    return start


def change_config(folder, **changes):
    path = folder / "config.json"
    tree = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in tree.items() if value != "gone"}))


def test_unknown_class_and_keys(refused, broken):
    change_config(broken, model_type="mamba", architectures=["MambaForCausalLM"])
    assert "mamba" in refused("from-hf", broken)
    change_config(broken, model_type="mistral", attention_multiplier=3.0, router_jitter=0.1)
    line = refused("from-hf", broken)
    assert "router_jitter" in line and "attention_multiplier" in line   # both are listed


def test_config_and_tensors_of_different_shapes(refused, broken):
    change_config(broken, intermediate_size=96)
    line = refused("to-gguf", broken)
    assert "mlp.gate_proj.weight" in line and "[48, 32]" in line and "[96, 32]" in line


def test_missing_and_unexpected_tensors(refused, broken):
    change_config(broken, num_hidden_layers=3)
    assert "model.layers.2." in refused("from-hf", broken)
    change_config(broken, num_hidden_layers=1)
    assert "model.layers.1." in refused("from-hf", broken)


def test_missing_shard(refused, broken):
    (broken / "model-00002-of-00005.safetensors").unlink(missing_ok=True)
    names = sorted(path.name for path in broken.glob("model-*.safetensors"))
    (broken / names[1]).unlink()
    assert names[1] in refused("to-hf", broken)


def test_truncated_file(refused, broken):
    path = sorted(broken.glob("model-*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])
    line = refused("from-hf", broken)
    assert path.name in line and "cut short" in line


def test_header_that_is_none(refused, broken):
    path = sorted(broken.glob("model-*.safetensors"))[0]
    path.write_bytes(b"\xff" * 8 + b"not a header")
    assert path.name in refused("from-hf", broken)


def test_pickled_weights_only(refused, broken):
    for path in broken.glob("model*"):
        path.unlink()
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04\x95never opened")
    for verb in ("from-hf", "to-hf", "to-gguf"):
        line = refused(verb, broken)
        assert "pickled" in line and "safetensors" in line and "save_pretrained" in line


def test_no_model_there(refused, tmp_path, broken):
    assert "does not exist" in refused("to-hf", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("to-hf", tmp_path / "empty")
    assert "config.json" in refused("from-hf", tmp_path / "empty")
    assert "revision" in refused("from-hf", broken, "--revision=main")


def test_grouped_heads_as_mpt(refused, convert, tokenizer, tmp_path):
    """Key/value heads are repeated when asked for, and only then."""
    config = tiny_config(windows=(0,), positions=("alibi",), norm="layer", mlp="plain", activation="gelu", d_ff=128,
                         tied_embeddings=True)
    run = save(tmp_path / "run", config, tokenizer)
    line = refused("to-hf", run, "--model_type=mpt")
    assert "4 query, 2 key/value" in line
    assert convert("to-hf", run, tmp_path / "hf", "--model_type=mpt", "--repeat_kv").code == 0
    assert json.loads((tmp_path / "hf/config.json").read_text())["n_heads"] == 4


def test_class_that_cannot_hold_the_model(refused, workdir):
    line = refused("to-hf", workdir, "--model_type=llama")
    assert "window" in line and "LlamaForCausalLM" in line
    assert "did you mean 'mistral'" in refused("to-hf", workdir, "--model_type=mistrall")


def test_tokenizer_of_another_model(refused, workdir, tokenizer, tmp_path):
    small = save(tmp_path / "run", tiny_config(vocab_size=64), tokenizer)
    for verb in ("to-hf", "to-gguf"):
        line = refused(verb, small)
        assert "300 ids" in line and "64 " in line


def test_model_trained_on_random_tokens(refused, tmp_path):
    run = save(tmp_path / "run", tiny_config(), None, synthetic=True)
    assert "random tokens" in refused("to-hf", run)


def test_float16_overflow(convert, tokenizer, tmp_path, monkeypatch):
    """A value beyond 65504 stops the conversion, and nothing of it is left; bfloat16 holds it."""
    from neo.train import weights
    plain = weights.CheckpointWeights.read

    def read(self, path, layer=None):
        array = plain(self, path, layer)
        return array * np.float32(1e6) if path == "layers/mlp/down" and layer == 1 else array
    run = save(tmp_path / "run", tiny_config(), tokenizer)
    monkeypatch.setattr(weights.CheckpointWeights, "read", read)
    ended = convert("to-hf", run, tmp_path / "hf", "--dtype=fp16")
    assert ended.code == 2 and "layers/mlp/down of layer 1" in ended.error and "--dtype=bf16" in ended.error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert convert("to-hf", run, tmp_path / "hf").code == 0


def test_places_that_are_in_the_way(convert, workdir, exported, tmp_path):
    places = ((workdir, workdir), (workdir, workdir / "checkpoints/8"), (exported, exported), (exported, exported / "again"),
              (exported, exported.parent))
    for source, out in places:
        before = sorted(out.rglob("*")) if out.exists() else None
        ended = convert("to-hf", source, out, "--overwrite")
        assert ended.code == 2 and "what is to be read" in ended.error
        assert (sorted(out.rglob("*")) if out.exists() else None) == before
    (tmp_path / "file").write_text("x")
    assert convert("to-hf", workdir, tmp_path / "file" / "below").code == 2
    assert convert("to-hf", workdir, tmp_path / "file").code == 2
    assert (tmp_path / "file").read_text() == "x"
    assert convert("to-hf", workdir, "gs://bucket/out").code == 2


@pytest.mark.parametrize("size", ["0", "-5GB", "five", "5XB", "nan", "inf"])
def test_shard_size(refused, workdir, size):
    assert "--shard_size" in refused("to-hf", workdir, f"--shard_size={size}")


def test_disk_that_is_too_small(convert, workdir, tmp_path, monkeypatch):
    """Exit code 3, with both numbers, before anything is written."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    ended = convert("to-hf", workdir, tmp_path / "out")
    assert ended.code == 3 and "GB left" in ended.error
