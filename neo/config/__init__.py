"""Configs: a Python file with `get_config()` -> frozen, validated dataclasses.

    cfg = neo.config.load("neo_demo", {"train.steps": 20, "phases.main.global_batch": 8})

A config file sets what differs from the defaults:

    from neo.config import new, phase

    def get_config():
        c = new()
        c.model.update(num_layers=4, d_model=256, num_heads=8, num_kv_heads=4, d_ff=688, vocab_size=4096)
        c.phases = [phase("main", tokens=2e6, seq_len=256, global_batch=16, mixture=dict(code=1.0))]
        return c
"""

from neo.config.load import find, from_dict, known, load, new, phase, to_dict
from neo.config.schema import Config, ModelConfig, PhaseConfig

__all__ = ["Config", "ModelConfig", "PhaseConfig", "find", "from_dict", "known", "load", "new", "phase", "to_dict"]
