"""Changes to the data order of a running run: an append-only list, each effective from a future step.

The order is a pure function of (config, seed, amendments, index). The list rides in every checkpoint's data state and
is mirrored for people in the workdir's amendments.json; the checkpoint decides on resume.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from neo.config.schema import Config, PhaseConfig
from neo.data.mixture import Mixture
from neo.data.stretches import weights
from neo.errors import InputError

VERSION = 1
FILE = "amendments.json"
BY_CONFIG, BY_REWEIGHTING = "config", "reweight"


@dataclasses.dataclass(frozen=True)
class Amendment:
    """From `step` (its first sequence is `index`) to the end of `phase`, sources are mixed by these weights."""

    step: int
    index: int
    phase: str
    mixture: Mapping[str, float]
    reason: str = BY_CONFIG


def to_json(amendments: Iterable[Amendment]) -> list[dict[str, Any]]:
    """Plain values, for checkpoints and amendments.json."""
    return [{"version": VERSION, "kind": "mixture", **dataclasses.asdict(one), "mixture": dict(one.mixture)}
            for one in amendments]


def from_json(values: Sequence[Mapping[str, Any]]) -> tuple[Amendment, ...]:
    """The reverse of `to_json`. Raises InputError for another version or kind, or a damaged entry."""
    found = []
    for value in values:
        try:
            if value["version"] > VERSION or value["kind"] != "mixture":
                raise InputError(f"an amendment of version {value['version']} and kind {value['kind']!r}; this neo reads "
                                 f"version {VERSION} and kind 'mixture': install a newer neo")
            found.append(Amendment(int(value["step"]), int(value["index"]), str(value["phase"]),
                                   {str(name): float(weight) for name, weight in value["mixture"].items()},
                                   str(value["reason"])))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"amendments are damaged ({type(error).__name__}: {error})") from error
    return tuple(found)


def saved_sources(saved: Mapping[str, Any] | None) -> tuple[str, ...]:
    """Sources that a checkpoint's data state has relied on: a run that goes on needs them, whatever its config says now."""
    return tuple(saved.get("sources", ())) if isinstance(saved, Mapping) else ()


def resume(config: Config, saved: Mapping[str, Any] | None,
           sizes: Mapping[str, int]) -> tuple[tuple[PhaseConfig, ...], tuple[Amendment, ...]]:
    """The phases as they were before all amendments, and the amendments, of a run that goes on.

    Args:
        saved: the data state of the checkpoint; None for a new run.
        sizes: training tokens of each source.

    The mixture of a phase that has begun must be what it was (with the last amendment of a person to it, if any). With
    data.amend, another mixture of the phase that the run is in becomes one more amendment, effective from its next step.
    Raises InputError otherwise, naming the difference.
    """
    if saved is None:
        return tuple(config.phases), ()
    amendments = from_json(saved["amendments"])
    phases = list(config.phases)
    for number, then in enumerate(saved["phases"][:len(phases)]):
        now = phases[number]
        begun = dataclasses.replace(now, mixture=dict(then["mixture"]), mixture_unit=str(then["mixture_unit"]))
        before = weights(begun, begun.mixture, "mixture", sizes)
        by_hand = [one.mixture for one in amendments if one.phase == now.name and one.reason == BY_CONFIG]
        wanted = weights(now, now.mixture, "mixture", sizes)
        phases[number] = begun
        if _same(wanted, by_hand[-1] if by_hand else before):
            continue
        ends = sum(phase.steps for phase in phases[:number + 1])
        if saved["next_step"] >= ends or now.mixture_end:
            raise InputError(f"phases.{now.name}.mixture was {_shown(by_hand[-1] if by_hand else then['mixture'])} and is "
                             f"{_shown(now.mixture)} now, and that phase is "
                             f"{'over' if saved['next_step'] >= ends else 'one with a ramp'}: put it back")
        if not config.data.amend:
            raise InputError(f"phases.{now.name}.mixture was {_shown(by_hand[-1] if by_hand else then['mixture'])} and is "
                             f"{_shown(now.mixture)} now: put it back, or let the new weights act from step "
                             f"{saved['next_step']} on with --config.data.amend=True")
        amendments += (Amendment(int(saved["next_step"]), int(saved["next_index"]), now.name, wanted),)
    return tuple(phases), amendments


def _same(one: Mapping[str, float], other: Mapping[str, float]) -> bool:
    a, b = Mixture(one), Mixture(other)
    return (a.names, a.weights) == (b.names, b.weights)


def _shown(mixture: Mapping[str, float]) -> str:
    items = [f"{name}={weight:.4g}" for name, weight in mixture.items()]
    return "{" + ", ".join(items[:8]) + (f", and {len(items) - 8} more" if len(items) > 8 else "") + "}"
