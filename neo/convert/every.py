"""`neo.convert to-hf --all`: every checkpoint of a workdir, each in a folder named by the tokens it has seen.

As MAP-NEO publishes its intermediate checkpoints (16.78B, 33.55B, ...). Started again, it goes on: what is finished is left.
"""

from __future__ import annotations

from collections.abc import Sequence

from neo.convert import endings
from neo.convert.output import check_place
from neo.convert.source import source_of
from neo.convert.to_hf import Options, write_hf
from neo.data.progress import say
from neo.errors import InputError
from neo.train.checkpoint_format import Checkpoint, checkpoints_in


def run_all(workdir: str, place: str, options: Options, overwrite: bool = False) -> None:
    """Convert all checkpoints, oldest first. InputError when the workdir has none."""
    found = checkpoints_in(workdir)
    if not found:
        raise InputError(f"--all takes a workdir with checkpoints/<step>/ folders; {workdir} has none")
    out = check_place(place, [str(one.path) for one in found])
    names = token_names(found)
    for number, (checkpoint, name) in enumerate(zip(found, names, strict=True), 1):
        say(f"{number} of {len(found)}: {checkpoint.path} ({checkpoint.title}) -> {out / name}")
        write_hf(source_of(checkpoint), out / name, options, overwrite)
    print(endings.after_all(out, names))


def token_names(found: Sequence[Checkpoint]) -> list[str]:
    """16.78B for 16,777,216,000 tokens: two decimals of K, M or B, cut off the unit's start at 1000 B only.

    Of two checkpoints that would have the same name, the later one gets its step added, so that names never change as the
    run goes on.
    """
    names: list[str] = []
    for one in found:
        name = token_name(one.tokens)
        names.append(f"{name}-step{one.step}" if name in names else name)
    return names


def token_name(tokens: int) -> str:
    """Tokens with two decimals and a unit, never more than B: 512, 1.23M, 16.78B, 3700.00B."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if tokens >= size - size // 200_000:   # what rounds to 1000.00 of a unit is 1.00 of the next
            return f"{tokens / size:.2f}{unit}"
    return str(tokens)
