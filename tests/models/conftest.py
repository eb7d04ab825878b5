"""A small model shape, and tokens for it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo.config.schema import ModelConfig
from neo.models.decoder import Decoder

STD = 0.1   # large enough that every weight shows in the logits


def model_config(**changes) -> ModelConfig:
    shape = dict(vocab_size=97, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=64)
    return ModelConfig(**{**shape, **changes})


@pytest.fixture
def tiny():
    """tiny(**changes) -> ModelConfig."""
    return model_config


@pytest.fixture
def build():
    """build(**changes, compute_dtype=, remat=, attention=) -> (Decoder, parameters)."""
    def make(*, compute_dtype=jnp.float32, remat="none", attention="dense", **changes):
        decoder = Decoder(model_config(**changes), compute_dtype, remat, attention)
        return decoder, decoder.init(jax.random.key(0), STD)
    return make


@pytest.fixture
def tokens():
    """tokens(batch, length, vocab=97) -> int32 [B, T], always the same."""
    def make(batch: int, length: int, vocab: int = 97):
        return jnp.asarray(np.random.default_rng(0).integers(0, vocab, (batch, length)), jnp.int32)
    return make
