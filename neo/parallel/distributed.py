"""Several processes, one run: joining, agreeing, and one line when that fails."""

from __future__ import annotations

import contextlib
import dataclasses
import glob
import os
import secrets
import socket
import sys
import time
from collections.abc import Mapping

from neo.errors import InputError

SHARED_SECONDS = 60.0    # for a shared workdir to show what process 0 wrote
JOIN_SECONDS = 300       # for all processes to come together; JAX's own default
# Ours. A process that fails alone must not keep its place for JAX's five minutes, waiting for the others to end too:
# they wait for it, and are told of its death only when it is gone.
LEAVE_SECONDS = 20


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How this process finds the others. `mode` is auto or off; the rest, when given, wins over auto."""

    mode: str = "auto"
    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1


def join(cluster: Cluster, environment: Mapping[str, str] = os.environ) -> str:
    """Call `jax.distributed.initialize` where it is asked for or a cluster is seen. Returns what was done, for the log.

    Must run before any other use of JAX. InputError when the coordinator cannot be reached or bound.
    """
    explicit = cluster.coordinator or cluster.num_processes or cluster.process_id >= 0
    if explicit:
        if not cluster.coordinator or cluster.num_processes < 1 or cluster.process_id < 0:
            raise InputError("--coordinator=HOST:PORT, --num_processes=N and --process_id=I are needed together")
        if cluster.process_id >= cluster.num_processes:
            raise InputError(f"--process_id={cluster.process_id} must be below --num_processes={cluster.num_processes}")
        if ":" not in cluster.coordinator or not cluster.coordinator.rpartition(":")[2].isdigit():
            raise InputError(f"--coordinator={cluster.coordinator}: HOST:PORT is needed, as in 10.0.0.1:8476")
        _check_coordinator(cluster.coordinator, cluster.process_id)
        _initialize(f"coordinator {cluster.coordinator}", coordinator_address=cluster.coordinator,
                    num_processes=cluster.num_processes, process_id=cluster.process_id)
        return f"process {cluster.process_id} of {cluster.num_processes}, coordinator {cluster.coordinator}"
    if cluster.mode == "off":
        return "one process (--distributed=off)"
    seen = _seen_cluster(environment)
    if not seen and _has_tpu(environment):
        # The hosts of a TPU pod need not show each other in the environment: JAX asks the machine's metadata.
        try:
            _initialize("the TPU hosts, if there are several")
        except InputError as error:
            return f"one process (a TPU without a cluster: {error})"
        return "joined the TPU's hosts"
    if not seen:
        return "one process (no cluster seen)"
    _initialize(f"the cluster ({seen})")
    return f"joined the cluster ({seen})"


def _seen_cluster(env: Mapping[str, str]) -> str:
    """The cluster this process was started in, by its environment; empty on a single machine."""
    if env.get("JAX_COORDINATOR_ADDRESS"):
        return "JAX_COORDINATOR_ADDRESS"
    if env.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return "TPU slices"
    if "," in env.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU pod"
    if int(env.get("SLURM_NTASKS", "1") or 1) > 1 and env.get("SLURM_PROCID"):
        return "Slurm"
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1") or 1) > 1:
        return "Open MPI"
    return ""


def _has_tpu(env: Mapping[str, str]) -> bool:
    """Whether this host has TPU chips that JAX is allowed to use."""
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _check_coordinator(address: str, process_id: int) -> None:
    """InputError when process 0 cannot open the coordinator's port, or another process cannot reach it in JOIN_SECONDS.

    JAX itself ends the process with a signal in both cases.
    """
    host, _, port = address.rpartition(":")
    if process_id == 0:
        try:
            with socket.create_server(("", int(port))):
                return
        except (OSError, OverflowError) as error:
            raise InputError(f"--coordinator={address}: process 0 cannot open port {port} here ({error}); "
                             "give a port that is free, to all processes") from None
    deadline = time.monotonic() + JOIN_SECONDS
    told = time.monotonic()
    while True:
        try:
            with socket.create_connection((host.strip("[]"), int(port)), timeout=5):
                return
        except (OSError, OverflowError) as error:
            now = time.monotonic()
            if now > deadline:
                raise InputError(f"--coordinator={address} cannot be reached after {JOIN_SECONDS} s ({error}); check that "
                                 "process 0 runs, and that this machine can open connections to it") from None
            if now - told > 10:
                print(f"neo: waiting for the coordinator {address} ({error})", file=sys.stderr, flush=True)
                told = now
            time.sleep(0.2)


def _initialize(where: str, **arguments: object) -> None:
    import jax
    print(f"neo: joining {where}, waiting up to {JOIN_SECONDS} s for all processes", file=sys.stderr, flush=True)
    try:
        jax.distributed.initialize(initialization_timeout=JOIN_SECONDS, shutdown_timeout_seconds=LEAVE_SECONDS, **arguments)
    except Exception as error:
        text = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(f"cannot join {where}: {text[:200]}; check that the address is reachable, its port free, and that "
                         "every process was started") from None


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
