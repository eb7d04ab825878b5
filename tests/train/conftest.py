"""Runs of the tiny recipe, in this process or another, and what they leave behind."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest


@pytest.fixture(scope="session", autouse=True)
def shared_compile_cache(compile_cache):
    """Programs compiled in this process go to the cache of the tests."""
    import jax
    from jax.experimental.compilation_cache import compilation_cache as cache
    names = {"jax_compilation_cache_dir": str(compile_cache), "jax_persistent_cache_min_compile_time_secs": 0,
             "jax_persistent_cache_min_entry_size_bytes": -1}
    before = {name: getattr(jax.config, name) for name in names}
    for name, value in names.items():
        jax.config.update(name, value)
    cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    cache.reset_cache()


@pytest.fixture
def command(tiny, store, invoked):
    """command(workdir, **overrides) -> Ended: `python -m neo.train` on the tiny recipe, in this process."""
    from neo.train.__main__ import COMMAND, run

    def start(workdir: Path | str, *flags: str, **overrides: Any):
        fields = {"data__store": store, **overrides}
        argv = [f"--config={tiny}", f"--workdir={workdir}", *flags]
        argv += [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
        return invoked(COMMAND, run, argv)
    return start


@pytest.fixture
def spawn(tiny, store, environment):
    """spawn(workdir, **overrides) -> Popen of the same command; stderr is a pipe."""
    running = []

    def start(workdir: Path | str, script: str | None = None, **overrides: Any) -> subprocess.Popen:
        fields = {"data__store": store, **overrides}
        argv = [f"--config={tiny}", f"--workdir={workdir}"]
        argv += [f"--config.{name.replace('__', '.')}={value}" for name, value in fields.items()]
        how = ["-m", "neo.train"] if script is None else ["-c", script]
        process = subprocess.Popen([sys.executable, *how, *argv], env=environment, stderr=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True, cwd=os.path.dirname(workdir) or None)
        running.append(process)
        return process
    yield start
    for process in running:
        process.kill()
        process.wait()


@pytest.fixture(scope="session")
def saved():
    """saved(workdir, step) -> (arrays by name, data.json) of a checkpoint, read by Orbax alone."""
    from orbax.checkpoint import v1 as ocp

    from neo.train.checkpoint_format import resolve
    from neo.train.checkpoints import flatten

    def read(workdir: Path | str, step: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        checkpoint = resolve(f"{workdir}@{step}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # Orbax: the file's own sharding is used, which is what is wanted here
            loaded = ocp.load_checkpointables(checkpoint.path, {"params": None, "opt": None})
        arrays = flatten({name: loaded[name] for name in ("params", "opt")})
        return {name: np.asarray(value) for name, value in arrays.items()}, checkpoint.data()
    return read


@pytest.fixture(scope="session")
def same_end(saved):
    """Assert that two runs ended in the same state, bit by bit, and recorded the same losses."""
    from neo.train.workdir import read_records

    def check(one: Path | str, other: Path | str, step: int = 12) -> None:
        (arrays, data), (others, other_data) = saved(one, step), saved(other, step)
        assert data == other_data
        assert arrays.keys() == others.keys()
        for name, array in arrays.items():
            assert array.dtype == others[name].dtype
            np.testing.assert_array_equal(array, others[name], err_msg=name)
        losses, other_losses = ({(r["step"], name): value for r in read_records(folder) for name, value in r.items()
                                 if name.startswith(("train/", "eval/", "optim/"))} for folder in (one, other))
        assert losses == other_losses
    return check


@pytest.fixture(scope="session")
def tree_state():
    """tree_state(folder) -> name -> (size, time of change) of everything below it."""
    def look(folder: Path | str) -> dict[str, tuple[int, int]]:
        return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns)
                for path in Path(folder).rglob("*")}
    return look


@pytest.fixture(scope="session")
def random_weights():
    """random_weights(config, seed=0, dtype=float32) -> `Weights` over arrays; `.reads` lists what was read.

    Every parameter is random, gains and scales around 1, large enough that each shows in the logits.
    """
    from neo.models.weights import parameter_shapes

    @dataclasses.dataclass
    class InMemory:
        config: Any
        arrays: dict[str, np.ndarray]
        reads: list[tuple[str, int | None]] = dataclasses.field(default_factory=list)

        def dtype(self, path: str) -> np.dtype:
            return self.arrays[path].dtype

        def read(self, path: str, layer: int | None = None) -> np.ndarray:
            self.reads.append((path, layer))
            return self.arrays[path] if layer is None else self.arrays[path][layer]

    def make(config: Any, seed: int = 0, dtype: Any = np.float32) -> InMemory:
        draw, arrays = np.random.default_rng(seed), {}
        for path, shape in parameter_shapes(config).items():
            around = 1.0 - config.norm_offset if path.endswith("/scale") else 1.0 if path.endswith("gain") else 0.0
            arrays[path] = (around + 0.15 * draw.standard_normal(shape)).astype(dtype)
        return InMemory(config, arrays)
    return make


@pytest.fixture(scope="session")
def on_one_device():
    """on_one_device(weights, config) -> float32 parameters of that model, by way of `initial.place`."""
    import jax

    from neo.models.decoder import Decoder
    from neo.train.initial import place

    def put(weights: Any, config: Any) -> Any:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return place(weights, jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one),
                                           Decoder(config).abstract_params()))
    return put
