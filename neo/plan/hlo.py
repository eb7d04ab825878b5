"""The text of a compiled program (`compiled.as_text()`) as data: computations, scheduled operations, shapes, loops, aliases.

Only what pricing needs is understood; everything else of an operation is kept as text in `Op.attributes`. The grammar is
XLA's printer's, read from programs of libtpu 0.0.42, 0.0.50 and 0.0.51; nothing here needs JAX.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

from neo.errors import InputError

NOT_ESTIMATED = 9223372036854775807   # what libtpu writes into estimated_cycles where its cost model has no answer

_COMMENT = re.compile(r"/\*index=\d+\*/")
_HEADER = re.compile(r"(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$", re.S)
_END = re.compile(r"\}(?:, execution_thread=\"\w+\")?$")
_OP = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (?=[\w(])")
_NAME = re.compile(r"%([\w.\-]+)")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=]*)\]")
_DTYPE = re.compile(r"(?:bf|f|s|u|c)(\d+)")
_SUFFIX = re.compile(r"(?:\.\d+|\.clone|\.cloned|\.remat\d*)+$")


@dataclasses.dataclass(frozen=True)
class Shape:
    """An array as HLO writes it: element type and dimensions, layout left out."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def elements(self) -> int:
        """How many there are."""
        return math.prod(self.dims)

    @property
    def bytes(self) -> float:
        """Of the elements; a half byte each for 4-bit ones."""
        return self.elements * _element_bytes(self.dtype)


@functools.cache
def _element_bytes(dtype: str) -> float:
    """Bytes of one element by its name: pred 1, bf16 2, f8e4m3fn 1, s4 0.5, c64 8. 0 for token and opaque."""
    if dtype == "pred":
        return 1
    bits = _DTYPE.match(dtype)
    return int(bits[1]) / 8 if bits else 0


@functools.lru_cache(maxsize=65536)
def shapes(text: str) -> tuple[Shape, ...]:
    """The arrays in a type's text, tuples flattened, in order."""
    return tuple(Shape(dtype, tuple(int(n.removeprefix("<=")) for n in dims.split(",") if n))
                 for dtype, dims in _SHAPE.findall(text) if dtype == "pred" or _DTYPE.match(dtype))


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation. `arguments` and `attributes` are the text in and behind its brackets."""

    name: str
    kind: str                    # all-gather, fusion, custom-call, ...
    type: str                    # of the result, layouts and all
    arguments: str
    attributes: str
    root: bool = False

    @functools.cached_property
    def operands(self) -> tuple[str, ...]:
        """Names of the operations it takes."""
        return tuple(_NAME.findall(self.arguments))

    @property
    def results(self) -> tuple[Shape, ...]:
        """Its result's arrays, tuples flattened."""
        return shapes(self.type)

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate in core clock cycles; None where it made none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found and int(found[1]) != NOT_ESTIMATED else None

    @property
    def source(self) -> str:
        """JAX's name stack and primitive (`op_name`), or ""."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def target(self) -> str:
        """A custom call's target, or ""."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def stem(self) -> str:
        """Its name without the compiler's numbering: `fusion` of `fusion.12.remat`."""
        return _SUFFIX.sub("", self.name)

    def called(self, *keys: str) -> str | None:
        """The computation that the first of these attributes names (`body`, `calls`, `to_apply`, ...), or None."""
        for key in keys:
            found = re.search(rf"\b{key}=\{{?%?([\w.\-]+)", self.attributes)
            if found:
                return found[1]
        return None


@dataclasses.dataclass(frozen=True)
class Program:
    """A module. `computations`: name -> operations in schedule order. `header`: the HloModule line. `lines`: source line
    of each stack frame number, "file:line function"."""

    header: str
    entry: str
    computations: dict[str, tuple[Op, ...]]
    lines: dict[int, str] = dataclasses.field(default_factory=dict)

    @property
    def scheduled(self) -> bool:
        """Whether the order of operations is the order they run in."""
        return "is_scheduled=true" in self.header

    def operation(self, computation: str, name: str) -> Op | None:
        """An operation by name."""
        return self._index(computation).get(name)

    def _index(self, computation: str) -> dict[str, Op]:
        cache = self.__dict__.setdefault("_indices", {})
        if computation not in cache:
            cache[computation] = {op.name: op for op in self.computations.get(computation, ())}
        return cache[computation]

    def operand_shapes(self, computation: str, op: Op) -> tuple[Shape, ...]:
        """Arrays that go into an operation, tuples flattened."""
        constraint = re.search(r"operand_layout_constraints=\{(.*?)\}(?:, [a-z_]+=|$)", op.attributes, re.S)
        if constraint:
            return shapes(constraint[1])
        index = self._index(computation)
        return tuple(shape for name in op.operands if name in index for shape in index[name].results)

    def line_of(self, op: Op) -> str:
        """The line of the model that an operation came from, "file:line function", or ""."""
        frame = re.search(r"stack_frame_id=(\d+)", op.attributes)
        if frame:
            return self.lines.get(int(frame[1]), "")
        file = re.search(r'source_file="([^"]*)" source_line=(\d+)', op.attributes)
        return f"{_short(file[1])}:{file[2]}" if file else ""

    def reached(self) -> Iterator[tuple[str, Op]]:
        """(computation, operation) of everything that is scheduled: the entry and what loops, calls and branches run.
        Inside fusions nothing is scheduled by itself, and is left out."""
        waiting, seen = [self.entry], set()
        while waiting:
            name = waiting.pop()
            if name in seen:
                continue
            seen.add(name)
            for op in self.computations.get(name, ()):
                yield name, op
                if op.kind == "while":
                    waiting.append(op.called("body") or "")
                elif op.kind == "conditional":
                    waiting.extend(branches(op))
                elif op.kind == "call" or op.kind.endswith("-start"):
                    waiting.append(op.called("to_apply", "calls", "called_computations") or "")


@dataclasses.dataclass(frozen=True)
class KernelCall:
    """A custom call to be priced. `name`: without the compiler's numbering. `text`: its attributes, with the serialised
    kernel where the compiler kept it."""

    name: str
    target: str
    operands: tuple[Shape, ...]
    results: tuple[Shape, ...]
    source: str
    text: str


def kernel_call(program: Program, computation: str, op: Op) -> KernelCall:
    """What a price list gets to know of a custom call."""
    return KernelCall(op.stem, op.target, program.operand_shapes(computation, op), op.results, op.source, op.attributes)


def kernel_calls(program: Program) -> tuple[KernelCall, ...]:
    """Every Pallas kernel for TPUs (`tpu_custom_call`) that the program runs, once per place."""
    return tuple(kernel_call(program, where, op) for where, op in program.reached() if op.target == "tpu_custom_call")


def parse(text: str) -> Program:
    """Read `compiled.as_text()`. Raises InputError when there is no entry computation in it."""
    text = _COMMENT.sub("", text)
    computations: dict[str, tuple[Op, ...]] = {}
    entry, header, current, pending, preamble = None, "", None, "", []
    collected: list[Op] = []

    def flush() -> None:
        nonlocal pending
        if pending:
            collected.append(_operation(pending))
            pending = ""

    for line in text.split("\n"):
        if current is None:
            match = _HEADER.match(line) if line[:1] not in (" ", "") else None
            if match:
                current, collected = match[2], []
                entry = current if match[1] else entry
            else:
                preamble.append(line)
        elif _END.match(line):
            flush()
            computations[current] = tuple(collected)
            current = None
        elif _OP.match(line):
            flush()
            pending = line
        elif pending:                  # a kernel's metadata runs over several lines
            pending += "\n" + line
    header = next((line for line in preamble if line.startswith("HloModule")), "")
    if entry is None or entry not in computations:
        raise InputError(f"no HLO program: the text has no complete ENTRY computation (it begins {text[:60]!r})")
    return Program(header, entry, computations, _source_lines(preamble))


def _operation(text: str) -> Op:
    start = _OP.match(text)
    assert start
    begin = start.end()
    if text[begin] == "(":
        end = _closing(text, begin) + 1
    else:
        end = text.index(" ", begin)
    kind = re.compile(r"\s*([a-z][\w\-]*)\(").match(text, end)
    if not kind:
        raise InputError(f"an HLO operation of unknown form: {text.strip()[:160]}")
    close = _closing(text, kind.end() - 1)
    return Op(start[2], kind[1], text[begin:end], text[kind.end():close], text[close + 1:], bool(start[1]))


def _closing(text: str, begin: int) -> int:
    """Where the bracket that opens at `begin` closes."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, begin):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise InputError(f"a bracket that never closes in HLO: {text.strip()[:160]}")


def _source_lines(preamble: list[str]) -> dict[int, str]:
    """The module's tables of files, functions, locations and stack frames, joined: frame -> "file:line function"."""
    tables: dict[str, dict[int, str]] = {}
    table: dict[int, str] = {}
    for line in preamble:
        if re.fullmatch(r"[A-Z]\w+", line):
            table = tables.setdefault(line, {})
        else:
            row = re.match(r'(\d+) (?:"(.*)"|\{(.*)\})$', line)
            if row:
                table[int(row[1])] = row[2] if row[2] is not None else row[3]
    number = lambda text, key: int((re.search(rf"{key}=(\d+)", text) or [0, 0])[1])   # noqa: E731
    lines = {}
    for frame, text in tables.get("StackFrames", {}).items():
        place = tables.get("FileLocations", {}).get(number(text, "file_location_id"), "")
        file = tables.get("FileNames", {}).get(number(place, "file_name_id"), "")
        function = tables.get("FunctionNames", {}).get(number(place, "function_name_id"), "")
        if file:
            lines[frame] = f"{_short(file)}:{number(place, ' line')} {function.replace('<locals>.', '')}"
    return lines


def _short(file: str) -> str:
    """A path from the package on: the machine's folders say nothing about the program."""
    return re.sub(r"^.*/(?:site-packages/|(?=neo/))", "", file)


def branches(op: Op) -> list[str]:
    """Computations of a conditional."""
    many = re.search(r"branch_computations=\{([^}]*)\}", op.attributes)
    if many:
        return re.findall(r"[\w.\-]+", many[1])
    return [name for key in ("true_computation", "false_computation") if (name := op.called(key))]
