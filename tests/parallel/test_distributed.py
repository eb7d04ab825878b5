"""Joining other processes: what is seen, what is refused, what is agreed on. With real processes: multi_process/."""

from __future__ import annotations

import socket

import jax
import pytest

from neo.errors import InputError
from neo.parallel import distributed
from neo.parallel.distributed import Cluster, any_process, check_shared, join, smallest


@pytest.fixture
def initialized(monkeypatch):
    """Arguments that jax.distributed.initialize was called with."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: calls.append(arguments))
    return calls


@pytest.mark.parametrize(("environment", "seen"), [
    ({}, ""),
    ({"TPU_WORKER_HOSTNAMES": "t1v-n-0"}, ""),
    ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2"}, "TPU pod"),
    ({"MEGASCALE_COORDINATOR_ADDRESS": "10.0.0.1"}, "TPU slices"),
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, ""),
    ({"SLURM_NTASKS": "8"}, ""),   # salloc without srun
    ({"SLURM_NTASKS": "8", "SLURM_PROCID": "3"}, "Slurm"),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
    ({"JAX_COORDINATOR_ADDRESS": "x:1"}, "JAX_COORDINATOR_ADDRESS"),
])
def test_clusters_are_seen_by_their_environment(initialized, environment, seen):
    said = join(Cluster(), environment)
    assert (f"({seen})" in said and len(initialized) == 1) if seen else (said.startswith("one process") and not initialized)
    assert "off" in join(Cluster("off"), environment) and len(initialized) == bool(seen)


def test_explicit_addresses_win(initialized):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    said = join(Cluster("auto", f"localhost:{port}", 2, 0), {"SLURM_NTASKS": "8", "SLURM_PROCID": "3"})
    assert said == f"process 0 of 2, coordinator localhost:{port}"
    assert initialized[0]["num_processes"] == 2 and initialized[0]["coordinator_address"] == f"localhost:{port}"


@pytest.mark.parametrize("cluster", [Cluster(coordinator="x:1"), Cluster(num_processes=2), Cluster(process_id=0),
                                     Cluster(coordinator="x:1", num_processes=2), Cluster("auto", "x:1", 2, 2),
                                     Cluster("auto", "x", 2, 1), Cluster("auto", "x:port", 2, 1)])
def test_what_is_half_given_is_refused(initialized, cluster):
    with pytest.raises(InputError, match="--"):
        join(cluster, {})
    assert not initialized


def test_failures_of_jax_become_one_line(monkeypatch):
    def fail(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: barrier timed out\nmore\nlines")
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(InputError) as caught:
        join(Cluster(), {"SLURM_NTASKS": "8", "SLURM_PROCID": "3"})
    assert "Slurm" in str(caught.value) and "DEADLINE_EXCEEDED" in str(caught.value) and "\n" not in str(caught.value)


def test_one_process_needs_no_agreement(tmp_path):
    assert smallest(5) == 5 and smallest(None) is None
    assert any_process(True) and not any_process(False)
    check_shared(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def several(monkeypatch):
    """Pretend that there are processes whose values are these."""
    def pretend(*values):
        import numpy as np
        from jax.experimental import multihost_utils
        monkeypatch.setattr(jax, "process_count", lambda: len(values) + 1)
        monkeypatch.setattr(multihost_utils, "process_allgather", lambda own: np.array([own, *values]))
    return pretend


def test_the_least_memory_counts(several):
    several(100, 16_000)
    assert smallest(32 << 30) == 100 << 20
    several(16_000, -1)
    assert smallest(32 << 30) is None
    several(64_000)
    assert smallest((32 << 30) + 12345) == 32 << 30


def test_devices_names_the_platform_that_is_missing(monkeypatch):
    def missing():
        raise RuntimeError("Unable to initialize backend 'tpu': no libtpu\nand more")
    monkeypatch.setattr(jax, "devices", missing)
    monkeypatch.setenv("JAX_PLATFORMS", "tpu")
    with pytest.raises(InputError) as caught:
        distributed.devices()
    assert "JAX_PLATFORMS='tpu'" in str(caught.value) and "\n" not in str(caught.value)


def test_a_tpu_host_asks_jax_for_the_others(initialized, monkeypatch):
    monkeypatch.setattr(distributed.glob, "glob", lambda pattern: ["/dev/accel0"] if "accel" in pattern else [])
    assert join(Cluster(), {}) == "joined the TPU's hosts" and len(initialized) == 1
    assert join(Cluster(), {"JAX_PLATFORMS": "cpu"}) == "one process (no cluster seen)" and len(initialized) == 1

    def alone(**_):
        raise ValueError("coordinator_address should be defined.")
    monkeypatch.setattr(jax.distributed, "initialize", alone)
    assert join(Cluster(), {}).startswith("one process (a TPU without a cluster")
