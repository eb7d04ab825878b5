"""The order of the data: a pure function of (phases, seed, source sizes, amendments, global sequence index).

Global sequence index -> stretch of a phase -> source (mixture.py) -> n-th window of that source -> its place:

* A window of a phase with sequence length T is T+1 tokens, read with stride T: every token is a target once.
* A source has one running position over all phases (streams.py). A phase takes the next windows from there, as many as
  its mixture gives the source; at the end of the source the next epoch begins at token 0.
* Windows are permuted in blocks of BLOCK_WINDOWS that follow each other, so reading stays near one place.
* An amendment gives new weights from a step on: each source goes on where it is, in the block it has begun.

So nothing that comes later (phases, sources, amendments, train.steps) changes what came before. All numbers are exact
Python ints; a look-up costs O(log spans + log 1/weight) and nothing grows with the corpus.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from neo.data.amendments import Amendment
from neo.data.mixture import Mixture
from neo.data.streams import Stream
from neo.data.stretches import Phase, Stretch, stretches
from neo.errors import InputError, nearest


class Address(NamedTuple):
    """Where a sequence lies: tokens [start, start + length + 1) of the source's training split."""

    phase: int
    source: str
    epoch: int
    start: int
    length: int


@dataclasses.dataclass(frozen=True)
class Span:
    """Steps of equal sequence length, batch and mixture, with everything before them summed up."""

    phase: int  # index into the phases
    name: str  # of the phase
    steps: int
    seq_len: int
    global_batch: int
    mixture: Mixture
    source_ids: tuple[int, ...]  # of mixture.names, in Order.sources
    bases: tuple[int, ...]  # windows of these sources before mixture_index
    mixture_index: int  # global index at which the mixture counts from 0: a batch ramp does not begin it anew
    first_step: int
    first_index: int
    first_token: int

    @property
    def sequences(self) -> int:
        """Sequences of all its steps."""
        return self.steps * self.global_batch


class Order:
    """The data order of a run; make one with `Order.create`."""

    def __init__(self, spans: Sequence[Span], sources: tuple[str, ...], streams: Sequence[Stream], seed: int) -> None:
        self.sources = sources
        self.seed = seed
        self.spans = tuple(spans)
        self._streams = tuple(streams)
        last = self.spans[-1]
        self.num_steps = last.first_step + last.steps
        self.num_sequences = last.first_index + last.sequences
        self.num_tokens = last.first_token + last.sequences * last.seq_len
        self._step_starts = [span.first_step for span in self.spans]
        self._index_starts = [span.first_index for span in self.spans]
        # Per source, the spans at which a mixture begins: for looking up which sequence a window is.
        self._begins: list[tuple[list[int], list[tuple[int, int]]]] = [([], []) for _ in sources]
        for number, span in enumerate(self.spans):
            if span.mixture_index == span.first_index:
                for place, (source, base) in enumerate(zip(span.source_ids, span.bases, strict=True)):
                    self._begins[source][0].append(base)
                    self._begins[source][1].append((number, place))

    @classmethod
    def create(cls, phases: Sequence[Phase], sources: Sequence[str], source_tokens: Mapping[str, int], seed: int,
               amendments: Sequence[Amendment] = (), alignment: Mapping[str, int] | None = None) -> Order:
        """Build the order.

        Args:
            source_tokens: tokens of each source's training split.
            amendments: by step, each inside the phase it names.
            alignment: of sources packed for one sequence length, that length.

        Raises InputError for no phase or no step, a bad mixture, an unknown source, a source shorter than a window or
        packed for another sequence length, or amendments that do not fit the phases.
        """
        sources = tuple(sources)
        source_ids = {name: i for i, name in enumerate(sources)}
        for phase in phases:
            _check_phase(phase, source_ids)
        plan = _Plan(sources, source_ids, source_tokens, int(seed), alignment or {})
        left = list(amendments)
        for number, phase in enumerate(phases):
            plan.add(number, phase, stretches(phase, source_tokens) if phase.batches else [])
            while left and plan.begin <= left[0].step < plan.step:
                plan.amend(number, phase, left.pop(0))
        if not plan.spans:
            raise InputError("the phases have no tokens; give at least one phase with tokens > 0")
        if left:
            raise InputError(f"the amendment from step {left[0].step} on (phase {left[0].phase!r}) does not fit the phases, "
                             f"which end at step {plan.step}: put them back as they were")
        return cls(plan.spans, sources, plan.streams, int(seed))

    def select(self, index: int) -> tuple[int, int]:
        """Global sequence index -> (position in `sources`, n): the n-th window of that source, over all phases."""
        span = self._span_at(index)
        place, n = span.mixture.select(int(index) - span.mixture_index)
        return span.source_ids[place], span.bases[place] + n

    def window(self, source: int, n: int) -> Address:
        """The n-th window that the run takes from the source at this position in `sources`; its range's phase."""
        return Address(*self._window(source, n))

    def address(self, index: int) -> Address:
        """Where the sequence with this global index lies."""
        phase = self._span_at(index).phase
        return Address(phase, *self._window(*self.select(index))[1:])

    def _window(self, source: int, n: int) -> tuple[int, str, int, int, int]:
        if not 0 <= n < self._streams[source].used:
            raise IndexError(f"source {self.sources[source]!r} gives {self.num_windows(source)} windows, not {n}")
        phase, epoch, start, length = self._streams[source].find(int(n))
        return phase, self.sources[source], epoch, start, length

    def index_of(self, source: int, n: int) -> int:
        """The inverse of `select`: the global index of the n-th window of the source."""
        if not 0 <= n < self._streams[source].used:
            raise IndexError(f"source {self.sources[source]!r} gives {self.num_windows(source)} windows, not {n}")
        bases, places = self._begins[source]
        i = bisect.bisect_right(bases, n) - 1
        number, place = places[i]
        return self.spans[number].mixture_index + self.spans[number].mixture.index_of(place, n - bases[i])

    def windows_at(self, source: int, first: int, last: int) -> list[int]:
        """Sorted n of all windows of the source that hold one of the tokens [first, last), in any epoch."""
        return self._streams[source].holding(first, last)

    def num_windows(self, source: int) -> int:
        """How many windows the whole run takes from the source at this position in `sources`."""
        return self._streams[source].used

    def tokens_left_out(self, source: int) -> int:
        """Tokens that no phase reads, because an amendment left part of a block to a phase of another sequence length."""
        return self._streams[source].left_out

    def phase_of_step(self, step: int) -> int:
        """Index of the phase that step 0 <= step < num_steps belongs to."""
        return self.span_of_step(step).phase

    def span_of_step(self, step: int) -> Span:
        """The span that step 0 <= step < num_steps belongs to."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step {step} is outside the run's {self.num_steps} steps")
        return self.spans[bisect.bisect_right(self._step_starts, step) - 1]

    def step_of(self, index: int) -> int:
        """The step that the sequence with this global index belongs to."""
        span = self._span_at(index)
        return span.first_step + (int(index) - span.first_index) // span.global_batch

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
            if not done:
                break
            before = span.first_index - span.mixture_index
            counts = zip(span.mixture.names, span.mixture.counts(before), span.mixture.counts(before + done), strict=True)
            for name, low, high in counts:
                tokens[name] += (high - low) * span.seq_len
        return tokens

    def _span_at(self, index: int) -> Span:
        if not 0 <= index < self.num_sequences:
            raise IndexError(f"sequence {index} is outside the run's {self.num_sequences} sequences")
        return self.spans[bisect.bisect_right(self._index_starts, index) - 1]

    def _span_before(self, step: int) -> tuple[Span, int]:
        step = int(step)
        if not 0 <= step <= self.num_steps:
            raise IndexError(f"step {step} is outside the run's {self.num_steps} steps")
        span = self.spans[bisect.bisect_right(self._step_starts, step) - 1]
        return span, step - span.first_step


class _Plan:
    """An order that is being made: spans, and how far each source has been given out."""

    def __init__(self, sources: tuple[str, ...], source_ids: Mapping[str, int], source_tokens: Mapping[str, int], seed: int,
                 alignment: Mapping[str, int]) -> None:
        self.sources, self.ids, self.sizes, self.alignment = sources, source_ids, source_tokens, alignment
        self.streams = [Stream(name, seed) for name in sources]
        self.spans: list[Span] = []
        self.begin = self.step = self.index = self.token = 0  # begin: first step of the phase added last

    def add(self, number: int, phase: Phase, parts: Sequence[Stretch]) -> None:
        """All stretches of a phase, one after the other."""
        self.begin = self.step
        self._append(number, phase, parts)

    def amend(self, number: int, phase: Phase, amendment: Amendment) -> None:
        """New weights from a step of the phase added last to its end."""
        if amendment.phase != phase.name:
            raise InputError(f"the amendment from step {amendment.step} on is of phase {amendment.phase!r}, and that step "
                             f"belongs to phase {phase.name!r} now: put the phases back as they were")
        rest: list[Stretch] = []
        used: dict[int, int] = {}
        while self.spans and self.spans[-1].first_step + self.spans[-1].steps > amendment.step:
            span = self.spans.pop()
            kept = max(amendment.step - span.first_step, 0)
            rest.insert(0, Stretch(span.steps - kept, span.global_batch, span.mixture))
            counts = span.mixture.counts(span.first_index + kept * span.global_batch - span.mixture_index)
            used |= {source: base + count for source, base, count in zip(span.source_ids, span.bases, counts, strict=True)}
            if kept:
                self.spans.append(dataclasses.replace(span, steps=kept))
        if self.spans:
            self._advance(self.spans[-1])
        else:
            self.step = self.index = self.token = 0
        for source, count in used.items():
            if count != self.streams[source].used:
                self.streams[source].cut(count)
        try:
            mixture = Mixture(amendment.mixture)
        except ValueError as error:
            raise InputError(f"the amendment from step {amendment.step} on: {error}") from None
        unknown = [name for name in mixture.names if name not in self.ids]
        if unknown:
            raise InputError(f"the amendment from step {amendment.step} on names the unknown source {unknown[0]!r}")
        self._append(number, phase, [Stretch(part.steps, part.global_batch, mixture) for part in rest])

    def _append(self, number: int, phase: Phase, parts: Sequence[Stretch]) -> None:
        taken = [0] * len(self.sources)
        mixture, mixture_index, ids, bases, counts = None, 0, (), (), []
        for part in parts:
            if part.mixture is not mixture:
                mixture, mixture_index = part.mixture, self.index
                ids = tuple(self.ids[name] for name in mixture.names)
                bases = tuple(self.streams[i].used + taken[i] for i in ids)
                counts = [0] * len(ids)
            self.spans.append(Span(number, phase.name, part.steps, phase.seq_len, part.global_batch, mixture, ids, bases,
                                   mixture_index, self.step, self.index, self.token))
            self._advance(self.spans[-1])
            before, counts = counts, mixture.counts(self.index - mixture_index)
            for i, low, high in zip(ids, before, counts, strict=True):
                taken[i] += high - low
        for source, count in enumerate(taken):
            if count:
                self._check_source(phase, self.sources[source])
                self.streams[source].take(number, count, phase.seq_len, self.sizes[self.sources[source]])

    def _advance(self, span: Span) -> None:
        self.step = span.first_step + span.steps
        self.index = span.first_index + span.sequences
        self.token = span.first_token + span.sequences * span.seq_len

    def _check_source(self, phase: Phase, name: str) -> None:
        tokens, packed = self.sizes[name], self.alignment.get(name, 1)
        if packed not in (1, phase.seq_len):
            raise InputError(f"source {name!r} is packed for sequences of {packed} tokens, and phases.{phase.name}.seq_len is "
                             f"{phase.seq_len}: prepare it with --seq_len={phase.seq_len}, or without --packing")
        if (tokens - 1) // phase.seq_len < 1:
            raise InputError(f"source {name!r} has {tokens} training tokens, fewer than one window of phase {phase.name!r} "
                             f"(seq_len + 1 = {phase.seq_len + 1}): add text to it, make the sequences shorter, or set "
                             f"--config.phases.{phase.name}.mixture.{name}=0")


def _check_phase(phase: Phase, source_ids: Mapping[str, int]) -> None:
    if phase.seq_len < 1:
        raise InputError(f"phases.{phase.name}.seq_len is {phase.seq_len}; it must be at least 1")
    if not phase.mixture:
        raise InputError(f"phases.{phase.name}.mixture is empty; give each source a weight, "
                         f"such as --config.phases.{phase.name}.mixture.NAME=1")
    for name in (*phase.mixture, *phase.mixture_end):
        if name not in source_ids:
            raise InputError(f"phases.{phase.name}.mixture names the unknown source {name!r}{nearest(name, source_ids)}")
