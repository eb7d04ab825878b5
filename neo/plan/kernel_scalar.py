"""Executes the scalar unit of a compiled TPU kernel over its whole grid, to count how often each of its bundles runs.

Loops, branches, addresses and predicates of copies are 32-bit scalar work, in SSA form in a `final_bundles` dump
(`%s37_s24`: value 37, in register 24). The vector work does not matter here: nothing reads back from it to the scalar unit
in these kernels, and a branch that would depend on it is an error, not a guess. So the counts are exact: which bodies ran,
how often, and which blocks were copied from and to HBM.
"""

from __future__ import annotations

import dataclasses
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from neo.plan.kernel_dump import Dump

GRANULE_BYTES = 32   # of a copy's size_in_granules: 4096 for a bf16[512, 128] block in every dump
_NAME = re.compile(r"%([sp]\d+_[sp]\d+|\d+)")
_DEFINES = re.compile(r"^%(\w+) = ([\w.]+)\s*(.*)$")
_PREDICATE = re.compile(r"\((!?)%(p\w+)\)")
_MERGE = re.compile(r"^\((!?)%(p\w+), ([^)]+)\), (.+)$")
_MEMORY = re.compile(r"\[(?:smem|vmem):\[(.*?)\](?: sm:\S+)?\]")
_OPERAND = re.compile(r"index: (\d+)")
_SHAPE = re.compile(r"shape: (\w+\[[\d,]*\])")
LIMIT = 200_000_000   # bundles with scalar work: a loop that does not end


class Pointer(NamedTuple):
    """An address: a named allocation or operand, and an offset in words (None: somewhere in it)."""

    base: str
    offset: int | None


Value = int | bool | Pointer | None   # None: not known here


class NotKnown(ValueError):
    """A branch depends on something the dump does not tell."""


def signed(value: int) -> int:
    """The low 32 bits of a number, as a signed one."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value


def _add(a: Value, b: Value) -> Value:
    if isinstance(a, Pointer) or isinstance(b, Pointer):
        pointer, other = (a, b) if isinstance(a, Pointer) else (b, a)
        known = isinstance(other, int) and pointer.offset is not None
        return Pointer(pointer.base, pointer.offset + other if known else None)
    return None if a is None or b is None else signed(a + b)


def _shift(a: Value, b: Value, how: Callable[[int, int], int]) -> Value:
    if isinstance(a, Pointer):   # to granules and back
        return Pointer(a.base, None)
    return None if not isinstance(a, int) or not isinstance(b, int) else signed(how(a, b & 31))


def _arithmetic(how: Callable[[int, int], int]) -> Callable[[Value, Value], Value]:
    def run(a: Value, b: Value) -> Value:
        return signed(how(a, b)) if isinstance(a, int) and isinstance(b, int) else None
    return run


def _unsigned(how: Callable[[int, int], int]) -> Callable[[Value, Value], Value]:
    return _arithmetic(lambda a, b: how(a & 0xFFFFFFFF, b & 0xFFFFFFFF))


def _and(a: Value, b: Value) -> Value:
    if a is False or b is False:
        return False
    return None if a is None or b is None else bool(a) and bool(b)


def _not(a: Value) -> Value:
    return None if a is None else not a


_BINARY: dict[str, Callable[[Value, Value], Value]] = {
    "sadd.s32": _add, "scalar_lea.hbm": _add, "scalar_lea.vmem": _add, "scalar_lea.smem": _add, "scalar_lea.sflag": _add,
    "ssub.s32": _arithmetic(operator.sub), "smul.u32": _arithmetic(operator.mul), "smul.s32": _arithmetic(operator.mul),
    "smin.s32": _arithmetic(min), "smax.s32": _arithmetic(max), "smin.u32": _unsigned(min), "smax.u32": _unsigned(max),
    "sand.u32": _unsigned(operator.and_), "sor.u32": _unsigned(operator.or_), "sxor.u32": _unsigned(operator.xor),
    "smulhi.u32": _unsigned(lambda a, b: a * b >> 32),
    "sshll.u32": lambda a, b: _shift(a, b, operator.lshift), "sshra.s32": lambda a, b: _shift(a, b, operator.rshift),
    "sshrl.u32": lambda a, b: _shift(a, b, lambda x, n: (x & 0xFFFFFFFF) >> n),
    "pand": _and, "pnand": lambda a, b: _not(_and(a, b)), "por": lambda a, b: _not(_and(_not(a), _not(b))),
    "pnor": lambda a, b: _and(_not(a), _not(b)),
    "pxor": lambda a, b: None if a is None or b is None else bool(a) != bool(b),
}
_COMPARE = {"eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge}
_UNARY: dict[str, Callable[[Value], Value]] = {"pneg": _not, "pmov": lambda a: a, "int_to_ptr.hbm": lambda a: a,
                                              "int_to_ptr.vmem": lambda a: a, "int_to_ptr.smem": lambda a: a}


def _compare(kind: str) -> Callable[[Value, Value], Value]:
    _, how, width, *_ = kind.split(".")
    mask = 0xFFFFFFFF if width == "u32" else -1

    def run(a: Value, b: Value) -> Value:
        if isinstance(a, int) and isinstance(b, int):
            return _COMPARE[how](a & mask, b & mask) if width == "u32" else _COMPARE[how](a, b)
        return None
    return run


@dataclasses.dataclass(frozen=True)
class Cell:
    """Bundles start..end that always run together, how often, and cycles of one run."""

    start: int
    end: int
    times: int
    cycles: float


@dataclasses.dataclass(frozen=True)
class Run:
    """One core's run of a kernel. `steps`: times round the grid loop; bytes copied; and the bundles by how often they ran."""

    name: str
    core: int
    steps: int
    cells: tuple[Cell, ...]
    bytes_read: int
    bytes_written: int

    @property
    def cycles(self) -> float:
        return sum(cell.times * cell.cycles for cell in self.cells)

    def as_dict(self) -> dict:
        """Ready for JSON."""
        return {**dataclasses.asdict(self), "cycles": self.cycles}

    def table(self) -> str:
        """Which bundles run how often, and their share of the cycles; small ones are left out."""
        lines = [f"  executed on core {self.core}: {self.steps} grid steps, {self.cycles:.0f} cycles, "
                 f"{self.bytes_read / 2**20:.1f} MiB from HBM, {self.bytes_written / 2**20:.1f} MiB to HBM"]
        for cell in sorted(self.cells, key=lambda cell: -cell.times * cell.cycles):
            share = cell.times * cell.cycles / self.cycles
            if share >= 0.004:
                lines.append(f"    {cell.start:>6d}-{cell.end:<6d} {cell.times:>6d} times x {cell.cycles:7.0f} cycles "
                             f"{share:6.1%}")
        return "\n".join(lines)


class _Program:
    """The scalar instructions of a dump that its branches and copies depend on, ready to run."""

    def __init__(self, dump: Dump, core: int, operands: Mapping[int, Sequence[int]]) -> None:
        self.dump, self.core, self.operands = dump, core, operands
        self.values: dict[str, Value] = {}
        self.written: dict[str, int] = {}    # when, for phis
        self.memory: dict[tuple[str, int], Value] = {("#allocation0", 0): core}   # the dumps' "megacore core id"
        self.shapes: dict[str, str] = {}
        self.clock = self.bytes_read = self.bytes_written = 0
        needed = self._needed()
        self.code: list[list[Callable[[], None]]] = []
        for bundle in dump.bundles:
            lines = [line for line in bundle.instructions if self._matters(line, needed)]
            self.code.append([self._compile(line) for line in self._in_order(lines)])

    def _needed(self) -> set[str]:
        """Names that branches and copies depend on, through registers and scalar memory."""
        uses: dict[str, set[str]] = {}
        roots: set[str] = set()
        for bundle in self.dump.bundles:
            for line in bundle.instructions:
                match = _DEFINES.match(line)
                if not match:
                    continue
                name, op, rest = match.groups()
                reads = set(_NAME.findall(rest))
                if op.startswith("sbr."):
                    roots |= reads
                elif op.startswith("dma.") and "done" not in op:
                    roots |= set(re.findall(r"%(p\w+)", rest)) | (reads if "smem" in op else set())
                    roots |= set(re.findall(r"size_in_granules=%(\w+)", rest))
                elif op == "sst":
                    base = re.match(r"\[smem:\[(#\w+|)", rest)
                    uses.setdefault(base[1] if base else "", set()).update(reads)
                elif name[0] in "sp":
                    memory = re.match(r"\[smem:\[(#\w+|)", rest) if op == "sld" else None
                    if memory:
                        reads = reads | {memory[1] or "*"}
                    uses.setdefault(name, set()).update(reads)
        uses["*"] = {key for key in uses if key.startswith("#") or key == ""}
        seen, todo = set(), list(roots)
        while todo:
            name = todo.pop()
            if name not in seen:
                seen.add(name)
                todo.extend(uses.get(name, ()))
        return seen

    @staticmethod
    def _matters(line: str, needed: set[str]) -> bool:
        match = _DEFINES.match(line)
        if not match:
            return False
        name, op, rest = match.groups()
        if op == "sst":
            base = re.match(r"\[smem:\[(#\w+)", rest)
            return "*" in needed or base is None or base[1] in needed
        return name in needed or (op.startswith("dma.") and "done" not in op)

    @staticmethod
    def _in_order(lines: list[str]) -> list[str]:
        """What a bundle defines and uses itself comes first: int_to_ptr and the like are names, not instructions."""
        left, placed = list(lines), []
        while left:
            defined = {_DEFINES.match(line)[1] for line in left}
            ready = [line for line in left if "sphi" in line
                     or not (set(_NAME.findall(_DEFINES.match(line)[3])) & (defined - {_DEFINES.match(line)[1]}))]
            ready = ready or left
            placed += ready
            left = [line for line in left if line not in ready]
        return placed

    def read(self, text: str) -> Callable[[], Value]:
        """A way to read an operand: a register, a number, an address."""
        text = text.strip().split(" ")[0] if not text.strip().startswith("[") else text.strip()
        if text.startswith("%"):
            name, values = text[1:], self.values
            return lambda: values.get(name)
        if text.startswith("["):
            base, _, offset = text.strip("[]").partition(" + ")
            pointer = Pointer(base, int(offset.lstrip("$"), 0) if offset.startswith("$") else 0 if not offset else None)
            return lambda: pointer
        try:
            number = signed(int(text.lstrip("$"), 0))
        except ValueError:
            return lambda: None
        return lambda: number

    def write(self, name: str, value: Value) -> None:
        self.clock += 1
        self.values[name] = value
        self.written[name] = self.clock

    def _address(self, text: str) -> Callable[[], Pointer | None]:
        base, _, offset = text.partition(" + ")
        start = self.read(f"[{base}]" if base.startswith("#") else base)
        more = self.read(offset) if offset else (lambda: 0)

        def find() -> Pointer | None:
            value = _add(start(), more())
            return value if isinstance(value, Pointer) and value.offset is not None else None
        return find

    def _compile(self, line: str) -> Callable[[], None]:
        name, op, rest = _DEFINES.match(line).groups()
        run = self._body(name, op, rest)
        merge = _MERGE.match(rest)
        found = None if merge or op in ("scalar_select", "sphi") else _PREDICATE.search(rest)
        if not found:
            return run
        holds, negated = self.read("%" + found[2]), found[1] == "!"

        def guarded() -> None:
            value = holds()
            if value is None and op == "sst":   # whether it is written is not known, so what stands there is not either
                self._forget(rest)
            elif value is None or bool(value) != negated:   # a copy whose predicate is not known counts
                run()
        return guarded

    def _forget(self, rest: str) -> None:
        pointer = self._address(_MEMORY.search(rest)[1])()
        if pointer is not None:
            self.memory[pointer] = None

    def _body(self, name: str, op: str, rest: str) -> Callable[[], None]:
        if op.startswith("dma."):
            return self._copy(op, rest)
        if op == "inlined_call_operand.hbm" or op.startswith("inlined_call_operand."):
            index, shape = _OPERAND.search(rest), _SHAPE.search(rest)
            base = f"operand{index[1]}" if index else "operand?"
            self.shapes[base] = shape[1] if shape else "?"
            return lambda: self.write(name, Pointer(base, 0))
        if op == "sld":
            address = self._address(_MEMORY.search(rest)[1])
            return lambda: self.write(name, self.memory.get(address()))
        if op == "sst":
            address, value = self._address(_MEMORY.search(rest)[1]), self.read(rest.rsplit("]", 1)[1].rsplit(",", 1)[-1])

            def store() -> None:
                where = address()
                if where is not None:
                    self.memory[where] = value()
            return store
        if op in ("smov", "smov.u32", "pmov"):   # libtpu 0.0.51 writes a type
            merge = _MERGE.match(rest)
            if merge:
                negated, holds = merge[1] == "!", self.read("%" + merge[2])
                old, new = self.read(merge[3]), self.read(merge[4])

                def move() -> None:
                    value = holds()
                    self.write(name, None if value is None else new() if bool(value) != negated else old())
                return move
            value = self.read(_PREDICATE.sub("", rest).lstrip(", "))
            return lambda: self.write(name, value())
        if op == "sphi":
            sources = _NAME.findall(rest)
            return lambda: self.write(name, self.values.get(max(sources, key=lambda source: self.written.get(source, -1))))
        if op == "scalar_select":
            parts = dict(part.split("=", 1) for part in rest.replace(" ", "").split(","))
            holds, yes, no = (self.read(parts[key]) for key in ("predicate", "on_true", "on_false"))

            def select() -> None:
                value = holds()
                self.write(name, None if value is None else yes() if value else no())
            return select
        plain = re.sub(r"\[resolvable:\S+\]\s*", "", _PREDICATE.sub("", rest)).lstrip(", ")
        if op in _UNARY:
            value, how1 = self.read(plain), _UNARY[op]
            return lambda: self.write(name, how1(value()))
        how2 = _compare(op) if op.startswith("scmp.") else _BINARY.get(op)
        if how2 and plain.count(",") == 1:
            left, right = (self.read(part) for part in plain.split(","))
            return lambda: self.write(name, how2(left(), right()))
        return lambda: self.write(name, None)   # an error only if a branch asks for it

    def _copy(self, op: str, rest: str) -> Callable[[], None]:
        fields = dict(re.findall(r"(\w+)=(\S+?)(?:,|$|\s)", rest))
        if "size_in_granules" not in fields:
            raise ValueError(f"a copy of unknown form: {op} {rest}")
        size = self.read(fields["size_in_granules"])
        if op.endswith("_to_smem"):
            source, target = (self.read(fields[key]) for key in ("hbm" if "hbm" in op else "vmem", "smem"))

            def fetch() -> None:
                here, there = source(), target()
                words = self.operands.get(int(here.base.removeprefix("operand"))) if isinstance(here, Pointer) else None
                if words is not None and not isinstance(there, Pointer):
                    raise NotKnown(f"{self.dump.name}: where scalars are copied to is not known: {op} {rest[:120]}")
                for i, word in enumerate(words if words is not None else ()):
                    self.memory[there.base, (there.offset or 0) + i] = signed(int(word))
            return fetch
        read, written = "hbm_to" in op, "to_hbm" in op

        def move() -> None:
            granules = size()
            if not isinstance(granules, int):
                raise NotKnown(f"{self.dump.name}: the size of a copy is not known: {op} {rest[:120]}")
            self.bytes_read += read * granules * GRANULE_BYTES
            self.bytes_written += written * granules * GRANULE_BYTES
        return move


def execute(dump: Dump, core: int = 0, operands: Mapping[int, Sequence[int]] | None = None) -> Run:
    """Run a kernel's scalar unit. operands: {index: 32-bit words} of scalar-prefetch operands its branches read.

    Raises NotKnown where a branch depends on something else."""
    program = _Program(dump, core, operands or {})
    branches = {branch.at: branch for branch in dump.branches}
    total = len(dump.bundles)
    busy, after = [total] * (total + 1), total
    for i in range(total - 1, -1, -1):
        if program.code[i] or i in branches:
            after = i
        busy[i] = after
    counts = [0] * (total + 1)
    at = start = done = 0
    jump: tuple[int, int] | None = None   # (last bundle before it, target)
    while True:
        i = busy[at]
        if jump and i > jump[0]:
            counts[start] += 1
            counts[jump[0] + 1] -= 1
            at = start = jump[1]
            jump = None
            continue
        if i >= total:
            counts[start] += 1
            counts[total] -= 1
            break
        done += 1
        if done > LIMIT:
            raise NotKnown(f"{dump.name}: no end after {LIMIT} bundles")
        branch = branches.get(i)
        value = program.values.get(branch.predicate) if branch and branch.predicate else True
        for instruction in program.code[i]:
            instruction()
        if branch:
            if value is None:
                raise NotKnown(f"{dump.name}: the branch at bundle {i:#x} depends on %{branch.predicate}, which is not known "
                               f"(operands {program.shapes})")
            if bool(value) != branch.negated:
                if jump:
                    raise NotKnown(f"{dump.name}: a branch at {i:#x}, before the one before it took effect")
                jump = (i + branch.delay, branch.target)
        at = i + 1
    times = 0
    for i in range(total):
        times += counts[i]
        counts[i] = times
    headers = [branch.target for branch in dump.branches if branch.target <= branch.at]
    return Run(dump.name, core, counts[min(headers)] if headers else 1, _cells(dump, counts[:total]),
               program.bytes_read, program.bytes_written)


def _cells(dump: Dump, counts: Sequence[int]) -> tuple[Cell, ...]:
    edges = {0, len(counts)} | {edge for _, low, high in dump.spans() for edge in (low, high)}
    edges |= {i for i in range(1, len(counts)) if counts[i] != counts[i - 1]}
    marks = sorted(edges)
    return tuple(Cell(low, high, counts[low], dump.cost(low, high)) for low, high in zip(marks, marks[1:], strict=False))
