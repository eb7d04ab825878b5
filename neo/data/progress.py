"""Progress on stderr: a bar on a terminal, a plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

PLAIN_SECONDS = 5.0  # ours: nothing should be silent for more than 10 s


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def amount(num_bytes: float) -> str:
    """Bytes for people, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "bytes" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


class Progress:
    """Shows how much of `total` bytes is done; use as a context manager and call `advance`."""

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done = label, max(total, 1), 0
        self._bar: Any = None
        self._task: Any = None
        self._start = self._last = time.monotonic()

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"), progress.BarColumn(), progress.DownloadColumn(),
                progress.TransferSpeedColumn(), progress.TimeRemainingColumn(), console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self.label, total=self.total)
        return self

    def advance(self, num_bytes: int) -> None:
        """`num_bytes` more are done."""
        self.done += num_bytes
        if self._bar:
            self._bar.update(self._task, completed=min(self.done, self.total))
            return
        now = time.monotonic()
        if now - self._last >= PLAIN_SECONDS:
            self._last = now
            share = min(self.done / self.total, 1.0)
            speed = self.done / max(now - self._start, 1e-9)
            left = (self.total - self.done) / speed if speed and self.done < self.total else 0
            say(f"{self.label}: {share:.0%} of {amount(self.total)}, {amount(speed)}/s, {left:.0f} s left")

    def __exit__(self, *error: Any) -> None:
        if self._bar:
            self._bar.stop()
        elif error[0] is None:
            say(f"{self.label}: {amount(self.done)} in {time.monotonic() - self._start:.1f} s")


class Waiting:
    """Shows that something without measurable progress goes on: a spinner, or a line every 10 seconds."""

    def __init__(self, label: str):
        self.label = label
        self._status: Any = None
        self._over = threading.Event()
        self._start = time.monotonic()

    def __enter__(self) -> Waiting:
        if sys.stderr.isatty():
            from rich.console import Console

            self._status = Console(stderr=True).status(self.label)
            self._status.start()
        else:
            say(self.label)
            threading.Thread(target=self._beat, daemon=True).start()
        return self

    def _beat(self) -> None:
        while not self._over.wait(10.0):
            say(f"{self.label}: {time.monotonic() - self._start:.0f} s")

    def __exit__(self, *error: Any) -> None:
        self._over.set()
        if self._status:
            self._status.stop()
        if error[0] is None:
            say(f"{self.label}: done in {time.monotonic() - self._start:.1f} s")
