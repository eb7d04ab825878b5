"""Names of sets of devices, and what they stand for.

    v5p:4x4x4        64 TPU v5p chips as a torus of 4 x 4 x 4
    2*v6e:16x16      two slices of 256 chips each; only `replica` goes between them
    h100:8x4         4 nodes of 8 GPUs
    v5p-128          a product: 128 cores, so 64 chips

A side of a TPU slice is a ring only where the machine closes it: on v4, v5p and TPU7x when every side is a multiple of 4 (whole
cubes of 64 chips; cloud.google.com/tpu/docs/v5p), on v5e and v6e a side of 16 chips. libtpu's plain names know nothing of
that: they stand for a mesh, where an all-gather over the slice compiles to a zero-fill and an all-reduce (v4, v5p, TPU7x),
or goes along one dimension where it could use two (v6e).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from neo.errors import InputError, nearest
from neo.plan.chips import BY_NAME, GBIT, Chip

if TYPE_CHECKING:
    import jax

CUBE = 4   # chips along a side of the cubes that v4, v5p and TPU7x slices are made of
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_SMALL = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))
# Most chips in one slice: cloud.google.com/tpu/docs/v4 (a pod), v5p (largest job), tpu7x (a pod).
_MOST = {"v4": 4096, "v5p": 6144, "tpu7x": 9216}
# Shapes that `list` prints; others are taken too.
_CUBES = (*_SMALL, (4, 4, 4), (4, 4, 8), (4, 8, 8), (8, 8, 8), (8, 8, 16))
_SHOWN = {"v4": _CUBES, "v5e": _FLAT, "v5p": _CUBES, "v6e": _FLAT, "tpu7x": _CUBES}
_LIBTPU = {"v4": "v4", "v5e": "v5e", "v5p": "v5", "v6e": "v6e", "tpu7x": "tpu7x"}   # its names


@dataclasses.dataclass(frozen=True)
class Product:
    """Machines with 8 GPUs as they are sold. `network`: bytes/s for one GPU between them, one way."""

    kind: str
    network: float
    source: str


# Of what the network carries, the part that serves the GPUs.
PRODUCTS = {
    "a2-highgpu-8g": Product("a100-40", 100 * GBIT / 8, "cloud.google.com/compute/docs/gpus: 100 Gbps a machine"),
    "a2-ultragpu-8g": Product("a100", 100 * GBIT / 8, "cloud.google.com/compute/docs/gpus: 100 Gbps a machine"),
    "a3-highgpu-8g": Product("h100", 4 * 200 * GBIT / 8, "cloud.google.com/compute/docs/gpus: 4 GPU NICs of 200 Gbps"),
    "a3-megagpu-8g": Product("h100", 200 * GBIT, "cloud.google.com/compute/docs/gpus: 8 GPU NICs of 200 Gbps"),
    "a3-ultragpu-8g": Product("h200", 400 * GBIT, "cloud.google.com/compute/docs/gpus: 8 GPU NICs of 400 Gbps"),
    "a4-highgpu-8g": Product("b200", 400 * GBIT, "cloud.google.com/compute/docs/gpus: 8 GPU NICs of 400 Gbps"),
    "p4d.24xlarge": Product("a100-40", 400 * GBIT / 8, "aws.amazon.com/ec2/instance-types/p4: 400 Gbps a machine"),
    "p4de.24xlarge": Product("a100", 400 * GBIT / 8, "aws.amazon.com/ec2/instance-types/p4: 400 Gbps a machine"),
    "p5.48xlarge": Product("h100", 400 * GBIT, "aws.amazon.com/ec2/instance-types/p5: 3200 Gbps a machine"),
    "p5en.48xlarge": Product("h200", 400 * GBIT, "aws.amazon.com/ec2/instance-types/p5: 3200 Gbps a machine"),
    "p6-b200.48xlarge": Product("b200", 400 * GBIT, "aws.amazon.com/ec2/instance-types/p6: 3200 Gbps a machine"),
    "nd96asr-v4": Product("a100-40", 200 * GBIT, "learn.microsoft.com, ND A100 v4 series: 8 x 200 Gb/s"),
    "nd96amsr-a100-v4": Product("a100", 200 * GBIT, "learn.microsoft.com, NDm A100 v4 series: 8 x 200 Gb/s"),
    "nd96isr-h100-v5": Product("h100", 400 * GBIT, "learn.microsoft.com, ND H100 v5 series: 8 x 400 Gb/s"),
    "nd96isr-h200-v5": Product("h200", 400 * GBIT, "learn.microsoft.com, ND H200 v5 series: 8 x 400 Gb/s"),
    "dgx-a100": Product("a100", 200 * GBIT, "NVIDIA DGX A100 data sheet"),
    "dgx-h100": Product("h100", 400 * GBIT, "NVIDIA DGX H100 data sheet"),
    "dgx-h200": Product("h200", 400 * GBIT, "NVIDIA DGX H200 data sheet"),
    "dgx-b200": Product("b200", 400 * GBIT, "NVIDIA DGX B200 data sheet"),
}
# Products that are numbered: name -> (kind, cores that one chip counts for).
_NUMBERED = {"v4": ("v4", 2), "v5p": ("v5p", 2), "tpu7x": ("tpu7x", 2), "v5litepod": ("v5e", 1), "v5e": ("v5e", 1),
             "v6e": ("v6e", 1)}


@dataclasses.dataclass(frozen=True)
class Topology:
    """A set of devices to plan for.

    Attributes:
        name: the short name; `parse` of it gives the same topology.
        kind: name of its chip.
        shape: chips along each side of one slice; of GPUs (per node, nodes).
        slices: equal slices, joined by the network.
        devices: JAX devices in all.
        dcn_bandwidth: bytes/s of one device between slices or nodes, one way.
        note: how a product's name was understood; "" where there was nothing to translate.
    """

    name: str
    kind: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int
    devices: int
    dcn_bandwidth: float
    note: str = ""

    @property
    def platform(self) -> str:
        """JAX's: "tpu" or "gpu"."""
        return self.chip.platform

    @property
    def chips(self) -> int:
        """Chips in all."""
        return self.devices // self.chip.devices

    @property
    def wrap(self) -> tuple[bool, bool, bool]:
        """Which sides of a TPU slice are rings."""
        if self.platform != "tpu":
            return (False, False, False)
        if self.chip.sides == 2:
            return (self.shape[0] == 16, self.shape[1] == 16, False)
        return (all(side % CUBE == 0 for side in self.shape),) * 3

    @property
    def torus(self) -> tuple[tuple[int, bool], ...]:
        """Sides of a TPU slice, each with whether it is a ring; empty for GPUs."""
        return tuple(zip(self.shape, self.wrap, strict=False)) if self.platform == "tpu" else ()

    @property
    def granules(self) -> int:
        """Sets of devices that only the slow network joins: slices, or nodes of GPUs."""
        return self.shape[1] if self.platform == "gpu" else self.slices


def parse(name: str) -> Topology:
    """The topology of a name. InputError, with the known ones, where there is none."""
    text = name.strip().lower().replace("×", "x").replace("_", "-")
    match = re.fullmatch(r"(?:(\d+)\s*\*\s*)?([a-z][\w.-]*?)(?:\s*:\s*|\s+x\s*|(?<=\dg)x|(?<=large)x|$)([\dx]*)", text)
    if not match:
        raise _unknown(name)
    count, kind, sides = int(match[1] or 1), match[2], match[3]
    numbered = re.fullmatch(r"([a-z0-9]+?)-(\d+)", kind)
    if count < 1:
        raise InputError(f"--topology={name}: the number of slices is at least 1")
    if kind in PRODUCTS:
        return _machines(name, kind, sides, count)
    if kind in BY_NAME:
        if not re.fullmatch(r"\d+(x\d+)*", sides):
            raise InputError(f"--topology={name}: the shape is missing, as in {_example(kind)}")
        shape = tuple(int(side) for side in sides.split("x"))
        return _gpus(name, kind, shape, count) if BY_NAME[kind].platform == "gpu" else _slice(name, kind, shape, count)
    if numbered and numbered[1] in _NUMBERED and not sides:
        return _numbered(name, *numbered.groups(), count)
    raise _unknown(name)


def known() -> tuple[str, ...]:
    """Names that `--topology=list` prints, one of each shape."""
    tpus = (f"{kind}:{_text(shape)}" for kind, shapes in _SHOWN.items() for shape in shapes)
    gpus = (f"{kind}:8x{nodes}" for kind, chip in BY_NAME.items() if chip.platform == "gpu" for nodes in (1, 4, 16))
    return (*tpus, *gpus)


def table() -> str:
    """What `--topology=list` prints: every kind with its shapes, and the products that are translated."""
    lines = ["chip:shape; N*chip:shape for N slices of TPUs"]
    for kind, shapes in _SHOWN.items():
        more = f" ... multiples of 4 up to {_MOST[kind]} chips" if kind in _MOST else ""
        lines.append(f"  {kind:8} {' '.join(_text(shape) for shape in shapes)}{more}")
    lines.append("gpu:GPUSxNODES, GPUS in each node")
    for kind, chip in BY_NAME.items():
        if chip.platform == "gpu":
            lines.append(f"  {kind:8} 8x1 8x4 8x16 ...   {chip.device_kind}")
    lines.append("products, translated")
    lines.append("  v4-N, v5p-N, tpu7x-N (N cores = N/2 chips), v5litepod-N, v5e-N, v6e-N (N chips)")
    lines += [f"  {name + ':NODES':24} {product.kind}" for name, product in PRODUCTS.items()]
    return "\n".join(lines)


def libtpu_arguments(topology: Topology) -> dict[str, Any]:
    """Arguments of `jax.experimental.topologies.get_topology_desc` for a topology of TPUs, with its rings closed."""
    shape = (*topology.shape, 1)[:3]
    arguments: dict[str, Any] = {
        "topology_name": f"{_LIBTPU[topology.kind]}:{_text(topology.shape)}", "num_slices": topology.slices,
        "chips_per_host_bounds": (1, 1, 1) if math.prod(shape) == 1 else (2, 2, 1)}
    if topology.kind in ("v4", "v5p"):   # both cores of a chip as one device, as Cloud TPU hands them out
        arguments["chip_config_name"] = "megacore"
    if any(topology.wrap):
        arguments["wrap"] = topology.wrap
    return arguments


@functools.lru_cache(maxsize=4)
def tpu_devices(topology: Topology) -> tuple[jax.Device, ...]:
    """Devices to compile for, none of them there. Loads libtpu, in an environment as `neo.plan.libtpu.environment` makes it.

    Raises InputError for GPUs, where libtpu is missing, and where it does not know the shape.
    """
    from jax.experimental import topologies

    from neo.plan import libtpu

    if topology.platform != "tpu":
        raise InputError(f"--topology={topology.name}: only TPU programs are compiled without the device")
    libtpu.version()
    try:
        found = topologies.get_topology_desc(platform="tpu", **libtpu_arguments(topology)).devices
    except Exception as error:   # JAX raises what C++ says, of several types
        raise InputError(f"--topology={topology.name}: libtpu {libtpu.version()} refuses it: "
                         f"{(str(error).splitlines() or [''])[0][:200]}") from error
    if len(found) != topology.devices:
        raise InputError(f"--topology={topology.name}: libtpu {libtpu.version()} makes {len(found)} devices of it, "
                         f"{topology.devices} are expected")
    return tuple(found)


def _slice(name: str, kind: str, shape: tuple[int, ...], slices: int, note: str = "") -> Topology:
    chip = BY_NAME[kind]
    if chip.sides == 2:
        ordered, right = tuple(sorted(shape)), tuple(sorted(shape)) in _FLAT
        could = f"one of {', '.join(_text(one) for one in _FLAT)}"
    else:
        small = {tuple(sorted(one)): one for one in (*_SMALL, *([(1, 1, 1)] if kind == "tpu7x" else []))}
        ordered = small.get(tuple(sorted(shape)), tuple(sorted(shape)))
        whole = len(shape) == 3 and min(shape) > 0 and all(side % CUBE == 0 for side in shape)
        right = ordered in small.values() or (whole and math.prod(shape) <= _MOST[kind])
        could = (f"one of {', '.join(_text(one) for one in small.values())}, or three multiples of {CUBE} of at most "
                 f"{_MOST[kind]} chips")
    if not right:
        raise InputError(f"--topology={name}: no {kind} slice has the shape {_text(shape)}; {could}")
    if ordered != shape:
        note = note or f"{kind}:{_text(shape)} is written {kind}:{_text(ordered)}"
    short = f"{f'{slices}*' if slices > 1 else ''}{kind}:{_text(ordered)}"
    return Topology(short, kind, chip, ordered, slices, math.prod(ordered) * chip.devices * slices, chip.dcn_bandwidth, note)


def _numbered(name: str, product: str, number: str, slices: int) -> Topology:
    kind, per_chip = _NUMBERED[product]
    n, chip = int(number), BY_NAME[kind]
    shape = _shape_of(kind, n // per_chip) if n and n % per_chip == 0 else None
    if shape is None:
        raise InputError(f"--topology={name}: there is no {product}-{n}; "
                         f"{f'the number counts cores, {per_chip} a chip; ' if per_chip > 1 else ''}"
                         f"known: {', '.join(f'{product}-{math.prod(one) * per_chip}' for one in _SHOWN[kind])}, ...")
    chips = math.prod(shape)
    short = f"{f'{slices}*' if slices > 1 else ''}{kind}:{_text(shape)}"
    if per_chip == 1:
        what = f"{chips} chips"
    elif chip.devices == 1:
        what = f"{n} cores = {chips} chips; a chip is one JAX device"
    else:
        what = f"{n} cores = {chips} chips; each core is a JAX device"
    return _slice(name, kind, shape, slices, note=f"{name} has {what}: {short}")


def _shape_of(kind: str, chips: int) -> tuple[int, ...] | None:
    """The shape that a product with so many chips has: the one nearest to a cube."""
    if BY_NAME[kind].sides == 2:
        return next((shape for shape in _FLAT if math.prod(shape) == chips), None)
    small = next((shape for shape in _SMALL if math.prod(shape) == chips), None)
    if small or chips % CUBE**3 or chips > _MOST[kind]:
        return small
    cubes = chips // CUBE**3
    found = [(a, b, cubes // a // b) for a in range(1, cubes + 1) if cubes % a == 0
             for b in range(a, cubes // a + 1) if cubes // a % b == 0 and cubes // a // b >= b]
    return tuple(CUBE * side for side in min(found, key=sum))


def _gpus(name: str, kind: str, shape: tuple[int, ...], slices: int) -> Topology:
    if slices > 1:
        raise InputError(f"--topology={name}: GPUs have nodes, not slices; as in {kind}:8x{slices}")
    if len(shape) != 2 or min(shape) < 1 or shape[0] > 8:
        raise InputError(f"--topology={name}: GPUs are given as gpus-per-node x nodes, at most 8 in a node, as in {kind}:8x4")
    chip = BY_NAME[kind]
    return Topology(f"{kind}:{_text(shape)}", kind, chip, shape, 1, math.prod(shape), chip.dcn_bandwidth,
                    "a100 is the card with 80 GB; a100-40 is the one with 40" if kind == "a100" else "")


def _machines(name: str, product: str, nodes: str, count: int) -> Topology:
    if nodes and (count > 1 or not nodes.isdigit() or int(nodes) < 1):
        raise InputError(f"--topology={name}: the number of machines is given once, as in {product}:4")
    number = int(nodes) if nodes else count
    kind, network = PRODUCTS[product].kind, PRODUCTS[product].network
    note = (f"{number} x {product}: {8 * number} {BY_NAME[kind].device_kind}, 8 a node, each with {network / GBIT:g} Gb/s "
            f"of network ({PRODUCTS[product].source})")
    return Topology(f"{product}:{number}", kind, BY_NAME[kind], (8, number), 1, 8 * number, network, note)


def _unknown(name: str) -> InputError:
    names = (*BY_NAME, *PRODUCTS)
    kind = re.split(r"[:*]", name.strip())[-2 if ":" in name else -1].strip()
    return InputError(f"--topology={name}: unknown{nearest(kind, names)}; chips: {', '.join(BY_NAME)}, with a shape, as in "
                      "v5p:4x4x4 or h100:8x4; products, as in v5p-128 or a3-highgpu-8g:4; --topology=list prints all")


def _example(kind: str) -> str:
    return {2: f"{kind}:16x16", 3: f"{kind}:4x4x4"}.get(BY_NAME[kind].sides, f"{kind}:8x4")


def _text(shape: Sequence[int]) -> str:
    return "x".join(str(side) for side in shape)
