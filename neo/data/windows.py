"""Windows of T+1 tokens -> rows a model can train on: inputs, targets, segments, positions, loss mask.

All of it is index arithmetic on the document index; no token is compared with anything. Whole batches are made by a
few numpy calls, because at T = 2048 a row has some 10 microseconds of Python to spend.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Window(NamedTuple):
    """What is read for one row: `tokens` int32 [T+1]; `ends` int64 [n], places 0 < e <= T where a document begins."""

    tokens: np.ndarray
    ends: np.ndarray
    source: int


def assemble(windows: Sequence[Window], *, cross_document_attention: bool,
             mask_end_of_document: bool) -> dict[str, np.ndarray]:
    """Rows of equal length T -> one batch of N rows.

    inputs, targets, segment_ids, positions: int32 [N, T]; loss_mask: float32 [N, T]; source: int32 [N].
    targets[:, t] is the token after inputs[:, t]. Segments count from 1 and positions from 0 at each document, also
    at the one that a window cuts in two; with `cross_document_attention` a row is one segment at positions 0..T-1.
    `mask_end_of_document` gives weight 0 where the input is the last token of a document, so the target the first
    of another. The arrays are fresh, except that inputs and targets may be views of one [N, T+1] array.
    """
    tokens = np.stack([window.tokens for window in windows])
    n, t = tokens.shape[0], tokens.shape[1] - 1
    counts = [len(window.ends) for window in windows]
    ends = np.concatenate([window.ends for window in windows])
    rows = np.repeat(np.arange(n, dtype=np.int64), counts)
    loss_mask = np.ones((n, t), np.float32)
    if mask_end_of_document:
        loss_mask[rows, ends - 1] = 0.0
    place = np.arange(t, dtype=np.int32)
    if cross_document_attention:
        segment_ids = np.ones((n, t), np.int32)
        positions = np.empty((n, t), np.int32)
        positions[:] = place
    else:
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
