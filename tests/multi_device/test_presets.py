"""Each preset of the sharding rules gives the numbers of one device; test_sharding.py has more meshes."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo.config.schema import MeshConfig, ModelConfig, OptimizerConfig
from neo.models.decoder import Decoder
from neo.parallel.mesh import make_mesh
from neo.parallel.rules import PRESETS, Layout, rules_for
from neo.train.optimizer import Optimizer
from neo.train.step import StepOptions, init_state, make_step

MODEL = ModelConfig(vocab_size=64, num_layers=2, d_model=32, num_heads=8, num_kv_heads=2, d_ff=64, max_seq_len=16)
ROWS, LENGTH = 16, 16
CASES = {
    "data parallel": (dict(replica=8, fsdp=1), "fsdp"),
    "a copy per slice": (dict(replica=2, fsdp=4), "fsdp"),
    "tensor over few K/V heads": (dict(fsdp=2, tensor=4), "whole_kv"),
    "decoding": (dict(replica=2, fsdp=2, context=2), "decode"),
}


def first_step(layout: Layout) -> np.ndarray:
    """Loss, gradient norm and parameter norm of one step."""
    decoder = Decoder(MODEL, jnp.float32, "none", "dense", layout)
    optimizer = Optimizer(OptimizerConfig(), decoder.axes())
    rng = np.random.default_rng(0)
    text = rng.integers(0, MODEL.vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    batch = dict(inputs=text[:, :-1], targets=text[:, 1:], loss_mask=np.ones((ROWS, LENGTH), np.float32),
                 segment_ids=np.ones((ROWS, LENGTH), np.int32),
                 positions=np.tile(np.arange(LENGTH, dtype=np.int32), (ROWS, 1)), source=np.zeros(ROWS, np.int32))
    if layout.mesh is not None:
        batch = {name: jax.device_put(value, layout.sharding(*("batch", "sequence")[:value.ndim]))
                 for name, value in batch.items()}
    _, metrics = make_step(decoder, optimizer, StepOptions(1, 1, 1.0, 1e-3))(
        init_state(decoder, optimizer, 0, 0.1), batch, jnp.float32(1e-2), jnp.float32(0.1))
    return np.array([float(metrics[name]) for name in ("loss", "grad_norm", "param_norm")])


@pytest.fixture(scope="module")
def alone(shared_compile_cache):
    return first_step(Layout())


@pytest.mark.parametrize("case", CASES)
def test_every_preset_gives_the_step_of_one_device(alone, case):
    """A few 1e-7 by the order of sums; a missing or doubled part shows in the gradient norm by far more."""
    mesh, preset = CASES[case]
    found = first_step(Layout(make_mesh(MeshConfig(**mesh)), PRESETS[preset]))
    count = 1 if preset == "decode" else 3   # where devices repeat each other's work, gradients are counted twice
    np.testing.assert_allclose(found[:count], alone[:count], rtol=3e-6)


def test_every_preset_is_tried_and_picked_by_the_model():
    assert {preset for _, preset in CASES.values()} == set(PRESETS)
    assert rules_for(8, 8) == PRESETS["fsdp"] and rules_for(2, 8) == PRESETS["whole_kv"]
    mesh = make_mesh(MeshConfig(fsdp=4, context=2))
    assert Layout(mesh).whole_sequences().rules == dataclasses.replace(PRESETS["fsdp"], sequence=None) == PRESETS["decode"]
