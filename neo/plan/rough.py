"""A TPU step's time from the config alone: to put the candidates of a search in order before any is compiled.

It counts model FLOPs, what a remat policy repeats, and the bytes of the collectives that the sharding rules ask for. Only
differences between candidates matter; the compiled step has the numbers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from neo.plan.collectives import links_share
from neo.plan.plan import Cost

if TYPE_CHECKING:
    from neo.plan.planner import Setting
    from neo.plan.topology import Topology

# Of the peak that whole steps' matrix products reach (inferred: 0.97 with the flags on v5p, 0.8 without).
EFFICIENCY = 0.9
# What runs a second time, as a share of a step's FLOPs (ours): a forward pass is a third; "minimal" repeats element-wise
# work, "lean" also attention's output projection, "attention" and "offload" much of the forward pass.
REPEATED = {"none": 0.0, "minimal": 0.01, "lean": 0.03, "full": 1 / 3}
NOT_ALL = 0.30           # of the other policies (ours)
# Of weights and gradients, what the schedule does not hide (inferred: 0 on v5p with SparseCore flags, about half on v5e).
EXPOSED = 0.3
WIDTH = 2                # bytes: weights are gathered, gradients reduced and activations exchanged in bfloat16


def rough(chosen: Setting) -> Cost:
    """A cost without single kernels, operations or collectives. Only what goes over `fsdp` and inside a slice is hidden."""
    sizes, topology, model = chosen.sizes, chosen.topology, chosen.config.model
    _, flops = chosen.flops
    compute = flops * (1 + _repeated(chosen.config.train.remat)) / topology.chip.peak_flops / EFFICIENCY
    bandwidth = link_bandwidth(topology)
    share = chosen.parameters / sizes["tensor"]
    # Of each pass: weights gathered for forward and backward, gradients reduced.
    weights = 3 * chosen.accumulation * _rest(sizes["fsdp"]) * WIDTH * share / bandwidth
    tokens = chosen.phase.tokens_per_step / topology.devices      # of a device
    one_axis = bandwidth / len(topology.shape)
    # Two sums over the heads' and the feed-forward layer's parts, forward and backward; each moves the array twice.
    activations = (4 * model.num_layers * 2 * _rest(sizes["tensor"]) * WIDTH * tokens * sizes["tensor"] * model.d_model
                   / one_axis)
    kv = 2 * model.num_kv_heads * model.head_size
    # Keys and values forward, the same and their gradients backward.
    sequence = 3 * model.num_layers * _rest(sizes["context"]) * WIDTH * tokens * sizes["context"] * kv / one_axis
    inside = sizes["replica"] // topology.slices
    gradients = 2 * chosen.accumulation * WIDTH * share / sizes["fsdp"]   # summed over replicas in each pass
    network = _rest(topology.slices) * gradients / topology.dcn_bandwidth
    links = weights + _rest(inside) * gradients / bandwidth
    bound = activations + sequence + network
    scheduled = max(compute + EXPOSED * links + bound, total := links + bound)
    return Cost(full_overlap=max(compute, total), scheduled=scheduled, no_overlap=compute + total, matmul=compute, other=0.0,
                kernels=0.0, communication=total, matmul_flops=flops, notes=("from the config alone",))


def link_bandwidth(topology: Topology, size: int = 0) -> float:
    """Bytes/s that a device of a group of `size` receives over the links inside a slice; default the whole slice."""
    size = size or topology.devices // topology.slices
    return topology.chip.ici_bandwidth * links_share(size, topology.chip, topology.torus)


def _repeated(policy: str) -> float:
    return REPEATED.get(policy, NOT_ALL)


def _rest(n: int) -> float:
    """Of an array in n parts, what a device has not: (n - 1) / n."""
    return (n - 1) / n
