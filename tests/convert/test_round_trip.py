"""neo -> Hugging Face -> neo -> Hugging Face, every class, through the command line: not a bit changes, and the class stays."""

from __future__ import annotations

import json

import numpy as np
import pytest

from .conftest import save, tiny_config
from .test_to_hf import read_all, tree_of

GEMMA = dict(norm_placement="sandwich", norm_offset=1.0, activation="gelu_tanh", embedding_multiplier=32**0.5,
             tied_embeddings=True, head_dim=16, attention_scale=24**-0.5)
MODELS = {
    "llama": dict(windows=(0,), rope_scaling="llama3", rope_factor=8.0, rope_old_seq_len=32, rope_base=5e5, output_bias=True,
                  qkv_bias=True, mlp_bias=True),
    "mistral": dict(windows=(7,), head_dim=12),
    "ministral": dict(windows=(7, 0)),
    "mpt": dict(windows=(0,), positions=("alibi",), norm="layer", mlp="plain", activation="gelu", d_ff=128, num_kv_heads=4,
                tied_embeddings=True, clip_qkv=0.5),
    "qwen2": dict(windows=(0,), qkv_bias=True),
    "qwen3": dict(windows=(0, 7), qk_norm="head", head_dim=16),
    "olmo2": dict(windows=(0,), qk_norm="full", norm_placement="post"),
    "gemma2": dict(**GEMMA, windows=(7, 0), attention_softcap=2.0, logit_softcap=3.0),
    "gemma3_text": dict(**GEMMA, windows=(7, 0), positions=("local_rope", "rope"), qk_norm="head", local_rope_base=1e3),
    "granite": dict(windows=(0,), embedding_multiplier=3.0, residual_multiplier=0.4, logit_multiplier=2.0, attention_scale=0.2,
                    tied_embeddings=True),
    "smollm3": dict(windows=(0,), positions=("rope", "none")),
}


def test_every_class_is_here():
    from neo.models.hf.classes import WRITABLE
    assert set(MODELS) == set(WRITABLE)


@pytest.mark.parametrize("name", MODELS)
def test_not_a_bit_changes(convert, tokenizer, tmp_path, name):
    config = tiny_config(**MODELS[name])
    run = save(tmp_path / "run", config, tokenizer)
    for verb, source, out, *flags in (("to-hf", "run", "hf", f"--model_type={name}", "--dtype=fp32"),
                                      ("from-hf", "hf", "back"), ("to-hf", "back", "again", "--dtype=source")):
        ended = convert(verb, tmp_path / source, tmp_path / out, *flags)
        assert ended.code == 0, ended.err
    assert json.loads((tmp_path / "again/config.json").read_text())["model_type"] == name
    before, after = read_all(run), read_all(tmp_path / "back")
    assert before.keys() == after.keys()
    for path in before:
        np.testing.assert_array_equal(before[path], after[path], path)
    one, other = tree_of(tmp_path / "hf"), tree_of(tmp_path / "again")
    for folder in (one, other):
        folder.pop("README.md"), folder.pop("neo_conversion.json")   # they tell the way
    assert one == other
