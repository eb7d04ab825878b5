"""A Hugging Face folder wherever a CHECKPOINT is taken: the same model object, the same command."""

from __future__ import annotations

import dataclasses
import io
import json
import shutil

import numpy as np
import pytest

import neo
from neo.cli import invoke
from neo.data.tokenizer_export import hf_files
from neo.errors import InputError
from neo.infer.__main__ import COMMAND, run
from neo.train.checkpoint_format import resolve

torch = pytest.importorskip("torch")

WINDOW = 7   # shorter than the prompts
NEW = 44      # with its prompt at most 64: one size of cache, one program for all tests here


@pytest.fixture(scope="module")
def made(tmp_path_factory, save_hf_model, tokenizer):
    """(folder, the transformers model that was saved there)."""
    folder = tmp_path_factory.mktemp("hf") / "tiny mistral"
    return folder, save_hf_model(folder, "Mistral", tokenizer, sliding_window=WINDOW)


@pytest.fixture(scope="module")
def model(made):
    return neo.load(made[0])


def theirs(hf, tokens):
    with torch.no_grad():
        return hf(torch.tensor(tokens), use_cache=False).logits.numpy()


def test_logits_equal_transformers(made, model):
    tokens = np.random.default_rng(0).integers(0, 320, (2, 40))
    wanted = theirs(made[1], tokens)
    assert abs(wanted).max() > 1
    np.testing.assert_allclose(model.logits(tokens), wanted, atol=3e-5)   # float32 sums in another order, logits up to 10


def test_greedy_text_equals_transformers(made, model):
    """Through two caches of different make."""
    prompt = "the quick brown"
    ids = model.tokenizer.encode(prompt)
    assert len(ids) > WINDOW
    found = made[1].generate(torch.tensor([ids]), max_new_tokens=NEW, do_sample=False, eos_token_id=model.tokenizer.eod_id,
                             pad_token_id=0)[0, len(ids):].tolist()
    ours = neo.infer.model.generate(model.decoder, model.params, [ids], max_new_tokens=NEW, temperature=0.0,
                                    eod_id=model.tokenizer.eod_id)[0]
    assert ours == found[:len(ours)] and len(ours) > 5 and len(ids) + NEW <= 64
    assert model.generate(prompt, max_new_tokens=NEW, temperature=0.0)


def test_what_it_knows(made, model, tokenizer):
    folder = made[0]
    assert model.checkpoint.path == folder and model.checkpoint.kind == "hf"
    assert (model.checkpoint.step, model.checkpoint.tokens, model.checkpoint.data()["step"]) == (0, 0, 0)
    assert model.config.name == "tiny_mistral" and model.config.model.windows == (WINDOW,)
    assert model.config.model.vocab_size == 320 and model.config.phases == ()
    assert model.tokenizer.sha256 == tokenizer.sha256
    assert resolve(str(folder)).config() == model.config


def test_prompts_begin_as_the_model_was_trained(made, tmp_path, tokenizer):
    """A tokenizer that puts BOS before a text does so before a prompt, an empty one included."""
    folder = shutil.copytree(made[0], tmp_path / "bos")
    for name, content in hf_files(dataclasses.replace(tokenizer, add_bos=True), vocab_rows=320, max_seq_len=200).items():
        (folder / name).write_bytes(content)
    model = neo.load(folder)
    ids = model.tokenizer.encode("fox")
    found = [model.continuations([prompt], max_new_tokens=8, temperature=0.0)[0] for prompt in ("fox", "")]
    assert [one.prompt_tokens for one in found] == [len(ids) + 1, 1]
    with_bos, without = (neo.infer.model.generate(model.decoder, model.params, [start + ids], max_new_tokens=8, temperature=0.0,
                                                  eod_id=model.tokenizer.eod_id, vocab_size=model.tokenizer.vocab_size)[0]
                         for start in ([tokenizer.bos_id], []))
    assert with_bos != without and found[0].continuation == tokenizer.decode(with_bos)


def test_half_precision_files_and_devices(tmp_path, save_hf_model, monkeypatch):
    """bfloat16 files are read as they are; on devices with bfloat16 only the norms are widened."""
    kind = type(save_hf_model(tmp_path, "Qwen2", dtype="bfloat16"))
    tokens = np.arange(24)[None]
    wanted = theirs(kind.from_pretrained(tmp_path, dtype=torch.float32), tokens)
    np.testing.assert_allclose(neo.load(tmp_path).logits(tokens), wanted, atol=3e-5)
    monkeypatch.setattr("neo.infer.model.devices.has_bfloat16", lambda device: True)
    half = neo.load(tmp_path)
    assert half.params["embed"]["table"].dtype == half.params["layers"]["mlp"]["up"].dtype == "bfloat16"
    assert half.params["layers"]["attention"]["query_bias"].dtype == half.params["final_norm"]["scale"].dtype == "float32"
    assert np.linalg.norm(half.logits(tokens) - wanted) < 0.1 * np.linalg.norm(wanted)


def infer(capsys, monkeypatch, *arguments):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    code = invoke(COMMAND, run, [str(a) for a in arguments])
    return code, *capsys.readouterr()


def test_the_command(made, model, capsys, monkeypatch):
    folder = made[0]
    code, out, err = infer(capsys, monkeypatch, folder, "--prompt=the quick", "--max_new_tokens=6", "--json")
    record = json.loads(out)
    assert code == 0 and record["checkpoint"] == str(folder) and record["step"] == 0
    assert record["continuation"] == model.generate("the quick", max_new_tokens=6)
    assert f"{folder}: Hugging Face model, MistralForCausalLM; loaded in" in err


def damaged(made, tmp_path, how):
    folder = shutil.copytree(made[0], tmp_path / "broken")
    config = json.loads((folder / "config.json").read_text())
    weights = folder / "model.safetensors"
    if how == "pickled":
        weights.rename(folder / "pytorch_model.bin")
    elif how == "no_weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif how == "class":
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert", "architectures": ["BertModel"]}))
    elif how == "layers":
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    elif how == "config":
        (folder / "config.json").write_text("{")
    return folder


@pytest.mark.parametrize("how,named", [
    ("pickled", "has pickled weights only (pytorch_model.bin)"), ("no_weights", "no *.safetensors: its weights are missing"),
    ("truncated", "model.safetensors"), ("class", "bert"), ("layers", "lacks"), ("config", "config.json cannot be read")])
def test_bad_folders_are_one_line_and_exit_2(made, tmp_path, capsys, monkeypatch, how, named):
    code, out, err = infer(capsys, monkeypatch, damaged(made, tmp_path, how), "--prompt=x")
    assert (code, out) == (2, "")
    assert named in err.splitlines()[-1] and "Traceback" not in err


def test_a_folder_has_no_steps(made, tmp_path):
    with pytest.raises(InputError, match="is a Hugging Face folder, which has no steps"):
        resolve(f"{made[0]}@5")


def test_without_a_tokenizer_there_are_logits_and_no_text(made, tmp_path):
    folder = shutil.copytree(made[0], tmp_path / "bare")
    for name in ("tokenizer.json", "tokenizer.model"):
        (folder / name).unlink()
    model = neo.load(folder)
    assert model.logits([[1, 2, 3]]).shape == (1, 3, 320)
    with pytest.raises(InputError, match="has no tokenizer, because its folder holds none"):
        model.generate("x")
