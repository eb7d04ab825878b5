"""Cycles of the Pallas kernels in a compiled step: the compiler estimates its own operations, but not these.

The program's text holds every kernel as it was given to the compiler. Each distinct one is compiled once more, alone and for
one device of the same chip, with the compiler's dumps on (`neo.plan.kernel_child`, some seconds); its scheduled bundles are
counted and its scalar unit is executed over the grid (`kernel_dump`, `kernel_scalar`). Prices are kept in the cache folder
under kernels/, by a hash of the kernel, the shapes of its operands, the chip and libtpu's version.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from neo.errors import InputError
from neo.plan import libtpu
from neo.plan.compile import run_child
from neo.plan.hlo import KernelCall, Shape, kernel_calls, parse
from neo.plan.plan import Compiled
from neo.plan.topology import Topology

FORMAT = 1   # of a price; another number leaves old ones unread
# What a kernel's own compilation depends on besides itself.
_FLAGS = ("--xla_tpu_scoped_vmem_limit_kib",)
# Given back to the compiler; the rest of a custom call's configuration is what it found out.
_GIVEN = ("body", "needs_layout_passes", "needs_hlo_passes", "serialization_format", "has_communication", "collective_id",
          "cost_estimate", "internal_scratch_in_bytes", "flags", "device_type", "disable_bounds_checks",
          "disable_semaphore_checks", "shape_invariant_numerics", "skip_device_barrier")


@dataclasses.dataclass(frozen=True)
class PriceList:
    """Prices of a compiled step's kernels. Called with one it gives cycles of one run on one device."""

    compiled: Compiled
    topology: Topology
    entries: Mapping[str, Mapping[str, Any]]   # by `key_of`

    def __call__(self, call: KernelCall) -> float:
        """InputError, naming the kernel and why, where it has no price."""
        entry = self.entries.get(key_of(kernel_job(call, self.compiled), self.topology))
        if entry is None:
            raise InputError(f"kernel {call.name} is not one of the compiled step's")
        if "error" in entry:
            raise InputError(f"kernel {call.name}({', '.join(map(text_of, call.operands))}) has no price: {entry['error']}")
        return float(entry["cycles"])

    @property
    def notes(self) -> tuple[str, ...]:
        """What the prices take for granted, a line for each kernel."""
        return tuple(sorted({f"{entry['name']}: {entry['note']}" for entry in self.entries.values() if entry.get("note")}))


def kernel_prices(compiled: Compiled, topology: Topology, *, cache: Path,
                  progress: Callable[[str], None] = lambda text: None) -> PriceList:
    """The price list for the kernels of a compiled step; those not in the cache are compiled first, `progress` hears of it."""
    calls = kernel_calls(parse(compiled.hlo)) if "tpu_custom_call" in compiled.hlo else ()
    jobs = {key_of(job, topology): job for job in (kernel_job(call, compiled) for call in calls)}
    folder = Path(cache) / "kernels"
    missing = {key: job for key, job in jobs.items() if not _priced(folder / f"{key}.json")}
    if missing:
        child = {"topology": topology.name, "kernels": missing, "cache": str(folder.resolve())}
        what = f"{len(missing)} kernel{'s' * (len(missing) > 1)} of the step for {topology.name} alone"
        answer, _ = run_child(child, kernel_flags(compiled), what, progress, module="neo.plan.kernel_child", stage="compiling")
        if "crashed" in answer:
            raise InputError(f"a kernel for {topology.name} has no price: the compiler crashed: {answer['crashed']}")
    return PriceList(compiled, topology, {key: json.loads((folder / f"{key}.json").read_text()) for key in jobs})


def _priced(path: Path) -> bool:
    """A kernel that had no price is tried again: this version may know it."""
    return path.exists() and "error" not in json.loads(path.read_text())


def kernel_job(call: KernelCall, compiled: Compiled) -> dict[str, Any]:
    """What there is to compile: {"name", "config", "operands", "results", "words"}. InputError where the text lacks it."""
    config = configuration(call)
    operands = [text_of(shape) for shape in call.operands]
    words = next((known["words"] for known in compiled.facts.get("kernel_words", ())
                  if known["name"] == call.name and known["operands"] == operands), None)
    return {"name": call.name, "config": config, "operands": operands, "results": [text_of(shape) for shape in call.results],
            "words": words}


def configuration(call: KernelCall) -> dict[str, Any]:
    """The kernel and its options, out of the attributes of its custom call."""
    at = call.text.find("backend_config=")
    try:
        whole, _ = json.JSONDecoder().raw_decode(call.text, at + len("backend_config=")) if at >= 0 else ({}, 0)
    except json.JSONDecodeError:
        whole = {}
    given = whole.get("custom_call_config", {})
    if "body" not in given:
        raise InputError(f"kernel {call.name} has no price: the program's text does not hold it")
    kept = {name: given[name] for name in _GIVEN if name in given}
    return {"custom_call_config": kept, "scoped_memory_configs": whole.get("scoped_memory_configs", [])}


def kernel_flags(compiled: Compiled) -> tuple[str, ...]:
    """Those flags of the step that change how a kernel is compiled."""
    return tuple(flag for flag in compiled.facts.get("flags", ()) if flag.partition("=")[0] in _FLAGS)


def key_of(job: Mapping[str, Any], topology: Topology) -> str:
    """Hash of a kernel, its operands, what they hold, the chip and the compiler."""
    text = json.dumps([FORMAT, topology.kind, libtpu.version(), job], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def text_of(shape: Shape) -> str:
    """As HLO writes it: bf16[8,128]."""
    return f"{shape.dtype}[{','.join(map(str, shape.dims))}]"


def price_of(runs: Sequence[Any], bytes_per_cycle: float) -> dict[str, Any]:
    """{"cycles", ...} of a kernel from its runs, one for each core that shares it: the busier core, or what the copies of
    all need of the HBM's bandwidth, whichever is more."""
    issue = max(run.cycles for run in runs)
    moved = sum(run.bytes_read + run.bytes_written for run in runs)
    return {"cycles": max(issue, moved / bytes_per_cycle), "issue_cycles": issue, "hbm_bytes": moved,
            "steps": [run.steps for run in runs]}
