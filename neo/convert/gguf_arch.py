"""llama.cpp's architectures that can hold a neo model, what each cannot express, and the choice between them.

An architecture is a compute graph with fixed habits (src/models/*.cpp of llama.cpp). What it cannot express would be computed
wrongly without a word, so everything in the config is compared before anything is written.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from neo.config.schema import ModelConfig
from neo.errors import InputError
from neo.models.hf.classes import MULTIPLIERS, HFClass, to_fold
from neo.models.hf.fold import fold


@dataclasses.dataclass(frozen=True)
class Arch:
    """One architecture of llama.cpp and what its graph holds.

    Attributes:
        interleaved: the rotation turns pairs that stand side by side, so the rows of queries and keys are reordered.
        biases: which of the config's bias fields it has.
        multipliers: embedding, residual, logit multipliers and the attention scale are keys of the file.
        fused: queries, keys and values are one tensor.
        needs_output: it wants an output matrix even where the embedding table is used for it.
        sinks: it has attention sinks; switched off for a model without.
        windowed: it has windows.
        layers: says what is wrong with the pattern of windows and positions, or "".
    """

    name: str
    interleaved: bool = False
    norm: str = "rms"
    placement: str = "pre"
    mlp: str = "gated"
    activations: tuple[str, ...] = ("silu",)
    qk_norm: str = "none"
    biases: tuple[str, ...] = ()
    multipliers: bool = False
    fused: bool = False
    needs_output: bool = False
    must_be_tied: bool = False
    must_have_bias: bool = False   # older releases of llama.cpp want the biases of queries, keys and values
    sinks: bool = False
    windowed: bool = False
    gemma: bool = False
    clip: bool = False
    square: bool = False      # the heads together must be as wide as the model
    rope_scalings: tuple[str, ...] = ("none", "linear")
    layers: Callable[[ModelConfig, int], str] = dataclasses.field(default=lambda config, context: "", repr=False)

    def attention_scale(self, config: ModelConfig) -> float:
        """The factor on the scores that the graph applies by itself."""
        if self.gemma and config.num_layers == {"gemma2": 46, "gemma3": 62}[self.name]:   # taken for the 27B model
            return (config.d_model // config.num_heads) ** -0.5
        return config.head_size ** -0.5

    def query_factor(self, config: ModelConfig) -> float:
        """What the queries must carry so that the graph's own scale becomes the model's."""
        if self.multipliers:
            return 1.0
        return (config.attention_scale or config.head_size ** -0.5) / self.attention_scale(config)

    @property
    def fold_class(self) -> HFClass:
        """What the architecture keeps of a model's multipliers, for `neo.models.hf.fold`. The attention scale is not folded:
        the queries get `query_factor`."""
        return HFClass(self.name, self.name, {}, multipliers=MULTIPLIERS if self.multipliers else ("attention_scale",),
                       embedding_sqrt=self.gemma)


def period(flags: tuple[bool, ...]) -> int:
    """p when every p-th of the layers, and no other, has no flag: True True False True True ... -> 3; 0 when there is none."""
    first = flags.index(False) + 1 if False in flags else 0
    return first if first and all(flag == bool((i + 1) % first) for i, flag in enumerate(flags)) else 0


def active_windows(config: ModelConfig, context: int) -> tuple[int, ...]:
    """The windows shorter than the context, one per windowed layer."""
    return tuple(window for window in config.layer_windows if window is not None and window < context)


def _rope_everywhere(config: ModelConfig, context: int) -> str:
    problems = []
    if set(config.layer_positions) != {"rope"}:
        problems.append(f"positions {', '.join(dict.fromkeys(config.layer_positions))} (it has rope in all layers)")
    if active_windows(config, context):
        problems.append(f"a window of {min(active_windows(config, context))} (it always sees the whole context)")
    return "; ".join(problems)


def _rope_or_nothing(config: ModelConfig, context: int) -> str:
    if set(config.layer_positions) == {"none"} and not active_windows(config, context):
        return ""
    return _rope_everywhere(config, context)


def _smollm3(config: ModelConfig, context: int) -> str:
    if any(position != ("none" if (i + 1) % 4 == 0 else "rope") for i, position in enumerate(config.layer_positions)):
        return "positions other than rope with every 4th layer none"
    return "a window" if active_windows(config, context) else ""


def _alibi(config: ModelConfig, context: int) -> str:
    problems = []
    if set(config.layer_positions) != {"alibi"}:
        problems.append("positions other than alibi in all layers")
    if active_windows(config, context):
        problems.append(f"a window of {min(active_windows(config, context))}")
    return "; ".join(problems)


def _gemma2(config: ModelConfig, context: int) -> str:
    if set(config.layer_positions) != {"rope"}:
        return "positions other than rope in all layers"
    windowed = tuple(window is not None for window in config.layer_windows)
    if len(set(filter(None, config.layer_windows))) != 1 or period(windowed) != 2:
        return "windows other than one size on the 1st, 3rd, 5th ... layer"
    return ""


def _gemma3(config: ModelConfig, context: int) -> str:
    windowed = tuple(window is not None for window in config.layer_windows)
    if len(set(filter(None, config.layer_windows))) != 1 or period(windowed) != 6:
        return "windows other than one size on all but each 6th layer"
    if config.layer_positions != tuple("local_rope" if one else "rope" for one in windowed):
        return "positions other than local_rope in windowed layers and rope in the others"
    return ""


def _granite_swa(config: ModelConfig, context: int) -> str:
    if not set(config.layer_positions) <= {"rope", "none"}:
        return f"positions {', '.join(sorted(set(config.layer_positions) - {'rope', 'none'}))}"
    sizes = sorted(set(filter(None, config.layer_windows)))
    if len(sizes) > 1:
        return f"windows of different sizes ({', '.join(map(str, sizes))})"
    return ""


_ALL_BIASES = ("qkv_bias", "output_bias", "mlp_bias")
_LLAMA3 = ("none", "linear", "llama3")

# In the order of preference: the first that holds a model unchanged is taken. MPT's graph has a norm of queries and keys too,
# but llama.cpp aborts there (ggml_reshape_2d of a view).
ARCHS = {arch.name: arch for arch in (
    Arch("qwen2", biases=("qkv_bias",), must_have_bias=True, layers=_rope_everywhere),
    Arch("llama", interleaved=True, biases=_ALL_BIASES, rope_scalings=_LLAMA3, layers=_rope_everywhere),
    Arch("qwen3", qk_norm="head", layers=_rope_everywhere),
    Arch("olmo2", placement="post", qk_norm="full", needs_output=True, square=True, layers=_rope_everywhere),
    Arch("smollm3", interleaved=True, layers=_smollm3),
    Arch("gemma2", placement="sandwich", activations=("gelu_tanh",), must_be_tied=True, gemma=True, windowed=True,
         layers=_gemma2),
    Arch("gemma3", placement="sandwich", activations=("gelu_tanh",), qk_norm="head", gemma=True, windowed=True,
         layers=_gemma3),
    Arch("mpt", norm="layer", mlp="plain", activations=("gelu", "gelu_tanh"), biases=_ALL_BIASES, fused=True, clip=True,
         square=True, rope_scalings=("none",), layers=_alibi),
    Arch("granite", interleaved=True, biases=_ALL_BIASES, multipliers=True, rope_scalings=_LLAMA3, layers=_rope_or_nothing),
    Arch("granite_swa", interleaved=True, biases=_ALL_BIASES, multipliers=True, sinks=True, windowed=True,
         rope_scalings=_LLAMA3, layers=_granite_swa),
)}


def obstacles(config: ModelConfig, arch: Arch, context: int) -> list[str]:
    """What of the model `arch` cannot hold, in words; empty when the file will compute what neo computes.

    Args:
        context: longest input the file is for; windows at least as long do not count.
    """
    found = []
    if config.norm != arch.norm:
        found.append(f"norm={config.norm}")
    if config.norm_placement != arch.placement:
        found.append(f"norm_placement={config.norm_placement}")
    if config.mlp != arch.mlp:
        found.append(f"mlp={config.mlp}")
    if config.activation not in arch.activations:
        found.append(f"activation={config.activation}")
    if config.qk_norm != arch.qk_norm:
        found.append(f"qk_norm={config.qk_norm}")
    found += [f"{name}=True" for name in ("qkv_bias", "output_bias", "mlp_bias")
              if getattr(config, name) and name not in arch.biases]
    if arch.must_have_bias and not config.qkv_bias:
        found.append("qkv_bias=False")
    if config.attention_sinks and not arch.sinks:
        found.append("attention_sinks=True")
    if config.clip_qkv and not arch.clip:
        found.append(f"clip_qkv={config.clip_qkv}")
    if config.rope_scaling not in arch.rope_scalings and "rope" in config.layer_positions:
        found.append(f"rope_scaling={config.rope_scaling}")
    if arch.square and config.num_heads * config.head_size != config.d_model:
        found.append(f"num_heads * head_dim = {config.num_heads * config.head_size}, not d_model = {config.d_model}")
    if arch.must_be_tied and not config.tied_embeddings:
        found.append("tied_embeddings=False")
    if config.clip_qkv and config.qk_norm == "none" and not math.isclose(arch.query_factor(config), 1.0, rel_tol=1e-6):
        found.append(f"attention_scale={config.attention_scale:g} behind clip_qkv")
    found += _soft_caps(config, arch)
    pattern = arch.layers(config, context)
    return found + ([pattern] if pattern else [])


def _soft_caps(config: ModelConfig, arch: Arch) -> list[str]:
    both = {"attention_softcap": config.attention_softcap, "logit_softcap": config.logit_softcap}
    if arch.name == "gemma2":   # its graph always has both
        return [f"no {name}" for name, value in both.items() if not value]
    return [f"{name}={value}" for name, value in both.items() if value]


def choose(config: ModelConfig, asked: str, context: int) -> Arch:
    """The architecture to write: the one asked for, or with "auto" the first that holds the model.

    One that keeps the model's multipliers goes before those for which they are folded into the weights; WeSaR gains, which none
    has, are always folded. Raises InputError listing what stands in the way of each.
    """
    if asked not in ("auto", *ARCHS):
        raise InputError(f"--gguf_arch: {asked!r} is none of auto, {', '.join(ARCHS)}")
    in_the_way = {name: obstacles(fold(config, arch.fold_class).config, arch, context) for name, arch in ARCHS.items()}
    able = [arch for name, arch in ARCHS.items() if not in_the_way[name]]
    plain = dataclasses.replace(config, wesar=False)
    able.sort(key=lambda arch: bool(to_fold(plain, arch.fold_class)))
    if asked != "auto":
        if in_the_way[asked]:
            hint = f"; it fits --gguf_arch={able[0].name}" if able else ""
            raise InputError(f"llama.cpp's architecture {asked} cannot hold this model: it has "
                             f"{'; '.join(in_the_way[asked])}{hint}")
        return ARCHS[asked]
    if not able:
        fewest = sorted(in_the_way, key=lambda name: len(in_the_way[name]))
        raise InputError("no architecture of llama.cpp that neo knows can hold this model: "
                         + " | ".join(f"{name}: {'; '.join(in_the_way[name])}" for name in fewest))
    return able[0]
