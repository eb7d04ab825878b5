"""One start of one run, put together: everything the loop and its hooks work on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from neo.config import Config
from neo.config.checks import check_on_mesh
from neo.config.schema import PhaseConfig
from neo.data import amendments
from neo.data.loader import TrainData, open_sources, open_tokenizer
from neo.errors import InputError
from neo.models.decoder import Decoder
from neo.models.flops import parameter_count, train_flops_per_token
from neo.parallel import devices as device_facts
from neo.parallel import distributed
from neo.parallel.mesh import AXES, BATCH_AXES, make_mesh
from neo.parallel.rules import Layout, rules_for
from neo.train import attention_choice, initial, memory, reweighting, schedule, startup
from neo.train.checkpoint_format import checkpoints_in
from neo.train.checkpoints import Checkpoints, restore
from neo.train.optimizer import Optimizer
from neo.train.progress import Log, count
from neo.train.step import Step, StepOptions, abstract_batch, abstract_state, init_state, make_step
from neo.train.workdir import Workdir


class Clock:
    """Seconds since start by part, for `goodput/*`."""

    PARTS = ("startup", "step", "data", "eval", "checkpoint", "other")

    def __init__(self, started: float):
        self._mark = started
        self.seconds = dict.fromkeys(self.PARTS, 0.0)

    def lap(self, part: str) -> float:
        """Everything since the last lap was `part`; returns its seconds."""
        now = time.monotonic()
        spent, self._mark = now - self._mark, now
        self.seconds[part] += spent
        return spent

    def shares(self) -> dict[str, float]:
        """Part -> share of all time so far."""
        total = sum(self.seconds.values()) or 1.0
        return {f"goodput/{part}": self.seconds[part] / total for part in self.PARTS if part != "other"}


@dataclasses.dataclass
class Session:
    """What the loop works on. `state` and `steps_done` change with every step; the rest is fixed."""

    config: Config
    workdir: Workdir
    log: Log
    clock: Clock
    decoder: Decoder
    optimizer: Optimizer
    sources: Mapping[str, Any]
    data: TrainData
    tokenizer: Any                    # None on synthetic data
    micro_batches: Mapping[str, int]  # per phase: sequences per device and pass
    checkpoints: Checkpoints
    state: Any
    start_step: int
    stop_step: int
    steps_done: int = 0
    origin: Mapping[str, Any] = dataclasses.field(default_factory=dict)   # of a first start: what init read, from where
    _compiled: dict[tuple, Any] = dataclasses.field(default_factory=dict)

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return self.decoder.layout.mesh

    @property
    def batch_ways(self) -> int:
        """Devices that the batch is split over."""
        return int(np.prod([self.mesh.shape[axis] for axis in BATCH_AXES]))

    @property
    def batch_sharding(self) -> jax.sharding.NamedSharding:
        return self.decoder.layout.sharding("batch", "sequence")

    def phase_after(self, steps: int) -> PhaseConfig:
        """The phase of the last of `steps` steps (of the first step when there is none)."""
        return self.config.phases[schedule.place(self.config, max(steps - 1, 0)).phase]

    def step_for(self, phase: PhaseConfig, global_batch: int) -> Step:
        """The compiled step of a phase at a batch size; compiled when first asked for, with its time and memory in the log.

        Phases of equal shapes share one program.
        """
        program = (global_batch, phase.seq_len, phase.rope_base)
        if program not in self._compiled:
            self._compiled[program] = self._compile(phase, global_batch)
        return self._compiled[program]

    def _compile(self, phase: PhaseConfig, global_batch: int) -> Step:
        local, micro = global_batch // self.batch_ways, self.micro_batches[phase.name]
        while local % micro:   # the batches of a ramp are smaller than the one that micro divides
            micro -= 1
        accumulation = local // micro
        optimizer = self.config.optimizer
        options = StepOptions(num_sources=len(self.data.order.sources), accumulation=accumulation, rope_base=phase.rope_base,
                              clip_norm=optimizer.clip_norm, z_loss=optimizer.z_loss)
        batch = abstract_batch(self.decoder, global_batch, phase.seq_len)
        rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=self.decoder.layout.sharding())
        name = f"compiling the step of phase {phase.name} ({accumulation} micro-batches of {micro} per device)"
        with self.log.stage(name):
            step = make_step(self.decoder, self.optimizer, options)
            compiled = step.lower(abstract_state(self.decoder, self.optimizer), batch, rate, rate).compile()
        usage = compiled.memory_analysis()
        if usage is not None:
            peak = usage.argument_size_in_bytes + usage.temp_size_in_bytes
            self.log(f"the compiled step needs {peak / 1e9:.2f} GB per device")
        return compiled

    def rates(self, step: int) -> tuple[jax.Array, jax.Array]:
        """(learning rate, weight decay) of a 0-based step, as replicated float32 scalars."""
        place = self.decoder.layout.sharding()
        put = lambda x: jax.make_array_from_callback((), place, lambda _: np.float32(x))   # noqa: E731
        return put(schedule.learning_rate(self.config, step)), put(self.config.optimizer.weight_decay)

    def amend(self, amendment: amendments.Amendment, **details: Any) -> None:
        """Change the data order from a step on that no batch has been made for; told in events.jsonl with `details`."""
        self.data.amend(amendment)
        if jax.process_index() == 0:
            self.write_amendments()
            self.workdir.event("amendment", self.steps_done, effective=amendment.step, phase=amendment.phase,
                               reason=amendment.reason, mixture=dict(amendment.mixture), **details)

    def write_amendments(self) -> None:
        """amendments.json: what the checkpoint to come will hold, for people and for neo.data.trace."""
        if self.data.amendments or (self.workdir.path / amendments.FILE).exists():
            self.workdir.write_json(amendments.FILE, amendments.to_json(self.data.amendments))

    def save(self, state: Mapping[str, Any]) -> None:
        """Start a checkpoint of the state after `steps_done` steps."""
        if self.checkpoints.latest_step == self.steps_done:
            return
        phase = self.phase_after(self.steps_done).name
        data = {"step": self.steps_done, "tokens": schedule.tokens_after(self.config, self.steps_done), "phase": phase,
                "synthetic": self.config.data.synthetic, "order": self.data.state(self.steps_done)}
        files = {} if self.tokenizer is None else self.tokenizer.files()
        self.checkpoints.save(state, data, self.config, files)
        if jax.process_index() == 0:
            self.workdir.event("save", self.steps_done)


def build(config: Config, workdir: Workdir, log: Log) -> Session:
    """Check, read, allocate, restore: from a config to a session that is ready for its next step.

    Nothing is allocated on the devices before config, mesh, memory, data and checkpoint are known to fit.
    """
    found = distributed.devices()
    mesh = make_mesh(config.mesh, found)
    sizes = {axis: mesh.shape[axis] for axis in AXES}
    check_on_mesh(config, sizes)
    decoder = make_decoder(config, Layout(mesh, rules_for(config.model.num_kv_heads, sizes["tensor"])), found[0], log)
    optimizer = Optimizer(config.optimizer, decoder.axes())
    # Only local devices tell their memory, and hosts may differ: all processes must plan with the same number.
    capacity, platform = distributed.smallest(device_facts.memory_bytes(jax.local_devices()[0])), found[0].platform
    micro = {phase.name: memory.choose_micro_batch(config, decoder, phase, sizes, capacity, platform)
             for phase in config.phases}
    memory.check_fits(config, decoder, sizes, capacity, micro)
    first = config.phases[0]
    need = memory.estimate(decoder, first, sizes, micro[first.name])
    log(f"model: {parameter_count(config.model)['total']:,} parameters; estimated {need.text()} per device"
        + (f" of {capacity / 1e9:.1f}" if capacity else ""))

    own = checkpoints_in(workdir.path)
    saved = own[-1].data()["order"] if own else None
    with log.stage("opening the data"):
        sources = open_sources(config, amendments.saved_sources(saved))
        reweighting.check(config, sources)
        data = TrainData(config, sources, saved)
        tokenizer = open_tokenizer(config, sources)
    checkpoints = Checkpoints(workdir.path, config.checkpoint.keep_last, config.checkpoint.permanent_every_steps)
    stop = min(config.train.steps or config.total_steps, config.total_steps)
    state, start, origin = initial_state(config, checkpoints, decoder, optimizer, data, tokenizer, log)
    clock = Clock(log.started)
    return Session(config, workdir, log, clock, decoder, optimizer, sources, data, tokenizer, micro, checkpoints,
                   state, start, max(stop, start), start, origin)


def make_decoder(config: Config, layout: Layout, device: jax.Device, log: Log) -> Decoder:
    """The decoder with everything "auto" resolved once, and why in the log."""
    dtype = config.train.compute_dtype
    if dtype == "auto":
        dtype = "bfloat16" if device_facts.has_bfloat16(device) else "float32"
    sizes = {axis: layout.size(axis) for axis in AXES}
    asked = attention_choice.requests(config, dtype, sizes, device.platform, device.device_kind)
    attention, why = attention_choice.choose(config, asked)
    if attention_choice.needs_check(config, attention):
        with log.stage(f"checking attention {attention} on this device"):
            attention, why = attention_choice.checked(config, (attention, why), asked)
    for line in startup.table(config, layout.mesh, f"{attention} ({why})", dtype):
        log(line)
    return Decoder(config.model, jnp.dtype(dtype), config.train.remat, attention, layout)


def initial_state(config: Config, checkpoints: Checkpoints, decoder: Decoder, optimizer: Optimizer, data: TrainData,
                  tokenizer: Any, log: Log) -> tuple[Any, int, dict[str, Any]]:
    """The state to go on from, the steps it has done, and facts about what was read. Precedence is written here alone:

    1. this run's newest checkpoint: parameters, optimizer, data position
    2. init.checkpoint or init.from_hf: parameters only, made to fit as the other init options say
    3. scratch: random parameters from init.seed
    """
    others = initial.given(config.init)
    own = checkpoints.latest()
    if own is not None:
        abstract = abstract_state(decoder, optimizer)
        with log.stage(f"resuming from {own.path} (step {own.step}, {count(own.tokens)} tokens)"):
            loaded = restore(own, {"params": abstract["params"], "opt": abstract["opt"]})
        return {**loaded, "step": _scalar(own.step, decoder)}, own.step, {}
    if others:
        params, facts = initial.parameters(config, decoder, tokenizer, log)
        opt = jax.jit(optimizer.init, out_shardings=decoder.layout.shardings(optimizer.state_axes()))(params)
        return {"params": params, "opt": opt, "step": _scalar(0, decoder)}, 0, facts
    with log.stage(f"drawing random parameters from seed {config.init.seed}"):
        state = jax.block_until_ready(init_state(decoder, optimizer, config.init.seed, config.init))
    return state, 0, {}


def _scalar(value: int, decoder: Decoder) -> jax.Array:
    return jax.make_array_from_callback((), decoder.layout.sharding(), lambda _: np.int32(value))


def utilisation(session: Session, phase: PhaseConfig, tokens_per_s: float) -> dict[str, float]:
    """`perf/mfu` and `perf/mfu_causal`, where the device's peak is known."""
    peak = device_facts.peak_of(session.mesh.devices.flat[0].device_kind)
    if peak is None:
        return {}
    flops = train_flops_per_token(session.config.model, phase.seq_len)
    per_device = tokens_per_s / session.mesh.devices.size
    return {"perf/mfu": per_device * flops.full / peak.flops, "perf/mfu_causal": per_device * flops.causal / peak.flops}


def require_same_run(before: Mapping[str, Any] | None, config: Config, steps_done: int, workdir: Workdir) -> list[str]:
    """Changes of operational fields against the workdir's config; InputError when identity fields differ."""
    from neo.config import from_dict
    from neo.config.render import changes, identity_diff
    if before is None:
        return []
    old = from_dict(before)
    begun = 1 + schedule.place(old, min(max(steps_done - 1, 0), old.total_steps - 1)).phase
    if config.data.amend and begun <= len(config.phases):
        # Another mixture of the phase that the run is in is for amendments.resume to judge.
        current = dataclasses.replace(old.phases[begun - 1], mixture=config.phases[begun - 1].mixture,
                                      mixture_unit=config.phases[begun - 1].mixture_unit)
        old = dataclasses.replace(old, phases=(*old.phases[:begun - 1], current, *old.phases[begun:]))
    differences = identity_diff(old, config, begun)
    if differences:
        only_mixture = all(line.startswith(f"config.phases[{begun - 1}].mixture:") for line in differences)
        amend = "let the new mixture act from here on with --config.data.amend=True, " if only_mixture else ""
        raise InputError(f"workdir {workdir.path} holds a run with another identity: {'; '.join(differences)}; "
                         f"undo the change, {amend}or give another --workdir")
    return changes(from_dict(before), config)
