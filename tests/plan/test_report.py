"""What a plan says as text, JSON and picture."""

from __future__ import annotations

import dataclasses
import json

import pytest

from neo.plan.picture import MARK, MOST, _labels, draw
from neo.plan.plan import MemoryUse
from neo.plan.report import GIB, ranking, report, to_json


@pytest.fixture
def too_big(made_plan):
    return made_plan(remat="none", memory=MemoryUse(2 * GIB, 110 * GIB, 112 * GIB, 95 * GIB, "compiler"), cost=None,
                     refused="the compiler ran out of HBM: Used 112.0G of 95.0G hbm")


def line_of(text: str, start: str) -> str:
    found = [line for line in text.splitlines() if line.strip().startswith(start)]
    assert len(found) == 1, text
    return found[0]


def test_report_says_all_that_the_plan_knows(made_plan):
    text = report(made_plan())
    for part in ("neo_7b, phase fundamental, on v5p:4x4x4: 64 x v5p, fsdp=64", "v5p-128 counts cores", "7,793,881,088",
                 "3,726,000,000,000 tokens in 444,174 steps", "16 a device in 8 passes of 2", "remat minimal",
                 "attention pallas_tpu", "6.1e+15", "fits, 35.00 GiB spare", "the compiler's own account",
                 "--config.train.remat=minimal", "--xla_first=true --xla_second=49152", "71 s", "libtpu 0.0.51",
                 "latency of links is not counted"):
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 140


def test_times_and_their_parts(made_plan):
    text = report(made_plan())
    assert line_of(text, "matrix products").split() == ["matrix", "products", "11200.0", "66", "%", "90", "%", "of", "peak"]
    assert "1000.0 ms of it not hidden" in line_of(text, "communication")
    peak = 6.1e15 / 459e12
    assert f"{100 * peak / 19:.1f} .. {100 * peak / 16:.1f} % predicted" in line_of(text, "MFU")
    assert f"{8192 * 1024 / 17:,.0f} tokens/s" in line_of(text, "MFU")
    assert f"MFU {100 * peak / 17:.1f} %" in line_of(text, "= as scheduled")


def test_collectives_say_bytes_times_and_whether_they_overlap(made_plan):
    text = report(made_plan())
    gather = line_of(text, "all-gather").split()
    assert gather[:8] == ["all-gather", "fsdp", "64", "x28", "196", "bf16", "13.000", "12.800"]
    assert "beside computation (async)" in line_of(text, "all-gather")
    assert "stops the core" in line_of(text, "reduce-scatter")
    assert line_of(text, "1 smaller").split()[2] == "3"   # the scalar: counted, not hidden away
    crossing = dataclasses.replace(made_plan().cost.collectives[0], network="dcn")
    cost = dataclasses.replace(made_plan().cost, collectives=(crossing,))
    assert "over DCN" in report(made_plan(cost=cost))


def test_kernels_and_operations(made_plan):
    text = report(made_plan())
    assert line_of(text, "attention_forward").split() == ["attention_forward", "28", "1,000,000", "1280.0"]
    assert "from its bundles" in line_of(text, "attention_backward")
    assert line_of(text, "blocks/mlp/dot_general").split() == ["blocks/mlp/dot_general", "84", "8000.0", "47.1", "%"]


def test_run_and_checkpoint(made_plan):
    text = report(made_plan())
    days = 3.726e12 / (8192 * 1024) * 17 / 86400
    assert f"{days:.1f} days" in text and f"{days * 24 * 64:,.0f} device-hours" in text
    gap = 500 * 17
    assert f"87.1 GiB every 500 steps = {gap / 3600:.1f} h" in text
    assert f"{12 * 7_793_881_088 / gap / 0.5 / 1e6:.1f} MB/s" in text


def test_report_of_what_does_not_fit(made_plan, too_big):
    assert "does NOT fit, 17.00 GiB too much" in report(too_big)
    assert "Used 112.0G of 95.0G" in report(too_big)
    unpriced = made_plan(cost=None, memory=MemoryUse(0, 0, 0, 95 * GIB, "compiler"), refused="scoped vmem limit exceeded")
    assert "does not fit: scoped vmem limit exceeded" in report(unpriced)


def test_report_without_a_schedule(made_plan, made_cost):
    """GPUs: no replay, and the numbers come from full overlap."""
    text = report(made_plan(cost=made_cost(16.0, 3.0, None), memory=MemoryUse(2 * GIB, GIB, 3 * GIB, 80 * GIB, "estimate")))
    assert "as scheduled" not in text and "an estimate, nothing was compiled" in text


def test_ranking_puts_what_fits_first(made_plan, made_cost, too_big):
    slow = made_plan(remat="full", cost=made_cost(20.0))
    text = ranking([too_big, slow, made_plan()], dropped=40, left=3)
    first, second, third = text.splitlines()[1:4]
    assert "minimal" in first and "full" in second and "none" in third
    assert "17000.0" in first and "Used 112.0G" in third
    assert "40 more do not fit" in text and "3 more may fit" in text


def test_json_holds_what_was_derived(made_plan, too_big):
    found = json.loads(json.dumps(to_json(made_plan())))
    assert found["format"] == "neo.plan" and found["fits"] and found["step_seconds"] == 17.0
    assert found["mfu"]["no_overlap"] < found["mfu"]["scheduled"] < found["mfu"]["full_overlap"]
    assert found["cost"]["collectives"][0]["kind"] == "all-gather" and found["memory"]["peak"] == 60 * GIB
    assert json.loads(json.dumps(to_json(too_big)))["fits"] is False


def test_rows_of_the_picture_are_told_apart(made_plan):
    plan = made_plan()
    quick = dataclasses.replace(plan, flags=plan.flags[:1])
    wide = dataclasses.replace(plan, mesh={"replica": 2, "fsdp": 64, "context": 2, "tensor": 2})
    labels = _labels([plan, quick, wide])
    assert len(set(labels)) == 3 and "1 flag" in labels[1] and "flag" not in labels[2]
    assert max(len(line) for label in labels for line in label.splitlines()) <= 30


def test_picture_is_drawn_for_any_number_of_plans(made_plan, too_big, tmp_path):
    from matplotlib.image import imread
    heights = []
    for plans in ([made_plan()], [made_plan(), too_big], [made_plan()] * (MOST + 5)):
        path = tmp_path / "plan.png"
        draw(plans, path, "title")
        assert MARK.encode() in path.read_bytes()[:200]
        picture = imread(path)
        heights.append(picture.shape[0])
        assert picture[..., :3].std() > 0.05   # not blank
    assert heights[0] < heights[1] < heights[2] < 100 * (MOST + 3)
