"""Parameters from `Weights` onto devices."""

from __future__ import annotations

import contextlib
import types
from dataclasses import replace

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from neo.config.schema import Config, InitConfig, ModelConfig, PhaseConfig
from neo.errors import InputError
from neo.models.decoder import Decoder
from neo.models.weights import LAYERS
from neo.parallel.mesh import make_mesh
from neo.parallel.rules import Layout
from neo.train.checkpoints import Checkpoints, flatten
from neo.train.initial import fitted, parameters, place
from neo.train.initial_blocks import DeepenedWeights

CONFIG = ModelConfig(vocab_size=64, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=64)


def test_values_dtypes_and_one_block_at_a_time(random_weights, on_one_device):
    source = random_weights(CONFIG, dtype=ml_dtypes.bfloat16)
    params = flatten(on_one_device(source, CONFIG))
    assert params.keys() == source.arrays.keys()
    for path, array in params.items():
        assert array.dtype == jnp.float32
        np.testing.assert_array_equal(array, source.arrays[path].astype(np.float32))
    assert len(source.reads) == len(set(source.reads))   # nothing twice
    assert all((layer is None) != path.startswith(LAYERS) for path, layer in source.reads)   # no stack as a whole


def test_half_precision(random_weights):
    source = random_weights(CONFIG)
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    half = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16, sharding=one),
                        Decoder(CONFIG).abstract_params())
    for path, array in flatten(place(source, half)).items():
        assert array.dtype == jnp.bfloat16
        np.testing.assert_array_equal(array, source.arrays[path].astype(ml_dtypes.bfloat16))


def test_a_shape_that_differs_is_named(random_weights, on_one_device):
    source = random_weights(CONFIG)
    source.arrays["layers/mlp/up"] = source.arrays["layers/mlp/up"][..., :40]
    with pytest.raises(InputError, match=r"layers/mlp/up has shape \(32, 40\), the model of this config needs \(32, 48\)"):
        on_one_device(source, CONFIG)


def test_without_options_the_source_is_passed_through(random_weights):
    source = random_weights(CONFIG)
    assert fitted(source, CONFIG, InitConfig(), None, None, "there") == (source, [])


def test_both_at_once(random_weights, on_one_device):
    """More blocks and more rows; the remarks say what was done."""
    source, wide = random_weights(CONFIG), replace(CONFIG, num_layers=5, vocab_size=72)
    init = InitConfig(from_hf="x", depth="stack", new_blocks="identity")
    weights, remarks = fitted(source, wide, init, None, None, "there")
    assert isinstance(weights, DeepenedWeights) and weights.config == wide
    assert remarks == ["8 rows of padding start at the mean of the 64 rows",
                       "2 added blocks (identity) at 3, 4, copies of 1, 2"]
    params = flatten(on_one_device(weights, wide))
    np.testing.assert_array_equal(params["layers/attention/query"][3:], source.arrays["layers/attention/query"][1:])
    assert not np.asarray(params["layers/mlp/down"][3:]).any() and params["embed/table"].shape == (72, 32)
    np.testing.assert_array_equal(params["embed/table"][:64], source.arrays["embed/table"])


def test_extension_needs_tokenizers(random_weights):
    wide = InitConfig(from_hf="x", extend_vocab=True)
    with pytest.raises(InputError, match="extend_vocab=True needs two tokenizers, and there has none"):
        fitted(random_weights(CONFIG), CONFIG, wide, None, object(), "there")
    with pytest.raises(InputError, match="synthetic data has none"):
        fitted(random_weights(CONFIG), CONFIG, wide, object(), None, "there")
    with pytest.raises(InputError, match="there has a tokenizer of 70 ids and a table of 64 rows"):
        fitted(random_weights(CONFIG), CONFIG, wide, types.SimpleNamespace(vocab_size=70), object(), "there")


def test_blocks_added_to_a_checkpoint_of_neo(random_weights, tmp_path):
    """init.checkpoint takes the same options: read one block at a time, here from Orbax's chunks."""
    config = Config(name="x", model=CONFIG, phases=(PhaseConfig(tokens=64, seq_len=8, global_batch=8, mixture={"a": 1.0}),))
    source = random_weights(CONFIG)
    checkpoints = Checkpoints(tmp_path, 1)
    tree = {}
    for path, array in source.arrays.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = jnp.asarray(array)
    data = {"step": 1, "tokens": 64, "phase": "main", "synthetic": True, "order": {}}
    checkpoints.save({"params": tree, "opt": {"count": jnp.zeros((), jnp.int32)}}, data, config, {})
    checkpoints.close()
    deep = replace(config, model=replace(CONFIG, num_layers=4),
                   init=InitConfig(checkpoint=str(tmp_path), depth="interleave", new_blocks="copy"))
    lines = []
    decoder = Decoder(deep.model, layout=Layout(make_mesh(deep.mesh)))
    params, facts = parameters(deep, decoder, None, Lines(lines))
    np.testing.assert_array_equal(flatten(params)["layers/mlp/up"], source.arrays["layers/mlp/up"][[0, 1, 2, 2]])
    assert facts["kind"] == "neo" and lines[0] == f"starting from {tmp_path}/checkpoints/1 (step 1, 64 tokens)"
    assert lines[1] == "1 added blocks (copy) at 3, copies of 2"


class Lines:
    """A log that keeps its lines."""

    def __init__(self, lines):
        self.lines = lines

    def __call__(self, text):
        self.lines.append(text)

    def stage(self, name):
        return contextlib.nullcontext()
