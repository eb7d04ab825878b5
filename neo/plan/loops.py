"""How often the loops of a compiled program turn."""

from __future__ import annotations

import re

from neo.errors import InputError
from neo.plan.hlo import Op, Program


def turns(program: Program, computation: str, loop: Op) -> int:
    """How often a `while` of `computation` runs its body: as the compiler says, else by its counter (start, bound, step).

    Raises InputError where neither is constant: such a program has no static cost.
    """
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if known:
        return int(known[1])
    counter = _counter(program, loop.called("condition") or "")
    if counter is None:
        raise InputError(f"the loop {loop.name} of the compiled program has no constant number of turns: its cost cannot "
                         f"be known before it runs (condition {loop.called('condition')})")
    place, bound, direction = counter
    first = _first_value(program, computation, loop, place)
    step = _step(program, loop.called("body") or "", place)
    if direction == "NE":
        direction = "LT" if step > 0 else "GT"
    distance = (bound - first) * (1 if direction in ("LT", "LE") else -1) + (direction in ("LE", "GE"))
    return max(0, -(-distance // abs(step)))


def _counter(program: Program, condition: str) -> tuple[int, int, str] | None:
    """(place of the counter in the loop's state, bound, direction) of the comparison that ends a loop."""
    compare = next((op for op in program.computations.get(condition, ()) if op.root), None)
    where, outside = condition, {}
    if compare is not None and compare.kind == "fusion":       # the comparison inside, its parameters seen from outside
        where = compare.called("calls") or ""
        outside = {op.name: compare.operands[int(op.arguments)] for op in program.computations.get(where, ())
                   if op.kind == "parameter"}
        compare = next((op for op in program.computations.get(where, ()) if op.root), None)
    if compare is None or compare.kind != "compare":
        return None
    sides = [program.operation(condition, outside[name]) if name in outside else program.operation(where, name)
             for name in compare.operands]
    direction = re.search(r"direction=(\w\w)", compare.attributes)
    if len(sides) != 2 or None in sides or not direction:
        return None
    turned = {"LT": "GT", "GT": "LT", "LE": "GE", "GE": "LE"}.get(direction[1], direction[1])
    for counter, bound, way in ((sides[0], sides[1], direction[1]), (sides[1], sides[0], turned)):
        index = re.search(r"index=(\d+)", counter.attributes)
        if counter.kind == "get-tuple-element" and index and _integer(bound) is not None and way != "EQ":
            return int(index[1]), int(_integer(bound)), way
    return None


def _integer(op: Op | None) -> int | None:
    return int(op.arguments) if op is not None and op.kind == "constant" and re.fullmatch(r"-?\d+", op.arguments) else None


def _through(program: Program, computation: str, name: str) -> Op | None:
    """The operation behind copies and the like."""
    op = program.operation(computation, name)
    while op is not None and op.kind in ("copy", "bitcast", "convert") and op.operands:
        op = program.operation(computation, op.operands[0])
    return op


def _first_value(program: Program, computation: str, loop: Op, place: int) -> int:
    """What the counter starts from: the constant that goes in at its place, 0 (as JAX counts) where none is found."""
    into = program.operation(computation, loop.operands[0]) if loop.operands else None
    if into is None or into.kind != "tuple":
        return 0
    return _integer(_through(program, computation, into.operands[place])) or 0


def _step(program: Program, body: str, place: int) -> int:
    """What a turn adds to the counter, 1 where that is not seen. Loops in which XLA overlaps a matrix product with the
    moving of its operand (`windowed_dot_general`) count by two."""
    root = next((op for op in program.computations.get(body, ()) if op.root), None)
    if root is None or root.kind != "tuple" or place >= len(root.operands):
        return 1
    change = _through(program, body, root.operands[place])
    if change is None or change.kind not in ("add", "subtract"):
        return 1
    by = next((value for name in change.operands if (value := _integer(_through(program, body, name)))), 1)
    return by if change.kind == "add" else -by
