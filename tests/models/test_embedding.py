"""The look-up's own backward pass."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from neo.models.embedding import lookup
from neo.parallel.rules import Layout


def test_gradient_equals_autodiff_of_indexing():
    table = jax.random.normal(jax.random.key(0), (11, 8))
    tokens = jax.random.randint(jax.random.key(1), (3, 7), 0, 11)
    weights = jax.random.normal(jax.random.key(2), (3, 7, 8))
    ours = jax.grad(lambda t: (lookup(t, tokens, Layout(), jnp.float32) * weights).sum())(table)
    np.testing.assert_allclose(ours, jax.grad(lambda t: (t[tokens] * weights).sum())(table), atol=1e-5)
    np.testing.assert_array_equal(lookup(table, tokens, Layout(), jnp.float32), table[tokens])


def test_a_common_token_is_added_up_in_float32():
    """4096 gradients of 1 for one row: a bfloat16 sum would stop at 256."""
    table, tokens = jnp.zeros((3, 2)), jnp.ones((4, 1024), jnp.int32)
    grad = jax.grad(lambda t: lookup(t, tokens, Layout(), jnp.bfloat16).astype(jnp.float32).sum())(table)
    assert grad.dtype == jnp.float32
    np.testing.assert_array_equal(grad, [[0, 0], [4096, 4096], [0, 0]])
