"""From a config and a topology to a `Plan`: what a run there would choose, compiled (TPUs) or worked out (GPUs), and priced."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from neo.config import Config, PhaseConfig
from neo.config.checks import check_on_mesh
from neo.errors import InputError
from neo.models.decoder import Decoder
from neo.models.flops import parameter_count, train_flops_per_token
from neo.parallel.mesh import AXES, BATCH_AXES, mesh_shape
from neo.parallel.rules import Layout, rules_for
from neo.plan.compile import phase_of
from neo.plan.plan import Compiled, Cost, MemoryUse, Plan
from neo.train import attention_choice, memory

if TYPE_CHECKING:
    from neo.plan.topology import Topology

STATE_BYTES = 12   # of a parameter in a checkpoint: itself and two moments, float32

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Engine:
    """Who compiles and who prices, so that a test can do it without a compiler.

    Attributes:
        compile: (config, topology, phase name) -> Compiled; None where there is no offline compiler.
        price: (compiled, topology) -> Cost of a compiled step.
        rough: (setting) -> Cost from the config alone: for GPUs, and to order the candidates of a search.
        flags: of the compiler, as "--name=value".
    """

    compile: Callable[[Config, Topology, str], Compiled] | None
    price: Callable[[Compiled, Topology], Cost]
    rough: Callable[[Setting], Cost]
    flags: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Setting:
    """A config on a topology, with everything "auto" resolved as a run there resolves it. Nothing is compiled yet."""

    config: Config
    phase: PhaseConfig
    topology: Topology
    sizes: dict[str, int]        # devices per mesh axis
    decoder: Decoder
    micro_batch: int             # sequences per device and pass

    @property
    def local_batch(self) -> int:
        """Sequences of a device in a step."""
        return self.phase.global_batch // math.prod(self.sizes[axis] for axis in BATCH_AXES)

    @property
    def accumulation(self) -> int:
        """Passes of a step."""
        return self.local_batch // self.micro_batch

    @property
    def capacity(self) -> int:
        """Bytes of HBM that a program may use on a device."""
        return self.topology.chip.hbm_bytes

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        return parameter_count(self.config.model)["total"]

    @property
    def flops(self) -> tuple[float, float]:
        """Model FLOPs of a step on one device: (all pairs of attention, visible pairs)."""
        per_token = train_flops_per_token(self.config.model, self.phase.seq_len)
        tokens = self.phase.tokens_per_step / self.topology.devices
        return per_token.full * tokens, per_token.causal * tokens

    def estimate(self) -> MemoryUse:
        """Memory by the analytic bound that `neo.train` plans with."""
        need = memory.estimate(self.decoder, self.phase, self.sizes, self.micro_batch)
        held = need.params + need.optimizer
        return MemoryUse(held, need.total - held, need.total, self.capacity, "estimate")


def setting(config: Config, topology: Topology, phase: str = "", micro_batch: int = 0) -> Setting:
    """What a run of `config` on `topology` would choose.

    Args:
        phase: its name; default the phase with the most tokens.
        micro_batch: sequences per device and pass instead of the config's.

    Raises InputError, as the run would, for a mesh that these devices cannot be, and a batch or model it does not split.
    """
    sizes = dict(zip(AXES, mesh_shape(config.mesh, topology.devices), strict=True))
    check_on_mesh(config, sizes)
    if topology.slices > 1 and sizes["replica"] % topology.slices:
        raise InputError(f"config.mesh.replica={sizes['replica']} on {topology.slices} slices: only replica may cross slices, "
                         f"so it must be a multiple of {topology.slices}: --config.mesh.replica={topology.slices}")
    one = phase_of(config, phase)
    dtype = "bfloat16" if config.train.compute_dtype == "auto" else config.train.compute_dtype
    asked = attention_choice.requests(config, dtype, sizes, topology.platform, topology.chip.device_kind)
    attention, _ = attention_choice.choose(config, asked)
    decoder = Decoder(config.model, jnp.dtype(dtype), config.train.remat, attention,
                      Layout(None, rules_for(config.model.num_kv_heads, sizes["tensor"])))
    micro_batch = micro_batch or memory.choose_micro_batch(config, decoder, one, sizes, topology.chip.hbm_bytes,
                                                           topology.platform)
    return Setting(config, one, topology, sizes, decoder, micro_batch)


def plan(config: Config, topology: Topology, engine: Engine, *, phase: str = "", overrides: Sequence[str] = ()) -> Plan:
    """The plan of a config on a topology.

    Args:
        phase: which one is planned; default the phase with the most tokens.
        overrides: `--config.*` that led to `config`, kept in the plan.

    A step that the compiler refuses for its size comes back as a plan that does not fit. Raises InputError as `setting`.
    """
    chosen = setting(config, topology, phase)
    if engine.compile is None:
        return _filled(chosen, engine.rough(chosen), chosen.estimate(), overrides=overrides)
    compiled = engine.compile(config, topology, chosen.phase.name)
    if "micro_batch" in compiled.facts:   # what was compiled counts, should the child ever choose otherwise
        chosen = dataclasses.replace(chosen, micro_batch=compiled.facts["micro_batch"])
    cost = None if compiled.refused else engine.price(compiled, topology)
    facts = {"versions": dict(compiled.versions), "warnings": list(compiled.warnings), "cached": compiled.cached,
             "lower_s": compiled.lower_s, "program": compiled.key}
    return _filled(chosen, cost, compiled.memory, overrides=overrides, flags=engine.flags, compile_s=compiled.compile_s,
                   refused=compiled.refused, **facts)


def _filled(chosen: Setting, cost: Cost | None, use: MemoryUse, *, overrides: Sequence[str], flags: tuple[str, ...] = (),
            compile_s: float = 0.0, refused: str = "", **facts: Any) -> Plan:
    config, phase, topology = chosen.config, chosen.phase, chosen.topology
    parameters = chosen.parameters
    full, causal = chosen.flops
    notes = [topology.note] if topology.note else []
    if len(config.phases) > 1:
        notes.append(f"the days are for all {len(config.phases)} phases at the speed of this one")
    facts |= {"notes": notes, "checkpoint_every_steps": config.checkpoint.every_steps}
    return Plan(
        config=config.name, topology=topology.name, chip=topology.chip.name, devices=topology.devices, phase=phase.name,
        mesh=chosen.sizes, global_batch=phase.global_batch, seq_len=phase.seq_len, micro_batch=chosen.micro_batch,
        accumulation=chosen.accumulation, remat=config.train.remat, attention=chosen.decoder.attention, parameters=parameters,
        run_tokens=sum(one.whole_tokens for one in config.phases), run_steps=config.total_steps,
        tokens_per_step=phase.tokens_per_step, flops_full=full, flops_causal=causal,
        peak_flops=topology.chip.peak_flops, memory=use, cost=cost, overrides=tuple(overrides), flags=flags,
        compile_s=compile_s, refused=refused, checkpoint_bytes=STATE_BYTES * parameters, facts=facts)


def engine_for(topology: Topology, cache: Path, say: Say, flags: str = "") -> Engine:
    """The real one: libtpu for TPUs, the roofline for GPUs.

    Args:
        cache: folder of compiled programs and kernel prices.
        say: hears what is going on.
        flags: "--a=1 --b=2" instead of those that neo.train sets for the chip; "quick" for these without the ones that
            multiply the time of a compile; "none" for none.

    Raises InputError where libtpu is missing.
    """
    if topology.platform == "gpu":
        from neo.plan.roofline import roofline
        if flags not in ("", "none"):
            raise InputError(f"--flags={flags}: nothing is compiled for GPUs, a plan of them knows no flags")
        return Engine(None, _no_price, roofline)
    from neo.plan import libtpu
    from neo.plan.compile import compile_step
    from neo.plan.cost import cost
    from neo.plan.kernels import kernel_prices
    from neo.plan.rough import rough
    libtpu.version()
    chosen = flags_of(topology, flags)

    def compiled(config: Config, topology: Topology, phase: str) -> Compiled:
        return compile_step(config, topology, phase, flags=chosen, cache=cache, progress=say)

    def price(compiled: Compiled, topology: Topology) -> Cost:
        prices = kernel_prices(compiled, topology, cache=cache, progress=say)
        found = cost(compiled.hlo, topology.chip, prices, mesh=compiled.facts["mesh"], torus=topology.torus)
        return dataclasses.replace(found, notes=(*found.notes, *prices.notes, *caveats(topology)))

    return Engine(compiled, price, rough, chosen)


def caveats(topology: Topology) -> tuple[str, ...]:
    """Where libtpu compiles for something else than the machine. Seen with 0.0.50.1: gathers as on one slice without rings on
    v4, v5p and tpu7x; on v5p `wrap` and the plain name make no difference."""
    if topology.slices > 1 and topology.chip.sides == 3 and any(topology.wrap):
        return ("without a machine libtpu knows several 3D slices only with open rings, on which weights are gathered by "
                "all-reduces of twice the bytes: too slow a step; a plan of one slice with --scaling is nearer",)
    return ()


def flags_of(topology: Topology, text: str) -> tuple[str, ...]:
    """The compiler flags that `--flags` asks for; InputError for what is none."""
    from neo.parallel.compiler_flags import flags_for
    if text == "none":
        return ()
    if text in ("", "quick"):
        return tuple(flag.text for flag in flags_for(topology.kind) if not (text and flag.slow))
    flags = tuple(text.split())
    wrong = [flag for flag in flags if not flag.startswith("--") or "=" not in flag]
    if wrong:
        raise InputError(f"--flags: {wrong[0]!r} is no flag; give '--name=value --name=value', quick or none")
    return flags


def _no_price(compiled: Compiled, topology: Topology) -> Cost:
    raise AssertionError("nothing is compiled for GPUs")
