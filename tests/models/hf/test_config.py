"""config.json: published ones are read right, everything that changes the function is understood or refused."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from neo.config.schema import ModelConfig
from neo.errors import InputError
from neo.models.hf.classes import CLASSES, WRITABLE, choose_class, to_fold
from neo.models.hf.config import class_of, read_config, write_config
from neo.models.hf.names import hf_shapes

PUBLISHED = json.loads((Path(__file__).parent / "published.json").read_text())
SHAPE = dict(vocab_size=97, num_layers=4, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=64)
MPT = dict(positions=("alibi",), norm="layer", mlp="plain", activation="gelu", d_ff=128, num_kv_heads=4, tied_embeddings=True)

# Parameters as published: file sizes on the hub in two-byte types, or the model cards.
PARAMETERS = {
    "m-a-p/neo_7b": 7_793_716_224,                       # 15.59 GB in four files
    "m-a-p/neo_2b_general": 2_244_552_704,
    "m-a-p/neo_scalinglaw_980M": 979_945_472,            # 1.9599 GB
    "m-a-p/neo_scalinglaw_460M": 461_661_184,            # 923.3 MB
    "m-a-p/neo_scalinglaw_250M": 250_889_216,
    "moxin-org/moxin-llm-7b": 8_114_180_096,
    "yulan-team/YuLan-Mini": 2_424_375_168,              # 4.85 GB
    "yulan-team/YuLan-Mini-Before-Annealing": 2_234_188_098,
    "mosaicml/mpt-7b": 6_649_286_656,
    "mosaicml/mpt-30b-chat": 29_957_200_896,
    "replit/replit-code-v1_5-3b": 3_322_088_448,
    "meta-llama/Llama-2-7b-hf": 6_738_415_616,
    "meta-llama/Llama-3.1-8B": 8_030_261_248,
    "HuggingFaceTB/SmolLM2-360M": 361_821_120,
    "HuggingFaceTB/SmolLM3-3B": 3_075_098_624,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "allenai/OLMo-2-1124-7B": 7_298_617_344,
    "google/gemma-2-2b": 2_614_341_888,
    "google/gemma-3-1b-pt": 999_885_952,
    "ibm-granite/granite-3.1-2b-base": 2_533_525_504,
}


def parameters(name: str) -> int:
    hf = PUBLISHED[name]
    return sum(map(math.prod, hf_shapes(read_config(hf, name), class_of(hf, name)).values()))


def model(**changes) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **changes})


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    assert parameters(name) == PARAMETERS[name]


@pytest.mark.parametrize("name,size", [("m-a-p/neo_7b", "15.59 GB"), ("m-a-p/neo_scalinglaw_980M", "1.9599 GB"),
                                       ("m-a-p/neo_scalinglaw_460M", "923.3 MB"), ("yulan-team/YuLan-Mini", "4.85 GB")])
def test_published_file_sizes(name, size):
    number, unit = size.split()
    measured = 2 * parameters(name) / {"GB": 1e9, "MB": 1e6}[unit]
    assert f"{measured:.{len(number.split('.')[1])}f}" == number


def test_what_the_seed_models_are():
    neo, moxin, mpt, yulan = (read_config(PUBLISHED[name], name) for name in (
        "m-a-p/neo_7b", "moxin-org/moxin-llm-7b", "mosaicml/mpt-7b", "yulan-team/YuLan-Mini-Before-Annealing"))
    assert neo == ModelConfig()                                             # the schema's defaults are NEO-7B
    assert (moxin.windows, moxin.num_layers, moxin.num_kv_heads, moxin.max_seq_len) == ((4096,), 36, 8, 32768)
    assert (mpt.positions, mpt.norm, mpt.mlp, mpt.activation, mpt.d_ff) == (("alibi",), "layer", "plain", "gelu", 16384)
    assert mpt.tied_embeddings and mpt.alibi_bias_max == 8 and not mpt.clip_qkv and mpt.qk_norm == "none"
    assert (yulan.wesar, yulan.qkv_bias, yulan.output_bias, yulan.tied_embeddings) == (True, True, False, True)
    assert (yulan.embedding_multiplier, yulan.logit_multiplier, yulan.attention_scale) == (10.0, 1.0, 0.0)
    assert math.isclose(yulan.residual_multiplier, 1.4 / math.sqrt(56))
    phase = {**PUBLISHED["yulan-team/YuLan-Mini-Before-Annealing"], "model_type": "miniyulan"}
    assert read_config(phase, "x") == yulan                                 # the hub's phases 1 to 25


def test_what_the_others_are():
    def read(name: str) -> ModelConfig:
        return read_config(PUBLISHED[name], name)

    llama3 = read("meta-llama/Llama-3.1-8B")
    assert (llama3.rope_scaling, llama3.rope_factor, llama3.rope_old_seq_len, llama3.rope_base) == ("llama3", 8.0, 8192, 5e5)
    gemma3 = read("google/gemma-3-1b-pt")
    assert gemma3.windows == (512,) * 5 + (0,) and gemma3.positions == ("local_rope",) * 5 + ("rope",)
    assert (gemma3.rope_base, gemma3.local_rope_base, gemma3.qk_norm, gemma3.norm_offset) == (1e6, 1e4, "head", 1.0)
    gemma2 = read("google/gemma-2-2b")
    assert (gemma2.windows, gemma2.attention_softcap, gemma2.logit_softcap) == ((4096, 0), 50.0, 30.0)
    assert gemma2.embedding_multiplier == math.sqrt(2304) and gemma2.tied_embeddings    # its config leaves the key out
    granite = read("ibm-granite/granite-3.1-2b-base")
    assert (granite.embedding_multiplier, granite.residual_multiplier, granite.logit_multiplier) == (12.0, 0.22, 0.125)
    assert granite.attention_scale == 0.015625
    assert read("HuggingFaceTB/SmolLM3-3B").positions == ("rope", "rope", "rope", "none")
    olmo = read("allenai/OLMo-2-1124-7B")
    assert (olmo.norm_placement, olmo.qk_norm, olmo.norm_eps) == ("post", "full", 1e-6)
    assert read("Qwen/Qwen2.5-0.5B").windows == (0,)                        # sliding_window is there and not in use
    assert read("Qwen/Qwen3-0.6B").head_dim == 128
    assert read("mosaicml/mpt-30b-chat").clip_qkv == 6.0
    assert read("replit/replit-code-v1_5-3b").num_kv_heads == 8


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "YuLan-Mini-B" not in name and "replit" not in name])
def test_published_configs_are_written_back_the_same(name):
    config = read_config(PUBLISHED[name], name)
    cls = choose_class(config)
    # the released YuLan-Mini has output biases and is a Llama, as published
    assert cls.model_type == PUBLISHED[name]["model_type"]
    assert read_config(write_config(config, cls), name) == config


LLAMA = PUBLISHED["m-a-p/neo_7b"]


@pytest.mark.parametrize("changes,said", [
    ({"num_experts": 8, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, ["num_experts = 8", "rope_type = 'yarn'"]),
    ({"sliding_window": 4096}, ["sliding_window = 4096"]),      # transformers' Llama ignores it
    ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor = 0.5"]),
    ({"quantization_config": {"bits": 4}}, ["quantization_config"]),
    ({"hidden_act": "relu"}, ["hidden_act = 'relu'", "silu"]),
    ({"hidden_size": None, "vocab_size": "many"}, ["hidden_size is missing", "vocab_size = 'many'"]),
    ({"num_attention_heads": 15}, ["num_attention_heads = 15", "3072"]),
    ({"num_key_value_heads": 5}, ["16 heads are not a multiple of 5"]),
    ({"num_hidden_layers": 10 ** 12}, ["num_hidden_layers"]),
    ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, ["disagree"]),
    ({"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}}, ["rope_scaling"]),
    ({"rope_scaling": {"type": "linear", "factor": 2.0, "attention_factor": 0.7}}, ["rope_scaling.attention_factor = 0.7"]),
    ({"layer_types": ["linear_attention"] * 28}, ["linear_attention"]),
    ({"model_type": "lama"}, ["did you mean 'llama'"]),
    ({"model_type": "gemma3"}, ["gemma3_text"]),
    ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": None, "layer_types": ["sliding_attention"] * 28},
     ["without a sliding_window in use"]),
    ({"model_type": "mistral", "attention_bias": True}, ["attention_bias = True"]),
    ({"model_type": "gemma3_text", "attn_logit_softcapping": 50.0}, ["attn_logit_softcapping", "ignores"]),
    ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, ["use_bidirectional_attention"]),
    ({"model_type": "yulanmini", "qk_layernorm": True, "ln_scale": 0.5}, ["qk_layernorm", "ln_scale"]),
])
def test_refusals(changes, said):
    with pytest.raises(InputError) as refused:
        read_config({**LLAMA, **changes}, "there/config.json")
    text = str(refused.value)
    assert "there/config.json" in text and "\n" not in text
    assert all(words in text for words in said), text


@pytest.mark.parametrize("changes,said", [
    ({"no_bias": False}, "no_bias"), ({"norm_type": "np_layernorm"}, "norm_type"),
    ({"ffn_config": {"ffn_type": "mptglu"}}, "mptglu"), ({"attn_config": {"alibi_slope": 3}}, "alibi_slope"),
    ({"attn_config": {"alibi": False}}, "learned_pos_emb"), ({"attn_config": {"rope": True}}, "attn_config.rope"),
    ({"attn_config": {"prefix_lm": True}}, "prefix_lm"), ({"attn_config": {"sliding_window_size": 512}}, "sliding_window_size"),
    ({"attn_config": {"attn_type": "grouped_query_attention"}}, "kv_n_heads"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
])
def test_refusals_of_mpt(changes, said):
    with pytest.raises(InputError, match=said):
        read_config({**PUBLISHED["mosaicml/mpt-7b"], **changes}, "x")


def test_mpt_means_what_llm_foundry_means():
    hf = {**PUBLISHED["mosaicml/mpt-7b"], "expansion_ratio": 2, "logit_scale": "inv_sqrt_d_model", "norm_type": "rmsnorm",
          "attn_config": {"alibi": True, "alibi_bias_max": 16, "qk_ln": True, "clip_qkv": 6, "softmax_scale": 0.1,
                          "attn_type": "multiquery_attention"}}
    config = read_config(hf, "x")
    assert (config.alibi_bias_max, config.qk_norm, config.clip_qkv, config.attention_scale) == (16.0, "full", 6.0, 0.1)
    assert (config.num_kv_heads, config.d_ff, config.logit_multiplier, config.norm) == (1, 8192, 1 / 64, "rms")
    hf["attn_config"] = {"alibi": False}
    assert read_config({**hf, "learned_pos_emb": False}, "x").positions == ("none",)


ODD = (None, True, "x", [], {}, ["x"], -1, 0, 1.5, 1e400, {"rope_type": []}, [None], 10 ** 15)


@pytest.mark.parametrize("name", ["m-a-p/neo_7b", "mosaicml/mpt-7b", "google/gemma-3-1b-pt", "HuggingFaceTB/SmolLM3-3B",
                                  "Qwen/Qwen2.5-0.5B", "yulan-team/YuLan-Mini-Before-Annealing", "meta-llama/Llama-3.1-8B"])
def test_odd_values_never_end_in_a_traceback(name):
    """Every key, and every key of a dictionary within, in turn: a model or one clear line."""
    hf = {"rope_parameters": None, "layer_types": None, **PUBLISHED[name]}
    places = [(key, None) for key in hf]
    places += [(key, inner) for key, value in hf.items() if isinstance(value, dict) for inner in value]
    refused = 0
    for key, inner in places:
        for value in ODD:
            try:
                read_config({**hf, key: value if inner is None else {**hf[key], inner: value}}, "x")
            except InputError as error:
                refused += 1
                assert "\n" not in str(error)
    assert refused > 100


def test_ways_to_say_the_same():
    new = {**LLAMA, "rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}, "head_dim": None}
    del new["rope_theta"], new["rope_scaling"]
    old = {**LLAMA, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4}}
    both = {**new, **old}
    assert read_config(new, "x") == read_config(old, "x") == read_config(both, "x")
    assert read_config(new, "x").rope_base == 5e5
    ministral = {**PUBLISHED["moxin-org/moxin-llm-7b"], "layer_types": ["sliding_attention", "full_attention"] * 18}
    assert read_config(ministral, "x").windows == (4096, 0)     # transformers opens it as Ministral
    assert class_of(ministral, "x").model_type == "ministral"


def test_missing_keys_take_the_defaults_of_the_class():
    mistral = {key: value for key, value in PUBLISHED["moxin-org/moxin-llm-7b"].items() if key != "sliding_window"}
    assert read_config(mistral, "x").windows == (4096,)
    assert read_config({**mistral, "sliding_window": None}, "x").windows == (0,)
    qwen = {**PUBLISHED["Qwen/Qwen2.5-0.5B"], "use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 20}
    assert read_config(qwen, "x").layer_windows == (None,) * 20 + (1024,) * 4


# -- the choice of a class ------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes,want", [
    ({}, "llama"), (dict(qkv_bias=True, output_bias=True, mlp_bias=True), "llama"), (dict(qkv_bias=True), "qwen2"),
    (dict(windows=(8,)), "mistral"), (dict(windows=(8, 0)), "ministral"), (dict(windows=(8, 0), qkv_bias=True), "qwen2"),
    (dict(head_dim=16, num_heads=6), "mistral"),                # a Llama needs whole heads
    (dict(output_bias=True), "llama"),                          # with zeros for the other biases
    (dict(qk_norm="head"), "qwen3"), (dict(qk_norm="full", norm_placement="post"), "olmo2"),
    (dict(positions=("rope", "none")), "smollm3"), (MPT, "mpt"), (dict(MPT, clip_qkv=6.0), "mpt"),
    (dict(residual_multiplier=0.2), "granite"), (dict(wesar=True), "llama"),
    (dict(wesar=True, qkv_bias=True, embedding_multiplier=10.0, tied_embeddings=True), "granite"),
    (dict(residual_multiplier=0.2, windows=(8,)), "mistral"),   # Granite has no windows: folded
])
def test_the_choice(changes, want):
    assert choose_class(model(**changes)).model_type == want


@pytest.mark.parametrize("changes,asked,said", [
    (dict(MPT, num_kv_heads=2), "mpt", ["grouped heads (4 query, 2 key/value", "repeated"]),
    (dict(MPT, alibi_bias_max=16.0), "mpt", ["alibi_bias_max 16"]), (dict(MPT, qk_norm="full"), "mpt", ["qk_norm full"]),
    (dict(MPT, mlp_bias=True, qkv_bias=True, output_bias=True), "mpt", ["mlp_bias", "qkv_bias", "output_bias"]),
    (dict(MPT, d_ff=96), "mpt", ["d_ff 96"]), (dict(MPT, activation="gelu_tanh"), "mpt", ["gelu_tanh"]),
    (dict(MPT, norm="rms"), "mpt", ["norm rms"]), (dict(MPT, windows=(8,)), "mpt", ["window 8"]),
    (dict(MPT, positions=("none",)), "mpt", ["position none"]), (dict(MPT, head_dim=16), "mpt", ["head_dim 16"]),
    (dict(MPT, logit_softcap=3.0), "mpt", ["logit_softcap 3"]),
    (dict(windows=(8,)), "llama", ["window 8"]), (dict(windows=(8, 0)), "mistral", ["differ between layers"]),
    (dict(windows=(8, 4)), "ministral", ["2 sizes"]), (dict(output_bias=True), "qwen2", ["output_bias"]),
    (dict(clip_qkv=6.0), "granite", ["clip_qkv"]), ({}, "yulanmini", ["remote code"]), ({}, "lama", ["did you mean 'llama'"]),
    (dict(head_dim=16, num_heads=6), "llama", ["not a multiple of num_heads 6"]),
    (dict(windows=(8, 0)), "gemma3_text", ["position rope in windowed layers"]),
    (dict(MPT, norm_offset=1.0), "auto", ["mpt: norm_offset 1", "llama"]),
])
def test_what_stands_in_the_way_is_said(changes, asked, said):
    with pytest.raises(InputError) as refused:
        choose_class(model(**changes), asked)
    assert all(words in str(refused.value) for words in said), refused.value
    assert "\n" not in str(refused.value)


def test_every_class_can_be_chosen():
    chosen = {choose_class(read_config(hf, name)).model_type for name, hf in PUBLISHED.items() if "replit" not in name}
    assert chosen | {"ministral"} == set(WRITABLE)
    assert set(CLASSES) - set(WRITABLE) == {"yulanmini"}


# -- writing ---------------------------------------------------------------------------------------------------


def test_both_spellings_are_written():
    config = model(rope_scaling="llama3", rope_factor=8.0, rope_old_seq_len=32, rope_base=5e5)
    hf = write_config(config, CLASSES["llama"], max_seq_len=128, dtype="float16", bos_token_id=1, eos_token_id=[2, 5])
    assert hf["dtype"] == hf["torch_dtype"] == "float16" and hf["max_position_embeddings"] == 128
    assert hf["rope_theta"] == hf["rope_parameters"]["rope_theta"] == 5e5
    assert hf["rope_scaling"]["rope_type"] == hf["rope_parameters"]["rope_type"] == "llama3"
    assert (hf["bos_token_id"], hf["eos_token_id"], hf["pad_token_id"]) == (1, [2, 5], None)
    assert json.loads(json.dumps(hf)) == hf


def test_an_unfolded_model_is_not_written():
    config = model(residual_multiplier=0.2, wesar=True)
    assert to_fold(config, CLASSES["llama"]) == ["residual_multiplier 0.2", "the gains of wesar"]
    with pytest.raises(InputError, match="residual_multiplier 0.2.*not folded.*gains of wesar"):
        write_config(config, CLASSES["llama"])
    with pytest.raises(InputError, match="window 8"):
        write_config(model(windows=(8,)), CLASSES["llama"])


def test_mpt_is_written_under_the_name_that_llama_cpp_knows():
    hf = write_config(model(**MPT, clip_qkv=6.0), CLASSES["mpt"])
    assert hf["architectures"] == ["MPTForCausalLM"] and hf["attn_config"]["clip_qkv"] == 6.0 and hf["use_cache"] is True
