"""From logits to the next token: temperature, top-k, top-p. Pure functions."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from neo.errors import InputError

LARGEST_SEED = 2**32 - 1   # JAX keys are made from 32 bits where 64-bit types are off


class Knobs(NamedTuple):
    """Sampling's settings as scalars of a compiled program: changing one compiles nothing."""

    temperature: np.float32 | Array
    top_k: np.int32 | Array
    top_p: np.float32 | Array
    vocab_size: np.int32 | Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, checked. The filters apply in this order: temperature, top_k, top_p.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token always.
        top_k: only the k likeliest tokens; 0 = all.
        top_p: only the smallest set of likeliest tokens whose probabilities add up to top_p (Holtzman et al.,
            arXiv:1904.09751), of what top_k left; 1 = all.
        seed: the same seed, prompt and place in the list of prompts give the same text.

    Raises InputError naming the field that is out of range.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise InputError(f"temperature={self.temperature}: 0 (always the likeliest token) or more is needed")
        if self.top_k < 0:
            raise InputError(f"top_k={self.top_k}: 0 (no limit) or more is needed")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: above 0, up to 1 (no limit) is needed")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise InputError(f"seed={self.seed}: a whole number from 0 to {LARGEST_SEED} is needed")

    def knobs(self, vocab_size: int) -> Knobs:
        """The settings for a program; ids from `vocab_size` on are never drawn."""
        return Knobs(np.float32(self.temperature), np.int32(min(self.top_k, vocab_size)), np.float32(self.top_p),
                     np.int32(vocab_size))


def row_keys(seed: Int[Array, ""], index: Int[Array, "B"]) -> Key[Array, "B"]:
    """One key per prompt, from the seed and the prompt's index: it does not matter which batch it runs in."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index)


def sample(logits: Float[Array, "B V"], keys: Key[Array, "B"], knobs: Knobs) -> Int[Array, "B"]:
    """The next token of each row, int32.

    Draws by the Gumbel-max trick: the same key with tighter filters gives the same token as long as
    the filters keep it.
    """
    vocab = logits.shape[-1]
    logits = jnp.where(jnp.arange(vocab) < knobs.vocab_size, logits.astype(jnp.float32), -jnp.inf)
    random = knobs.temperature > 0
    # The largest becomes 0, so that no temperature, however small, makes an infinity of it.
    scores = (logits - logits.max(-1, keepdims=True)) / jnp.where(random, knobs.temperature, 1.0)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (vocab,), jnp.float32))(keys)
    noise = jnp.where(random, noise, 0.0)

    def among_all() -> Array:
        return jnp.argmax(scores + noise, -1)

    def among_likeliest() -> Array:
        order, kept = likeliest(scores, knobs.top_k, knobs.top_p)
        best = jnp.argmax(jnp.where(kept, jnp.take_along_axis(scores + noise, order, -1), -jnp.inf), -1)
        return jnp.take_along_axis(order, best[:, None], -1)[:, 0]

    filtering = random & ((knobs.top_k > 0) | (knobs.top_p < 1))   # sorting the vocabulary is what costs time
    return jax.lax.cond(filtering, among_likeliest, among_all).astype(jnp.int32)


def likeliest(scores: Float[Array, "B V"], top_k: Int[Array, ""],
              top_p: Float[Array, ""]) -> tuple[Int[Array, "B V"], Array]:
    """Token ids from the likeliest down (ties: the lower id first), and which of those ranks the filters keep.

    At least one is kept. `scores` are log-probabilities up to a constant per row.
    """
    order = jnp.argsort(-scores, axis=-1, stable=True)
    rank = jnp.arange(scores.shape[-1])
    by_rank = jnp.where((top_k == 0) | (rank < top_k), jnp.take_along_axis(scores, order, -1), -jnp.inf)
    probability = jax.nn.softmax(by_rank, -1)
    before = jnp.cumsum(probability, -1) - probability
    # 1.0 is tested for: rounding in the sum must not cut the tail off when nothing is asked for.
    kept = ((top_p >= 1) | (before < top_p)) & (by_rank > -jnp.inf)
    return order, kept.at[:, 0].set(True)
