"""verify: says yes to what was exported, and no, with exit code 3, to an export with anything changed in it."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest

from .conftest import save, tiny_config


@pytest.fixture(scope="module")
def export(workdir, tmp_path_factory):
    """export(dtype) -> a Hugging Face folder of the run, made once."""
    from neo.convert.source import open_source
    from neo.convert.to_hf import Options, write_hf
    base = tmp_path_factory.mktemp("exports")

    def make(dtype):
        if not (base / dtype).exists():
            write_hf(open_source(str(workdir)), base / dtype, Options(dtype=dtype))
        return base / dtype
    return make


def change_tensor(folder, name, change):
    from safetensors.numpy import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    tensors[name] = np.ascontiguousarray(change(tensors[name]))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


class TestHuggingFace:
    @pytest.fixture(autouse=True, scope="class")
    def libraries(self):
        pytest.importorskip("torch")
        pytest.importorskip("transformers")

    @pytest.mark.parametrize("dtype", ["fp32", "bf16"])
    def test_export_is_what_it_was_made_from(self, convert, workdir, export, dtype):
        """float32: all within float32 rounding. bfloat16: the tolerance is what rounding the parameters does."""
        ended = convert("verify", workdir, export(dtype), "--json")
        assert ended.code == 0, ended.err
        found = json.loads(ended.out)
        same, whole = found["comparisons"]
        assert found["passed"] and same["max_difference"] < same["tolerance"] < 1e-3
        assert "equal" in found["greedy"] and "same ids" in found["tokenizer"]
        if dtype == "fp32":
            assert whole["max_difference"] < 1e-4 and whole["agreement"] == 1.0
        else:
            assert 1e-3 < whole["max_difference"] <= whole["tolerance"] < 1.0 and whole["kl"] < 1e-2

    def test_changed_weights(self, convert, workdir, export, tmp_path):
        """One matrix of one layer upside down: the file is sound in itself, and not the checkpoint."""
        broken = shutil.copytree(export("fp32"), tmp_path / "broken")
        change_tensor(broken, "model.layers.1.mlp.up_proj.weight", lambda x: x[::-1])
        ended = convert("verify", workdir, broken)
        assert ended.code == 3 and "the checkpoint" in ended.error and "does not compute" in ended.error
        assert ended.out.count("BEYOND") == 1 and ended.out.count(" ok") == 1

    def test_changed_config(self, convert, workdir, export, tmp_path):
        """A window that is one token shorter: seen, because one of the prompts is longer than the window."""
        broken = shutil.copytree(export("fp32"), tmp_path / "broken")
        tree = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps({**tree, "sliding_window": 39}))
        ended = convert("verify", workdir, broken)
        assert ended.code == 3 and "the checkpoint" in ended.error

    def test_tokenizer_of_its_own(self, convert, workdir, export, tmp_path):
        broken = shutil.copytree(export("fp32"), tmp_path / "broken")
        text = (broken / "tokenizer.json").read_text()
        (broken / "tokenizer.json").write_text(text.replace('"vocab"', '"vocab_"'))
        assert convert("verify", workdir, broken).code in (2, 3)

    def test_folded_twice_rounded(self, convert, tokenizer, tmp_path):
        """Gains and multipliers multiplied into bfloat16 weights round them once more, within the tolerance that says so."""
        config = tiny_config(wesar=True, qkv_bias=True, windows=(0,), embedding_multiplier=10.0, residual_multiplier=0.3,
                             logit_multiplier=0.7)
        run = save(tmp_path / "run", config, tokenizer)
        assert convert("to-hf", run, tmp_path / "granite", "--dtype=bf16").code == 0
        assert json.loads((tmp_path / "granite/config.json").read_text())["model_type"] == "granite"
        assert convert("to-hf", tmp_path / "granite", tmp_path / "llama", "--model_type=llama").code == 0
        ended = convert("verify", tmp_path / "granite", tmp_path / "llama", "--json")
        assert ended.code == 0, ended.out + ended.err
        same, whole = json.loads(ended.out)["comparisons"]
        assert same["max_difference"] <= same["tolerance"] < whole["max_difference"] <= whole["tolerance"]

    def test_another_model(self, convert, workdir, tokenizer, tmp_path):
        other = save(tmp_path / "run", tiny_config(d_ff=64), tokenizer)
        assert convert("to-hf", other, tmp_path / "hf").code == 0
        ended = convert("verify", workdir, tmp_path / "hf")
        assert ended.code == 2 and "d_ff is 64" in ended.error
        assert "neither a Hugging Face folder nor" in convert("verify", workdir, other).error

    def test_pipeline(self, export):
        """What the model card and the last lines of to-hf say: one line of Python gives text."""
        import transformers
        transformers.utils.logging.set_verbosity_error()
        pipe = transformers.pipeline("text-generation", str(export("bf16")))
        assert pipe.model.dtype.is_floating_point and str(pipe.model.dtype) == "torch.bfloat16"
        text = pipe("the quick", max_new_tokens=8)[0]["generated_text"]
        assert text.startswith("the quick")

    def test_nothing_is_missing(self, export):
        """transformers draws random weights for what is missing, and only says so."""
        import transformers
        _, info = transformers.AutoModelForCausalLM.from_pretrained(export("bf16"), output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_without_the_library(convert, workdir, export, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    ended = convert("verify", workdir, export("bf16"))
    assert ended.code == 2 and library in ended.error and "pip install" in ended.error


class TestGGUF:
    @pytest.fixture(autouse=True, scope="class")
    def libraries(self):
        pytest.importorskip("gguf")
        pytest.importorskip("xllamacpp")

    def test_file_and_what_is_no_file(self, convert, workdir, tmp_path):
        """From a run and from its Hugging Face folder; again: nothing to do; another model: exit code 3."""
        file = tmp_path / "tiny.gguf"
        ended = convert("to-gguf", workdir, file, "--type=f32")
        assert ended.code == 0 and "llama-cli" in ended.out and "hf upload" in ended.out, ended.err
        before = file.stat().st_mtime_ns
        assert "finished already" in convert("to-gguf", workdir, file, "--type=f32").err
        assert convert("to-gguf", workdir, file, "--type=q8_0").code == 2
        assert file.stat().st_mtime_ns == before
        ended = convert("verify", workdir, file, "--json")
        assert ended.code == 0 and json.loads(ended.out)["passed"], ended.out + ended.err
        assert convert("verify", f"{workdir}@3", file).code == 3
        assert convert("to-gguf", workdir, file, "--type=q8_0", "--overwrite").code == 0
        ended = convert("verify", workdir, file)
        assert ended.code == 0 and "same argmax" in ended.out and "llama-server" in ended.out

    def test_from_a_hugging_face_folder(self, convert, workdir, export, tmp_path):
        """HF -> GGUF in one command: the same tensors as straight from the run."""
        import gguf
        assert convert("to-gguf", workdir, tmp_path / "a.gguf", "--type=F16").code == 0
        assert convert("to-gguf", export("fp32"), tmp_path / "b.gguf", "--type=f16").code == 0
        one, other = (gguf.GGUFReader(tmp_path / name).tensors for name in ("a.gguf", "b.gguf"))
        assert [tensor.name for tensor in one] == [tensor.name for tensor in other]
        for a, b in zip(one, other, strict=True):
            np.testing.assert_array_equal(a.data, b.data, a.name)

    def test_bad_requests(self, convert, workdir, tmp_path):
        assert "ends in .gguf" in " ".join(convert("to-gguf", workdir, tmp_path / "x").err.split()).replace("name ends", "ends")
        assert "q9_0" in convert("to-gguf", workdir, tmp_path / "x.gguf", "--type=q9_0").error
        assert "gguf_arch" in convert("to-gguf", workdir, tmp_path / "x.gguf", "--gguf_arch=lama").error
        (tmp_path / "x.gguf").write_text("not a model")
        assert convert("to-gguf", workdir, tmp_path / "x.gguf").code == 2
        assert convert("verify", workdir, tmp_path / "x.gguf").code == 2
        assert convert("verify", workdir, tmp_path / "y.gguf").code == 2
