"""The loss curve of a run under way, in a notebook: `with live_plot("runs/try"): neo.train.run(config, "runs/try")`.

The run keeps the main thread, so that interrupting the cell saves the step and stops as Ctrl-C does; a thread looks at
the metrics in the workdir and draws. Nothing else of neo needs IPython.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from neo.errors import InputError
from neo.extras import need
from neo.train.plot import loss_image
from neo.train.progress import count
from neo.train.workdir import read_records

SECONDS = 5.0   # ours: between two looks


@contextlib.contextmanager
def live_plot(workdir: str | Path, seconds: float = SECONDS, show: Callable[[bytes], Any] | None = None) -> Iterator[None]:
    """Show the loss curve of `workdir`, drawn anew while the block runs and once more when it ends, however it ends.

    Args:
        workdir: of a run that may not have begun yet.
        seconds: between two looks at its metrics; drawn only when there are new ones.
        show: what is given each PNG. Default: one place below the notebook's cell, replaced each time.

    Raises InputError outside of a notebook (no IPython) unless `show` is given, and for seconds <= 0.
    """
    if seconds <= 0:
        raise InputError(f"seconds={seconds}: more than 0 is needed")
    show = _cell() if show is None else show
    drawn, over = -1, threading.Event()

    def look() -> None:
        nonlocal drawn
        with contextlib.suppress(OSError):   # a mounted drive that does not answer for once must not end the plot
            records = read_records(workdir)
            if len(records) != drawn and (image := loss_image(records, _title(workdir, records))) is not None:
                drawn = len(records)
                show(image)

    def watch() -> None:
        while not over.wait(seconds):
            look()

    thread = threading.Thread(target=watch, name="neo-live-plot", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        look()


def _title(workdir: str | Path, records: list[dict[str, Any]]) -> str:
    if not records:
        return ""
    speed = next((f", {count(r['perf/tokens_per_s'])} tokens/s" for r in reversed(records) if "perf/tokens_per_s" in r), "")
    return f"{Path(workdir).name}: step {records[-1]['step']}, {count(records[-1]['tokens'])} tokens{speed}"


def _cell() -> Callable[[bytes], None]:
    """Shows images below the current cell, each in the place of the one before."""
    display = need("IPython", extra="notebook", why="a plot in a notebook").display
    place: Any = None

    def show(image: bytes) -> None:
        nonlocal place
        if place is None:
            place = display.display(display.Image(image), display_id=True)
        else:
            place.update(display.Image(image))
    return show
