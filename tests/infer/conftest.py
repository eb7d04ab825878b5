"""A tiny checkpoint with random parameters and a real tokenizer, saved as training saves one."""

from __future__ import annotations

import functools

import pytest

from neo.config.schema import Config, DataConfig, ModelConfig, PhaseConfig
from neo.data.tokenizer_training import train as train_tokenizer
from neo.models.decoder import Decoder
from neo.train.checkpoints import Checkpoints
from neo.train.optimizer import Optimizer
from neo.train.step import init_state

STD = 0.2           # large enough that no two tokens are nearly equally likely
VOCAB = 300
MAX_SEQ_LEN = 200


@pytest.fixture(scope="session")
def tokenizer():
    sentence = "the quick brown fox jumps over the lazy dog while seven grey geese look on from afar"
    words = sentence.split()
    texts = [" ".join(words[i % 17:] + words[:i % 17]) + f" {i}\n" for i in range(60)]
    return train_tokenizer(texts, VOCAB)


@pytest.fixture(scope="session")
def config():
    model = ModelConfig(vocab_size=VOCAB + 20, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48,
                        max_seq_len=MAX_SEQ_LEN, windows=(5, 0))
    phases = (PhaseConfig(name="short", tokens=1000, seq_len=32, global_batch=2, mixture={"a": 1.0}),
              PhaseConfig(name="long", tokens=1000, seq_len=64, global_batch=2, mixture={"a": 1.0}, rope_base=500.0))
    return Config(name="tiny", model=model, phases=phases)


@functools.lru_cache(maxsize=1)   # drawing them compiles for seconds
def initial_state(model, optimizer_config):
    decoder = Decoder(model)
    return init_state(decoder, Optimizer(optimizer_config, decoder.axes()), 0, STD)


def write_checkpoint(workdir, config, tokenizer, step=3, phase="short", synthetic=False):
    state = initial_state(config.model, config.optimizer)
    checkpoints = Checkpoints(workdir, 2)
    data = {"step": step, "tokens": step * 100, "phase": phase, "synthetic": synthetic, "order": {}}
    checkpoints.save(state, data, config, tokenizer.files() if tokenizer else {})
    checkpoints.close()
    return state["params"]


@pytest.fixture(scope="session")
def saved(tmp_path_factory, config, tokenizer):
    """(workdir, parameters that were saved there)."""
    path = tmp_path_factory.mktemp("run")
    return path, write_checkpoint(path, config, tokenizer)


@pytest.fixture(scope="session")
def workdir(saved):
    return saved[0]


@pytest.fixture(scope="session")
def synthetic_workdir(tmp_path_factory, config):
    path = tmp_path_factory.mktemp("synthetic")
    write_checkpoint(path, Config(name="s", model=config.model, phases=config.phases, data=DataConfig(synthetic=True)),
                     None, synthetic=True)
    return path
