"""Rotary positions in config.json: `rope_parameters` of transformers 5, `rope_theta` and `rope_scaling` of 4."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from neo.models.hf.classes import HFClass
from neo.models.hf.config_keys import Keys


@dataclasses.dataclass(frozen=True)
class _Rope:
    """What one dictionary says about rotation: base (None: not there) and the scaling fields of ModelConfig."""

    base: float | None
    scaling: Mapping[str, Any]


def read_rope(keys: Keys, cls: HFClass, max_seq_len: int) -> dict[str, Any]:
    """Base and scaling from rope_parameters, or rope_theta and rope_scaling; two that disagree are refused."""
    fields: dict[str, Any] = {}
    params, at = keys.get("rope_parameters"), "rope_parameters."
    if cls.positions == ("by_window",):
        params, at = keys.inner("rope_parameters").get("full_attention"), "rope_parameters.full_attention."
        fields["local_rope_base"] = _local_base(keys, max_seq_len)
    scaling = keys.get("rope_scaling")
    found = [_rope_table(keys, table, name, max_seq_len) for table, name in ((params, at), (scaling, "rope_scaling.")) if table]
    bases = {rope.base for rope in found if rope.base is not None}
    if keys.table.get("rope_theta") is not None:
        bases.add(float(keys.number("rope_theta")))
    keys.get("rope_theta")
    if len(bases) > 1:
        keys.refuse("rope_theta", sorted(bases), "rope_theta, rope_parameters and rope_scaling disagree")
    if len(found) == 2 and found[0].scaling != found[1].scaling:
        keys.refuse("rope_scaling", scaling, "rope_parameters says something else")
    fields["rope_base"] = float(next(iter(bases), cls.defaults["rope_theta"]))
    return fields | dict(found[0].scaling if found else {})


def _local_base(keys: Keys, max_seq_len: int) -> float:
    """Gemma-3: the base of windowed layers, which are never scaled."""
    old = float(keys.number("rope_local_base_freq", 10000.0))
    nested = keys.inner("rope_parameters")
    nested.get("full_attention")
    table = nested.get("sliding_attention")
    keys.problems += nested.rest()
    if not table:
        return old
    rope = _rope_table(keys, table, "rope_parameters.sliding_attention.", max_seq_len)
    if rope.scaling:
        keys.refuse("rope_parameters.sliding_attention", table, "only full layers can be scaled")
    if rope.base is None:
        return old
    if keys.table.get("rope_local_base_freq") not in (None, rope.base):
        keys.refuse("rope_local_base_freq", old, f"rope_parameters says {rope.base:g}")
    return rope.base


def _rope_table(keys: Keys, table: Any, at: str, max_seq_len: int) -> _Rope:
    """One dictionary with rope_type (older: type), rope_theta and what the type needs."""
    if not isinstance(table, Mapping):
        keys.refuse(at.rstrip("."), table, "a dictionary is needed")
        return _Rope(None, {})
    own = Keys(table, {}, at)
    base = float(own.number("rope_theta")) if own.get("rope_theta") is not None else None
    kind = own.get("rope_type") or own.get("type") or "default"
    own.get("type")
    scaling: dict[str, Any] = {}
    if kind == "linear":
        scaling = dict(rope_scaling="linear", rope_factor=float(own.number("factor")))
    elif kind == "llama3":
        scaling = dict(rope_scaling="llama3", rope_factor=float(own.number("factor")),
                       rope_low_frequency=float(own.number("low_freq_factor")),
                       rope_high_frequency=float(own.number("high_freq_factor")),
                       rope_old_seq_len=own.whole("original_max_position_embeddings", max_seq_len))
    elif kind != "default":
        own.refuse("rope_type", kind, "neo has default, linear and llama3")
        own.seen |= set(table)
    keys.problems += own.rest()
    return _Rope(base, scaling)
