"""What XLA's own operations of a compiled TPU program cost, by the compiler's estimate, and which operations are kernels.

Every scheduled fusion and copy of `compiled.as_text()` carries `estimated_cycles`. Kernels (`tpu_custom_call`) carry none:
neo.plan.kernel_dump counts those. Asynchronous copies (copy-start, slice-start: HBM to VMEM ahead of their use) carry none
either; they run beside the core and count as nothing here, on whichever side of a comparison they stand.
"""

from __future__ import annotations

from neo.plan.hlo import Op, parse

_FREE = {"parameter", "constant", "bitcast", "get-tuple-element", "tuple", "copy-start", "copy-done", "slice-start",
         "slice-done", "async-start", "async-done", "async-update", "after-all", "partition-id", "opt-barrier"}
_LOOPS = {"while", "call", "conditional"}


def entry_operations(hlo: str) -> list[Op]:
    """The operations of the entry computation. Raises ValueError on loops and calls: none are expected around a kernel."""
    program = parse(hlo)
    found = list(program.computations[program.entry])
    for op in found:
        if op.kind in _LOOPS:
            raise ValueError(f"{op.kind} {op.name} in a program that should have only kernels and the operations around them")
    return found


def is_kernel(op: Op) -> bool:
    """Whether it is a Pallas kernel."""
    return op.target == "tpu_custom_call"


def is_backward(op: Op) -> bool:
    """Whether it belongs to a backward pass."""
    return "transpose(" in op.source


def xla_cycles(operations: list[Op], bytes_per_cycle: float) -> tuple[float, list[tuple[str, str, float]]]:
    """(cycles, the operations that cost: name, arrays, cycles, dearest first). An operation that is neither free nor
    estimated is priced as one write and one read of its result."""
    costs = []
    for op in operations:
        if is_kernel(op) or op.kind in _FREE:
            continue
        if op.kind == "custom-call" and op.cycles is None:   # AllocateBuffer and the like
            continue
        arrays = ", ".join(f"{array.dtype}[{','.join(map(str, array.dims))}]" for array in op.results)
        moved = 2 * sum(array.bytes for array in op.results)
        costs.append((op.name, arrays, float(op.cycles) if op.cycles is not None else moved / bytes_per_cycle))
    costs.sort(key=lambda cost: -cost[2])
    return sum(cost for _, _, cost in costs), costs
