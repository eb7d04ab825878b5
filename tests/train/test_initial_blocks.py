"""Blocks added to a model: where they stand, what they start from, and that silent ones change nothing."""

from __future__ import annotations

import dataclasses

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from neo.config.schema import ModelConfig
from neo.errors import InputError
from neo.models.decoder import Decoder
from neo.models.weights import LAYERS, parameter_shapes
from neo.train.initial_blocks import DeepenedWeights, added, block_map, silent

SHAPE = dict(vocab_size=64, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=64)


def test_moxin_from_mistral():
    """32 -> 36: every eighth block is repeated behind itself."""
    blocks = block_map(32, 36, "interleave")
    assert blocks[6:11] == (6, 7, 7, 8, 9) and blocks[-3:] == (30, 31, 31)
    assert [i for i, new in enumerate(added(blocks)) if new] == [8, 17, 26, 35]
    assert block_map(32, 36, "stack") == (*range(32), 28, 29, 30, 31)
    assert block_map(3, 8, "interleave") == (0, 0, 1, 1, 1, 2, 2, 2)
    assert block_map(5, 5, "none") == (0, 1, 2, 3, 4)


@hypothesis.given(source=st.integers(1, 70), extra=st.integers(1, 140))
def test_interleave_is_even_and_in_order(source, extra):
    blocks = block_map(source, source + extra, "interleave")
    assert len(blocks) == source + extra and sorted(blocks) == list(blocks)
    copies = [blocks.count(i) for i in range(source)]
    assert min(copies) >= 1 and max(copies) - min(copies) <= 1
    assert sum(added(blocks)) == extra


@hypothesis.given(source=st.integers(1, 70), data=st.data())
def test_stack_keeps_the_source_in_front(source, data):
    extra = data.draw(st.integers(1, source))
    blocks = block_map(source, source + extra, "stack")
    assert blocks[:source] == tuple(range(source)) and blocks[source:] == tuple(range(source - extra, source))
    assert added(blocks) == (False,) * source + (True,) * extra


@pytest.mark.parametrize("source,target,scheme,named", [
    (4, 3, "interleave", r"num_layers=3 is fewer than the 4 blocks.*num_layers=4 or more"),
    (4, 6, "none", r"num_layers=6, the source has 4 blocks.*init.depth=interleave or stack"),
    (4, 4, "stack", r"init.depth=stack adds blocks.*has already"),
    (4, 9, "stack", r"4 blocks become at most 8, not config.model.num_layers=9"),
])
def test_what_cannot_be(source, target, scheme, named):
    with pytest.raises(InputError, match=named):
        block_map(source, target, scheme)


KINDS = {
    "pre": {},
    "biases": dict(output_bias=True, mlp_bias=True, qkv_bias=True, mlp="plain", norm="layer"),
    "post": dict(norm_placement="post", qk_norm="full"),
    "sandwich": dict(norm_placement="sandwich", norm_offset=1.0, windows=(5, 0)),
    "wesar": dict(wesar=True, residual_multiplier=0.3),
}


@pytest.mark.parametrize("kind,scheme", zip(KINDS, ("interleave", "stack", "interleave", "stack", "interleave"), strict=True))
def test_identity_blocks_change_no_logit(random_weights, on_one_device, kind, scheme):
    """To the bit where both programs run the same loop over layers; with a pattern they are unrolled differently."""
    config = ModelConfig(**SHAPE, num_layers=2, **KINDS[kind])
    blocks = block_map(2, 4, scheme)
    # Kept blocks keep their windows: a pattern is written out for their new places.
    windows = tuple(config.layer_windows[i] or 0 for i in blocks) if len(config.windows) > 1 else config.windows
    deep = dataclasses.replace(config, num_layers=4, windows=windows)
    source = random_weights(config)
    weights = DeepenedWeights(source, deep, blocks, identity=True)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 24))
    deepened = on_one_device(weights, deep)
    before, after = (np.asarray(jax.jit(Decoder(c).apply)(params, tokens))
                     for c, params in ((config, on_one_device(source, config)), (deep, deepened)))
    assert abs(before).max() > 0.3
    np.testing.assert_allclose(before, after, rtol=0, atol=3e-6 if len(windows) > 1 else 0)
    copies = on_one_device(DeepenedWeights(source, deep, blocks), deep)
    assert any((np.asarray(a) != b).any() for a, b in zip(jax.tree.leaves(copies), jax.tree.leaves(deepened), strict=True))


@pytest.mark.parametrize("kind", ["pre", "sandwich"])
def test_gradients_reach_identity_blocks(random_weights, on_one_device, kind):
    """A silent block must be able to learn, and its first gradients must not be out of all proportion."""
    config = ModelConfig(**SHAPE, num_layers=4, **KINDS[kind])
    decoder = Decoder(config)
    params = on_one_device(DeepenedWeights(random_weights(dataclasses.replace(config, num_layers=2)), config,
                                       block_map(2, 4, "interleave"), identity=True), config)
    tokens = np.random.default_rng(0).integers(0, 64, (2, 24))
    grads = jax.jit(jax.grad(lambda p: jax.nn.log_softmax(decoder.apply(p, tokens))[..., 0].mean()))(params)
    largest = np.max([np.abs(np.asarray(g)).reshape(4, -1).max(1) for g in jax.tree.leaves(grads["layers"])], axis=0)
    assert (largest > 1e-6).all() and largest[[1, 3]].max() < 30 * largest[[0, 2]].max()


def test_copies_equal_an_explicit_reference(random_weights):
    config = ModelConfig(**SHAPE, num_layers=3)
    source, blocks = random_weights(config), (0, 0, 1, 2, 2)
    weights = DeepenedWeights(source, dataclasses.replace(config, num_layers=5), blocks)
    for path, array in source.arrays.items():
        wanted = array[list(blocks)] if path.startswith(LAYERS) else array
        np.testing.assert_array_equal(weights.read(path), wanted)
        assert weights.dtype(path) == array.dtype


def test_silent_parameters_are_those_of_the_model():
    """Every name that is silenced is a name of some model of its placement."""
    for kind, shape in KINDS.items():
        config = ModelConfig(**SHAPE, num_layers=2, **shape)
        assert set(silent(config)) & set(parameter_shapes(config)), kind
    everything = parameter_shapes(ModelConfig(**SHAPE, num_layers=2, **KINDS["biases"]))
    assert set(silent(ModelConfig())) <= set(everything)
