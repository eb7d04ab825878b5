"""What a run starts on, as one table: processes, devices, mesh, attention, compiler flags, versions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from neo.config import Config
from neo.parallel import compiler_flags

if TYPE_CHECKING:
    import jax

# Packages that decide what the devices of a platform execute; those that are not installed are left out.
_PACKAGES = {"cpu": (), "tpu": ("libtpu",), "gpu": ("jax-cuda12-plugin", "jax-cuda13-plugin")}


def table(config: Config, mesh: jax.sharding.Mesh, attention: str, dtype: str) -> list[str]:
    """The table's lines. `attention`: the implementation and why it was chosen; `dtype`: of activations and products.

    Call it after JAX has started.
    """
    import jax
    devices, local = mesh.devices.flat, jax.local_devices()
    first = devices[0]
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    host, *more = versions(first)
    flags = compiler_flags.report(compiler_flags.inspect(config.train.compiler_flags))
    rows = [
        ("processes", f"{jax.process_count()}, this is number {jax.process_index()}, with {len(local)} of the devices"),
        ("devices", f"{mesh.devices.size} x {first.device_kind} ({first.platform})"
         + (f" in {slices} slices" if slices > 1 else "")),
        ("mesh", " ".join(f"{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "of one"),
        ("attention", attention),
        ("precision", f"{dtype} products, float32 parameters; remat {config.train.remat}"),
        ("flags", flags[0]), *(("", line) for line in flags[1:]),
        ("versions", host), *(("", line) for line in more),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"{name:<{width}}  {text}" for name, text in rows]


def versions(device: jax.Device, root: Path = Path("/")) -> list[str]:
    """Packages on one line; the runtime that JAX talks to and the GPU driver on lines of their own, where there are any.

    `root` holds the kernel's proc/ folder.
    """
    found = []
    for name in ("jax", "jaxlib", *_PACKAGES.get(device.platform, ())):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    lines = [", ".join(found)]
    if device.platform != "cpu":
        # "PJRT C API\ncuda 12090" on GPUs; on TPUs a second line with the build's date.
        said = [line.strip() for line in str(device.client.platform_version).splitlines()]
        lines.append("runtime: " + ", ".join(_cuda(line) for line in said if line and line != "PJRT C API"))
    if driver := nvidia_driver(root):
        lines.append(f"NVIDIA driver {driver}")
    return lines


def _cuda(line: str) -> str:
    """"cuda 12090" -> "CUDA 12.9"; other lines as they are."""
    found = re.fullmatch(r"cuda (\d+)", line)
    return f"CUDA {int(found[1]) // 1000}.{int(found[1]) % 1000 // 10}" if found else line


def nvidia_driver(root: Path = Path("/")) -> str:
    """Version of the NVIDIA kernel driver; "" without one."""
    try:
        text = (root / "proc/driver/nvidia/version").read_text()
    except OSError:
        return ""
    found = re.search(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)\s", text)   # after "for x86_64", where that stands
    return found[1] if found else ""


def facts(config: Config) -> Mapping[str, object]:
    """For environment.json: the flags in force, and the driver."""
    applied = compiler_flags.inspect(config.train.compiler_flags)
    return {"chip": applied.chip.name or None, "compiler_flags": [flag.text for flag in applied.active]
            + [f"--{flag.name}={value}" for flag, value in applied.users], "nvidia_driver": nvidia_driver() or None}
