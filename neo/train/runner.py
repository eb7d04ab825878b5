"""A whole run, from a config to a result: start, resume, finish, or say why not."""

from __future__ import annotations

import contextlib
import datetime
import errno
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from neo.config import Config, to_dict
from neo.config.render import as_python
from neo.data import amendments
from neo.errors import InputError, NeoError
from neo.parallel import compiler_flags, distributed
from neo.train.progress import Log
from neo.train.workdir import Run, Workdir

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy", "sentencepiece", "ml-collections")


def run(config: Config, workdir: str | Path | None = None, *, config_text: str | None = None,
        started: float | None = None) -> Run:
    """Train `config` in `workdir`, or go on where it stopped, or return the finished run untouched.

    Args:
        config: as `neo.config.load` gives it.
        workdir: default runs/<config.name>; local or gs://; shared by all processes.
        config_text: the config file as given, kept as config.py.
        started: time.monotonic() of the start, for the log.

    Raises InputError before anything is changed, StoppedForPerson, RestartSafe or KeyboardInterrupt later;
    the last good checkpoint is kept in every case.
    """
    import jax

    from neo.train.checkpoints import disk_full

    place = Workdir(workdir or f"runs/{config.name}")
    compiler_flags.apply(config.train.compiler_flags)   # the compiler reads them when JAX starts
    distributed.devices()   # a missing device is told first: everything below asks JAX
    _require_run_or_empty(place)
    distributed.check_shared(place.path)
    finished = _finished(place, config)
    if finished is not None:
        return finished
    log = Log(quiet=config.log.progress == "off" or jax.process_index() > 0, started=started)
    log(f"workdir {place.path}")
    try:
        return _train(config, place, log, config_text)
    except (NeoError, KeyboardInterrupt) as error:
        log(f"stopped: {error}", file_only=True)
        raise
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise disk_full(place.path, f"{error.filename or 'a file'} was not written") from None


def _train(config: Config, place: Workdir, log: Log, config_text: str | None) -> Run:
    import jax

    from neo.train import startup
    from neo.train.checkpoint_format import checkpoints_in
    from neo.train.hooks import hooks_of
    from neo.train.loop import train
    from neo.train.session import build, require_same_run

    if config.train.compile_cache:
        jax.config.update("jax_compilation_cache_dir", str(place.path / "compile_cache"))
    try:
        own = checkpoints_in(place.path)
    except InputError as error:
        raise InputError(f"{error}; move that folder out of the workdir to go on without it") from None
    before = place.read_json("config.json")
    changed = require_same_run(before if own else None, config, own[-1].step if own else 0, place)
    session = build(config, place, log)
    primary = jax.process_index() == 0
    place.create()
    if "://" not in str(place.path):
        log.attach(str(place.path / "logs" / f"process_{jax.process_index():03d}.log"))
    if primary:
        place.write_text("config.py", config_text or as_python(config))
        place.write_json("config.json", to_dict(config))
        place.write_json("environment.json", {**environment(), **startup.facts(config)})
        session.write_amendments()
        place.event("resume" if session.start_step else "start", session.start_step, changed=changed,
                    devices=session.mesh.devices.size, **({"init": session.origin} if session.origin else {}))
        for one in session.data.amendments:
            if one.step == session.start_step and one.reason == amendments.BY_CONFIG:
                place.event("amendment", session.start_step, effective=one.step, phase=one.phase, reason=one.reason,
                            mixture=dict(one.mixture))
                log(f"phase {one.phase} is mixed by the new weights from step {one.step + 1} on")
    for line in changed:
        log(f"changed since the last start: {line}")
    with _closing(session) as hooks:
        hooks += hooks_of(session)
        if session.steps_done < session.stop_step:
            session.step_for(session.phase_after(session.steps_done + 1), session.data.order.span_of_step(
                session.steps_done).global_batch)
        session.clock.lap("startup")
        train(session, hooks)
        session.checkpoints.wait()
        result = _result(session, hooks)
    if primary:
        place.write_json("result.json", result)
        place.event("finish", session.steps_done)
    return Run(place.path)


@contextlib.contextmanager
def _closing(session: Any) -> Iterator[list[Any]]:
    """A list of hooks to fill; hooks and checkpoints are closed at the end, whatever happened."""
    hooks: list[Any] = []
    try:
        yield hooks
    except BaseException:
        # The user is told what stopped the run, not what fails because of it (a disk that is still full).
        for close in (*(hook.close for hook in hooks), session.checkpoints.close):
            with contextlib.suppress(Exception):
                close()
        raise
    for hook in hooks:
        hook.close()
    session.checkpoints.close()


def _result(session: Any, hooks: list[Any]) -> dict[str, Any]:
    """What the run achieved, beside the baselines; evaluated anew only if a killed start left no record of it."""
    from neo.data.baselines import compressor_bits_per_byte, unigram_bits_per_byte
    from neo.train.evaluation import Evaluation
    from neo.train.metrics import stamp
    from neo.train.schedule import tokens_after
    from neo.train.workdir import read_records

    steps = session.steps_done
    records = [r for r in read_records(session.workdir.path) if r["step"] == steps and "eval/loss" in r]
    held_out = records[-1] if records else {}
    evaluation = next(hook for hook in hooks if isinstance(hook, Evaluation))
    if not held_out and evaluation.due(steps, True):
        held_out = evaluation.act(steps, session.state)
    result = {**stamp(steps, tokens_after(session.config, steps), session.phase_after(steps).name),
              "config": session.config.name, "synthetic": session.config.data.synthetic,
              "total_steps": session.config.total_steps,
              "held_out": {k: v for k, v in held_out.items() if k.startswith("eval/")}}
    if held_out:
        with session.log.stage("computing the baselines"):
            used = {name: session.sources[name] for name in evaluation.names}
            result["baselines"] = {"unigram": unigram_bits_per_byte(used, session.config.model.vocab_size),
                                   **compressor_bits_per_byte(used, session.tokenizer)}
    return result


def _require_run_or_empty(place: Workdir) -> None:
    """A workdir is new, empty, or a run of ours."""
    if not place.path.exists() or (place.path / "config.json").exists():
        return
    if not place.path.is_dir():
        raise InputError(f"workdir {place.path} is a file; give a folder")
    ours = {"checkpoints", "metrics", "logs", "compile_cache", "tensorboard"}
    ours |= {".config.py.new", "config.py", ".config.json.new"}   # of a start that was killed before config.json
    foreign = sorted(path.name for path in place.path.iterdir()
                     if path.name not in ours and not path.name.startswith(".shared-"))
    if foreign:
        raise InputError(f"workdir {place.path} is not empty and not a run of neo (it holds {', '.join(foreign[:3])}); "
                         "give another --workdir")


def _finished(place: Workdir, config: Config) -> Run | None:
    """The run, if it has already reached the step this config asks for."""
    from neo.train.session import require_same_run
    result = place.read_json("result.json")
    if result is None:
        return None
    stop = min(config.train.steps or config.total_steps, config.total_steps)
    require_same_run(place.read_json("config.json"), config, result["step"], place)
    return Run(place.path) if result["step"] >= stop else None


def environment() -> dict[str, Any]:
    """Versions, devices, commit and command line of this start."""
    import jax
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    try:
        root = Path(__file__).resolve().parents[2]
        commit = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True,
                                timeout=10, check=False).stdout.strip()
    except OSError:
        commit = ""
    return {"time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "python": platform.python_version(),
            "packages": versions, "platform": platform.platform(), "processes": jax.process_count(),
            "devices": sorted({f"{d.platform}: {d.device_kind}" for d in jax.devices()}), "device_count": jax.device_count(),
            "commit": commit or None, "command": shlex.join(sys.argv)}


def result_text(result: Mapping[str, Any], samples: list[Mapping[str, Any]]) -> str:
    """The result as a person reads it."""
    lines = [f"{result['config']}: step {result['step']} of {result['total_steps']}, {result['tokens']:,} tokens"
             + (", synthetic data" if result["synthetic"] else "")]
    held_out, baselines = result["held_out"], result.get("baselines", {})
    if held_out:
        lines += ["", f"held-out loss   {held_out['eval/loss']:.4f} nats per token, "
                      f"accuracy {100 * held_out['eval/accuracy']:.1f} %"]
        rows = [("this model", held_out["eval/bits_per_byte"]), *baselines.items()]
        notes = {"unigram": "token frequencies of the training text", "gzip": "gzip -9 on the held-out text",
                 "xz": "xz -9e on the held-out text"}
        lines += ["bits per byte"] + [f"  {name:<12} {value:6.3f}   {notes.get(name, '')}".rstrip() for name, value in rows]
        sources = [key.rsplit("/", 1)[1] for key in held_out if key.startswith("eval/loss/")]
        if len(sources) > 1:
            lines.append("by source       " + ", ".join(
                f"{s} {held_out[f'eval/loss/{s}']:.4f} nats per token, {held_out[f'eval/bits_per_byte/{s}']:.3f} bits per byte"
                for s in sources))
    for sample in samples:
        lines += ["", f"sample from {sample['prompt']!r}:", *(f"  | {line}" for line in sample["text"].splitlines())]
    return "\n".join(lines)
