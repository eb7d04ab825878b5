"""Saving and restoring the training state with Orbax, asynchronously."""

from __future__ import annotations

import contextlib
import errno
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from orbax.checkpoint import v1 as ocp

from neo.config import Config, to_dict
from neo.errors import InputError, StoppedForPerson
from neo.train.checkpoint_format import CHECKPOINT_VERSION, Checkpoint, JsonFiles, absolute, checkpoints_in

_StorageOptions = ocp.options.ArrayOptions.Saving.StorageOptions
_NO_SPACE = ("no space left", "enospc", "disk quota", "resource_exhausted", "errno 28", "file too large")


class Checkpoints:
    """The checkpoints of one workdir.

    Args:
        workdir: local or remote folder; checkpoints go to its `checkpoints/`.
        keep_last: newest checkpoints kept.
        permanent_every_steps: steps whose checkpoints are never removed; 0 = none.
    """

    def __init__(self, workdir: str | epath.Path, keep_last: int, permanent_every_steps: int = 0):
        self.workdir = epath.Path(workdir)
        policies = ocp.training.preservation_policies
        keep = [policies.LatestN(keep_last)]
        if permanent_every_steps:
            keep.append(policies.EveryNSteps(permanent_every_steps))
        quiet_orbax()
        with _disk_errors(self.workdir):
            self._checkpointer = ocp.training.Checkpointer(
                absolute(self.workdir / "checkpoints"), context=_context(), cleanup_tmp_directories=True,
                preservation_policy=policies.AnyPreservationPolicy(keep))
        self._last_step = self._checkpointer.latest.step if self._checkpointer.latest else None

    @property
    def latest_step(self) -> int | None:
        """Step of the newest checkpoint that was asked for; None when there is none."""
        return self._last_step

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint."""
        found = checkpoints_in(self.workdir)
        return found[-1] if found else None

    def save(self, state: Mapping[str, Any], data: Mapping[str, Any], config: Config,
             tokenizer_files: Mapping[str, bytes]) -> None:
        """Start writing a checkpoint; returns when the arrays have left the devices.

        Args:
            state: {"params", "opt", "step"}; the step that data["step"] repeats.
            data: see checkpoint_format; "version" is added.

        Raises StoppedForPerson when the disk is full, also for the save before this one.
        """
        step, primary = int(data["step"]), jax.process_index() == 0
        if step == self._last_step:
            return
        items: dict[str, Any] = {
            "params": state["params"], "opt": state["opt"],
            "data": JsonFiles.of("data.json", {"version": CHECKPOINT_VERSION, **data}, primary),
            "config": JsonFiles.of("config.json", to_dict(config), primary),
        }
        if tokenizer_files:
            items["tokenizer"] = JsonFiles(tokenizer_files, primary)
        with _disk_errors(self.workdir):
            self._checkpointer.save_checkpointables_async(step, items, force=True)
        self._last_step = step

    def wait(self) -> None:
        """Return when everything asked for is on disk. Raises StoppedForPerson when the disk is full."""
        with _disk_errors(self.workdir):
            self._checkpointer.wait()

    def close(self) -> None:
        """Wait and release threads."""
        with _disk_errors(self.workdir):
            self._checkpointer.close()


def restore(checkpoint: Checkpoint, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Read arrays of a checkpoint into the shapes, dtypes and shardings of `abstract`.

    Args:
        abstract: {"params": tree} and, for training, {"opt": tree}, of jax.ShapeDtypeStruct.

    Raises InputError naming the first array that is missing, extra or of another shape, before anything
    is loaded; and when a file is damaged, naming the checkpoint and how to go on without it.
    """
    quiet_orbax()
    names = [name for name in ("params", "opt") if name in abstract]
    for name in names:
        if not (checkpoint.path / name).exists():
            raise InputError(f"checkpoint {checkpoint.path} has no {name}/: it was saved with weights only")
    try:
        metadata = ocp.checkpointables_metadata(absolute(checkpoint.path)).metadata
    except Exception as error:
        raise _damaged(checkpoint, error) from None
    for name in names:
        _compare(checkpoint, name, metadata.get(name), abstract[name])
    try:
        loaded = ocp.load_checkpointables(absolute(checkpoint.path), {name: abstract[name] for name in names})
    except Exception as error:
        raise _damaged(checkpoint, error) from None
    return {name: loaded[name] for name in names}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dict -> {"layers/attention/query": leaf}."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        path = f"{prefix}/{name}" if prefix else str(name)
        flat |= flatten(value, path) if isinstance(value, Mapping) else {path: value}
    return flat


def _compare(checkpoint: Checkpoint, name: str, found: Any, wanted: Any) -> None:
    if found is None:
        raise _damaged(checkpoint, f"{name}/ has no readable metadata")
    found, wanted = flatten(found), flatten(wanted)
    for path in wanted:
        if path not in found:
            raise InputError(f"checkpoint {checkpoint.path}: {name}/{path} is missing; the model of this config has it")
        if tuple(found[path].shape) != tuple(wanted[path].shape):
            raise InputError(f"checkpoint {checkpoint.path}: {name}/{path} has shape {tuple(found[path].shape)}, "
                             f"the model of this config needs {tuple(wanted[path].shape)}")
    for path in found:
        if path not in wanted:
            raise InputError(f"checkpoint {checkpoint.path} holds {name}/{path}, which the model of this config has not")


def _damaged(checkpoint: Checkpoint, error: Exception | str) -> InputError:
    reason = str(error).strip().splitlines()[0][:160] if str(error).strip() else type(error).__name__
    return InputError(f"checkpoint {checkpoint.path} cannot be read, a file is damaged or missing ({reason}); "
                      f"move the folder {checkpoint.path.name} away to go on from the checkpoint before it")


def _context() -> ocp.Context:
    def one_layer_a_chunk(path: Any, value: Any) -> Any:
        names = [getattr(key, "key", None) for key in path]
        if "layers" not in names or not getattr(value, "ndim", 0):
            return None
        # The chunk is cut from what one device holds, hence the local shape.
        local = value.sharding.shard_shape(value.shape) if hasattr(value, "sharding") else value.shape
        layer_bytes = int(np.prod(local, dtype=np.int64)) // local[0] * np.dtype(value.dtype).itemsize
        return _StorageOptions(chunk_byte_size=max(layer_bytes, 1), shard_axes=(0,))

    saving = ocp.options.ArrayOptions.Saving(scoped_storage_options_creator=one_layer_a_chunk)
    return ocp.Context(array_options=ocp.options.ArrayOptions(saving=saving))


@contextlib.contextmanager
def _disk_errors(workdir: epath.Path) -> Iterator[None]:
    """Bytes are written by C++ threads; a full disk comes back as text inside whatever Orbax raises."""
    try:
        yield
    except Exception as error:
        if is_disk_full(error):
            raise disk_full(workdir, "the checkpoint was not written") from None
        if isinstance(error, PermissionError | NotADirectoryError) or getattr(error, "errno", None) == errno.EROFS:
            raise InputError(f"workdir {workdir} cannot be written: {error}; give another --workdir") from None
        raise


def is_disk_full(error: Exception) -> bool:
    """Whether what a write raised, or the cause of it, is a full disk."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return full or any(word in _chain(error).lower() for word in _NO_SPACE)


def disk_full(workdir: epath.Path, what: str) -> StoppedForPerson:
    """The error for a full disk: what was not written, what is kept, and the cure."""
    found = checkpoints_in(workdir)
    last = f"the last good checkpoint is {found[-1].path}" if found else "no checkpoint was written yet"
    return StoppedForPerson(f"the disk of {workdir} is full, {what}; {last}; free space and start the same command again")


def _chain(error: BaseException | None) -> str:
    texts = []
    while error is not None:
        texts.append(f"{error} {getattr(error, 'exceptions', '')}")
        error = error.__cause__ or error.__context__
    return "\n".join(texts)


def quiet_orbax() -> None:
    """Keep Orbax's lines for its developers from the terminal."""
    # Its lines are for its developers: a full disk is a thousand of them. Failures reach the user as exceptions.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    # Writers that had not begun when another one failed are dropped, which Python remarks on when it ends.
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited", category=RuntimeWarning)
    if sys.unraisablehook is not _without_late_writers:
        global _unraisable
        _unraisable, sys.unraisablehook = sys.unraisablehook, _without_late_writers


_unraisable: Any = sys.__unraisablehook__


def _without_late_writers(unraisable: Any) -> None:
    # Once one array has failed, Orbax closes its event loop; writers that end later find it closed, from C++ threads.
    if isinstance(unraisable.exc_value, RuntimeError) and "loop is closed" in str(unraisable.exc_value):
        return
    _unraisable(unraisable)
