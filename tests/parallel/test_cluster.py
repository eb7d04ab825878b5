"""Where a process stands, from flags, the environment of schedulers as they set it, and a TPU VM's metadata."""

from __future__ import annotations

import http.server
import threading

import pytest

from neo.errors import InputError
from neo.parallel import cluster
from neo.parallel.cluster import Cluster, find, first_node

SLURM = {"SLURM_JOB_ID": "4098", "SLURM_STEP_NODELIST": "node[007-010,12],other", "SLURM_NTASKS": "40", "SLURM_PROCID": "9",
         "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "40", "SLURM_STEP_TASKS_PER_NODE": "8(x5)"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "9", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            "OMPI_COMM_WORLD_LOCAL_SIZE": "8",
            "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1,10.108.0.1:34911"}
GKE = {"TPU_WORKER_HOSTNAMES": "job-0-0.sub,job-0-1.sub", "TPU_WORKER_ID": "1"}
SLICES = {"MEGASCALE_COORDINATOR_ADDRESS": "job-0-0.sub:8080", "MEGASCALE_NUM_SLICES": "3", "MEGASCALE_SLICE_ID": "2"}


def place_of(environment, **flags):
    place, alone = find(Cluster(**flags), environment)
    return alone if place is None else (place.coordinator, place.num_processes, place.process_id, place.local_device_ids)


@pytest.mark.parametrize(("environment", "wanted"), [
    (SLURM, ("node007:61442", 40, 9, (1,))),
    ({**SLURM, "CUDA_VISIBLE_DEVICES": "0"}, ("node007:61442", 40, 9, None)),          # --gpus-per-task: its own, as number 0
    ({**SLURM, "CUDA_VISIBLE_DEVICES": "0,1,2"}, ("node007:61442", 40, 9, (1,))),
    ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x40)", "SLURM_LOCALID": "0"}, ("node007:61442", 40, 9, None)),   # all GPUs
    ({**SLURM, "JAX_COORDINATOR_PORT": "9999"}, ("node007:9999", 40, 9, (1,))),
    (OPEN_MPI, ("10.96.0.1:62624", 16, 9, (1,))),
    ({**OPEN_MPI, "OMPI_MCA_orte_hnp_uri": "1314521088.0;tcp6://[fe80::b9b:ac5d,2620:10d::2]:43370"},
     ("[fe80::b9b:ac5d]:62880", 16, 9, (1,))),
    (GKE, ("job-0-0.sub:8482", 2, 1, None)),
    ({**GKE, **SLICES}, ("job-0-0.sub:8482", 6, 5, None)),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}, ("a:1", 4, 3, None)),
    ({"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "4", "JOB_COMPLETION_INDEX": "2"}, ("a:1", 4, 2, None)),
    ({**SLURM, "JAX_COORDINATOR_ADDRESS": "a:1"}, ("a:1", 40, 9, (1,))),
])
def test_what_schedulers_set_is_understood(environment, wanted):
    assert place_of(environment) == wanted
    assert place_of(environment, mode="off") == "one process (--distributed=off)"


@pytest.mark.parametrize("environment", [
    {}, {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, {"SLURM_NTASKS": "8"},
    {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "n[1-8]"},          # the batch script itself
    {**SLURM, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, {**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"},
    {"JOB_COMPLETION_INDEX": "2", "JAX_NUM_PROCESSES": "4"},
])
def test_alone(environment):
    assert place_of(environment).startswith("one process (")


def test_flags_win_field_by_field():
    assert place_of(SLURM, coordinator="x:5", num_processes=2, process_id=0)[:3] == ("x:5", 2, 0)
    assert place_of(SLURM, coordinator="x:5") == ("x:5", 40, 9, (1,))
    assert place_of({}, coordinator="[::1]:5", num_processes=2, process_id=1)[0] == "[::1]:5"
    assert find(Cluster("auto", "[::1]:5", 2, 1), {})[0].host == "::1"


@pytest.mark.parametrize(("flags", "environment", "said"), [
    (dict(coordinator="x:1"), {}, "needed together"),
    (dict(num_processes=2), {}, "needed together"),
    (dict(process_id=0), {}, "needed together"),
    (dict(coordinator="x:1", num_processes=2, process_id=2), {}, "--process_id=2 must be below --num_processes=2"),
    (dict(coordinator="x", num_processes=2, process_id=1), {}, "HOST:PORT"),
    (dict(coordinator="x:port", num_processes=2, process_id=1), {}, "HOST:PORT"),
    (dict(coordinator="x:70000", num_processes=2, process_id=1), {}, "HOST:PORT"),
    ({}, {"JAX_COORDINATOR_ADDRESS": "x:1"}, "JAX_NUM_PROCESSES"),
    ({}, {k: v for k, v in OPEN_MPI.items() if "uri" not in k}, "Open MPI does not tell the address of process 0"),
    ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "many"}, "SLURM_STEP_NUM_TASKS='many'"),
])
def test_what_is_half_given_is_refused(flags, environment, said):
    with pytest.raises(InputError, match=said):
        find(Cluster(**flags), environment)


@pytest.mark.parametrize(("nodes", "first"), [
    ("node001", "node001"), ("node001,host2", "node001"), ("node[001-015],b", "node001"), ("n[001,007-015]-ib,b", "n001-ib"),
    ("n[3]", "n3"),
])
def test_the_first_node(nodes, first):
    assert first_node(nodes) == first


@pytest.mark.parametrize(("name", "environment"), [("slurm", SLURM), ("ompi", OPEN_MPI)])
def test_jax_understands_the_same(monkeypatch, name, environment):
    """Where the address, number and id are concerned; a program started beside ours by JAX's own means then meets it."""
    from jax._src import clusters
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    found = clusters.ClusterEnv.auto_detect_unset_distributed_params(None, None, None, None, name, 5)
    assert place_of(environment) == (*found[:3], tuple(found[3]))


class Metadata(http.server.BaseHTTPRequestHandler):
    """A TPU VM's metadata server."""

    attributes: dict[str, str] = {}

    def do_GET(self):
        key = self.path.rsplit("/", 1)[1]
        known = self.headers["Metadata-Flavor"] == "Google" and key in self.attributes
        self.send_response(200 if known else 404)
        self.end_headers()
        self.wfile.write(self.attributes.get(key, "").encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def tpu_vm(monkeypatch):
    """tpu_vm(attributes) -> the environment of a TPU VM with this metadata."""
    monkeypatch.setattr(cluster.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()

    def start(attributes):
        monkeypatch.setattr(Metadata, "attributes", attributes)
        return {"GCE_METADATA_IP": f"127.0.0.1:{server.server_port}"}
    yield start
    server.shutdown()
    server.server_close()


def test_a_tpu_vm_asks_its_metadata(tpu_vm):
    two = {"agent-worker-number": "1", "worker-network-endpoints": "w0:8470:10.0.0.1,w1:8470:10.0.0.2",
           "tpu-env": "ACCELERATOR_TYPE: 'v5p-16'\nWORKER_ID: '1'\n"}
    assert place_of(tpu_vm(two)) == ("10.0.0.1:8482", 2, 1, None)
    slices = "MEGASCALE_COORDINATOR_ADDRESS: '10.1.0.1'\nMEGASCALE_NUM_SLICES: '2'\nMEGASCALE_SLICE_ID: '1'\n"
    assert place_of(tpu_vm({**two, "tpu-env": slices})) == ("10.1.0.1:8482", 4, 3, None)
    one = {"agent-worker-number": "0", "worker-network-endpoints": "w0", "tpu-env": ""}
    assert place_of(tpu_vm(one)) == "one process (a TPU of one host)"
    assert place_of(tpu_vm({})) == "one process (a TPU, and no metadata that tell of others)"
    # Flags need no metadata, nor does a TPU that may not be used.
    environment = {"GCE_METADATA_IP": "127.0.0.1:1"}
    assert place_of(environment, coordinator="x:1", num_processes=2, process_id=0)[:3] == ("x:1", 2, 0)
    assert place_of({**tpu_vm(two), "JAX_PLATFORMS": "cpu"}) == "one process (no cluster seen)"


def test_a_machine_without_metadata_does_not_wait_long(tpu_vm, monkeypatch):
    monkeypatch.setattr(cluster, "METADATA_TRIES", 1)
    tpu_vm({})
    assert "no metadata" in place_of({"GCE_METADATA_IP": "127.0.0.1:1"})
