"""The choices of the model config, each against a plain formula; whole classes are compared in tests/convert."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo.config.schema import InitConfig, ModelConfig
from neo.models.decoder import Decoder, layer_pattern
from neo.models.flops import parameter_count
from neo.models.mlp import ACTIVATIONS
from neo.models.norm import Norm
from neo.models.position import alibi_slopes, inverse_frequencies, rotations, scaled

# One field away from the default, or the few that need each other.
CHOICES = [
    dict(mlp="plain", activation="gelu"), dict(activation="gelu_tanh"), dict(norm="layer"), dict(norm_placement="post"),
    dict(norm_placement="sandwich", norm_offset=1.0), dict(qk_norm="head"), dict(qk_norm="full"),
    dict(qk_norm="full", norm="layer", clip_qkv=0.5), dict(qkv_bias=True, output_bias=True),
    dict(mlp_bias=True), dict(mlp_bias=True, mlp="plain"), dict(positions=("alibi",)), dict(positions=("none",)),
    dict(positions=("rope", "none"), windows=(3, 0, 0)), dict(positions=("local_rope", "rope"), local_rope_base=100.0),
    dict(attention_scale=0.5, attention_softcap=2.0), dict(logit_softcap=3.0, logit_multiplier=0.5), dict(attention_sinks=True),
    dict(embedding_multiplier=3.0, residual_multiplier=0.4), dict(wesar=True, tied_embeddings=True), dict(wesar=True),
    dict(rope_scaling="linear", rope_factor=4.0), dict(rope_scaling="llama3", rope_factor=8.0, rope_old_seq_len=32),
]
ids = lambda changes: "-".join(f"{name}={value}" for name, value in changes.items())   # noqa: E731


@pytest.fixture
def shaken():
    """shaken(config) -> (Decoder, parameters), every one of them drawn: zero biases and unit gains would hide mistakes."""
    def make(config: ModelConfig, seed: int = 0, **settings):
        decoder = Decoder(config, **settings)
        leaves, tree = jax.tree.flatten(decoder.init(jax.random.key(seed), 0.1))
        keys = jax.random.split(jax.random.key(seed + 1), len(leaves))
        drawn = [x + 0.1 * jax.random.normal(key, x.shape) for key, x in zip(keys, leaves, strict=True)]
        return decoder, jax.tree.unflatten(tree, drawn)
    return make


@pytest.mark.parametrize("changes", CHOICES, ids=ids)
def test_every_parameter_counts_and_every_choice_shows(tiny, shaken, tokens, changes):
    config = tiny(**changes)
    decoder, params = shaken(config, attention="dense")
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    assert parameter_count(config)["total"] == count
    batch = tokens(2, 10)

    def size(decoder: Decoder, params: dict) -> jax.Array:
        return (decoder.apply(params, batch) ** 2).mean()

    logits, grads = jax.jit(jax.value_and_grad(lambda p: size(decoder, p)))(params)
    for path, grad in jax.tree_util.tree_leaves_with_path(grads):
        name = jax.tree_util.keystr(path)
        if "key_bias" in name and config.positions == ("none",):
            continue   # a constant key moves all scores of a row alike
        assert float(jnp.abs(grad).max()) > 1e-9, f"{name} has no influence"
    for field in changes:
        other = Decoder(dataclasses.replace(config, **{field: getattr(ModelConfig(), field)}), attention="dense")
        shapes = [jax.tree.map(jnp.shape, tree) for tree in (other.abstract_params(), params)]
        if shapes[0] == shapes[1]:   # another set of parameters is another model anyway
            assert abs(float(size(other, params) - logits)) > 1e-7, f"{field} does nothing"


@pytest.mark.parametrize("changes", [
    dict(positions=("alibi",), norm="layer", mlp="plain"), dict(positions=("local_rope", "none"), windows=(4, 0, 6)),
    dict(attention_softcap=2.0, logit_softcap=3.0, norm_placement="sandwich"), dict(wesar=True, qkv_bias=True),
    dict(attention_sinks=True, windows=(4, 0))], ids=ids)
def test_decoding_step_by_step_equals_the_full_forward(tiny, shaken, tokens, changes):
    from neo.models.cache import KVCache
    config = tiny(**changes)
    decoder, params = shaken(config, attention="dense")
    batch = tokens(2, 12)
    full = decoder.apply(params, batch)
    cache, parts = KVCache.empty(config, 2, 16), []
    step = jax.jit(decoder.decode)
    for cut in (batch[:, :7], batch[:, 7:8], batch[:, 8:9], batch[:, 9:12]):
        logits, cache = step(params, cut, cache)
        parts.append(logits)
    np.testing.assert_allclose(jnp.concatenate(parts, 1), full, atol=2e-5)   # float32 rounding in another order


@pytest.mark.parametrize("kind,offset", [("rms", 0.0), ("rms", 1.0), ("layer", 0.0)])
def test_norm_formula(tiny, kind, offset):
    norm = Norm(tiny(norm=kind, norm_offset=offset, norm_eps=1e-3), (4, 8), ("heads", "head"))
    assert (norm.scale[...] == 1 - offset).all()
    scale = np.random.default_rng(1).normal(size=(4, 8))
    norm.scale[...] = jnp.asarray(scale, jnp.float32)
    x = np.random.default_rng(0).normal(size=(3, 4, 8))
    centred = x - (x.mean((-2, -1), keepdims=True) if kind == "layer" else 0)
    expected = centred / np.sqrt((centred**2).mean((-2, -1), keepdims=True) + 1e-3) * (scale + offset)
    np.testing.assert_allclose(norm(jnp.asarray(x, jnp.float32)), expected, atol=2e-6)


def test_activations_against_their_formulas():
    x = np.linspace(-4, 4, 33)
    erf = np.vectorize(math.erf)
    np.testing.assert_allclose(ACTIVATIONS["silu"](x), x / (1 + np.exp(-x)), atol=1e-6)
    np.testing.assert_allclose(ACTIVATIONS["gelu"](x), x / 2 * (1 + erf(x / np.sqrt(2))), atol=1e-6)
    tanh = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    np.testing.assert_allclose(ACTIVATIONS["gelu_tanh"](x), tanh, atol=1e-6)
    assert np.abs(tanh - ACTIVATIONS["gelu"](x)).max() > 1e-4


def test_alibi_slopes():
    """Worked values of the paper (8 heads: 1/2 .. 1/256) and llm-foundry's order for other numbers."""
    np.testing.assert_allclose(alibi_slopes(8), 2.0 ** -np.arange(1, 9))
    np.testing.assert_allclose(alibi_slopes(6), [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3])
    np.testing.assert_allclose(alibi_slopes(4, bias_max=16), 2.0 ** -np.array([4, 8, 12, 16]))
    assert alibi_slopes(1).tolist() == [2.0 ** -8]


def test_frequency_scaling(tiny):
    plain = inverse_frequencies(64, 5e5)
    linear = scaled(tiny(rope_scaling="linear", rope_factor=4.0), plain)
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)
    config = tiny(rope_scaling="llama3", rope_factor=8.0, rope_old_seq_len=8192)
    llama3, turns = scaled(config, plain), 8192 * plain / (2 * np.pi)
    np.testing.assert_allclose(llama3[turns > 4.01], plain[turns > 4.01], rtol=1e-6)
    np.testing.assert_allclose(llama3[turns < 0.99], plain[turns < 0.99] / 8, rtol=1e-6)
    between = (turns > 1.01) & (turns < 3.99)
    assert between.any() and (llama3[between] < plain[between]).all() and (llama3[between] > plain[between] / 8).all()


def test_phase_base_leaves_local_layers_alone(tiny):
    config = tiny(positions=("local_rope", "rope", "alibi"), rope_base=10.0, local_rope_base=10.0)
    positions = jnp.arange(4)[None]
    model, phase = rotations(config, positions), rotations(config, positions, 1000.0)
    assert model["alibi"] is None and (phase["local_rope"].cos == model["local_rope"].cos).all()
    assert not (phase["rope"].cos == model["rope"].cos).all()


def test_layer_pattern_repeats_both_tuples(tiny):
    config = tiny(num_layers=7, windows=(4, 0), positions=("rope", "rope", "none"))
    pattern = layer_pattern(config)
    assert len(pattern) == 6
    assert [(kind.window, kind.position) for kind in pattern] == [
        (4, "rope"), (None, "rope"), (4, "none"), (None, "rope"), (4, "rope"), (None, "none")]
    assert len(layer_pattern(tiny(num_layers=5, windows=(4, 0), positions=("rope", "rope", "none")))) == 5


def test_kaiming_divides_what_adds_to_the_residual_stream(tiny):
    config = tiny(d_model=64, num_heads=4, d_ff=256, num_layers=2, mlp="plain")
    params = Decoder(config).init(jax.random.key(0), InitConfig(scheme="kaiming"))
    layers = params["layers"]
    for x, std in ((params["embed"]["table"], math.sqrt(2 / 64)), (layers["attention"]["query"], math.sqrt(2 / 64)),
                   (layers["attention"]["output"], math.sqrt(2 / 64) / 2), (layers["mlp"]["up"], math.sqrt(2 / 64)),
                   (layers["mlp"]["down"], math.sqrt(2 / 256) / 2)):
        assert abs(float(x.std()) / std - 1) < 5 / math.sqrt(2 * x.size)


def test_wesar_starts_at_yulan_minis_gains():
    """The values of YuLan-Mini's config.json: sqrt(256/1920), and that over sqrt(2 * 56)."""
    config = ModelConfig(vocab_size=64, num_layers=56, d_model=1920, num_heads=30, num_kv_heads=6, head_dim=64, d_ff=8,
                         wesar=True, qkv_bias=True, tied_embeddings=True)
    params = jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), InitConfig(std=5e-5)))
    assert params["layers"]["attention"]["query_gain"].shape == (56,) and params["head"]["gain"].shape == ()
    from neo.models.init import starting_gain
    assert starting_gain(InitConfig(), config) == pytest.approx(0.3651483716701107)
    assert starting_gain(InitConfig(), config, residual=True) == pytest.approx(0.03450327796711771)
    small = dataclasses.replace(config, d_model=32, num_heads=4, num_kv_heads=2, head_dim=8, num_layers=2)
    drawn = Decoder(small).init(jax.random.key(0), InitConfig(std=5e-5, gain_width=8))
    np.testing.assert_allclose(drawn["layers"]["mlp"]["input_gain"], 0.5)
    np.testing.assert_allclose(drawn["layers"]["attention"]["output_gain"], 0.25)
    assert (drawn["layers"]["attention_norm"]["gain"] == 1).all() and drawn["head"]["gain"] == 1
