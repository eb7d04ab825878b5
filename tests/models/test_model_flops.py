"""The structural FLOPs count against what JAX would multiply, and against what XLA says it does."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import pytest

import neo.config
from neo.models.decoder import Decoder
from neo.models.flops import train_flops_per_token, visible_pairs


def matmul_flops(jaxpr) -> int:
    """2 x multiply-adds of every dot_general of a jaxpr, loops counted as often as they run."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contract, _), _ = eqn.params["dimension_numbers"]
            total += 2 * math.prod(eqn.outvars[0].aval.shape) * math.prod(eqn.invars[0].aval.shape[i] for i in contract)
        times = eqn.params["length"] if eqn.primitive.name == "scan" else 1
        for value in eqn.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += times * matmul_flops(inner)
    return total


def loss(decoder):
    def of(params, tokens):
        logits = decoder.apply(params, tokens)
        return (jax.nn.logsumexp(logits, -1) - logits[..., 0]).sum()
    return of


@pytest.mark.parametrize("changes", [{}, dict(num_kv_heads=1, head_dim=16), dict(tied_embeddings=True, num_layers=5)])
def test_training_matmuls_are_counted_exactly(build, tokens, changes):
    # The dense attention computes every pair of the sequence: the `full` convention without a window.
    decoder, params = build(**changes)
    batch = tokens(2, 24)
    jaxpr = jax.make_jaxpr(jax.grad(loss(decoder)))(params, batch).jaxpr
    assert matmul_flops(jaxpr) == train_flops_per_token(decoder.config, 24).full * batch.size


def test_agrees_with_the_compiler(tiny, tokens):
    # XLA's count adds element-wise work (softmax, norms, SiLU, rotation) to the matrix products and counts a loop once,
    # hence one layer, and 8 %: element-wise work is 3 to 6 % at this width and falls with it.
    config = tiny(num_layers=1, d_model=256, d_ff=688, num_heads=4, num_kv_heads=2, vocab_size=512)
    decoder = Decoder(config, attention="dense")
    batch = tokens(2, 64, 512)
    cost = jax.jit(decoder.apply).lower(decoder.abstract_params(), batch).compile().cost_analysis()
    ours = train_flops_per_token(config, 64).full / 3 * batch.size
    assert 1.0 <= cost["flops"] / ours < 1.08


@pytest.mark.parametrize("seq_len,window", [(1, None), (7, None), (7, 1), (7, 3), (7, 7), (7, 9)])
def test_visible_pairs_equal_the_mask(seq_len, window):
    i, j = jnp.arange(seq_len)[:, None], jnp.arange(seq_len)
    seen = (j <= i) & (j > i - (window or seq_len))
    full, causal = visible_pairs(seq_len, window)
    assert causal == int(seen.sum())
    assert full == seq_len * min(window or seq_len, seq_len)


def test_windows_lower_both_conventions(tiny):
    one, other = train_flops_per_token(tiny(), 64), train_flops_per_token(tiny(windows=(8, 0)), 64)
    assert other.full < one.full and other.causal < one.causal < one.full


def test_7b_is_near_six_flops_per_parameter():
    # 6 N plus attention, at most 12 L D T per token without the causal half (PaLM, appendix B).
    config = neo.config.load("neo_7b").model
    n = 7_793_716_224 - config.vocab_size * config.d_model   # the table is looked up, not multiplied
    flops = train_flops_per_token(config, 8192)
    attention = 12 * config.num_layers * config.d_model * 8192
    norms = 6 * config.d_model * (2 * config.num_layers + 1)
    assert flops.full == pytest.approx(6 * n - norms + attention, rel=1e-12)
    assert flops.causal == pytest.approx(6 * n - norms + attention / 2, rel=1e-3)
