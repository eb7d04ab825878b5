"""ModelConfig -> config.json, in both spellings, so that transformers 5 and 4.57 read the same model."""

from __future__ import annotations

from typing import Any

from neo.config.schema import ModelConfig
from neo.errors import InputError
from neo.models.hf.classes import HFClass, default_scale, inverse_square, obstacles, to_fold

_ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh"}


def write_config(config: ModelConfig, cls: HFClass, *, max_seq_len: int = 0, dtype: str = "bfloat16",
                 bos_token_id: int | None = None, eos_token_id: int | list[int] | None = None,
                 pad_token_id: int | None = None) -> dict[str, Any]:
    """The config.json of a model in a class that holds it.

    Args:
        config: the model, already folded where the class needs it (`fold(...).config`).
        max_seq_len: the context to declare; 0 means the model's own.
        dtype: of the tensors in the files ("bfloat16", "float16", "float32").
        bos_token_id, eos_token_id, pad_token_id: the tokenizer's, null where it has none.

    Raises InputError naming what the class cannot hold.
    """
    found = obstacles(config, cls) + [f"{what} (not folded)" for what in to_fold(config, cls)]
    if found:
        raise InputError(f"a {cls.architecture} cannot hold this model: {'; '.join(found)}")
    common = {
        "architectures": [cls.architecture],
        "model_type": cls.model_type,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tied_embeddings,
        "use_cache": True,
        "initializer_range": 0.02,
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
        "dtype": dtype,             # transformers 5
        "torch_dtype": dtype,       # transformers 4
    }
    length = max_seq_len or config.max_seq_len
    if cls.model_type == "mpt":
        return common | _mpt(config, length)
    return common | _sizes(config, cls, length) | _layers(config, cls, length) | _rope(config, cls) | _multipliers(config, cls)


def _sizes(config: ModelConfig, cls: HFClass, length: int) -> dict[str, Any]:
    keys = {
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,       # always: Ministral takes a missing one as null and fails
        "hidden_act": _ACTIVATION_NAMES[config.activation],
        "max_position_embeddings": length,
        "rms_norm_eps": config.norm_eps,
        "attention_dropout": 0.0,
    }
    if cls.biases == "all":
        keys["attention_bias"] = config.qkv_bias or config.output_bias
    if cls.mlp_bias:
        keys["mlp_bias"] = config.mlp_bias
    return keys


def _layers(config: ModelConfig, cls: HFClass, length: int) -> dict[str, Any]:
    """Windows and position schemes; layer_types says the same as the older keys beside it."""
    windows = config.layer_windows
    window = next((size for size in windows if size), None)
    if cls.windows == "none":
        return {}
    if cls.windows == "one":
        return {"sliding_window": window}
    # Gemma and Ministral make the sliding mask even when no layer uses it, and fail without a size.
    spare = None if "use_sliding_window" in cls.defaults else length
    keys: dict[str, Any] = {
        "sliding_window": window or spare,
        "layer_types": ["sliding_attention" if size else "full_attention" for size in windows],
    }
    if "use_sliding_window" in cls.defaults:
        keys["use_sliding_window"] = window is not None
    if "max_window_layers" in cls.defaults:
        keys["max_window_layers"] = next((i for i, size in enumerate(windows) if size), config.num_layers)
    if "no_rope_layer_interval" in cls.defaults:
        keys["no_rope_layers"] = [int(position == "rope") for position in config.layer_positions]
    return keys


def _rope(config: ModelConfig, cls: HFClass) -> dict[str, Any]:
    """rope_parameters for transformers 5, rope_theta and rope_scaling for 4: neither reads the other's."""
    scaling: dict[str, Any] | None = None
    if config.rope_scaling == "linear":
        scaling = {"rope_type": "linear", "factor": config.rope_factor}
    elif config.rope_scaling == "llama3":
        scaling = {"rope_type": "llama3", "factor": config.rope_factor, "low_freq_factor": config.rope_low_frequency,
                   "high_freq_factor": config.rope_high_frequency,
                   "original_max_position_embeddings": config.rope_old_seq_len}
    parameters = {**(scaling or {"rope_type": "default"}), "rope_theta": config.rope_base}
    keys = {"rope_theta": config.rope_base, "rope_scaling": scaling, "rope_parameters": parameters}
    if cls.positions == ("by_window",):
        local = {"rope_type": "default", "rope_theta": config.local_rope_base}
        keys["rope_parameters"] = {"full_attention": parameters, "sliding_attention": local}
        keys["rope_local_base_freq"] = config.local_rope_base
    return keys


def _multipliers(config: ModelConfig, cls: HFClass) -> dict[str, Any]:
    """What Gemma and Granite have keys for."""
    if cls.model_type == "granite":
        return {"embedding_multiplier": config.embedding_multiplier, "residual_multiplier": config.residual_multiplier,
                "logits_scaling": 1.0 / config.logit_multiplier,
                "attention_multiplier": config.attention_scale or config.head_size ** -0.5}
    if not cls.integer_scale:
        return {}
    scalar = config.head_size if default_scale(config) else inverse_square(config.attention_scale)
    return {"hidden_activation": _ACTIVATION_NAMES[config.activation], "query_pre_attn_scalar": scalar,
            "final_logit_softcapping": config.logit_softcap or None,
            "attn_logit_softcapping": config.attention_softcap or None}


def _mpt(config: ModelConfig, length: int) -> dict[str, Any]:
    return {
        "d_model": config.d_model,
        "n_heads": config.num_heads,
        "n_layers": config.num_layers,
        "expansion_ratio": config.d_ff // config.d_model,
        "max_seq_len": length,
        "layer_norm_epsilon": config.norm_eps,
        "norm_type": "low_precision_layernorm",
        "no_bias": True,
        "learned_pos_emb": False,
        "logit_scale": None,
        "emb_pdrop": 0.0,
        "resid_pdrop": 0.0,
        "attn_config": {
            "attn_type": "multihead_attention", "attn_impl": "torch", "attn_pdrop": 0, "attn_uses_sequence_id": False,
            "alibi": True, "alibi_bias_max": 8, "clip_qkv": config.clip_qkv or None, "prefix_lm": False, "qk_ln": False,
            "softmax_scale": config.attention_scale or None,
        },
    }
