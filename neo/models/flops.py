"""One count of parameters and model FLOPs, by structure, with windows.

FLOPs of a forward pass are 2 per multiply-add of every matrix product; the embedding look-up is none.
Training counts three times the forward pass (backward = 2x), whatever is recomputed: this is *model*
FLOPs utilisation (PaLM, arXiv:2204.02311, appendix B). Attention is given in two conventions:

    full    every query meets every key of the window or sequence (llm-foundry, PaLM)
    causal  only the pairs the mask lets through (about half without a window)
"""

from __future__ import annotations

import dataclasses

from neo.config.schema import ModelConfig


@dataclasses.dataclass(frozen=True)
class Flops:
    """Training FLOPs per token, in both conventions of the attention term."""

    full: float
    causal: float


def parameter_count(config: ModelConfig) -> dict[str, int]:
    """Parameters in total and without embedding table and head."""
    inner = config.num_layers * (_matrices(config) + _vectors(config)) + config.d_model
    ends = config.vocab_size * config.d_model * (1 if config.tied_embeddings else 2)
    if config.wesar:
        inner, ends = inner + 1, ends + 1   # gains of the final norm and of the head
    return {"total": inner + ends, "non_embedding": inner}


def _matrices(config: ModelConfig) -> int:
    """Entries of one block's matrices."""
    attention = 2 * config.d_model * config.head_size * (config.num_heads + config.num_kv_heads)
    return attention + config.d_model * config.d_ff * (3 if config.mlp == "gated" else 2)


def _vectors(config: ModelConfig) -> int:
    """Parameters of one block that are no matrices: norm scales, biases, gains."""
    d, h, heads = config.d_model, config.head_size, config.num_heads + config.num_kv_heads
    count = d * (4 if config.norm_placement == "sandwich" else 2)
    count += {"none": 0, "head": 2 * h, "full": heads * h}[config.qk_norm]
    count += (heads + config.num_kv_heads) * h * config.qkv_bias + d * config.output_bias
    count += config.num_heads * config.attention_sinks
    count += (config.d_ff * (2 if config.mlp == "gated" else 1) + d) * config.mlp_bias
    return count + 8 * config.wesar   # query, key, value, output, both norms, the feed-forward layer's input and output


def visible_pairs(seq_len: int, window: int | None) -> tuple[float, float]:
    """(full, causal): query-key pairs per sequence that a layer computes.

    Causal is sum over i of min(i + 1, W); full is T times min(T, W).
    """
    w = min(window or seq_len, seq_len)
    return float(seq_len * w), w * (w + 1) / 2 + (seq_len - w) * w


def train_flops_per_token(config: ModelConfig, seq_len: int) -> Flops:
    """Model FLOPs of one training token at this sequence length, head included, embedding look-up not."""
    dense = 2.0 * (config.num_layers * _matrices(config) + config.d_model * config.vocab_size)
    per_pair = 2 * 2 * config.num_heads * config.head_size   # scores and mixing, 2 FLOPs per multiply-add
    pairs = [visible_pairs(seq_len, window) for window in config.layer_windows]
    full, causal = (sum(column) * per_pair / seq_len for column in zip(*pairs, strict=True))
    return Flops(full=3 * (dense + full), causal=3 * (dense + causal))
