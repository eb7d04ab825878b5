"""What a good training step does not do, asked of a compiled program: tests hold the recipes to it."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable

from neo.plan.chips import BY_NAME, Chip
from neo.plan.collectives import Groups, Transfer
from neo.plan.hlo import Program, Shape, shapes
from neo.plan.replay import Pricing


@dataclasses.dataclass(frozen=True)
class Move:
    """A collective of the program with how often it runs in a step. Bytes of `transfer` are of one run."""

    transfer: Transfer
    mode: str          # "sync", "async", "async fusion", "async sparsecore"
    times: int

    @property
    def kind(self) -> str:
        """all-gather, reduce-scatter, ..."""
        return self.transfer.kind

    @property
    def elements(self) -> int:
        """Of the largest array of its result (of a reduce-scatter a device's share)."""
        return max((array.elements for array in self.transfer.arrays), default=0)


def moves(program: Program, chip: Chip = BY_NAME["v5p"]) -> tuple[Move, ...]:
    """Every collective that a program runs, one entry for each place it stands in, in schedule order of the places."""
    run = Pricing(program, chip, lambda call: 0.0).price(program.entry, 1)
    return tuple(Move(transfer, mode, times) for transfer, mode, _, times in run.transfers)


def all_reduces(program: Program, at_least: int) -> tuple[Move, ...]:
    """All-reduces of an array of `at_least` elements: for a gradient each costs twice the reduce-scatter that belongs there."""
    return tuple(move for move in moves(program) if move.kind == "all-reduce" and move.elements >= at_least)


def gathers(program: Program, sizes: Iterable[int]) -> dict[int, Counter[str]]:
    """For arrays of these numbers of elements (parameters): element type -> times gathered in a step."""
    found: dict[int, Counter[str]] = {size: Counter() for size in sizes}
    for move in moves(program):
        if move.kind != "all-gather":
            continue
        for array in move.transfer.arrays:
            if array.elements in found:
                found[array.elements][array.dtype] += move.times
    return found


def synchronous(program: Program, at_least: float = 0) -> tuple[tuple[Move, float], ...]:
    """(collective, bytes over all its runs) of those the core stands still for, `at_least` bytes in all, most bytes first."""
    found = [(move, move.transfer.bytes * move.times) for move in moves(program) if move.mode == "sync"]
    return tuple(sorted((pair for pair in found if pair[1] >= at_least), key=lambda pair: -pair[1]))


def largest_array(program: Program, *, dimension: int | None = None, leave_out: Iterable[Shape] = ()) -> tuple[Shape, str]:
    """The largest array that a scheduled operation makes, and where it came from (JAX's name stack, or the operation).

    Args:
        dimension: only arrays with a dimension of this size; the vocabulary finds the logits.
        leave_out: shapes that are meant to be large (a device's share of parameters, saved activations). Loops, tuples
            and parameters make nothing and do not count.
    """
    skip = {tuple(shape.dims) for shape in leave_out}
    best, where = Shape("", (0,)), ""
    for _, op in program.reached():
        if op.kind in ("parameter", "tuple", "get-tuple-element", "while", "call", "conditional", "bitcast", "opt-barrier"):
            continue
        for array in op.results:
            if array.bytes > best.bytes and array.dims not in skip and (dimension is None or dimension in array.dims):
                best, where = array, op.source or op.name
    return best, where


def arguments(program: Program) -> tuple[Shape, ...]:
    """What goes into the program on one device, in order."""
    found = re.search(r"entry_computation_layout=\{\((.*?)\)->", program.header)
    return shapes(found[1]) if found else ()


def aliased(program: Program) -> frozenset[int]:
    """Numbers of the arguments whose memory the results take over (donated and used)."""
    begin = program.header.find("input_output_alias={")
    if begin < 0:
        return frozenset()
    part = program.header[begin:program.header.find("entry_computation_layout", begin)]
    return frozenset(int(number) for number in re.findall(r": \((\d+),", part))


def kept_twice(program: Program, donated: int) -> float:
    """Bytes of the first `donated` arguments that the compiler could not reuse: old and new state side by side. 0 is right."""
    reused = aliased(program)
    return math.fsum(shape.bytes for number, shape in enumerate(arguments(program)[:donated]) if number not in reused)


def network_by_side(sides: Iterable[Iterable[int]]) -> Callable[[Groups], str]:
    """For `cost(network_of=...)`: "dcn" for groups with devices on two of these sides (slices, nodes), else "ici"."""
    side_of = {device: i for i, devices in enumerate(sides) for device in devices}

    def network_of(groups: Groups) -> str:
        return "dcn" if any(len({side_of.get(device) for device in group}) > 1 for group in groups.members) else "ici"
    return network_of


def crossing(program: Program, sides: Iterable[Iterable[int]] = ()) -> tuple[Move, ...]:
    """Collectives that go between these sides, and what the compiler itself sends between TPU slices."""
    network_of = network_by_side(sides)
    return tuple(move for move in moves(program) if "dcn" in (move.transfer.network, network_of(move.transfer.groups)))
