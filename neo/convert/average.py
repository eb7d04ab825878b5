"""`neo.convert average`: one checkpoint whose parameters are a weighted mean of several's."""

from __future__ import annotations

import dataclasses
import math

from neo.cli import Namespace
from neo.convert import endings
from neo.convert.checkpoint_output import write
from neo.convert.output import check_place
from neo.convert.source import Source, open_source, source_of
from neo.errors import InputError
from neo.train.checkpoint_format import checkpoints_in
from neo.train.weights import AverageWeights


def run(args: Namespace) -> None:
    """Average the checkpoints that are named, or the last of one workdir."""
    sources = _last(args.checkpoint, args.last) if args.last else [open_source(text) for text in args.checkpoint]
    if len(sources) < 2:
        raise InputError(f"an average is of two checkpoints or more: {sources[0].path} is one; name more, or give a workdir "
                         "and --last=4")
    out = check_place(args.out, [one.path for one in sources])
    shares = coefficients(args.weights, len(sources))
    newest = max(sources, key=lambda one: one.tokens)
    for one in sources:
        if one.model != sources[0].model:
            raise InputError(f"{one.path} has another architecture than {sources[0].path}: "
                             f"{_difference(sources[0], one)}; only equal ones can be averaged")
        if (one.tokenizer and one.tokenizer.sha256) != (newest.tokenizer and newest.tokenizer.sha256):
            raise InputError(f"{one.path} has another tokenizer than {newest.path}; their embeddings mean different tokens")
    mean = dataclasses.replace(newest, weights=AverageWeights([one.weights for one in sources], shares))
    facts = {"verb": "average", "checkpoints": [one.digest for one in sources], "weights": shares}
    made_from = [f"average of {len(sources)} checkpoints",
                 *(f"{share:.4g} of {one.name}, step {one.step}, {one.tokens:,} tokens"
                   for share, one in zip(shares, sources, strict=True))]
    write(mean, out, facts, made_from, args.overwrite)
    print(endings.after_checkpoint(out, mean.model))


def coefficients(text: str, count: int) -> list[float]:
    """`--weights` as shares with a sum of 1; equal ones for the empty text. InputError says what is wrong."""
    if not text:
        return [1.0 / count] * count
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--weights={text}: numbers separated by commas are needed, as in 0.2,0.8") from None
    if len(numbers) != count:
        raise InputError(f"--weights={text} has {len(numbers)} numbers for {count} checkpoints")
    total = math.fsum(numbers)
    if not all(map(math.isfinite, numbers)) or total <= 0:
        raise InputError(f"--weights={text}: finite numbers with a positive sum are needed")
    return [number / total for number in numbers]


def _last(named: tuple[str, ...], count: int) -> list[Source]:
    if len(named) > 1:
        raise InputError(f"--last={count} takes one workdir; {len(named)} were given")
    found = checkpoints_in(named[0])
    if not 1 < count <= len(found):
        raise InputError(f"--last={count}: {named[0]} has {len(found)} checkpoints, and 2 or more are needed")
    return [source_of(one) for one in found[-count:]]


def _difference(one: Source, other: Source) -> str:
    a, b = dataclasses.asdict(one.model), dataclasses.asdict(other.model)
    return ", ".join(f"{name} {a[name]} and {b[name]}" for name in a if a[name] != b[name])
