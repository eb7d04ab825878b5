"""A trace of some steps, for TensorBoard's profiler or Perfetto: config.train.profile_steps.

    profile/plugins/profile/steps_10_12/<host>.xplane.pb      every operation on every device, with its times
                                        <host>.trace.json.gz  the same, shortened, for ui.perfetto.dev
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from etils import epath

from neo.train.hooks import Hook

if TYPE_CHECKING:
    from neo.train.session import Session

FOLDER = "profile"   # in the workdir; what `tensorboard --logdir` is given


class Profile(Hook):
    """Traces whole steps, the devices of process 0 alone: they are idle before the first and after the last one.

    A start that begins within the range traces what is left of it, without its own first step; one that begins behind it
    traces nothing. A trace that cannot be written is told in the log and stops nothing.
    """

    def __init__(self, session: Session):
        first, self._last = session.config.train.profile_steps
        self._first = max(first, session.start_step + 2)
        self._session = session
        self._scratch: tempfile.TemporaryDirectory[str] | None = None   # while tracing

    def due(self, step: int, last: bool) -> bool:
        if self._scratch is not None:
            return last or step >= self._last
        return step == self._first - 1 and step < self._last and not last

    def act(self, step: int, state: Mapping[str, Any]) -> None:
        jax.block_until_ready(state)
        if self._scratch is None:
            self._start()
        else:
            self._stop(step)

    def close(self) -> None:
        if self._scratch is not None:
            self._stop(self._session.steps_done)

    def _start(self) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0   # every Python call: ten times the size, and it slows the host down
        # On this disk first: the profiler writes local files only, and the workdir may be an object store.
        self._scratch = tempfile.TemporaryDirectory(prefix="neo_profile_")
        try:
            jax.profiler.start_trace(self._scratch.name, profiler_options=options)
        except RuntimeError as error:   # somebody else traces this process, from a notebook for example
            self._scratch.cleanup()
            self._scratch = None
            self._first = self._last + 1
            self._session.log(f"profile: not traced: {error}")

    def _stop(self, step: int) -> None:
        """End the trace after `step` and move it into the workdir."""
        session, scratch = self._session, self._scratch
        self._scratch = None
        name = f"steps_{self._first}_{step}"
        place = session.workdir.path / FOLDER / "plugins" / "profile" / name
        with scratch:
            try:
                jax.profiler.stop_trace()
                size = _copy(Path(scratch.name), place)
            except (OSError, RuntimeError) as error:
                session.log(f"profile: the trace of steps {self._first} to {step} was not written: {error}")
                return
        session.workdir.event("profile", step, first=self._first, path=str(place))
        session.log(f"profile: steps {self._first} to {step} in {place} ({size / 1e6:.1f} MB); "
                    f"tensorboard --logdir={session.workdir.path / FOLDER}, or the .json.gz in ui.perfetto.dev")


def _copy(trace: Path, place: epath.Path) -> int:
    """All files of a trace into one folder; returns their bytes."""
    files = [path for path in trace.rglob("*") if path.is_file()]
    if not files:
        raise OSError("the profiler wrote nothing")
    place.mkdir(parents=True, exist_ok=True)
    for path in files:
        (place / path.name).write_bytes(path.read_bytes())
    return sum(os.path.getsize(path) for path in files)
