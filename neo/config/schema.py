"""What a run is made of: frozen dataclasses, one per config group, every field documented.

`identity` fields decide what is being computed (model, data, optimizer, past phases, seeds): a run
whose identity changed is another run, and resuming it is refused with a diff. All others are
`operational` (mesh, micro-batch, intervals, logging, stop step, later phases) and may change at
any restart. Tests check that each field has a text and is read somewhere.
"""

from __future__ import annotations

import dataclasses
from typing import Any

CONFIG_VERSION = 1

LR_SHAPES = ("cosine", "linear", "constant")
REMAT_POLICIES = ("none", "minimal", "lean", "attention", "offload", "full")
COMPUTE_DTYPES = ("auto", "bfloat16", "float32")
COMPILER_FLAGS = ("auto", "none")
ATTENTION_IMPLEMENTATIONS = ("auto", "dense", "blockwise", "pallas_tpu", "pallas_gpu", "cudnn")
# Ours: steps from deciding new mixture weights to their effect; batches of the steps between may have been made ahead already.
# A constant, not data.prefetch: the stream must not depend on how many batches are made ahead.
REWEIGHT_LEAD = 8
OPTIMIZERS = ("adamw",)
PROGRESS_MODES = ("auto", "live", "plain", "off")
NORMS = ("rms", "layer")
NORM_PLACEMENTS = ("pre", "post", "sandwich")
POSITIONS = ("rope", "local_rope", "alibi", "none")
ROPE_SCALINGS = ("none", "linear", "llama3")
MLPS = ("gated", "plain")
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
QK_NORMS = ("none", "head", "full")
INIT_SCHEMES = ("normal", "kaiming")
DEPTH_SCHEMES = ("none", "interleave", "stack")
NEW_BLOCKS = ("copy", "identity")
MIXTURE_UNITS = ("weight", "tokens", "epochs")


def _field(default: Any, doc: str, *, identity: bool, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"doc": doc, "identity": identity, "choices": choices}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def identity(default: Any, doc: str, choices: tuple[str, ...] = ()) -> Any:
    """A field that decides what the run computes."""
    return _field(default, doc, identity=True, choices=choices)


def operational(default: Any, doc: str, choices: tuple[str, ...] = ()) -> Any:
    """A field that may change whenever the run is started again."""
    return _field(default, doc, identity=False, choices=choices)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder's shape. Letters are those of the code: V, L, D, H, K, h, F, W."""

    vocab_size: int = identity(64256, "V, rows of the embedding table; at least the tokenizer's size")
    num_layers: int = identity(28, "L, number of decoder blocks")
    d_model: int = identity(3072, "D, width of the residual stream")
    num_heads: int = identity(16, "H, query heads")
    num_kv_heads: int = identity(16, "K, key/value heads; H must be a multiple of K")
    head_dim: int = identity(0, "h, size of one head; 0 means d_model / num_heads")
    d_ff: int = identity(24576, "F, width of the feed-forward layer (of each of the two branches when gated)")
    mlp: str = identity("gated", "feed-forward layer: activation(gate) * up, or activation(up) alone", MLPS)
    activation: str = identity("silu", "its activation; gelu is the exact one, gelu_tanh its approximation", ACTIVATIONS)
    windows: tuple[int, ...] = identity(
        (0,), "W per layer, repeated over the layers: visible keys including self, 0 = all earlier keys")
    positions: tuple[str, ...] = identity(
        ("rope",), "how each layer knows positions, repeated over the layers: rope, local_rope (its own base, never "
                   "scaled; Gemma-3), alibi or none", POSITIONS)
    max_seq_len: int = identity(8192, "longest context the model is meant for; phases may not exceed it")
    rope_base: float = identity(10000.0, "base of the rotary position embedding; a phase may override it")
    local_rope_base: float = identity(10000.0, "base of the layers with position local_rope")
    rope_scaling: str = identity("none", "how rope layers stretch their frequencies to a longer context", ROPE_SCALINGS)
    rope_factor: float = identity(1.0, "rope_scaling: by how much")
    rope_low_frequency: float = identity(1.0, "rope_scaling llama3: turns in the old context below which all is stretched")
    rope_high_frequency: float = identity(4.0, "rope_scaling llama3: turns in the old context above which nothing is")
    rope_old_seq_len: int = identity(8192, "rope_scaling llama3: the context before stretching")
    alibi_bias_max: float = identity(8.0, "alibi: the steepest head's slope is 2^-(this / number of heads)")
    norm: str = identity("rms", "normalisation: RMSNorm, or LayerNorm without bias", NORMS)
    norm_eps: float = identity(1e-5, "epsilon inside the normalisation")
    norm_placement: str = identity(
        "pre", "norms before each sublayer, after it (OLMo-2), or both (sandwich; Gemma-2)", NORM_PLACEMENTS)
    norm_offset: float = identity(0.0, "added to every norm gain: 1 stores gains as their distance from 1 (Gemma)")
    qk_norm: str = identity(
        "none", "normalise queries and keys: per head (Qwen3), or over all heads together (OLMo-2, MPT's qk_ln)", QK_NORMS)
    clip_qkv: float = identity(0.0, "queries, keys and values are clipped to plus or minus this; 0 = not")
    qkv_bias: bool = identity(False, "biases on queries, keys and values")
    output_bias: bool = identity(False, "bias on the attention output")
    mlp_bias: bool = identity(False, "biases in the feed-forward layer")
    attention_scale: float = identity(0.0, "factor on the attention scores; 0 means 1 / sqrt(h)")
    attention_softcap: float = identity(0.0, "scores become cap * tanh(score / cap); 0 = not")
    attention_sinks: bool = identity(
        False, "a learned logit per head that takes its share of the attention and adds nothing (gpt-oss, arXiv:2508.10925)")
    logit_softcap: float = identity(0.0, "the same for the logits; 0 = not")
    embedding_multiplier: float = identity(1.0, "factor on the embeddings")
    residual_multiplier: float = identity(1.0, "factor on what each sublayer adds to the residual stream")
    logit_multiplier: float = identity(1.0, "factor on the logits, before the soft-cap")
    wesar: bool = identity(
        False, "a learnable scalar gain on each matrix and norm, as in YuLan-Mini (WeSaR, arXiv:2410.05052)")
    tied_embeddings: bool = identity(False, "use the embedding table as output head")

    @property
    def head_size(self) -> int:
        """h, with the default resolved."""
        return self.head_dim or self.d_model // self.num_heads

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """W of each of the L layers; None where all earlier keys are visible."""
        return tuple(self.windows[i % len(self.windows)] or None for i in range(self.num_layers))

    @property
    def layer_positions(self) -> tuple[str, ...]:
        """Position scheme of each of the L layers."""
        return tuple(self.positions[i % len(self.positions)] for i in range(self.num_layers))


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How many devices along each mesh axis. One axis may be -1: all devices that are left."""

    replica: int = operational(1, "copies of the parameters, one per slice; gradients are summed over them")
    fsdp: int = operational(-1, "parameters, optimizer state and batch are split over this axis")
    expert: int = operational(1, "experts are split over this axis; dense models split the batch over it")
    context: int = operational(
        1, "sequence is split over this axis: windows fetch the keys before their shard, full attention runs as a ring")
    tensor: int = operational(1, "heads, feed-forward width and vocabulary are split over this axis")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Where the tokens come from and how documents meet in a window."""

    # Operational: a store may move. What it holds is compared on resume (TrainData.check_state).
    store: str = operational("", "token store, a folder or gs:// or s3:// address with one folder per source; "
                                 "empty means data/<config name>")
    stores: dict[str, str] = operational({}, "source name -> its own folder or address, for sources that do not lie in store")
    source_tokens: dict[str, float] = operational(
        {}, "source name -> tokens it is planned to have: for neo.data.inspect and mixtures by epochs before there is a store")
    seed: int = identity(0, "seed of the data order")
    max_epochs: float = operational(
        4.0, "refuse a plan that reads a source more often than this over the run; up to 4 times costs next to nothing "
             "(arXiv:2305.16264); 0 = no limit")
    max_epochs_of: dict[str, float] = operational({}, "source name -> its own limit instead of max_epochs")
    cross_document_attention: bool = identity(
        False, "let a token attend to earlier documents of its window (MAP-NEO does); else segments are kept apart")
    mask_end_of_document: bool = identity(
        False, "leave out of the loss the first token of a document, predicted from the end of another")
    mask_repetition: bool = identity(
        False, "leave out of the loss windows in which 1 to 13 tokens repeat 32 times or more (OLMo-core's filter)")
    synthetic: bool = identity(False, "random tokens instead of a store, to burn in a machine; never export such a model")
    prefetch: int = operational(2, "batches prepared ahead by a background thread")
    cache: str = operational("", "local folder that keeps what was read of remote stores; empty = only in memory")
    cache_gb: float = operational(10.0, "most that data.cache may hold, in 1e9 bytes; the longest unused goes first")
    amend: bool = operational(
        False, "take a changed mixture of the current phase as an amendment: it acts from the step at which the run goes on")
    reweight_steps: int = operational(
        0, "every so many steps, new mixture weights from the held-out loss of each source (Sheared-LLaMA, arXiv:2310.06694); "
           "0 = never")
    reweight_reference: dict[str, float] = operational(
        {}, "reweight_steps: source name -> held-out loss that it is meant to reach, nats per token")
    reweight_rate: float = operational(1.0, "reweight_steps: weight *= exp(this * (loss - reference)) (1 in the paper)")
    reweight_floor: float = operational(
        1e-4, "reweight_steps: share spread evenly over all sources (1e-4 in the authors' code)")
    reweight_clip: float = operational(1.0, "reweight_steps: loss - reference counts from 0 to this")

    @property
    def reweight_lead(self) -> int:
        """Steps from a decision on weights to its effect."""
        return min(self.reweight_steps, REWEIGHT_LEAD)


@dataclasses.dataclass(frozen=True)
class PhaseConfig:
    """One stretch of a run: how many tokens, cut how, mixed how, learnt at what rate."""

    name: str = identity("main", "name, used to address the phase in overrides")
    tokens: int = identity(0, "target tokens of the phase; rounded up to whole steps")
    seq_len: int = identity(8192, "T, tokens per sequence")
    global_batch: int = identity(1024, "B, sequences per optimizer step over all devices")
    batch_ramp: tuple[int, ...] = identity(
        (), "global batches before global_batch, each for an equal share of batch_ramp_tokens")
    batch_ramp_tokens: int = identity(0, "tokens of the phase that batch_ramp takes")
    mixture: dict[str, float] = identity({}, "source name -> weight; weights are normalised; 0 switches a source off")
    mixture_end: dict[str, float] = identity(
        {}, "mixture at the end of the phase, reached in a straight line; empty = the same all along")
    mixture_unit: str = identity(
        "weight", "what the mixtures count: weights of any size, tokens of the phase, or epochs of each source; with "
                  "tokens = 0 the phase is as long as they say", MIXTURE_UNITS)
    peak_lr: float = identity(2e-4, "learning rate at the end of the warm-up")
    start_lr: float = identity(0.0, "learning rate at the first token of the warm-up")
    final_lr: float = identity(2e-5, "learning rate at the last token of the phase")
    warmup_tokens: int = identity(0, "tokens of linear warm-up from start_lr to peak_lr")
    lr_shape: str = identity("cosine", "how the rate goes from peak_lr to final_lr", LR_SHAPES)
    rope_base: float = identity(0.0, "rotary base during this phase; 0 means model.rope_base")

    @property
    def tokens_per_step(self) -> int:
        """Target tokens of a step, after any batch_ramp."""
        return self.seq_len * self.global_batch

    @property
    def batches(self) -> tuple[tuple[int, int], ...]:
        """(steps, global batch) one after the other: batch_ramp, each at least one step, then global_batch."""
        parts, left = [], self.tokens
        for batch in self.batch_ramp:
            per_step = self.seq_len * batch
            steps = min(max(1, round(self.batch_ramp_tokens / len(self.batch_ramp) / per_step)), -(-left // per_step))
            parts.append((steps, batch))
            left = max(0, left - steps * per_step)
        parts.append((-(-left // (self.seq_len * self.global_batch)), self.global_batch))
        return tuple((steps, batch) for steps, batch in parts if steps)

    @property
    def steps(self) -> int:
        """Optimizer steps of the phase: its tokens, rounded up to whole steps."""
        return sum(steps for steps, _ in self.batches)

    @property
    def whole_tokens(self) -> int:
        """Target tokens of those steps."""
        return sum(steps * batch for steps, batch in self.batches) * self.seq_len


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The update rule. Learning rates belong to the phases."""

    name: str = identity("adamw", "update rule", OPTIMIZERS)
    b1: float = identity(0.9, "decay of the first moment")
    b2: float = identity(0.95, "decay of the second moment")
    eps: float = identity(1e-8, "added to the root of the second moment")
    weight_decay: float = identity(0.1, "decoupled decay of matrices, times the learning rate; norms have none")
    clip_norm: float = identity(1.0, "gradients are scaled down to this global norm; 0 = never")
    z_loss: float = identity(0.0, "weight of mean(logsumexp(logits)^2) in the loss")


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """What the first step starts from."""

    seed: int = identity(0, "seed of the initial parameters; the same on every mesh")
    scheme: str = identity(
        "normal", "normal: every matrix with deviation std; kaiming: sqrt(2 / fan in), and 1 / sqrt(2 L) of that for "
                  "matrices that add to the residual stream (llm-foundry)", INIT_SCHEMES)
    std: float = identity(0.02, "standard deviation of all matrices (norm gains start at 1)")
    gain_width: int = identity(
        256, "model.wesar: gains start at sqrt(this / D), those that add to the residual stream at 1 / sqrt(2 L) of that")
    checkpoint: str = identity(
        "", "start from the parameters of this CHECKPOINT (also a Hugging Face folder) instead of random ones")
    from_hf: str = identity("", "start from this Hugging Face folder or repository instead of random parameters")
    depth: str = identity(
        "none", "a start from fewer blocks than the model has: repeat blocks spread over the depth (interleave) or the "
                "last ones once more at the end (stack)", DEPTH_SCHEMES)
    new_blocks: str = identity(
        "copy", "added blocks: copies as they are, or identity (their output matrices start at zero)", NEW_BLOCKS)
    extend_vocab: bool = identity(
        False, "a start from a model with another tokenizer: rows of new tokens start at the mean of their old pieces' rows")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a step is carried out."""

    steps: int = operational(0, "stop after this step and leave the schedule as it is; 0 = all phases")
    scale_tokens: float = identity(1.0, "shrink the tokens and warm-up of every phase by this factor")
    micro_batch: int = operational(
        0, "sequences per device in one forward pass; the global batch is kept by accumulation; 0 = auto: largest that fits")
    compute_dtype: str = operational(
        "auto", "type of activations and matrix products; auto: bfloat16 where the device has it", COMPUTE_DTYPES)
    attention: str = operational("auto", "attention implementation", ATTENTION_IMPLEMENTATIONS)
    check_attention: bool = operational(
        True, "hold the attention kernel against the plain form on the device before training starts (seconds)")
    remat: str = operational("minimal", "what the backward pass keeps instead of recomputing", REMAT_POLICIES)
    check_memory: bool = operational(True, "refuse to start when the estimate exceeds the device's memory")
    compiler_flags: str = operational(
        "auto", "auto: the compiler flags that help on this chip, each unless LIBTPU_INIT_ARGS or XLA_FLAGS sets it; none: "
                "change nothing", COMPILER_FLAGS)
    compile_cache: bool = operational(True, "keep compiled programs in the workdir, for quick restarts")
    join_seconds: int = operational(300, "how long the processes of a run wait for each other at the start")
    heartbeat_seconds: int = operational(60, "a process that the others have not heard of for so long is lost, and all stop")
    profile_steps: tuple[int, ...] = operational(
        (), "trace from one step to another, as 10,12, into profile/ of the workdir; empty = never")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and which are kept. The last step is always saved."""

    every_steps: int = operational(500, "save every so many steps; 0 = only at the end and when interrupted")
    keep_last: int = operational(2, "how many of the newest checkpoints are kept")
    permanent_every_steps: int = operational(0, "checkpoints at multiples of this step are never removed; 0 = none")


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Held-out evaluation, on documents that are never trained on."""

    every_steps: int = operational(500, "evaluate every so many steps; 0 = only at the end")
    tokens: int = operational(1_000_000, "validation tokens per source and evaluation, or all there are")
    sample_every_steps: int = operational(0, "write samples every so many steps; 0 = never")
    sample_prompts: tuple[str, ...] = operational(("",), "prompts of those samples")
    sample_tokens: int = operational(64, "new tokens per sample")


@dataclasses.dataclass(frozen=True)
class LogConfig:
    """What is shown and written while the run goes on."""

    every_steps: int = operational(10, "metrics are recorded every so many steps")
    progress: str = operational("auto", "live panel on a terminal, plain lines elsewhere", PROGRESS_MODES)
    tensorboard: bool = operational(True, "write scalars for TensorBoard")
    wandb: str = operational("", "Weights & Biases project; empty = off (needs the wandb extra)")
    plot: bool = operational(True, "draw loss.png at every evaluation and at the end")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run. `name` is the config file's, and names the default store and workdir."""

    name: str = identity("", "name of the recipe: the config file's name unless it sets another")
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    phases: tuple[PhaseConfig, ...] = ()
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    init: InitConfig = dataclasses.field(default_factory=InitConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)

    @property
    def sources(self) -> tuple[str, ...]:
        """All source names, in the order in which the phases first mention them."""
        return tuple(dict.fromkeys(name for phase in self.phases for name in (*phase.mixture, *phase.mixture_end)))

    @property
    def total_steps(self) -> int:
        return sum(phase.steps for phase in self.phases)


GROUPS: dict[str, type] = {
    "model": ModelConfig, "mesh": MeshConfig, "data": DataConfig, "phases": PhaseConfig,
    "optimizer": OptimizerConfig, "init": InitConfig, "train": TrainConfig,
    "checkpoint": CheckpointConfig, "eval": EvalConfig, "log": LogConfig,
}
