"""A plan as text and as JSON. Memory in GiB (as HBM is sold), time in ms, rates in GB/s of 1e9 bytes."""

from __future__ import annotations

import dataclasses
import itertools
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from neo.plan.plan import Collective, Cost, MemoryUse, Plan

GIB = 2 ** 30
DEAREST = 8       # operations shown (ours)
LEAST = 5e-4      # of the step: shorter collectives are added up in one line (ours)
# Ours: writing may take this share of the time between two checkpoints and still be done well before the next one.
WRITING = 0.5
FORMAT = 1        # of plan.json


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as plain values, with what is derived from it; seconds, bytes and FLOPs."""
    found: dict[str, Any] = {"format": "neo.plan", "version": FORMAT, **dataclasses.asdict(plan),
                             "name": name_of(plan), "fits": plan.fits, "memory_spare": plan.memory.spare}
    if plan.cost is not None:
        cost = plan.cost
        found |= {"step_seconds": cost.best, "days": plan.days, "device_hours": plan.device_hours,
                  "tokens_per_second": plan.tokens_per_step / cost.best,
                  "mfu": {"no_overlap": plan.mfu(cost.no_overlap), "full_overlap": plan.mfu(cost.full_overlap),
                          "scheduled": None if cost.scheduled is None else plan.mfu(cost.scheduled),
                          "all_pairs": plan.flops_full / plan.peak_flops / cost.best}}
    return found


def name_of(plan: Plan) -> str:
    """What distinguishes the plan from others of one config on one topology: `fsdp=64, batch 2 x 8, minimal`."""
    return f"{mesh_text(plan.mesh)}, batch {passes_text(plan.micro_batch, plan.accumulation)}, {plan.remat}"


def passes_text(micro_batch: int, accumulation: int) -> str:
    """Sequences of a device: `2 x 8` where a step takes eight passes of two."""
    return f"{micro_batch} x {accumulation}" if accumulation > 1 else str(micro_batch)


def mesh_text(mesh: dict[str, int]) -> str:
    """`fsdp=16 tensor=4`; axes of size 1 are left out."""
    return " ".join(f"{axis}={size}" for axis, size in mesh.items() if size > 1) or "one device"


def report(plan: Plan) -> str:
    """All that is known of one plan."""
    parts = [_head(plan), _memory(plan)]
    if plan.cost is not None:
        parts += [_times(plan, plan.cost), _collectives(plan.cost), _kernels(plan.cost), _operations(plan.cost)]
        parts += [_run(plan)]
    parts += [_compiler(plan)]
    return "\n\n".join(part for part in parts if part)


def ranking(plans: Sequence[Plan], dropped: int = 0, left: int = 0) -> str:
    """Plans of a search, best first, those that do not fit last.

    Args:
        dropped: candidates that the memory bound ruled out before anything was compiled.
        left: those that may fit and were not compiled.
    """
    rows = [("", "mesh", "batch", "remat", "peak GiB", "step ms", "full .. no overlap", "MFU %", "tokens/s", "")]
    for number, plan in enumerate(sorted(plans, key=order), 1):
        verdict = "" if plan.fits else _misfit(plan)
        time = ("-",) * 4 if plan.cost is None else (
            f"{1e3 * plan.cost.best:.1f}", f"{1e3 * plan.cost.full_overlap:.1f} .. {1e3 * plan.cost.no_overlap:.1f}",
            f"{100 * plan.mfu(plan.cost.best):.1f}", f"{plan.tokens_per_step / plan.cost.best:,.0f}")
        peak = f"{plan.memory.peak / GIB:.2f}" if plan.memory.peak else "-"
        rows.append((f"{number}.", mesh_text(plan.mesh), passes_text(plan.micro_batch, plan.accumulation), plan.remat,
                     peak, *time, verdict))
    table = aligned(rows, left=(1, 3, 9))
    note = "batch: sequences in a device at once x passes of a step"
    if dropped:
        note += f"; {dropped} more do not fit by the memory bound"
    if left:
        note += f"; {left} more may fit, they come after these by the rough price"
    return f"{table}\n{textwrap.fill(note, 128, initial_indent='  ', subsequent_indent='  ')}"


def order(plan: Plan) -> tuple:
    """Best first: what fits, by its step time, then by the time without overlap; what does not by its memory."""
    times = (plan.cost.best, plan.cost.no_overlap) if plan.cost else (float("inf"), 0.0)
    return (not plan.fits, *times, plan.memory.peak)


def _misfit(plan: Plan) -> str:
    return textwrap.shorten(plan.refused, 60) if plan.refused else f"too big by {-plan.memory.spare / GIB:.2f} GiB"


def _head(plan: Plan) -> str:
    local = plan.micro_batch * plan.accumulation
    whole = "one pass" if plan.accumulation == 1 else f"{plan.accumulation} passes of {plan.micro_batch}"
    lines = [f"{plan.config}, phase {plan.phase}, on {plan.topology}: {plan.devices} x {plan.chip}, {mesh_text(plan.mesh)}",
             *(f"  {note}" for note in plan.facts.get("notes", ())), ""]
    lines += _columns([
        ("model", f"{plan.parameters:,} parameters; {plan.run_tokens:,} tokens in {plan.run_steps:,} steps"),
        ("step", f"{plan.global_batch} sequences of {plan.seq_len:,} tokens = {plan.tokens_per_step:,} tokens; "
                 f"{local} a device in {whole}"),
        ("", f"remat {plan.remat}, attention {plan.attention}"),
        ("FLOPs", f"{plan.flops_causal:.4g} a step and device (visible pairs of attention; {plan.flops_full:.4g} with all), "
                  f"peak {plan.peak_flops / 1e12:.4g} TFLOP/s"),
    ])
    return "\n".join(lines)


def _memory(plan: Plan) -> str:
    use = plan.memory
    if plan.refused and not use.peak:
        return f"memory       does not fit: {plan.refused}"
    spare = f"fits, {use.spare / GIB:.2f} GiB spare" if use.fits else f"does NOT fit, {-use.spare / GIB:.2f} GiB too much"
    source = "the compiler's own account" if use.source == "compiler" else "an estimate, nothing was compiled"
    lines = _columns([("memory", f"{gib(use)} per device: {spare}"), ("", source)])
    if plan.refused:
        lines += _columns([("", f"refused: {plan.refused}")])
    return "\n".join(lines)


def gib(use: MemoryUse) -> str:
    """`arguments 1.30 + temporaries 23.10, peak 24.40 of 95.00 GiB`."""
    return (f"arguments {use.arguments / GIB:.2f}, temporaries {use.temporaries / GIB:.2f}, "
            f"peak {use.peak / GIB:.2f} of {use.capacity / GIB:.2f} GiB")


def _times(plan: Plan, cost: Cost) -> str:
    efficiency = cost.matmul_flops / plan.peak_flops / cost.matmul if cost.matmul and cost.matmul_flops else 0
    exposed = max(0.0, cost.best - cost.compute)
    rows = [("time of a step", "ms", "of step", "")]
    for name, seconds, note in (
            ("matrix products", cost.matmul, f"{100 * efficiency:.0f} % of peak" if efficiency else ""),
            ("other operations", cost.other, ""),
            ("kernels", cost.kernels, ", ".join(dict.fromkeys(use.name for use in cost.kernel_uses))),
            ("communication", cost.communication, f"{1e3 * exposed:.1f} ms of it not hidden")):
        rows.append((f"  {name}", f"{1e3 * seconds:.1f}", f"{100 * seconds / cost.best:.0f} %", note))
    totals = [("no overlap", cost.no_overlap, "the sum"),
              ("as scheduled", cost.scheduled, "replay of the compiled schedule"),
              ("full overlap", cost.full_overlap, "the longer of computation and communication")]
    for name, total, note in totals:
        if total is not None:
            rows.append((f"= {name}", f"{1e3 * total:.1f}", "", f"MFU {100 * plan.mfu(total):.1f} %; {note}"))
    all_pairs = plan.flops_full / plan.peak_flops / cost.best
    line = (f"MFU {100 * plan.mfu(cost.no_overlap):.1f} .. {100 * plan.mfu(cost.full_overlap):.1f} % predicted "
            f"({100 * all_pairs:.1f} % where all pairs of attention are counted), "
            f"{plan.tokens_per_step / cost.best:,.0f} tokens/s")
    return f"{aligned(rows, left=(0, 3), indent='')}\n{line}"


def _collectives(cost: Cost) -> str:
    if not cost.collectives:
        return ""
    rows = [("collectives", "axes", "of", "loop", "runs", "dtype", "whole GiB", "received GiB", "ms", "how")]
    dear = sorted(cost.collectives, key=lambda one: -one.seconds)
    shown = [one for one in dear if one.seconds >= LEAST * cost.best] or dear[:DEAREST]
    for one in shown:
        rows.append((f"  {one.kind}", " ".join(one.axes) or "-", str(one.group), one.loop, str(one.times), one.dtype,
                     f"{one.bytes / GIB:.3f}", f"{one.wire_bytes / GIB:.3f}", f"{1e3 * one.seconds:.2f}", _how(one)))
    rest = dear[len(shown):]
    if rest:
        rows.append((f"  {len(rest)} smaller", "", "", "", str(sum(one.times for one in rest)), "",
                     f"{sum(one.bytes for one in rest) / GIB:.3f}", f"{sum(one.wire_bytes for one in rest) / GIB:.3f}",
                     f"{1e3 * sum(one.seconds for one in rest):.2f}", _modes(rest)))
    return aligned(rows, left=(0, 1, 3, 5, 9), indent="")


def _how(one: Collective) -> str:
    mode = "stops the core" if one.mode == "sync" else f"beside computation ({one.mode})"
    return mode if one.network == "ici" else f"{mode}, over {one.network.upper()}"


def _modes(some: Iterable[Collective]) -> str:
    counted = {mode: sum(one.times for one in group)
               for mode, group in itertools.groupby(sorted(some, key=lambda one: one.mode), key=lambda one: one.mode)}
    return ", ".join(f"{times} {mode}" for mode, times in counted.items())


def _kernels(cost: Cost) -> str:
    if not cost.kernel_uses:
        return ""
    rows = [("kernels", "runs", "cycles each", "ms", "")]
    for use in sorted(cost.kernel_uses, key=lambda use: -use.seconds):
        each = f"{use.cycles / max(use.times, 1):,.0f}" if use.cycles else "-"
        rows.append((f"  {use.name}", str(use.times), each, f"{1e3 * use.seconds:.1f}", use.note))
    return aligned(rows, left=(0, 4), indent="")


def _operations(cost: Cost) -> str:
    if not cost.operations:
        return ""
    rows = [("dearest operations", "runs", "ms", "of step")]
    for group in sorted(cost.operations, key=lambda group: -group.seconds)[:DEAREST]:
        share = 100 * group.seconds / cost.best
        rows.append((f"  {group.name[-76:]}", str(group.times), f"{1e3 * group.seconds:.1f}", f"{share:.1f} %"))
    return aligned(rows, left=(0,), indent="")


def _run(plan: Plan) -> str:
    assert plan.cost is not None
    best, every = plan.cost.best, plan.facts.get("checkpoint_every_steps", 0)
    steps = plan.run_tokens / plan.tokens_per_step
    low, high = (seconds * steps / 86400 for seconds in (plan.cost.full_overlap, plan.cost.no_overlap))
    rows = [("run", f"{plan.days:.1f} days ({low:.1f} .. {high:.1f}), {plan.device_hours:,.0f} device-hours; evaluation, "
                    "checkpoints and faults come on top")]
    if plan.checkpoint_bytes:
        text = f"{plan.checkpoint_bytes / GIB:.1f} GiB"
        if every:
            gap = every * best
            rate = plan.checkpoint_bytes / gap / WRITING
            text += (f" every {every} steps = {_duration(gap)}; written beside training, in half of that time at "
                     f"{f'{rate / 1e9:.2f} GB/s' if rate >= 1e8 else f'{rate / 1e6:.1f} MB/s'} in all")
        rows.append(("checkpoint", text))
    return "\n".join(_columns(rows))


def _compiler(plan: Plan) -> str:
    rows = []
    if plan.overrides:
        rows.append(("overrides", " ".join(plan.overrides)))
    if plan.flags:
        rows.append(("flags", " ".join(plan.flags)))
    if plan.compile_s:
        rows.append(("compiled in", f"{plan.compile_s:.0f} s" + (", kept from before" if plan.facts.get("cached") else "")))
    versions = plan.facts.get("versions", {})
    if versions:
        rows.append(("by", ", ".join(f"{name} {version}" for name, version in versions.items())))
    rows += [("warning", text) for text in plan.facts.get("warnings", ())]
    rows += [("note", text) for text in (plan.cost.notes if plan.cost else ())]
    return "\n".join(_columns(rows))


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _columns(rows: Sequence[tuple[str, str]], width: int = 128) -> list[str]:
    """A word and wrapped text behind it. Flags and overrides are never broken inside."""
    lines = []
    for name, text in rows:
        wrapped = textwrap.wrap(text, width - 13, break_long_words=False, break_on_hyphens=False) or [""]
        lines += [f"{name if i == 0 else '':<11}  {line}" for i, line in enumerate(wrapped)]
    return lines


def aligned(rows: Sequence[Sequence[str]], left: tuple[int, ...] = (0,), indent: str = "  ") -> str:
    """Aligned columns: those in `left` to the left, numbers to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    cells = ([f"{cell:<{w}}" if i in left else f"{cell:>{w}}" for i, (cell, w) in enumerate(zip(row, widths, strict=True))]
             for row in rows)
    return "\n".join((indent + "  ".join(row)).rstrip() for row in cells)
