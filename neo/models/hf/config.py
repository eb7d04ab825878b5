"""config.json of Hugging Face <-> neo's ModelConfig.

Reading refuses what it does not know: a key that might change the function and is neither understood nor known to be
harmless is an error that lists all such keys. Keys that are missing take the defaults of the transformers class. Both
spellings are read (`rope_parameters` of transformers 5, `rope_theta` + `rope_scaling` of 4) and both are written, since
either version silently falls back to base 10000 when it does not find its own.

MPT is read as llm-foundry defines it (mosaicml/llm-foundry, llmfoundry/models/mpt), not as transformers' `MptForCausalLM`
does, which ignores most of attn_config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from neo.config.schema import ModelConfig
from neo.errors import InputError, nearest
from neo.models.hf.classes import CLASSES, HFClass
from neo.models.hf.config_keys import Keys
from neo.models.hf.config_rope import read_rope
from neo.models.hf.config_write import write_config

__all__ = ["class_of", "read_config", "write_config"]

ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh",
               "gelu_fast": "gelu_tanh"}
_MPT_NORMS = {"layernorm": "layer", "low_precision_layernorm": "layer", "rmsnorm": "rms", "low_precision_rmsnorm": "rms"}


def class_of(hf: Mapping[str, Any], where: str) -> HFClass:
    """The class a config.json names; InputError when neo has none of that name."""
    kind = hf.get("model_type")
    if kind == "mistral" and hf.get("layer_types"):
        kind = "ministral"      # as transformers' Auto classes do
    if kind == "miniyulan":     # what YuLan-Mini's phases are called on the hub
        kind = "yulanmini"
    if not isinstance(kind, str) or kind not in CLASSES:
        names = ", ".join(CLASSES)
        hint = " (its text part alone is gemma3_text)" if kind == "gemma3" else nearest(str(kind), CLASSES)
        raise InputError(f"{where}: model_type {kind!r} is not one neo knows{hint}: {names}")
    return CLASSES[kind]


def read_config(hf: Mapping[str, Any], where: str) -> ModelConfig:
    """The model a config.json describes.

    Args:
        hf: the parsed file.
        where: the file's name, for messages.

    Raises InputError when the class is unknown, and one that lists every key that is missing, impossible, or changes the
    function in a way neo cannot follow.
    """
    cls = class_of(hf, where)
    keys = Keys(hf, cls.defaults)
    fields = _mpt(keys) if cls.model_type == "mpt" else _llama_like(keys, cls)
    problems = keys.rest()
    if not problems:
        config = ModelConfig(**fields)
        problems = _impossible(config)
    if problems:
        raise InputError(f"{where}: neo cannot reproduce this {cls.model_type} model exactly: {'; '.join(problems)}")
    return config


def _impossible(config: ModelConfig) -> list[str]:
    found = []
    if config.num_heads % config.num_kv_heads:
        found.append(f"{config.num_heads} heads are not a multiple of {config.num_kv_heads} key/value heads")
    if {"rope", "local_rope"} & set(config.positions) and config.head_size % 2:
        found.append(f"rotary positions need an even head size, not {config.head_size}")
    if config.rope_scaling == "llama3" and config.rope_high_frequency <= config.rope_low_frequency:
        found.append("rope scaling needs a high_freq_factor above its low_freq_factor")
    return found


def _llama_like(keys: Keys, cls: HFClass) -> dict[str, Any]:
    """Fields of every class but MPT: they share names and differ in what the class fixes."""
    d_model, heads, layers = keys.whole("hidden_size"), keys.whole("num_attention_heads"), _depth(keys, "num_hidden_layers")
    fields = dict(
        vocab_size=keys.whole("vocab_size"), num_layers=layers, d_model=d_model, num_heads=heads,
        num_kv_heads=keys.whole("num_key_value_heads", heads), head_dim=_head_dim(keys, cls, d_model, heads),
        d_ff=keys.whole("intermediate_size"), norm_eps=float(keys.number("rms_norm_eps")),
        max_seq_len=keys.whole("max_position_embeddings"), tied_embeddings=keys.flag("tie_word_embeddings"),
        norm_placement=cls.norm_placement, norm_offset=cls.norm_offset, qk_norm=cls.qk_norm)
    fields |= _biases(keys, cls) | _layers(keys, cls, layers)
    size = fields["head_dim"] or max(d_model // heads, 1)
    if cls.model_type in ("gemma2", "gemma3_text"):
        fields |= _gemma(keys, cls, d_model, size)
    else:
        fields["activation"] = _activation(keys, "hidden_act")
    if cls.model_type == "granite":
        fields |= dict(embedding_multiplier=float(keys.number("embedding_multiplier", 1.0)),
                       residual_multiplier=float(keys.number("residual_multiplier", 1.0)),
                       logit_multiplier=1.0 / keys.number("logits_scaling", 1.0),
                       attention_scale=_scale(keys.number("attention_multiplier", 1.0), size))
    if cls.model_type == "yulanmini":
        fields |= _yulanmini(keys, d_model, layers, size)
    return fields | read_rope(keys, cls, fields["max_seq_len"])


def _depth(keys: Keys, key: str) -> int:
    """L; lists of this length are made, so it has a limit of its own."""
    return keys.whole(key, most=10_000)


def _head_dim(keys: Keys, cls: HFClass, d_model: int, heads: int) -> int:
    """h where it differs from D / H, else 0, neo's default."""
    even = d_model // heads if d_model % heads == 0 else None
    keys.get("head_dim")
    if even is None and cls.whole_heads:
        keys.refuse("num_attention_heads", heads, f"hidden_size {d_model} is not a multiple of it")
        return 0
    head_dim = keys.whole("head_dim", even)
    if not cls.free_head_dim and head_dim != even:
        keys.refuse("head_dim", head_dim, f"the class takes hidden_size / num_attention_heads = {even}")
    return 0 if head_dim == even else head_dim


def _scale(scale: float, head_size: int) -> float:
    """A factor on the attention scores, 0 when it is the usual h^-0.5."""
    return 0.0 if scale == head_size ** -0.5 else float(scale)


def _activation(keys: Keys, key: str) -> str:
    return ACTIVATIONS.get(keys.name(key, ACTIVATIONS), "silu")


def _biases(keys: Keys, cls: HFClass) -> dict[str, bool]:
    """Biases, as far as the class has a switch for them; where it has none, the key must not ask for them."""
    if cls.biases == "none":
        keys.only("attention_bias", False, why=f"{cls.architecture} has no such biases")
    asked = keys.flag("attention_bias")
    bias = cls.model_type == "qwen2" or (asked and cls.biases != "none")    # Qwen-2 has them whatever the key says
    if not cls.mlp_bias:
        keys.only("mlp_bias", False, why=f"{cls.architecture} has no such biases")
    return dict(qkv_bias=bias, output_bias=bias and cls.biases == "all", mlp_bias=cls.mlp_bias and keys.flag("mlp_bias"))


def _pattern(values: Sequence[Any]) -> tuple[Any, ...]:
    """The shortest start of `values` that repeats into all of them."""
    return next(tuple(values[:n]) for n in range(1, len(values) + 1)
                if all(value == values[i % n] for i, value in enumerate(values)))


def _layers(keys: Keys, cls: HFClass, layers: int) -> dict[str, tuple]:
    """Windows and position schemes of the layers."""
    ropes = _no_rope_layers(keys, layers) if cls.model_type == "smollm3" else ["rope"] * layers
    window = None
    if cls.windows != "none":
        window = keys.whole("sliding_window") if keys.get("sliding_window") is not None else None
        if "use_sliding_window" in cls.defaults and not keys.flag("use_sliding_window"):
            window = None
    elif cls.model_type == "yulanmini":     # its eager attention ignores both keys
        keys.get("sliding_window")
        keys.only("use_sliding_window", False)
    for key in ("max_window_layers", "sliding_window_pattern") if cls.windows == "mixed" else ():
        keys.get(key)                       # superseded by layer_types where there are any
    kinds = keys.items("layer_types", layers) or _layer_types(keys, cls, layers, window, ropes)
    strange = sorted({str(kind) for kind in kinds} - {"full_attention", "sliding_attention"})
    if strange:
        keys.refuse("layer_types", strange, "neo has full_attention and sliding_attention")
    sliding = [kind == "sliding_attention" for kind in kinds]
    if any(sliding) and window is None:
        keys.refuse("layer_types", "sliding_attention", "without a sliding_window in use")
    if cls.positions == ("by_window",):
        ropes = ["local_rope" if slides else "rope" for slides in sliding]
    return dict(windows=_pattern([window or 0 if slides else 0 for slides in sliding]), positions=_pattern(ropes))


def _layer_types(keys: Keys, cls: HFClass, layers: int, window: int | None, ropes: Sequence[str]) -> list[str]:
    """What transformers takes for layer_types when a config has none."""
    full = keys.whole("max_window_layers") if keys.get("max_window_layers") else 0     # Qwen: so many at the start have none

    def slides(i: int) -> bool:
        match cls.model_type:
            case "mistral" | "ministral":
                return window is not None
            case "qwen2" | "qwen3":
                return window is not None and i >= full
            case "gemma2":
                return i % 2 == 0
            case "gemma3_text":
                return (i + 1) % keys.whole("sliding_window_pattern") != 0
            case "smollm3":
                return window is not None and ropes[i] == "none"
        return False
    return ["sliding_attention" if slides(i) else "full_attention" for i in range(layers)]


def _no_rope_layers(keys: Keys, layers: int) -> list[str]:
    """SmolLM3: no_rope_layers has a 1 where there *is* a rotation; else every fourth layer has none."""
    every = keys.whole("no_rope_layer_interval")
    listed = keys.items("no_rope_layers", layers)
    return ["rope" if (listed[i] if listed is not None else (i + 1) % every) else "none" for i in range(layers)]


def _gemma(keys: Keys, cls: HFClass, d_model: int, head_size: int) -> dict[str, Any]:
    """Gemma-2 and -3: sqrt(D) on the embeddings, its own attention scale, soft-caps."""
    keys.get("hidden_act")                  # superseded by hidden_activation
    if keys.get("hidden_activation") is None:
        activation = "gelu_tanh"
    else:
        activation = _activation(keys, "hidden_activation")
    caps = {"logit_softcap": keys.positive("final_logit_softcapping")}
    if "attention_softcap" in cls.softcaps:
        caps["attention_softcap"] = keys.positive("attn_logit_softcapping")
    else:
        keys.only("attn_logit_softcapping", why=f"{cls.architecture} ignores it")
    keys.get("sliding_window_size")         # an older name, superseded by sliding_window
    return dict(activation=activation, embedding_multiplier=math.sqrt(d_model),
                attention_scale=_scale(keys.number("query_pre_attn_scalar") ** -0.5, head_size), **caps)


def _yulanmini(keys: Keys, d_model: int, layers: int, head_size: int) -> dict[str, Any]:
    """YuLan-Mini's training form (RUC-GSAI/YuLan-Mini, pretrain/configuration_yulanmini.py and modeling_yulanmini.py)."""
    shrink = keys.get("hidden_states_shrink")
    shrink = layers ** -0.5 if shrink == "muparam" else float(keys.number("hidden_states_shrink", 1.0))
    keys.only("qk_layernorm", False)
    keys.only("embedding_ln", False)
    keys.only("embedding_rmsln", False)
    keys.only("ln_scale", 1, 1.0)
    wesar = keys.flag("wesar_weights")
    keys.only("use_norm_alpha", True, *(() if wesar else (False,)), why="neo's norms have a gain each, or none has")
    offset = {"llama": 0.0, "gemma": 1.0}.get(keys.name("rms_type", ("llama", "gemma")), 0.0)
    for key in ("use_emb_alpha", "layer_norm_eps", "shrink_alpha", "shrink_alpha2", "z_loss", "model_reproduce", "init_scale_o",
                "dim_model_base", "dim_model_base_init", "dim_model_base_lmh", "dim_model_base_lr", "dim_ffn_base_init",
                "gradient_checkpointing_step", "num_steps_trained_before_this_epoch", "num_epochs_trained_before_this_epoch",
                *(f"{name}_alpha" for name in ("embed_tokens", "q_proj", "k_proj", "v_proj", "o_proj", "down_proj", "norm",
                                               "gate_up_proj", "input_layernorm", "post_attention_layernorm", "lm_head"))):
        keys.get(key)   # gradients, initial values and bookkeeping; the alphas themselves are in the weights
    return dict(
        wesar=wesar, norm_offset=offset,
        embedding_multiplier=float(keys.number("scale_emb", 1.0)),
        residual_multiplier=shrink if shrink < 1 else 1.0,      # the code applies it below 1 only
        logit_multiplier=keys.number("dim_model_base_logits", d_model) / d_model,
        attention_scale=_scale(math.sqrt(keys.number("dim_model_base_attn", head_size)) / head_size, head_size))


# -- MPT -----------------------------------------------------------------------------------------------------


def _mpt(keys: Keys) -> dict[str, Any]:
    """Fields of an MPT, in llm-foundry's meaning."""
    d_model, heads = keys.whole("d_model"), keys.whole("n_heads")
    if d_model % heads:
        keys.refuse("n_heads", heads, f"d_model {d_model} is not a multiple of it")
    ratio = keys.number("expansion_ratio")
    keys.only("no_bias", True, why="neo's MPT has no biases")
    norm = _MPT_NORMS.get(keys.name("norm_type", _MPT_NORMS), "layer")
    keys.only("fc_type", "torch")
    keys.get("use_pad_tok_in_ffn")
    ffn = keys.inner("ffn_config")
    ffn.only("ffn_type", "mptmlp")
    ffn.only("fc_type", "torch")
    logit_scale = keys.get("logit_scale")
    attention = keys.inner("attn_config", keys.defaults["attn_config"])
    fields = dict(
        vocab_size=keys.whole("vocab_size"), num_layers=_depth(keys, "n_layers"), d_model=d_model, num_heads=heads,
        d_ff=int(ratio * d_model), mlp="plain", activation="gelu", max_seq_len=keys.whole("max_seq_len"),
        norm=norm, norm_eps=float(keys.number("layer_norm_epsilon")),
        logit_multiplier=d_model ** -0.5 if logit_scale == "inv_sqrt_d_model" else float(keys.number("logit_scale", 1.0)),
        tied_embeddings=keys.flag("tie_word_embeddings")) | _mpt_attention(attention, d_model, heads)
    if not attention.flag("alibi"):
        keys.only("learned_pos_emb", False, why="neo has no learned position table")
    keys.get("learned_pos_emb")             # means nothing beside ALiBi
    keys.problems += attention.rest() + ffn.rest()
    return fields


def _mpt_attention(keys: Keys, d_model: int, heads: int) -> dict[str, Any]:
    """attn_config: heads, ALiBi, clipping, scale and the norm of queries and keys."""
    kind = keys.name("attn_type", ("multihead_attention", "multiquery_attention", "grouped_query_attention"))
    if kind == "grouped_query_attention":
        kv_heads = keys.whole("kv_n_heads")
    else:
        kv_heads = 1 if kind == "multiquery_attention" else heads
        keys.only("kv_n_heads", kv_heads, why=f"attn_type is {kind}")
    for key in ("prefix_lm", "rope", "qk_gn"):
        keys.only(key, False)
    keys.only("sliding_window_size", -1)
    keys.only("fused_qkv", True)
    # How it is computed, about rope, which is off, or about packed documents, which neo's data settings decide.
    for key in ("attn_impl", "rope_theta", "rope_impl", "rope_dail_config", "rope_hf_config", "attn_uses_sequence_id",
                "tie_word_embeddings"):
        keys.get(key)
    return dict(
        num_kv_heads=kv_heads, positions=("alibi",) if keys.flag("alibi") else ("none",),
        alibi_bias_max=float(keys.number("alibi_bias_max")), qk_norm="full" if keys.flag("qk_ln") else "none",
        clip_qkv=keys.positive("clip_qkv"), attention_scale=_scale(keys.positive("softmax_scale"), max(d_model // heads, 1)))
