"""`neo.load`: logits, text, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

import neo
from neo.config.schema import ModelConfig
from neo.errors import InputError
from neo.infer.model import continuation, spread_over
from neo.models.decoder import Decoder


@pytest.fixture(scope="module")
def model(workdir):
    return neo.load(workdir)


def test_logits_equal_the_forward_pass(model, config, saved):
    """Padded to a bucket, and back to [B, T, V]."""
    forward = jax.jit(Decoder(config.model).apply)
    tokens = np.random.default_rng(0).integers(0, config.model.vocab_size, (3, 37))
    found = model.logits(tokens)
    assert isinstance(found, np.ndarray) and found.dtype == np.float32
    assert found.shape == (3, 37, config.model.vocab_size)
    np.testing.assert_allclose(found, forward(saved[1], tokens), atol=1e-4)
    np.testing.assert_allclose(model.logits(tokens[:1].tolist()), found[:1], atol=1e-5)


def test_many_rows_go_in_parts(model, monkeypatch):
    monkeypatch.setattr("neo.infer.model.TOKENS_AT_ONCE", 64)
    tokens = np.arange(5 * 20).reshape(5, 20)
    one_by_one = np.concatenate([model.logits(row[None]) for row in tokens])
    np.testing.assert_allclose(model.logits(tokens), one_by_one, atol=1e-5)


def test_generates_text(model, tokenizer):
    one = model.generate("the quick ", max_new_tokens=20)
    assert isinstance(one, str) and one
    assert one == model.generate("the quick ", max_new_tokens=20)
    assert one != model.generate("the quick ", max_new_tokens=20, seed=1)
    several = model.generate(["the quick ", "", "the quick "], max_new_tokens=20)
    assert several[0] == one != several[2]
    assert model.tokenizer.sha256 == tokenizer.sha256
    details = model.continuations(["the quick "], max_new_tokens=20)[0]
    assert details.text == "the quick " + one and details.new_tokens == 20 and not details.ended


def test_ended_says_that_the_model_stopped(model, monkeypatch):
    prompt = "the quick "
    first = int(np.argmax(model.logits([model.tokenizer.encode(prompt)])[0, -1, :model.tokenizer.vocab_size]))
    monkeypatch.setitem(model.__dict__, "tokenizer", type(model.tokenizer)(model.tokenizer.model, -1, first))
    found = model.continuations([prompt], max_new_tokens=5, temperature=0.0)[0]
    assert (found.ended, found.new_tokens, found.continuation) == (True, 0, "")


def test_text_reads_on_from_the_prompt(tokenizer):
    """Token by token, a space between words included; broken UTF-8 included."""
    text = "the quick brown fox"
    ids = tokenizer.encode(text)
    for cut in range(len(ids) + 1):
        assert tokenizer.decode(ids[:cut]) + continuation(tokenizer, ids[:cut], ids[cut:]) == text
    euro = tokenizer.encode("€")
    assert len(euro) > 1 and continuation(tokenizer, euro[:1], ids) == text


def test_a_dummy_prefix_loses_no_space():
    """Models of the Llama kind decode a first `▁fox` without its space; behind a prompt it must be there."""
    class Dummy:
        def decode(self, ids):
            return "".join(ids).replace("▁", " ").removeprefix(" ")
    assert continuation(Dummy(), ["▁brown"], ["▁fox"]) == " fox"
    assert continuation(Dummy(), [], ["▁fox"]) == "fox"


def test_what_it_knows(model, config, workdir):
    assert model.config == config
    assert model.checkpoint.path == workdir / "checkpoints" / "3" and model.checkpoint.step == 3
    assert model.params["embed"]["table"].shape == (config.model.vocab_size, 32)


def test_rope_base_is_that_of_the_phase(config, workdir, saved, tmp_path, model):
    shutil.copytree(workdir / "checkpoints" / "3", tmp_path / "late")
    file = tmp_path / "late" / "data" / "data.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "phase": "long"}))
    long = neo.load(tmp_path / "late")
    assert (model.rope_base, long.rope_base) == (0.0, 500.0)
    tokens = np.arange(30)[None]
    forward = jax.jit(lambda params, tokens: Decoder(config.model).apply(params, tokens, rope_base=500.0))
    np.testing.assert_allclose(long.logits(tokens), forward(saved[1], tokens), atol=1e-4)
    assert abs(long.logits(tokens) - model.logits(tokens)).max() > 0.1


def test_a_copied_folder_stands_alone(workdir, tmp_path, model):
    shutil.copytree(workdir / "checkpoints" / "3", tmp_path / "mine")
    assert neo.load(tmp_path / "mine").generate("fox", max_new_tokens=20) == model.generate("fox", max_new_tokens=20)


def test_half_precision_matrices_change_nothing(workdir, model, monkeypatch):
    """On devices with bfloat16, matrices are loaded in it; the forward pass would have cast them anyway."""
    monkeypatch.setattr("neo.infer.model.devices.has_bfloat16", lambda device: True)
    half = neo.load(workdir)
    assert half.params["embed"]["table"].dtype == half.params["layers"]["mlp"]["up"].dtype == "bfloat16"
    assert half.params["final_norm"]["scale"].dtype == half.params["layers"]["mlp_norm"]["scale"].dtype == "float32"
    tokens = np.arange(12)[None]
    exact = dataclasses.replace(half, params=model.params).logits(tokens)
    # The compiler may skip the rounding of a weight that it casts itself, never more than that.
    assert np.linalg.norm(half.logits(tokens) - exact) < 0.01 * np.linalg.norm(exact)


def test_synthetic_has_logits_and_no_text(synthetic_workdir):
    model = neo.load(synthetic_workdir)
    assert model.logits([[1, 2, 3]]).shape[1] == 3
    with pytest.raises(InputError, match="no tokenizer, because it was trained on synthetic data"):
        model.generate("x")


def test_missing_tokenizer_is_named(workdir, tmp_path):
    shutil.copytree(workdir / "checkpoints" / "3", tmp_path / "mine")
    shutil.rmtree(tmp_path / "mine" / "tokenizer")
    with pytest.raises(InputError, match="tokenizer/ folder is missing"):
        neo.load(tmp_path / "mine").generate("x")


@pytest.mark.parametrize("tokens,named", [
    ([1, 2], r"shape \[2\].*\[B, T\]"), ([[0.5]], "float64"), ([[]], "whole numbers"), ([[320]], "token 320.*0 to 319"),
    ([[3, -1]], "token -1"), ([[1] * 201], "201 tokens are more than model.max_seq_len=200")])
def test_wrong_tokens(model, tokens, named):
    with pytest.raises(InputError, match=named):
        model.logits(tokens)


@pytest.mark.parametrize("prompt,settings,named", [
    ("fox " * 300, {}, "max_seq_len=200"), ("x", dict(top_p=3), "top_p=3"),
    ("x", dict(max_new_tokens=0), "max_new_tokens=0"),
    (["a", 5], {}, "a prompt is text, not int: '5'")])
def test_wrong_prompts(model, prompt, settings, named):
    with pytest.raises(InputError, match=named):
        model.generate(prompt, **settings)


def test_where_the_weights_go():
    class Device:
        device_kind = "v9"
    shape = ModelConfig()
    assert spread_over(shape, 2, [Device()], 16 * 10**9) is None
    assert spread_over(shape, 4, [Device()], None) is None
    with pytest.raises(InputError, match=r"weights need 31.2 GB, 1 x v9 has 16.0 GB each"):
        spread_over(shape, 4, [Device()], 16 * 10**9)
    with pytest.raises(InputError, match=r"2 x v9 has 10.0 GB each"):
        spread_over(shape, 4, [Device()] * 2, 10 * 10**9)
