"""The training loop: dispatch step n, then read the metrics of step n-1; everything periodic is a hook."""

from __future__ import annotations

import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax

from neo.config.schema import PhaseConfig
from neo.data.loader import prefetch
from neo.errors import RestartSafe, StoppedForPerson
from neo.parallel.distributed import agreement
from neo.train import schedule
from neo.train.hooks import Hook
from neo.train.metrics import stamp, step_values
from neo.train.session import Session, utilisation

SAME_CTRL_C_SECONDS = 1.0   # ours: srun sends one to all processes of a task, and the one that watches passes it on
NAMED_DOCUMENTS = 8   # document ids in a NaN message; all of them go to events.jsonl


class StopSignals:
    """Turns SIGTERM and Ctrl-C into a wish to stop after the current step; a second Ctrl-C leaves at once."""

    def __init__(self) -> None:
        self.name = ""
        self._before: dict[int, Any] = {}
        self._interrupted: float | None = None   # when, by the first Ctrl-C

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, _: Any) -> None:
        if number == signal.SIGINT:
            if self._interrupted is None:
                self._interrupted = time.monotonic()
            elif time.monotonic() - self._interrupted > SAME_CTRL_C_SECONDS:
                raise KeyboardInterrupt
        self.name = signal.Signals(number).name


@dataclasses.dataclass(frozen=True)
class Pending:
    """A dispatched step whose metrics have not been read."""

    step: int                  # 0-based
    phase: PhaseConfig
    tokens: int                # target tokens of the step
    values: Mapping[str, Any]  # on device


class Recorder:
    """Reads the metrics of finished steps, checks them, and hands records to the hooks."""

    def __init__(self, session: Session, hooks: list[Hook]):
        self._session, self._hooks = session, hooks
        self._since = time.monotonic()
        self._tokens = self._steps = 0
        self._away = 0.0   # seconds since the last record in which no step ran

    def settle(self, pending: Pending) -> None:
        """Wait for a step. Raises StoppedForPerson when its loss or gradient was not finite."""
        session, values = self._session, jax.device_get(pending.values)
        if not values["ok"]:
            self._not_finite(pending, values)
        done = pending.step + 1
        self._steps += 1
        self._tokens += pending.tokens
        if done % session.config.log.every_steps == 0 or done == session.stop_step:
            self.emit(done, self._step_record(pending, values))

    def pause(self, seconds: float) -> None:
        """`seconds` went by in evaluation or saving: not the steps' fault."""
        self._away += seconds

    def emit(self, steps: int, values: Mapping[str, float]) -> None:
        """Complete a record and show it to every hook."""
        session = self._session
        tokens = schedule.tokens_after(session.config, steps)
        record = {**stamp(steps, tokens, session.phase_after(steps).name), **values}
        if jax.process_index() == 0:
            for hook in self._hooks:
                hook.record(record)

    def _step_record(self, pending: Pending, values: Mapping[str, Any]) -> dict[str, float]:
        session = self._session
        now = time.monotonic()
        seconds = max(now - self._since - self._away, 1e-9)
        speed = self._tokens / seconds
        record = step_values(values, session.data.order.sources)
        record["optim/lr"] = schedule.learning_rate(session.config, pending.step)
        record |= {"perf/tokens_per_s": speed, "perf/tokens_per_s_per_device": speed / session.mesh.devices.size,
                   "perf/step_s": seconds / self._steps, **utilisation(session, pending.phase, speed),
                   **session.clock.shares()}
        self._since, self._tokens, self._steps, self._away = now, 0, 0, 0.0
        return record

    def _not_finite(self, pending: Pending, values: Mapping[str, Any]) -> None:
        session, step = self._session, pending.step
        what = "loss" if not math.isfinite(values["loss"]) else "gradient norm"
        value = values["loss"] if what == "loss" else values["grad_norm"]
        documents = session.data.documents(step)
        if jax.process_index() == 0:
            session.workdir.event("not_finite", step + 1, what=what, value=str(float(value)), documents=documents)
        session.checkpoints.wait()
        last = session.checkpoints.latest()
        named = ", ".join(documents[:NAMED_DOCUMENTS]) + (f" and {len(documents) - NAMED_DOCUMENTS} more (events.jsonl)"
                                                          if len(documents) > NAMED_DOCUMENTS else "")
        kept = f"the last good checkpoint is {last.path}" if last else "there is no checkpoint yet"
        raise StoppedForPerson(f"{what} is {float(value)} at step {step + 1}; the parameters were kept as they were before "
                               f"it and {kept}; documents of its batch: {named}; their text: python -m neo.data.trace "
                               f"{session.workdir.path} --step={step + 1}")


def train(session: Session, hooks: list[Hook]) -> None:
    """Run from `steps_done` to `stop_step`. The state is saved whatever stops the loop but an error.

    Raises RestartSafe after SIGTERM, KeyboardInterrupt after Ctrl-C, StoppedForPerson for values that are
    not finite or a full disk.
    """
    config, clock, recorder = session.config, session.clock, Recorder(session, hooks)
    pending: Pending | None = None
    batches = prefetch(lambda step: session.data.batch(step, session.batch_sharding), session.steps_done,
                       session.stop_step, config.data.prefetch)
    agreed = agreement(config.log.every_steps)
    with StopSignals() as signals, batches:
        def keep() -> None:
            if pending is not None:
                recorder.settle(pending)
            # Saving takes all processes, and the others may have read their rows: there the last checkpoint has to do.
            if session.steps_done > session.start_step and jax.process_count() == 1:
                session.save(session.state)
                session.checkpoints.wait()

        for step, batch in _until_unreadable(batches, keep):
            clock.lap("data")
            at = schedule.place(config, step)
            phase = config.phases[at.phase]
            run_step = session.step_for(phase, at.global_batch)
            recorder.pause(clock.lap("startup"))   # a later phase's step is compiled when it begins
            stopping = agreed.begin(step + 1)
            if stopping:
                if pending is not None:
                    recorder.settle(pending)
                _stop(session, stopping)
            with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):   # a trace is cut into steps by it
                session.state, values = run_step(session.state, batch, *session.rates(step))
            if pending is not None:
                recorder.settle(pending)
            pending = Pending(step, phase, at.tokens, values)
            done = session.steps_done = step + 1
            stopping = agreed.stop(done, signals.name)
            acting = [hook for hook in hooks if hook.due(done, done == session.stop_step)]
            if acting or stopping or done == session.stop_step:
                recorder.settle(pending)
                pending = None
            clock.lap("step")
            for hook in acting:
                values = hook.act(done, session.state)
                recorder.pause(clock.lap(hook.part))
                if values:
                    recorder.emit(done, values)
            if stopping and done < session.stop_step:
                _stop(session, stopping)


def _until_unreadable(batches: Iterable[tuple[int, Any]], keep: Callable[[], None]) -> Iterator[tuple[int, Any]]:
    """`batches`; where a store stops answering, what was learnt before is kept."""
    try:
        yield from batches
    except RestartSafe:
        keep()
        raise


def _stop(session: Session, name: str) -> None:
    with session.log.stage(f"{name}: saving step {session.steps_done}"):
        session.save(session.state)
        session.checkpoints.wait()
    if jax.process_index() == 0:
        session.workdir.event("stop", session.steps_done, reason=name)
    text = f"stopped by {name} at step {session.steps_done}, saved; the same command goes on from there"
    if name.startswith("SIGINT"):
        raise KeyboardInterrupt(text)
    raise RestartSafe(text)
