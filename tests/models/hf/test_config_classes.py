"""Names, shapes and configs against transformers' own classes: a model of each, made from the config that neo writes."""

from __future__ import annotations

import json

import pytest

from neo.config.schema import ModelConfig
from neo.models.hf.classes import CLASSES, WRITABLE, choose_class
from neo.models.hf.config import read_config, write_config
from neo.models.hf.names import copies, hf_shapes

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SHAPE = dict(vocab_size=97, num_layers=4, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=64)
BIASES = dict(qkv_bias=True, output_bias=True)
GEMMA = dict(norm_placement="sandwich", norm_offset=1.0, embedding_multiplier=32 ** 0.5, activation="gelu_tanh",
             tied_embeddings=True, norm_eps=1e-6)
MPT = dict(positions=("alibi",), norm="layer", mlp="plain", activation="gelu", d_ff=128, num_kv_heads=4)
MULTIPLIERS = dict(embedding_multiplier=12.0, residual_multiplier=0.22, logit_multiplier=1 / 8, attention_scale=1 / 64)
CASES = [
    ("llama", {}),
    ("llama", dict(tied_embeddings=True, num_kv_heads=1, head_dim=16, rope_base=5e5, norm_eps=1e-6)),
    ("llama", dict(BIASES, mlp_bias=True, num_kv_heads=4, activation="gelu")),
    ("llama", dict(rope_scaling="llama3", rope_factor=8.0, rope_old_seq_len=32)),
    ("llama", dict(rope_scaling="linear", rope_factor=4.0)),
    ("mistral", dict(windows=(5,))),
    ("mistral", dict(d_model=36, num_heads=8, head_dim=16)),
    ("ministral", dict(windows=(5, 0))),
    ("ministral", dict(windows=(5, 5, 5, 0), head_dim=16, tied_embeddings=True)),
    ("ministral", {}),
    ("qwen2", dict(qkv_bias=True)),
    ("qwen2", dict(qkv_bias=True, windows=(0, 0, 7, 7), head_dim=16, tied_embeddings=True)),
    ("qwen3", dict(qk_norm="head", head_dim=16)),
    ("qwen3", dict(BIASES, qk_norm="head", windows=(8,))),
    ("smollm3", dict(positions=("rope", "rope", "rope", "none"))),
    ("smollm3", dict(positions=("rope", "none"), windows=(0, 9), tied_embeddings=True, mlp_bias=True)),
    ("olmo2", dict(qk_norm="full", norm_placement="post")),
    ("olmo2", dict(BIASES, qk_norm="full", norm_placement="post", num_kv_heads=4, tied_embeddings=True)),
    ("gemma2", dict(GEMMA, windows=(6, 0), attention_softcap=50.0, logit_softcap=30.0)),
    ("gemma2", dict(GEMMA, windows=(0, 6), attention_scale=12 ** -0.5, head_dim=16)),
    ("gemma2", GEMMA),
    ("gemma3_text", dict(GEMMA, windows=(6, 6, 0), positions=("local_rope", "local_rope", "rope"), qk_norm="head",
                         rope_base=1e6, rope_scaling="linear", rope_factor=8.0, head_dim=16)),
    ("gemma3_text", dict({**GEMMA, "tied_embeddings": False}, qk_norm="head", logit_softcap=20.0)),
    ("granite", dict(MULTIPLIERS, **BIASES, mlp_bias=True)),
    ("granite", dict(logit_multiplier=0.25, tied_embeddings=True)),
    ("mpt", dict(MPT, tied_embeddings=True)),
    ("mpt", dict(MPT, clip_qkv=6.0, attention_scale=0.3)),
]


def make(config: ModelConfig, name: str, folder) -> tuple[dict, object]:
    """(config.json, the transformers model it makes), through a folder as users do."""
    hf = write_config(config, CLASSES[name], dtype="float32", bos_token_id=1, eos_token_id=2)
    (folder / "config.json").write_text(json.dumps(hf))
    return hf, transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(folder))


def shapes(model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_every_class_is_here():
    assert {name for name, _ in CASES} == set(WRITABLE)


@pytest.mark.parametrize("name,changes", CASES)
def test_names_shapes_and_configs(name, changes, tmp_path):
    config = ModelConfig(**{**SHAPE, **changes})
    cls = choose_class(config, name)
    hf, model = make(config, name, tmp_path)
    assert type(model).__name__.lower() == cls.architecture.lower()
    theirs, ours = shapes(model), hf_shapes(config, cls)
    for copy, original in copies(config, cls).items():
        assert theirs.pop(copy) == ours[original]
    assert theirs == ours
    assert model(torch.tensor([[3, 4, 5]])).logits.shape == (1, 3, 97)      # runs: some fail on a null that others take
    assert read_config(hf, "x") == config                                   # what neo wrote
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert read_config(saved, "x") == config                                # what transformers made of it
    from safetensors import safe_open
    with safe_open(tmp_path / "model.safetensors", "np") as file:
        assert {key: tuple(file.get_slice(key).get_shape()) for key in sorted(file.keys())} == ours


@pytest.mark.parametrize("name,changes", [("llama", dict(qkv_bias=True)), ("llama", dict(output_bias=True)), ("qwen2", {}),
                                          ("granite", dict(qkv_bias=True)), ("qwen3", dict(qkv_bias=True, qk_norm="head"))])
def test_biases_a_model_lacks_have_a_place(name, changes, tmp_path):
    config = ModelConfig(**{**SHAPE, **changes})
    assert shapes(make(config, name, tmp_path)[1]) == hf_shapes(config, choose_class(config, name))


def test_transformers_4_finds_what_it_looks_for(tmp_path):
    """Version 4 reads only rope_theta and rope_scaling; version 5 makes the same of them as of rope_parameters."""
    for name, changes in CASES:
        config = ModelConfig(**{**SHAPE, **changes})
        hf = write_config(config, CLASSES[name])
        old = {key: value for key, value in hf.items() if key not in ("rope_parameters", "dtype")}
        if "rope_theta" in hf:
            assert read_config(old, "x") == config
            parameters = [transformers.AutoConfig.for_model(**{**one, "torch_dtype": None, "dtype": None}).rope_parameters
                          for one in (hf, old)]
            assert parameters[0] == parameters[1]


def test_the_classes_defaults_are_transformers(tmp_path):
    """What a missing key means is copied from transformers' configs: it must stay what they say."""
    for cls in map(CLASSES.get, WRITABLE):
        theirs = transformers.AutoConfig.for_model(cls.model_type)
        known = {"head_dim", "num_key_value_heads", "rope_theta", "rope_local_base_freq", "sliding_window_pattern",
                 "attn_config", "sliding_window", "max_window_layers", "attention_bias", "mlp_bias", "hidden_act"}
        for key, value in cls.defaults.items():
            if hasattr(theirs, key) and key not in known:
                assert getattr(theirs, key) == value, (cls.model_type, key)
        sizes = ("vocab_size", "d_model", "n_heads", "n_layers") if cls.model_type == "mpt" else (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        bare = {"model_type": cls.model_type, **{key: getattr(theirs, key) for key in sizes}}
        assert read_config(bare, "x") == read_config(json.loads(theirs.to_json_string(use_diff=False)), "x"), cls.model_type
