"""The attention layer: projections and rotation around the one attention entry point."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from neo.config.schema import InitConfig, ModelConfig
from neo.models.init import deviation, filled, matrix, plus, starting_gain, times
from neo.models.norm import Norm
from neo.models.position import Rotation, rotate
from neo.parallel.rules import InMemory, Pin, unpinned

# (q, k, v, sinks or None) -> mixed values. What it does with k and v (a kernel, a cache) is not the layer's business.
Attend = Callable[[Float[Array, "B T H h"], Float[Array, "B T K h"], Float[Array, "B T K h"], Float[Array, "H"] | None],
                  Float[Array, "B T H h"]]

# [B, T, H, h] in memory as [B, H, T, h].
QUERIES = InMemory((0, 2, 1, 3), ("batch", "sequence", "heads", "head"))
KEYS = InMemory((0, 2, 1, 3), ("batch", "sequence", "kv", "head"))


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al., arXiv:2305.13245): H query heads share K key/value heads.

    Each projection is (x W + bias) * gain, then clipped; queries and keys are normalised and rotated after that.
    """

    def __init__(self, config: ModelConfig, init: InitConfig, *, rngs: nnx.Rngs):
        d, num_heads, num_kv, h = config.d_model, config.num_heads, config.num_kv_heads, config.head_size
        std = deviation(init, config, fan_in=d)
        self.clip = config.clip_qkv
        self.query = matrix(rngs, (d, num_heads, h), ("embed", "heads", "head"), std)
        self.key = matrix(rngs, (d, num_kv, h), ("embed", "kv", "head"), std)
        self.value = matrix(rngs, (d, num_kv, h), ("embed", "kv", "head"), std)
        self.output = matrix(rngs, (num_heads, h, d), ("heads", "head", "embed"),
                             deviation(init, config, fan_in=num_heads * h, residual=True))
        if config.qkv_bias:
            self.query_bias = filled((num_heads, h), ("heads", "head"), 0.0)
            self.key_bias = filled((num_kv, h), ("kv", "head"), 0.0)
            self.value_bias = filled((num_kv, h), ("kv", "head"), 0.0)
        if config.output_bias:
            self.output_bias = filled((d,), ("norm",), 0.0)
        if config.attention_sinks:
            self.sinks = filled((num_heads,), ("heads",), 0.0)
        if config.qk_norm == "head":
            self.query_norm, self.key_norm = (Norm(config, (h,), ("head",)) for _ in range(2))
        if config.qk_norm == "full":
            self.query_norm = Norm(config, (num_heads, h), ("heads", "head"))
            self.key_norm = Norm(config, (num_kv, h), ("kv", "head"))
        if config.wesar:
            self.query_gain, self.key_gain, self.value_gain = (filled((), (), starting_gain(init, config)) for _ in "qkv")
            self.output_gain = filled((), (), starting_gain(init, config, residual=True))

    def __call__(self, x: Float[Array, "B T D"], rotation: Rotation | None, attend: Attend,
                 pin: Pin = unpinned) -> Float[Array, "B T D"]:
        query, key, value = (self._project(name, x) for name in ("query", "key", "value"))
        if hasattr(self, "query_norm"):
            query, key = self.query_norm(query), self.key_norm(key)
        if rotation is not None:
            query, key = rotate(query, rotation), rotate(key, rotation)
        # As the TPU kernels read and write them, so that what is kept for the backward pass is not turned on its way.
        query, key, value = pin(query, QUERIES), pin(key, KEYS), pin(value, KEYS)
        query, key = checkpoint_name(query, "query"), checkpoint_name(key, "key")
        sinks = self.sinks[...] if hasattr(self, "sinks") else None
        mixed = pin(attend(query, key, checkpoint_name(value, "value"), sinks), QUERIES)
        y = jnp.einsum("bthk,hkd->btd", mixed, self.output[...].astype(x.dtype))
        return times(plus(y, getattr(self, "output_bias", None)), getattr(self, "output_gain", None))

    def _project(self, name: str, x: Float[Array, "B T D"]) -> Float[Array, "B T N h"]:
        y = jnp.einsum("btd,dhk->bthk", x, getattr(self, name)[...].astype(x.dtype))
        y = times(plus(y, getattr(self, f"{name}_bias", None)), getattr(self, f"{name}_gain", None))
        return jnp.clip(y, -self.clip, self.clip) if self.clip else y
