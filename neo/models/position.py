"""How a layer knows positions: rotary embedding in the half-rotation layout of Hugging Face, and ALiBi's slopes."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from neo.config.schema import ModelConfig


@dataclasses.dataclass(frozen=True)
class Rotation:
    """cos and sin of the angles, in float32. by_product: see `rotate`."""

    cos: Float[Array, "B T 1 h2"]
    sin: Float[Array, "B T 1 h2"]
    by_product: bool = False


def rotations(config: ModelConfig, positions: Int[Array, "B T"], rope_base: float = 0.0,
              by_product: bool = False) -> dict[str, Rotation | None]:
    """The rotation of every position scheme the model's layers use; None for schemes that rotate nothing.

    rope_base: of the phase, for the layers with position "rope"; 0 means the model's.
    """
    def of(scheme: str) -> Rotation | None:
        if scheme == "rope":
            frequencies = scaled(config, inverse_frequencies(config.head_size, rope_base or config.rope_base))
        elif scheme == "local_rope":
            frequencies = inverse_frequencies(config.head_size, config.local_rope_base)
        else:
            return None
        return dataclasses.replace(rope_rotation(positions, frequencies), by_product=by_product)

    return {scheme: of(scheme) for scheme in dict.fromkeys(config.positions)}


def inverse_frequencies(head_size: int, base: float) -> Float[np.ndarray, "h2"]:
    """base^(-2i/h), i < h/2: radians per position (Su et al., arXiv:2104.09864)."""
    exponent = np.arange(0, head_size, 2, dtype=np.float32) / head_size
    return (1.0 / np.float32(base) ** exponent).astype(np.float32)


def scaled(config: ModelConfig, frequencies: Float[np.ndarray, "h2"]) -> Float[np.ndarray, "h2"]:
    """Frequencies stretched to a longer context by `rope_factor`.

    linear divides all of them (Chen et al., arXiv:2306.15595). llama3 divides those that turn less than
    rope_low_frequency times in the old context, keeps those that turn more than rope_high_frequency times, and
    blends linearly in the number of turns between (Llama 3.1, `apply_scaling` of meta-llama/llama-models).
    """
    if config.rope_scaling == "none":
        return frequencies
    stretched = frequencies / np.float32(config.rope_factor)
    if config.rope_scaling == "linear":
        return stretched
    turns = np.float32(config.rope_old_seq_len) / (np.float32(2 * math.pi) / frequencies)
    keep = (turns - config.rope_low_frequency) / (config.rope_high_frequency - config.rope_low_frequency)
    keep = np.clip(keep, 0.0, 1.0).astype(np.float32)
    return (1 - keep) * stretched + keep * frequencies


def rope_rotation(positions: Int[Array, "B T"], frequencies: Float[np.ndarray, "h2"]) -> Rotation:
    """cos and sin of position * frequency in float32, with an axis for the heads."""
    angle = positions.astype(jnp.float32)[..., None, None] * frequencies
    return Rotation(jnp.cos(angle), jnp.sin(angle))


def rotate(x: Float[Array, "B T H h"], rotation: Rotation) -> Float[Array, "B T H h"]:
    """Rotate the pairs (x[i], x[i + h/2]) by the angles of their position.

    by_product: x * cos + (x R) * sin with a matrix R that swaps the halves and changes a sign, instead of taking x apart.
    On TPUs half a head is half a vector register: taking heads apart and together again costs 2 to 3 % of a 7B step by
    the compiler's account, a product with R (exact: one entry of +-1 a column) next to nothing.
    """
    if rotation.by_product:
        return _rotate_by_product(x, rotation.cos, rotation.sin)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = rotation.cos, rotation.sin
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


@jax.custom_vjp
def _rotate_by_product(x: Float[Array, "B T H h"], cos: Float[Array, "B T 1 h2"],
                       sin: Float[Array, "B T 1 h2"]) -> Float[Array, "B T H h"]:
    half = x.shape[-1] // 2
    swap = np.kron([[0, 1], [-1, 0]], np.eye(half))   # (x[:half], x[half:]) -> (-x[half:], x[:half])
    swapped = jnp.einsum("bthi,ij->bthj", x, jnp.asarray(swap, x.dtype), preferred_element_type=jnp.float32,
                         precision=jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None)
    cos, sin = (jnp.concatenate([a, a], axis=-1) for a in (cos, sin))
    return (x.astype(jnp.float32) * cos + swapped * sin).astype(x.dtype)


# The transpose of a rotation turns back; positions take no gradient.
_rotate_by_product.defvjp(lambda x, cos, sin: (_rotate_by_product(x, cos, sin), (cos, sin)),
                          lambda angles, grad: (_rotate_by_product(grad, angles[0], -angles[1]), None, None))


def alibi_slopes(num_heads: int, bias_max: float = 8.0) -> Float[np.ndarray, "H"]:
    """Slope of each head's linear bias, float32 (Press et al., arXiv:2108.12409; head order of llm-foundry).

    2^(-bias_max i / n), i = 1..n, for n heads; where H is no power of two, n is the next one and the odd
    slopes come first, then the even ones, cut to H.
    """
    n = 1 << (num_heads - 1).bit_length()
    slopes = 2.0 ** (-np.arange(1, n + 1, dtype=np.float64) * bias_max / n)
    if n != num_heads:
        slopes = np.concatenate([slopes[1::2], slopes[::2]])[:num_heads]
    return slopes.astype(np.float32)
