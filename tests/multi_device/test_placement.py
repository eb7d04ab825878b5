"""Contract 2: the global batch is the same array, bit for bit, on every mesh, and each row is read once."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding, PartitionSpec

from neo.config.schema import Config, DataConfig, ModelConfig, PhaseConfig
from neo.data.loader import TrainData, ValidationData, open_sources, place
from neo.errors import InputError

AXES = ("replica", "fsdp", "expert", "context", "tensor")
SPEC = PartitionSpec(("replica", "fsdp", "expert"), "context")
MESHES = [(1, 8, 1, 1, 1), (1, 4, 1, 1, 2), (1, 1, 1, 1, 8), (2, 2, 1, 1, 2), (2, 1, 2, 2, 1), (1, 2, 1, 4, 1),
          (2, 2, 2, 1, 1), (1, 1, 1, 8, 1)]


def data():
    phases = (PhaseConfig(name="one", tokens=40 * 16 * 8, seq_len=40, global_batch=16, mixture={"a": 1.0, "b": 2.0}),
              PhaseConfig(name="two", tokens=80 * 8 * 9, seq_len=80, global_batch=8, mixture={"b": 1.0, "c": 3.0}))
    config = Config(name="x", model=ModelConfig(vocab_size=1000), data=DataConfig(synthetic=True), phases=phases)
    return TrainData(config, open_sources(config))


DATA = data()


def sharding(shape):
    return NamedSharding(jax.make_mesh(shape, AXES), SPEC)


@given(st.sampled_from(MESHES), st.integers(0, 16))
@settings(max_examples=25, deadline=None)
def test_the_global_batch_does_not_depend_on_the_mesh(shape, step):
    batch, expected = DATA.batch(step, sharding(shape)), DATA.host_batch(step)
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        array = batch[name]
        assert array.shape == value.shape and array.dtype == value.dtype
        assert np.array_equal(np.asarray(array), value)
        assert array.sharding.spec == (SPEC if value.ndim == 2 else PartitionSpec(SPEC[0]))
        for shard in array.addressable_shards:
            assert np.array_equal(np.asarray(shard.data), value[shard.index])


@pytest.fixture
def read(monkeypatch):
    """Global indices of the windows that DATA reads."""
    found, (order, windows) = [], DATA._current

    class Noted:
        def __getitem__(self, index):
            found.append(index)
            return windows[index]

    monkeypatch.setattr(DATA, "_current", (order, Noted()))
    return found


@pytest.mark.parametrize("shape", MESHES)
def test_each_row_is_read_once(shape, read):
    DATA.batch(2, sharding(shape))
    assert read == list(range(2 * 16, 3 * 16))


def test_only_the_rows_of_this_process_are_read(monkeypatch, read):
    """As on a process that holds 2 of the 8 devices: of 16 rows, its own 4."""
    real = sharding((1, 8, 1, 1, 1))
    mine = {d: i for d, i in real.devices_indices_map((16, 40)).items() if d.id in (2, 3)}
    monkeypatch.setattr(NamedSharding, "addressable_devices_indices_map", lambda self, shape: mine)
    monkeypatch.setattr("neo.data.loader.place", lambda batch, *_, **__: batch)
    batch = DATA.batch(1, real)
    order = [d.id for d in real.mesh.devices.flatten()]
    rows = sorted(r for p in (order.index(2), order.index(3)) for r in (2 * p, 2 * p + 1))
    assert read == [16 + r for r in rows]
    assert np.array_equal(batch["inputs"], DATA.host_batch(1)["inputs"][rows])


def test_a_batch_that_cannot_be_split_is_refused():
    phases = (PhaseConfig(name="odd", tokens=800, seq_len=10, global_batch=6, mixture={"a": 1.0}),)
    config = Config(name="x", model=ModelConfig(vocab_size=10), data=DataConfig(synthetic=True), phases=phases)
    with pytest.raises(InputError, match="6 sequences of 10 tokens cannot be split over the mesh.*'fsdp': 8"):
        TrainData(config, open_sources(config)).batch(0, sharding((1, 8, 1, 1, 1)))


@pytest.mark.parametrize("shape", MESHES[:4])
def test_validation_batches_can_be_placed(shape):
    validation = ValidationData(DATA.config, DATA.sources)
    rows = validation.batches("b", 40, 8, 1000).batch(2)
    placed = place(rows, sharding(shape))
    for name, value in rows.items():
        assert np.array_equal(np.asarray(placed[name]), value)
