"""Folding: the same logits from a model without multipliers and gains, and nothing touched that need not be."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from neo.config.schema import ModelConfig
from neo.models.decoder import Decoder
from neo.models.hf.classes import CLASSES, choose_class, obstacles, to_fold
from neo.models.hf.fold import Factor, FoldedWeights, RepeatedKV, fold
from neo.models.hf.names import leaf_shapes
from neo.models.weights import parameter_shapes

SHAPE = dict(vocab_size=97, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=64)
MULTIPLIERS = dict(embedding_multiplier=7.0, residual_multiplier=0.3, logit_multiplier=0.6, attention_scale=0.21)
BIASES = dict(qkv_bias=True, output_bias=True)
MPT = dict(positions=("alibi",), norm="layer", mlp="plain", activation="gelu", d_ff=128, num_kv_heads=4, tied_embeddings=True)
GEMMA = dict(norm_placement="sandwich", norm_offset=1.0, activation="gelu_tanh", logit_softcap=4.0)
YULAN = dict(MULTIPLIERS, wesar=True, qkv_bias=True, tied_embeddings=True)
ALL = dict(YULAN, **BIASES, mlp_bias=True)


class Arrays:
    """Weights in a dictionary of whole stacks."""

    def __init__(self, config: ModelConfig, arrays: dict[str, np.ndarray]):
        self.config, self.arrays = config, arrays

    def dtype(self, path: str) -> np.dtype:
        return self.arrays[path].dtype

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        return self.arrays[path] if layer is None else self.arrays[path][layer]


def random_weights(config: ModelConfig, dtype=np.float32) -> Arrays:
    """Every matrix, bias, norm and gain shows in the logits."""
    rng = np.random.default_rng(0)

    def draw(path: str, shape) -> np.ndarray:
        if path.endswith("gain"):
            return rng.uniform(0.5, 2.0, shape)
        return rng.normal(1 - config.norm_offset, 0.2, shape) if path.endswith("scale") else rng.normal(0, 0.15, shape)
    return Arrays(config, {path: np.asarray(draw(path, shape), np.float32).astype(dtype)
                           for path, shape in parameter_shapes(config).items()})


def read_all(weights) -> dict[str, np.ndarray]:
    return {path: weights.read(path) for path in parameter_shapes(weights.config)}


@functools.lru_cache
def forward(config: ModelConfig):
    """The decoder, compiled once per config and quickly: it runs once or twice."""
    return jax.jit(Decoder(config, jnp.float32, "none", "dense").apply,
                   compiler_options={"xla_backend_optimization_level": "0"})


def logits(weights) -> np.ndarray:
    params: dict = {}
    for path, array in read_all(weights).items():
        *groups, name = path.split("/")
        node = params
        for group in groups:
            node = node.setdefault(group, {})
        node[name] = jnp.asarray(array, jnp.float32)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 97, (2, 20)), jnp.int32)
    return np.asarray(forward(weights.config)(params, tokens))


def model(**changes) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **changes})


@pytest.mark.parametrize("name,changes", [
    ("llama", ALL), ("granite", ALL), ("qwen2", YULAN),
    ("olmo2", dict(MULTIPLIERS, qk_norm="full", norm_placement="post")),
    ("qwen3", dict(MULTIPLIERS, **BIASES, qk_norm="head")),
    ("gemma2", dict(MULTIPLIERS, **GEMMA, windows=(5, 0), attention_softcap=3.0)),
    ("gemma3_text", dict(YULAN, **GEMMA, output_bias=True, qk_norm="head", windows=(5, 0), positions=("local_rope", "rope"))),
    ("mpt", dict(MULTIPLIERS, **MPT, wesar=True, clip_qkv=0.3)),
])
def test_the_function_stays_the_same(name, changes):
    config = model(**changes)
    cls = choose_class(config, name)
    weights = random_weights(config)
    folded = FoldedWeights(weights, cls)
    assert to_fold(config, cls) and not to_fold(folded.config, cls) and not obstacles(folded.config, cls)
    expected = logits(weights)
    np.testing.assert_allclose(logits(folded), expected, atol=1e-5)
    assert np.abs(expected).max() > 0.5
    for path, stack in read_all(folded).items():
        assert stack.dtype == folded.dtype(path)
        if path.startswith("layers/"):
            assert all(np.array_equal(folded.read(path, layer), stack[layer]) for layer in range(config.num_layers))


def test_each_factor_is_needed():
    """The comparison above can fail: leaving the bias out of the gain, as converters have done, is seen."""
    weights = random_weights(model(**ALL))
    folded = FoldedWeights(weights, CLASSES["llama"])
    arrays, expected = read_all(folded), logits(weights)
    for path in folded.folded:
        wrong = logits(Arrays(folded.config, {**arrays, path: weights.read(path)}))
        assert np.abs(wrong - expected).max() > 1e-3, path


def test_only_what_must_change_changes():
    config = model(wesar=True, residual_multiplier=0.3, tied_embeddings=True)
    weights = random_weights(config, ml_dtypes.bfloat16)
    folded = FoldedWeights(weights, CLASSES["llama"])
    assert folded.config.tied_embeddings                    # gains of the head go into the final norm
    assert set(folded.folded) == {f"layers/{name}" for name in (
        "attention/query", "attention/key", "attention/value", "attention/output", "mlp/down", "attention_norm/scale",
        "mlp_norm/scale")} | {"final_norm/scale"}
    for path in leaf_shapes(folded.config):
        changed = path in folded.folded
        assert folded.dtype(path) == (np.float32 if changed else ml_dtypes.bfloat16)
        assert (folded.read(path) is weights.read(path)) != changed
    value = np.float32(weights.read("layers/attention/query", 1)) * np.float32(weights.read("layers/attention/query_gain", 1))
    assert np.array_equal(folded.read("layers/attention/query", 1), value)


def test_a_class_with_multipliers_changes_nothing():
    config = model(**MULTIPLIERS)
    weights = random_weights(config, ml_dtypes.bfloat16)
    folded = FoldedWeights(weights, choose_class(config))
    assert folded.config == config and not folded.folded
    assert all(folded.read(path) is weights.read(path) for path in leaf_shapes(config))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_powers_of_two_keep_type_and_bits(dtype):
    config = model(embedding_multiplier=8.0, residual_multiplier=0.25)
    weights = random_weights(config, dtype)
    folded = FoldedWeights(weights, CLASSES["llama"])
    assert folded.dtype("embed/table") == folded.read("embed/table").dtype == dtype
    assert np.array_equal(np.float64(folded.read("embed/table")), 8 * np.float64(weights.read("embed/table")))
    assert np.array_equal(np.float64(folded.read("layers/mlp/down")), 0.25 * np.float64(weights.read("layers/mlp/down")))


def test_float16_and_float64():
    config = model(embedding_multiplier=2.0 ** 14)
    assert FoldedWeights(random_weights(config, np.float16), CLASSES["llama"]).dtype("embed/table") == np.float32
    wide = random_weights(config, np.float64)
    wide.arrays["embed/table"] += 1e-12
    folded = FoldedWeights(wide, CLASSES["llama"])
    assert np.array_equal(folded.read("embed/table"), wide.read("embed/table") * 2.0 ** 14)
    assert Factor(-0.5).exact and not Factor(3.0).exact and not Factor(2.0, ("x",)).exact and not Factor(2.0, offset=1.0).exact


def test_a_scaled_embedding_unties_the_head():
    config = model(embedding_multiplier=10.0, tied_embeddings=True)
    weights = random_weights(config, ml_dtypes.bfloat16)
    folded = FoldedWeights(weights, CLASSES["llama"])
    assert not folded.config.tied_embeddings and fold(config, CLASSES["llama"]).untied
    assert np.array_equal(folded.read("head/kernel"), weights.read("embed/table").T)
    assert folded.dtype("head/kernel") == ml_dtypes.bfloat16 and folded.dtype("embed/table") == np.float32
    assert FoldedWeights(weights, CLASSES["granite"]).config.tied_embeddings


def test_gemmas_own_embedding_multiplier_is_not_folded():
    config = model(**GEMMA, embedding_multiplier=32 ** 0.5, tied_embeddings=True)
    assert not fold(config, CLASSES["gemma2"]).factors
    other = fold(dataclasses.replace(config, embedding_multiplier=1.0), CLASSES["gemma2"])
    assert math.isclose(other.factors["embed/table"].constant, 32 ** -0.5) and other.untied
    scaled = dataclasses.replace(config, attention_scale=12 ** -0.5)        # query_pre_attn_scalar 12
    assert not fold(scaled, CLASSES["gemma2"]).factors
    odd = fold(dataclasses.replace(config, attention_scale=0.3), CLASSES["gemma2"])     # no whole number gives 0.3
    assert set(odd.factors) == {"layers/attention/query"} and odd.config.attention_scale == 0


@pytest.mark.parametrize("changes", [dict(qkv_bias=True), dict(qk_norm="full", norm_placement="post"),
                                     dict(MPT, num_kv_heads=1)])
def test_repeated_heads_compute_the_same(changes):
    weights = random_weights(model(**changes))
    repeated = RepeatedKV(weights)
    assert repeated.config.num_kv_heads == 4
    shapes = parameter_shapes(repeated.config)
    assert all(repeated.read(path).shape == shape and repeated.dtype(path) == np.float32 for path, shape in shapes.items())
    assert np.array_equal(repeated.read("layers/attention/key", 1), repeated.read("layers/attention/key")[1])
    np.testing.assert_allclose(logits(repeated), logits(weights), atol=1e-5)


def test_mpt_takes_repeated_heads():
    config = model(**{**MPT, "num_kv_heads": 2})
    assert obstacles(config, CLASSES["mpt"])
    assert choose_class(RepeatedKV(random_weights(config)).config).model_type == "mpt"
