"""Parameters with their logical axes, and how they start: to the bit the same on every mesh, JAX and chip."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from neo.config.schema import InitConfig, ModelConfig

_BITS = 16   # two table entries per 32 random bits


@functools.cache
def _quantiles() -> np.ndarray:
    """2^16 midpoint quantiles of the standard normal, scaled to variance 1; float32, antisymmetric."""
    count = 1 << _BITS
    upper = [statistics.NormalDist().inv_cdf((count / 2 + i + 0.5) / count) for i in range(count // 2)]
    both = np.concatenate([-np.array(upper[::-1]), np.array(upper)])
    return (both / np.sqrt(np.mean(both**2))).astype(np.float32)


def normal(key: jax.Array, shape: Sequence[int], std: float) -> Float[Array, "..."]:
    """N(0, std^2) in float32: the sum of two table entries, picked by the halves of 32 random bits.

    `jax.random.normal` evaluates a polynomial, which a compiler may contract otherwise in another shape: with
    JAX 0.12 on a CPU, shards of an array then differ from the whole in the last bit. Here every operation is
    exact or rounds once. 2^32 values, at most 5.9 standard deviations out.
    """
    bits = jax.random.bits(key, tuple(shape), jnp.uint32)
    table = jnp.asarray(_quantiles())
    total = table[bits >> _BITS] + table[bits & ((1 << _BITS) - 1)]
    return total * np.float32(std / np.sqrt(2.0))


def matrix(rngs: nnx.Rngs, shape: Sequence[int], axes: tuple[str, ...], std: float) -> nnx.Param:
    """A float32 parameter drawn from N(0, std^2).

    `axes` is metadata of our own: Flax's sharding keys want mesh axes, not logical ones.
    """
    return nnx.Param(normal(rngs.params(), shape, std), axes=axes)


def filled(shape: Sequence[int], axes: tuple[str, ...], value: float) -> nnx.Param:
    """A float32 parameter that starts at one value: norm scales, biases, scalar gains."""
    return nnx.Param(jnp.full(tuple(shape), value, jnp.float32), axes=axes)


def deviation(init: InitConfig, config: ModelConfig, *, fan_in: int, residual: bool = False) -> float:
    """Standard deviation of a matrix with `fan_in` inputs; `residual`: its output is added to the residual stream.

    kaiming is llm-foundry's kaiming_normal_ with init_div_is_residual (fan in, gain of relu): the init of MPT.
    """
    if init.scheme == "normal":
        return init.std
    return math.sqrt(2.0 / fan_in) * (_residual_factor(config) if residual else 1.0)


def starting_gain(init: InitConfig, config: ModelConfig, *, residual: bool = False) -> float:
    """Where a WeSaR gain starts: sqrt(gain_width / D), times 1 / sqrt(2 L) for outputs (YuLan-Mini's config.json)."""
    return math.sqrt(init.gain_width / config.d_model) * (_residual_factor(config) if residual else 1.0)


def _residual_factor(config: ModelConfig) -> float:
    return 1.0 / math.sqrt(2.0 * config.num_layers)


def plus(x: Array, bias: nnx.Param | None) -> Array:
    """x + bias in x's dtype, where there is one."""
    return x if bias is None else x + bias[...].astype(x.dtype)


def times(x: Array, gain: nnx.Param | None) -> Array:
    """x * gain in x's dtype, where there is one."""
    return x if gain is None else x * gain[...].astype(x.dtype)
