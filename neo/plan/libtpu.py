"""The TPU compiler that libtpu holds, used on machines without a TPU: whose turn it is, its environment, what it says.

libtpu reads its flags once, when it is loaded, and serves one process at a time. So whatever compiles is a process of its
own (`python -m neo.plan.child`), started here and one after the other.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from neo.errors import InputError
from neo.extras import install_line

LOCK = "neo-libtpu.lock"   # in the folder for temporary files: one for all of a machine
# Variables of the user's that would change what is compiled, or make libtpu look for the TPU they describe.
_LEFT_OUT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "TPU_LIBRARY_PATH", "TPU_NAME", "TPU_TOPOLOGY", "TPU_ACCELERATOR_TYPE",
             "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES", "TPU_CHIPS_PER_HOST_BOUNDS", "TPU_HOST_BOUNDS", "TPU_SKIP_MDS_QUERY",
             "JAX_COMPILATION_CACHE_DIR")
_UNKNOWN_FLAG = re.compile(r"[Uu]nknown (?:command line )?flag '?-*(\w+)'?|flag '?-*(\w+)'? (?:was )?not (?:recognized|found)"
                           r"|[Ii]llegal value '[^']*' (?:specified )?for flag '?-*(\w+)'?")
# A line of C++ log: severity, date or time, process, file:line]
_LOGGED = re.compile(r"^(?:\S+ \S+ )?([IWEF])\d{4} [\d:.]+ +\d+ ([\w./-]+:\d+)\] (.*)$")
# What of it a planner should see: tensors that are gathered whole because two shardings do not meet.
_WORTH = re.compile(r"involuntary full rematerialization|rematerialization: ", re.IGNORECASE)


def version() -> str:
    """libtpu's, as pip knows it. InputError with the line that installs it, where it is missing."""
    if importlib.util.find_spec("libtpu") is None:
        here = f"{platform.system()} on {platform.machine()}"
        how = install_line("plan") if here == "Linux on x86_64" else (
            f"it is published for Linux on x86_64, this is {here}; GPU topologies need no libtpu")
        raise InputError(f"compiling for TPUs without one needs the package 'libtpu', which is not installed: {how}")
    try:
        return importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version("libtpu-nightly")


def environment(flags: Iterable[str] = ()) -> dict[str, str]:
    """Of a process that compiles with these flags ("--name=value"); the user's own XLA and TPU variables are left out."""
    kept = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT}
    code = str(Path(__file__).resolve().parents[2])   # neo is found from any folder, installed or not
    path = os.pathsep.join(filter(None, (code, kept.get("PYTHONPATH", ""))))
    return {**kept, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            "LIBTPU_INIT_ARGS": " ".join(flags)}


@contextlib.contextmanager
def turn(progress: Callable[[str], None] = lambda text: None) -> Iterator[int]:
    """Waits until no other process of neo compiles; `progress` hears of it when there is one.

    Gives the lock's file descriptor: a process that inherits it keeps the turn if this one is killed."""
    path = Path(tempfile.gettempdir()) / LOCK
    try:
        lock = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
    except PermissionError:   # another user's: reading is enough to lock
        lock = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(f"waiting for another libtpu process (lock {path})")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock
    finally:
        os.close(lock)


def command(module: str, *arguments: str | Path) -> list[str]:
    """A process of this Python that runs a module of neo."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def refused_flag(stderr: str, flags: Sequence[str]) -> str:
    """One line that names the flag libtpu does not take, "" where its log speaks of none."""
    found = _UNKNOWN_FLAG.search(stderr)
    if not found:
        return ""
    name = next(filter(None, found.groups()))
    given = next((flag for flag in flags if flag.lstrip("-").partition("=")[0] == name), f"--{name}")
    return f"libtpu {version()} does not take the flag {given}: leave it out, or install a libtpu that knows it"


def warnings(stderr: str) -> tuple[str, ...]:
    """Lines of the compiler's log that a person should read, each once, cut to 300 characters."""
    found = []
    for line in stderr.splitlines():
        logged = _LOGGED.match(line)
        if _WORTH.search(line):
            found.append((logged[3] if logged else line).strip()[:300])
    return tuple(dict.fromkeys(found))


def last_words(stderr: str) -> str:
    """Why a process died, in one line: the last fatal or error line of its log, or the last line of a traceback."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    fatal = [match for line in lines if (match := _LOGGED.match(line)) and match[1] in "FE"]
    if fatal:
        return f"{fatal[-1][3][:300]} ({fatal[-1][2]})"
    return lines[-1][:300] if lines else "it said nothing"
