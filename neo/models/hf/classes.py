"""The Hugging Face classes neo reads and writes, what each can express, and which one fits a model.

A class is a row of data. What a model needs and a class lacks is either an *obstacle* (another norm, a window, ALiBi, ...)
or can be *folded*: multipliers and WeSaR gains go into the weights without changing the function (fold.py). A bias the
class has and the model lacks is written as zeros.

What the classes do was read in, and tested against, transformers 5.23; `MptForCausalLM` silently ignores most of
llm-foundry's options (alibi_bias_max, qk_ln, logit_scale, no_bias, expansion_ratio), so here they are obstacles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from neo.config.schema import ModelConfig
from neo.errors import InputError, nearest

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logit_multiplier", "attention_scale")


@dataclasses.dataclass(frozen=True, eq=False)     # each is one row of CLASSES, compared by identity
class HFClass:
    """One transformers class: how it is called and what it can hold exactly.

    Attributes:
        model_type: the key of config.json by which transformers finds the class.
        architecture: what stands under "architectures".
        defaults: what transformers takes for keys that config.json lacks.
        writable: False for classes that exist as remote code only.
        windows: "none", "one" (all layers the same) or "mixed" (one W, per layer switched on or off).
        positions: schemes a layer may have; "by_window" means rope in full and local_rope in windowed layers.
        biases: on attention: "none", "qkv" (always there) or "all" (a switch for queries, keys, values and output).
        mlp_bias: whether there is a switch for biases in the feed-forward layer.
        multipliers: fields of ModelConfig with a key of their own.
        embedding_sqrt: embeddings are always multiplied by sqrt(D).
        integer_scale: the attention scale is stored as an integer n and used as n^-0.5.
        softcaps: which of attention_softcap and logit_softcap there are.
        whole_heads: D must be a multiple of H even with a head size of its own.
        free_head_dim: h may differ from D / H.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    writable: bool = True
    mlp: str = "gated"
    activations: tuple[str, ...] = ("silu", "gelu", "gelu_tanh")
    norm: str = "rms"
    norm_placement: str = "pre"
    norm_offset: float = 0.0
    qk_norm: str = "none"
    positions: tuple[str, ...] = ("rope",)
    windows: str = "none"
    biases: str = "none"
    mlp_bias: bool = False
    multipliers: tuple[str, ...] = ()
    embedding_sqrt: bool = False
    integer_scale: bool = False
    softcaps: tuple[str, ...] = ()
    clip_qkv: bool = False
    grouped_heads: bool = True
    whole_heads: bool = False
    free_head_dim: bool = True
    d_ff_ratio: int = 0
    wesar: bool = False


_LLAMA = dict(num_key_value_heads=None, head_dim=None, hidden_act="silu", rms_norm_eps=1e-6, max_position_embeddings=2048,
              rope_theta=10000.0, tie_word_embeddings=False, attention_bias=False, mlp_bias=False)
_MISTRAL = {**_LLAMA, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096}
_QWEN = {**_LLAMA, "num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096,
         "use_sliding_window": False, "max_window_layers": 28}
_GEMMA = {**_LLAMA, "num_key_value_heads": 4, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
          "max_position_embeddings": 8192, "sliding_window": 4096, "query_pre_attn_scalar": 256, "tie_word_embeddings": True,
          "final_logit_softcapping": None, "attn_logit_softcapping": None}

# In the order in which "auto" tries them; the first that needs no folding and no made-up zero bias is taken.
CLASSES: dict[str, HFClass] = {row.model_type: row for row in (
    HFClass("llama", "LlamaForCausalLM", _LLAMA, biases="all", mlp_bias=True, whole_heads=True),
    HFClass("mistral", "MistralForCausalLM", _MISTRAL, windows="one"),
    HFClass("ministral", "MinistralForCausalLM", _MISTRAL, windows="mixed"),
    HFClass("qwen2", "Qwen2ForCausalLM", _QWEN, windows="mixed", biases="qkv"),
    HFClass("qwen3", "Qwen3ForCausalLM", {**_QWEN, "head_dim": 128}, windows="mixed", biases="all", qk_norm="head"),
    HFClass("smollm3", "SmolLM3ForCausalLM",
            {**_LLAMA, "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6, "sliding_window": None,
             "use_sliding_window": False, "no_rope_layer_interval": 4, "tie_word_embeddings": True},
            windows="mixed", positions=("rope", "none"), biases="all", mlp_bias=True),
    HFClass("olmo2", "Olmo2ForCausalLM", {**_LLAMA, "rms_norm_eps": 1e-5}, biases="all", norm_placement="post", qk_norm="full"),
    HFClass("gemma2", "Gemma2ForCausalLM", {**_GEMMA, "final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0},
            windows="mixed", biases="all", norm_placement="sandwich", norm_offset=1.0, embedding_sqrt=True, integer_scale=True,
            multipliers=("attention_scale",), softcaps=("attention_softcap", "logit_softcap"), whole_heads=True),
    HFClass("gemma3_text", "Gemma3ForCausalLM",
            {**_GEMMA, "max_position_embeddings": 131072, "rope_theta": 1e6, "rope_local_base_freq": 10000.0,
             "sliding_window_pattern": 6},
            windows="mixed", positions=("by_window",), biases="all", norm_placement="sandwich", norm_offset=1.0, qk_norm="head",
            embedding_sqrt=True, integer_scale=True, multipliers=("attention_scale",), softcaps=("logit_softcap",),
            whole_heads=True),
    # llama.cpp's converter knows only this spelling, and transformers goes by model_type.
    HFClass("mpt", "MPTForCausalLM",
            dict(expansion_ratio=4, max_seq_len=2048, layer_norm_epsilon=1e-5, norm_type="low_precision_layernorm",
                 tie_word_embeddings=True, attn_config=dict(attn_type="multihead_attention", alibi=True, alibi_bias_max=8)),
            mlp="plain", activations=("gelu",), norm="layer", positions=("alibi",), multipliers=("attention_scale",),
            clip_qkv=True, grouped_heads=False, whole_heads=True, free_head_dim=False, d_ff_ratio=4),
    HFClass("granite", "GraniteForCausalLM", _LLAMA, biases="all", mlp_bias=True, multipliers=MULTIPLIERS),
    HFClass("yulanmini", "YuLanMiniModelForCausalLM",
            {**_LLAMA, "num_key_value_heads": 6, "max_position_embeddings": 4096, "attention_bias": True,
             "wesar_weights": True, "rms_type": "llama"}, writable=False,
            biases="qkv", multipliers=MULTIPLIERS, wesar=True, whole_heads=True, free_head_dim=False),
)}
WRITABLE = tuple(name for name, cls in CLASSES.items() if cls.writable)


# -- what stands in the way ----------------------------------------------------------------------------------


def obstacles(config: ModelConfig, cls: HFClass) -> list[str]:
    """What of the model the class cannot hold and folding cannot cure, in words; empty when it can be written exactly."""
    found = []

    def need(fine: bool, text: str) -> None:
        if not fine:
            found.append(text)

    need(cls.writable, "exists as remote code only")
    need(config.mlp == cls.mlp, f"feed-forward layers are {cls.mlp}, the model's {config.mlp}")
    need(config.activation in cls.activations, f"activation {config.activation}")
    need(config.norm == cls.norm, f"norm {config.norm}")
    need(config.norm_placement == cls.norm_placement, f"norm_placement {config.norm_placement}")
    need(config.norm_offset == cls.norm_offset, f"norm_offset {config.norm_offset:g}")
    need(config.qk_norm == cls.qk_norm, f"qk_norm {config.qk_norm}")
    need(not config.attention_sinks, "attention_sinks")
    need(cls.clip_qkv or not config.clip_qkv, f"clip_qkv {config.clip_qkv:g}")
    for name in ("attention_softcap", "logit_softcap"):
        need(name in cls.softcaps or not getattr(config, name), f"{name} {getattr(config, name):g}")
    found += _layer_obstacles(config, cls)
    found += _bias_obstacles(config, cls)
    found += _size_obstacles(config, cls)
    return found


def _layer_obstacles(config: ModelConfig, cls: HFClass) -> list[str]:
    """Windows and position schemes, layer by layer."""
    windows, positions = config.layer_windows, config.layer_positions
    sizes = sorted({window for window in windows if window})
    found = []
    if cls.windows == "none" and sizes:
        found.append(f"window {', '.join(map(str, sizes))}")
    elif cls.windows == "one" and len(set(windows)) > 1:
        found.append("windows that differ between layers")
    elif len(sizes) > 1:
        found.append(f"windows of {len(sizes)} sizes ({', '.join(map(str, sizes))})")
    if cls.positions == ("by_window",):
        wrong = {(position, "windowed" if window else "full") for window, position in zip(windows, positions, strict=True)
                 if position != ("local_rope" if window else "rope")}
        found += [f"position {position} in {kind} layers" for position, kind in sorted(wrong)]
    else:
        found += [f"position {position}" for position in sorted(set(positions) - set(cls.positions))]
    if "alibi" in cls.positions and "alibi" in positions and config.alibi_bias_max != 8:
        found.append(f"alibi_bias_max {config.alibi_bias_max:g} (transformers always takes 8)")
    return found


def _bias_obstacles(config: ModelConfig, cls: HFClass) -> list[str]:
    found = []
    if config.qkv_bias and cls.biases == "none":
        found.append("qkv_bias")
    if config.output_bias and cls.biases != "all":
        found.append("output_bias")
    if config.mlp_bias and not cls.mlp_bias:
        found.append("mlp_bias")
    return found


def _size_obstacles(config: ModelConfig, cls: HFClass) -> list[str]:
    found = []
    if not cls.grouped_heads and config.num_kv_heads != config.num_heads:
        found.append(f"grouped heads ({config.num_heads} query, {config.num_kv_heads} key/value; "
                     f"they can be repeated when asked for)")
    if cls.whole_heads and config.d_model % config.num_heads:
        found.append(f"d_model {config.d_model} is not a multiple of num_heads {config.num_heads}")
    elif not cls.free_head_dim and config.head_size * config.num_heads != config.d_model:
        found.append(f"head_dim {config.head_size} other than d_model / num_heads")
    if cls.d_ff_ratio and config.d_ff != cls.d_ff_ratio * config.d_model:
        found.append(f"d_ff {config.d_ff} other than {cls.d_ff_ratio} * d_model")
    return found


# -- what has to be folded -----------------------------------------------------------------------------------


def default_scale(config: ModelConfig) -> bool:
    """Whether attention scores are multiplied by h^-0.5."""
    return config.attention_scale in (0.0, config.head_size ** -0.5)


def inverse_square(scale: float) -> int | None:
    """The integer n with n^-0.5 == scale, as Gemma's query_pre_attn_scalar stores it; None when there is none."""
    n = round(scale ** -2) if scale > 0 else 0
    return n if n > 0 and n ** -0.5 == scale else None


def kept_multipliers(config: ModelConfig, cls: HFClass) -> dict[str, float]:
    """The multipliers the class applies by itself when it holds this model; what is left of the model's is folded."""
    kept = {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "logit_multiplier": 1.0, "attention_scale": 0.0}
    if cls.embedding_sqrt:
        kept["embedding_multiplier"] = math.sqrt(config.d_model)
    for name in cls.multipliers:
        kept[name] = getattr(config, name)
    if default_scale(config) or (cls.integer_scale and inverse_square(config.attention_scale) is None):
        kept["attention_scale"] = 0.0
    return kept


def to_fold(config: ModelConfig, cls: HFClass) -> list[str]:
    """The multipliers and gains that have to go into the weights, in words; empty when the class holds all of them."""
    kept = kept_multipliers(config, cls)
    names = [f"{name} {getattr(config, name):g}" for name in MULTIPLIERS
             if getattr(config, name) != kept[name] and not (name == "attention_scale" and default_scale(config))]
    return names + ["the gains of wesar"] * (config.wesar and not cls.wesar)


def zero_biases(config: ModelConfig, cls: HFClass) -> bool:
    """Whether the class has attention biases the model lacks, so that zeros have to be written."""
    if cls.biases == "qkv":
        return not config.qkv_bias
    return cls.biases == "all" and config.qkv_bias != config.output_bias


# -- the choice ----------------------------------------------------------------------------------------------


def choose_class(config: ModelConfig, asked: str = "auto") -> HFClass:
    """The class to write a model as.

    "auto" takes the first class that holds the model as it is (gains of wesar, which no class has, do not count), before
    those that need zero biases, before those that need folding. Any other `asked` is the model_type of a class, which is
    taken with as much folding as it needs.

    Raises InputError naming everything that stands in the way: of the asked class, or of each class.
    """
    if asked != "auto":
        if asked not in CLASSES:
            raise InputError(f"unknown Hugging Face class {asked!r}{nearest(asked, WRITABLE)}: "
                             f"one of auto, {', '.join(WRITABLE)}")
        found = obstacles(config, CLASSES[asked])
        if found:
            raise InputError(f"a {CLASSES[asked].architecture} cannot hold this model: {'; '.join(found)}")
        return CLASSES[asked]
    able = [cls for cls in CLASSES.values() if cls.writable and not obstacles(config, cls)]
    if not able:
        raise InputError(f"no Hugging Face class can hold this model ({_reasons(config)})")
    plain = dataclasses.replace(config, wesar=False)
    return min(able, key=lambda cls: (bool(to_fold(plain, cls)), zero_biases(config, cls)))


def _reasons(config: ModelConfig) -> str:
    """What prevents each class, those with the fewest obstacles first, classes with the same ones together."""
    together: dict[tuple[str, ...], list[str]] = {}
    for name in WRITABLE:
        together.setdefault(tuple(obstacles(config, CLASSES[name])), []).append(name)
    return "; ".join(f"{', '.join(names)}: {', '.join(found)}"
                     for found, names in sorted(together.items(), key=lambda row: len(row[0])))
