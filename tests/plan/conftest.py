"""Plans, topologies and compilers that are made up: what the planner does with their answers is tested, not the answers."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from neo.plan.plan import Collective, Compiled, Cost, KernelUse, MemoryUse, OpGroup, Plan
from neo.plan.planner import Engine
from neo.plan.topology import Topology, parse

GIB = 2 ** 30


@pytest.fixture
def made_cost():
    """made_cost(seconds of computation, communication, scheduled?) -> Cost: 70 % matrix products, 20 % kernels, 10 % other."""
    def make(compute: float = 1.0, communication: float = 0.2, exposed: float | None = 0.1) -> Cost:
        collectives = (
            Collective("all-gather", "async", 64, "x28", "bf16", 196, 13 * GIB, 12.8 * GIB, communication / 2, ("fsdp",)),
            Collective("reduce-scatter", "sync", 64, "x28", "bf16", 196, 13 * GIB, 12.8 * GIB, communication / 2, ("fsdp",)),
            Collective("all-reduce", "sync", 64, "entry", "f32", 3, 24, 24, 1e-9, ("fsdp",)))
        return Cost(full_overlap=max(compute, communication), scheduled=None if exposed is None else compute + exposed,
                    no_overlap=compute + communication, matmul=0.7 * compute, other=0.1 * compute, kernels=0.2 * compute,
                    communication=communication, matmul_flops=0.7 * compute * 459e12 * 0.9, collectives=collectives,
                    kernel_uses=(KernelUse("attention_forward", 28, 28e6, 0.08 * compute), KernelUse(
                        "attention_backward", 28, 56e6, 0.12 * compute, "from its bundles")),
                    operations=(OpGroup("blocks/mlp/dot_general", 84, 0.5 * compute, 1e14),),
                    notes=("latency of links is not counted",))
    return make


@pytest.fixture
def made_plan(made_cost):
    """made_plan(**fields) -> Plan of neo_7b on 64 chips that fits, unless the fields say otherwise."""
    def make(**fields: Any) -> Plan:
        known = dict(
            config="neo_7b", topology="v5p:4x4x4", chip="v5p", devices=64, phase="fundamental",
            mesh=dict(replica=1, fsdp=64, expert=1, context=1, tensor=1), global_batch=1024, seq_len=8192, micro_batch=2,
            accumulation=8, remat="minimal", attention="pallas_tpu", parameters=7_793_881_088, run_tokens=3_726_000_000_000,
            run_steps=444_174, tokens_per_step=1024 * 8192, flops_full=6.8e15, flops_causal=6.1e15, peak_flops=459e12,
            memory=MemoryUse(2 * GIB, 58 * GIB, 60 * GIB, 95 * GIB, "compiler"), cost=made_cost(16.0, 3.0, 1.0),
            overrides=("--config.train.remat=minimal",), flags=("--xla_first=true", "--xla_second=49152"), compile_s=71.0,
            checkpoint_bytes=12 * 7_793_881_088,
            facts={"checkpoint_every_steps": 500, "versions": {"jax": "0.12.0", "libtpu": "0.0.51"},
                   "notes": ["v5p-128 counts cores: 64 chips"], "warnings": []})
        return Plan(**{**known, **fields})
    return make


@pytest.fixture
def made_topology():
    """made_topology("v5p:4x4x4", gib=None) -> Topology, with another amount of memory per device."""
    def make(name: str = "v5p:4x4x4", gib: float | None = None) -> Topology:
        topology = parse(name)
        if gib is None:
            return topology
        share = topology.chip.hbm_bytes / topology.chip.memory
        return dataclasses.replace(topology, chip=dataclasses.replace(topology.chip, memory=gib * GIB / share))
    return make


class FakeEngine:
    """A compiler whose programs need `beyond` times the estimate and take the rough time; it remembers what it compiled."""

    def __init__(self, beyond: float = 1.0, refuse: str = "") -> None:
        self.asked: list[Any] = []
        self._beyond, self._refuse = beyond, refuse

    def compile(self, config: Any, topology: Any, phase: str) -> Compiled:
        from neo.plan.planner import setting
        chosen = setting(config, topology, phase)
        self.asked.append(chosen)
        use = chosen.estimate()
        temporaries = int(use.peak * self._beyond) - use.arguments
        use = MemoryUse(use.arguments, temporaries, use.arguments + temporaries, use.capacity, "compiler")
        return Compiled("HLO", use, 1.0, 2.0, "key", False, versions={"jax": "0"}, refused=self._refuse,
                        facts={"setting": chosen})

    def price(self, compiled: Compiled, topology: Any) -> Cost:
        return rough(compiled.facts["setting"])

    @property
    def engine(self) -> Engine:
        return Engine(self.compile, self.price, rough, ("--xla_flag=1",))


def rough(chosen: Any) -> Cost:
    """Recomputation costs time, and so does each pass over the weights."""
    compute = chosen.flops[1] / 459e12 * {"none": 1.0, "minimal": 1.05, "attention": 1.3, "full": 1.33}.get(
        chosen.config.train.remat, 1.2)
    communication = 1e-4 * chosen.accumulation * chosen.sizes["fsdp"] ** 0 + 1e-3 * (chosen.sizes["tensor"] - 1)
    return Cost(max(compute, communication), compute + communication, compute + communication, compute, 0.0, 0.0,
                communication, 1.0)


@pytest.fixture
def made_engine():
    """made_engine(beyond=1.0, refuse="") -> FakeEngine."""
    return FakeEngine
