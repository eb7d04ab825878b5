"""Contract 2 with two real processes: every device of both holds the right part of the one global batch.

`tensor` and `context` within a process and across processes: there, both processes hold (and read) the same rows,
which a split of the batch by process count gets silently wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from neo.config.schema import Config, DataConfig, ModelConfig, PhaseConfig
from neo.data.loader import TrainData, open_sources

ROOT = Path(__file__).resolve().parents[2]
BATCH, SEQ_LEN, STEPS = 8, 32, (0, 11)
# name -> (sizes of fsdp, context, tensor; is the last axis laid across the processes)
MESHES = {
    "fsdp8": ((8, 1, 1), False),
    "fsdp4_tensor2": ((4, 1, 2), False),
    "fsdp4_tensor2_across": ((4, 1, 2), True),
    "fsdp2_tensor4_across": ((2, 1, 4), True),
    "tensor8_across": ((1, 1, 8), False),
    "fsdp2_context4_across": ((2, 4, 1), True),
}


def train_data() -> TrainData:
    phases = (PhaseConfig(name="one", tokens=BATCH * SEQ_LEN * 20, seq_len=SEQ_LEN, global_batch=BATCH,
                          mixture={"a": 1.0, "b": 2.0, "c": 0.5}),)
    config = Config(name="x", model=ModelConfig(vocab_size=1000), data=DataConfig(synthetic=True), phases=phases)
    return TrainData(config, open_sources(config))


def digest(value: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()


def work(coordinator: str, process: int, out: str) -> None:
    """One of the two processes: 4 devices, places batches on every mesh, reports what its devices hold."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=2, process_id=process)
    assert (jax.process_count(), jax.local_device_count(), jax.device_count()) == (2, 4, 8)
    data, read = train_data(), []
    order, windows = data._current

    class Noted:
        def __getitem__(self, index):
            read.append(index)
            return windows[index]

    data._current = (order, Noted())
    weighted_sum = jax.jit(lambda x: (x * (np.arange(BATCH)[:, None] * SEQ_LEN + np.arange(SEQ_LEN))).sum())
    report = {}
    for name, (sizes, across) in MESHES.items():
        devices = np.array(sorted(jax.devices(), key=lambda d: (d.process_index, d.id)))
        if across:  # neighbours along the last axis that is not 1 belong to different processes
            devices = devices.reshape(2, 4).T
        mesh = jax.sharding.Mesh(devices.reshape(sizes), ("fsdp", "context", "tensor"))
        sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp", "context"))
        for step in STEPS:
            read.clear()
            batch = data.batch(step, sharding)
            shards = {key: [[[list(i.indices(n)) for i, n in zip(s.index, value.shape, strict=True)],
                             digest(np.asarray(s.data))] for s in value.addressable_shards]
                      for key, value in batch.items()}
            report[f"{name} {step}"] = {"read": list(read), "shards": shards, "sum": int(weighted_sum(batch["inputs"]))}
    Path(out).write_text(json.dumps(report))
    jax.distributed.shutdown()


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
                   "PYTHONPATH": str(ROOT)}
    folder = tmp_path_factory.mktemp("reports")
    outs, logs = ([folder / f"{process}.{kind}" for process in range(2)] for kind in ("json", "log"))
    workers = []
    for process in range(2):
        command = [sys.executable, __file__, coordinator, str(process), str(outs[process])]
        with logs[process].open("w") as log:
            workers.append(subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log))
    try:
        for worker in workers:
            worker.wait(120)
    finally:
        for worker in workers:
            worker.kill()
    for worker, log in zip(workers, logs, strict=True):
        assert worker.returncode == 0, log.read_text()[-4000:]
    return [json.loads(out.read_text()) for out in outs]


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("name", MESHES)
def test_both_processes_hold_their_part_of_one_batch(reports, name, step):
    expected = train_data().host_batch(step)
    covered = {key: np.zeros(value.shape, bool) for key, value in expected.items()}
    for report in reports:
        held: set[int] = set()
        for key, shards in report[f"{name} {step}"]["shards"].items():
            assert len(shards) == 4
            for index, found in shards:
                place = tuple(slice(*bounds) for bounds in index)
                assert digest(expected[key][place]) == found
                covered[key][place] = True
                held.update(range(*index[0]))
        assert report[f"{name} {step}"]["read"] == [step * BATCH + row for row in sorted(held)]
    assert all(mask.all() for mask in covered.values())


@pytest.mark.parametrize("name", MESHES)
def test_a_computation_over_all_devices_sees_the_global_batch(reports, name):
    weights = np.arange(BATCH)[:, None] * SEQ_LEN + np.arange(SEQ_LEN)
    for step in STEPS:
        expected = int((train_data().host_batch(step)["inputs"] * weights).sum())
        assert [report[f"{name} {step}"]["sum"] for report in reports] == [expected] * 2


def test_rows_are_shared_exactly_where_the_mesh_says(reports):
    rows = {name: [len(report[f"{name} 0"]["read"]) for report in reports] for name in MESHES}
    assert rows == {"fsdp8": [4, 4], "fsdp4_tensor2": [4, 4], "fsdp4_tensor2_across": [8, 8],
                    "fsdp2_tensor4_across": [8, 8], "tensor8_across": [8, 8], "fsdp2_context4_across": [8, 8]}


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]), sys.argv[3])
