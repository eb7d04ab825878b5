"""The order of the data: a pure function of (phases, seed, source sizes, global sequence index).

Global sequence index -> phase -> source (mixture.py) -> n-th window of that source -> epoch and place in it:

* A window of a phase with sequence length T is T+1 tokens, read with stride T: every token is a target once.
* A source has one running position over all phases. A phase takes the next range of it, as many windows as the
  mixture gives the source. What is left of an epoch but shorter than T goes to the next phase; if that
  needs more than is left, the next epoch begins at token 0.
* A range that passes the end of the source is split per epoch into pieces. The windows of a piece are permuted
  (permutation.py) with the key (seed, source name, phase index, epoch).

So nothing that comes later (phases, sources, train.steps) changes what came before. All numbers are exact Python
ints; a lookup costs O(log phases + log sources) and nothing grows with the corpus.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from neo.data.mixture import Mixture
from neo.data.permutation import piece_permutation
from neo.errors import InputError, nearest


class Phase(Protocol):
    """What the order needs of a phase; `neo.config.schema.PhaseConfig` has it."""

    name: str
    seq_len: int
    global_batch: int
    mixture: Mapping[str, float]

    @property
    def steps(self) -> int: ...


class Address(NamedTuple):
    """Where a sequence lies: tokens [start, start + length + 1) of the source's training split."""

    phase: int
    source: str
    epoch: int
    start: int
    length: int


class _Range(NamedTuple):
    """The windows of one source in one phase: `head` of them from `offset` in `epoch`, then whole epochs."""

    phase: int
    first: int  # windows of this source in earlier phases
    count: int
    length: int  # T
    epoch: int
    offset: int
    head: int
    per_epoch: int


@dataclasses.dataclass(frozen=True)
class _Span:
    """One phase, with everything before it summed up."""

    name: str
    steps: int
    seq_len: int
    global_batch: int
    mixture: Mixture
    source_ids: tuple[int, ...]  # of mixture.names, in Order.sources
    bases: tuple[int, ...]  # windows of these sources in earlier phases
    first_step: int
    first_index: int
    first_token: int


class Order:
    """The data order of a run; make one with `Order.create`."""

    def __init__(self, spans: Sequence[_Span], sources: tuple[str, ...], ranges: Sequence[Sequence[_Range]],
                 seed: int) -> None:
        self.sources = sources
        self.seed = seed
        self.spans = tuple(spans)
        self._ranges = tuple(tuple(r) for r in ranges)
        self._range_starts = tuple(tuple(r.first for r in source_ranges) for source_ranges in self._ranges)
        last = self.spans[-1]
        self.num_steps = last.first_step + last.steps
        self.num_sequences = last.first_index + last.steps * last.global_batch
        self.num_tokens = last.first_token + last.steps * last.global_batch * last.seq_len
        self._step_starts = [span.first_step for span in self.spans]
        self._index_starts = [span.first_index for span in self.spans]

    @classmethod
    def create(cls, phases: Sequence[Phase], sources: Sequence[str], source_tokens: Mapping[str, int],
               seed: int) -> Order:
        """Build the order. `source_tokens` are the tokens of each source's training split.

        Raises InputError for no phase or no step, a bad mixture, an unknown source, or a source shorter than a window.
        """
        sources = tuple(sources)
        source_ids = {name: i for i, name in enumerate(sources)}
        for phase in phases:
            _check_phase(phase, source_ids)
        if not any(phase.steps > 0 for phase in phases):
            raise InputError("the phases have no tokens; give at least one phase with tokens > 0")
        ranges: list[list[_Range]] = [[] for _ in sources]
        places = [(0, 0)] * len(sources)  # (epoch, offset) where the next range of each source begins
        totals = [0] * len(sources)
        spans: list[_Span] = []
        step = index = token = 0
        for number, phase in enumerate(phases):
            try:
                mixture = Mixture(phase.mixture)
            except ValueError as error:
                raise InputError(f"phases.{phase.name}.mixture: {error}") from None
            ids = tuple(source_ids[name] for name in mixture.names)
            spans.append(_Span(phase.name, phase.steps, phase.seq_len, phase.global_batch, mixture, ids,
                               tuple(totals[i] for i in ids), step, index, token))
            sequences = phase.steps * phase.global_batch
            for i, count in zip(ids, mixture.counts(sequences), strict=True):
                if count == 0:
                    continue
                tokens = source_tokens[sources[i]]
                per_epoch = (tokens - 1) // phase.seq_len
                if per_epoch < 1:
                    raise InputError(
                        f"source {sources[i]!r} has {tokens} training tokens, fewer than one window of "
                        f"phase {phase.name!r} (seq_len + 1 = {phase.seq_len + 1}): add text to it, make the sequences "
                        f"shorter, or set --config.phases.{phase.name}.mixture.{sources[i]}=0")
                taken = _take(number, totals[i], count, phase.seq_len, per_epoch, tokens, *places[i])
                ranges[i].append(taken)
                places[i] = _place_after(taken)
                totals[i] += count
            step += phase.steps
            index += sequences
            token += sequences * phase.seq_len
        return cls(spans, sources, ranges, int(seed))

    def select(self, index: int) -> tuple[int, int]:
        """Global sequence index -> (position in `sources`, n): the n-th window of that source, over all phases."""
        index = int(index)  # a numpy integer would overflow in the products below
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} is outside the run's {self.num_sequences} sequences")
        span = self.spans[bisect.bisect_right(self._index_starts, index) - 1]
        place, n = span.mixture.select(index - span.first_index)
        return span.source_ids[place], span.bases[place] + n

    def window(self, source: int, n: int) -> Address:
        """The n-th window that the run takes from the source at this position in `sources`."""
        n = int(n)
        ranges = self._ranges[source]
        r = ranges[bisect.bisect_right(self._range_starts[source], n) - 1]
        k = n - r.first
        if k >= r.count or n < 0:
            raise IndexError(f"source {self.sources[source]!r} gives {self.num_windows(source)} windows, not {n}")
        name = self.sources[source]
        if k < r.head:
            epoch, offset, size = r.epoch, r.offset, r.head
        else:
            later, k = divmod(k - r.head, r.per_epoch)
            epoch, offset = r.epoch + 1 + later, 0
            size = min(r.per_epoch, r.count - r.head - later * r.per_epoch)
        k = piece_permutation(size, self.seed, name, r.phase, epoch)[k]
        return Address(r.phase, name, epoch, offset + k * r.length, r.length)

    def address(self, index: int) -> Address:
        """Where the sequence with this global index lies."""
        return self.window(*self.select(index))

    def num_windows(self, source: int) -> int:
        """How many windows the whole run takes from the source at this position in `sources`."""
        ranges = self._ranges[source]
        return ranges[-1].first + ranges[-1].count if ranges else 0

    def phase_of_step(self, step: int) -> int:
        """Index of the phase that step 0 <= step < num_steps belongs to."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside the run's {self.num_steps} steps")
        return bisect.bisect_right(self._step_starts, step) - 1

    def first_index(self, step: int) -> int:
        """Global index of the first sequence of a step; `num_sequences` for step = num_steps."""
        span, steps = self._span_before(step)
        return span.first_index + steps * span.global_batch

    def tokens_before(self, step: int) -> int:
        """Target tokens of all earlier steps; `num_tokens` for step = num_steps."""
        span, steps = self._span_before(step)
        return span.first_token + steps * span.global_batch * span.seq_len

    def tokens_by_source(self, step: int) -> dict[str, int]:
        """Target tokens that the steps before this one took from each source."""
        tokens = dict.fromkeys(self.sources, 0)
        for span in self.spans:
            done = min(max(step - span.first_step, 0), span.steps) * span.global_batch
            for name, count in zip(span.mixture.names, span.mixture.counts(done), strict=True):
                tokens[name] += count * span.seq_len
        return tokens

    def _span_before(self, step: int) -> tuple[_Span, int]:
        step = int(step)
        if not 0 <= step <= self.num_steps:
            raise IndexError(f"step {step} is outside the run's {self.num_steps} steps")
        span = self.spans[bisect.bisect_right(self._step_starts, step) - 1]
        return span, step - span.first_step


def _check_phase(phase: Phase, source_ids: Mapping[str, int]) -> None:
    for field in ("seq_len", "global_batch"):
        if getattr(phase, field) < 1:
            raise InputError(f"phases.{phase.name}.{field} is {getattr(phase, field)}; it must be at least 1")
    if not phase.mixture:
        raise InputError(f"phases.{phase.name}.mixture is empty; give each source a weight, "
                         f"such as --config.phases.{phase.name}.mixture.NAME=1")
    for name in phase.mixture:
        if name not in source_ids:
            raise InputError(f"phases.{phase.name}.mixture names the unknown source {name!r}"
                             f"{nearest(name, source_ids)}")


def _take(phase: int, first: int, count: int, length: int, per_epoch: int, tokens: int, epoch: int,
          offset: int) -> _Range:
    """The next `count` windows of a source of `tokens` tokens whose last range ended at (epoch, offset)."""
    left = (tokens - 1 - offset) // length
    if left == 0:  # the rest of the epoch is shorter than one window
        epoch, offset, left = epoch + 1, 0, per_epoch
    return _Range(phase, first, count, length, epoch, offset, min(left, count), per_epoch)


def _place_after(r: _Range) -> tuple[int, int]:
    """(epoch, offset) of the first token that the range leaves."""
    later = r.count - r.head
    if later == 0:
        return r.epoch, r.offset + r.head * r.length
    whole, rest = divmod(later - 1, r.per_epoch)
    return r.epoch + 1 + whole, (rest + 1) * r.length
