"""Making the next values in a background thread while the caller works on the present one."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")
POLL_SECONDS = 0.2  # how soon a thread that waits notices that it should stop
CLOSE_SECONDS = 5.0  # how long close waits for a value that is being made


class Prefetch(Generic[T], Iterator[tuple[int, T]]):
    """Iterator over (i, make(i)) for start <= i < stop, made in order, at most `depth` of them ahead.

    An exception in `make` is raised here, after the values before it. `close` (or leaving a `with`) stops the
    thread and never hangs, even while `make` does. depth 0 makes each value when it is asked for.
    """

    def __init__(self, make: Callable[[int], T], start: int, stop: int, depth: int) -> None:
        self._make, self._next, self._stop_at = make, start, stop
        self._stopping = threading.Event()
        self._queue: queue.Queue = queue.Queue(max(depth, 1))
        self._thread: threading.Thread | None = None
        if depth > 0 and start < stop:
            # The thread must not know this object, or it would never be collected and closed.
            self._thread = threading.Thread(target=_work, args=(make, start, stop, self._queue, self._stopping),
                                            name="neo-prefetch", daemon=True)
            self._thread.start()

    def __iter__(self) -> Prefetch[T]:
        return self

    def __next__(self) -> tuple[int, T]:
        if self._stopping.is_set() or self._next >= self._stop_at:
            raise StopIteration
        index = self._next
        if self._thread is None:
            value = self._make(index)
        else:
            value, error = self._get()
            if error is not None:
                self.close()
                if isinstance(error, StopIteration):  # would look like a normal end
                    raise RuntimeError(f"making value {index} raised StopIteration") from error
                raise error
        self._next += 1
        return index, value

    def _get(self) -> tuple[T, BaseException | None]:
        while True:
            try:
                return self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self._stopping.is_set():
                    raise StopIteration from None

    def close(self) -> None:
        """Stop; no further value comes. Safe to call twice and from any thread."""
        self._stopping.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(CLOSE_SECONDS)

    def __enter__(self) -> Prefetch[T]:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self._stopping.set()


def _work(make: Callable[[int], T], start: int, stop: int, out: queue.Queue, stopping: threading.Event) -> None:
    for index in range(start, stop):
        try:
            item = (make(index), None)
        except BaseException as error:  # whatever it is, the consumer must see it
            item = (None, error)
        while not stopping.is_set():
            try:
                out.put(item, timeout=POLL_SECONDS)
                break
            except queue.Full:
                continue
        if stopping.is_set() or item[1] is not None:
            return


def prefetch(make: Callable[[int], T], start: int, stop: int, depth: int) -> Prefetch[T]:
    """(i, make(i)) for start <= i < stop, `depth` of them made ahead by a thread; see `Prefetch`."""
    return Prefetch(make, start, stop, depth)
