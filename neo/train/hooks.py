"""Everything periodic: what is done with records, and with the state, every so many steps.

A hook sees each record (`record`), and acts on the state after the steps it asks for (`due`, `act`);
what `act` returns is recorded too. Hooks of higher floors are named here and imported when used.
"""

from __future__ import annotations

import datetime
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax

from neo.errors import InputError
from neo.train.event_file import EventFile
from neo.train.progress import Progress
from neo.train.workdir import JsonLines

if TYPE_CHECKING:
    from neo.train.session import Session

# Hooks that live above training, by name: "module:class", called with the session.
LAZY_HOOKS = {"sample": "neo.infer.hook:SampleHook"}


class Hook:
    """Does nothing; subclasses override what they need."""

    part = "other"   # goodput part that `act` counts as

    def due(self, step: int, last: bool) -> bool:
        """Whether `act` is wanted after `step` steps; `last`: the run stops here."""
        return False

    def act(self, step: int, state: Mapping[str, Any]) -> dict[str, float] | None:
        """Use the state after `step` steps. Every process calls it. Returned values are recorded."""
        return None

    def record(self, record: Mapping[str, Any]) -> None:
        """See a record. Process 0 only."""

    def close(self) -> None:
        """The run stops, for whatever reason."""


def every(interval: int, step: int, last: bool) -> bool:
    """The usual answer of `due`: at multiples of the interval, and at the end."""
    return last or (interval > 0 and step % interval == 0)


class MetricsFile(Hook):
    """metrics/<first step>.jsonl."""

    def __init__(self, session: Session):
        path = session.workdir.path / "metrics" / f"{session.start_step}.jsonl"
        self._file = JsonLines(path, keep=False)
        self._file.write({"start": datetime.datetime.now(datetime.UTC).isoformat(), "first_step": session.start_step})

    def record(self, record: Mapping[str, Any]) -> None:
        self._file.write(record)


class ProgressHook(Hook):
    """The live panel or plain lines."""

    def __init__(self, session: Session):
        note = "synthetic data" if session.config.data.synthetic else ""
        self._progress = Progress(session.log, session.stop_step, session.config.log.progress,
                                  f"neo {session.config.name}", note)

    def record(self, record: Mapping[str, Any]) -> None:
        self._progress.record(record)

    def close(self) -> None:
        self._progress.close()


class TensorBoard(Hook):
    """Scalars under tensorboard/, with the step as x axis."""

    def __init__(self, session: Session):
        # What a killed start wrote past its last checkpoint is computed again.
        purge = session.start_step + 1 if session.start_step else None
        self._file = EventFile(session.workdir.path / "tensorboard", purge)

    def record(self, record: Mapping[str, Any]) -> None:
        self._file.scalars(record["step"], {name: value for name, value in record.items() if "/" in name})

    def close(self) -> None:
        self._file.close()


class Wandb(Hook):
    """Weights & Biases; the run keeps its id over restarts."""

    def __init__(self, session: Session):
        try:
            import wandb
        except ImportError:
            raise InputError("config.log.wandb is set, but the package wandb is missing; "
                             "pip install -e '.[wandb]'") from None
        from neo.config import to_dict
        known = session.workdir.read_json("wandb.json") or {"id": wandb.util.generate_id()}
        session.workdir.write_json("wandb.json", known)
        self._run = wandb.init(project=session.config.log.wandb, id=known["id"], resume="allow",
                               name=session.workdir.path.name, config=to_dict(session.config))

    def record(self, record: Mapping[str, Any]) -> None:
        self._run.log({name: value for name, value in record.items() if "/" in name}, step=record["step"])

    def close(self) -> None:
        self._run.finish()


class Plot(Hook):
    """loss.png, drawn anew at every evaluation and at the end."""

    def __init__(self, session: Session):
        self._session = session

    def due(self, step: int, last: bool) -> bool:
        return every(self._session.config.eval.every_steps, step, last)

    def act(self, step: int, state: Mapping[str, Any]) -> None:
        self._stale = True

    def record(self, record: Mapping[str, Any]) -> None:
        # After the metrics file has the evaluation: hooks see a record in the order of `hooks_of`.
        if "eval/loss" in record:
            self._draw()

    def close(self) -> None:
        if self._session.steps_done > self._session.start_step:
            self._draw()

    def _draw(self) -> None:
        from neo.train.plot import draw_loss
        draw_loss(self._session.workdir.path)


class Checkpoint(Hook):
    """Saves the state; the step's own `ok` has been read before."""

    part = "checkpoint"

    def __init__(self, session: Session):
        self._session = session

    def due(self, step: int, last: bool) -> bool:
        config = self._session.config.checkpoint
        return every(config.every_steps, step, last) or every(config.permanent_every_steps, step, False)

    def act(self, step: int, state: Mapping[str, Any]) -> None:
        self._session.save(state)


def hooks_of(session: Session) -> list[Hook]:
    """The hooks of a run, in the order in which they act and see records."""
    config, primary = session.config, jax.process_index() == 0
    from neo.train.evaluation import Evaluation
    evaluation = Evaluation(session)
    hooks: list[Hook] = [evaluation]
    if config.data.reweight_steps:
        from neo.train.reweighting import Reweighting
        hooks.append(Reweighting(session, evaluation))   # before Checkpoint, which then holds what was decided
    if config.eval.sample_every_steps and session.tokenizer is not None:
        hooks.append(lazy_hook("sample", session))
    hooks.append(Checkpoint(session))
    if primary:
        hooks += [MetricsFile(session), ProgressHook(session)]
        if config.log.tensorboard:
            hooks.append(TensorBoard(session))
        if config.log.wandb:
            hooks.append(Wandb(session))
        if config.log.plot:
            hooks.append(Plot(session))
        if config.train.profile_steps:
            from neo.train.profile import Profile
            hooks.insert(0, Profile(session))   # a trace ends before the evaluation after its last step
    return hooks


def lazy_hook(name: str, session: Session) -> Hook:
    """A hook of a higher floor, by its name in LAZY_HOOKS."""
    module, _, attribute = LAZY_HOOKS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)(session)
