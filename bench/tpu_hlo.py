"""What XLA's own operations of a compiled TPU program cost, by the compiler's estimate, and which operations are kernels.

Every scheduled fusion and copy of `compiled.as_text()` carries `estimated_cycles`. Kernels (`tpu_custom_call`) carry none:
neo.plan.kernel_dump counts those. Asynchronous copies (copy-start, slice-start: HBM to VMEM ahead of their use) carry none
either; they run beside the core and count as nothing here, on whichever side of a comparison they stand.
"""

from __future__ import annotations

import dataclasses
import math
import re

_NONE = 9223372036854775807   # the compiler's "not estimated"
_BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "f64": 8}
_FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "copy-start", "copy-done", "slice-start",
         "slice-done", "async-start", "async-done", "async-update", "after-all", "partition-id", "opt-barrier"}
_LOOPS = {"while", "call", "conditional"}
_SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Op:
    """An operation of the entry computation. cycles: the compiler's estimate, or None. bytes: of its results."""

    name: str
    op: str
    shape: str
    cycles: int | None
    bytes: int
    kernel: bool
    backward: bool


def size(shape: str) -> int:
    """Bytes of the arrays in a shape's text."""
    return sum(_BYTES.get(kind, 0) * math.prod(int(n) for n in dims.split(",") if n) for kind, dims in _SHAPE.findall(shape))


def entry_operations(hlo: str) -> list[Op]:
    """The operations of the entry computation. Raises ValueError on loops and calls: none are expected around a kernel."""
    start = hlo.index("\nENTRY ")
    body = (hlo[start:] + "\n").split("\n}\n", 1)[0]   # a kernel's metadata has lines that begin with }
    found = []
    for text in re.split(r"\n  (?=(?:ROOT )?%)", body)[1:]:
        match = re.match(r"(?:ROOT )?%([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(", text, re.S)
        if not match:
            raise ValueError(f"an operation of unknown form: {text[:200]}")
        name, shape, op = match.groups()
        if op in _LOOPS:
            raise ValueError(f"{op} {name} in a program that should have only kernels and the operations around them")
        cycles = re.search(r'"estimated_cycles":"(\d+)"', text)
        value = int(cycles[1]) if cycles and int(cycles[1]) != _NONE else None
        source = re.search(r'op_name="([^"]*)"', text)
        found.append(Op(name, op, re.sub(r"\{[^}]*\}", "", shape), value, size(shape), '"tpu_custom_call"' in text,
                        bool(source and "transpose(" in source[1])))
    return found


def xla_cycles(operations: list[Op], bytes_per_cycle: float) -> tuple[float, list[tuple[str, str, float]]]:
    """(cycles, the operations that cost: name, shape, cycles, dearest first). An operation that is neither free nor
    estimated is priced as one write and one read of its result."""
    costs = []
    for op in operations:
        if op.kernel or op.op in _FREE:
            continue
        if op.op == "custom-call" and op.cycles is None:   # AllocateBuffer and the like
            continue
        costs.append((op.name, op.shape, float(op.cycles) if op.cycles is not None else 2 * op.bytes / bytes_per_cycle))
    costs.sort(key=lambda cost: -cost[2])
    return sum(cost for _, _, cost in costs), costs
