"""What `--print_config` says about a config beyond its fields: sizes, FLOPs, tokens, memory. Allocates nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from neo.config import Config
from neo.config.checks import check_on_mesh
from neo.config.schema import MeshConfig
from neo.errors import InputError
from neo.models.decoder import Decoder
from neo.models.flops import parameter_count, train_flops_per_token
from neo.parallel import devices as device_facts
from neo.parallel import distributed
from neo.parallel.mesh import AXES, mesh_shape
from neo.parallel.rules import Layout, rules_for
from neo.train import attention_choice, memory

# Device counts for which memory is shown besides this machine's (ours).
COUNTS = (8, 64, 256)


def summarise(config: Config) -> dict[str, Any]:
    """Facts as JSON: parameters, FLOPs per token, phases, memory per device here and on larger meshes."""
    found = distributed.devices()
    here = found[0]
    dtype = config.train.compute_dtype
    big = "bfloat16" if dtype == "auto" else dtype
    small = ("bfloat16" if device_facts.has_bfloat16(here) else "float32") if dtype == "auto" else dtype
    plans = [_plan(config, len(found), small, f"this machine ({len(found)} x {here.device_kind})",
                   device_facts.memory_bytes(here), here.platform)]
    plans += [_plan(config, n, big, f"{n} devices", None, "tpu") for n in COUNTS if n > len(found)]
    flops = {phase.name: train_flops_per_token(config.model, phase.seq_len) for phase in config.phases}
    return {
        "parameters": parameter_count(config.model),
        "phases": [{"name": phase.name, "tokens": phase.whole_tokens, "steps": phase.steps,
                    "tokens_per_step": phase.tokens_per_step,
                    "flops_per_token": {"full": flops[phase.name].full, "causal": flops[phase.name].causal}}
                   for phase in config.phases],
        "memory": plans,
    }


def _plan(config: Config, count: int, dtype: str, where: str, capacity: int | None, platform: str) -> dict[str, Any]:
    """Memory of the most demanding phase on `count` devices; with a reason where the mesh is impossible."""
    try:
        try:
            sizes = dict(zip(AXES, mesh_shape(config.mesh, count), strict=True))
        except InputError:
            # A mesh with fixed sizes is for one number of devices; elsewhere show plain FSDP.
            sizes = dict(zip(AXES, mesh_shape(MeshConfig(), count), strict=True))
        check_on_mesh(config, sizes)
    except InputError as error:
        return {"where": where, "impossible": str(error)}
    attention, _ = attention_choice.choose(config, attention_choice.requests(config, dtype, sizes, platform))
    decoder = Decoder(config.model, jnp.dtype(dtype), config.train.remat, attention,
                      Layout(None, rules_for(config.model.num_kv_heads, sizes["tensor"])))
    needs = []
    for phase in config.phases:
        micro = memory.choose_micro_batch(config, decoder, phase, sizes, capacity, platform) if capacity else \
            config.train.micro_batch or 1
        needs.append((memory.estimate(decoder, phase, sizes, micro), phase.name, micro))
    need, phase_name, micro = max(needs, key=lambda one: one[0].total)
    return {"where": where, "mesh": sizes, "compute_dtype": dtype, "phase": phase_name, "micro_batch": micro,
            "bytes_per_device": need.total, "capacity": capacity, "text": need.text()}


def summary_lines(facts: Mapping[str, Any]) -> list[str]:
    """The facts as lines of text."""
    total, inner = facts["parameters"]["total"], facts["parameters"]["non_embedding"]
    lines = [f"parameters: {total:,} ({inner:,} without embeddings)"]
    for phase in facts["phases"]:
        flops = phase["flops_per_token"]
        lines.append(f"phase {phase['name']}: {phase['tokens']:,} tokens in {phase['steps']:,} steps of "
                     f"{phase['tokens_per_step']:,}; training FLOPs per token {flops['full']:.4g} "
                     f"(causal pairs only: {flops['causal']:.4g})")
    for plan in facts["memory"]:
        if "impossible" in plan:
            lines.append(f"memory per device on {plan['where']}: impossible: {plan['impossible']}")
            continue
        fits = "" if plan["capacity"] is None else (
            f", fits in {plan['capacity'] / 1e9:.1f} GB" if plan["bytes_per_device"] <= plan["capacity"]
            else f", does not fit in {plan['capacity'] / 1e9:.1f} GB")
        mesh = " ".join(f"{axis}={size}" for axis, size in plan["mesh"].items() if size > 1) or "no split"
        lines.append(f"memory per device on {plan['where']} ({mesh}, {plan['compute_dtype']}, micro-batch "
                     f"{plan['micro_batch']}): about {plan['text']}{fits}")
    return lines
