"""Config file or name, plus overrides -> `Config`. The only module that knows ml_collections."""

from __future__ import annotations

import dataclasses
import importlib.util
import traceback
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from neo.config.checks import check
from neo.config.coerce import coerce
from neo.config.schema import CONFIG_VERSION, GROUPS, Config, PhaseConfig
from neo.errors import InputError, nearest

RECIPES = Path(__file__).resolve().parents[2] / "configs"
# Fields that are name -> value, by their name: no two groups have one of the same name and another type.
DICTIONARIES = {name: hint for kind in GROUPS.values() for name, hint in typing.get_type_hints(kind).items()
                if typing.get_origin(hint) is dict}
Overrides = Mapping[str, Any] | Iterable[tuple[str, Any]]


def new() -> ConfigDict:
    """All defaults, as an ml_collections ConfigDict to change and return from `get_config()`."""
    groups = {name: _defaults(kind) for name, kind in GROUPS.items() if name != "phases"}
    return ConfigDict({"name": "", **groups, "phases": []}, type_safe=False).lock()


def phase(name: str, **fields: Any) -> ConfigDict:
    """One entry of `phases`; fields are those of PhaseConfig."""
    config = ConfigDict(_defaults(PhaseConfig), type_safe=False)
    unknown = set(fields) - set(config)
    if unknown:
        raise InputError(_unknown(f"phases.{name}", sorted(unknown)[0], config))
    config.update({"name": name})
    for key, value in fields.items():
        config[key] = ConfigDict(value, type_safe=False) if isinstance(value, Mapping) else value
    return config


def known() -> dict[str, Path]:
    """The recipes in configs/, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.py")) if not path.stem.startswith("_")}


def find(config: str | Path) -> Path:
    """The file of a config given as path or name; `neo_7b` is found from any folder."""
    path = Path(config)
    if path.is_file():
        return path
    if path.suffix in ("", ".py") and path.stem in known() and (path.parent.name in ("", "configs")):
        return known()[path.stem]
    if path.suffix == ".py" and path.parent.name:
        raise InputError(f"config file {str(config)!r} does not exist; known recipes: {', '.join(known())}")
    raise InputError(f"unknown config {str(config)!r}{nearest(path.stem, known())}; "
                     f"known: {', '.join(known())}, or give the path of a file with get_config()")


def load(config: str | Path, overrides: Overrides = ()) -> Config:
    """Load, override and validate a config.

    Args:
        config: path of a Python file with `get_config()`, or a recipe's name.
        overrides: `{"model.num_layers": 4}` or pairs; values may be text.

    Raises InputError naming the field, its value and what would be right.
    """
    path = find(config)
    tree = _execute(path)
    for field, value in overrides.items() if isinstance(overrides, Mapping) else overrides:
        _override(tree, field, value)
    if not tree.name:
        tree.name = path.stem
    return _scaled(check(_measured(from_dict(tree.to_dict()))))


def from_dict(tree: Mapping[str, Any]) -> Config:
    """Nested plain dict (as in config.json) -> Config, with every type checked and unknown fields refused."""
    tree = dict(tree)
    version = tree.pop("version", CONFIG_VERSION)
    if version != CONFIG_VERSION:
        raise InputError(f"config has version {version}, this neo reads version {CONFIG_VERSION}")
    unknown = set(tree) - {"name", *GROUPS}
    if unknown:
        raise InputError(_unknown("", sorted(unknown)[0], ["name", *GROUPS]))
    groups = {name: _build(kind, tree[name], name) for name, kind in GROUPS.items() if name in tree and name != "phases"}
    phases = tuple(_build(PhaseConfig, fields, f"phases.{fields.get('name', i)}")
                   for i, fields in enumerate(tree.get("phases", ())))
    return Config(name=tree.get("name", ""), phases=phases, **groups)


def to_dict(config: Config) -> dict[str, Any]:
    """Config -> JSON-ready nested dict with a format version; `from_dict` reads it back."""
    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: plain(item) for name, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return {"version": CONFIG_VERSION, **plain(dataclasses.asdict(config))}


def _execute(path: Path) -> ConfigDict:
    spec = importlib.util.spec_from_file_location(f"neo_config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise InputError(f"config {path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        tree = module.get_config()
    except InputError:
        raise
    except AttributeError as error:
        if not hasattr(module, "get_config"):
            raise InputError(f"config {path} has no get_config()") from None
        raise InputError(f"config {path}, line {_line(error, path)}: {str(error).splitlines()[0]}") from None
    except Exception as error:
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"config {path}, line {_line(error, path)}: {type(error).__name__}: {text}") from None
    if not isinstance(tree, ConfigDict):
        raise InputError(f"config {path}: get_config() must return neo.config.new() with its fields set, "
                         f"not {type(tree).__name__}")
    return tree


def _line(error: BaseException, path: Path) -> int | str:
    if isinstance(error, SyntaxError):
        return error.lineno or "?"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return lines[-1] if lines else "?"


def _override(tree: ConfigDict, field: str, value: Any) -> None:
    """Set one dotted field; phases are addressed by name."""
    *parents, last = field.split(".")
    node: Any = tree
    for depth, part in enumerate(parents):
        if depth == 1 and parents[0] == "phases":
            node = _phase_named(node, part, field)
        elif isinstance(node, ConfigDict) and part in node:
            node = node[part]
        elif not isinstance(node, ConfigDict):
            raise InputError(f"unknown field config.{field}: config.{'.'.join(parents[:depth])} has no parts")
        else:
            raise InputError(_unknown(".".join(parents[:depth]), part, node))
    if not isinstance(node, ConfigDict):
        if parents != ["phases"]:
            raise InputError(f"unknown field config.{field}: config.{'.'.join(parents)} has no parts")
        raise InputError(f"config.{field}: address one field of a phase, as in config.phases.{last}.tokens=2e9")
    kind = DICTIONARIES.get(parents[-1] if parents else "")
    if last not in node and kind is None:
        raise InputError(_unknown(".".join(parents), last, node))
    if last == "phases":
        raise InputError("config.phases is a list; address one field of a phase, as in config.phases.main.tokens=2e9")
    if last in DICTIONARIES:
        value = ConfigDict(coerce(value, DICTIONARIES[last], field))
    elif isinstance(node.get(last, None), ConfigDict):
        raise InputError(f"config.{field} is a group; set one of its fields: {', '.join(node[last])}")
    with node.unlocked():
        node[last] = value


def _phase_named(phases: Iterable[ConfigDict], name: str, field: str) -> ConfigDict:
    names = [one.name for one in phases]
    for one in phases:
        if one.name == name:
            return one
    raise InputError(f"config.{field}: no phase {name!r}{nearest(name, names)}; phases: {', '.join(names)}")


def _unknown(parent: str, name: str, fields: Iterable[str]) -> str:
    fields = list(fields)
    path = f"config.{parent}.{name}" if parent else f"config.{name}"
    return f"unknown field {path}{nearest(name, fields)}; {'config.' + parent if parent else 'config'} has: {', '.join(fields)}"


def _defaults(kind: type) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(kind()).items()}


def _build(kind: type, fields: Mapping[str, Any], path: str) -> Any:
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    for name in fields:
        if name not in names:
            raise InputError(_unknown(path, name, names))
    values = {name: coerce(value, hints[name], f"{path}.{name}") for name, value in fields.items()}
    for field in dataclasses.fields(kind):
        choices = field.metadata.get("choices")
        if not choices or field.name not in values:
            continue
        value = values[field.name]
        for one in value if isinstance(value, tuple) else (value,):
            if one not in choices:
                raise InputError(f"config.{path}.{field.name}={one!r}{nearest(one, choices)}: one of {', '.join(choices)}")
    return kind(**values)


def _measured(config: Config) -> Config:
    """Phases with tokens = 0 whose mixture counts tokens or epochs get the tokens it says."""
    def tokens(one: PhaseConfig) -> int:
        if one.tokens or one.mixture_end or one.mixture_unit == "weight":
            return one.tokens
        if one.mixture_unit == "tokens":
            return round(sum(one.mixture.values()))
        unknown = [name for name, epochs in one.mixture.items() if epochs and name not in config.data.source_tokens]
        if unknown:
            raise InputError(f"config.phases.{one.name}.tokens=0 and mixture_unit=epochs: give the phase's tokens, or the size "
                             f"of {', '.join(unknown[:8])} in config.data.source_tokens")
        return round(sum(epochs * config.data.source_tokens.get(name, 0) for name, epochs in one.mixture.items()))

    return dataclasses.replace(config, phases=tuple(dataclasses.replace(one, tokens=tokens(one)) for one in config.phases))


def _scaled(config: Config) -> Config:
    """Apply train.scale_tokens to phases and warm-ups; the result says 1.0, so that it reads back the same."""
    factor = config.train.scale_tokens
    if factor == 1.0:
        return config
    phases = tuple(dataclasses.replace(one, tokens=max(1, round(one.tokens * factor)),
                                       warmup_tokens=round(one.warmup_tokens * factor),
                                       batch_ramp_tokens=round(one.batch_ramp_tokens * factor)) for one in config.phases)
    return dataclasses.replace(config, phases=phases, train=dataclasses.replace(config.train, scale_tokens=1.0))
