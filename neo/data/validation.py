"""Held-out windows: the validation split in order, every token a target exactly once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from neo.config.schema import Config
from neo.data.windows import Window, assemble, read_window


class ValidationBatches:
    """The first `num_targets` tokens of a validation split as batches of equal shape; random access and iterable.

    The split is read as if one end-of-document token stood before it, so its first token is predicted too and

        bits per byte = (sum of the nats of all targets with loss_mask 1) / ln 2 / num_bytes

    is exact when the whole split is covered. Otherwise `num_bytes` (UTF-8) is that of the split times the share of
    its tokens that are scored (num_scored / all tokens): exact on average, as documents stand in random order.
    Prompts are not scored, nor the first token of each document with data.mask_end_of_document, and `num_bytes` leaves
    out their share. data.mask_repetition is for training only: what is scored would depend on what the text repeats.
    """

    def __init__(self, split: Any, source: int, eod_id: int, seq_len: int, batch_size: int, max_tokens: int,
                 cross_document_attention: bool, mask_end_of_document: bool) -> None:
        self._split, self._source, self._eod_id = split, source, eod_id
        self._seq_len, self._batch_size = seq_len, batch_size
        self._rules = {"cross_document_attention": cross_document_attention,
                       "mask_end_of_document": mask_end_of_document}
        total = split.num_tokens
        self.num_targets = min(total, max_tokens) if max_tokens > 0 else total
        self.num_scored = self.num_targets - _unscored(split, self.num_targets, mask_end_of_document)
        self.num_bytes = split.num_bytes * (self.num_scored / total) if total else 0.0

    def __len__(self) -> int:
        return -(-self.num_targets // (self._seq_len * self._batch_size))

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return (self.batch(number) for number in range(len(self)))

    def batch(self, number: int) -> dict[str, np.ndarray]:
        """Batch 0 <= number < len: arrays as `windows.assemble`; beyond the end, loss_mask is 0."""
        if not 0 <= number < len(self):
            raise IndexError(f"validation batch {number} of {len(self)}")
        first = number * self._batch_size
        windows = [self._window(k) for k in range(first, first + self._batch_size)]
        batch = assemble(windows, **self._rules)
        target = np.arange(first * self._seq_len, (first + self._batch_size) * self._seq_len)
        batch["loss_mask"][target.reshape(self._batch_size, self._seq_len) >= self.num_targets] = 0.0
        return batch

    def _window(self, k: int) -> Window:
        """Targets [k T, k T + T) and the token before them."""
        start = k * self._seq_len - 1  # -1 is the end-of-document token in front
        stop = min(start + self._seq_len + 1, self.num_targets)
        tokens = np.full(self._seq_len + 1, self._eod_id, np.int32)
        if stop <= max(start, 0):
            return Window(tokens, np.zeros(0, np.int64), self._source)
        read = read_window(self._split, max(start, 0), stop - max(start, 0) - 1, self._source)
        front = int(start < 0)
        tokens[front:front + len(read.tokens)] = read.tokens
        read = read._replace(tokens=tokens)
        if not front:
            return read
        first = np.ones(1, np.int64)  # a document begins after the token in front
        return read._replace(ends=np.concatenate([first, read.ends + 1]),
                             borders=None if read.borders is None else np.concatenate([first, read.borders + 1]),
                             masked=None if read.masked is None else read.masked + 1)


def _unscored(split: Any, num_targets: int, mask_end_of_document: bool) -> int:
    """How many of the first `num_targets` tokens of a split carry no loss."""
    if not num_targets:
        return 0
    if not getattr(split, "has_extras", False):
        return 1 + len(split.document_ends(0, num_targets)) if mask_end_of_document else 0
    begins, prompts, _ = split.extras(0, num_targets)
    return int(np.minimum(np.maximum(prompts, int(mask_end_of_document)), num_targets - begins).sum())


class ValidationData:
    """Held-out batches of each source. The same on every process."""

    def __init__(self, config: Config, sources: Mapping[str, Any]) -> None:
        self._data = config.data
        self._sources = dict(sources)
        self._numbers = {name: i for i, name in enumerate(config.sources)}
        self.names = tuple(name for name, source in sources.items() if source.split("validation").num_tokens)

    def batches(self, source: str, seq_len: int, batch_size: int, max_tokens: int) -> ValidationBatches:
        """The first `max_tokens` (0: all) validation tokens of a source; empty where it holds none out."""
        opened = self._sources[source]
        return ValidationBatches(opened.split("validation"), self._numbers[source], opened.eod_id, seq_len, batch_size,
                                 max_tokens, self._data.cross_document_attention, self._data.mask_end_of_document)
