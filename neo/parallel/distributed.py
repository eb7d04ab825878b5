"""Several processes, one run: joining, agreeing, and one line when that fails."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Mapping
from typing import Any, Protocol

from neo.errors import InputError
from neo.parallel import rendezvous, watch
from neo.parallel.cluster import Cluster, Place, find

SHARED_SECONDS = 60.0    # for a shared workdir to show what process 0 wrote
# Ours. A process that fails alone must not keep its place for JAX's five minutes, waiting for the others to end too:
# they wait for it, and are told of its death only when it is gone.
LEAVE_SECONDS = 20

_channel: watch.Channel | None = None    # to the process that watches over this one, once joined


def join(cluster: Cluster, facts: Mapping[str, Any] | None = None, *, join_seconds: float = 300,
         heartbeat_seconds: float = 60, environment: Mapping[str, str] = os.environ) -> str:
    """Meet the other processes where flags or a scheduler tell of some, and start JAX's distributed runtime.

    Args:
        cluster: what the user gave.
        facts: what must be the same on all processes, for `rendezvous.meet`.
        join_seconds: how long to wait for all to come; also JAX's own limit, which is 300 by default.
        heartbeat_seconds: a process that is silent for so long is taken for lost.
        environment: variables of the scheduler.

    With several processes this one forks: the child returns and trains, the parent watches (`neo.parallel.watch`) and
    leaves the command when the child has ended. Must run before any other use of JAX. Returns what was done, for the log.
    InputError where the cluster is half given, processes are missing or differ, or JAX cannot start.
    """
    global _channel
    place, alone = find(cluster, environment)
    if place is None:
        return alone
    where = f"coordinator {place.coordinator}, {place.seen}"
    if place.num_processes == 1:
        _initialize(place, join_seconds, heartbeat_seconds)
        return f"process 0 of 1, {where}"
    print(f"neo: process {place.process_id} of {place.num_processes} waits up to {join_seconds:g} s for the others ({where})",
          file=sys.stderr, flush=True)
    meeting = rendezvous.meet(place, facts or {}, join_seconds)
    channel = watch.split(place.process_id, meeting, heartbeat_seconds)
    with channel.failures():
        _initialize(place, join_seconds, heartbeat_seconds)
    _channel = channel
    return f"{meeting.name(place.process_id)}, {where}"


def watched() -> contextlib.AbstractContextManager[Any]:
    """Around all that a joined process does: tells the others how it ended, so that none waits for it."""
    return _channel or contextlib.nullcontext()


class Agreement(Protocol):
    """How processes settle on the last step before they stop."""

    def begin(self, step: int) -> str:
        """Call before step number `step` (from 1) is begun: the signal to stop for if the one before was the last, or ""."""

    def stop(self, step: int, wanted: str) -> str:
        """After step `step` was begun: the signal to stop for if it is the last one, else "". `wanted` is a signal that
        this process got, or ""."""


class _Alone:
    def begin(self, step: int) -> str:
        return ""

    def stop(self, step: int, wanted: str) -> str:
        return wanted


class _ByCollective:
    """Processes that were joined by a program of the user's own: asked now and then, for a collective costs a message."""

    def __init__(self, every: int):
        self._every = every

    def begin(self, step: int) -> str:
        return ""

    def stop(self, step: int, wanted: str) -> str:
        if step % self._every or not any_process(bool(wanted)):
            return ""
        return wanted or "SIGTERM on another process"


def agreement(every: int) -> Agreement:
    """The agreement of this run. `every`: where nothing watches over the processes, they agree every so many steps."""
    import jax
    if jax.process_count() == 1:
        return _Alone()
    return _channel or _ByCollective(every)


def _initialize(place: Place, join_seconds: float, heartbeat_seconds: float) -> None:
    import jax
    devices = {} if place.local_device_ids is None else {"local_device_ids": list(place.local_device_ids)}
    try:
        jax.distributed.initialize(
            coordinator_address=place.coordinator, num_processes=place.num_processes, process_id=place.process_id,
            cluster_detection_method="deactivate", initialization_timeout=round(join_seconds),
            heartbeat_timeout_seconds=round(heartbeat_seconds), shutdown_timeout_seconds=LEAVE_SECONDS, **devices)
    except Exception as error:
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"cannot join coordinator {place.coordinator} ({place.seen}): {text[:200]}; check that the address "
                         "is reachable, its port free, and that every process was started") from None
    # JAX takes SIGTERM for a service that we do not use: until training begins, the signal would be lost.
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


def devices() -> list:
    """All devices. InputError when the platform that was asked for is not there."""
    import jax
    try:
        return jax.devices()
    except RuntimeError as error:
        text = next((line for line in str(error).splitlines() if line.strip()), "no device")
        raise InputError(f"no device: {text[:200]}; JAX_PLATFORMS={os.environ.get('JAX_PLATFORMS', '')!r} asks for what "
                         "this machine has not (JAX_PLATFORMS=cpu runs anywhere)") from None


def check_shared(folder: object, seconds: float | None = None) -> None:
    """With several processes: every one must read what process 0 writes into `folder`, within a minute.

    InputError on all processes, naming those that cannot.
    """
    import jax
    if jax.process_count() == 1:
        return
    import numpy as np
    from etils import epath
    from jax.experimental import multihost_utils

    token = int(multihost_utils.broadcast_one_to_all(np.int32(secrets.randbelow(2**31 - 1))))
    path = epath.Path(folder) / f".shared-{token}"
    if jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(token))
    # Not path.exists() alone: network file systems may show a name before its content.
    deadline = time.monotonic() + (SHARED_SECONDS if seconds is None else seconds)
    found = False
    while not found and time.monotonic() < deadline:
        with contextlib.suppress(OSError):
            found = path.read_text() == str(token)
        if not found:
            time.sleep(0.5)
    everyone = multihost_utils.process_allgather(np.int32(found)).reshape(-1)
    if jax.process_index() == 0:
        path.unlink(missing_ok=True)
    without = [str(i) for i, saw in enumerate(everyone) if not saw]
    if without:
        raise InputError(f"workdir {folder} is not shared: process {', '.join(without)} cannot read what process 0 wrote; "
                         "give a folder on a shared file system, or gs://")


def smallest(value: int | None) -> int | None:
    """The least of every process's bytes, rounded down to MiB; None when some process does not know. Every process must
    call it."""
    import jax
    if jax.process_count() == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils
    # In megabytes: JAX would cut a 64-bit number, and all must come to the same plan.
    megabytes = -1 if value is None else value >> 20
    least = int(multihost_utils.process_allgather(np.int32(megabytes)).min())
    return None if least < 0 else least << 20


def any_process(flag: bool) -> bool:
    """Whether `flag` is true on some process; every process must call it at the same point."""
    import jax
    if jax.process_count() == 1:
        return flag
    import numpy as np
    from jax.experimental import multihost_utils
    return bool(multihost_utils.process_allgather(np.int32(flag)).any())
