"""Combinations that cannot work, each refused with one line, before anything is allocated."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from neo.config.schema import Config, InitConfig, PhaseConfig
from neo.errors import InputError, nearest

# Names become folders and parts of dotted fields.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")


def _require(condition: bool, text: str) -> None:
    if not condition:
        raise InputError(f"config.{text}")


def check(config: Config) -> Config:
    """Return `config` if it can run on some machine; else InputError naming field, value and what would be right."""
    _require(bool(_NAME.fullmatch(config.name.replace(".", "_"))) if config.name else True,
             f"name={config.name!r}: letters, digits, '.', '_' and '-' only; it names the default workdir and store")
    _check_model(config)
    _check_phases(config)
    _check_data(config)
    optimizer, train = config.optimizer, config.train
    for name in ("b1", "b2"):
        value = getattr(optimizer, name)
        _require(0 <= value < 1, f"optimizer.{name}={value}: a number from 0 to below 1 is needed")
    for name in ("eps", "weight_decay", "clip_norm", "z_loss"):
        value = getattr(optimizer, name)
        _require(value >= 0, f"optimizer.{name}={value}: 0 or more is needed")
    for name, least in (("join_seconds", 1), ("heartbeat_seconds", 5)):
        value = getattr(train, name)
        _require(value >= least, f"train.{name}={value}: {least} or more is needed")
    _require(train.scale_tokens > 0, f"train.scale_tokens={train.scale_tokens}: more than 0 is needed")
    _check_init(config.init)
    traced = train.profile_steps
    _require(not traced or len(traced) == 2 and 2 <= traced[0] <= traced[1],
             f"train.profile_steps={','.join(map(str, traced))}: the first and the last step to trace are needed, as 10,12; "
             "from step 2 on, because the first step of a start also warms up")
    _require(config.log.every_steps >= 1, f"log.every_steps={config.log.every_steps}: 1 or more is needed")
    _require(config.checkpoint.keep_last >= 1, f"checkpoint.keep_last={config.checkpoint.keep_last}: 1 or more is needed")
    for path in ("train.steps", "train.micro_batch", "checkpoint.every_steps", "checkpoint.permanent_every_steps",
                 "eval.every_steps", "eval.tokens", "eval.sample_every_steps"):
        group, name = path.split(".")
        value = getattr(getattr(config, group), name)
        _require(value >= 0, f"{path}={value}: 0 or more is needed")
    return config


def _check_model(config: Config) -> None:
    model = config.model
    for name in ("vocab_size", "num_layers", "d_model", "num_heads", "num_kv_heads", "d_ff", "max_seq_len"):
        value = getattr(model, name)
        _require(value >= 1, f"model.{name}={value}: 1 or more is needed")
    _require(model.num_heads % model.num_kv_heads == 0,
             f"model.num_heads={model.num_heads} is not divisible by model.num_kv_heads={model.num_kv_heads}; "
             f"kv heads that fit: {', '.join(str(k) for k in range(1, model.num_heads + 1) if model.num_heads % k == 0)}")
    _require(model.head_dim > 0 or model.d_model % model.num_heads == 0,
             f"model.d_model={model.d_model} is not divisible by model.num_heads={model.num_heads}; set model.head_dim")
    rotary = {"rope", "local_rope"} & set(model.positions)
    _require(not rotary or model.head_size % 2 == 0,
             f"model.head_dim={model.head_size}: rotary position embedding needs an even size")
    _require(len(model.windows) >= 1 and all(w >= 0 for w in model.windows),
             f"model.windows={model.windows}: one or more numbers, each the visible keys including self, or 0 for all")
    _require(len(model.windows) <= model.num_layers,
             f"model.windows has {len(model.windows)} entries for model.num_layers={model.num_layers}; at most one each")
    _require(len(model.positions) >= 1, "model.positions is empty: one scheme for all layers or a pattern is needed")
    _require(len(model.positions) <= model.num_layers, f"model.positions has {len(model.positions)} entries for "
                                                       f"model.num_layers={model.num_layers}; at most one each")
    for name in ("rope_base", "local_rope_base", "rope_factor", "alibi_bias_max", "rope_low_frequency", "rope_old_seq_len",
                 "embedding_multiplier", "residual_multiplier", "logit_multiplier"):
        value = getattr(model, name)
        _require(value > 0, f"model.{name}={value}: more than 0 is needed")
    _require(model.rope_high_frequency > model.rope_low_frequency,
             f"model.rope_high_frequency={model.rope_high_frequency}: more than model.rope_low_frequency="
             f"{model.rope_low_frequency} is needed")
    for name in ("clip_qkv", "attention_scale", "attention_softcap", "logit_softcap", "norm_eps"):
        value = getattr(model, name)
        _require(value >= 0, f"model.{name}={value}: 0 or more is needed")
    _require(not (model.wesar and model.norm_placement == "post"),
             "model.wesar=True needs norms before the sublayers: model.norm_placement=pre or sandwich")


def _check_init(init: InitConfig) -> None:
    _require(init.std >= 0, f"init.std={init.std}: 0 or more is needed")
    _require(init.gain_width >= 1, f"init.gain_width={init.gain_width}: 1 or more is needed")
    named = init.checkpoint or init.from_hf
    _require(not (init.checkpoint and init.from_hf),
             "init.checkpoint and config.init.from_hf are both given; a run starts from one of them")
    for name in ("depth", "new_blocks", "extend_vocab"):
        value = getattr(init, name)
        _require(bool(named) or value == getattr(InitConfig(), name),
                 f"init.{name}={value} changes a model to start from, and none is given; add --config.init.from_hf=FOLDER "
                 "or --config.init.checkpoint=CHECKPOINT")
    _require(init.new_blocks == "copy" or init.depth != "none",
             f"init.new_blocks={init.new_blocks} says how added blocks start, and none are added; add "
             "--config.init.depth=interleave or stack")


def _check_phases(config: Config) -> None:
    _require(len(config.phases) > 0, "phases is empty: a run needs at least one phase(...)")
    names = [phase.name for phase in config.phases]
    _require(len(set(names)) == len(names), f"phases: names must differ, got {', '.join(names)}")
    for phase in config.phases:
        at = f"phases.{phase.name}"
        _require(bool(_NAME.fullmatch(phase.name)),
                 f"phases: the name {phase.name!r} may have letters, digits, '_' and '-' only")
        for name in ("tokens", "seq_len", "global_batch"):
            value = getattr(phase, name)
            _require(value >= 1, f"{at}.{name}={value}: 1 or more is needed")
        _require(phase.seq_len <= config.model.max_seq_len,
                 f"{at}.seq_len={phase.seq_len} is longer than model.max_seq_len={config.model.max_seq_len}")
        _require(0 <= phase.warmup_tokens <= phase.tokens,
                 f"{at}.warmup_tokens={phase.warmup_tokens}: from 0 to the phase's tokens={phase.tokens} "
                 "(train.scale_tokens shrinks both)")
        for name in ("peak_lr", "start_lr", "final_lr", "rope_base"):
            value = getattr(phase, name)
            _require(value >= 0, f"{at}.{name}={value}: 0 or more is needed")
        _check_mixtures(config, phase)


def _check_mixtures(config: Config, phase: PhaseConfig) -> None:
    at = f"phases.{phase.name}"
    for name in ("mixture", "mixture_end"):
        weights = getattr(phase, name)
        _require(any(weight > 0 for weight in weights.values()) or (name == "mixture_end" and not weights),
                 f"{at}.{name}={weights}: at least one source needs a weight above 0, as in {name}={{'code': 1.0}}")
        for source, weight in weights.items():
            _require(bool(_NAME.fullmatch(source)),
                     f"{at}.{name}: source name {source!r} may have letters, digits, '_' and '-' only")
            _require(weight >= 0 and weight < float("inf"), f"{at}.{name}.{source}={weight}: 0 or more is needed")
    _require(all(batch >= 1 for batch in phase.batch_ramp),
             f"{at}.batch_ramp={phase.batch_ramp}: batches of 1 or more are needed")
    _require(bool(phase.batch_ramp) == (phase.batch_ramp_tokens > 0) and phase.batch_ramp_tokens <= phase.tokens,
             f"{at}.batch_ramp_tokens={phase.batch_ramp_tokens}: with a batch_ramp more than 0 and at most the phase's "
             f"tokens={phase.tokens}, without one 0")


def _check_data(config: Config) -> None:
    data, sources = config.data, config.sources
    known = set(sources)
    for field in ("stores", "source_tokens", "max_epochs_of", "reweight_reference"):
        for name in getattr(data, field):
            # Entries for sources that overrides took out of the mixtures are no mistake; misspelt ones are.
            like = "" if name in known else nearest(name, known)
            _require(not like, f"data.{field} names {name!r}, which no mixture has{like}")
    for name in ("max_epochs", "cache_gb", "prefetch", "reweight_steps", "reweight_rate", "reweight_clip"):
        _require(getattr(data, name) >= 0, f"data.{name}={getattr(data, name)}: 0 or more is needed")
    for field in ("source_tokens", "max_epochs_of"):
        for name, value in getattr(data, field).items():
            _require(value > 0, f"data.{field}.{name}={value}: more than 0 is needed")
    _require(0 <= data.reweight_floor < 1, f"data.reweight_floor={data.reweight_floor}: a share from 0 to below 1 is needed")
    if data.reweight_steps:
        without = [name for name in sources if name not in data.reweight_reference]
        _require(not without, f"data.reweight_steps={data.reweight_steps} needs a reference loss for each source; "
                              f"config.data.reweight_reference lacks {', '.join(without[:8])}")
        ramped = [phase.name for phase in config.phases if phase.mixture_end]
        _require(not ramped, f"data.reweight_steps={data.reweight_steps} sets the weights, and so does "
                             f"phases.{(ramped or [''])[0]}.mixture_end; use one of them")
        _require(data.prefetch < data.reweight_lead,
                 f"data.prefetch={data.prefetch}: with data.reweight_steps={data.reweight_steps} new weights act "
                 f"{data.reweight_lead} steps after they are decided: make at most {data.reweight_lead - 1} batches ahead")


def check_on_mesh(config: Config, sizes: Mapping[str, int]) -> None:
    """Refuse a model or batch that these mesh axis sizes cannot split evenly."""
    model, tensor, fsdp = config.model, sizes["tensor"], sizes["fsdp"]
    split = {name: getattr(model, name) for name in ("num_heads", "d_ff", "vocab_size")}
    for name, value in split.items():
        _require(value % tensor == 0, f"mesh.tensor={tensor} does not divide model.{name}={value}; the next smaller that "
                                      f"divides {', '.join(split)}: {_divisor(math.gcd(*split.values()), tensor)}")
    kv = model.num_kv_heads
    _require(kv % tensor == 0 or tensor % kv == 0,
             f"mesh.tensor={tensor} fits neither way with model.num_kv_heads={kv}: kv heads can be split over a divisor "
             f"of {kv}, or replicated over a multiple of {kv} (that divides model.num_heads={model.num_heads})")
    _require(model.d_model % fsdp == 0, f"mesh.fsdp={fsdp} does not divide model.d_model={model.d_model}; set "
                                        f"mesh.fsdp={math.gcd(model.d_model, fsdp)} and mesh.replica=-1")
    ways = sizes["replica"] * fsdp * sizes["expert"]
    for phase in config.phases:
        _check_sequence_split(config, phase, sizes["context"])
        fields = [("global_batch", phase.global_batch), *(("batch_ramp", batch) for batch in phase.batch_ramp)]
        for name, batch in fields:
            _require(batch % ways == 0,
                     f"phases.{phase.name}.{name}={batch} is not divisible by the {ways} devices the batch "
                     f"is split over (replica x fsdp x expert); nearest: {max(ways, batch // ways * ways)}")
            if config.train.micro_batch:
                _require(batch // ways % config.train.micro_batch == 0,
                         f"train.micro_batch={config.train.micro_batch} does not divide the {batch // ways} sequences per "
                         f"device of phases.{phase.name}.{name}={batch}")


def _divisor(value: int, most: int) -> int:
    """The largest divisor of `value` that is at most `most`."""
    return next(n for n in range(min(value, most), 0, -1) if value % n == 0)


def _check_sequence_split(config: Config, phase: PhaseConfig, context: int) -> None:
    """Attention that sees all earlier tokens takes two chunks of the sequence per device, to share the work evenly."""
    if context == 1:
        return
    full = any(not window or window >= phase.seq_len for window in config.model.windows)
    parts, lower = (2 * context if full else context), phase.seq_len // (2 * context if full else context)
    fits = [str(n * parts) for n in (lower, lower + 1) if 0 < n * parts <= config.model.max_seq_len]
    _require(phase.seq_len % parts == 0,
             f"phases.{phase.name}.seq_len={phase.seq_len} cannot be split over mesh.context={context}: a multiple of {parts} "
             f"is needed{' (two parts per device, because of layers without a window)' if full else ''}; "
             f"{'nearest: ' + ' or '.join(fits) if fits else 'use a smaller mesh.context'}")
