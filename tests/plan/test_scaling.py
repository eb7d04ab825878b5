"""What a compiled step says of other numbers of devices."""

from __future__ import annotations

import dataclasses

import pytest

from neo.config import load
from neo.plan import scaling
from neo.plan.plan import Collective
from neo.plan.planner import plan
from neo.plan.topology import parse

CONFIG = load("neo_460m")


@pytest.fixture
def base(made_engine):
    """base(topology) -> (topology, plan with collectives that stop the core, engine)."""
    def make(name: str = "v5p:4x4x4"):
        topology, engine = parse(name), made_engine().engine
        made = plan(CONFIG, topology, engine)
        moved = 0.2 * made.cost.compute * topology.chip.ici_bandwidth    # bytes that take a fifth of the computation
        seconds = 0.2 * made.cost.compute
        gathers = Collective("all-gather", "sync", 64, "x24", "bf16", 100, 64 / 63 * moved, moved, seconds, ("fsdp",))
        cost = dataclasses.replace(made.cost, communication=seconds, collectives=(gathers,),
                                   scheduled=made.cost.compute + seconds, no_overlap=made.cost.compute + seconds)
        return topology, dataclasses.replace(made, cost=cost), engine
    return make


@pytest.mark.parametrize(("name", "devices", "found"), [
    ("v5p:4x4x4", 16, "v5p:2x2x4"), ("v5p:4x4x4", 4096, "v5p:16x16x16"), ("v5p:4x4x4", 12288, "2*v5p:16x16x24"),
    ("v6e:16x16", 64, "v6e:8x8"), ("v6e:8x8", 1024, "4*v6e:16x16"), ("v5e:4x4", 100, None), ("tpu7x:4x4x4", 256, "tpu7x:4x4x8"),
    ("h100:8x4", 64, "h100:8x8"), ("h100:8x4", 4, "h100:4x1"), ("h100:8x4", 12, None),
    ("a3-highgpu-8g:2", 64, "a3-highgpu-8g:8"),
])
def test_resized(name, devices, found):
    there = scaling.resized(parse(name), devices)
    assert (there and there.name) == found
    assert there is None or there.devices == devices


def test_the_same_number_gives_the_compiled_times_back(base):
    topology, made, engine = base()
    (row,) = scaling.rows(CONFIG, topology, made, [64], engine)
    assert row.mesh == made.mesh and row.global_batch == made.global_batch
    assert row.weak.compute == pytest.approx(made.cost.compute)
    assert row.weak.links == pytest.approx(made.cost.communication)
    assert row.weak.exposed == pytest.approx(1.0)   # nothing of it was hidden
    latency = 100 * 6 * scaling.HOP_SECONDS         # three rings of 4: at most 2 hops in each
    assert row.weak.estimate == pytest.approx(made.cost.scheduled + latency)
    assert row.own == row.weak and row.own_mfu == row.weak_mfu
    assert "links" in row.why


def test_more_devices_receive_no_more_and_hold_less(base):
    topology, made, engine = base()
    small, large = scaling.rows(CONFIG, topology, made, [64, 512], engine)
    assert large.global_batch == 8 * small.global_batch
    assert large.weak.links == pytest.approx(small.weak.links * (511 / 512) / (63 / 64))
    assert large.weak.compute < small.weak.compute   # the optimizer's part
    assert large.weak.latency > small.weak.latency
    # With the batch as it is, an eighth of the work for the same weights.
    assert large.own.compute == pytest.approx(small.own.compute / 8, rel=0.05) and large.own_mfu < small.own_mfu


def test_open_rings_have_half_the_links(base):
    topology, made, engine = base()
    (row,) = scaling.rows(CONFIG, topology, made, [16], engine)
    assert row.topology == "v5p:2x2x4"
    assert row.weak.links == pytest.approx(2 * made.cost.communication * (15 / 16) / (63 / 64))


def test_slices_pay_for_the_network(base):
    topology, made, engine = base("v6e:16x16")
    one, two = scaling.rows(CONFIG, topology, made, [256, 512], engine)
    assert one.weak.network == 0 and two.mesh["replica"] == 2 and two.topology == "2*v6e:16x16"
    gradients = 2 * made.accumulation * made.parameters / 256   # bfloat16, in each pass
    assert two.weak.network == pytest.approx(gradients / topology.dcn_bandwidth)


def test_a_width_that_fsdp_does_not_divide_is_copied_along_whole_sides(made_engine):
    """D = 3072 on 8 x 16 x 16 chips: not 2048 ways, and 2 copies follow no side; 8 do."""
    config = load("neo_7b", {"train.micro_batch": 1, "train.remat": "full"})
    topology, engine = parse("v5p:4x4x4"), made_engine().engine
    made = plan(config, topology, engine)
    (row,) = scaling.rows(config, topology, made, [2048], engine)
    assert row.mesh == dict(replica=8, fsdp=256, expert=1, context=1, tensor=1)


def test_what_does_not_fit_on_fewer_devices(base):
    topology, made, engine = base()
    tight = dataclasses.replace(made, memory=dataclasses.replace(made.memory, peak=made.memory.capacity - 10_000_000))
    (row,) = scaling.rows(CONFIG, topology, tight, [16], engine)
    assert row.weak is None and "GiB a device" in row.why


def test_the_table_says_where_scaling_stops(base):
    topology, made, engine = base()
    text = scaling.table(CONFIG, topology, made, [64, 70, 256], engine)
    lines = text.splitlines()
    assert lines[0].startswith("weak scaling")
    assert "no slice of so many chips" in lines[3]
    assert "up to 256 devices, the last that was asked for" in lines[5]
    rest = " ".join(lines[6:])
    assert f"its own global batch of {made.global_batch:,}" in rest and "up to 64 devices; at 256:" in rest
    text = " ".join(scaling.table(CONFIG, topology, made, [64, 16384], engine).split())
    assert "16,384 cannot share 1,024 sequences" in text
