"""What a query may see and what distance costs, as a specification; a T x S array never crosses a function border."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from neo.errors import InputError


@dataclasses.dataclass(frozen=True)
class Mask:
    """Which keys j a query i sees; segment ids and offsets are arrays and come beside it.

    causal: j <= i.
    window: W >= 1 visible keys *including self*: i - W < j <= i; None sees all earlier keys. Other libraries count the
        keys to the left only (`jax.nn.dot_product_attention(local_window_size=(W - 1, 0))`, FlashAttention's
        `window_size=(W - 1, 0)`); convert at the border. A window needs causal=True.
    """

    causal: bool = True
    window: int | None = None

    def __post_init__(self) -> None:
        if self.window is None:
            return
        if isinstance(self.window, bool) or not isinstance(self.window, int) or self.window < 1:
            raise InputError(
                f"attention window is {self.window!r}; it counts the visible keys including self, so 1 or more"
            )
        if not self.causal:
            raise InputError(
                f"attention window {self.window} with causal=False; a window is the last W keys up to self: causal=True"
            )


def full_precision(dtype: jnp.dtype) -> jax.lax.Precision | None:
    """The `precision` of products of this type: float32 is multiplied as float32 also where the default is not (TPU, TF32)."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else None


def visible(
    mask: Mask,
    query_index: Int[Array, "... T"],
    key_index: Int[Array, "... S"],
    segment_ids: Int[Array, "... T"] | None = None,
    kv_segment_ids: Int[Array, "... S"] | None = None,
) -> Bool[Array, "... T S"] | None:
    """Boolean mask of one block of queries and keys, given where they stand; None when everything is visible."""
    i, j = query_index[..., :, None], key_index[..., None, :]
    terms = []
    if mask.causal:
        terms.append(j <= i)
    if mask.window is not None:
        terms.append(j > i - mask.window)
    if segment_ids is not None:
        terms.append(segment_ids[..., :, None] == kv_segment_ids[..., None, :])
    if not terms:
        return None
    seen = terms[0]
    for term in terms[1:]:
        seen = seen & term
    return seen


def distance_bias(
    slopes: Float[Array, "H"], query_index: Int[Array, "... T"], key_index: Int[Array, "... S"]
) -> Float[Array, "... H T S"]:
    """ALiBi (Press et al., arXiv:2108.12409) of one block: -slope * |i - j|, fp32, added to the scores of each head.

    Under a causal mask this is slope * (j - i). The absolute value is the form of bidirectional models, and keeps what
    the mask hides from growing.
    """
    distance = jnp.abs(query_index[..., :, None] - key_index[..., None, :]).astype(jnp.float32)
    return -slopes[:, None, None] * distance[..., None, :, :]
