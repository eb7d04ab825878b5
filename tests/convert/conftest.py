"""Tiny runs with random parameters and a real tokenizer, saved as training saves them, and the command line."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from neo.config.schema import Config, EvalConfig, ModelConfig, PhaseConfig

VOCAB = 300
ROWS = VOCAB + 20     # rows of padding past the tokenizer's ids, as real models have them
WINDOW = 40


@pytest.fixture(scope="session")
def tokenizer():
    pytest.importorskip("tokenizers")   # to-hf writes tokenizer.json
    from neo.data.tokenizer_training import train
    sentence = "the quick brown fox jumps over the lazy dog while seven grey geese look on from afar"
    words = sentence.split()
    return train([" ".join(words[i % 17:] + words[:i % 17]) + f" {i}\n" for i in range(60)], VOCAB)


def tiny_config(**changes) -> Config:
    shape = dict(vocab_size=ROWS, num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=160,
                 windows=(WINDOW,))
    phases = (PhaseConfig(name="short", tokens=1000, seq_len=32, global_batch=2, mixture={"web": 3.0, "code": 1.0}),
              PhaseConfig(name="long", tokens=1000, seq_len=64, global_batch=2, mixture={"web": 1.0}, rope_base=500.0))
    return Config(name="tiny", model=ModelConfig(**{**shape, **changes}), phases=phases, eval=EvalConfig(tokens=1000))


@functools.lru_cache(maxsize=8)
def parameters(model: ModelConfig, seed: int) -> dict:
    """Random parameters in which every one shows: norm gains are not all 1, biases not 0."""
    from neo.models.weights import parameter_shapes
    draw, tree = np.random.default_rng(seed), {}
    for path, shape in parameter_shapes(model).items():
        *folders, name = path.split("/")
        place = tree
        for folder in folders:
            place = place.setdefault(folder, {})
        mean = 1.0 if name == "scale" or name.endswith("gain") else 0.0
        place[name] = jax.numpy.asarray(mean + 0.2 * draw.standard_normal(shape), jax.numpy.float32)
    return tree


def save(workdir: Path, config: Config, tokenizer, steps=(3,), phase="short", synthetic=False) -> Path:
    """A workdir with a checkpoint per step (100M tokens each), every one of other parameters."""
    from neo.config import to_dict
    from neo.train.checkpoints import Checkpoints
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / "config.json").write_text(json.dumps(to_dict(config)))
    checkpoints = Checkpoints(workdir, len(steps))
    for step in steps:
        params = parameters(config.model, step)
        state = {"params": params, "opt": {"count": jax.numpy.zeros((), jax.numpy.int32)}, "step": step}
        data = {"step": step, "tokens": step * 100_000_000, "phase": phase, "synthetic": synthetic, "order": {}}
        checkpoints.save(state, data, config, tokenizer.files() if tokenizer else {})
    checkpoints.close()
    return workdir


@pytest.fixture(scope="session")
def workdir(tmp_path_factory, tokenizer):
    """A run with checkpoints at steps 3 and 7, float32."""
    return save(tmp_path_factory.mktemp("runs") / "tiny", tiny_config(), tokenizer, (3, 7))


@pytest.fixture
def convert(invoked):
    """convert("to-hf", argument, ...) -> Ended, in this process."""
    from neo.convert.__main__ import COMMAND, run
    return lambda *argv: invoked(COMMAND, run, list(argv))
