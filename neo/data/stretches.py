"""A phase as stretches of equal batch and weights: what ramps and the units of mixtures come to."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple, Protocol

from neo.data.mixture import Mixture, apportion
from neo.errors import InputError

RAMP_PIECES = 100  # ours: a ramp of weights is a staircase of at most so many steps


class Phase(Protocol):
    """What the order needs of a phase; `neo.config.schema.PhaseConfig` has it."""

    name: str
    seq_len: int
    mixture: Mapping[str, float]
    mixture_end: Mapping[str, float]
    mixture_unit: str

    @property
    def batches(self) -> tuple[tuple[int, int], ...]: ...


class Stretch(NamedTuple):
    """Steps of equal global batch and mixture."""

    steps: int
    global_batch: int
    mixture: Mixture


def stretches(phase: Phase, source_tokens: Mapping[str, int]) -> list[Stretch]:
    """The stretches of a phase in order. `source_tokens`: sizes, for mixtures that count epochs.

    Raises InputError for a bad mixture. A ramp of weights is cut into pieces, each with whole numbers of sequences per
    source that carry on the rounding of the piece before it: over the phase a source is within 1 of its share.
    """
    begin = weights(phase, phase.mixture, "mixture", source_tokens)
    if not phase.mixture_end:
        mixture = _mixture(phase, begin)
        return [Stretch(steps, batch, mixture) for steps, batch in phase.batches]
    end = weights(phase, phase.mixture_end, "mixture_end", source_tokens)
    names = sorted({*begin, *end})
    steps, batches = zip(*phase.batches, strict=True)
    last_step = list(itertools.accumulate(steps))
    sequences = [0, *itertools.accumulate(s * b for s, b in phase.batches)]

    def sequences_before(step: int) -> int:
        i = min(bisect.bisect_right(last_step, step), len(batches) - 1)
        return sequences[i] + (step - (last_step[i] - steps[i])) * batches[i]

    pieces = min(RAMP_PIECES, last_step[-1])
    borders = [last_step[-1] * i // pieces for i in range(pieces + 1)]
    wanted, given = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0)
    found: list[Stretch] = []
    for first, last in itertools.pairwise(borders):
        low, high = sequences_before(first), sequences_before(last)
        done = (low + high) / 2 / sequences[-1]  # the middle of the piece stands for it
        for name in names:
            wanted[name] += (high - low) * ((1 - done) * begin.get(name, 0.0) + done * end.get(name, 0.0))
        counts = _quota([wanted[name] - given[name] for name in names], high - low)
        for name, count in zip(names, counts, strict=True):
            given[name] += count
        mixture = _mixture(phase, {name: float(count) for name, count in zip(names, counts, strict=True) if count})
        cuts = [first, *(step for step in last_step if first < step < last), last]
        for a, b in itertools.pairwise(cuts):
            found.append(Stretch(b - a, batches[min(bisect.bisect_right(last_step, a), len(batches) - 1)], mixture))
    return found


def weights(phase: Phase, mixture: Mapping[str, float], field: str, source_tokens: Mapping[str, int]) -> dict[str, float]:
    """Source -> share of the sequences (they sum to 1), whatever unit the mixture counts in; those of 0 stay."""
    given = dict(mixture)
    if phase.mixture_unit == "epochs":
        given = {name: value * source_tokens[name] if value else 0.0 for name, value in given.items()}
    try:
        total = math.fsum(given.values())
        if not (math.isfinite(total) and total > 0 and min(given.values()) >= 0):
            Mixture(given)  # says what is wrong
        return {name: value / total for name, value in given.items()}
    except ValueError as error:
        raise InputError(f"phases.{phase.name}.{field}: {error}") from None


def _mixture(phase: Phase, given: Mapping[str, float]) -> Mixture:
    try:
        return Mixture(given)
    except ValueError as error:
        raise InputError(f"phases.{phase.name}.mixture: {error}") from None


def _quota(wanted: list[float], total: int) -> list[int]:
    """Whole numbers >= 0 that sum to `total`, as near to `wanted` (which sums to about that) as can be."""
    shares = [max(share, 0.0) for share in wanted]
    scale = total / math.fsum(shares)
    return apportion([share * scale for share in shares], total)
