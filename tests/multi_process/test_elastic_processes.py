"""A run that moves from 1 to 2, 4 and 8 processes: each takes up the data state of the one before, row for row.

The stretch of steps has a batch ramp, a ramp of weights, a border of phases with another sequence length, an amendment
made on a resume, and a source that begins its second epoch.
"""

from __future__ import annotations

import dataclasses
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
from neo.data.store_writer import write_source

ROOT = Path(__file__).resolve().parents[2]
LEGS = ((1, 0, 5), (2, 5, 11), (4, 11, 16), (8, 16, 22))  # processes, first step, last step
AMENDED_AT = 11
PHASES = (
    PhaseConfig(name="one", tokens=8 * 16 * 12, seq_len=16, global_batch=16, batch_ramp=(8,), batch_ramp_tokens=16 * 8 * 4,
                mixture={"a": 3.0, "b": 1.0}, mixture_end={"a": 1.0, "b": 3.0}),
    PhaseConfig(name="two", tokens=24 * 8 * 14, seq_len=24, global_batch=8, mixture={"a": 1.0, "b": 1.0, "c": 2.0}),
)


def write_store(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for name, documents in (("a", 60), ("b", 90), ("c", 24)):
        texts = [(f"{name}{i}", draw.integers(4, 100, int(draw.integers(3, 50))).tolist()) for i in range(documents)]
        write_source(str(folder / name), name, {"train": texts}, vocab_size=100, eod_id=3, tokenizer_sha256="f" * 64)


def open_data(store: str, first_step: int, saved: dict | None) -> TrainData:
    """The run's data as a process that begins at this step opens it."""
    config = Config(name="x", model=ModelConfig(vocab_size=100), data=DataConfig(store=store), phases=PHASES)
    if first_step >= AMENDED_AT:
        two = dataclasses.replace(PHASES[1], mixture={"a": 1.0, "b": 5.0, "c": 2.0})
        config = dataclasses.replace(config, phases=(PHASES[0], two),
                                     data=dataclasses.replace(config.data, amend=first_step == AMENDED_AT))
    return TrainData(config, open_sources(config), saved)


def work(coordinator: str, processes: int, process: int, store: str, state: str, first: int, last: int, out: str) -> None:
    """One process of one leg: writes the rows that its devices hold, and (the first one) the state it leaves."""
    import jax

    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)
    assert (jax.process_count(), jax.device_count()) == (processes, 8)
    data = open_data(store, first, json.loads(Path(state).read_text()) if first else None)
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("fsdp",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    found = {}
    for step in range(first, last):
        batch = data.batch(step, sharding)
        for name, value in batch.items():
            for shard in value.addressable_shards:
                for row, content in zip(range(*shard.index[0].indices(value.shape[0])), np.asarray(shard.data), strict=True):
                    found[f"{step}/{row}/{name}"] = np.asarray(content)
    np.savez(out, **found)
    if process == 0:
        Path(f"{state}.next").write_text(json.dumps(data.state(last)))
    if processes > 1:
        jax.distributed.shutdown()


@pytest.fixture(scope="module")
def legs(tmp_path_factory):
    """(store, rows of every leg, states by step)."""
    folder = tmp_path_factory.mktemp("elastic")
    write_store(folder / "store")
    state, rows, states = folder / "state.json", {}, {}
    for processes, first, last in LEGS:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            coordinator = f"localhost:{free.getsockname()[1]}"
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT),
                       "XLA_FLAGS": f"--xla_force_host_platform_device_count={8 // processes}"}
        workers, logs = [], []
        for process in range(processes):
            logs.append(folder / f"{first}-{process}.log")
            command = [sys.executable, __file__, coordinator, processes, process, folder / "store", state, first, last,
                       folder / f"{first}-{process}.npz"]
            with logs[-1].open("w") as log:
                workers.append(subprocess.Popen(list(map(str, command)), env=environment, cwd=ROOT, stdout=log, stderr=log))
        try:
            for worker in workers:
                worker.wait(150)
        finally:
            for worker in workers:
                worker.kill()
        for worker, log in zip(workers, logs, strict=True):
            assert worker.returncode == 0, log.read_text()[-4000:]
        for process in range(processes):
            with np.load(folder / f"{first}-{process}.npz") as file:
                rows |= dict(file)
        Path(f"{state}.next").replace(state)
        states[last] = json.loads(state.read_text())
    return str(folder / "store"), rows, states


def test_the_stream_is_that_of_one_process(legs):
    store, rows, states = legs
    never_moved = open_data(store, 0, None)
    amended = open_data(store, AMENDED_AT, states[AMENDED_AT])
    assert len(amended.order.spans) >= 10 and {span.seq_len for span in amended.order.spans} == {16, 24}
    assert max(amended.order.address(i).epoch for i in range(amended.order.num_sequences)) > 0
    seen = 0
    for step in range(22):
        data = never_moved if step < AMENDED_AT else amended
        batch = data.host_batch(step)
        for name, value in batch.items():
            for row, content in enumerate(value):
                np.testing.assert_array_equal(rows[f"{step}/{row}/{name}"], content, err_msg=f"{step}/{row}/{name}")
                seen += 1
    assert seen == len(rows)


def test_the_amendment_changed_what_came_after_it_and_is_in_the_state(legs):
    store, _, states = legs
    assert states[5]["amendments"] == [] and states[AMENDED_AT]["amendments"] == []
    [amendment] = states[16]["amendments"]
    assert (amendment["step"], amendment["phase"]) == (AMENDED_AT, "two") and states[22]["amendments"] == [amendment]
    before, after = open_data(store, 0, None), open_data(store, 16, states[16])
    border = before.order.first_index(AMENDED_AT)
    assert [before.order.address(i) for i in range(border)] == [after.order.address(i) for i in range(border)]
    assert any(before.order.address(i) != after.order.address(i) for i in range(border, before.order.num_sequences))


if __name__ == "__main__":
    work(sys.argv[1], *map(int, sys.argv[2:4]), *sys.argv[4:6], *map(int, sys.argv[6:8]), sys.argv[8])
