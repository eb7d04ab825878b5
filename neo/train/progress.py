"""What a person sees while a run starts and trains: stages with times, then a live panel or plain lines."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any, TextIO

HEARTBEAT_SECONDS = 10.0
SPARKS = "▁▂▃▄▅▆▇█"


class Log:
    """Plain lines to stderr and to the process's log file, stamped with seconds since start.

    The live panel takes over the screen through `echo`; the file, once there is one, gets every line.
    """

    def __init__(self, quiet: bool = False, started: float | None = None):
        self.started = time.monotonic() if started is None else started
        self._quiet = quiet
        self._file: TextIO | None = None
        self._early: list[str] = []   # lines from before the file
        self.echo: Any = None         # set by a live panel

    def attach(self, path: str) -> None:
        """Also write to this file, from the first line on; nothing is made on disk before a run is known to start."""
        self._file = open(path, "a")   # noqa: SIM115 - lives as long as the process
        self._file.writelines(line + "\n" for line in self._early)

    def __call__(self, text: str, *, file_only: bool = False) -> None:
        line = f"[{time.monotonic() - self.started:7.1f} s] {text}"
        if self._file is not None:
            try:
                self._file.write(line + "\n")
                self._file.flush()
            except OSError:
                # The log must not be what stops a run, nor hide what did (a full disk, told by who needs it).
                self._file = open(os.devnull, "w")   # noqa: SIM115
        else:
            self._early.append(line)
        if self._quiet or file_only:
            return
        if self.echo is not None:
            self.echo(line)
        else:
            print(line, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Announce a stage of the start-up and how long it took; says that it goes on every 10 s."""
        begun = time.monotonic()
        done = threading.Event()

        def heartbeat() -> None:
            while not done.wait(HEARTBEAT_SECONDS):
                self(f"{name} ... {time.monotonic() - begun:.0f} s")

        thread = threading.Thread(target=heartbeat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
        self(f"{name}: {time.monotonic() - begun:.1f} s")


def duration(seconds: float) -> str:
    """1:02:03, 4:05 or 12 s."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, s = divmod(seconds, 60)
    hours, m = divmod(minutes, 60)
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def count(number: float) -> str:
    """1.64M, 3.73T: three digits with a unit."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("K", 1e3)):
        if abs(number) >= 0.9995 * size:   # what rounds to 1000 of a unit is 1 of the next
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def sparkline(values: list[float], width: int = 40) -> str:
    """Values as a row of bars, newest right."""
    if not values:
        return ""
    size = max(1, -(-len(values) // width))
    means = [sum(values[i:i + size]) / len(values[i:i + size]) for i in range(0, len(values), size)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(SPARKS[int((value - low) / span * (len(SPARKS) - 1))] for value in means)


class Progress:
    """Shows records as they come: `live` keeps a panel on the terminal, `plain` prints a line per record."""

    def __init__(self, log: Log, total_steps: int, mode: str, title: str, note: str = ""):
        self._log, self._total, self._note = log, total_steps, note
        self._title = f"{title} ({note})" if note else title
        self._losses: deque[float] = deque(maxlen=2000)
        self._latest: dict[str, Any] = {}
        self._first: tuple[float, int] | None = None
        live = mode == "live" or (mode == "auto" and sys.stderr.isatty())
        self._plain = not live and mode != "off"
        self._live = self._open_panel() if live else None

    def record(self, record: Mapping[str, Any]) -> None:
        """Show a record of a step or an evaluation."""
        now, step = time.monotonic(), record["step"]
        self._first = self._first or (now, step)
        self._latest.update(record)
        if "train/loss" in record:
            self._losses.append(record["train/loss"])
        if self._live is not None:
            self._live.update(self._panel())
        elif self._plain:
            self._log(self._line(record))

    def close(self) -> None:
        """Leave the panel as it last was."""
        if self._live is not None:
            self._live.stop()
            self._log.echo = None

    def _eta(self) -> str:
        begun, first = self._first or (0.0, 0)
        done = self._latest.get("step", 0) - first
        if done <= 0:
            return ""
        left = (time.monotonic() - begun) / done * (self._total - self._latest["step"])
        return duration(left)

    def _line(self, record: Mapping[str, Any]) -> str:
        if "eval/loss" in record:
            return (f"step {record['step']}: held-out loss {record['eval/loss']:.4f}, "
                    f"{record['eval/bits_per_byte']:.4f} bits per byte")
        parts = [f"step {record['step']}/{self._total}", f"{count(record['tokens'])} tokens"]
        if "train/loss" in record:
            parts += [f"loss {record['train/loss']:.4f}", f"lr {record['optim/lr']:.2e}",
                      f"grad {record['optim/grad_norm']:.2f}"]
        if "perf/tokens_per_s" in record:
            parts.append(f"{count(record['perf/tokens_per_s'])} tok/s")
        if "perf/mfu" in record:
            parts.append(f"MFU {100 * record['perf/mfu']:.1f} % ({100 * record['perf/mfu_causal']:.1f} causal)")
        eta = self._eta()
        return "  ".join([*parts, *([f"{eta} left"] if eta else []), *([self._note] if self._note else [])])

    def _open_panel(self) -> Any:
        from rich.console import Console
        from rich.live import Live

        console = Console(stderr=True)
        live = Live(console=console, refresh_per_second=4, transient=False, redirect_stdout=False, redirect_stderr=False)
        live.start()
        self._log.echo = lambda line: console.print(line, markup=False, highlight=False)
        return live

    def _panel(self) -> Any:
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        latest, step = self._latest, self._latest.get("step", 0)
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", justify="right")
        grid.add_column()
        grid.add_row("step", f"{step} / {self._total}   {count(latest.get('tokens', 0))} tokens   {self._eta()} left")
        grid.add_row("", ProgressBar(total=self._total, completed=step, width=50))
        if "train/loss" in latest:
            grid.add_row("loss", f"{latest['train/loss']:.4f}   {sparkline(list(self._losses))}")
            rates = f"lr {latest['optim/lr']:.2e}   gradient norm {latest['optim/grad_norm']:.2f}"
            grid.add_row("update", rates)
        if "perf/tokens_per_s" in latest:
            speed = f"{count(latest['perf/tokens_per_s'])} tokens/s   {latest['perf/step_s']:.3g} s a step"
            if "perf/mfu" in latest:
                speed += f"   MFU {100 * latest['perf/mfu']:.1f} % ({100 * latest['perf/mfu_causal']:.1f} causal)"
            grid.add_row("speed", speed)
        if "eval/loss" in latest:
            grid.add_row("held out", f"loss {latest['eval/loss']:.4f}   {latest['eval/bits_per_byte']:.4f} bits per byte")
        return Panel(grid, title=self._title, border_style="blue", expand=False)
