"""What the chips that neo plans for can do: data, each figure with its source.

Peaks are those of `neo.parallel.devices.PEAKS`. A row describes one JAX device: a whole chip, but for TPU7x, where a chip is
two devices that share its links. Bandwidths are bytes/s in one direction.

Sources of TPU rows: memory is what libtpu 0.0.50.1 says a program may use, read from its refusal of one that is too large.
Matrix units are those of cloud.google.com/tpu/docs/<chip>; from v6e on they take two rows a cycle (static schedules of libtpu
for v6e, inferred for TPU7x). The clock follows from peak and units. Links are the one-way figures of "How To Scale Your Model"
(jax-ml.github.io/scaling-book, chapter on TPUs): 90 GB/s for v5p and v6e, 45 GB/s for v4 and v5e, a tenth below Google's
tables. TPU7x has v5p's 1200 GB/s per chip in those tables, so v5p's link is taken (inferred).

Sources of GPU rows: NVIDIA's data sheets of SXM cards and DGX systems; NVLink one way is half of the figure they print.
Memory is the total that CUDA reports on such cards in public out-of-memory messages.
"""

from __future__ import annotations

import dataclasses

from neo.parallel.devices import peak_of

GIB = 2**30
GBIT = 1e9 / 8   # bytes/s
# JAX's share of a GPU's memory unless XLA_CLIENT_MEM_FRACTION says more (docs.jax.dev, "GPU memory allocation").
GPU_MEMORY_SHARE = 0.75


@dataclasses.dataclass(frozen=True)
class Chip:
    """One kind of chip; figures are of one JAX device and direction.

    Attributes:
        name: as topologies write it.
        platform: JAX's, "tpu" or "gpu".
        device_kind: JAX's name of the device.
        memory: bytes of HBM there are, less what the system keeps.
        hbm_bandwidth: bytes/s.
        link: bytes/s of one link: ICI to one neighbour; of a GPU all its NVLinks together.
        links: links of one device that a collective can use at once: both directions of each side of the torus.
        dcn_bandwidth: bytes/s of its share of the network between slices or nodes.
        flops_per_cycle: of the matrix units in bfloat16; 0 where clocks vary (GPUs).
        devices: JAX devices of one chip.
        sides: dimensions of the torus, 0 without one.
        sources: of memory, hbm_bandwidth and dcn_bandwidth, where the module's head does not say.
    """

    name: str
    platform: str
    device_kind: str
    memory: float
    hbm_bandwidth: float
    link: float
    links: float
    dcn_bandwidth: float
    flops_per_cycle: int = 0
    devices: int = 1
    sides: int = 0
    sources: tuple[str, ...] = ()

    @property
    def peak_flops(self) -> float:
        """Dense bfloat16 FLOP/s."""
        peak = peak_of(self.device_kind)
        assert peak is not None, f"neo.parallel.devices.PEAKS has no {self.device_kind}"
        return peak.flops

    @property
    def hbm_bytes(self) -> int:
        """Bytes that a program may use."""
        return int(self.memory * (GPU_MEMORY_SHARE if self.platform == "gpu" else 1))

    @property
    def clock(self) -> float:
        """Cycles/s of a TPU at which its matrix units reach the peak."""
        return self.peak_flops / self.flops_per_cycle

    @property
    def ici_bandwidth(self) -> float:
        """Bytes/s that a device receives when a collective uses all links inside a slice or node."""
        return self.link * self.links


_TPU_DOCS = "cloud.google.com/tpu/docs/"
CHIPS = (
    Chip("v4", "tpu", "TPU v4", 30.75 * GIB, 1228e9, 45e9, 6, 50 * GBIT, flops_per_cycle=2 * 128**2 * 4 * 2, sides=3,
         sources=(f"HBM {_TPU_DOCS}v4 (1200 GBps; 1228 in arXiv:2304.01433)", "DCN as v5p (inferred)")),
    Chip("v5e", "tpu", "TPU v5 lite", 15.75 * GIB, 819e9, 45e9, 4, 25 * GBIT, flops_per_cycle=2 * 128**2 * 4, sides=2,
         sources=(f"HBM {_TPU_DOCS}v5e", f"DCN {_TPU_DOCS}v5e: 6.4 Tbps for 256 chips")),
    Chip("v5p", "tpu", "TPU v5", 95.73 * GIB, 2765e9, 90e9, 6, 50 * GBIT, flops_per_cycle=2 * 128**2 * 4 * 2, sides=3,
         sources=(f"HBM {_TPU_DOCS}v5p", f"DCN {_TPU_DOCS}v5p: 50 Gbps a chip")),
    Chip("v6e", "tpu", "TPU v6 lite", 31.24 * GIB, 1638e9, 90e9, 4, 100 * GBIT, flops_per_cycle=2 * 256**2 * 2 * 2, sides=2,
         sources=(f"HBM {_TPU_DOCS}v6e", f"DCN {_TPU_DOCS}v6e: 4 x 200 Gbps for 8 chips")),
    # Two devices a chip: half of its memory bandwidth, links and network each.
    Chip("tpu7x", "tpu", "TPU7x", 94.74 * GIB, 7380e9 / 2, 90e9, 3, 50 * GBIT, flops_per_cycle=2 * 256**2 * 2 * 2, devices=2,
         sides=3, sources=(f"HBM {_TPU_DOCS}tpu7x: 7380 GBps a chip", "DCN 100 Gbps a chip (inferred from v6e)")),
    Chip("a100", "gpu", "NVIDIA A100-SXM4-80GB", 79.15 * GIB, 2039e9, 300e9, 1, 200 * GBIT,
         sources=("NVIDIA A100 data sheet, 80 GB SXM", "network DGX A100: 8 x 200 Gb/s")),
    Chip("a100-40", "gpu", "NVIDIA A100-SXM4-40GB", 39.39 * GIB, 1555e9, 300e9, 1, 200 * GBIT,
         sources=("NVIDIA A100 data sheet, 40 GB SXM", "network DGX A100: 8 x 200 Gb/s")),
    Chip("h100", "gpu", "NVIDIA H100 80GB HBM3", 79.10 * GIB, 3350e9, 450e9, 1, 400 * GBIT,
         sources=("NVIDIA H100 data sheet, SXM", "network DGX H100: 8 x 400 Gb/s")),
    Chip("h200", "gpu", "NVIDIA H200", 139.80 * GIB, 4800e9, 450e9, 1, 400 * GBIT,
         sources=("NVIDIA H200 data sheet, SXM", "network DGX H200: 8 x 400 Gb/s")),
    Chip("b200", "gpu", "NVIDIA B200", 178.35 * GIB, 8000e9, 900e9, 1, 400 * GBIT,
         sources=("NVIDIA DGX B200 data sheet: 64 TB/s for 8", "network DGX B200: 8 x 400 Gb/s")),
)
BY_NAME = {chip.name: chip for chip in CHIPS}
