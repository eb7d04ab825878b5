"""Configs as text: a Python file that reads back, a diff of identity fields, the reference of all fields."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from neo.config.load import to_dict
from neo.config.schema import GROUPS, Config, PhaseConfig


def as_python(config: Config, overridden: Iterable[str] = (), summary: Iterable[str] = ()) -> str:
    """The resolved config as a config file: what it prints can be given to `--config` again.

    Args:
        overridden: dotted fields to mark as changed on the command line.
        summary: lines for the docstring.
    """
    marks = set(overridden)

    def line(path: str, target: str, value: Any) -> str:
        note = "   # from the command line" if path in marks else ""
        if note and path == "train.scale_tokens":
            note += ", and applied to the phases above"
        return f"    {target} = {value!r}{note}"

    lines = ['"""Resolved config of ' + config.name + "."]
    lines += ["", *summary] if summary else []
    lines += ['"""', "", "from neo.config import new, phase", "", "", "def get_config():", "    c = new()"]
    lines.append(line("name", "c.name", config.name))
    for group, kind in GROUPS.items():
        if group == "phases":
            lines.append("    c.phases = [")
            for one in config.phases:
                fields = ", ".join(f"{field.name}={getattr(one, field.name)!r}" for field in dataclasses.fields(one)
                                   if field.name not in ("name", "mixture"))
                mark = sorted(path.split(".", 2)[2] for path in marks if path.startswith(f"phases.{one.name}."))
                note = f"   # from the command line: {', '.join(mark)}" if mark else ""
                lines.append(f"        phase({one.name!r}, {fields},\n              mixture={dict(one.mixture)!r}),{note}")
            lines.append("    ]")
            continue
        values = getattr(config, group)
        lines += [line(f"{group}.{field.name}", f"c.{group}.{field.name}", getattr(values, field.name))
                  for field in dataclasses.fields(kind)]
    return "\n".join([*lines, "    return c", ""])


def identity_diff(before: Config, after: Config, past_phases: int) -> list[str]:
    """Identity fields in which two configs differ, as `field: old -> new` lines.

    Phases count up to the one the run is in (`past_phases` of them); later ones are operational, and so
    is the name of the recipe.
    """
    old, new = _identity(before, past_phases), _identity(after, past_phases)
    return [f"config.{path}: {old.get(path)!r} -> {new.get(path)!r}"
            for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)]


def changes(before: Config, after: Config) -> list[str]:
    """Every field in which two configs differ, as `field: old -> new` lines."""
    old, new = _flat(to_dict(before)), _flat(to_dict(after))
    return [f"config.{path}: {old.get(path)!r} -> {new.get(path)!r}"
            for path in sorted(old.keys() | new.keys()) if old.get(path) != new.get(path)]


def _identity(config: Config, past_phases: int) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for group, kind in GROUPS.items():
        if group == "phases":
            for i, one in enumerate(config.phases[:past_phases]):
                flat |= {f"phases[{i}].{name}": value for name, value in dataclasses.asdict(one).items()}
            continue
        flat |= {f"{group}.{field.name}": getattr(getattr(config, group), field.name)
                 for field in dataclasses.fields(kind) if field.metadata["identity"]}
    return flat


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(tree, Mapping):
        return {key: value for name, item in tree.items()
                for key, value in _flat(item, f"{prefix}.{name}" if prefix else name).items()}
    if isinstance(tree, list) and tree and isinstance(tree[0], Mapping):
        return {key: value for i, item in enumerate(tree) for key, value in _flat(item, f"{prefix}[{i}]").items()}
    return {prefix: tree}


def field_lines() -> list[tuple[str, str, str, str]]:
    """(field, type, default, meaning) of every config field, for `--help` and the reference."""
    rows = [("name", "str", "''", "name of the recipe: the config file's name unless it sets another")]
    for group, kind in GROUPS.items():
        prefix = "phases.<name>" if kind is PhaseConfig else group
        hints = typing.get_type_hints(kind)
        for field in dataclasses.fields(kind):
            hint = hints[field.name]
            text = hint.__name__ if isinstance(hint, type) and not typing.get_args(hint) else str(hint)
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            choices = field.metadata["choices"]
            doc = field.metadata["doc"] + (f" ({' | '.join(choices)})" if choices else "")
            rows.append((f"{prefix}.{field.name}", text, repr(default), doc))
    return rows


def reference() -> str:
    """docs/config_reference.md, from the schema."""
    lines = ["# Config reference", "",
             "Generated by `python -m neo.config > docs/config_reference.md`; a test keeps it fresh.", "",
             "Fields marked *identity* decide what a run computes: changing one on resume is refused, with a diff. All others",
             "may change whenever a run is started again. A phase that has not begun may change too.", ""]
    rows = {path: (kind, default, doc) for path, kind, default, doc in field_lines()}
    for group, kind in GROUPS.items():
        prefix = "phases.<name>" if kind is PhaseConfig else group
        lines += [f"## {prefix}", "", (kind.__doc__ or "").splitlines()[0], "",
                  "| field | type | default | | meaning |", "|---|---|---|---|---|"]
        for field in dataclasses.fields(kind):
            text, default, doc = rows[f"{prefix}.{field.name}"]
            mark = "identity" if field.metadata["identity"] else ""
            lines.append(f"| `{prefix}.{field.name}` | {text} | `{default}` | {mark} | {doc.replace('|', '/')} |")
        lines.append("")
    return "\n".join(lines)
