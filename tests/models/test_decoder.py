"""What the decoder computes: causality, window patterns, dtypes, tying, segments, rotation."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from neo.config.schema import InitConfig
from neo.kernels.attention import Mask, attention
from neo.models.decoder import Block, Decoder
from neo.models.position import inverse_frequencies, rope_rotation, rotate


def test_causality_by_gradients(build, tokens):
    """The logits of position i depend on the embeddings of positions <= i, and on all of them."""
    decoder, params = build(num_layers=2)
    batch = tokens(1, 8)
    table = jax.random.normal(jax.random.key(1), (8, 32)) * 0.1

    def logit_sums(rows):
        # Each position gets an embedding row of its own, so that a row's gradient is a position's.
        with_rows = {**params, "embed": {"table": rows}}
        return decoder.apply(with_rows, jnp.arange(8)[None])[0].sum(-1)

    del batch
    depends = np.abs(np.asarray(jax.jacobian(logit_sums)(table))).max(-1)
    assert (depends[np.triu_indices(8, 1)] == 0).all()
    assert (depends[np.tril_indices(8)] > 1e-6).all()


@pytest.mark.parametrize("window,layers,reach", [(1, 3, 1), (3, 1, 3), (3, 2, 5), (2, 3, 4)])
def test_windows_bound_the_reach(build, window, layers, reach):
    """L layers of W visible keys including self see L (W - 1) + 1 positions."""
    decoder, params = build(num_layers=layers, windows=(window,))

    def logit_sums(rows):
        return decoder.apply({**params, "embed": {"table": rows}}, jnp.arange(8)[None])[0].sum(-1)

    depends = np.abs(np.asarray(jax.jacobian(logit_sums)(jax.random.normal(jax.random.key(1), (8, 32)) * 0.1))).max(-1)
    i, j = np.arange(8)[:, None], np.arange(8)
    assert ((depends > 1e-6) == ((j <= i) & (j > i - reach))).all()


def unrolled(decoder, params, tokens):
    """The same model as a plain loop over layers, without scan, remat or caches."""
    config = decoder.config
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Block(config, InitConfig(), rngs=nnx.Rngs(0))))
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    rotation = rope_rotation(positions, inverse_frequencies(config.head_size, config.rope_base))
    x = params["embed"]["table"][tokens]
    for i, window in enumerate(config.layer_windows):
        block = nnx.merge(graphdef, jax.tree.map(lambda a, i=i: a[i], params["layers"]))
        x = block(x, rotation, lambda q, k, v, _, w=window: attention(q, k, v, mask=Mask(window=w), implementation="dense"))
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + config.norm_eps) * params["final_norm"]["scale"]
    return x @ params["head"]["kernel"]


@pytest.mark.parametrize("layers", [4, 5, 7])
@pytest.mark.parametrize("windows", [(3,), (3, 0), (2, 5, 0)])
def test_scan_over_patterns_equals_the_loop(build, tokens, windows, layers):
    decoder, params = build(num_layers=layers, windows=windows)
    batch = tokens(2, 12)
    ours, loop = decoder.apply(params, batch), unrolled(decoder, params, batch)
    # Same operations in another program: float32 rounding of logits of size ~1.
    np.testing.assert_allclose(ours, loop, atol=2e-5)
    grad = lambda f: jax.grad(lambda p: (f(p) ** 2).mean())(params)   # noqa: E731
    for one, other in zip(jax.tree.leaves(grad(lambda p: decoder.apply(p, batch))),
                          jax.tree.leaves(grad(lambda p: unrolled(decoder, p, batch))), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * float(jnp.abs(other).max()) + 1e-8)


def test_pattern_changes_the_result(build, tokens):
    decoder, params = build(num_layers=4, windows=(3, 0))
    other, _ = build(num_layers=4, windows=(0, 3))
    assert float(jnp.abs(decoder.apply(params, tokens(1, 12)) - other.apply(params, tokens(1, 12))).max()) > 1e-3


@pytest.mark.parametrize("attention", ["dense", "blockwise"])
def test_packed_documents_do_not_meet(build, tokens, attention):
    """Two documents in one row give the logits of two rows."""
    decoder, params = build(attention=attention, windows=(4, 0))
    row = tokens(1, 15)
    positions = jnp.concatenate([jnp.arange(6), jnp.arange(9)])[None]
    segments = jnp.asarray([1] * 6 + [2] * 9)[None]
    packed = decoder.apply(params, row, positions, segments)
    apart = jnp.concatenate([decoder.apply(params, row[:, :6]), decoder.apply(params, row[:, 6:])], axis=1)
    np.testing.assert_allclose(packed, apart, atol=1e-5)


def test_tied_head_is_the_table(build, tokens):
    decoder, params = build(tied_embeddings=True)
    untied, _ = build()
    with_head = {**params, "head": {"kernel": params["embed"]["table"].T}}
    np.testing.assert_allclose(decoder.apply(params, tokens(2, 9)), untied.apply(with_head, tokens(2, 9)), atol=1e-5)
    grads = jax.grad(lambda p: (decoder.apply(p, tokens(2, 9)) ** 2).mean())(params)
    apart = jax.grad(lambda p: (untied.apply(p, tokens(2, 9)) ** 2).mean())(with_head)
    both = apart["embed"]["table"] + apart["head"]["kernel"].T
    np.testing.assert_allclose(grads["embed"]["table"], both, atol=1e-5 * float(jnp.abs(both).max()))


def test_bfloat16_compute_keeps_float32_parameters_and_logits(build, tokens):
    decoder, params = build(compute_dtype=jnp.bfloat16)
    exact, _ = build()
    batch = tokens(2, 12)
    assert decoder.hidden(params, batch).dtype == jnp.bfloat16
    logits = decoder.apply(params, batch)
    assert logits.dtype == jnp.float32
    grads = jax.grad(lambda p: (decoder.apply(p, batch) ** 2).mean())(params)
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(grads))
    # bfloat16 has 8 bits: about 0.4 % a rounding, a few of them in a row over 3 layers.
    error = jnp.linalg.norm(logits - exact.apply(params, batch)) / jnp.linalg.norm(exact.apply(params, batch))
    assert 1e-5 < float(error) < 0.03
    jaxpr = str(jax.make_jaxpr(decoder.hidden)(params, batch))
    assert "bf16[2,12,48]" in jaxpr and "f32[2,12,48]" not in jaxpr   # the MLP runs in bfloat16 throughout


def test_positions_matter_only_relatively(build, tokens):
    decoder, params = build()
    batch = tokens(2, 10)
    shifted = decoder.apply(params, batch, jnp.broadcast_to(jnp.arange(10) + 1000, (2, 10)))
    np.testing.assert_allclose(decoder.apply(params, batch), shifted, atol=2e-4)   # float32 angles near 1000: 6e-5
    stretched = decoder.apply(params, batch, jnp.broadcast_to(jnp.arange(10) * 3, (2, 10)))
    assert float(jnp.abs(decoder.apply(params, batch) - stretched).max()) > 1e-2


def test_rotation_is_one_and_keeps_lengths():
    x = jax.random.normal(jax.random.key(0), (1, 5, 2, 8))
    y = rotate(x, rope_rotation(jnp.arange(5)[None], inverse_frequencies(8, 100.0)))
    np.testing.assert_allclose(jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(y, axis=-1), rtol=1e-5)
    np.testing.assert_array_equal(y[:, 0], x[:, 0])
    # Pair i = 1 of h = 8 at base 100 turns by 100^(-1/4) per position; pairs are (i, i + h/2).
    angle = 4 * 100 ** -0.25
    z = (x[0, 4, 0, 1] + 1j * x[0, 4, 0, 5]) * np.exp(1j * angle)
    np.testing.assert_allclose([y[0, 4, 0, 1], y[0, 4, 0, 5]], [z.real, z.imag], rtol=1e-5)


def test_rope_base_of_the_phase_wins(build, tokens):
    decoder, params = build(rope_base=500.0)
    other = Decoder(decoder.config, attention="dense")
    by_model = decoder.apply(params, tokens(1, 9))
    np.testing.assert_array_equal(by_model, other.apply(params, tokens(1, 9), rope_base=500.0))
    assert float(jnp.abs(by_model - other.apply(params, tokens(1, 9), rope_base=1e6)).max()) > 1e-4


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_rotation_by_product_is_the_rotation(dtype):
    """What TPUs run: equal to the last bit but for a fused multiply-add, forward and backward."""
    x, y = jax.random.normal(jax.random.key(0), (2, 1, 300, 4, 16)).astype(dtype)
    plain = rope_rotation(jnp.arange(300)[None], inverse_frequencies(16, 1000.0))
    product = dataclasses.replace(plain, by_product=True)

    @functools.partial(jax.jit, static_argnums=2)
    def both_ways(x, y, by_product):
        out, vjp = jax.vjp(lambda x: rotate(x, product if by_product else plain), x)
        return out, vjp(y)[0]

    turned, back = zip(both_ways(x, y, False), both_ways(x, y, True), strict=True)
    tolerance = dict(rtol=1e-6, atol=1e-6) if dtype == jnp.float32 else dict(rtol=2**-7, atol=1e-6)
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in turned), **tolerance)
    np.testing.assert_allclose(*(np.asarray(a, np.float32) for a in back), **tolerance)
    assert turned[0].dtype == turned[1].dtype == dtype
    assert float(jnp.abs(turned[0] - x).max()) > 1
