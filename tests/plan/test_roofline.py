"""The GPU roofline: near published steps, and moved by what should move it."""

from __future__ import annotations

import dataclasses
import math

import pytest

import neo.config
from neo.models.remat import POLICIES
from neo.plan.chips import BY_NAME, CHIPS
from neo.plan.planner import setting
from neo.plan.roofline import MARKS, MATMUL, MODELS, roofline
from neo.plan.topology import parse


def chosen(topology: str, model: str = "llama2_7b", seq_len: int = 4096, local_batch: int = 2, **fields):
    """A setting; `fields` are config fields with __ for dots."""
    place = parse(topology)
    overrides = {f"model.{name}": value for name, value in MODELS[model].items()} | {
        "phases.fundamental.seq_len": seq_len, "phases.fundamental.global_batch": local_batch * place.devices,
        "train.remat": "minimal", "train.attention": "cudnn", "train.micro_batch": 0}
    overrides |= {name.replace("__", "."): value for name, value in fields.items()}
    return setting(neo.config.load("neo_7b", {name: str(value) for name, value in overrides.items()}), place)


@pytest.mark.parametrize("mark", MARKS, ids=lambda mark: f"{mark.system}, {mark.topology}")
def test_published_steps(mark):
    """Ratios that the module and its notes state: 0.97 to 1.47 of the time without overlap."""
    devices = parse(mark.topology).devices
    mesh = dict(mesh__replica=3, mesh__fsdp=32) if devices == 96 else {}
    cost = roofline(chosen(mark.topology, mark.model, mark.seq_len, mark.local_batch, train__remat=mark.remat,
                           train__micro_batch=mark.local_batch, **mesh))
    took = mark.local_batch * mark.seq_len / mark.tokens_per_s
    assert 0.97 <= round(took / cost.no_overlap, 2) <= 1.47
    assert cost.full_overlap < cost.no_overlap and cost.scheduled is None


def test_the_best_tuned_step_lies_between_full_and_no_overlap():
    mark = MARKS[0]
    cost = roofline(chosen(mark.topology, mark.model, mark.seq_len, mark.local_batch, train__micro_batch=2))
    assert cost.full_overlap < mark.local_batch * mark.seq_len / mark.tokens_per_s < cost.no_overlap


def test_parts_add_up():
    one = chosen("h100:8x2", train__remat="full")
    cost = roofline(one)
    assert cost.no_overlap == pytest.approx(cost.compute + cost.communication)
    assert cost.communication == pytest.approx(sum(collective.seconds for collective in cost.collectives))
    assert cost.kernels == pytest.approx(sum(kernel.seconds for kernel in cost.kernel_uses))
    assert sum(group.seconds for group in cost.operations) == pytest.approx(cost.matmul + cost.other)
    # Full remat: forward twice and backward, but for the down projection, which nothing asks for again.
    model = one.config.model
    pairs = 12 * model.num_layers * model.num_heads * model.head_size * (one.phase.seq_len + 1) / 2   # of a token, causal
    tokens = one.phase.tokens_per_step / one.topology.devices
    dense = one.flops[1] - pairs * tokens
    head = 6 * model.d_model * model.vocab_size * tokens
    assert dense < cost.matmul_flops < (dense - head) * 4 / 3 + head


def test_remat_trades_products_for_memory():
    flops = {policy: roofline(chosen("h100:8x1", train__remat=policy)).matmul_flops for policy in
             POLICIES}
    assert flops["none"] == flops["minimal"] < flops["lean"] < flops["offload"] < flops["attention"] == flops["full"]
    times = {policy: roofline(chosen("h100:8x1", train__remat=policy)).kernels for policy in ("attention", "full")}
    assert times["attention"] < times["full"]
    one = chosen("h100:8x1", train__remat="offload")
    host = next(group for group in roofline(one).operations if "host" in group.name)
    # Query, key, value, output and residual of each layer, 2 bytes, both ways, at 50 GB/s.
    assert host.seconds == pytest.approx(2 * 2 * 5 * 4096 * 32 * 8192 / 50e9)


def test_collectives_of_a_sharded_step():
    one = chosen("h100:8x2")
    found = {(c.kind, c.axes): c for c in roofline(one).collectives}
    gather, scatter = found["all-gather", ("fsdp",)], found["reduce-scatter", ("fsdp",)]
    assert gather.bytes == 2 * scatter.bytes == 4 * one.parameters and gather.group == 16   # bfloat16, forward and backward
    assert gather.wire_bytes == gather.bytes * 15 / 16 and gather.network == "dcn"
    assert len(found) == 2
    inside = {c.network for c in roofline(chosen("h100:8x1")).collectives}
    assert inside == {"ici"}


def test_two_nodes_bring_all_their_network_cards():
    """16 devices in nodes of 8: half of the array crosses, over 8 cards of 50 GB/s; 15/16 of it goes over NVLink at 450."""
    cost = roofline(chosen("h100:8x2"))
    gather = next(c for c in cost.collectives if c.kind == "all-gather")
    assert gather.seconds == pytest.approx(max(gather.bytes / 2 / (8 * 50e9), gather.wire_bytes / 450e9) / 0.8)
    slow = next(c for c in roofline(chosen("a3-highgpu-8g:2")).collectives if c.kind == "all-gather")
    assert slow.seconds == pytest.approx(gather.bytes / 2 / (8 * 12.5e9) / 0.8)


def test_copies_per_node_leave_little_on_the_network():
    cost = roofline(chosen("h100:8x2", mesh__replica=2))
    networks = {c.axes: c for c in cost.collectives}
    assert networks["fsdp",].network == "ici" and networks["replica",].network == "dcn"
    replica = networks["replica",]
    one = chosen("h100:8x2")
    assert replica.bytes == pytest.approx(2 * one.accumulation * one.parameters / 8)
    assert replica.times == one.accumulation * one.config.model.num_layers and replica.dtype == "bf16"
    # Each device of a node has a shard of its own, so its card is alone.
    assert replica.seconds == pytest.approx(2 * replica.bytes / 2 / 50e9 / 0.8)


def test_tensor_is_never_hidden():
    split = chosen("h100:8x1", mesh__tensor=8, mesh__fsdp=1, local_batch=1)
    cost = roofline(split)
    sums = next(c for c in cost.collectives if c.axes == ("tensor",))
    assert sums.mode == "sync" and cost.full_overlap == pytest.approx(cost.compute + sums.seconds)
    whole = roofline(chosen("h100:8x1", local_batch=1))
    assert cost.matmul_flops == pytest.approx(whole.matmul_flops)


def test_accumulation_gathers_weights_again():
    once, four = (roofline(chosen("h100:8x1", local_batch=4, train__micro_batch=micro)) for micro in (4, 1))
    assert four.communication == pytest.approx(4 * once.communication) and four.matmul == pytest.approx(once.matmul)


def test_context_moves_keys_as_far_as_windows_reach():
    def moved(windows: str):
        one = chosen("h100:8x1", seq_len=8192, local_batch=1, mesh__context=4, model__windows=windows, train__attention="auto")
        return next(c for c in roofline(one).collectives if c.kind == "collective-permute")
    full, window = moved("(0,)"), moved("(1024,)")
    assert full.axes == ("context",) and window.wire_bytes < full.wire_bytes
    assert full.wire_bytes / window.wire_bytes == pytest.approx(8192 * 3 / 4 / 1024)


def test_every_gpu_has_an_efficiency_and_faster_cards_are_faster():
    gpus = [chip.name for chip in CHIPS if chip.platform == "gpu"]
    assert set(MATMUL) == set(gpus)
    times = [roofline(chosen(f"{name}:8x1")).no_overlap for name in ("a100", "h100", "h200", "b200")]
    assert times == sorted(times, reverse=True)


def test_slow_attention_costs_more():
    fast, slow = (roofline(dataclasses.replace(one, decoder=dataclasses.replace(one.decoder, attention=name)))
                  for one in [chosen("h100:8x1")] for name in ("pallas_gpu", "blockwise"))
    assert slow.kernels > 3 * fast.kernels and math.isfinite(slow.no_overlap)
    assert BY_NAME["h100"].peak_flops == 989e12
