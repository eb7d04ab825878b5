"""Which mesh, micro-batch and remat policy: candidates, a memory bound, a rough order, and the compiler for the best few."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from neo.config import Config, PhaseConfig
from neo.config.schema import REMAT_POLICIES
from neo.errors import InputError
from neo.parallel.mesh import AXES, follows_links
from neo.plan.compile import phase_of
from neo.plan.plan import Cost, MemoryUse, Plan
from neo.plan.planner import Engine, Say, Setting, plan, setting
from neo.plan.report import GIB, mesh_text, name_of, order, passes_text
from neo.plan.scaling import resized
from neo.train import memory

if TYPE_CHECKING:
    from neo.plan.topology import Topology

COMPILED = 8       # candidates that are compiled unless told otherwise (ours)
TENSOR = (1, 2, 4, 8)      # ours: beyond 8 the activations' traffic is never worth it at these widths
CONTEXT = (1, 2, 4, 8)
REPLICAS = (1, 2, 4, 8)    # times the number of slices
# Ours: of one mesh and policy only the largest micro-batches that fit are worth a compile; smaller ones gather weights oftener.
MICRO = 2
WORKED_OUT = 24    # plans shown where nothing is compiled (ours)
LARGER = (2, 4, 8, 16, 32)   # times as many devices, where nothing fits (ours)
ATTEMPTS = 3       # compiled to prove the nearest plan that fits (ours)


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A way to run a config on a topology, by the bound and the rough price alone. Bytes and seconds."""

    overrides: tuple[str, ...]     # to the config as it was given
    setting: Setting
    memory: MemoryUse
    rough: Cost

    @property
    def text(self) -> str:
        """`fsdp=64, batch 2 x 8, minimal`, as `report.name_of` writes a plan."""
        one = self.setting
        return f"{mesh_text(one.sizes)}, batch {passes_text(one.micro_batch, one.accumulation)}, {one.config.train.remat}"


@dataclasses.dataclass(frozen=True)
class Found:
    """Of a search: plans that were compiled (or worked out, on GPUs), best first, and how many were not."""

    plans: tuple[Plan, ...]
    dropped: int                # ruled out by the memory bound
    left: int                   # fit by the bound, but the compiler was spared
    impossible: tuple[str, ...] = ()   # what compilers and checks said of candidates that cannot be
    final: Plan | None = None          # the best with all compiler flags, where the others were compiled with fewer

    @property
    def considered(self) -> int:
        """Candidates in all."""
        return len(self.plans) + len(self.impossible) + self.dropped + self.left

    @property
    def winner(self) -> Plan | None:
        """The best plan that fits."""
        return self.final or next((one for one in self.plans if one.fits), None)


def meshes(config: Config, topology: Topology) -> Iterator[dict[str, int]]:
    """Mesh sizes worth a thought on these devices: products that model, batch and links allow. The config's own comes first."""
    own = setting_sizes(config, topology)
    seen = []
    if own is not None:
        seen.append(own)
        yield own
    for replica, context, tensor in itertools.product(REPLICAS, CONTEXT, TENSOR):
        replica *= topology.slices
        rest = replica * context * tensor * config.mesh.expert if config.mesh.expert > 0 else replica * context * tensor
        if topology.devices % rest:
            continue
        sizes = dict(replica=replica, fsdp=topology.devices // rest, expert=max(1, config.mesh.expert), context=context,
                     tensor=tensor)
        if sizes not in seen and possible(sizes, topology):
            seen.append(sizes)
            yield sizes


def setting_sizes(config: Config, topology: Topology) -> dict[str, int] | None:
    """The config's own mesh on these devices; None where it is impossible."""
    try:
        return setting(config, topology, micro_batch=1).sizes
    except InputError:
        return None


def possible(sizes: dict[str, int], topology: Topology) -> bool:
    """Whether `neo.parallel.mesh` would make this mesh there: what it refuses is not worth a compile."""
    if topology.platform == "gpu":
        return topology.shape[0] % sizes["tensor"] == 0   # inside a node
    if topology.kind == "v5e":   # where JAX splits sides
        return sizes["replica"] % topology.slices == 0
    return follows_links([sizes[axis] for axis in AXES], (*topology.shape, topology.chip.devices), topology.slices)


def candidates(config: Config, topology: Topology, engine: Engine, phase: str = "",
               policies: Sequence[str] = REMAT_POLICIES) -> tuple[list[Candidate], int]:
    """Those that fit by the memory bound, the quickest by the rough price first; and how many do not fit."""
    one = phase_of(config, phase)
    kept: list[Candidate] = []
    dropped = 0
    for sizes, remat in itertools.product(meshes(config, topology), policies):
        fitting, too_big = _micro_batches(config, topology, one, sizes, remat)
        dropped += too_big
        kept += [Candidate(overrides_of(config, sizes, fits.micro_batch, remat), fits, use, engine.rough(fits))
                 for fits, use in fitting]
    return sorted(kept, key=lambda one: (one.rough.best, one.rough.no_overlap, one.memory.peak)), dropped


def _micro_batches(config: Config, topology: Topology, phase: PhaseConfig, sizes: dict[str, int],
                   remat: str) -> tuple[list[tuple[Setting, MemoryUse]], int]:
    """Of one mesh and policy: the largest micro-batches that fit by the bound, and how many do not."""
    try:
        first = setting(changed(config, sizes, 1, remat), topology, phase.name)
    except InputError:
        return [], 0
    need = memory.estimate(first.decoder, phase, sizes, 1)
    held = need.params + need.optimizer
    fitting: list[tuple[Setting, MemoryUse]] = []
    too_big = 0
    for micro in (n for n in range(first.local_batch, 0, -1) if first.local_batch % n == 0):
        # As the estimate itself grows with the micro-batch (tested): calling it for each would trace the model each time.
        rest = need.gathered + micro * (need.activations + need.logits) + need.params * (1 if micro == first.local_batch else 2)
        if held + rest > first.capacity:
            too_big += 1
        elif len(fitting) < MICRO:
            chosen = dataclasses.replace(first, config=changed(config, sizes, micro, remat), micro_batch=micro)
            fitting.append((chosen, MemoryUse(held, rest, held + rest, first.capacity, "estimate")))
    return fitting, too_big


def changed(config: Config, sizes: dict[str, int], micro_batch: int, remat: str) -> Config:
    """The config with another mesh, micro-batch and policy."""
    return dataclasses.replace(config, mesh=dataclasses.replace(config.mesh, **sizes),
                               train=dataclasses.replace(config.train, micro_batch=micro_batch, remat=remat))


def overrides_of(config: Config, sizes: dict[str, int], micro_batch: int, remat: str) -> tuple[str, ...]:
    """`--config.*` from the config as given to a candidate; an axis that the config fills by itself is left to it."""
    texts = []
    for axis, size in sizes.items():
        asked = getattr(config.mesh, axis)
        if asked != size and asked != -1:
            texts.append(f"--config.mesh.{axis}={size}")
    texts.append(f"--config.train.micro_batch={micro_batch}")
    if remat != config.train.remat:
        texts.append(f"--config.train.remat={remat}")
    return tuple(texts)


def search(config: Config, topology: Topology, engine: Engine, *, phase: str = "", given: Sequence[str] = (),
           most: int = COMPILED, final: Engine | None = None, say: Say = lambda text: None) -> Found:
    """Compile the most promising candidates and rank what fits. The config as it is comes first, where it can be at all.

    Args:
        phase: as `planner.plan`.
        given: overrides that led to `config`: they stand before a candidate's own.
        most: how many are compiled. Where nothing is compiled (GPUs), `WORKED_OUT`.
        final: compiles the best once more, where `engine` left out flags that make compiling slow; if that does not fit, the
            next.
        say: hears of each candidate.
    """
    ranked, dropped = candidates(config, topology, engine, phase)
    say(f"{len(ranked)} candidates fit by the memory bound, {dropped} do not")
    ranked = _with_own(ranked, config, topology, engine, phase)
    chosen = _spread(ranked, most) if engine.compile else ranked[:WORKED_OUT]
    plans, impossible = [], []
    for number, one in enumerate(chosen, 1):
        if engine.compile is not None:
            say(f"candidate {number} of {len(chosen)}: {one.text} (rough {1e3 * one.rough.best:.0f} ms, "
                f"{one.memory.peak / GIB:.1f} GiB)")
        try:
            made = plan(one.setting.config, topology, engine, phase=one.setting.phase.name, overrides=(*given, *one.overrides))
        except InputError as error:
            say(f"candidate {number} is impossible: {error}")
            impossible.append(f"{one.text}: {error}")
            continue
        plans.append(made)
        if engine.compile is not None:
            say(f"candidate {number}: {_verdict(made)}")
    plans.sort(key=order)
    found = Found(tuple(plans), dropped, len(ranked) - len(chosen), tuple(impossible))
    if final is None or final.flags == engine.flags:
        return found
    settings = {one.overrides: one.setting for one in chosen}
    for one in [one for one in plans if one.fits][:ATTEMPTS]:
        say(f"the best again, with all compiler flags: {name_of(one)}")
        own = settings[one.overrides[len(given):]]
        made = plan(own.config, topology, final, phase=own.phase.name, overrides=one.overrides)
        say(_verdict(made))
        if made.fits:
            return dataclasses.replace(found, final=made)
    return dataclasses.replace(found, plans=tuple(one for one in plans if not one.fits))


def _with_own(ranked: list[Candidate], config: Config, topology: Topology, engine: Engine, phase: str) -> list[Candidate]:
    """The candidate that is the config as given moves to the front."""
    try:
        own = setting(config, topology, phase)
    except InputError:
        return ranked
    same = [one for one in ranked if (one.setting.sizes, one.setting.micro_batch, one.setting.config.train.remat)
            == (own.sizes, own.micro_batch, config.train.remat)]
    if not same and own.estimate().fits:   # a smaller micro-batch than any of the candidates
        same = [Candidate((), own, own.estimate(), engine.rough(own))]
    return same + [one for one in ranked if one not in same]


def _spread(ranked: list[Candidate], most: int) -> list[Candidate]:
    """The first `most`, but no mesh and no policy more than a third of the places while others wait: the order is rough."""
    share = math.ceil(most / 3)
    taken: list[Candidate] = []
    for one in ranked:
        mesh, remat = one.setting.sizes, one.setting.config.train.remat
        if len(taken) < most and sum(other.setting.sizes == mesh for other in taken) < share \
                and sum(other.setting.config.train.remat == remat for other in taken) < share:
            taken.append(one)
    taken += [one for one in ranked if one not in taken][:most - len(taken)]
    return [one for one in ranked if one in taken]


def _verdict(made: Plan) -> str:
    memory_text = f"{made.memory.peak / GIB:.1f} of {made.memory.capacity / GIB:.1f} GiB"
    if not made.fits or made.cost is None:
        return f"does not fit, {memory_text}"
    return f"{1e3 * made.cost.best:.0f} ms, MFU {100 * made.mfu(made.cost.best):.1f} %, {memory_text}"


def nearest_fit(config: Config, topology: Topology, engine: Engine, misfit: Plan, *, given: Sequence[str] = (),
                say: Say = lambda text: None) -> Plan | None:
    """The plan that fits and differs least from one that does not: smaller micro-batch, more recomputation, another mesh.

    At most `ATTEMPTS` are compiled, in the order of their distance; None when none of them fits either.
    """
    own = setting(config, topology, misfit.phase)
    ranked, _ = candidates(config, topology, engine, misfit.phase)
    # What the compiler needed more than the bound said, it will need again.
    beyond = max(1.0, misfit.memory.peak / max(own.estimate().peak, 1)) if misfit.cost is None else 1.0
    fitting = sorted((one for one in ranked if one.memory.peak * beyond <= one.memory.capacity),
                     key=lambda one: (_distance(one, own), one.rough.best))
    for one in fitting[:ATTEMPTS]:
        say(f"the nearest that may fit: {one.text}")
        with contextlib.suppress(InputError):
            made = plan(one.setting.config, topology, engine, phase=misfit.phase, overrides=(*given, *one.overrides))
            if made.fits:
                return made
    return None


def _distance(one: Candidate, own: Setting) -> float:
    policies = REMAT_POLICIES.index
    return (abs(math.log2(own.micro_batch / one.setting.micro_batch))
            + 1.5 * abs(policies(one.setting.config.train.remat) - policies(own.config.train.remat))
            + 4 * (one.setting.sizes != own.sizes))


def refusal(config: Config, topology: Topology, engine: Engine, misfit: Plan | None, near: Plan | None, phase: str = "") -> str:
    """One line for a config that does not fit as it is: by how much, and the nearest plan that does.

    Args:
        misfit: the plan as asked for; None after a search in which nothing fitted.
        near: of `nearest_fit`. Without one, larger topologies are tried, by the memory bound alone.
    """
    why = f"nothing that was tried fits on {topology.name}"
    if misfit is not None:
        too_much = -misfit.memory.spare / GIB
        reason = misfit.refused if misfit.refused else f"{too_much:.2f} GiB too much for {misfit.memory.capacity / GIB:.2f}"
        why = f"{config.name} does not fit on {topology.name} as it is: {reason}"
    if near is not None:
        own = () if misfit is None else misfit.overrides
        return (f"{why}; the nearest plan that does: {' '.join(one for one in near.overrides if one not in own)} "
                f"({near.memory.peak / GIB:.2f} of {near.memory.capacity / GIB:.2f} GiB"
                f"{f', {1e3 * near.cost.best:.0f} ms a step' if near.cost else ''})")
    for factor in LARGER:
        bigger = resized(topology, topology.devices * factor)
        ranked = candidates(config, bigger, engine, phase)[0] if bigger is not None else []
        if bigger is not None and ranked:
            fits = min(ranked, key=lambda one: one.memory.peak)
            return (f"{why}; by the memory bound it fits on --topology={bigger.name} with {' '.join(fits.overrides)} "
                    f"({fits.memory.peak / GIB:.2f} GiB)")
    return f"{why}, nor on {LARGER[-1]} times as many devices by the memory bound; a smaller model or batch is needed"
