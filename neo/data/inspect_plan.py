"""What a run reads of each source, phase by phase: worked out from the data order, without a token of text."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from neo.config.mixes import FAMILY, family
from neo.config.schema import Config
from neo.data.mixture import SCALE
from neo.data.order import Order, Span
from neo.data.planning import Size, epoch_limit, over_limit, store_path

MANY_SOURCES = 24  # ours: from here on sources are shown by family where they have families


@dataclasses.dataclass(frozen=True)
class Use:
    """What a phase takes of a source: target tokens; how many times over that is (`epochs`); and how many of the tokens
    the run has read before (`repeats`). The latter two are None where nobody knows the source's size."""

    tokens: int
    epochs: float | None
    repeats: int | None


@dataclasses.dataclass(frozen=True)
class PhasePlan:
    """One phase. `batches` are (steps, global batch), more than one where the batch ramps."""

    name: str
    first_step: int
    steps: int
    first_token: int
    tokens: int
    seq_len: int
    batches: tuple[tuple[int, int], ...]
    rope_base: float
    sources: Mapping[str, Use]


@dataclasses.dataclass(frozen=True)
class SourcePlan:
    """A source over the whole run. `size` is None where unknown or without an end (synthetic), `limit` where there is none;
    `origin` as in planning.Size."""

    tokens: int
    size: int | None
    origin: str
    epochs: float | None
    repeats: int | None
    limit: float | None


@dataclasses.dataclass(frozen=True)
class Area:
    """A stretch of the run with the same shares all along: what the picture is drawn from."""

    first_token: int
    tokens: int
    shares: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Plan:
    """A whole run, of which `steps_done` are done.

    `over_limit`: source -> epochs of those that are read more often than allowed. `amended`: (step, phase, weights) of
    each amendment; it acts from that step on, counted from 1.
    """

    name: str
    store: str
    seed: int
    tokens: int
    steps: int
    sequences: int
    phases: tuple[PhasePlan, ...]
    sources: Mapping[str, SourcePlan]
    areas: tuple[Area, ...]
    over_limit: Mapping[str, float]
    amended: tuple[tuple[int, str, Mapping[str, float]], ...]
    steps_done: int
    tokens_done: int


@dataclasses.dataclass(frozen=True)
class Group:
    """Sources that are shown as one. `label` is the family's name, or the source's."""

    label: str
    members: tuple[str, ...]
    tokens: int


def make_plan(config: Config, order: Order, sizes: Mapping[str, Size], steps_done: int = 0) -> Plan:
    """The plan of a run, from the order and the sizes that `planned_order` gives."""
    known = {name: size.tokens for name, size in sizes.items() if size.origin in ("store", "planned")}
    read = dict.fromkeys(order.sources, 0)
    phases, areas = [], []
    for number, phase in enumerate(config.phases):
        spans = [span for span in order.spans if span.phase == number]
        if not spans:  # no step of it is left after the phases were scaled down
            continue
        taken: dict[str, int] = {}
        for span in spans:
            here = _tokens_of(span)
            areas.append(Area(span.first_token, span.sequences * span.seq_len,
                              {name: tokens / (span.sequences * span.seq_len) for name, tokens in here.items()}))
            for name, tokens in here.items():
                taken[name] = taken.get(name, 0) + tokens
        uses = {}
        for name, tokens in taken.items():
            before, size = read[name], known.get(name)
            read[name] += tokens
            uses[name] = Use(tokens, None if size is None else tokens / size,
                             None if size is None else max(read[name] - size, 0) - max(before - size, 0))
        phases.append(PhasePlan(phase.name, spans[0].first_step, sum(span.steps for span in spans), spans[0].first_token,
                                sum(taken.values()), phase.seq_len, _batches(spans),
                                phase.rope_base or config.model.rope_base, uses))
    sources = {}
    for name, tokens in read.items():
        size, limit = known.get(name), epoch_limit(config, name)
        sources[name] = SourcePlan(tokens, size, sizes[name].origin, None if size is None else tokens / size,
                                   None if size is None else max(tokens - size, 0), limit if limit < float("inf") else None)
    return Plan(config.name, store_path(config), config.data.seed, order.num_tokens, order.num_steps, order.num_sequences,
                tuple(phases), sources, tuple(areas), over_limit(config, order, known), tuple(_amended(config, order)),
                steps_done, order.tokens_before(steps_done))


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, phases and sources in full."""
    tree = dataclasses.asdict(plan)
    del tree["areas"]  # the picture's; the phases say the same
    for phase in tree["phases"]:
        for use in phase["sources"].values():
            use["share"] = use["tokens"] / phase["tokens"]
    return tree


def groups(tokens: Mapping[str, int], most: int, *, fold: bool = True) -> tuple[list[Group], list[Group]]:
    """Sources by tokens, the largest first: (those to show, at most `most`; the rest).

    With `fold`, many sources are shown by family (`code--python` and `code--java` as `code`).
    """
    members: dict[str, list[str]] = {}
    for name in tokens:
        members.setdefault(family(name) if fold and len(tokens) > MANY_SOURCES else name, []).append(name)
    found = [Group(label, tuple(one), sum(tokens[name] for name in one)) for label, one in members.items()]
    found.sort(key=lambda group: (-group.tokens, group.label))
    # One left over would take the line that says so.
    shown = len(found) if len(found) <= most + 1 else most
    return found[:shown], found[shown:]


def epochs_of(group: Sequence[str], plan: Plan) -> float | None:
    """Tokens read of these sources over their size; None where a size is unknown."""
    sizes = [plan.sources[name].size for name in group]
    if None in sizes:
        return None
    return sum(plan.sources[name].tokens for name in group) / sum(sizes)


def label_of(group: Group) -> str:
    """How a group is named for people: families say how many they are."""
    return group.members[0] if len(group.members) == 1 else f"{group.label}{FAMILY}* ({len(group.members)})"


def _tokens_of(span: Span) -> dict[str, int]:
    """Target tokens of a span by source; a mixture may have begun to count before it."""
    before = span.first_index - span.mixture_index
    counts = zip(span.mixture.names, span.mixture.counts(before), span.mixture.counts(before + span.sequences), strict=True)
    return {name: (high - low) * span.seq_len for name, low, high in counts if high > low}


def _amended(config: Config, order: Order) -> Iterator[tuple[int, str, dict[str, float]]]:
    """Where the weights of a phase without a ramp change: only an amendment does that."""
    for before, span in itertools.pairwise(order.spans):
        if before.phase == span.phase and before.mixture is not span.mixture and not config.phases[span.phase].mixture_end:
            yield span.first_step + 1, span.name, {name: weight / SCALE for name, weight in zip(
                span.mixture.names, span.mixture.weights, strict=True)}


def _batches(spans: Sequence[Span]) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for span in spans:
        if found and found[-1][1] == span.global_batch:
            found[-1] = (found[-1][0] + span.steps, span.global_batch)
        else:
            found.append((span.steps, span.global_batch))
    return tuple(found)
