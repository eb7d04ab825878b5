"""Joining other processes: what JAX is told, what is agreed on. Meeting: test_rendezvous; with training: multi_process/."""

from __future__ import annotations

import contextlib
import signal

import jax
import pytest

from neo.errors import InputError
from neo.parallel import distributed, rendezvous, watch
from neo.parallel.cluster import Cluster
from neo.parallel.distributed import agreement, any_process, check_shared, join, smallest

SLURM = {"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_NUM_TASKS": "8", "SLURM_PROCID": "3",
         "SLURM_LOCALID": "3", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}


class FakeChannel:
    """Of a process that nobody watches."""

    def __init__(self):
        self.failed = []

    @contextlib.contextmanager
    def failures(self):
        try:
            yield
        except BaseException as error:
            self.failed.append(error)
            raise


@pytest.fixture
def joined(monkeypatch):
    """What join() did: how the processes met, and what JAX was told."""
    class Calls:
        met, split, initialized, channel = [], [], [], FakeChannel()

    def meet(place, facts, seconds):
        Calls.met.append((place, facts, seconds))
        return rendezvous.Meeting([f"h{i}" for i in range(place.num_processes)], {})
    Calls.met, Calls.split, Calls.initialized = [], [], []
    monkeypatch.setattr(distributed, "_channel", None)
    monkeypatch.setattr(rendezvous, "meet", meet)
    monkeypatch.setattr(watch, "split", lambda *arguments: Calls.split.append(arguments) or Calls.channel)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **arguments: Calls.initialized.append(arguments))
    return Calls


def test_alone_nothing_is_started(joined):
    assert join(Cluster(), environment={}) == "one process (no cluster seen)"
    assert join(Cluster("off"), environment=SLURM) == "one process (--distributed=off)"
    assert not joined.met and not joined.split and not joined.initialized
    with distributed.watched():
        pass


def test_a_cluster_meets_splits_and_starts_jax(joined):
    said = join(Cluster(), {"config": {"a": 1}}, join_seconds=7, heartbeat_seconds=9, environment=SLURM)
    assert said == "process 3 of 8 (h3), coordinator n1:61441, Slurm"
    [(place, facts, seconds)] = joined.met
    assert (place.process_id, facts, seconds) == (3, {"config": {"a": 1}}, 7)
    assert joined.split[0][0] == 3 and joined.split[0][2] == 9
    [told] = joined.initialized
    assert told == dict(coordinator_address="n1:61441", num_processes=8, process_id=3, cluster_detection_method="deactivate",
                        initialization_timeout=7, heartbeat_timeout_seconds=9, local_device_ids=[3],
                        shutdown_timeout_seconds=distributed.LEAVE_SECONDS)
    assert distributed.watched() is joined.channel


def test_flags_win_and_one_process_needs_no_guard(joined):
    assert "process 0 of 2" in join(Cluster("auto", "x:1234", 2, 0), environment=SLURM)
    assert joined.initialized[0]["num_processes"] == 2 and joined.initialized[0]["coordinator_address"] == "x:1234"
    assert join(Cluster("auto", "x:1234", 1, 0), environment={}) == "process 0 of 1, coordinator x:1234, flags"
    assert len(joined.met) == len(joined.split) == 1 and len(joined.initialized) == 2


def test_jax_must_accept_what_it_is_told():
    """The fakes above take anything."""
    import inspect
    known = inspect.signature(jax.distributed.initialize).parameters
    assert {"cluster_detection_method", "initialization_timeout", "heartbeat_timeout_seconds", "local_device_ids",
            "shutdown_timeout_seconds"} <= set(known)


def test_failures_of_jax_become_one_line(joined, monkeypatch):
    def fail(**_):
        raise RuntimeError("DEADLINE_EXCEEDED: barrier timed out\nmore\nlines")
    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(InputError) as caught:
        join(Cluster(), environment=SLURM)
    assert "Slurm" in str(caught.value) and "DEADLINE_EXCEEDED" in str(caught.value) and "\n" not in str(caught.value)
    assert joined.channel.failed[-1] is caught.value, "the other processes hear of it"


def test_sigterm_is_not_left_to_jax(joined, monkeypatch):
    import ctypes
    libc = ctypes.CDLL(None)
    libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: libc.signal(signal.SIGTERM, 1))   # SIG_IGN, from C
    try:
        join(Cluster("auto", "x:1234", 1, 0), environment={})
        assert libc.signal(signal.SIGTERM, 1) != 1
    finally:
        signal.signal(signal.SIGTERM, before)


def test_how_processes_agree(joined, several):
    assert agreement(3).stop(1, "SIGTERM") == "SIGTERM" and agreement(3).stop(1, "") == ""
    several(1)   # processes of a program of one's own: every third step
    agreement(3).begin(1)
    assert [agreement(3).stop(step, "") for step in (2, 3)] == ["", "SIGTERM on another process"]
    assert agreement(3).stop(3, "SIGINT") == "SIGINT"
    join(Cluster(), environment=SLURM)
    assert agreement(3) is joined.channel


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
