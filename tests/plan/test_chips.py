"""The table of chips: complete, consistent with the peaks that MFU is reckoned with, and near what is known of the machines."""

from __future__ import annotations

import dataclasses

import pytest

from neo.parallel.devices import PEAKS, peak_of
from neo.plan.chips import BY_NAME, CHIPS, GIB, GPU_MEMORY_SHARE


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: chip.name)
def test_every_chip_has_a_peak_and_sources(chip):
    assert peak_of(chip.device_kind) in PEAKS and chip.peak_flops > 1e14
    assert chip.sources and all(len(source) > 8 for source in chip.sources)
    numbers = [value for field in dataclasses.fields(chip) if isinstance(value := getattr(chip, field.name), float)]
    assert all(value > 0 for value in numbers)
    assert chip.dcn_bandwidth < chip.link * 2 and chip.ici_bandwidth < chip.hbm_bandwidth < chip.peak_flops


def test_names_are_distinct_and_tell_the_cards_apart():
    assert len(BY_NAME) == len(CHIPS)
    assert peak_of(BY_NAME["v5e"].device_kind).flops == 197e12 and peak_of(BY_NAME["v5p"].device_kind).flops == 459e12
    assert BY_NAME["a100"].memory > 2 * BY_NAME["a100-40"].memory * 0.99


# Published clocks: v4 1050 MHz (arXiv:2304.01433), v5e 1.5, v5p 1.75 GHz (LLO schedules agree).
@pytest.mark.parametrize("name,ghz", [("v4", 1.050), ("v5e", 1.503), ("v5p", 1.751), ("v6e", 1.751)])
def test_peak_and_units_give_the_clock(name, ghz):
    assert BY_NAME[name].clock == pytest.approx(ghz * 1e9, rel=2e-3)


# One-way bytes/s over all links of a torus, as the planner's tool for MaxText's programs had them.
@pytest.mark.parametrize("name,gigabytes", [("v5e", 180), ("v5p", 540), ("v6e", 360), ("tpu7x", 270), ("h100", 450)])
def test_links_add_up(name, gigabytes):
    assert BY_NAME[name].ici_bandwidth == gigabytes * 1e9


def test_tpu_memory_is_what_libtpu_grants():
    granted = {"v4": 30.75, "v5e": 15.75, "v5p": 95.73, "v6e": 31.24, "tpu7x": 94.74}   # GiB, from its refusals
    assert {chip.name: round(chip.hbm_bytes / GIB, 2) for chip in CHIPS if chip.platform == "tpu"} == granted


def test_a_gpu_program_gets_the_share_that_jax_takes():
    h100 = BY_NAME["h100"]
    assert h100.hbm_bytes == int(h100.memory * GPU_MEMORY_SHARE) < 60 * GIB
