"""Predicted time of a compiled step: the compiler's own estimates, the kernels' cycles, and bytes over links, times loop turns.

Not modelled: latency of collectives, contention for HBM between core and links, clocks that throttle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from neo.errors import InputError
from neo.plan.chips import Chip
from neo.plan.collectives import Groups, Torus, axes_of
from neo.plan.hlo import KernelCall, Program, parse
from neo.plan.plan import Collective, Cost, KernelUse, OpGroup
from neo.plan.replay import Pricing, Run


def cost(hlo: str | Program, chip: Chip, kernel_cycles: Callable[[KernelCall], float], *,
         mesh: Mapping[str, int] | None = None, network_of: Callable[[Groups], str] | None = None,
         torus: Torus = ()) -> Cost:
    """What a compiled step costs on one device.

    Args:
        hlo: `compiled.as_text()` of a scheduled program, or what `hlo.parse` made of it.
        kernel_cycles: clock cycles that one run of a Pallas kernel takes on a device; LookupError or None: no price.
        mesh: axis -> size, to name the axes of collectives; without it `Collective.axes` is empty.
        network_of: "ici" or "dcn" for the devices of a collective; default all "ici". Programs of several TPU slices need
            none: what goes between slices stands in them as such.
        torus: sides of a slice; groups get the links along those they span. Default: all links for all.

    Raises InputError for a program that is not scheduled, a loop without a constant number of turns and a custom call
    without a price.
    """
    program = parse(hlo) if isinstance(hlo, str) else hlo
    if not program.scheduled:
        raise InputError("the HLO is not scheduled (no is_scheduled=true in its first line): take it from a compiled program")
    pricing = Pricing(program, chip, kernel_cycles, network_of, torus)
    run = pricing.price(program.entry, 1)
    compute, communication = run.matmul + run.other + run.kernels, sum(run.moved.values())
    return Cost(
        full_overlap=max([compute, *run.moved.values()]), scheduled=run.elapsed, no_overlap=compute + communication,
        matmul=run.matmul, other=run.other, kernels=run.kernels, communication=communication, matmul_flops=run.flops,
        kernel_uses=_kernel_uses(run, chip), collectives=_collectives(run, mesh, pricing.devices),
        operations=_operations(run), loops=tuple(run.loops), notes=_notes(run))


def _collectives(run: Run, mesh: Mapping[str, int] | None, devices: int) -> tuple[Collective, ...]:
    sums: dict[tuple, list[float]] = {}
    for moved, mode, loop, times in run.transfers:
        if moved.network == "dcn" and mesh and len(moved.groups.members) == 1 and devices < _size(mesh):
            axes = _between(mesh, devices)
        else:
            axes = axes_of(moved.groups, mesh, devices) if mesh and moved.groups.size > 1 else ()
        key = (moved.kind, mode, moved.groups.size, loop, moved.dtype, axes, moved.network)
        entry = sums.setdefault(key, [0, 0.0, 0.0, 0.0])
        for i, value in enumerate((1, moved.bytes, moved.wire_bytes, moved.seconds)):
            entry[i] += times * value
    rows = [Collective(kind, mode, group, loop, dtype, int(times), size, wire, seconds, axes, network)
            for (kind, mode, group, loop, dtype, axes, network), (times, size, wire, seconds) in sums.items()]
    return tuple(sorted(rows, key=lambda row: -row.seconds))


def _size(mesh: Mapping[str, int]) -> int:
    size = 1
    for side in mesh.values():
        size *= side
    return size


def _between(mesh: Mapping[str, int], devices: int) -> tuple[str, ...]:
    """The outer axes that lie between slices of `devices`."""
    names, outside = [], _size(mesh) // devices
    for name, side in mesh.items():
        if outside == 1:
            break
        if side > 1:
            names.append(name)
            outside //= min(side, outside)
    return tuple(names)


def _kernel_uses(run: Run, chip: Chip) -> tuple[KernelUse, ...]:
    uses: dict[tuple, list[float]] = {}
    for call, times, cycles in run.calls:
        entry = uses.setdefault((call.name, call.operands), [0, 0.0])
        entry[0] += times
        entry[1] += times * cycles
    return tuple(sorted((KernelUse(name, int(times), cycles, cycles / chip.clock)
                         for (name, _), (times, cycles) in uses.items()), key=lambda use: -use.cycles))


def _operations(run: Run) -> tuple[OpGroup, ...]:
    groups: dict[str, list[float]] = {}
    for label, times, seconds, flops in run.operations:
        entry = groups.setdefault(label, [0, 0.0, 0.0])
        entry[0] += times
        entry[1] += times * seconds
        entry[2] += times * flops
    return tuple(sorted((OpGroup(label, int(times), seconds, flops) for label, (times, seconds, flops) in groups.items()),
                        key=lambda group: -group.seconds))


def _notes(run: Run) -> tuple[str, ...]:
    if not run.missing:
        return ()
    listed = ", ".join(f"{name} x{times}" for name, times in run.missing.most_common(8))
    more = len(run.missing) - 8
    return (f"counted as nothing, the compiler gives no estimate: {listed}" + (f" and {more} more kinds" if more > 0 else ""),)
