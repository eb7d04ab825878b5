"""What a compiled program moves: which devices take part, over which mesh axes, how many bytes, how long on the links."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from neo.errors import InputError
from neo.plan.chips import Chip
from neo.plan.hlo import Op, Program, Shape, shapes

KINDS = ("all-gather", "reduce-scatter", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all",
         "collective-broadcast")
# Bytes/s one way over PCIe for one chip: "How To Scale Your Model" (jax-ml.github.io/scaling-book, "How to Think About TPUs").
HOST_BANDWIDTH = {"v6e": 32e9, "any": 15e9}
Torus = Sequence[tuple[int, bool]]   # chips along each side of a slice, and whether the side is a ring
_COPIES = ("copy-start", "slice-start", "dynamic-slice-start", "dynamic-update-slice-start")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_ORDER = re.compile(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$")
_IOTA = re.compile(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_AXIS = re.compile(r"'?([\w.]+)'?=(\d+)")


@dataclasses.dataclass(frozen=True)
class Groups:
    """Devices that work together, by their number in the program. For permutes the chains of senders and receivers."""

    members: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        """Devices of the largest group."""
        return max((len(group) for group in self.members), default=1)


def groups_of(op: Op, devices: int) -> Groups:
    """Who takes part in a collective. `devices`: of the program; no groups written means all of them in one.

    Understands XLA's three ways to write groups: lists `{{0,1},{2,3}}`, `[2,4]<=[4,2]T(1,0)` and
    `mesh['fsdp'=4,'tensor'=2] {'fsdp'}`, and the pairs of permutes. Raises InputError on any other.
    """
    pairs = re.search(r"source_target_pairs=(\{(?:\{\d+,\d+\},?)*\})", op.attributes)
    if pairs:
        return _chains(pairs[1])
    found = re.search(r"replica_groups=(mesh\[.*?\{[^}]*\}|\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?|\{(?:\{[\d,]*\},?)*\})",
                      op.attributes)
    if not found:
        if "replica_groups=" in op.attributes:
            raise InputError(f"replica groups of an unknown form in {op.kind} {op.name}: {op.attributes[:120]}")
        return Groups((tuple(range(devices)),))
    return _groups(found[1], devices)


@functools.cache
def _groups(text: str, devices: int) -> Groups:
    mesh, iota = _MESH.match(text), _IOTA.match(text)
    if mesh:
        return _mesh_groups(*mesh.groups(default=""))
    if iota:
        rows = _iota(iota[2], iota[3]).reshape(tuple(int(n) for n in iota[1].split(",")))
        return Groups(tuple(map(tuple, rows.reshape(-1, rows.shape[-1]).tolist())))
    lists = [tuple(int(n) for n in group.split(",") if n) for group in re.findall(r"\{([\d,]*)\}", text[1:-1])]
    return Groups(tuple(group for group in lists if group) or (tuple(range(devices)),))


def _iota(dims: str, order: str | None) -> np.ndarray:
    """Devices 0, 1, ... shaped by `dims`, its axes in `order`."""
    shape = tuple(int(n) for n in dims.split(","))
    numbers = np.arange(math.prod(shape)).reshape(shape)
    return numbers.transpose([int(n) for n in order.split(",")]) if order else numbers


def _mesh_groups(mesh: str, order: str, axes: str) -> Groups:
    """Groups along axes of a mesh. An axis may be written in part, `'a':(2)4` = its middle factor behind 2, and the
    mesh's devices in another order than 0, 1, ..., as `[2,4]T(1,0)` or a list."""
    sizes = {name: int(size) for name, size in _AXIS.findall(mesh)}
    numbers = np.arange(math.prod(sizes.values()))
    if order:
        short = _ORDER.match(order)
        numbers = (_iota(short[1], short[2]).reshape(-1) if short
                   else np.array([int(n) for n in re.findall(r"\d+", order)]))
    parts = {name: [(size, False)] for name, size in sizes.items()}
    for axis in filter(None, (part.strip() for part in axes.split(","))):
        found = re.fullmatch(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?", axis)
        if not found or found[1] not in sizes:
            raise InputError(f"replica groups of an unknown form: mesh[{mesh}] {{{axes}}}")
        name = found[1]
        before, size = (int(found[2]), int(found[3])) if found[2] else (1, sizes[name])
        split, passed = [], 1
        for part, taken in parts[name]:
            if passed <= before and before * size <= passed * part and not taken:
                lead = before // passed
                split += [(lead, False), (size, True), (part // lead // size, False)]
            else:
                split.append((part, taken))
            passed *= part
        parts[name] = split
    flat = [item for name in sizes for item in parts[name]]
    cube = numbers.reshape([size for size, _ in flat])
    inside = [i for i, (_, taken) in enumerate(flat) if taken]
    outside = [i for i, (_, taken) in enumerate(flat) if not taken]
    rows = cube.transpose(outside + inside).reshape(-1, math.prod(flat[i][0] for i in inside))
    return Groups(tuple(map(tuple, rows.tolist())))


@functools.cache
def _chains(text: str) -> Groups:
    group: dict[int, set[int]] = {}
    for a, b in re.findall(r"(\d+),(\d+)", text):
        joined = group.get(int(a), {int(a)}) | group.get(int(b), {int(b)})
        for device in joined:
            group[device] = joined
    return Groups(tuple(sorted({tuple(sorted(members)) for members in group.values()})))


@functools.lru_cache(maxsize=4096)
def _axes(groups: Groups, mesh: tuple[tuple[str, int], ...], devices: int) -> tuple[str, ...]:
    names, sizes = [name for name, _ in mesh], [size for _, size in mesh]
    ratio = math.prod(sizes) // devices if devices else 1
    for i, size in enumerate(sizes):       # a program of one slice of several: the outer axes go between them
        common = math.gcd(size, ratio)
        sizes[i], ratio = size // common, ratio // common
        if ratio == 1:
            break
    if math.prod(sizes) != devices or not groups.members:
        return ()
    first = np.array(np.unravel_index(np.array(groups.members[0]), sizes))
    moving = [i for i in range(len(sizes)) if sizes[i] > 1 and len(set(first[i])) > 1]
    if math.prod(sizes[i] for i in moving) != groups.size:
        return ()
    still = [i for i in range(len(sizes)) if i not in moving]
    rows = np.arange(devices).reshape(sizes).transpose(still + moving).reshape(-1, groups.size)
    expected = {frozenset(row) for row in rows.tolist()}
    return tuple(names[i] for i in moving) if all(frozenset(group) in expected for group in groups.members) else ()


def axes_of(groups: Groups, mesh: Mapping[str, int], devices: int) -> tuple[str, ...]:
    """Mesh axes that the groups run along, () where they are not whole axes. The program numbers its devices in the
    order of the mesh; in a program of several slices (`devices` fewer than the mesh) those of one slice only."""
    return _axes(groups, tuple(mesh.items()), devices)


def device_count(program: Program) -> int:
    """Devices that a program is compiled for; of several TPU slices those of one."""
    partitions, replicas = (int((re.search(rf"{key}=(\d+)", program.header) or [0, 1])[1])
                            for key in ("num_partitions", "replica_count"))
    return partitions * replicas


@dataclasses.dataclass(frozen=True)
class Transfer:
    """A collective as it stands in the program, bytes and seconds of one run.

    `arrays`: of its result, so of a reduce-scatter a device's shares; `bytes`: of the whole arrays. `network`: "ici",
    "dcn", and for arrays that are kept in the host's memory "to host" or "from host", with kind "copy". `source`: JAX's
    name stack.
    """

    kind: str
    name: str
    source: str
    groups: Groups
    arrays: tuple[Shape, ...]
    bytes: float
    wire_bytes: float
    seconds: float
    network: str

    @property
    def dtype(self) -> str:
        """Of its largest array."""
        return max(self.arrays, key=lambda array: array.bytes, default=Shape("", ())).dtype


def base_kind(op: Op) -> str | None:
    """The collective that an operation is, starts or ends; None for all others."""
    base = re.sub(r"-(?:start|done)$", "", op.kind)
    return base if base in KINDS else None


def whole_arrays(op: Op, kind: str) -> tuple[Shape, ...]:
    """Arrays of the operation's result, of a -start those that its -done returns. A reduce-scatter's are its shares."""
    if not op.kind.endswith("-start") or not op.type.startswith("("):
        return op.results
    parts = _parts(op.type)
    if kind == "all-reduce":
        return op.results
    return shapes(parts[1]) if len(parts) > 1 else op.results        # (operands, results, contexts)


def _parts(text: str) -> list[str]:
    """The outermost elements of a tuple type."""
    parts, depth, begin = [], 0, 1
    for i, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if (char == "," and depth == 1) or (depth == 0 and i):
            parts.append(text[begin:i].strip())
            begin = i + 1
            if depth == 0:
                break
    return parts


def links_share(size: int, chip: Chip, torus: Torus) -> float:
    """Part of a chip's links that a group of `size` devices uses: those along the sides of the torus that it must span.

    A group that runs along one side has only that side's two links, or one where the side is no ring. Mesh axes are
    taken to follow the sides, as `mesh_utils` lays them if it can. All links where `torus` is not given.
    """
    reach, links = chip.devices, 0
    for side, ring in sorted(torus, reverse=True):
        if side > 1 and (reach < size or not links):
            reach, links = reach * side, links + (2 if ring else 1)
    return links / (2 * len(torus)) if links else 1.0


def transfer(op: Op, kind: str, chip: Chip, devices: int, network: str | None = None, torus: Torus = ()) -> Transfer:
    """Bytes and time of a collective inside a slice, or over `network` "dcn".

    Conventions, ours: a device receives (n-1)/n of the array in an all-gather, reduce-scatter or all-to-all and twice that
    in an all-reduce, over the links of `links_share` in both directions; a permute sends the array over one link. An
    all-to-all pays for the bisection of the torus: n devices of a torus of d dimensions need d/8 n^(1/d) times what
    their bytes need, if that is more. No latency.
    """
    groups = groups_of(op, devices)
    arrays = whole_arrays(op, kind)
    n = groups.size
    whole = sum(array.bytes for array in arrays)
    # An all-reduce may be priced as a reduce-scatter (fused with a slice of it): its result is whole already.
    if kind == "reduce-scatter" and base_kind(op) == "reduce-scatter":
        whole *= n
    wire = whole * (n - 1) / n * (2 if kind == "all-reduce" else 1)
    if kind == "collective-permute":
        wire = whole
        seconds = wire / (chip.dcn_bandwidth if network == "dcn" else chip.link)
    elif network == "dcn":
        seconds = wire / chip.dcn_bandwidth
    else:
        seconds = wire / (chip.ici_bandwidth * links_share(n, chip, torus))
        if kind in ("all-to-all", "ragged-all-to-all") and chip.sides:
            seconds *= max(1.0, n ** (1 / chip.sides) / 8 * chip.sides)
    return Transfer(kind, op.name, op.source, groups, arrays, whole, wire, seconds, network or "ici")


def between_slices(op: Op, chip: Chip) -> Transfer | None:
    """A `send` that starts a collective between slices, None for any other: libtpu moves those through the hosts, and
    writes what they are into the operation. The group is slices; the array is what one device of a slice holds of it."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', op.attributes)
    if op.kind != "send" or not kind:
        return None
    target = re.search(r'_xla_megascale_target="\{([\d,:]*)\}', op.attributes)
    slices: list[int] = []
    for part in (target[1] if target else "").split(","):
        first, _, last = part.partition(":")
        slices += range(int(first), int(last or first) + 1) if first else ()
    array = op.results[0]
    n = max(len(slices), 1)
    name = kind[1].lower().replace("_", "-")
    whole = array.bytes * (n if name == "all-gather" else 1)
    wire = whole * (n - 1) / n * (2 if name == "all-reduce" else 1) if name in KINDS else whole
    return Transfer(name, op.name, op.source, Groups((tuple(slices),)), (array,), whole, wire, wire / chip.dcn_bandwidth,
                    "dcn")


def host_copy(op: Op, chip: Chip) -> Transfer | None:
    """The start of a copy between HBM and the host's memory (XLA's memory space 5), None for any other operation."""
    if op.kind not in _COPIES or "S(5)" not in op.type:
        return None
    first, second = _parts(op.type)[:2]
    result, operands = (first, second) if op.kind == "copy-start" else (second, first)
    # An update writes a part of a large array: only the part moves.
    moved = shapes(operands)[1:2] if op.kind == "dynamic-update-slice-start" else shapes(result)[:1]
    size = sum(array.bytes for array in moved)
    return Transfer("copy", op.name, op.source, Groups(((0,),)), moved, size, size,
                    size / HOST_BANDWIDTH.get(chip.name, HOST_BANDWIDTH["any"]), "to host" if "S(5)" in result else "from host")
