"""Whether the model of a config is the one whose parameters it is to start from: field by field, with the cure."""

from __future__ import annotations

import dataclasses
from typing import Any

from neo.config.schema import InitConfig, ModelConfig
from neo.errors import InputError

# Where a model is cut to what its phases need; the maths of a position do not depend on it.
FREE = ("max_seq_len",)
PATTERNS = ("windows", "positions")   # repeated over the layers
_NO_ROPE = lambda model: "rope" not in model.positions                                    # noqa: E731
_NOT_LLAMA3 = lambda model: _NO_ROPE(model) or model.rope_scaling != "llama3"              # noqa: E731
UNUSED = {   # field -> whether a model never looks at it
    "rope_base": _NO_ROPE,
    "rope_scaling": _NO_ROPE,
    "rope_factor": lambda model: _NO_ROPE(model) or model.rope_scaling == "none",
    "rope_low_frequency": _NOT_LLAMA3,
    "rope_high_frequency": _NOT_LLAMA3,
    "rope_old_seq_len": _NOT_LLAMA3,
    "local_rope_base": lambda model: "local_rope" not in model.positions,
    "alibi_bias_max": lambda model: "alibi" not in model.positions,
}


def differences(source: ModelConfig, target: ModelConfig, free: tuple[str, ...] = FREE) -> dict[str, tuple[Any, Any]]:
    """Field -> (source's value, target's) where the two models compute something else, or have other parameters.

    Two spellings of the same model do not differ: head_dim 0 and d_model / num_heads, a pattern written once or twice,
    a field that neither of the two uses.
    """
    found, layers = {}, max(source.num_layers, target.num_layers)
    for field in dataclasses.fields(ModelConfig):
        name = field.name
        never = UNUSED.get(name, lambda model: False)
        if name in free or (never(source) and never(target)):
            continue
        theirs, mine = getattr(source, name), getattr(target, name)
        if theirs != mine and _meaning(source, name, layers) != _meaning(target, name, layers):
            found[name] = theirs, mine
    return found


def require_same_model(source: ModelConfig, target: ModelConfig, init: InitConfig, where: str) -> list[str]:
    """Remarks for the log when parameters of `source` can start `target` under these options.

    Raises InputError naming every field that differs and the flags that would make it right.
    """
    deeper = init.depth != "none"
    wider = target.vocab_size > source.vocab_size or init.extend_vocab
    free = (*FREE, *(("num_layers", *PATTERNS) if deeper else ()), *(("vocab_size",) if wider else ()))
    wrong = differences(source, target, free)
    if wrong:
        told = ", ".join(f"{name}={_text(mine)} (there {_text(theirs)})" for name, (theirs, mine) in wrong.items())
        flags = " ".join(f"--config.model.{name}={_text(theirs)}" for name, (theirs, _) in wrong.items())
        more = ""
        if "num_layers" in wrong and target.num_layers > source.num_layers:
            more = ", or --config.init.depth=interleave or stack to add blocks"
        if "rope_base" in wrong:
            more += "; a phase may have a rope_base of its own"
        raise InputError(f"config.model is not the model of {where}: {told}; give {flags}{more}")
    remarks = []
    if deeper:
        for name in PATTERNS:
            theirs, mine = getattr(source, name), getattr(target, name)
            if theirs != mine:
                remarks.append(f"model.{name} is {_text(mine)}, that of {where} {_text(theirs)}: blocks take the pattern of "
                               "their new place")
    if target.max_seq_len > source.max_seq_len:
        remarks.append(f"model.max_seq_len={target.max_seq_len} is longer than the {source.max_seq_len} of {where}")
    return remarks


def _meaning(model: ModelConfig, name: str, layers: int) -> Any:
    """A field's value with defaults written out, and patterns over this many layers."""
    if name in PATTERNS:
        pattern = getattr(model, name)
        return tuple(pattern[i % len(pattern)] for i in range(layers))
    if name == "head_dim":
        return model.head_size
    if name == "attention_scale":
        return model.attention_scale or model.head_size**-0.5
    return getattr(model, name)


def _text(value: Any) -> str:
    """A value as the command line takes it."""
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
