"""What a model's held-out bits per byte should be seen beside: a unigram model and general compressors."""

from __future__ import annotations

import lzma
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

UNIGRAM_TOKENS = 20_000_000     # training tokens counted per source (ours: a few seconds)
COMPRESSOR_BYTES = 4_000_000    # held-out text per source given to the compressors (ours)


def unigram_bits_per_byte(sources: Mapping[str, Any], vocab_size: int) -> float:
    """Bits per byte of the held-out tokens under the training tokens' frequencies, with add-one smoothing.

    It knows the tokenizer and how often each token comes, and nothing of order.
    """
    bits = total_bytes = 0.0
    for source in sources.values():
        held_out, train = source.split("validation"), source.split("train")
        counts = np.ones(vocab_size, np.int64)
        for start in range(0, min(train.num_tokens, UNIGRAM_TOKENS), 1 << 20):
            stop = min(start + (1 << 20), train.num_tokens, UNIGRAM_TOKENS)
            counts += np.bincount(train.tokens(start, stop), minlength=vocab_size)
        cost = -np.log2(counts / counts.sum())
        for start in range(0, held_out.num_tokens, 1 << 20):
            bits += cost[held_out.tokens(start, min(start + (1 << 20), held_out.num_tokens))].sum()
        total_bytes += held_out.num_bytes
    return float(bits / total_bytes) if total_bytes else math.nan


def compressor_bits_per_byte(sources: Mapping[str, Any], tokenizer: Any) -> dict[str, float]:
    """Bits per byte that gzip -9 and xz -9e need for the held-out text of each source, averaged over bytes.

    They see the held-out text only, all documents in one stream; a model has also seen the training text.
    """
    texts = []
    for source in sources.values():
        split = source.split("validation")
        tokens = split.tokens(0, min(split.num_tokens, COMPRESSOR_BYTES // 2)).tolist()
        texts.append(tokenizer.decode([t for t in tokens if t != source.eod_id]).encode("utf-8", "replace"))
    size = sum(map(len, texts))
    if not size:
        return {}
    return {"gzip": 8 * sum(len(zlib.compress(text, 9)) for text in texts) / size,
            "xz": 8 * sum(len(lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)) for text in texts) / size}
