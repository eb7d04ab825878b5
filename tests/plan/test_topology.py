"""Names of topologies, and what libtpu makes of them."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from neo.errors import InputError
from neo.plan import libtpu
from neo.plan.chips import BY_NAME
from neo.plan.planner import caveats
from neo.plan.topology import PRODUCTS, known, libtpu_arguments, parse, table, tpu_devices

ROOT = Path(__file__).resolve().parents[2]
CLOSED, OPEN = (True, True, True), (False, False, False)


@pytest.mark.parametrize("name,short,shape,devices,slices", [
    ("v5p:4x4x4", "v5p:4x4x4", (4, 4, 4), 64, 1),
    (" V5P:4x4x4 ", "v5p:4x4x4", (4, 4, 4), 64, 1),
    ("2*v5p:4x4x4", "2*v5p:4x4x4", (4, 4, 4), 128, 2),
    ("v5e:16x16", "v5e:16x16", (16, 16), 256, 1),
    ("v6e:16x8", "v6e:8x16", (8, 16), 128, 1),
    ("v5p:12x8x4", "v5p:4x8x12", (4, 8, 12), 384, 1),
    ("v4:1x2x2", "v4:2x2x1", (2, 2, 1), 4, 1),
    ("tpu7x:4x4x4", "tpu7x:4x4x4", (4, 4, 4), 128, 1),      # two devices a chip
    ("a100:8x4", "a100:8x4", (8, 4), 32, 1),
    ("b200:4x1", "b200:4x1", (4, 1), 4, 1)])
def test_short_names(name, short, shape, devices, slices):
    found = parse(name)
    assert (found.name, found.shape, found.devices, found.slices) == (short, shape, devices, slices)
    again = parse(found.name)
    assert (again.name, again.devices, again.dcn_bandwidth) == (found.name, found.devices, found.dcn_bandwidth)


@pytest.mark.parametrize("name,short,said", [
    ("v5p-128", "v5p:4x4x4", "128 cores = 64 chips"),
    ("2*v5p-256", "2*v5p:4x4x8", "256 cores = 128 chips"),
    ("v5p-12288", "v5p:16x16x24", "12288 cores = 6144 chips"),
    ("v5p-768", "v5p:4x8x12", "384 chips"),
    ("v4-8", "v4:2x2x1", "8 cores = 4 chips"),
    ("v5litepod-256", "v5e:16x16", "256 chips"),
    ("v6e-256", "v6e:16x16", "256 chips"),
    ("tpu7x-128", "tpu7x:4x4x4", "128 cores = 64 chips; each core is a JAX device"),
    ("a3-highgpu-8g:4", "a3-highgpu-8g:4", "4 x a3-highgpu-8g: 32 NVIDIA H100"),
    ("a3-highgpu-8g x 4", "a3-highgpu-8g:4", "100 Gb/s"),
    ("4*a3-highgpu-8g", "a3-highgpu-8g:4", "H100"),
    ("p5.48xlarge", "p5.48xlarge:1", "400 Gb/s"),
    ("ND96isr_H100_v5:2", "nd96isr-h100-v5:2", "16 NVIDIA H100")])
def test_products_are_translated_aloud(name, short, said):
    found = parse(name)
    assert found.name == short and said in found.note and parse(found.name).devices == found.devices


def test_a_product_has_its_own_network():
    assert parse("a3-highgpu-8g:4").dcn_bandwidth == parse("h100:8x4").dcn_bandwidth / 4
    assert all(product.kind in BY_NAME and product.source for product in PRODUCTS.values())


@pytest.mark.parametrize("name,words", [
    ("v5x:4x4", ("unknown", "did you mean 'v5", "tpu7x", "h200", "--topology=list")),
    ("zzz", ("unknown", "v4, v5e, v5p, v6e, tpu7x, a100")),
    ("", ("unknown",)),
    ("4x4", ("unknown",)),
    ("v5p", ("shape is missing", "v5p:4x4x4")),
    ("v5p:", ("shape is missing",)),
    ("v5p:4x4x6", ("no v5p slice has the shape 4x4x6", "2x2x1", "multiples of 4")),
    ("v5p:16x16x28", ("at most 6144 chips",)),
    ("v5p:0x4x4", ("no v5p slice",)),
    ("v6e:4x32", ("no v6e slice", "16x16")),
    ("v5p-100", ("no v5p-100", "counts cores, 2 a chip", "v5p-128")),
    ("v5p-129", ("no v5p-129",)),
    ("v6e-100", ("no v6e-100", "v6e-256")),
    ("v5p-128:4", ("unknown",)),
    ("0*v5p:4x4x4", ("number of slices is at least 1",)),
    ("2*h100:8x4", ("nodes, not slices",)),
    ("h100:16x4", ("at most 8 in a node", "h100:8x4")),
    ("h100:8", ("gpus-per-node x nodes",)),
    ("2*a3-highgpu-8g:4", ("given once",))])
def test_wrong_names_are_refused_in_one_line(name, words):
    with pytest.raises(InputError) as error:
        parse(name)
    text = str(error.value)
    assert all(word in text for word in (*words, f"--topology={name}")) and "\n" not in text


# What closes a ring: cubes of 4 x 4 x 4 on v4, v5p and TPU7x, all 16 chips of a side on v5e and v6e.
@pytest.mark.parametrize("name,wrap", [
    ("v5p:4x4x4", CLOSED), ("v4:4x4x12", CLOSED), ("tpu7x:4x4x8", CLOSED), ("v5p:2x4x4", OPEN), ("v5p:2x2x1", OPEN),
    ("v5e:16x16", (True, True, False)), ("v6e:8x16", (False, True, False)), ("v6e:8x8", OPEN), ("h100:8x4", OPEN)])
def test_rings(name, wrap):
    assert parse(name).wrap == wrap


def test_libtpu_hears_of_rings_cores_and_slices():
    assert libtpu_arguments(parse("2*v5p:4x4x4")) == dict(
        topology_name="v5:4x4x4", num_slices=2, chips_per_host_bounds=(2, 2, 1), chip_config_name="megacore", wrap=CLOSED)
    assert libtpu_arguments(parse("v5e:1x1")) == dict(topology_name="v5e:1x1", num_slices=1, chips_per_host_bounds=(1, 1, 1))
    assert "chip_config_name" not in libtpu_arguments(parse("tpu7x:4x4x4"))   # libtpu has no megacore for it


def test_the_list_names_only_what_can_be_parsed():
    text = table()
    assert all(parse(name).name == name for name in known())
    assert all(kind in text for kind in (*BY_NAME, *PRODUCTS))


def test_gpus_have_no_devices_to_compile_for():
    with pytest.raises(InputError, match="only TPU programs"):
        tpu_devices(parse("h100:8x4"))


def test_missing_libtpu_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "libtpu" else find(name, *rest))
    with pytest.raises(InputError, match=r"libtpu.*pip install .*\[plan\]"):
        tpu_devices(parse("v5p:2x2x1"))


JOBS = {
    "ring": dict(topology="v5p-128", mesh={}, compile=True),
    "mesh": dict(topology="v5p:2x4x4", mesh={}),
    "v4": dict(topology="v4:4x4x4", mesh=dict(tensor=4)),
    "v5e": dict(topology="v5e:16x16", mesh=dict(tensor=8)),
    "v6e": dict(topology="v6e:8x16", mesh=dict(tensor=8)),
    "one": dict(topology="v6e:1x1", mesh={}),
    "tpu7x": dict(topology="tpu7x:4x4x4", mesh=dict(tensor=2)),
    "two": dict(topology="2*v5p:2x2x1", mesh=dict(replica=2), compile=True),
    "more": dict(topology="2*v5p:2x2x1", mesh=dict(replica=4, tensor=2), compile=True),
    "split": dict(topology="2*v5e:4x4", mesh=dict(replica=2, tensor=2)),
    "cubes": dict(topology="2*tpu7x:4x4x4", mesh=dict(replica=-1, fsdp=64, tensor=2)),
    "default": dict(topology="2*v5p:4x4x4", mesh={}),
    "odd": dict(topology="3*v5p:2x2x1", mesh=dict(replica=2)),
    "links": dict(topology="v5p:4x4x4", mesh=dict(tensor=8)),
}


@pytest.fixture(scope="module")
def answers():
    """What libtpu says to all JOBS, in one process."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed: pip install -e '.[plan]'")
    with libtpu.turn():
        done = subprocess.run([sys.executable, ROOT / "tests" / "plan" / "compile_meshes.py"], env=libtpu.environment(),
                              input=json.dumps([*JOBS.values()]), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("[{")]   # libtpu's C++ writes there too
    return dict(zip(JOBS, json.loads(lines[-1]), strict=True))


@pytest.mark.parametrize(("name", "open_rings"), [
    ("2*v5p:4x4x4", True), ("v5p:4x4x4", False), ("2*v5p:2x2x4", False), ("2*v5e:16x16", False), ("h100:8x4", False)])
def test_slices_whose_rings_libtpu_leaves_open_are_told(name, open_rings):
    assert bool(caveats(parse(name))) == open_rings


def test_libtpu_makes_the_devices_that_the_name_promises(answers):
    for name, job in JOBS.items():
        topology = parse(job["topology"])
        assert (answers[name]["devices"], answers[name]["kind"]) == (topology.devices, topology.chip.device_kind), name


def test_an_all_gather_on_a_cube_is_one(answers):
    """On an open mesh, or with devices in the order of a list, libtpu fills zeros in and sums (`all-reduce`)."""
    assert answers["ring"]["operations"].get("all-gather") and answers["ring"]["mesh"]["fsdp"] == 64


def test_only_replica_goes_between_slices(answers):
    for name in ("two", "more", "split", "cubes"):
        assert answers[name]["crossing"] == ["replica"], name
    for name in ("ring", "mesh", "v4", "v5e", "v6e", "one", "tpu7x"):
        assert answers[name]["crossing"] == [], name


@pytest.mark.parametrize("name", ["two", "more"])
def test_programs_of_two_slices_gather_inside_and_sum_between(answers, name):
    """libtpu numbers the devices of one slice in groups, and sends between slices through the hosts."""
    found = answers[name]
    numbers = {int(number) for group in found["groups"] for number in group.strip("{}").replace("},{", ",").split(",")}
    assert numbers <= set(range(4)) and found["operations"].get("all-gather")
    assert found["between"] and all(target.startswith("{1,2}x") for target in found["between"])


@pytest.mark.parametrize("name,words", [
    ("default", ("config.mesh.replica=1 on 2 slices", "a multiple of 2", "nearest that works: --config.mesh.replica=2")),
    ("odd", ("replica=2 on 3 slices", "nearest that works: --config.mesh.replica=3")),
    ("links", ("fsdp=8 x tensor=8 does not follow the links", "nearest that works: --config.mesh.tensor=4"))])
def test_meshes_that_links_do_not_carry_are_refused(answers, name, words):
    assert all(word in answers[name]["refused"] for word in words) and "\n" not in answers[name]["refused"]
