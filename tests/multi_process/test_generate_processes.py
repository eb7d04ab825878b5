"""Generating in a run of two processes: both ask for the same, both get what one device gives."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from neo.config.schema import MeshConfig, ModelConfig

ROOT = Path(__file__).resolve().parents[2]
MODEL = ModelConfig(vocab_size=64, num_layers=1, d_model=16, num_heads=2, num_kv_heads=1, d_ff=24, max_seq_len=64)
PROMPTS = [[5, 6, 7], list(range(2, 30)), [9]]
SETTINGS = dict(max_new_tokens=8, eod_id=None, temperature=1.0, top_k=30, seed=1)


def generate_on(mesh_config: MeshConfig | None) -> list[list[int]]:
    import jax

    from neo.infer.generate import generate
    from neo.models.decoder import Decoder
    from neo.parallel.mesh import make_mesh
    from neo.parallel.rules import Layout
    layout = Layout() if mesh_config is None else Layout(make_mesh(mesh_config))
    decoder = Decoder(MODEL, layout=layout)
    place = {} if layout.mesh is None else {"out_shardings": layout.shardings(decoder.axes())}
    params = jax.jit(lambda: decoder.init(jax.random.key(0), 0.2), **place)()
    return generate(decoder, params, PROMPTS, **SETTINGS)


def work(coordinator: str, process: int) -> None:
    """One of the two processes, with two devices."""
    import jax

    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(coordinator, num_processes=2, process_id=process)
    assert (jax.process_count(), jax.device_count()) == (2, 4)
    print(json.dumps(generate_on(MeshConfig(fsdp=4))))


def test_both_processes_get_the_result():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
                   "PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([sys.executable, __file__, f"127.0.0.1:{port}", str(process)], env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for process in range(2)]
    try:
        found = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (_, err) in zip(started, found, strict=True):
        assert process.returncode == 0, err[-3000:]
    first, second = (json.loads(out.splitlines()[-1]) for out, _ in found)
    assert first == second == generate_on(None)


if __name__ == "__main__":
    work(sys.argv[1], int(sys.argv[2]))
