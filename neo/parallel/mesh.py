"""From `mesh` in the config to a `jax.sharding.Mesh` with five named axes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from neo.config.schema import MeshConfig
from neo.errors import InputError

if TYPE_CHECKING:
    import jax

# `replica` spans slices (DCN) and is outermost; `tensor` needs the fastest links and is innermost.
AXES = ("replica", "fsdp", "expert", "context", "tensor")
BATCH_AXES = ("replica", "fsdp", "expert")


def mesh_shape(config: MeshConfig, num_devices: int) -> tuple[int, ...]:
    """Sizes of `AXES` on `num_devices` devices; the one -1 takes what the others leave.

    Raises InputError when the product cannot be the number of devices.
    """
    sizes = [getattr(config, axis) for axis in AXES]
    for axis, size in zip(AXES, sizes, strict=True):
        if size != -1 and size < 1:
            raise InputError(f"config.mesh.{axis}={size}: use a positive number, or -1 for all devices that are left")
    if sizes.count(-1) > 1:
        names = [axis for axis, size in zip(AXES, sizes, strict=True) if size == -1]
        raise InputError(f"config.mesh: only one axis may be -1, not {' and '.join(names)}")
    fixed = math.prod(size for size in sizes if size != -1)
    asked = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True) if size not in (1, -1))
    if -1 in sizes:
        if num_devices % fixed:
            raise InputError(f"config.mesh: {asked} needs a multiple of {fixed} devices, this run has {num_devices}")
        sizes[sizes.index(-1)] = num_devices // fixed
    elif fixed != num_devices:
        raise InputError(f"config.mesh: {asked or 'every axis 1'} needs {fixed} devices, this run has {num_devices}; "
                         f"set one axis to -1 to use all")
    return tuple(sizes)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh with `AXES` over `devices` (default: all), in an order that follows the physical links.

    `jax.make_mesh` orders the devices; a reshaped list would turn all-gathers into all-reduces on a
    TPU torus. Axis types are Auto: the compiler propagates shardings from the constraints.

    Raises InputError as `mesh_shape`, and where the axes do not fit the sides of a TPU slice.
    """
    import jax

    devices = list(devices if devices is not None else jax.devices())
    shape = mesh_shape(config, len(devices))
    auto = (jax.sharding.AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=auto, devices=devices)
    except NotImplementedError as error:   # a TPU slice of 4 x 4 x 4 chips has no ring of 8 along its links
        asked = " x ".join(f"{axis}={size}" for axis, size in zip(AXES, shape, strict=True) if size > 1)
        raise InputError(f"config.mesh: {asked} does not follow the links between these {len(devices)} devices: each axis "
                         f"must be a product of whole sides of the slice ({str(error).split('. ')[0]})") from error
