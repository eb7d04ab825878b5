"""From `mesh` in the config to a `jax.sharding.Mesh` with five named axes.

    replica   whole copies of the parameters; the only axis between TPU slices
    fsdp      parameters, optimizer state and batch in parts
    expert    experts; a dense model splits its batch over it
    context   sequences in parts
    tensor    heads, feed-forward width, vocabulary; inside a node of GPUs

Plain data parallelism is replica=-1 with fsdp=1; one copy per slice, or per node of GPUs, is replica=<their number>. The name
`stage` is kept free for pipelines.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from neo.config.schema import MeshConfig
from neo.errors import InputError

if TYPE_CHECKING:
    import jax
    import numpy as np

# `replica` spans slices (DCN) and is outermost; `tensor` needs the fastest links and is innermost.
AXES = ("replica", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("replica", "fsdp", "expert")
# Where JAX lets an axis of the mesh be part of a side of the slice (`jax.make_mesh`, both supported versions).
_SPLITS_SIDES = ("TPU v5 lite", "TPU v5e")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of `AXES` on `num_devices` devices; the one -1 takes what the others leave.

    Raises InputError when the product cannot be the number of devices, with the nearest sizes that can.
    """
    return _shape(config, num_devices, lambda sizes: True)


def _shape(config: MeshConfig, num_devices: int, works: Callable[[Sequence[int]], bool]) -> tuple[int, ...]:
    sizes = [getattr(config, axis) for axis in AXES]
    for axis, size in zip(AXES, sizes, strict=True):
        if size != -1 and size < 1:
            raise InputError(f"config.mesh.{axis}={size}: use a positive number, or -1 for all devices that are left")
    if sizes.count(-1) > 1:
        names = [axis for axis, size in zip(AXES, sizes, strict=True) if size == -1]
        raise InputError(f"config.mesh: only one axis may be -1, not {' and '.join(names)}")
    asked, fixed = tuple(sizes), math.prod(size for size in sizes if size != -1)
    text = _text(asked)
    if -1 in sizes:
        if num_devices % fixed:
            raise InputError(f"config.mesh: {text} needs a multiple of {fixed} devices, this run has {num_devices}"
                             f"{_instead(asked, num_devices, works)}")
        sizes[sizes.index(-1)] = num_devices // fixed
    elif fixed != num_devices:
        raise InputError(f"config.mesh: {text or 'every axis 1'} needs {fixed} devices, this run has {num_devices}; "
                         f"set one axis to -1 to use all{_instead(asked, num_devices, works)}")
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with `AXES` over `devices` (default: all), in an order that follows the physical links.

    `jax.make_mesh` orders the devices of a slice; a reshaped list would turn all-gathers into all-reduces on a
    TPU torus. Several slices lie along `replica`, nodes of GPUs one after the other. Axis types are Auto: the
    compiler propagates shardings from the constraints. (`jax.make_mesh` itself refuses several slices, and takes nodes of
    GPUs for slices.)

    Raises InputError as `mesh_shape`, and where the axes do not fit the sides of a TPU slice, the number of slices, or
    a node of GPUs.
    """
    import jax

    devices = list(devices if devices is not None else jax.devices())
    groups = granules(devices)
    links = _links(groups)
    shape = _shape(config, len(devices), links)
    asked = tuple(getattr(config, axis) for axis in AXES)
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    if devices[0].platform == "gpu":
        return jax.sharding.Mesh(_over_nodes(groups, shape, asked, links), AXES, axis_types=auto)
    try:
        if len(groups) > 1:
            return jax.sharding.Mesh(_over_slices(groups, shape, asked, links), AXES, axis_types=auto)
        return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
    except NotImplementedError as error:   # a TPU slice of 4 x 4 x 4 chips has no ring of 8 along its links
        nearest, why = _instead(asked, len(devices), links), str(error).split(". ")[0]
        raise InputError(f"config.mesh: {_text(shape)} does not follow the links between these {len(devices)} devices: each "
                         f"axis must be a product of whole sides of the slice{nearest} ({why})") from error


def granules(devices: Sequence[Any]) -> list[list[Any]]:
    """The devices by what fast links join: TPU slices, nodes of GPUs; all others are one.

    A GPU's node is JAX's slice_index (XLA gives one to each boot identity of a machine: pjrt/distributed/topology_util.cc),
    else its process, where processes have several.
    """
    platform, found = devices[0].platform, {}
    one_each = len({device.process_index for device in devices}) == len(devices)
    for device in devices:
        key = getattr(device, "slice_index", None) if platform in ("tpu", "gpu") else 0
        if key is None:
            key = device.process_index if platform == "gpu" and not one_each else 0
        found.setdefault(key, []).append(device)
    return [found[key] for key in sorted(found)]


def follows_links(sizes: Sequence[int], sides: Sequence[int], slices: int = 1) -> bool:
    """Whether a mesh can lie along the links of TPU slices: each axis a product of whole sides, `replica` over the slices.

    Args:
        sizes: of `AXES`.
        sides: devices along each side of one slice; of TPU7x also the 2 of a chip.
    """
    if sizes[0] % slices:
        return False
    wanted = sorted((size for size in (sizes[0] // slices, *sizes[1:]) if size > 1), reverse=True)
    return _covers(wanted, [side for side in sides if side > 1])


def _covers(wanted: Sequence[int], sides: Sequence[int]) -> bool:
    """Whether `sides` can be dealt out so that each of `wanted` is the product of its share."""
    if not wanted:
        return not sides
    for mask in range(1, 2 ** len(sides)):
        share = [side for i, side in enumerate(sides) if mask >> i & 1]
        if math.prod(share) == wanted[0] and _covers(wanted[1:], [s for i, s in enumerate(sides) if not mask >> i & 1]):
            return True
    return False


def _links(groups: list[list[Any]]) -> Callable[[Sequence[int]], bool]:
    """Whether sizes of `AXES` suit these devices."""
    first = groups[0][0]
    if first.platform == "gpu":
        return lambda sizes: len(groups) == 1 or all(len(group) % sizes[-1] == 0 for group in groups)
    if first.platform != "tpu":
        return lambda sizes: True
    if first.device_kind in _SPLITS_SIDES:
        return lambda sizes: sizes[0] % len(groups) == 0
    sides = _sides(groups[0])
    return lambda sizes: follows_links(sizes, sides, len(groups))


def _over_slices(groups: list[list[Any]], shape: tuple[int, ...], asked: tuple[int, ...],
                 links: Callable[[Sequence[int]], bool]) -> np.ndarray:
    """Devices of several TPU slices: only `replica` goes from one to the next."""
    from jax.experimental import mesh_utils

    slices = len(groups)
    if len({len(group) for group in groups}) > 1:
        raise InputError(f"the {slices} slices of this run have {', '.join(str(len(group)) for group in groups)} devices; "
                         "they must be equal")
    if shape[0] % slices:
        raise InputError(f"config.mesh.replica={shape[0]} on {slices} slices: only replica may go between slices, so it must "
                         f"be a multiple of {slices}{_instead(asked, math.prod(shape), links)}")
    inside = (shape[0] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1, 1, 1), [device for group in groups for device in group],
                                                allow_split_physical_axes=groups[0][0].device_kind in _SPLITS_SIDES)


def _over_nodes(groups: list[list[Any]], shape: tuple[int, ...], asked: tuple[int, ...],
                links: Callable[[Sequence[int]], bool]) -> np.ndarray:
    """GPUs, node by node, so that the innermost axes stay inside one."""
    import numpy as np

    if not links(shape):
        sizes = [len(group) for group in groups]
        raise InputError(f"config.mesh.tensor={shape[-1]} would cross nodes of {min(sizes)} GPUs, whose network is many times "
                         f"slower than the links inside: use a divisor of {math.gcd(*sizes)}"
                         f"{_instead(asked, math.prod(shape), links)}")
    ordered = np.empty(math.prod(shape), dtype=object)
    ordered[:] = [device for group in groups for device in sorted(group, key=lambda one: one.id)]
    return ordered.reshape(shape)


def _sides(devices: Sequence[Any]) -> tuple[int, ...]:
    """Devices along each side of a TPU slice, with those of one chip as a side of their own."""
    if not hasattr(devices[0], "coords"):
        return (len(devices),)
    places = [(*device.coords, device.core_on_chip) for device in devices]
    return tuple(max(place) - min(place) + 1 for place in zip(*places, strict=True))


def _instead(asked: tuple[int, ...], num_devices: int, works: Callable[[Sequence[int]], bool]) -> str:
    """`; nearest that works: --config.mesh...`, or nothing: sizes of the axes in use whose product is `num_devices`.

    Nearest by the sum of the ratios' logarithms, then the smaller inner axes (ours); -1 costs nothing. `fsdp` may
    always change, an axis of 1 may not, but for `replica` where nothing else helps (several slices).
    """
    def cost(sizes: Sequence[int]) -> tuple:
        far = 0.0
        for axis, size, want in zip(AXES, sizes, asked, strict=True):
            if want != -1:   # `fsdp` gives way first, and an axis that was asked for should stay
                far += (0.9 if axis == "fsdp" else 1) * abs(math.log2(size / want)) + (size == 1 < want)
        return round(far, 6), tuple(reversed(sizes))

    for more in ((), ("replica",)):
        free = [size != 1 or axis in ("fsdp", *more) for axis, size in zip(AXES, asked, strict=True)]
        for sizes in sorted(_products(num_devices, free), key=cost):
            if works(sizes):
                changed = [f"--config.mesh.{axis}={size}" for axis, size, want in zip(AXES, sizes, asked, strict=True)
                           if want not in (size, -1)]
                return f"; nearest that works: {' '.join(changed)}" if changed else ""
    return ""


def _products(number: int, free: Sequence[bool]) -> Iterator[tuple[int, ...]]:
    """All tuples of sizes with this product, 1 where not `free`."""
    if not free:
        if number == 1:
            yield ()
        return
    for size in range(1, number + 1) if free[0] else (1,):
        if number % size == 0:
            for rest in _products(number // size, free[1:]):
                yield (size, *rest)


def _text(sizes: Sequence[int]) -> str:
    return " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True) if size not in (1, -1))
