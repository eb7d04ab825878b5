"""The key/value cache of generation, an object of its own so that other kinds can take its place."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neo.config.schema import ModelConfig

LayerCache = tuple[Float[Array, "B S K h"], Float[Array, "B S K h"]]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers at array index = position; `length` tokens of each sequence are filled."""

    key: Float[Array, "L B S K h"]
    value: Float[Array, "L B S K h"]
    length: Int[Array, "B"]

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, capacity: int, dtype: jnp.dtype = jnp.float32) -> KVCache:
        """A cache for `batch` sequences of up to `capacity` tokens: 2 L B S K h values."""
        shape = (config.num_layers, batch, capacity, config.num_kv_heads, config.head_size)
        return cls(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch,), jnp.int32))

    def write(self, layer: LayerCache, key: Float[Array, "B T K h"], value: Float[Array, "B T K h"]) -> LayerCache:
        """One layer's cache with T new entries behind the filled ones."""
        def put(old: Array, new: Array) -> Array:
            at = jax.vmap(lambda o, n, start: jax.lax.dynamic_update_slice_in_dim(o, n, start, axis=0))
            return at(old, new.astype(old.dtype), self.length)
        return put(layer[0], key), put(layer[1], value)
