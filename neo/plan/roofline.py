"""A GPU step's time from the config alone: FLOPs over what matrix units reach, bytes over what memory and links reach.

No compiler prices a GPU cluster offline, so this is a roofline, part by part:

    matmul      model FLOPs of the dense products, forward, backward and what the remat policy repeats
    kernels     attention over visible pairs; backward 2.5 times forward (5 products against 2)
    other       bytes that element-wise work, loss and optimizer move through HBM, and offloaded ones over PCIe
    collectives what the sharding rules ask for: weights over fsdp, gradients, activations over tensor, keys over context

It is a bound that well tuned steps come near. Published steps (`MARKS`) took 0.97 to 1.47 times its time without
overlap: 0.97 for the best tuned on H100 and 1.02 on A100, to which `MATMUL` is fitted; about 1.3 for cards limited to
500 W and for an early run on 256; 1.47 for one of 2024. It knows no launch overhead, no slow process, and no
contention between NCCL and computation.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from neo.models.flops import visible_pairs
from neo.models.remat import POLICIES
from neo.plan.chips import GPU_MEMORY_SHARE
from neo.plan.plan import Collective, Cost, KernelUse, OpGroup

if TYPE_CHECKING:
    from neo.plan.planner import Setting
    from neo.plan.topology import Topology

# Share of the data sheet's peak that bfloat16 products reach over a long step, under the power it draws: fitted to the
# best of MARKS on each card (JAX-Toolbox, torchtitan). Single products reach more: 0.80 on an H200 (docs/kernels.md).
# H200 and B200 as H100 (inferred).
MATMUL = {"a100": 0.75, "a100-40": 0.75, "h100": 0.65, "h200": 0.65, "b200": 0.65}
# Forward, backward: share of peak over visible pairs. pallas_gpu: the goals of docs/kernels.md over 989 TFLOP/s; cudnn:
# what the FlashAttention-2 and -3 papers measure (arXiv:2307.08691, 2407.08608); others leave scores to XLA (inferred).
ATTENTION = {"pallas_gpu": (0.55, 0.45), "cudnn": (0.60, 0.50)}
ATTENTION_XLA = (0.15, 0.12)
HBM = 0.85               # of the bandwidth, streaming (inferred)
LINKS = 0.80             # of NVLink and network that NCCL's large collectives reach (inferred)
# Bytes/s to the host's memory: PCIe 4 and 5 with 16 lanes, 32 and 64 GB/s by the standard, less a fifth (inferred). Not
# hidden behind anything here.
HOST = {"a100": 25e9, "a100-40": 25e9, "h100": 50e9, "h200": 50e9, "b200": 50e9}
BFLOAT16, FLOAT32 = 2, 4
# Of one parameter and step: read parameter, gradient and both moments, write all but the gradient (ours: neo.train.optimizer).
UPDATE_BYTES = 7 * FLOAT32
CAST_BYTES = FLOAT32 + BFLOAT16       # of one parameter of a shard and pass over the layers: read, write in bfloat16
LOGIT_PASSES = 4         # over float32 logits: written, read twice, gradient written (ours: neo.train.loss)


@dataclasses.dataclass(frozen=True)
class Mark:
    """A published step. `tokens_per_s` of one GPU."""

    system: str
    topology: str
    model: str            # key of MODELS
    seq_len: int
    local_batch: int      # sequences on a GPU
    remat: str            # the policy of ours that is nearest
    tokens_per_s: float
    source: str


MODELS = {
    "llama2_7b": dict(vocab_size=32000, num_layers=32, d_model=4096, num_heads=32, num_kv_heads=32, d_ff=11008),
    "llama3_8b": dict(vocab_size=128256, num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, d_ff=14336),
}
MARKS = (
    Mark("MaxText, JAX-Toolbox", "h100:8x1", "llama2_7b", 4096, 2, "minimal", 11361,
         "NVIDIA/JAX-Toolbox docs/frameworks/maxtext: 0.721 s a step"),
    Mark("torchtitan, compiled", "h100:8x1", "llama3_8b", 8192, 2, "attention", 6667,
         "pytorch/torchtitan docs/performance.md: cards limited to 500 W, selective recomputation"),
    Mark("torchtitan, compiled", "h100:8x16", "llama3_8b", 8192, 2, "attention", 6514,
         "pytorch/torchtitan benchmarks/llama3_h100_202412: cards limited to 500 W"),
    Mark("AXLearn fuji-7B", "h100:8x32", "llama2_7b", 4096, 4, "minimal", 9204,
         "apple/axlearn fuji.py: 1.78 s a step of 4M tokens"),
    Mark("fms-fsdp", "a100:8x16", "llama2_7b", 4096, 2, "none", 3700, "foundation-model-stack/fms-fsdp README"),
    Mark("fms-fsdp", "h100:8x12", "llama2_7b", 4096, 2, "none", 7500, "foundation-model-stack/fms-fsdp README"),
    Mark("torchtitan", "a100:8x8", "llama3_8b", 8192, 1, "attention", 2973,
         "pytorch/torchtitan docs/performance.md: selective recomputation"),
)


def roofline(chosen: Setting) -> Cost:
    """Cost of a step on one GPU. `full_overlap` still waits for what nothing can hide: sums over `tensor`."""
    chip, sizes, config = chosen.topology.chip, chosen.sizes, chosen.config
    model, tensor = config.model, sizes["tensor"]
    tokens = chosen.phase.tokens_per_step / chosen.topology.devices * tensor      # that a device works on, with its heads
    repeated = _repeated(config.train.remat)

    layer = {"qkv": model.d_model * model.head_size * (model.num_heads + 2 * model.num_kv_heads),
             "out": model.d_model * model.head_size * model.num_heads,
             "in": model.d_model * model.d_ff * (2 if model.mlp == "gated" else 1), "down": model.d_model * model.d_ff}
    again = sum(layer[name] for name in repeated if name in layer) / sum(layer.values())
    parts = {"layers": 2.0 * model.num_layers * sum(layer.values()) * (3 + again),
             "head": 6.0 * model.d_model * model.vocab_size}
    flops = sum(parts.values()) * tokens / tensor
    speed = chip.peak_flops * MATMUL[chip.name]

    pairs = sum(visible_pairs(chosen.phase.seq_len, window)[1] for window in model.layer_windows) / chosen.phase.seq_len
    forward = 4.0 * model.num_heads * model.head_size * pairs * tokens / tensor
    reach = ATTENTION.get(chosen.decoder.attention, ATTENTION_XLA)
    runs = 2 if "attention" in repeated else 1
    kernels = (KernelUse("attention forward", runs * model.num_layers * chosen.accumulation, 0.0,
                         runs * forward / chip.peak_flops / reach[0], f"{chosen.decoder.attention}, {reach[0]:.0%} of peak"),
               KernelUse("attention backward", model.num_layers * chosen.accumulation, 0.0,
                         2.5 * forward / chip.peak_flops / reach[1], f"{chosen.decoder.attention}, {reach[1]:.0%} of peak"))

    traffic = _traffic(chosen, tokens, bool(repeated))
    other = {name: moved / chip.hbm_bandwidth / HBM for name, moved in traffic.items()}
    if sent := _host_bytes(chosen, tokens):
        other["activations to the host and back"] = sent / HOST[chip.name]
    collectives = _collectives(chosen, tokens, repeated)

    matmul, kernel, rest = flops / speed, sum(one.seconds for one in kernels), sum(other.values())
    compute, communication = matmul + kernel + rest, sum(one.seconds for one in collectives)
    bound = sum(one.seconds for one in collectives if one.mode == "sync")
    groups = [OpGroup(f"matrix products of the {name}", 1, part * tokens / tensor / speed, part * tokens / tensor)
              for name, part in parts.items()] + [OpGroup(name, 1, seconds) for name, seconds in other.items()]
    return Cost(
        full_overlap=max(compute + bound, communication), scheduled=None, no_overlap=compute + communication, matmul=matmul,
        other=rest, kernels=kernel, communication=communication, matmul_flops=flops, kernel_uses=kernels,
        collectives=tuple(collectives), operations=tuple(sorted(groups, key=lambda one: -one.seconds)),
        notes=(f"a roofline, not a compiled program: matrix products at {MATMUL[chip.name]:.0%} of peak, HBM at "
               f"{HBM:.0%}, links at {LINKS:.0%}; published steps took 0.97 to 1.47 times such a time without overlap",
               f"capacity is {GPU_MEMORY_SHARE:.0%} of the card, what JAX takes unless XLA_CLIENT_MEM_FRACTION says more",
               *(() if bound == 0 else ("sums over tensor stand on the critical path: in full overlap too",))))


def _repeated(policy: str) -> tuple[str, ...]:
    """What a remat policy computes twice, of qkv, out, in, attention (a down projection's result is never asked for)."""
    kept = POLICIES[policy]
    if kept is None:
        return ()
    needs = {"qkv": {"query", "key", "value"}, "out": {"residual_mid"}, "attention": {"attention_out"},
             "in": {"mlp_up"}}
    return tuple(part for part, names in needs.items() if not names <= {*kept.device, *kept.host}) or ("element-wise",)


def _host_bytes(chosen: Setting, tokens: float) -> float:
    """Bytes that a policy sends to the host's memory and fetches again."""
    kept, model = POLICIES[chosen.config.train.remat], chosen.config.model
    heads, kv = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    tensor = chosen.sizes["tensor"]
    width = {"query": heads, "key": kv, "value": kv, "attention_out": heads, "residual_mid": model.d_model * tensor,
             "mlp_gate": model.d_ff, "mlp_up": model.d_ff}
    names = kept.host if kept else ()
    return 2 * BFLOAT16 * sum(width.get(name, 0) for name in names) / tensor * tokens * model.num_layers


def _traffic(chosen: Setting, tokens: float, repeats: bool) -> dict[str, float]:
    """Bytes through HBM of one step, but for the operands of matrix products and attention.

    Forward, of each token and layer, as XLA fuses it (ours): two norms read D and write D, rotary embedding reads and writes
    q and k, two residual sums read two D and write one, the gated product reads two F and writes one. Backward moves
    twice as much.
    """
    model, sizes = chosen.config.model, chosen.sizes
    tensor, d = sizes["tensor"], model.d_model
    heads = (model.num_heads + model.num_kv_heads) * model.head_size / tensor
    layer = BFLOAT16 * (10 * d + 2 * heads + (3 if model.mlp == "gated" else 2) * model.d_ff / tensor)
    mine = chosen.parameters / (sizes["fsdp"] * tensor)
    passes = chosen.accumulation
    return {"element-wise work of the layers": layer * model.num_layers * tokens * (4 if repeats else 3),
            "loss": LOGIT_PASSES * FLOAT32 * model.vocab_size / tensor * tokens,
            "optimizer": UPDATE_BYTES * mine,
            "weights to bfloat16": CAST_BYTES * mine * 2 * passes,
            # Added to those of the passes before: read both, write one.
            "sums of gradients": 3 * FLOAT32 * mine * (passes if passes > 1 else 0)}


def _collectives(chosen: Setting, tokens: float, repeated: Sequence[str]) -> list[Collective]:
    """In the order of their time."""
    model, sizes, topology = chosen.config.model, chosen.sizes, chosen.topology
    passes, layers, seq_len = chosen.accumulation, model.num_layers, chosen.phase.seq_len
    whole, width = chosen.parameters / sizes["tensor"], model.d_model
    share = whole / sizes["fsdp"]
    loop = f"x{layers * passes}"
    found = []

    def add(kind: str, axis: str, dtype: str, times: int, moved: float, mode: str = "async") -> None:
        """`moved`: bytes of the whole arrays over all runs."""
        if sizes[axis] > 1 and moved:
            found.append(_collective(kind, axis, dtype, times, moved, mode, loop, sizes, topology))

    add("all-gather", "fsdp", "bf16", 2 * layers * passes, 2 * BFLOAT16 * whole * passes)
    add("reduce-scatter", "fsdp", "bf16", layers * passes, BFLOAT16 * whole * passes)
    # Axes that split tokens but not parameters sum the gradients, layer by layer in each pass, as they were computed.
    for axis in ("context", "expert", "replica"):
        add("all-reduce", axis, "bf16", layers * passes, BFLOAT16 * share * passes)
    # Behind output and down projection; backward before q/k/v and the feed-forward layer; loss and embedding at the ends.
    sums = 4 + ("out" in repeated)
    add("all-reduce", "tensor", "bf16", sums * layers * passes, (sums * layers + 2) * BFLOAT16 * tokens * width, "sync")
    # Keys and values of the other shards, as far as the windows reach; backward once more, with their gradients.
    local, shards = seq_len / sizes["context"], sizes["context"]
    kv = 2 * BFLOAT16 * max(1, model.num_kv_heads // sizes["tensor"]) * model.head_size
    reach = sum(min(local * (shards - 1), window or seq_len) for window in model.layer_windows)
    if shards > 1:
        received = 3 * kv * reach * (tokens / local)
        add("collective-permute", "context", "bf16", 3 * (shards - 1) * layers * passes, received * shards / (shards - 1))
    return sorted(found, key=lambda one: -one.seconds)


def _collective(kind: str, axis: str, dtype: str, times: int, moved: float, mode: str, loop: str, sizes: dict[str, int],
                topology: Topology) -> Collective:
    """One collective over an axis of the mesh, inside nodes or across them.

    Across nodes each of the group's members there brings its own network card: the node as a whole receives what it
    lacks over all of them, while NVLink hands it round.
    """
    size, stride = sizes[axis], math.prod(sizes[name] for name in list(sizes)[list(sizes).index(axis) + 1:])
    members = max(1, min(size, topology.shape[0] // stride))
    nodes = -(-size // members)
    twice = 2 if kind == "all-reduce" else 1
    wire = twice * moved * (size - 1) / size
    links = topology.chip.ici_bandwidth * LINKS
    network = topology.dcn_bandwidth * LINKS
    seconds = wire / links if members > 1 else 0.0
    if nodes > 1:
        seconds = max(seconds, twice * moved * (nodes - 1) / nodes / members / network)
    return Collective(kind, mode, size, loop, dtype, times, moved, wire, seconds, axes=(axis,),
                      network="dcn" if nodes > 1 else "ici")
