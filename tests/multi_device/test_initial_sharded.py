"""Parameters of another model, read straight onto a mesh: each device gets its part, each block is read once."""

from __future__ import annotations

import dataclasses

import jax
import ml_dtypes
import numpy as np
import pytest

from neo.config.schema import MeshConfig, ModelConfig
from neo.models.decoder import Decoder
from neo.models.weights import LAYERS, parameter_shapes
from neo.parallel.mesh import make_mesh
from neo.parallel.rules import Layout, rules_for
from neo.train.checkpoints import flatten
from neo.train.initial import place
from neo.train.initial_blocks import DeepenedWeights, block_map

MODEL = ModelConfig(vocab_size=96, num_layers=3, d_model=32, num_heads=8, num_kv_heads=2, d_ff=48, max_seq_len=64,
                    qkv_bias=True, wesar=True)


class Numbered:
    """Every value says which it is; counts what is read."""

    def __init__(self, config):
        self.config, self.reads = config, []
        self.arrays = {path: (np.arange(np.prod(shape, dtype=int)).reshape(shape) % 251 + 0.5).astype(ml_dtypes.bfloat16)
                       for path, shape in parameter_shapes(config).items()}

    def dtype(self, path):
        return self.arrays[path].dtype

    def read(self, path, layer=None):
        self.reads.append((path, layer))
        return self.arrays[path] if layer is None else self.arrays[path][layer]


@pytest.mark.parametrize("sizes", [dict(fsdp=8), dict(fsdp=2, tensor=2, replica=2), dict(fsdp=1, tensor=8)], ids=str)
def test_parts_of_each_device(sizes):
    mesh = make_mesh(MeshConfig(**sizes))
    decoder = Decoder(MODEL, layout=Layout(mesh, rules_for(MODEL.num_kv_heads, mesh.shape["tensor"])))
    source = Numbered(MODEL)
    params = flatten(place(source, decoder.abstract_params()))
    shardings = flatten(decoder.layout.shardings(decoder.axes()))
    for path, array in params.items():
        assert array.sharding.is_equivalent_to(shardings[path], array.ndim) and array.dtype == np.float32
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, source.arrays[path][shard.index].astype(np.float32))
    assert len(params["embed/table"].devices()) == 8
    assert params["layers/mlp/up"].addressable_shards[0].data.size * 8 == params["layers/mlp/up"].size * mesh.shape["replica"]
    assert len(source.reads) == len(set(source.reads))
    assert all((layer is None) != path.startswith(LAYERS) for path, layer in source.reads)


def test_added_blocks_on_a_mesh():
    deep = dataclasses.replace(MODEL, num_layers=5)
    weights = DeepenedWeights(Numbered(MODEL), deep, block_map(3, 5, "stack"), identity=True)
    params = flatten(place(weights, Decoder(deep, layout=Layout(make_mesh(MeshConfig(fsdp=8)))).abstract_params()))
    assert jax.device_count() == 8 and not np.asarray(params["layers/mlp/down"])[3:].any()
    np.testing.assert_array_equal(np.asarray(params["layers/mlp/up"])[3:], np.asarray(params["layers/mlp/up"])[1:3])
