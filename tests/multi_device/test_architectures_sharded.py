"""The other architectures on 8 virtual devices: one step with every parameter drawn, against one device."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo.config.schema import MeshConfig, ModelConfig, OptimizerConfig
from neo.models.decoder import Decoder
from neo.parallel.mesh import make_mesh
from neo.parallel.rules import Layout, rules_for
from neo.train.optimizer import Optimizer
from neo.train.step import StepOptions, init_state, make_step, state_shardings

BASE = ModelConfig(vocab_size=64, num_layers=2, d_model=32, num_heads=8, num_kv_heads=2, d_ff=64, max_seq_len=16)
MODELS = {
    "mpt": dict(positions=("alibi",), norm="layer", mlp="plain", activation="gelu", tied_embeddings=True, num_kv_heads=8,
                clip_qkv=0.5, qk_norm="full"),
    "yulan": dict(wesar=True, qkv_bias=True, tied_embeddings=True, embedding_multiplier=10.0, residual_multiplier=0.2,
                  logit_multiplier=0.5),
    "olmo2": dict(qk_norm="full", norm_placement="post", output_bias=True, mlp_bias=True),
    "gemma": dict(qk_norm="head", norm_placement="sandwich", norm_offset=1.0, attention_softcap=2.0, logit_softcap=3.0,
                  windows=(4, 0), positions=("local_rope", "rope"), attention_scale=0.3),
}
MESH = dict(fsdp=2, tensor=4)   # key/value heads split (mpt) and replicated


def batch() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    text = draw.integers(0, BASE.vocab_size, (16, 17)).astype(np.int32)
    rows = lambda x: np.tile(np.asarray(x, np.int32), (16, 1))   # noqa: E731
    return dict(inputs=text[:, :-1], targets=text[:, 1:], loss_mask=(draw.random((16, 16)) > 0.3).astype(np.float32),
                segment_ids=rows(1 + (np.arange(16) >= 9)), positions=rows(np.arange(16)), source=np.zeros(16, np.int32))


def one_step(name: str, mesh: dict | None) -> tuple[dict, dict]:
    """(parameters, metrics) after one step from drawn parameters."""
    model = dataclasses.replace(BASE, **MODELS[name])
    layout = Layout() if mesh is None else Layout(make_mesh(MeshConfig(**mesh), jax.devices()),
                                                  rules_for(model.num_kv_heads, mesh.get("tensor", 1)))
    decoder = Decoder(model, jnp.float32, "none", "dense", layout)
    optimizer = Optimizer(OptimizerConfig(eps=1e-3), decoder.axes())   # a large eps: updates grow with the gradient
    state = jax.tree.map(np.asarray, init_state(dataclasses.replace(decoder, layout=Layout()), optimizer, 0, 0.1))
    draw = np.random.default_rng(1)
    state["params"] = jax.tree.map(lambda x: x + 0.1 * draw.standard_normal(x.shape).astype(np.float32), state["params"])
    data = batch()
    if mesh is not None:
        state = jax.device_put(state, state_shardings(decoder, optimizer))
        data = {k: jax.device_put(v, layout.sharding(*("batch", "sequence")[:v.ndim])) for k, v in data.items()}
    step = make_step(decoder, optimizer, StepOptions(1, z_loss=1e-3))
    state, metrics = step(state, data, jnp.float32(0.1), jnp.float32(0.1))
    return jax.tree.map(np.asarray, state["params"]), {k: float(metrics[k]) for k in ("loss", "grad_norm")}


@pytest.mark.parametrize("name", MODELS)
def test_a_step_equals_one_device(name):
    alone, figures = one_step(name, None)
    params, sharded = one_step(name, MESH)
    for key, value in figures.items():
        assert sharded[key] == pytest.approx(value, rel=5e-6), key
    for path, expected in jax.tree_util.tree_leaves_with_path(alone):
        found = params
        for key in path:
            found = found[key.key]
        # Sums over devices go in another order; a step moves a parameter by up to 0.1.
        np.testing.assert_allclose(found, expected, atol=2e-5, err_msg=jax.tree_util.keystr(path))
