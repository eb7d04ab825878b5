"""The update against optax on the unstacked model, and which parameters decay."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from neo.config.schema import ModelConfig, OptimizerConfig
from neo.models.decoder import Decoder
from neo.train.optimizer import Optimizer, clip_scale, global_norm

MODEL = ModelConfig(vocab_size=31, num_layers=3, d_model=16, num_heads=4, num_kv_heads=2, d_ff=24, max_seq_len=16)
CONFIG = OptimizerConfig(b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1)


def unstack(params):
    """One dict per layer, as a model without scan would have it."""
    layers = [jax.tree.map(lambda a, i=i: a[i], params["layers"]) for i in range(MODEL.num_layers)]
    return {**{k: v for k, v in params.items() if k != "layers"}, "layers": layers}


def random_like(tree, seed):
    leaves, structure = jax.tree.flatten(tree)
    rng = np.random.default_rng(seed)
    return jax.tree.unflatten(structure, [jnp.asarray(rng.normal(size=x.shape), jnp.float32) for x in leaves])


def test_update_equals_adamw_on_the_unstacked_model():
    decoder = Decoder(MODEL)
    optimizer = Optimizer(CONFIG, decoder.axes())
    ours = random_like(decoder.abstract_params(), 0)
    theirs = unstack(ours)
    rates = [1e-2, 3e-3, 1e-3, 5e-3]
    is_gain = lambda path: str(path[-1].key) == "scale"   # noqa: E731
    adamw = optax.adamw(lambda count: jnp.asarray(rates)[count], b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1,
                        mask=lambda p: jax.tree_util.tree_map_with_path(lambda path, _: not is_gain(path), p))
    state, their_state = optimizer.init(ours), adamw.init(theirs)
    update, their_update = jax.jit(optimizer.update), jax.jit(adamw.update)
    for i, rate in enumerate(rates):
        grads = random_like(ours, i + 1)
        ours, state = update(grads, state, ours, jnp.float32(rate), jnp.float32(0.1))
        moves, their_state = their_update(unstack(grads), their_state, theirs)
        theirs = optax.apply_updates(theirs, moves)
    for one, other in zip(jax.tree.leaves(unstack(ours)), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-7)   # float32 rounding over four updates
    assert int(state["count"]) == 4 and state["count"].dtype == jnp.int32


def test_only_norm_gains_do_not_decay():
    decoder = Decoder(MODEL)
    optimizer = Optimizer(CONFIG, decoder.axes())
    params = jax.tree.map(lambda s: jnp.ones(s.shape), decoder.abstract_params())
    zero = jax.tree.map(jnp.zeros_like, params)
    moved, _ = optimizer.update(zero, optimizer.init(params), params, jnp.float32(0.5), jnp.float32(0.2))
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
        expected = 1.0 if path[-1].key == "scale" else 1 - 0.5 * 0.2
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, err_msg=jax.tree_util.keystr(path))


def test_state_has_plain_names_and_axes():
    decoder = Decoder(MODEL)
    optimizer = Optimizer(CONFIG, decoder.axes())
    state = jax.eval_shape(optimizer.init, decoder.abstract_params())
    assert set(state) == {"count", "mu", "nu"}
    assert jax.tree.structure(state) == jax.tree.structure(optimizer.state_axes(), is_leaf=lambda x: isinstance(x, tuple))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves((state["mu"], state["nu"])))


@pytest.mark.parametrize("norm,limit,scale", [
    (4.0, 1.0, 0.25), (0.5, 1.0, 1.0), (1.0, 1.0, 1.0), (9.0, 0.0, 1.0), (0.0, 1.0, 1.0)])
def test_clip_scale(norm, limit, scale):
    assert float(clip_scale(jnp.float32(norm), limit)) == scale


def test_global_norm_is_that_of_all_numbers():
    tree = {"a": jnp.arange(6.0).reshape(2, 3), "b": [jnp.full((4,), -2.0)]}
    assert float(global_norm(tree)) == pytest.approx((55 + 16) ** 0.5, rel=1e-6)
