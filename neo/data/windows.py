"""Windows of T+1 tokens -> rows a model can train on: inputs, targets, segments, positions, loss mask.

All but the repetition filter is index arithmetic on the document index; no token is compared with anything. Whole
batches are made by a few numpy calls, because at T = 2048 a row has some 10 microseconds of Python to spend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from neo.data.repetition import repetitive


class Window(NamedTuple):
    """What is read for one row: `tokens` int32 [T+1]; `ends` int64 [n], places 0 < e <= T where a document begins.

    `borders` int64 [k], those of them where also a segment begins; None: all. `masked` int64 [m, 2], places
    [first, last) of tokens that are never targets in the loss (0 <= first < last <= T+1, in order); None: none.
    """

    tokens: np.ndarray
    ends: np.ndarray
    source: int
    borders: np.ndarray | None = None
    masked: np.ndarray | None = None


def read_window(split: Any, start: int, length: int, source: int) -> Window:
    """Tokens [start, start + length + 1) of a split and what its index says of them; `source` goes into the rows.

    Raises IndexError outside the split.
    """
    stop = start + length + 1
    if not getattr(split, "has_extras", False):
        return Window(split.tokens(start, stop), split.document_ends(start, stop) - start, source)
    begins, prompts, joined = split.extras(start, stop)
    begins -= start
    after = int(begins[0] <= 0)  # the first document may begin before the window
    ends = begins[after:]
    borders = ends[~joined[after:]]
    masked = np.stack([np.maximum(begins, 0), np.minimum(begins + prompts, length + 1)], axis=1)
    return Window(split.tokens(start, stop), ends, source, borders, masked[masked[:, 1] > masked[:, 0]])


def assemble(windows: Sequence[Window], *, cross_document_attention: bool,
             mask_end_of_document: bool, mask_repetition: bool = False) -> dict[str, np.ndarray]:
    """Rows of equal length T -> one batch of N rows.

    inputs, targets, segment_ids, positions: int32 [N, T]; loss_mask: float32 [N, T]; source: int32 [N].
    targets[:, t] is the token after inputs[:, t]. Segments count from 1 and positions from 0 at each document, also
    at the one that a window cuts in two; with `cross_document_attention` a row is one segment at positions 0..T-1,
    and documents joined in the store share one in any case. `mask_end_of_document` gives weight 0 where the input is
    the last token of a document, so the target the first of another; `mask_repetition` gives weight 0 to whole rows
    whose inputs repeat themselves (repetition.py; tokens that are masked anyway do not count, so padding does not).
    The arrays are fresh, except that inputs and targets may be views of one [N, T+1] array.
    """
    tokens = np.stack([window.tokens for window in windows])
    n, t = tokens.shape[0], tokens.shape[1] - 1
    counts = [len(window.ends) for window in windows]
    ends = np.concatenate([window.ends for window in windows])
    rows = np.repeat(np.arange(n, dtype=np.int64), counts)
    loss_mask = np.ones((n, t), np.float32)
    if mask_end_of_document:
        loss_mask[rows, ends - 1] = 0.0
    masked = [(row, *interval) for row, window in enumerate(windows) if window.masked is not None
              for interval in window.masked.tolist()]
    for row, first, last in masked:
        loss_mask[row, max(first - 1, 0):last - 1] = 0.0
    if mask_repetition:
        inputs = tokens[:, :-1]
        if masked:
            inputs = inputs.copy()
            for row, first, last in masked:
                inputs[row, first:last] = -1 - np.arange(first, min(last, t))  # equal to no other
        loss_mask[repetitive(inputs)] = 0.0
    place = np.arange(t, dtype=np.int32)
    if cross_document_attention:
        segment_ids = np.ones((n, t), np.int32)
        positions = np.empty((n, t), np.int32)
        positions[:] = place
    else:
        if any(window.borders is not None for window in windows):
            borders = [window.ends if window.borders is None else window.borders for window in windows]
            rows, ends = np.repeat(np.arange(n, dtype=np.int64), [len(b) for b in borders]), np.concatenate(borders)
        segment_ids, positions = _segments(rows, ends, n, t, place)
    return {"inputs": tokens[:, :-1], "targets": tokens[:, 1:], "segment_ids": segment_ids, "positions": positions,
            "loss_mask": loss_mask, "source": np.array([window.source for window in windows], np.int32)}


def _segments(rows: np.ndarray, ends: np.ndarray, n: int, t: int, place: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Segment ids and positions, both int32 [n, t], by repeating one number per segment."""
    inside = ends < t  # a document that begins at t is only ever a target
    rows, ends = rows[inside], ends[inside]
    first = np.concatenate([np.arange(n, dtype=np.int64) * t, rows * t + ends])  # of each segment, in the flat batch
    row_of = np.concatenate([np.arange(n, dtype=np.int64), rows])
    by_place = np.argsort(first, kind="stable")
    first, row_of = first[by_place], row_of[by_place]
    lengths = np.diff(first, append=n * t)
    row_begins = np.searchsorted(first, np.arange(n, dtype=np.int64) * t)
    number = (np.arange(len(first)) - row_begins[row_of] + 1).astype(np.int32)
    segment_ids = np.repeat(number, lengths).reshape(n, t)
    positions = np.repeat((row_of * t - first).astype(np.int32), lengths).reshape(n, t)
    positions += place
    return segment_ids, positions


def split_rows(batch: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """A batch as a list of rows."""
    return [{name: value[i] for name, value in batch.items()} for i in range(len(batch["source"]))]
