"""Tables of mixtures: a CSV file with the tokens of each source in each mix, as training runs publish them.

    # comments
    source,first,second
    web/en,1000000,500000
    code.v2,,250000

`read_mix` gives a phase's mixture for each column. Names become neo's: they are folders and parts of dotted fields.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from neo.config.load import RECIPES
from neo.errors import InputError, nearest

FOLDER = RECIPES / "mixes"
FAMILY = "--"  # what stands before it is the family of a source: its first folder in the original name


def read_mix(table: str | Path) -> dict[str, dict[str, int]]:
    """Mix name -> {source name: tokens}, without zeros, in the order of the file.

    `table` is the path of a CSV file, or the name of one in configs/mixes. A row is a source, a column a mix; an empty
    cell is 0. Raises InputError naming file and line.
    """
    path = _find(table)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"mix table {path}: cannot be read: {error}") from None
    lines = [(number, line) for number, line in enumerate(text.splitlines(), 1) if line.strip() and not line.startswith("#")]
    rows = [(number, next(csv.reader([line]))) for number, line in lines]
    if not rows or len(rows[0][1]) < 2 or rows[0][1][0].strip() != "source":
        raise InputError(f"mix table {path}: the first line must be source,MIX,..., one column for each mix")
    header = [name.strip() for name in rows[0][1][1:]]
    if len(set(header)) != len(header) or not all(header):
        raise InputError(f"mix table {path}, line {rows[0][0]}: each mix needs a name of its own")
    original: dict[str, list[int]] = {}
    for number, row in rows[1:]:
        at = f"mix table {path}, line {number}"
        if len(row) != len(header) + 1:
            raise InputError(f"{at}: {len(row)} columns where the first line has {len(header) + 1}")
        if row[0] in original:
            raise InputError(f"{at}: source {row[0]!r} is there twice")
        original[row[0]] = [_tokens(cell, f"{at}: {row[0]!r} in mix {name!r}")
                            for name, cell in zip(header, row[1:], strict=True)]
    names = source_names(original)
    mixes = {name: {names[source]: tokens[column] for source, tokens in original.items() if tokens[column]}
             for column, name in enumerate(header)}
    empty = [name for name, mix in mixes.items() if not mix]
    if empty:
        raise InputError(f"mix table {path}: mix {empty[0]!r} has no tokens")
    return mixes


def total(mixes: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Tokens of each source over these mixes."""
    sums: dict[str, int] = {}
    for mix in mixes:
        for source, tokens in mix.items():
            sums[source] = sums.get(source, 0) + tokens
    return sums


def source_names(originals: Iterable[str]) -> dict[str, str]:
    """Original name -> neo's: letters, digits, `-` and `_`, a letter or digit first; `/` becomes `--`.

    Other characters become `_`. Names that would be the same (also in a file system that ignores case) get _2, _3 and
    so on, in the order given.
    """
    names: dict[str, str] = {}
    taken: set[str] = set()
    for original in originals:
        base = re.sub(r"[^A-Za-z0-9_-]", "_", original.strip("/").replace("/", FAMILY)).lstrip("_-") or "source"
        name, again = base, 1
        while name.lower() in taken:
            again += 1
            name = f"{base}_{again}"
        taken.add(name.lower())
        names[original] = name
    return names


def family(source: str) -> str:
    """What a source's name says it belongs to: the part before the first `--`."""
    return source.split(FAMILY, 1)[0]


def _find(table: str | Path) -> Path:
    path = Path(table)
    if path.is_file():
        return path
    known = {file.stem: file for file in sorted(FOLDER.glob("*.csv"))}
    if path.name == str(table) and path.stem in known and path.suffix in ("", ".csv"):
        return known[path.stem]
    raise InputError(f"mix table {str(table)!r} does not exist{nearest(path.stem, known)}; give the path of a CSV file, or one "
                     f"of configs/mixes: {', '.join(known)}")


def _tokens(cell: str, at: str) -> int:
    try:
        tokens = float(cell) if cell.strip() else 0.0
        if not 0 <= tokens < 1e18:  # ours: whatever fits int64
            raise ValueError
    except ValueError:
        raise InputError(f"{at}: {cell!r} is not a number of tokens") from None
    return round(tokens)
