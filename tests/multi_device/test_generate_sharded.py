"""Generating with parameters as training leaves them on a mesh gives what one device gives."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest

from neo.config.schema import Config, MeshConfig, ModelConfig, PhaseConfig
from neo.infer.generate import generate
from neo.infer.model import load
from neo.models.decoder import Decoder
from neo.parallel.mesh import make_mesh
from neo.parallel.rules import Layout, rules_for
from neo.train.checkpoints import Checkpoints
from neo.train.optimizer import Optimizer
from neo.train.step import init_state

MODEL = ModelConfig(vocab_size=96, num_layers=2, d_model=32, num_heads=8, num_kv_heads=2, d_ff=48, max_seq_len=64,
                    windows=(5, 0))
PROMPTS = [[5, 6, 7], list(range(2, 40)), [9]]
SETTINGS = dict(max_new_tokens=10, eod_id=None, temperature=1.0, top_p=0.9, seed=1)
MESHES = (dict(fsdp=8), dict(fsdp=2, tensor=2, replica=2), dict(fsdp=1, tensor=8))


@functools.cache
def on_one_device():
    decoder = Decoder(MODEL)
    params = jax.jit(lambda: decoder.init(jax.random.key(0), 0.2))()
    return params, generate(decoder, params, PROMPTS, **SETTINGS)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_as_on_one_device(sizes):
    """Batches filled up to the devices, caches split over heads, fewer key/value heads than devices."""
    mesh = make_mesh(MeshConfig(**sizes))
    decoder = Decoder(MODEL, layout=Layout(mesh, rules_for(MODEL.num_kv_heads, mesh.shape["tensor"])), remat="minimal")
    params, wanted = on_one_device()
    params = jax.device_put(params, decoder.layout.shardings(decoder.axes()))
    assert generate(decoder, params, PROMPTS, **SETTINGS) == wanted


def test_a_checkpoint_of_eight_devices_on_one_and_back(tmp_path):
    """Saved sharded; loaded on the first device, and on another mesh."""
    phase = PhaseConfig(tokens=64, seq_len=8, global_batch=8, mixture={"a": 1.0})
    config = Config(name="x", model=MODEL, phases=(phase,))
    mesh = make_mesh(MeshConfig(fsdp=8))
    decoder = Decoder(MODEL, layout=Layout(mesh))
    checkpoints = Checkpoints(tmp_path, 1)
    data = {"step": 1, "tokens": 64, "phase": "main", "synthetic": True, "order": {}}
    checkpoints.save(init_state(decoder, Optimizer(config.optimizer, decoder.axes()), 0, 0.2), data, config, {})
    checkpoints.close()
    one, several = load(str(tmp_path)), load(str(tmp_path), make_mesh(MeshConfig(fsdp=4, tensor=2)))
    assert {len(leaf.devices()) for leaf in jax.tree.leaves(one.params)} == {1}
    assert len(several.params["embed"]["table"].devices()) == 8
    for a, b in zip(jax.tree.leaves(one.params), jax.tree.leaves(several.params), strict=True):
        np.testing.assert_array_equal(a, b)
    tokens = np.arange(3 * 20).reshape(3, 20)
    np.testing.assert_allclose(one.logits(tokens), several.logits(tokens), atol=1e-4)
