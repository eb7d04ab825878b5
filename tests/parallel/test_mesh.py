"""Which device goes where in the mesh, with devices that are made up: tests/plan/test_topology.py has libtpu's own."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from neo.config.schema import MeshConfig
from neo.errors import InputError
from neo.parallel import mesh as meshes
from neo.parallel.mesh import AXES, follows_links, granules, make_mesh, mesh_shape


@dataclasses.dataclass(frozen=True)
class Device:
    """What `make_mesh` reads of a jax.Device."""

    id: int
    platform: str
    device_kind: str
    process_index: int
    slice_index: int | None = None
    coords: tuple[int, ...] = (0, 0, 0)
    core_on_chip: int = 0


@pytest.fixture(autouse=True)
def plain_mesh(monkeypatch):
    """A mesh of objects that are no jax.Device: its array is what is tested."""
    import jax

    class Plain:
        def __init__(self, devices, axes, axis_types):
            self.devices, self.shape, self.axis_types = devices, dict(zip(axes, devices.shape, strict=True)), axis_types
    monkeypatch.setattr(jax.sharding, "Mesh", Plain)


def gpus(nodes: int, per_node: int = 8, processes: str = "per gpu", shuffled: bool = False, kind="NVIDIA H100 80GB HBM3"):
    """Numbered by process, as JAX does; `shuffled`: the processes were dealt round the nodes."""
    found = []
    for i in range(nodes * per_node):
        node = i % nodes if shuffled else i // per_node
        process = i if processes == "per gpu" else node
        found.append(Device(i, "gpu", kind, process, node))
    return found


def tpus(slices: int, sides=(2, 2, 1), kind="TPU v5"):
    places = [place[::-1] for place in itertools.product(*(range(side) for side in sides[::-1]))]
    return [Device(i, "tpu", kind, i // 4, one if slices > 1 else None, coords=place)
            for i, (one, place) in enumerate(itertools.product(range(slices), places))]


def neighbours(mesh, axis, attribute):
    """For each line of devices along an axis, how many different values they have."""
    values = np.vectorize(lambda device: getattr(device, attribute))(mesh.devices)
    lines = np.moveaxis(values, AXES.index(axis), -1).reshape(-1, mesh.shape[axis])
    return {len(set(line)) for line in lines}


@pytest.mark.parametrize("shuffled", [False, True])
def test_tensor_stays_inside_a_node_of_gpus(shuffled):
    mesh = make_mesh(MeshConfig(replica=2, tensor=4), gpus(4, shuffled=shuffled))
    assert mesh.shape == dict(replica=2, fsdp=4, expert=1, context=1, tensor=4)
    assert neighbours(mesh, "tensor", "slice_index") == {1}
    assert len({device.id for device in mesh.devices.flat}) == 32
    assert neighbours(mesh, "fsdp", "slice_index") == {2}       # 16 devices: two nodes
    assert neighbours(mesh, "replica", "slice_index") == {2}


def test_nodes_of_gpus_are_known_by_process_where_there_is_no_slice_index():
    per_node = [dataclasses.replace(device, slice_index=None) for device in gpus(2, processes="per node")]
    assert [len(group) for group in granules(per_node)] == [8, 8]
    per_gpu = [dataclasses.replace(device, slice_index=None) for device in gpus(2)]
    assert [len(group) for group in granules(per_gpu)] == [16]   # nothing is known: the order of the list stays
    cpus = [dataclasses.replace(device, platform="cpu", slice_index=i) for i, device in enumerate(gpus(2))]
    assert [len(group) for group in granules(cpus)] == [16]


@pytest.mark.parametrize("config,words", [
    (dict(tensor=16), ("tensor=16 would cross nodes of 8 GPUs", "divisor of 8", "--config.mesh.tensor=8")),
    (dict(replica=4, fsdp=1, tensor=8), None),
    (dict(fsdp=-1, tensor=32), ("tensor=32 would cross", "--config.mesh.tensor=8")),
    (dict(tensor=3), ("needs a multiple of 3 devices", "nearest that works: --config.mesh.tensor=4"))])
def test_tensor_across_nodes_is_refused(config, words):
    if words is None:
        assert make_mesh(MeshConfig(**config), gpus(4)).shape["tensor"] == 8
        return
    with pytest.raises(InputError) as error:
        make_mesh(MeshConfig(**config), gpus(4))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_one_node_takes_any_tensor_that_divides_it():
    assert make_mesh(MeshConfig(tensor=8), gpus(1)).shape["tensor"] == 8


@pytest.mark.parametrize("config", [dict(replica=2), dict(replica=-1, fsdp=4), dict(replica=4, tensor=2),
                                    dict(replica=8, fsdp=1)])
def test_only_replica_goes_between_slices(config):
    mesh = make_mesh(MeshConfig(**config), tpus(2))
    assert neighbours(mesh, "replica", "slice_index") == {2}
    assert all(neighbours(mesh, axis, "slice_index") == {1} for axis in AXES[1:])
    # Slices are the outer part of replica: the first half of the copies is in the first.
    assert {device.slice_index for device in mesh.devices[: mesh.shape["replica"] // 2].flat} == {0}
    assert len({device.id for device in mesh.devices.flat}) == 8


@pytest.mark.parametrize("config,slices,words", [
    (dict(), 2, ("replica=1 on 2 slices", "nearest that works: --config.mesh.replica=2")),
    (dict(replica=2), 3, ("replica=2 on 3 slices", "--config.mesh.replica=3")),
    (dict(replica=1, fsdp=8), 2, ("replica=1 on 2 slices", "--config.mesh.replica=2 --config.mesh.fsdp=4")),
    (dict(replica=5), 2, ("needs a multiple of 5 devices, this run has 8", "nearest that works: --config.mesh.replica=4"))])
def test_a_mesh_that_does_not_suit_the_slices_is_refused(config, slices, words):
    with pytest.raises(InputError) as error:
        make_mesh(MeshConfig(**config), tpus(slices))
    assert all(word in str(error.value) for word in words) and "\n" not in str(error.value)


def test_unequal_slices_are_refused():
    with pytest.raises(InputError, match="2 slices of this run have 4, 2 devices; they must be equal"):
        make_mesh(MeshConfig(replica=2), tpus(2)[:6])


@pytest.mark.parametrize("sizes,sides,slices,right", [
    ((1, 64, 1, 1, 1), (4, 4, 4), 1, True), ((1, 16, 1, 1, 4), (4, 4, 4), 1, True), ((1, 8, 1, 1, 8), (4, 4, 4), 1, False),
    ((2, 8, 1, 1, 4), (4, 4, 4), 2, False), ((2, 16, 1, 1, 4), (4, 4, 4), 2, True), ((8, 4, 1, 1, 4), (4, 4, 4), 2, True),
    ((3, 16, 1, 1, 4), (4, 4, 4), 2, False), ((1, 16, 1, 4, 8), (4, 8, 16), 1, True), ((1, 32, 1, 4, 4), (4, 8, 16), 1, False),
    ((1, 64, 1, 1, 2), (4, 4, 4, 2), 1, True), ((1, 1, 1, 1, 1), (1, 1), 1, True), ((4, 4, 1, 1, 4), (4, 4, 4, 1), 1, True)])
def test_axes_are_products_of_whole_sides(sizes, sides, slices, right):
    assert follows_links(sizes, sides, slices) == right


@pytest.mark.parametrize("config,devices,nearest", [
    (dict(tensor=3), 8, "--config.mesh.tensor=4"),
    (dict(fsdp=4), 8, "--config.mesh.fsdp=8"),
    (dict(replica=2, fsdp=3, tensor=2), 16, "--config.mesh.fsdp=4"),
    (dict(context=3, tensor=8), 64, "--config.mesh.context=4"),
    (dict(fsdp=64, tensor=8), 256, "--config.mesh.fsdp=32"),
    (dict(tensor=7), 5, "--config.mesh.tensor=5"),
    (dict(replica=7, context=4, tensor=8), 6144, "--config.mesh.replica=8")])
def test_a_wrong_product_is_told_the_nearest_that_works(config, devices, nearest):
    with pytest.raises(InputError) as error:
        mesh_shape(MeshConfig(**config), devices)
    assert str(error.value).endswith(f"nearest that works: {nearest}")
    changed = dict(item.removeprefix("--config.mesh.").split("=") for item in nearest.split())
    assert mesh_shape(MeshConfig(**{**config, **{axis: int(size) for axis, size in changed.items()}}), devices)


def test_all_products_are_tried_once():
    tuples = list(meshes._products(24, [True, False, True]))
    assert len(set(tuples)) == len(tuples) == 8 and all(a * b * c == 24 and b == 1 for a, b, c in tuples)
