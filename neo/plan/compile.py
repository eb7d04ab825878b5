"""Compile the real training step for TPUs that are not there, in a process of its own, and keep what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gzip
import hashlib
import importlib.metadata
import json
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from neo.config import Config, PhaseConfig, to_dict
from neo.errors import InputError, nearest
from neo.plan import libtpu
from neo.plan.plan import Compiled, MemoryUse

if TYPE_CHECKING:
    from neo.plan.topology import Topology

TICK_S = 10.0   # how often a long compile is heard of


def compile_step(config: Config, topology: Topology, phase: str = "", *, flags: Sequence[Any] = (), cache: Path,
                 progress: Callable[[str], None] = lambda text: None) -> Compiled:
    """The step of a phase as libtpu compiles it for a topology. Nothing is allocated.

    Args:
        topology: TPUs; its chip says how much HBM a program may use.
        phase: its name; default the phase with the most tokens.
        flags: "--name=value" texts, or objects with `name` and `value`, given to libtpu when it starts.
        cache: folder of compiled programs; a program that was compiled before is taken from there, found by the hash of what
            was lowered, or, while config, flags, neo's code and versions are the same, without lowering it.
        progress: hears a line at each stage, and the elapsed seconds of a long one.

    A program that the compiler refuses for want of memory comes back with `refused` set and no HLO. Raises InputError for a
    config that cannot run on these devices, a flag that libtpu does not take, and a missing libtpu; RuntimeError when the
    compiler fails in another way.
    """
    libtpu.version()
    capacity = topology.chip.hbm_bytes
    texts = [flag_text(flag) for flag in flags]
    job = {"config": to_dict(config), "topology": topology.name, "phase": phase_of(config, phase).name,
           "capacity": capacity, "flags": texts, "cache": str(Path(cache).resolve())}
    asked = Path(job["cache"]) / "asked" / question(job)
    if asked.exists() and (Path(job["cache"]) / asked.read_text() / "facts.json").exists():
        return read(Path(job["cache"]), asked.read_text(), capacity, cached=True)
    answer, stderr = run_child(job, texts, f"the step for {topology.name}", progress)
    if "input" in answer:
        raise InputError(answer["input"])
    if "crashed" in answer:
        return _crashed(answer["crashed"], capacity)
    compiled = read(Path(job["cache"]), answer["key"], capacity, answer["cached"])
    if not answer["cached"]:
        compiled = dataclasses.replace(compiled, warnings=libtpu.warnings(stderr))
        _note(Path(job["cache"]) / answer["key"] / "facts.json", warnings=compiled.warnings)
    asked.parent.mkdir(parents=True, exist_ok=True)
    _write(asked, answer["key"])
    return compiled


def question(job: Mapping[str, Any]) -> str:
    """Hash of a job and of everything that answers it: neo's own code, JAX, libtpu. The same question is not even lowered."""
    kept = {name: value for name, value in job.items() if name != "cache"}
    versions = [importlib.metadata.version("jax"), libtpu.version()]
    return hashlib.sha256(json.dumps([kept, versions, _own_code()], sort_keys=True).encode()).hexdigest()[:24]


@functools.cache
def _own_code() -> str:
    """Hash of neo's modules and the tables beside them."""
    room, found = Path(__file__).resolve().parents[1], hashlib.sha256()
    for path in sorted(path for path in room.rglob("*") if path.suffix in (".py", ".csv")):
        found.update(str(path.relative_to(room)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def phase_of(config: Config, name: str) -> PhaseConfig:
    """A phase by name; "" is the one with the most tokens. InputError lists them."""
    names = [one.name for one in config.phases]
    if not name:
        return max(config.phases, key=lambda one: one.whole_tokens)
    if name not in names:
        raise InputError(f"--phase={name}: there is no such phase{nearest(name, names)}; phases: {', '.join(names)}")
    return config.phases[names.index(name)]


def flag_text(flag: Any) -> str:
    """"--name=value" of a text or of an object with `name` and `value`."""
    text = flag if isinstance(flag, str) else f"{flag.name}={flag.value}"
    return f"--{text.lstrip('-')}"


def run_child(job: dict[str, Any], flags: Sequence[str], what: str, progress: Callable[[str], None], *,
              module: str = "neo.plan.child", stage: str = "lowering") -> tuple[dict[str, Any], str]:
    """Run a module of ours that compiles on a job, when it is libtpu's turn. `stage`: what it does first.

    Returns its last line and its log. A child that a signal ended comes back as {"crashed": why}; InputError for a flag that
    libtpu refused; RuntimeError, with the child's last words, when it failed otherwise.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="neo-plan-")))
        (folder / "job.json").write_text(json.dumps(job))
        log = stack.enter_context(open(folder / "log", "w+", errors="replace"))
        lock = stack.enter_context(libtpu.turn(progress))
        progress(f"{stage} {what}")
        child = subprocess.Popen(libtpu.command(module, folder / "job.json"), env=libtpu.environment(flags),
                                 stdout=subprocess.PIPE, stderr=log, text=True, pass_fds=(lock,))
        stack.callback(_end, child)
        answer = _listen(child, what, stage, progress)
        code = child.wait()
        log.seek(0)
        stderr = log.read()
    if code == 0 or "input" in answer:
        return answer, stderr
    if refused := libtpu.refused_flag(stderr, flags):
        raise InputError(refused)
    if code < 0:   # a failed check in the compiler ends the process
        return {"crashed": f"signal {-code}: {libtpu.last_words(stderr)}"}, stderr
    raise RuntimeError(f"compiling {what} failed: {libtpu.last_words(stderr)}\n{stderr[-4000:]}")


def _listen(child: subprocess.Popen[str], what: str, stage: str, progress: Callable[[str], None]) -> dict[str, Any]:
    """Pass a child's stages on until it closes its output; its last line."""
    answer: dict[str, Any] = {}
    assert child.stdout is not None
    started = time.monotonic()
    with selectors.DefaultSelector() as ready:
        ready.register(child.stdout, selectors.EVENT_READ)
        while True:
            if not ready.select(TICK_S):
                progress(f"{stage} {what}: {time.monotonic() - started:.0f} s")
                continue
            line = _line(child.stdout)
            if line is None:
                return answer
            if not line.startswith("{"):   # libtpu's C++ writes to stdout too
                continue
            answer = json.loads(line)
            if "stage" in answer:
                stage, started = answer["stage"], time.monotonic()
                progress(f"{stage} {what} (lowered in {answer['lower_s']:.1f} s)")


def _line(stream: IO[str]) -> str | None:
    text = stream.readline()
    return text.strip() if text else None


def _end(child: subprocess.Popen[str]) -> None:
    if child.poll() is None:
        child.kill()
    child.wait()
    if child.stdout is not None:
        child.stdout.close()


def read(cache: Path, key: str, capacity: int, cached: bool) -> Compiled:
    """An entry of the cache. `capacity`: bytes of HBM that a program may use."""
    folder = cache / key
    facts = json.loads((folder / "facts.json").read_text())
    with gzip.open(folder / "step.hlo.gz", "rt") as file:
        hlo = file.read()
    memory, refused = facts.get("memory"), facts.get("refused", "")
    if memory is None:
        need = (facts.get("refused_bytes") or (capacity + 1, 0))[0]
        use = MemoryUse(0, 0, need, capacity, "compiler")
    else:
        use = MemoryUse(memory["arguments"], memory["temporaries"], memory["peak"], capacity, "compiler")
    return Compiled(hlo=hlo, memory=use, lower_s=facts["lower_s"], compile_s=facts["compile_s"], key=key, cached=cached,
                    warnings=tuple(facts.get("warnings", ())), versions=facts["versions"], refused=refused, facts=facts)


def _note(path: Path, **more: Any) -> None:
    """Add to the facts of an entry."""
    _write(path, json.dumps({**json.loads(path.read_text()), **more}, indent=1))


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text)
    new.replace(path)


def _crashed(why: str, capacity: int) -> Compiled:
    return Compiled(hlo="", memory=MemoryUse(0, 0, capacity + 1, capacity, "compiler"), lower_s=0.0, compile_s=0.0, key="",
                    cached=False, refused=f"the compiler crashed: {why}")
