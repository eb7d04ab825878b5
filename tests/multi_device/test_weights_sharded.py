"""A checkpoint saved by eight devices, each its own piece, is read by slices like any other."""

from __future__ import annotations

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from neo.config.schema import Config, ModelConfig, PhaseConfig
from neo.models.decoder import Decoder
from neo.train.checkpoints import Checkpoints, flatten
from neo.train.weights import CheckpointWeights

MODEL = ModelConfig(vocab_size=48, num_layers=3, d_model=16, num_heads=2, num_kv_heads=1, d_ff=24, max_seq_len=32)
CONFIG = Config(name="tiny", model=MODEL, phases=(PhaseConfig(tokens=4096, seq_len=32, global_batch=2, mixture={"a": 1.0}),))


def test_pieces_of_eight_devices_are_put_together(tmp_path):
    mesh, rng = Mesh(np.array(jax.devices()).reshape(4, 2), ("fsdp", "tensor")), np.random.default_rng(0)

    def place(leaf):
        axes = ["fsdp" if size % 4 == 0 else "tensor" if size % 2 == 0 else None for size in leaf.shape]
        spec = [axis if axis not in axes[:i] else None for i, axis in enumerate(axes)]
        return jax.device_put(rng.standard_normal(leaf.shape).astype(np.float32), NamedSharding(mesh, PartitionSpec(*spec)))
    params = jax.tree.map(place, Decoder(MODEL).abstract_params())
    checkpoints = Checkpoints(tmp_path, 1)
    checkpoints.save({"params": params, "opt": {"count": jax.numpy.zeros((), "int32")}},
                     {"step": 1, "tokens": 1, "phase": "main", "synthetic": True, "order": {}}, CONFIG, {})
    checkpoints.close()
    weights = CheckpointWeights(checkpoints.latest())
    pieces = {path: len({str(shard.index) for shard in leaf.addressable_shards}) for path, leaf in flatten(params).items()}
    assert max(pieces.values()) == 8
    for path, leaf in flatten(params).items():
        np.testing.assert_array_equal(weights.read(path), np.asarray(leaf), strict=True)
        for layer in range(MODEL.num_layers) if path.startswith("layers/") else ():
            np.testing.assert_array_equal(weights.read(path, layer), np.asarray(leaf)[layer], strict=True)
