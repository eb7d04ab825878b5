"""Random tokens with the interface of a token store, to burn in a machine without data.

Token i is a hash of (seed, source name, split, i): SplitMix64 run as a counter (Steele, Lea and Flood 2014, "Fast
splittable pseudorandom number generators"), so any window can be read at any time and is the same everywhere.
Documents are 1024 tokens long on average: each block of 1024 tokens holds the end of exactly one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from neo.data.permutation import derive_key
from neo.data.store import dtype_for

TOKENIZER_SHA256 = "synthetic"
BLOCK = 1024  # tokens per document on average (ours)
TRAIN_TOKENS = 1 << 62  # no run gets to a second epoch
VALIDATION_TOKENS = 1 << 20
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


def _mix(value: np.ndarray) -> np.ndarray:
    """SplitMix64's output function on uint64 (in place where it can)."""
    value ^= value >> np.uint64(30)
    value *= np.uint64(0xBF58476D1CE4E5B9)
    value ^= value >> np.uint64(27)
    value *= np.uint64(0x94D049BB133111EB)
    value ^= value >> np.uint64(31)
    return value


class SyntheticSplit:
    """Tokens 1 .. vocab_size-1 at random, and the end-of-document id 0 where a document ends."""

    def __init__(self, name: str, num_tokens: int, vocab_size: int, eod_id: int, key: bytes) -> None:
        if num_tokens % BLOCK:
            raise ValueError(f"num_tokens must be a multiple of {BLOCK}, got {num_tokens}")
        self.name = name
        self.num_tokens = num_tokens
        self.num_documents = num_tokens // BLOCK
        self.num_bytes = 4 * num_tokens  # as if a token stood for 4 bytes; nothing can be learnt from it
        self._vocab_size, self._eod_id = vocab_size, eod_id
        self._token_key = np.uint64(int.from_bytes(key[:8], "little"))
        self._end_key = np.uint64(int.from_bytes(key[8:16], "little"))

    def _ends(self, first_block: int, last_block: int) -> np.ndarray:
        """Exclusive end of the document that ends in each block [first, last): int64; the last block's is its end."""
        blocks = np.arange(first_block, last_block, dtype=np.uint64)
        place = _mix(blocks * _GAMMA + self._end_key) % np.uint64(BLOCK)
        ends = blocks.astype(np.int64) * BLOCK + place.astype(np.int64) + 1
        if last_block == self.num_documents and len(ends):
            ends[-1] = self.num_tokens
        return ends

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """int32 [stop - start]. Raises IndexError outside the split."""
        self._check(start, stop)
        value = np.arange(start, stop, dtype=np.uint64)
        value *= _GAMMA
        value += self._token_key
        # High bits times the range, shifted back: as uniform as a remainder, and no 64-bit division.
        value = ((_mix(value) >> np.uint64(32)) * np.uint64(self._vocab_size - 1)) >> np.uint64(32)
        tokens = value.astype(np.int32)
        tokens += tokens >= self._eod_id
        tokens[self._ends_in(start, stop + 1) - 1 - start] = self._eod_id
        return tokens

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """Sorted positions e, start < e < stop, where a document ends and the next begins. int64."""
        self._check(start, stop)
        return self._ends_in(start, stop)

    def _ends_in(self, start: int, stop: int) -> np.ndarray:
        ends = self._ends(start // BLOCK, min(stop // BLOCK + 1, self.num_documents))
        return ends[(ends > start) & (ends < stop)]

    def document_ids(self, start: int, stop: int) -> list[str]:
        """Ids of the documents that have a token in [start, stop), in order."""
        self._check(start, stop)
        if start == stop:
            return []
        first, last = start // BLOCK, (stop - 1) // BLOCK
        first += int(self._ends(first, first + 1)[0] <= start)
        last += int(self._ends(last, last + 1)[0] <= stop - 1)
        return [f"{self.name}-{number}" for number in range(first, last + 1)]

    def documents(self, start: int, stop: int) -> list[tuple[int, int, str]]:
        """(first position, end, id) of the documents that have a token in [start, stop), in order."""
        names = self.document_ids(start, stop)
        return [(*self._span(int(name.rsplit("-", 1)[1])), name) for name in names]

    def find_id(self, name: str) -> list[tuple[int, int]]:
        """Positions [first, end) of the document with this id, if there is one."""
        split, _, number = name.rpartition("-")
        if split != self.name or not (number.isdecimal() and number.isascii()) or str(int(number)) != number:
            return []
        return [self._span(int(number))] if int(number) < self.num_documents else []

    def _span(self, number: int) -> tuple[int, int]:
        ends = self._ends(max(number - 1, 0), number + 1).tolist()
        return (ends[-2] if number else 0), ends[-1]

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"positions [{start}, {stop}) are outside the {self.num_tokens} synthetic tokens")


@dataclasses.dataclass(frozen=True)
class SyntheticSource:
    """Stands for `neo.data.store.Source`."""

    name: str
    vocab_size: int
    splits: Mapping[str, SyntheticSplit]
    eod_id: int = 0
    path: str = "synthetic"
    layout: str = "synthetic"
    tokenizer_sha256: str = TOKENIZER_SHA256
    packing: None = None
    alignment: int = 1
    prepare: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def dtype(self) -> str:
        return dtype_for(self.vocab_size)

    def split(self, name: str) -> SyntheticSplit:
        """The split called train or validation."""
        return self.splits[name]


def synthetic_source(name: str, *, vocab_size: int, seed: int) -> SyntheticSource:
    """A source of random tokens below `vocab_size` (at least 2)."""
    if vocab_size < 2:
        raise ValueError(f"a synthetic source needs a vocabulary of at least 2, got {vocab_size}")
    sizes = {"train": TRAIN_TOKENS, "validation": VALIDATION_TOKENS}
    return SyntheticSource(name, vocab_size, {
        split: SyntheticSplit(split, size, vocab_size, 0, derive_key("synthetic", seed, name, split))
        for split, size in sizes.items()})
