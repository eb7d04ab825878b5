"""The commands' arguments are those of the design's table: what a user types does not drift."""

from __future__ import annotations

import importlib

import pytest

from neo.__main__ import commands
from neo.cli import REQUIRED, Command, help_text

# prog -> argument -> default (REQUIRED where it must be given). Commands may have more, not less.
TABLE = {
    "neo.train": {"config": REQUIRED, "workdir": "", "print_config": False, "distributed": "auto", "coordinator": "",
                  "num_processes": 0, "process_id": -1, "json": False},
    "neo.data.prepare": {"input": None, "out": None, "source": None, "tokenizer": None, "text_field": "text", "id_field": None,
                         "prompt_field": "", "group_field": "", "tokens_field": "", "validation": 0.001, "seed": 0,
                         "workers": None, "on_bad_text": "replace", "packing": "concatenate", "seq_len": 0, "fim_spm_rate": 0.5,
                         "reverse": "", "canaries": "", "variants": 1, "seqio_mixture": "", "module": "", "split": "train",
                         "feature": "targets", "overwrite": False, "demo": False},
    "neo.data.tokenizer train": {"input": REQUIRED, "out": REQUIRED, "vocab_size": 64000, "preset": "default", "weights": (),
                                 "pad_vocab_to": 0, "sample_bytes": 200_000_000, "overwrite": False},
    "neo.data.tokenizer import": {"file": REQUIRED, "out": REQUIRED, "pad_vocab_to": 0, "no_bos": False},
    "neo.data.tokenizer report": {"tokenizer": REQUIRED, "input": REQUIRED, "language_field": "", "json": False},
    "neo.data.inspect": {"store": None, "config": None, "phase": "", "samples": 3, "chars": 400, "all": False, "out": None,
                         "verify": False, "json": False},
    "neo.data.trace": {"workdir": REQUIRED, "step": None, "row": None, "document": "", "full": False, "store": "",
                       "json": False},
    "neo.convert from-hf": {"src": REQUIRED, "out": REQUIRED, "revision": "", "overwrite": False},
    "neo.convert to-hf": {"checkpoint": REQUIRED, "out": REQUIRED, "dtype": "bf16", "shard_size": "5GB", "all": False,
                          "model_type": "auto", "repeat_kv": False, "overwrite": False},
    "neo.convert to-gguf": {"checkpoint": REQUIRED, "out": REQUIRED, "type": "q8_0", "gguf_arch": "auto", "overwrite": False},
    "neo.convert average": {"checkpoint": REQUIRED, "out": REQUIRED, "weights": "", "last": 0, "overwrite": False},
    "neo.convert verify": {"checkpoint": REQUIRED, "export": REQUIRED, "json": False},
    "neo.plan": {"config": None, "topology": REQUIRED, "search": False, "candidates": 8, "phase": "", "scaling": (),
                 "flags": "", "out": "", "json": False},
    "neo.infer": {"checkpoint": REQUIRED, "prompt": None, "max_new_tokens": 128, "temperature": 0.8, "top_k": 0, "top_p": 1.0,
                  "seed": 0, "json": False},
}
# Worked out when the command runs, or either optional or needed by other arguments: only their presence is held.
LATE = {"out", "source", "tokenizer", "id_field", "workers", "prompt", "input", "config"}


def declared(name: str) -> Command:
    prog, _, verb = name.partition(" ")
    assert prog in commands(), f"python -m neo does not list {prog}"
    for module in (prog, f"{prog}.__main__"):
        command = getattr(importlib.import_module(module), "COMMAND", None)
        if command is not None:
            return command.verbs[verb] if verb else command
    raise AssertionError(f"{prog} declares no COMMAND")


@pytest.mark.parametrize("name", TABLE)
def test_arguments_and_defaults(name):
    command = declared(name)
    arguments = {argument.key: argument for argument in command.arguments}
    for key, default in TABLE[name].items():
        assert key in arguments, f"{name} lacks --{key}"
        if key not in LATE:
            argument = arguments[key]
            assert (REQUIRED if argument.required else argument.start_value()) == default, f"{name} --{key}"
    text = help_text(command)
    assert all(f"--{key}" in text or key.upper() in text for key in TABLE[name])


def test_which_commands_take_config_overrides():
    takes = [name for name, command in commands().items() if command.takes_overrides]
    assert takes == ["neo.data.inspect", "neo.train", "neo.plan"]
