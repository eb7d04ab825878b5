"""The schedule of a compiled program, replayed on one device: what runs when, and what waits for what.

Operations follow one another on the core; a synchronous collective stops the core; an asynchronous one occupies its network
from its start, after what that network is busy with, and the core waits for it where its result is taken. Networks
run beside each other: the links of a slice, those between slices, and the two directions between HBM and host memory.
"""

from __future__ import annotations

import collections
import dataclasses
import re
from collections.abc import Callable

from neo.errors import InputError
from neo.plan.chips import Chip
from neo.plan.collectives import Groups, Torus, Transfer, base_kind, between_slices, device_count, host_copy, transfer
from neo.plan.flops import matmul_flops
from neo.plan.hlo import KernelCall, Op, Program, branches, kernel_call
from neo.plan.loops import turns

# Custom calls that cost nothing, and why.
FREE_CUSTOM_CALLS = {
    "AllocateBuffer": "memory that later operations write",
    "AssumeGatherIndicesInBound": "a promise to the compiler",
    "AsyncCollectiveStart": "priced as the collective it starts",
    "AsyncCollectiveDone": "the end of that collective",
    "ConcatBitcast": "parts that lie side by side, seen as one array",
    "GatherScatterIndicesBitpacked": "marks how the indices of a gather lie in memory",
    "PrepareAsyncCallDone": "the end of that hand-over",
    "PrepareAsyncCallStart": "hands a collective to the SparseCore, which is priced (libtpu 0.0.42)",
    "Sharding": "a note to the partitioner",
    "SliceId": "which slice of several this is",
    "ZeroCrop": "in place, what pads an array to whole tiles set to zero",
}
# Scheduled operations that would take time if the compiler had said how much; all others without an estimate are bookkeeping.
_UNPRICED = ("fusion", "copy", "convolution", "dot")


@dataclasses.dataclass
class Run:
    """One run of a computation, in seconds. The lists hold every operation with its times in the whole step."""

    matmul: float = 0.0
    other: float = 0.0
    kernels: float = 0.0
    flops: float = 0.0
    elapsed: float = 0.0
    moved: collections.Counter = dataclasses.field(default_factory=collections.Counter)     # network -> seconds
    operations: list[tuple[str, int, float, float]] = dataclasses.field(default_factory=list)
    transfers: list[tuple[Transfer, str, str, int]] = dataclasses.field(default_factory=list)
    calls: list[tuple[KernelCall, int, float]] = dataclasses.field(default_factory=list)
    loops: list[tuple[str, int]] = dataclasses.field(default_factory=list)
    missing: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def add(self, other: Run, times: int = 1) -> None:
        """Put a run of another computation in, `times` over; its lists count the whole step already."""
        for name in ("matmul", "other", "kernels", "flops"):
            setattr(self, name, getattr(self, name) + times * getattr(other, name))
        for network, seconds in other.moved.items():
            self.moved[network] += times * seconds
        for name in ("operations", "transfers", "calls", "loops"):
            getattr(self, name).extend(getattr(other, name))
        self.missing.update(other.missing)


class Replay:
    """The schedule of one computation, operation by operation."""

    def __init__(self, pricing: Pricing, name: str, times: int):
        self.pricing, self.name, self.times = pricing, name, times
        self.run = Run()
        self.busy_until: dict[str, float] = collections.defaultdict(float)      # by network
        self.pending: dict[str, float] = {}            # what is under way -> when it ends
        self.alias: dict[str, str] = {}                # parts and updates of something under way -> its name

    def whole(self) -> Run:
        """Replay it from beginning to end."""
        for op in self.pricing.program.computations.get(self.name, ()):
            self.step(op)
        self.run.elapsed = max([self.run.elapsed, *self.pending.values()])
        return self.run

    def book(self, moved: Transfer, mode: str) -> None:
        """Count what is moved; takes no time by itself."""
        self.run.transfers.append((moved, mode, "entry" if self.times == 1 else f"x{self.times}", self.times))
        self.run.moved[moved.network] += moved.seconds

    def start(self, key: str, moved: Transfer, mode: str) -> None:
        """An asynchronous collective takes its network when that is free."""
        self.book(moved, mode)
        end = max(self.run.elapsed, self.busy_until[moved.network]) + moved.seconds
        self.busy_until[moved.network] = self.pending[key] = end

    def wait(self, op: Op) -> None:
        """The core waits for what an operation ends."""
        name = op.operands[0] if op.operands else ""
        self.end(self.alias.get(name, name))

    def end(self, key: str) -> None:
        """The core waits for what goes by this key, if it is under way."""
        self.run.elapsed = max(self.run.elapsed, self.pending.pop(key, 0.0))

    def synchronous(self, moved: Transfer) -> None:
        """A collective that the core stands still for."""
        self.book(moved, "sync")
        end = max(self.run.elapsed, self.busy_until[moved.network]) + moved.seconds
        self.run.elapsed = self.busy_until[moved.network] = end

    def inside(self, run: Run, times: int = 1) -> None:
        """Another computation runs here, `times` over; if it moves anything, what is under way comes first."""
        for network, seconds in run.moved.items():
            if seconds:
                self.run.elapsed = max(self.run.elapsed, self.busy_until[network])
        self.run.elapsed += times * run.elapsed
        self.run.add(run, times)

    def step(self, op: Op) -> None:
        """One operation of the schedule."""
        pricing, kind = self.pricing, op.kind
        collective = base_kind(op)
        if kind in ("get-tuple-element", "call-update", "async-update"):
            name = op.operands[0] if op.operands else ""
            self.alias[op.name] = self.alias.get(name, name)
        elif kind.endswith("-done") and kind != "send-done":
            self.wait(op)
        elif collective and kind.endswith("-start"):
            self.start(op.name, pricing.moved(op, collective), "async")
        elif collective:
            self.synchronous(pricing.moved(op, collective))
        elif kind == "send" and (moved := between_slices(op, pricing.chip)):
            self.start(_rendezvous(op), moved, "async")
        elif kind == "recv":
            self.alias[op.name] = _rendezvous(op)
        elif moved := host_copy(op, pricing.chip):
            self.start(op.name, moved, "async")
        elif kind in ("async-start", "call-start", "custom-call-start"):
            self.asynchronous(op)
        elif kind == "while":
            count = turns(pricing.program, self.name, op)
            self.run.loops.append((op.name, count * self.times))
            self.inside(pricing.price(op.called("body") or "", self.times * count), count)
        elif kind == "call":
            self.inside(pricing.price(op.called("to_apply", "calls") or "", self.times))
        elif kind == "conditional":
            self.inside(max((pricing.price(name, self.times) for name in branches(op)), key=lambda run: run.elapsed,
                            default=Run()))
        elif kind == "custom-call":
            self.custom(op)
        elif not (kind == "fusion" and self.fused(op)):
            self.compute(op)

    def asynchronous(self, op: Op) -> None:
        """A computation that runs beside the core: a collective, or work given to a SparseCore."""
        inner = op.called("to_apply", "calls", "called_computations") or ""
        found = self.pricing.collective_in(inner)
        if found:
            part, kind = found
            threads = op.attributes + "".join(other.attributes for other in self.pricing.program.computations[inner])
            mode = "async sparsecore" if kind and ("sparsecore" in threads or op.kind != "async-start") else "async"
            self.start(op.name, self.pricing.moved(part, kind), mode)
        elif op.kind == "async-start":
            self.inside(self.pricing.price(inner, self.times))
        else:
            self.run.missing[f"{op.stem.removesuffix('.call-start')} on a SparseCore"] += self.times

    def fused(self, op: Op) -> bool:
        """Collectives in a fusion. True when that is all that can be priced of it."""
        inner = op.called("calls") or ""
        found = self.pricing.collective_in(inner)
        if not found:
            return False
        part, kind = found
        parts = self.pricing.program.computations[inner]
        targets = {other.target for other in parts}
        channel = re.search(r"channel_id=(\d+)", part.attributes)
        key = f"channel {channel[1]}" if channel else part.name
        if "AsyncCollectiveStart" in targets:
            self.start(key, self.pricing.moved(part, kind), "async fusion")
            return True
        if "AsyncCollectiveDone" in targets:
            self.end(key)
            return True
        if key not in self.pending and not inner.startswith("async_collective_fusion"):
            if kind == "all-reduce" and ("scatter" in inner or any(other.kind == "dynamic-slice" for other in parts)):
                kind = "reduce-scatter"
            self.synchronous(self.pricing.moved(part, kind))
            return op.cycles is None
        return False

    def custom(self, op: Op) -> None:
        """A kernel is priced by its cycles; others by the compiler, or not at all if they are known to be free."""
        if op.target in FREE_CUSTOM_CALLS:
            return
        if op.cycles is not None:
            self.compute(op)
            return
        call = kernel_call(self.pricing.program, self.name, op)
        cycles = self.pricing.cycles_of(call, op)
        seconds = cycles / self.pricing.chip.clock
        self.run.kernels += seconds
        self.run.elapsed += seconds
        self.run.calls.append((call, self.times, cycles))

    def compute(self, op: Op) -> None:
        """An operation of XLA's own, at the compiler's estimate."""
        if op.cycles is None:
            if op.kind in _UNPRICED:
                self.run.missing[f"{op.kind} {op.stem}" if op.kind != op.stem else op.kind] += self.times
            return
        seconds = op.cycles / self.pricing.chip.clock
        flops = matmul_flops(self.pricing.program, self.name, op)
        if flops:
            self.run.matmul += seconds
            self.run.flops += flops
        else:
            self.run.other += seconds
        self.run.elapsed += seconds
        self.run.operations.append((label(self.pricing.program, op), self.times, seconds, flops))


class Pricing:
    """A program with its prices."""

    def __init__(self, program: Program, chip: Chip, kernel_cycles: Callable[[KernelCall], float],
                 network_of: Callable[[Groups], str] | None = None, torus: Torus = ()):
        self.program, self.chip, self.torus = program, chip, torus
        self.kernel_cycles, self.network_of = kernel_cycles, network_of
        self.devices = device_count(program)

    def price(self, computation: str, times: int) -> Run:
        """One run of a computation that runs `times` in a step."""
        return Replay(self, computation, times).whole()

    def moved(self, op: Op, kind: str) -> Transfer:
        """Bytes and time of a collective, on the network its groups need."""
        moved = transfer(op, kind, self.chip, self.devices, torus=self.torus)
        if self.network_of is not None and self.network_of(moved.groups) == "dcn":
            moved = transfer(op, kind, self.chip, self.devices, "dcn")
        return moved

    def collective_in(self, computation: str) -> tuple[Op, str] | None:
        """The first collective in a computation and what it calls."""
        for op in self.program.computations.get(computation, ()):
            kind = base_kind(op)
            if kind:
                return op, kind
            inner = op.called("calls", "to_apply") if op.kind in ("fusion", "call", "async-start") else None
            found = self.collective_in(inner) if inner else None
            if found:
                return found
        return None

    def cycles_of(self, call: KernelCall, op: Op) -> float:
        """Cycles of a kernel. Raises InputError for one without a price."""
        cycles = None
        if call.target == "tpu_custom_call":
            try:
                cycles = self.kernel_cycles(call)
            except LookupError:
                cycles = None
        if cycles is None:
            raise InputError(f"the custom call {op.target or 'without a target'} ({op.name}, from {call.source or 'nowhere'}) "
                             f"has no price: give its cycles, or put it into FREE_CUSTOM_CALLS if it costs nothing")
        return cycles


def label(program: Program, op: Op) -> str:
    """Line of the model, direction and primitive: "neo/models/mlp.py:40 MLP.__call__, backward: dot_general"."""
    source = op.source
    way = ("recomputed" if "rematted_computation" in source else "backward" if "transpose(" in source
           else "forward" if "jvp(" in source else "")
    line, primitive = program.line_of(op), source.rsplit("/", 1)[-1]
    return ", ".join(part for part in (line, way) if part) + (": " if line or way else "") + (primitive or op.stem)


def _rendezvous(op: Op) -> str:
    """What a send and its recv have in common."""
    found = re.search(r'_xla_host_transfer_rendezvous="([^"]*)"', op.attributes)
    return f"rendezvous {found[1]}" if found else op.name
