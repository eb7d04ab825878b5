"""Normalisation layers."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from neo.config.schema import ModelConfig
from neo.models.init import filled


class Norm(nnx.Module):
    """RMSNorm, x / sqrt(mean(x^2) + eps) * scale (Zhang & Sennrich, arXiv:1910.07467), or LayerNorm without bias.

    Computed in float32 over the trailing axes that `shape` names, D unless given.

    Args:
        shape, axes: of the scale, with its logical axes.
        gain: with a learnable scalar factor as well (WeSaR).
    """

    def __init__(self, config: ModelConfig, shape: tuple[int, ...] = (), axes: tuple[str, ...] = ("norm",),
                 gain: bool = False):
        shape = shape or (config.d_model,)
        self.kind, self.eps, self.offset = config.norm, config.norm_eps, config.norm_offset
        self.reduced = tuple(range(-len(shape), 0))
        self.scale = filled(shape, axes, 1.0 - config.norm_offset)
        if gain:
            self.gain = filled((), (), 1.0)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        y = x.astype(jnp.float32)
        if self.kind == "layer":
            y = y - jnp.mean(y, axis=self.reduced, keepdims=True)
        # Named, because to keep it costs 4 bytes a token, and to work it out again a pass over x.
        y = y * checkpoint_name(jax.lax.rsqrt(jnp.mean(y * y, axis=self.reduced, keepdims=True) + self.eps), "norm_scale")
        y = y * (self.scale[...] + self.offset)
        if hasattr(self, "gain"):
            y = y * self.gain[...]
        return y.astype(x.dtype)
