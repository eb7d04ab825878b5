"""Arrays on their way between two layouts: put in order quickly, and read ahead of the one that writes."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np

THREADS = min(4, os.cpu_count() or 1)
_COLUMNS = 32   # measured: a transposed matrix is copied 3 times as fast by 32 columns as at once
_SMALL = 1 << 20

Job, Made = TypeVar("Job"), TypeVar("Made")


def contiguous(array: np.ndarray, dtype: np.dtype | type | None = None) -> np.ndarray:
    """The array in C order and, if asked for, of another type; itself when it is so already. Large ones on a few threads."""
    dtype = array.dtype if dtype is None else np.dtype(dtype)
    if array.flags.c_contiguous and array.dtype == dtype:
        return array
    if not array.ndim or array.nbytes < _SMALL:
        return np.ascontiguousarray(array, dtype).reshape(array.shape)
    out = np.empty(array.shape, dtype)
    axis = 0 if _rows_lie_together(array) and array.shape[0] > 1 else array.ndim - 1
    width = -(-array.shape[axis] // THREADS)
    width = -(-width // _COLUMNS) * _COLUMNS if axis else width

    def copy(start: int) -> None:
        at = (slice(None),) * axis + (slice(start, start + width),)
        _copy(array[at], out[at])
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(copy, range(0, array.shape[axis], width)))
    return out


def in_order(array: np.ndarray) -> np.ndarray:
    """The array in C order, itself when it is so already; on this thread alone."""
    if array.flags.c_contiguous:
        return array
    out = np.empty(array.shape, array.dtype)
    _copy(array, out)
    return out


def ahead(make: Callable[[Job], Made], jobs: Iterable[Job], depth: int = 1) -> Iterator[tuple[Job, Made]]:
    """(job, make(job)) in order, while another thread makes the next ones: reading and writing at the same time.

    Args:
        depth: how many results may wait; with the one being made, `depth + 1` are held beside the caller's.
    """
    with ThreadPoolExecutor(1) as pool:
        waiting: deque[tuple[Job, Future[Made]]] = deque()
        try:
            for job in jobs:
                waiting.append((job, pool.submit(make, job)))
                if len(waiting) > depth:
                    job, future = waiting.popleft()
                    yield job, future.result()
            while waiting:
                job, future = waiting.popleft()
                yield job, future.result()
        finally:   # the caller stopped early: do not make what nobody takes
            for _, future in waiting:
                future.cancel()


def _rows_lie_together(array: np.ndarray) -> bool:
    return abs(array.strides[-1]) == array.itemsize


def _copy(array: np.ndarray, out: np.ndarray) -> None:
    if not array.ndim or _rows_lie_together(array):
        out[...] = array
        return
    for start in range(0, array.shape[-1], _COLUMNS):
        out[..., start:start + _COLUMNS] = array[..., start:start + _COLUMNS]
