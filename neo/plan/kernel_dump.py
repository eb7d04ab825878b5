"""What a compiled TPU kernel costs, read from what libtpu's compiler writes about it (LLO dumps): no TPU needed.

A TPU core issues one bundle of instructions per cycle, in order. With the flags of `dump_flags` libtpu leaves, for every
compiled kernel, its final bundles and, row by row, how many slots of each unit a bundle uses. From these two files: the grid
loop and the body of every `pl.when` (between a predicated branch and its target), with bundles, slots used and the fewest
cycles the matrix units (MXUs) need for the rows pushed through them. `neo.plan.kernel_scalar` executes the scalar
instructions, to know how often each body runs.

Cycles are issue slots. Not in them: waiting for copies, bank conflicts, clock throttling.
Rates used here: a bf16 `vmatmul` pushes 16 rows, a float32 one 8, an 8-bit one 32; an MXU takes one row per cycle, on v6e
and TPU7x (which have two 256x256 units instead of four of 128x128) two.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

# A branch takes effect after four more bundles on v5e, v5p and v6e. On TPU7x it is after those that belong to its block, at
# most six: predicated on what the branch tests, they end where the next region starts (`_delay`).
DELAY, MOST_DELAY = 4, 6
_COMMENT = re.compile(r"/\*(.*?)\*/", re.S)
_MARK = re.compile(r"(Start/End empty|Start|End) region (\d+)")
_BUNDLE = re.compile(r"^ *(?:0x[0-9a-f]+|0) +(?:(?:LH|LB|LE|PB|PF|CT) *)?:[ >]*\{", re.M)
_VMATMUL = re.compile(r"= vmatmul\.([\w.\[\]]+)")
_MXU = re.compile(r"mxu(\d)")
_BRANCH = re.compile(r"sbr\.rel(?: \((!?)%(p\w+)\))?,? target = \$region(\d+)")


def dump_flags(folder: Path) -> tuple[str, ...]:
    """Flags with which libtpu leaves the files in a folder that `kernels` reads."""
    return (f"--xla_jf_dump_to={folder}", "--xla_jf_dump_llo_text=true", "--xla_jf_dump_llo_pass_label_regex=final.*")


@dataclasses.dataclass(frozen=True)
class Bundle:
    """One cycle: its instructions, the slots they use (columns of `Dump.units`) and rows pushed through each MXU."""

    instructions: tuple[str, ...]
    slots: tuple[int, ...]
    rows: tuple[tuple[int, int], ...]   # (MXU, rows)


@dataclasses.dataclass(frozen=True)
class Branch:
    """At bundle `at`, taken if the predicate (none: always) holds, to bundle `target` after `delay` more bundles."""

    at: int
    target: int
    predicate: str | None
    negated: bool
    delay: int = DELAY


@dataclasses.dataclass(frozen=True)
class Region:
    """Bundles start..end (end excluded) and what they use; `depth` regions around it. `kind`: all, loop, when."""

    kind: str
    start: int
    end: int
    depth: int
    bundles: int
    matmul_bundles: int
    mxu_cycles: float
    busiest_mxu: float
    slots: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Dump:
    """A kernel: name, {unit: slots per bundle}, bundles, branches."""

    name: str
    units: dict[str, int]
    bundles: tuple[Bundle, ...]
    branches: tuple[Branch, ...]

    @property
    def mxus(self) -> int:
        return self.units.get("MATMUL") or self.units["MXU"]   # libtpu before 0.0.51 counts both in one column

    @property
    def rows_per_cycle(self) -> int:
        return 2 if self.mxus == 2 else 1

    def mxu_cycles(self, start: int, end: int) -> float:
        """Fewest cycles for the rows of these bundles, were they spread evenly over the MXUs."""
        rows = sum(rows for bundle in self.bundles[start:end] for _, rows in bundle.rows)
        return rows / self.mxus / self.rows_per_cycle

    def busiest_mxu(self, start: int, end: int) -> float:
        """The same for the MXU that gets most."""
        total: dict[int, int] = {}
        for bundle in self.bundles[start:end]:
            for mxu, rows in bundle.rows:
                total[mxu] = total.get(mxu, 0) + rows
        return max(total.values(), default=0) / self.rows_per_cycle

    def cost(self, start: int, end: int) -> float:
        """Cycles of one run through these bundles."""
        return max(end - start, self.busiest_mxu(start, end))

    def region(self, kind: str, start: int, end: int, depth: int) -> Region:
        """What bundles start..end use."""
        part = self.bundles[start:end]
        slots = {unit: sum(bundle.slots[i] for bundle in part) for i, unit in enumerate(self.units)}
        return Region(kind, start, end, depth, end - start, sum(bundle.slots[0] > 0 for bundle in part),
                      self.mxu_cycles(start, end), self.busiest_mxu(start, end), slots)

    def spans(self) -> list[tuple[str, int, int]]:
        """(kind, start, end) of the whole kernel, its loops and its conditional bodies, in program order."""
        found = [("all", 0, len(self.bundles))]
        for branch in self.branches:
            after = branch.at + branch.delay + 1
            if branch.target <= branch.at:
                found.append(("loop", branch.target, min(after, len(self.bundles))))
            elif branch.target > after:
                found.append(("when", after, branch.target))
        return found

    def regions(self) -> list[Region]:
        """Of every span, with how many others it stands in."""
        spans = self.spans()
        return [self.region(kind, start, end, sum(a <= start and end <= b and (a, b) != (start, end) for _, a, b in spans))
                for kind, start, end in spans]

    def summary(self) -> dict[str, float]:
        """A kernel with one kind of tile: cycles of the innermost body with most matmuls, of the other innermost bodies
        (first and last visit of a block), and what is left of the loop (a grid step that computes nothing)."""
        spans = self.spans()
        loops = sorted((span for span in spans if span[0] == "loop"), key=lambda span: span[1] - span[2])   # the grid's first
        whens = [span for span in spans if span[0] == "when"]
        inner = [a for a in whens if not any(b != a and a[1] <= b[1] and b[2] <= a[2] for b in whens)]
        if not loops:
            raise ValueError(f"{self.name}: no loop over the grid in it")
        _, low, high = loops[0]
        inside = [span for span in inner if low <= span[1] and span[2] <= high]
        if not inside:
            raise ValueError(f"{self.name}: no conditional body in its loop")
        tile = max(inside, key=lambda span: sum(bundle.slots[0] for bundle in self.bundles[span[1]:span[2]]))
        rest = sum(end - start for _, start, end in inside) - (tile[2] - tile[1])
        need = self.mxu_cycles(tile[1], tile[2])
        return {"tile_bundles": tile[2] - tile[1], "tile_mxu_cycles": need, "tile_cycles": max(tile[2] - tile[1], need),
                "first_last_bundles": rest, "step_bundles": high - low - (tile[2] - tile[1]) - rest}


def read_bundles(text: str) -> tuple[list[tuple[str, ...]], tuple[Branch, ...]]:
    """Instructions of every bundle of a `final_bundles` dump, and its branches.

    Comments go (they run over lines, and some hold another), but for two things that stand only there: names of a copy's
    operands (/*hbm=*/ becomes hbm=) and the bundles at which numbered regions start and end."""
    bundles: list[tuple[str, ...]] = []
    marks: list[str] = []
    starts: dict[int, int] = {}
    for chunk in _BUNDLE.split(text)[1:]:
        found = _MARK.findall(chunk)
        for kind, number in found:
            if kind != "End":
                starts.setdefault(int(number), len(bundles))
        marks.append("".join("E" if kind == "End" else "S" for kind, _ in found))
        body = _COMMENT.sub(lambda match: match[1] if re.fullmatch(r"\w+=", match[1]) else "", chunk)
        body = body[:body.rindex("}")]
        bundles.append(tuple(part.strip() for part in body.split(";;") if part.strip()))
    branches = []
    for i, instructions in enumerate(bundles):
        for instruction in instructions:
            if "sbr." not in instruction:
                continue
            match = _BRANCH.search(instruction)
            if not match:
                raise ValueError(f"bundle {i:#x}: a branch of unknown form: {instruction}")
            if int(match[3]) not in starts:
                raise ValueError(f"bundle {i:#x}: branch to region {match[3]}, which starts nowhere")
            delay = _delay(marks[i + 1:i + MOST_DELAY + 2]) if ".mrb[" in text else DELAY
            branches.append(Branch(i, starts[int(match[3])], match[2], match[1] == "!", delay))
    return bundles, tuple(branches)


def _delay(marks: list[str]) -> int:
    """Of a branch on TPU7x, from the marks of the bundles behind it: up to where a region starts, or else one ends."""
    for kind, last in (("S", 0), ("E", 1)):
        at = next((i for i, mark in enumerate(marks) if kind in mark), None)
        if at is not None:
            return min(at + last, MOST_DELAY)
    return MOST_DELAY


def read_utilization(text: str) -> tuple[dict[str, int], list[tuple[int, ...]]]:
    """({unit: slots per bundle}, slots used by each bundle) of a `final_hlo-static-per-bundle-utilization` dump."""
    units, rows = [], []
    for line in text.split("\n"):
        if "VALU" in line:
            units = [word.strip() for word in line.split(",")]
        words = line.split()
        if units and len(words) == len(units) and all(word.isdigit() for word in words):
            rows.append(tuple(int(word) for word in words))
    if not rows:
        raise ValueError("no utilization table in the dump")
    return dict(zip(units, rows[0], strict=True)), rows[1:]


def pushed(instructions: tuple[str, ...]) -> tuple[tuple[int, int], ...]:
    """(MXU, rows) of every vmatmul. Where the text does not name the unit, the instructions take turns."""
    found = []
    for text in instructions:
        for name in _VMATMUL.findall(text):
            mxu = _MXU.search(name)
            found.append((int(mxu[1]) if mxu else len(found), 16 if "bf16" in name else 8 if "f32" in name else 32))
    return tuple(found)


def parse(name: str, bundles: str, utilization: str) -> Dump:
    """A kernel from the texts of its two dumps."""
    instructions, branches = read_bundles(bundles)
    units, rows = read_utilization(utilization)
    if len(rows) != len(instructions):
        raise ValueError(f"{name}: {len(instructions)} bundles, but utilization of {len(rows)}")
    return Dump(name, units, tuple(Bundle(i, row, pushed(i)) for i, row in zip(instructions, rows, strict=True)), branches)


def kernels(folder: Path, match: str = "", everything: bool = False) -> Iterator[Dump]:
    """The Pallas kernels (`everything`: all fusions too) that a compile left in a folder, in the order of compilation."""
    for path in sorted(folder.glob("*-final_bundles.txt")):
        if "schedule-analysis" in path.name:
            continue
        key = re.sub(r"-\d+-final_bundles\.txt$", "", path.name)
        name = re.sub(r"^\d+-", "", key)
        escaped = re.sub(r"([*?[])", r"[\1]", key)   # names hold < and brackets
        tables = list(folder.glob(f"{escaped}-*-final_hlo-static-per-bundle-utilization.txt"))
        analyses = folder.glob(f"{escaped}-*-schedule-analysis_final_bundles.txt")
        if match not in name or not tables:
            continue
        text = path.read_text()
        if everything or "tpu_custom_call" in text or any("tpu_custom_call" in a.read_text() for a in analyses):
            yield parse(name, text, tables[0].read_text())


def table(dump: Dump) -> str:
    """The regions of a kernel, one a line, nested ones indented."""
    lines = [f"{dump.name}   slots in a bundle: " + " ".join(f"{unit}={n}" for unit, n in dump.units.items()),
             f"  {'region':18s} {'bundles':>13s} {'cycles':>7s} {'MXU min':>8s} {'MXU %':>6s} {'VALU %':>6s} {'EUP %':>6s} "
             f"{'VLD %':>6s} {'VST %':>6s} {'XLU %':>6s} {'fills':>6s} {'spills':>6s}"]
    for region in dump.regions():
        if region.bundles < 12:
            continue

        def share(unit: str, region: Region = region) -> str:
            return f"{100 * region.slots[unit] / region.bundles / dump.units[unit]:6.1f}"

        lines.append(f"  {'  ' * region.depth + region.kind:18s} {region.start:>6d}-{region.end:<6d} {region.bundles:7d} "
                     f"{region.busiest_mxu:8.0f} {100 * region.mxu_cycles / region.bundles:6.1f} {share('VALU')} "
                     f"{share('EUP')} {share('VLOAD')} {share('VSTORE')} {share('XLU')} {region.slots['VLOAD:FILL']:6d} "
                     f"{region.slots['VSTORE:SPILL']:6d}")
    return "\n".join(lines)
