"""Values of config fields: text from the command line or objects from a file -> the declared type."""

from __future__ import annotations

import decimal
import math
import types
import typing
from typing import Any

from neo.errors import InputError

MAX_DIGITS = 18   # ours: whatever fits int64
_TRUE, _FALSE = {"true", "1", "yes", "on"}, {"false", "0", "no", "off"}


def coerce(value: Any, kind: Any, path: str) -> Any:
    """`value` as `kind` (int, float, bool, str, tuple[x, ...] or dict[str, x]).

    Text is parsed, so `1e5` and `10_000` are integers. Raises InputError naming field, value and type.
    """
    origin = typing.get_origin(kind)
    try:
        if origin is tuple:
            item = typing.get_args(kind)[0]
            parts = _split(value) if isinstance(value, str) else list(value)
            return tuple(coerce(part, item, f"{path}[{i}]") for i, part in enumerate(parts))
        if origin is dict:
            item = typing.get_args(kind)[1]
            pairs = (part.split("=", 1) for part in _split(value)) if isinstance(value, str) else dict(value).items()
            return {str(name).strip(): coerce(weight, item, f"{path}.{name}") for name, weight in pairs}
        if origin is types.UnionType:
            raise TypeError
        return {int: _int, float: _float, bool: _bool, str: _str}[kind](value)
    except (ValueError, TypeError, ArithmeticError):
        raise InputError(f"config.{path}={value!r}: {_wanted(kind)} is needed") from None


def _split(text: str) -> list[str]:
    text = text.strip().strip("()[]{}")
    return [part.strip().strip("'\"") for part in text.split(",") if part.strip()] if text else []


def _int(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    # Decimal, not float: 3.726e12 and 16-digit token counts stay exact.
    number = decimal.Decimal(value.replace("_", "") if isinstance(value, str) else str(value))
    # Size first: int() of 1e999999 would be a million digits.
    if not number.is_finite() or number.adjusted() > MAX_DIGITS or number != number.to_integral_value():
        raise ValueError
    return int(number)


def _float(value: Any) -> float:
    if isinstance(value, bool):
        raise TypeError
    number = float(value)
    if not math.isfinite(number):
        raise ValueError
    return number


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _TRUE | _FALSE:
        return value.strip().lower() in _TRUE
    raise TypeError


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _wanted(kind: Any) -> str:
    names = {int: "a whole number", float: "a finite number", bool: "True or False", str: "text"}
    if kind in names:
        return names[kind]
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        return f"a comma-separated list, each {_wanted(args[0])}"
    return f"name=value pairs separated by commas, each value {_wanted(args[1])},"
