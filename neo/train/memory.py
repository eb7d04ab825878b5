"""Bytes per device of a training step, estimated before anything is allocated.

Parameters, moments and gradients are exact (shapes over shards). Activations follow the names that
the remat policy saves; what a block needs while it runs, and the logits, are bounded from above. A
test holds the total against the compiler's own memory analysis.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax

from neo.config.schema import Config, ModelConfig, PhaseConfig
from neo.errors import InputError
from neo.models.decoder import Decoder
from neo.train.loss import chunk_length

FLOAT32 = 4
# Share of a device's memory that may be planned (ours): the rest is for fragmentation and the runtime.
USABLE = 0.92
# On a CPU bigger micro-batches only fall out of the caches: measured on 2 cores (ours), 1024 tokens
# a pass run 1.4 times as fast as 4096.
CPU_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes per device, by part."""

    params: int
    optimizer: int
    gradients: int
    gathered: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return sum(dataclasses.astuple(self))

    def text(self) -> str:
        """One line with the parts in GB."""
        parts = ", ".join(f"{field.name} {getattr(self, field.name) / 1e9:.2f}" for field in dataclasses.fields(self))
        return f"{self.total / 1e9:.2f} GB ({parts})"


@functools.lru_cache(maxsize=8)
def _parameter_shapes(model: ModelConfig) -> dict[str, Any]:
    """Tracing a model takes a while, and a search of plans asks for hundreds of meshes."""
    return jax.eval_shape(lambda: Decoder(model).init(jax.random.key(0), 0.0))


def parameter_bytes(decoder: Decoder, sizes: Mapping[str, int]) -> int:
    """Bytes of the float32 parameters on one device of a mesh with these axis sizes."""
    shapes = _parameter_shapes(decoder.config)

    def local(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> int:
        split = 1
        for entry in decoder.layout.rules.spec(axes):
            for name in (entry,) if isinstance(entry, str) else entry or ():
                split *= sizes[name]
        return math.prod(leaf.shape) * FLOAT32 // split

    return sum(jax.tree.leaves(jax.tree.map(local, shapes, decoder.axes())))


def estimate(decoder: Decoder, phase: PhaseConfig, sizes: Mapping[str, int], micro_batch: int,
             remat: str | None = None) -> Memory:
    """Memory of one step of a phase.

    Args:
        sizes: devices per mesh axis.
        micro_batch: sequences per device in one pass.
        remat: policy, default the decoder's.
    """
    model, tensor = decoder.config, sizes["tensor"]
    remat = remat or decoder.remat
    width = jax.numpy.dtype(decoder.compute_dtype).itemsize
    ways = sizes["replica"] * sizes["fsdp"] * sizes["expert"]
    accumulates = phase.global_batch // ways > micro_batch
    params = parameter_bytes(decoder, sizes)
    local = phase.seq_len // sizes["context"]
    tokens = micro_batch * local
    heads, kv = model.num_heads * model.head_size // tensor, model.num_kv_heads * model.head_size
    kv = kv // tensor if model.num_kv_heads % tensor == 0 else kv
    ffn, d, branches = model.d_ff // tensor, model.d_model, 2 if model.mlp == "gated" else 1

    # Per token and layer: logsumexp of the heads and scales of the norms; attention's output; what `models/remat.py` names.
    scalars = (model.num_heads // tensor + (4 if model.norm_placement == "sandwich" else 2)) * FLOAT32
    attention_saved = heads * width + scalars
    named = heads + 2 * kv + d + branches * ffn                                 # query, key, value, mid, gate, up
    saved = {"full": 0, "offload": scalars, "attention": attention_saved,
             "lean": attention_saved + (named - d) * width, "minimal": attention_saved + named * width,
             # all intermediates: also both norms (float32 copies), the rotated halves and the gated product
             "none": attention_saved + (named + 2 * d + heads + kv + branches * ffn) * width + 2 * d * FLOAT32}[remat]
    scores = model.num_heads // tensor * phase.seq_len * FLOAT32 if decoder.attention == "dense" else 0
    if remat == "none":
        saved += scores
    block = (2 * branches * ffn + 6 * d + 3 * heads) * FLOAT32 + 2 * scores                # one block while its backward runs
    activations = tokens * (model.num_layers * (d * width + saved) + block)

    layer_weights = (2 * d * model.num_heads * model.head_size // tensor + 2 * d * kv + (branches + 1) * d * ffn) * width
    table = model.vocab_size // tensor * d
    gathered = 0
    if sizes["fsdp"] > 1 or width < FLOAT32:
        gathered = 2 * layer_weights + 2 * table * width * (1 if model.tied_embeddings else 2)
    logits = micro_batch * chunk_length(local, model.vocab_size) * (model.vocab_size // tensor) * FLOAT32 * 3
    return Memory(params=params, optimizer=2 * params, gradients=params * (2 if accumulates else 1),
                  gathered=gathered, activations=activations, logits=logits)


def choose_micro_batch(config: Config, decoder: Decoder, phase: PhaseConfig, sizes: Mapping[str, int],
                       capacity: int | None, platform: str) -> int:
    """Sequences per device and pass: the config's, or the largest divisor of the local batch that fits."""
    if config.train.micro_batch:
        return config.train.micro_batch
    local = phase.global_batch // (sizes["replica"] * sizes["fsdp"] * sizes["expert"])
    divisors = [n for n in range(local, 0, -1) if local % n == 0]
    if platform == "cpu":
        divisors = [n for n in divisors if n * phase.seq_len <= CPU_TOKENS] or [1]
    if capacity is None:
        return divisors[0]
    for n in divisors:
        if estimate(decoder, phase, sizes, n).total <= capacity * USABLE:
            return n
    return 1


def check_fits(config: Config, decoder: Decoder, sizes: Mapping[str, int], capacity: int | None,
               micro_batches: Mapping[str, int]) -> None:
    """InputError when a phase's estimate exceeds the device, with the smallest change that fits."""
    if capacity is None or not config.train.check_memory:
        return
    for phase in config.phases:
        need = estimate(decoder, phase, sizes, micro_batches[phase.name])
        if need.total > capacity:
            raise InputError(f"phase {phase.name} needs an estimated {need.text()} per device, "
                             f"which has {capacity / 1e9:.2f} GB; {_cure(config, decoder, phase, sizes, capacity)}")


def _cure(config: Config, decoder: Decoder, phase: PhaseConfig, sizes: Mapping[str, int], capacity: int) -> str:
    room = capacity * USABLE
    for remat in dict.fromkeys((decoder.remat, "lean", "attention", "full")):
        if estimate(decoder, phase, sizes, 1, remat).total <= room:
            change = "--config.train.micro_batch=1"
            if remat != decoder.remat:
                change += f" --config.train.remat={remat}"
            return f"it fits with {change}"
    for more in (2, 4, 8, 16, 32, 64, 128, 256):
        bigger = {**sizes, "fsdp": sizes["fsdp"] * more}
        if phase.global_batch % (bigger["fsdp"] * bigger["replica"] * bigger["expert"]) == 0 \
                and estimate(decoder, phase, bigger, 1, "full").total <= room:
            fits = (f"it fits on {more} times as many devices (fsdp={bigger['fsdp']}) with --config.train.micro_batch=1 "
                    f"--config.train.remat=full")
            return f"{fits}{_smaller_recipe(config, sizes, capacity)}"
    return f"no number of devices tried makes it fit{_smaller_recipe(config, sizes, capacity)}"


def _smaller_recipe(config: Config, sizes: Mapping[str, int], capacity: int) -> str:
    """The largest known recipe that would fit these devices, as a sentence."""
    from neo.config import known, load
    fitting = []
    for name in known():
        other = load(name)
        decoder = Decoder(other.model, compute_dtype=jax.numpy.bfloat16, remat="full", attention="blockwise")
        need = max(estimate(decoder, phase, {**sizes, "tensor": 1}, 1).total for phase in other.phases)
        if need <= capacity * USABLE and name != config.name:
            fitting.append((need, name))
    return f"; on these devices --config={max(fitting)[1]} fits" if fitting else ""
