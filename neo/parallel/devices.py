"""What a device can do: peak FLOP/s, bfloat16 units, memory. Data, with sources."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import jax


@dataclasses.dataclass(frozen=True)
class Peak:
    """Dense matrix FLOP/s of one JAX device in the dtype it trains in."""

    match: str          # part of jax.Device.device_kind, first match wins
    flops: float
    source: str
    bfloat16: bool = True


# One row per device kind that JAX names; dense, no sparsity. TPU v4 and v5p appear as one megacore device per chip.
PEAKS = (
    Peak("TPU7x", 2307e12 / 2, "cloud.google.com/tpu/docs/tpu7x: 2307 TFLOP/s a chip of two devices"),
    Peak("TPU v6", 918e12, "cloud.google.com/tpu/docs/v6e"),
    Peak("TPU v5 lite", 197e12, "cloud.google.com/tpu/docs/v5e"),
    Peak("TPU v5e", 197e12, "cloud.google.com/tpu/docs/v5e"),
    Peak("TPU v5", 459e12, "cloud.google.com/tpu/docs/v5p"),
    Peak("TPU v4", 275e12, "cloud.google.com/tpu/docs/v4"),
    Peak("B200", 2250e12, "NVIDIA DGX B200 data sheet, dense"),
    Peak("H200", 989e12, "NVIDIA H200 data sheet, dense"),
    Peak("H100 PCIe", 756e12, "NVIDIA H100 data sheet, dense"),
    Peak("H100", 989e12, "NVIDIA H100 data sheet, SXM, dense"),
    Peak("A100", 312e12, "NVIDIA A100 data sheet"),
    Peak("L40S", 362e12, "NVIDIA L40S data sheet, dense"),
    Peak("L4", 121e12, "NVIDIA L4 data sheet, dense"),
    Peak("T4", 8.1e12, "NVIDIA T4 data sheet, float32 (no bfloat16 units)", bfloat16=False),
    Peak("V100", 15.7e12, "NVIDIA V100 data sheet, float32 (no bfloat16 units)", bfloat16=False),
)


def peak_of(device_kind: str) -> Peak | None:
    """The row of `PEAKS` for a device kind; None when it is not listed (any CPU)."""
    return next((peak for peak in PEAKS if peak.match.lower() in device_kind.lower()), None)


def has_bfloat16(device: jax.Device) -> bool:
    """Whether bfloat16 matrix products run at full speed: TPUs and GPUs from Ampere on, unless PEAKS says no."""
    if device.platform == "cpu":
        return False
    peak = peak_of(device.device_kind)
    if peak is not None:
        return peak.bfloat16
    capability = getattr(device, "compute_capability", None)
    return capability is None or float(capability) >= 8.0


def memory_bytes(device: jax.Device) -> int | None:
    """Bytes a program may use on this device; for CPU devices an equal share of the host's free memory."""
    stats = device.memory_stats() or {}
    if stats.get("bytes_limit"):
        return int(stats["bytes_limit"])
    if device.platform != "cpu":
        return None
    host = host_memory_bytes()
    import jax
    return None if host is None else host // jax.local_device_count()


def host_memory_bytes() -> int | None:
    """Free memory of this host, or what its control group still allows, whichever is less; None if unknown."""
    limits = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                limits.append(int(line.split()[1]) * 1024)
    except OSError:
        if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:   # macOS: total, the best there is
            limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            limits.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass
    return min(limits) if limits else None
