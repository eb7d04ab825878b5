"""Remat policies change what the backward pass keeps, never what it computes."""

from __future__ import annotations

import contextlib
import io
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

from neo.config.schema import REMAT_POLICIES
from neo.models.remat import POLICIES

SHAPE = dict(num_layers=5, windows=(8, 0), vocab_size=64, d_model=64, d_ff=160)


def objective(decoder, tokens):
    return lambda params: (decoder.hidden(params, tokens).astype(jnp.float32) ** 2).mean()


def saved_elements(function, params) -> int:
    """Elements of the residuals that are kept besides the arguments."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        print_saved_residuals(function, params)
    total = 0
    for line in out.getvalue().splitlines():
        if "from the argument" not in line and "from a constant" not in line:
            dims = line.split("[", 1)[1].split("]", 1)[0]
            total += int(np.prod([int(n) for n in dims.split(",") if n]))
    return total


def test_every_policy_of_the_schema_exists():
    assert set(POLICIES) == set(REMAT_POLICIES)


@pytest.fixture(scope="module")
def plain_results():
    """Loss and gradients without remat, once per attention implementation."""
    return {}


@pytest.mark.parametrize("policy,attention", [("minimal", "blockwise"), ("lean", "blockwise"), ("attention", "blockwise"),
                                              ("offload", "blockwise"), ("full", "blockwise"), ("minimal", "dense")])
def test_same_loss_and_gradients(build, tokens, plain_results, policy, attention):
    batch = tokens(2, 32, 64)
    decoder, params = build(remat=policy, attention=attention, **SHAPE)
    if attention not in plain_results:
        plain, _ = build(attention=attention, **SHAPE)
        plain_results[attention] = jax.jit(jax.value_and_grad(objective(plain, batch)))(params)
    loss, grads = plain_results[attention]
    remat_loss, remat_grads = jax.jit(jax.value_and_grad(objective(decoder, batch)))(params)
    np.testing.assert_allclose(loss, remat_loss, rtol=1e-6)
    for one, other in zip(jax.tree.leaves(grads), jax.tree.leaves(remat_grads), strict=True):
        # The same operations, fused differently: float32 rounding relative to the largest gradient.
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(one).max()))


def test_policies_keep_less_and_less(build, tokens):
    batch = tokens(2, 32, 64)
    kept, temporary = {}, {}
    for policy in REMAT_POLICIES:
        decoder, params = build(remat=policy, attention="blockwise", **SHAPE)
        kept[policy] = saved_elements(objective(decoder, batch), params)
        compiled = jax.jit(jax.grad(objective(decoder, batch))).lower(params).compile()
        temporary[policy] = compiled.memory_analysis().temp_size_in_bytes
    assert kept["none"] > kept["minimal"] > kept["lean"] > kept["attention"] > kept["full"] > 0
    # Saved per layer and token: the boundary x (D); attention adds its output (H h) and lse (H), and the scales of two
    # norms; lean adds q, k, v and the two MLP branches, minimal also the middle of the block.
    per_layer = 2 * 32 * SHAPE["num_layers"]
    assert kept["attention"] - kept["full"] == per_layer * (64 + 4 + 2)
    assert kept["lean"] - kept["attention"] == per_layer * (64 + 2 * 32 + 2 * 160)
    assert kept["minimal"] - kept["lean"] == per_layer * 64
    assert temporary["none"] > temporary["minimal"] > temporary["lean"] > temporary["attention"]


def test_layers_outside_the_loop_are_recomputed_too(build, tokens):
    """One group, and one layer left over: no loop keeps the compiler from merging the recomputation with the original."""
    batch = tokens(2, 16, 64)
    dots = {}
    for policy in ("none", "full"):
        decoder, params = build(**{**SHAPE, "num_layers": 3}, remat=policy, attention="dense")
        hlo = jax.jit(jax.grad(objective(decoder, batch))).lower(params).compile().as_text()
        dots[policy] = len(re.findall(r" dot\(", hlo)) + hlo.count("__onednn$matmul")
    # A layer has 9 matrix products forward; all but the last have to be repeated.
    assert dots["full"] - dots["none"] == 3 * 8
