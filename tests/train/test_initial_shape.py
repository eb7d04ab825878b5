"""The model of a config against the model it is to start from."""

from __future__ import annotations

import dataclasses

import pytest

from neo.config import load
from neo.config.schema import InitConfig, ModelConfig
from neo.errors import InputError
from neo.models.hf.config import read_config
from neo.train.initial_shape import UNUSED, differences, require_same_model

BASE = ModelConfig(vocab_size=64, num_layers=4, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=64)


def changed(**fields):
    return dataclasses.replace(BASE, **fields)


@pytest.mark.parametrize("fields", [
    dict(head_dim=8), dict(windows=(0, 0)), dict(positions=("rope", "rope")), dict(attention_scale=8**-0.5),
    dict(max_seq_len=128), dict(local_rope_base=5.0), dict(rope_factor=4.0), dict(rope_old_seq_len=5),
    dict(alibi_bias_max=4.0)], ids=str)
def test_other_spellings_of_the_same_model(fields):
    assert differences(BASE, changed(**fields)) == {}


def test_every_field_that_counts_is_compared():
    other = {"windows": (16, 0), "positions": ("rope", "none"), "mlp": "plain", "activation": "gelu", "norm": "layer",
             "norm_placement": "post", "qk_norm": "head", "rope_scaling": "linear"}
    for field in dataclasses.fields(ModelConfig):
        if field.name == "max_seq_len" or field.name in UNUSED and field.name not in ("rope_base", "rope_scaling"):
            continue
        value = getattr(BASE, field.name)
        value = other[field.name] if field.name in other else not value if isinstance(value, bool) else value + 4
        assert set(differences(BASE, changed(**{field.name: value}))) == {field.name}


@pytest.mark.parametrize("field,uses", [
    ("local_rope_base", dict(positions=("rope", "local_rope"))), ("alibi_bias_max", dict(positions=("alibi",))),
    ("rope_factor", dict(rope_scaling="linear")), ("rope_old_seq_len", dict(rope_scaling="llama3"))])
def test_fields_that_are_used_only_sometimes(field, uses):
    base = changed(**uses)
    assert set(differences(base, dataclasses.replace(base, **{field: getattr(base, field) * 2}))) == {field}


def test_without_rope_its_base_does_not_count():
    assert differences(changed(positions=("none",)), changed(positions=("none",), rope_base=5.0)) == {}


def test_what_differs_is_listed_with_the_flags_that_mend_it():
    with pytest.raises(InputError) as refused:
        require_same_model(changed(windows=(16, 0), norm_eps=1e-6, tied_embeddings=True), BASE, InitConfig(), "m/x")
    text = str(refused.value)
    assert "\n" not in text and text.startswith("config.model is not the model of m/x: windows=0 (there 16,0), norm_eps=1e-05 ")
    assert "--config.model.windows=16,0 --config.model.norm_eps=1e-06 --config.model.tied_embeddings=True" in text


@pytest.mark.parametrize("fields,init,named", [
    (dict(num_layers=6), {}, "num_layers=4, or --config.init.depth=interleave or stack"),
    (dict(rope_base=5e5), {}, "a phase may have a rope_base of its own"),
    (dict(vocab_size=60), {}, "vocab_size=60 .there 64."),
    (dict(num_layers=6, d_ff=64), dict(depth="stack"), "d_ff=64 .there 48.")])
def test_cures(fields, init, named):
    with pytest.raises(InputError, match=named):
        require_same_model(BASE, changed(**fields), InitConfig(**init), "there")


def test_what_the_options_allow():
    assert require_same_model(BASE, changed(vocab_size=80), InitConfig(), "there") == []
    assert require_same_model(BASE, changed(vocab_size=60), InitConfig(extend_vocab=True), "there") == []
    assert require_same_model(BASE, changed(num_layers=6), InitConfig(depth="stack"), "there") == []
    longer = changed(num_layers=6, windows=(8, 0), max_seq_len=128)
    assert require_same_model(BASE, longer, InitConfig(depth="stack"), "there") == [
        "model.windows is 8,0, that of there 0: blocks take the pattern of their new place",
        "model.max_seq_len=128 is longer than the 64 of there"]


def test_moxin_starts_from_the_published_mistral():
    """mistralai/Mistral-7B-v0.1, config.json; Moxin-7B has 36 blocks of the same kind."""
    mistral = read_config({
        "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings":
        32768, "model_type": "mistral", "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads":
        8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0", "use_cache": True, "vocab_size": 32000}, "mistral")
    assert require_same_model(mistral, load("moxin_7b").model, InitConfig(depth="interleave"), "mistral") == []
