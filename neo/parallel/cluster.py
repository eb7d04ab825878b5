"""Where this process stands among the others of its run: by flags, or by what the scheduler left in the environment.

Nothing here imports JAX: the place must be known before JAX starts. The names of variables and attributes are those of
the schedulers; JAX 0.10 to 0.12 reads the same ones (jax/_src/clusters), but tells neither who is missing nor why.
"""

from __future__ import annotations

import dataclasses
import glob
import re
import time
import urllib.error
import urllib.request
from collections.abc import Mapping

from neo.errors import InputError

TPU_PORT = 8482              # JAX's own choice since 0.8.1; JAX_COORDINATOR_PORT changes it
EPHEMERAL = 2**12            # a port of the last 4096, by job number, as JAX takes it: jobs on one host seldom meet
METADATA_SECONDS = 5.0       # ours, for one question to the machine's metadata; it answers in milliseconds
METADATA_TRIES = 3           # ours: right after boot the server may not answer yet
METADATA_HOST = "metadata.google.internal"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """How this process finds the others, as the user gave it. `mode` is auto or off; the rest, when given, wins."""

    mode: str = "auto"
    coordinator: str = ""
    num_processes: int = 0
    process_id: int = -1


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among `num_processes`. Process 0 opens `coordinator` (HOST:PORT); all others connect to it."""

    coordinator: str
    num_processes: int
    process_id: int
    seen: str                                    # what told it, for the log and messages
    local_device_ids: tuple[int, ...] | None = None   # None: all devices that the process can see are its own

    @property
    def host(self) -> str:
        """Name or address of the coordinator, without brackets."""
        return self.coordinator.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The coordinator's port."""
        return int(self.coordinator.rpartition(":")[2])


def find(cluster: Cluster, env: Mapping[str, str]) -> tuple[Place | None, str]:
    """The place of this process, or None when it runs alone, and why alone.

    Precedence: flags, then JAX_COORDINATOR_ADDRESS / JAX_NUM_PROCESSES / JAX_PROCESS_ID, then the scheduler, field by
    field: `--coordinator` alone takes number and id from the scheduler. InputError when something is missing or
    impossible.
    """
    given = bool(cluster.coordinator or cluster.num_processes or cluster.process_id >= 0)
    if cluster.mode == "off" and not given:
        return None, "one process (--distributed=off)"
    found = _scheduler(env, given or bool(env.get("JAX_COORDINATOR_ADDRESS")))
    # An address alone does not make a run of several: it may be exported for all jobs of a shell.
    if not given and not env.get("JAX_COORDINATOR_ADDRESS") and (found is None or found.num_processes < 2):
        return None, f"one process ({found.seen})" if found else "one process (no cluster seen)"
    blank = Place("", 0, -1, "flags" if given else "JAX_COORDINATOR_ADDRESS")
    found = found or blank
    place = Place(
        coordinator=cluster.coordinator or env.get("JAX_COORDINATOR_ADDRESS") or found.coordinator,
        num_processes=cluster.num_processes or _number(env, "JAX_NUM_PROCESSES", 0) or found.num_processes,
        process_id=cluster.process_id if cluster.process_id >= 0 else _number(
            env, "JAX_PROCESS_ID", _number(env, "JOB_COMPLETION_INDEX", found.process_id)),
        seen=found.seen,
        local_device_ids=found.local_device_ids)
    return _checked(place, given), ""


def _checked(place: Place, given: bool) -> Place:
    if not place.coordinator or place.num_processes < 1 or place.process_id < 0:
        if not given and not place.coordinator:   # Open MPI 5
            raise InputError(f"{place.seen} does not tell the address of process 0: give --coordinator=HOST:PORT (or "
                             "JAX_COORDINATOR_ADDRESS) to all processes; their number and ids are known")
        raise InputError("--coordinator=HOST:PORT, --num_processes=N and --process_id=I are needed together (or "
                         "JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID); no scheduler was seen that "
                         "tells the others")
    if place.process_id >= place.num_processes:
        raise InputError(f"--process_id={place.process_id} must be below --num_processes={place.num_processes}")
    port = place.coordinator.rpartition(":")[2]
    if ":" not in place.coordinator or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(f"--coordinator={place.coordinator}: HOST:PORT is needed, as in 10.0.0.1:8476")
    return place


def _scheduler(env: Mapping[str, str], wanted: bool) -> Place | None:
    """What the scheduler tells, with the fields it leaves open at "", 0 or -1. `wanted`: an address is known already, so
    that the machine's metadata need not be asked."""
    if env.get("TPU_WORKER_HOSTNAMES") or env.get("TPU_PROCESS_ADDRESSES") or env.get("MEGASCALE_COORDINATOR_ADDRESS"):
        return _tpu_environment(env)
    if env.get("SLURM_PROCID"):
        return _slurm(env)
    if env.get("OMPI_COMM_WORLD_SIZE"):
        return _open_mpi(env)
    if not wanted and has_tpu(env) and not env.get("TPU_SKIP_MDS_QUERY"):
        return _tpu_metadata(env)
    return None


def _tpu_environment(env: Mapping[str, str]) -> Place:
    """GKE sets the hosts of the slice, and for several slices the first host of all, in every container."""
    workers = [name for name in (env.get("TPU_PROCESS_ADDRESSES") or env.get("TPU_WORKER_HOSTNAMES") or "").split(",") if name]
    return _tpu(workers or ["localhost"], _number(env, "TPU_WORKER_ID", 0), env, env)


def _tpu_metadata(env: Mapping[str, str]) -> Place | None:
    """TPU VMs: the machine's metadata names all workers of the slice (attributes as Cloud TPU sets them)."""
    host = env.get("GCE_METADATA_IP") or METADATA_HOST
    try:
        index = int(_metadata(host, "agent-worker-number"))
        endpoints = _metadata(host, "worker-network-endpoints").split(",")
        described = _metadata(host, "tpu-env")
    except (OSError, ValueError):
        return Place("", 1, 0, "a TPU, and no metadata that tell of others")
    # An endpoint is a name, or name:id:address.
    workers = [endpoint.split(":")[-1] for endpoint in endpoints]
    slices = dict(re.findall(r"^\s*(MEGASCALE_\w+):\s*'?([^'\n]*)'?\s*$", described, re.MULTILINE))
    return _tpu(workers, index, {**slices, **{k: v for k, v in env.items() if k.startswith("MEGASCALE_")}}, env)


def _tpu(workers: list[str], worker: int, slices: Mapping[str, str], env: Mapping[str, str]) -> Place:
    number, which = _number(slices, "MEGASCALE_NUM_SLICES", 1), _number(slices, "MEGASCALE_SLICE_ID", 0)
    first = (slices.get("MEGASCALE_COORDINATOR_ADDRESS") or workers[0]).split(":")[0]
    return Place(f"{first}:{_number(env, 'JAX_COORDINATOR_PORT', TPU_PORT)}", len(workers) * number,
                 which * len(workers) + worker, f"{number} TPU slices" if number > 1 else "TPU pod" if len(workers) > 1
                 else "a TPU of one host")


def _slurm(env: Mapping[str, str]) -> Place | None:
    """`srun` sets these in each task; `salloc` and `sbatch` alone leave SLURM_PROCID of the batch step at 0 of 1 node."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or "localhost"
    tasks = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS", 1))
    # In the batch script itself there is no step: its SLURM_NTASKS counts tasks that srun has yet to start.
    if not env.get("SLURM_STEP_NODELIST") and not env.get("SLURM_STEP_NUM_TASKS"):
        return Place("", 1, 0, "Slurm, outside srun")
    port = _number(env, "JAX_COORDINATOR_PORT",
                   _number(env, "SLURM_JOB_ID", 0) % EPHEMERAL + 2**16 - EPHEMERAL)
    return Place(f"{first_node(nodes)}:{port}", tasks, _number(env, "SLURM_PROCID", -1), "Slurm",
                 _own_gpu(env, _most_tasks(env.get("SLURM_STEP_TASKS_PER_NODE", "1")), _number(env, "SLURM_LOCALID", 0)))


def first_node(nodes: str) -> str:
    """The first host of Slurm's list: `node[001-015],other` -> `node001`."""
    found = re.match(r"([^,\[]*)(?:\[([^\],-]+)[^\]]*\]([^,\[]*))?", nodes)
    return "".join(part or "" for part in found.groups()) if found else nodes


def _most_tasks(per_node: str) -> int:
    """`8(x4),2` -> 8."""
    return max((int(number) for number in re.findall(r"(\d+)(?:\(x\d+\))?(?:,|$)", per_node)), default=1)


def _own_gpu(env: Mapping[str, str], tasks_per_node: int, local: int) -> tuple[int, ...] | None:
    """One GPU a process where a node has several processes that all see all its GPUs.

    A scheduler that binds GPUs shows each task its own as number 0; one task per node has them all.
    """
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if tasks_per_node < 2 or (visible is not None and len(visible.split(",")) < 2):
        return None
    return (local,)


def _open_mpi(env: Mapping[str, str]) -> Place:
    size, rank = _number(env, "OMPI_COMM_WORLD_SIZE", 1), _number(env, "OMPI_COMM_WORLD_RANK", -1)
    local = _number(env, "OMPI_COMM_WORLD_LOCAL_RANK", 0)
    devices = _own_gpu(env, _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE", 1), local)
    # Open MPI 4 tells where mpirun runs: 1531576320.0;tcp://10.96.0.1,10.148.0.1:34911, its job number times 2**12.
    uri = env.get("OMPI_MCA_orte_hnp_uri", "")
    address = re.search(r"tcp6?://\[?([^,\]]+?)(?:[,\]]|:\d+$)", uri)
    if size < 2 or address is None:
        return Place("", size, rank, "Open MPI", devices)
    port = int(uri.partition(".")[0]) // 2**12 % EPHEMERAL + 2**16 - EPHEMERAL
    host = address[1] if ":" not in address[1] else f"[{address[1]}]"
    return Place(f"{host}:{_number(env, 'JAX_COORDINATOR_PORT', port)}", size, rank, "Open MPI", devices)


def has_tpu(env: Mapping[str, str]) -> bool:
    """Whether this host has TPU chips that JAX is allowed to use."""
    if env.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu":
        return False
    return bool(glob.glob("/dev/accel[0-9]*") or glob.glob("/dev/vfio/[0-9]*"))


def _metadata(host: str, key: str) -> str:
    """One attribute of this machine; OSError when the server does not answer or has none such."""
    request = urllib.request.Request(f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
                                     headers={"Metadata-Flavor": "Google"})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))   # the address is this machine's own
    for left in reversed(range(METADATA_TRIES)):
        try:
            with opener.open(request, timeout=METADATA_SECONDS) as answer:
                return answer.read(2**20).decode()
        except urllib.error.HTTPError as error:
            if error.code == 404 or not left:
                raise
        except OSError:
            if not left:
                raise
        time.sleep(0.5)
    raise AssertionError("unreachable")


def _number(env: Mapping[str, str], name: str, default: int) -> int:
    text = env.get(name, "")
    if not text.strip():
        return default
    if not text.strip().isdecimal():
        raise InputError(f"{name}={text!r} in the environment is not a whole number")
    return int(text)
