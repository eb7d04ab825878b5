"""What a plan says, as data: filled by the compiler and the pricing, read by report, picture, search and benchmarks.

Seconds, bytes and FLOPs are of one device and one optimizer step unless a name says otherwise.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Collective:
    """Collectives of one kind in one place of the program.

    Attributes:
        kind: all-gather, reduce-scatter, all-reduce, all-to-all, collective-permute; copy for arrays kept on the host.
        mode: "sync", or how it runs beside computation: "async" (-start/-done pairs), "async fusion" (inside matmul
            fusions), "async sparsecore".
        axes: mesh axes it goes over, where the program says, else ().
        group: devices that take part in one.
        loop: "entry", or turns of the loop it stands in, as "x32".
        dtype: of the elements, as HLO writes it.
        times: how often it runs in a step.
        bytes: of the whole (gathered or reduced) array, over all runs.
        wire_bytes: that a device receives, over all runs.
        seconds: over all runs, wire_bytes over the links it uses.
        network: "ici" (TPU links, NVLink inside a node), "dcn" (between slices or nodes), "to host" or "from host".
    """

    kind: str
    mode: str
    group: int
    loop: str
    dtype: str
    times: int
    bytes: float
    wire_bytes: float
    seconds: float
    axes: tuple[str, ...] = ()
    network: str = "ici"


@dataclasses.dataclass(frozen=True)
class KernelUse:
    """A Pallas kernel of the program: `times` runs, `cycles` and `seconds` over all of them."""

    name: str
    times: int
    cycles: float
    seconds: float
    note: str = ""


@dataclasses.dataclass(frozen=True)
class OpGroup:
    """Scheduled operations that came from one line of the model, over all their runs. `flops` 0: no matrix product."""

    name: str
    times: int
    seconds: float
    flops: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cost:
    """Predicted time of a step and its parts, in seconds.

    full_overlap: computation and communication hide each other wholly: max of both.
    scheduled: replay of the compiled schedule: a synchronous collective stops the core, an asynchronous one is hidden by
        what stands between its start and its end. None where there is no compiled schedule (GPUs).
    no_overlap: the sum.
    """

    full_overlap: float
    scheduled: float | None
    no_overlap: float
    matmul: float                      # XLA's fusions with a matrix product
    other: float                       # its other operations
    kernels: float
    communication: float
    matmul_flops: float
    kernel_uses: tuple[KernelUse, ...] = ()
    collectives: tuple[Collective, ...] = ()
    operations: tuple[OpGroup, ...] = ()          # dearest first
    loops: tuple[tuple[str, int], ...] = ()       # (name, turns over the whole step)
    notes: tuple[str, ...] = ()                   # what is not priced, and why

    @property
    def compute(self) -> float:
        """Everything but communication."""
        return self.matmul + self.other + self.kernels

    @property
    def best(self) -> float:
        """The number to compare plans by: the replayed schedule, else full overlap."""
        return self.full_overlap if self.scheduled is None else self.scheduled


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """Bytes of HBM on one device. `source`: "compiler" (its own analysis of the program) or "estimate"."""

    arguments: int
    temporaries: int
    peak: int
    capacity: int
    source: str

    @property
    def spare(self) -> int:
        """Bytes left; negative by how much it does not fit."""
        return self.capacity - self.peak

    @property
    def fits(self) -> bool:
        return self.spare >= 0


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A step as the compiler left it. `hlo`: the scheduled program's text.

    refused: why the compiler would not (too large for HBM or VMEM), in one line; "" where it did.
    facts: what was decided on the way: mesh, device_kind, attention, micro_batch, accumulation, parameters, and "memory",
        the compiler's whole account in bytes.
    """

    hlo: str
    memory: MemoryUse
    lower_s: float
    compile_s: float
    key: str                 # hash of what went into the compiler
    cached: bool
    warnings: tuple[str, ...] = ()
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    refused: str = ""
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Plan:
    """A config on a topology. FLOPs, tokens and times of the phase that is planned; `days` of the whole run."""

    config: str
    topology: str
    chip: str
    devices: int
    phase: str
    mesh: dict[str, int]
    global_batch: int
    seq_len: int
    micro_batch: int               # sequences per device and pass
    accumulation: int
    remat: str
    attention: str
    parameters: int
    run_tokens: int
    run_steps: int
    tokens_per_step: int
    flops_full: float              # model FLOPs of a step on one device, all pairs of attention
    flops_causal: float            # the same, visible pairs only
    peak_flops: float
    memory: MemoryUse
    cost: Cost | None              # None: pruned before it was compiled, or refused by the compiler
    overrides: tuple[str, ...] = ()    # --config.* that lead to it
    flags: tuple[str, ...] = ()        # compiler flags it was compiled with
    compile_s: float = 0.0
    refused: str = ""
    checkpoint_bytes: int = 0
    facts: dict[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def fits(self) -> bool:
        return self.memory.fits and not self.refused

    def mfu(self, seconds: float) -> float:
        """Model FLOPs (visible pairs) over what the device could do in `seconds`."""
        return self.flops_causal / self.peak_flops / seconds

    @property
    def days(self) -> float:
        """Of the whole run at `cost.best`; nothing is added for evaluation, checkpoints or faults."""
        assert self.cost is not None
        return self.run_tokens / self.tokens_per_step * self.cost.best / 86400

    @property
    def device_hours(self) -> float:
        return self.days * 24 * self.devices
