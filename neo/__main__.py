"""`python -m neo`: the commands there are, one line each."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util

from neo import __version__
from neo.cli import Command, Namespace, main

# In the order of a user's work. A name counts as a command once its module declares COMMAND.
NAMES = (
    "neo.data.prepare",
    "neo.data.tokenizer",
    "neo.data.inspect",
    "neo.data.trace",
    "neo.train",
    "neo.train.report",
    "neo.train.compare",
    "neo.train.checkpoints",
    "neo.infer",
    "neo.eval",
    "neo.align",
    "neo.convert",
    "neo.plan",
    "neo.plan.hparams",
    "neo.curate",
    "neo.audit",
)

COMMAND = Command(
    prog="neo",
    summary="List neo's commands.",
    examples=("python -m neo", "python -m neo.train --help"),
)


def commands() -> dict[str, Command]:
    """Name -> declaration of every command of this installation; other modules are not imported."""
    found = {}
    for name in NAMES:
        module = _module_of(name)
        if module is not None:
            found[name] = importlib.import_module(module).COMMAND
    return found


def _module_of(name: str) -> str | None:
    """The module that `python -m NAME` runs, if it declares a command."""
    try:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(f"{name}.__main__")
    except ModuleNotFoundError:  # the package it would be in is not there
        return None
    if spec is None or not isinstance(spec.loader, importlib.abc.InspectLoader):
        return None
    source = spec.loader.get_source(spec.name) or ""
    return spec.name if "\nCOMMAND = " in source else None


def run(args: Namespace) -> None:
    """Print the table."""
    print(f"neo {__version__}: an open LLM pre-training stack\n")
    table = commands()
    width = max(map(len, table), default=0)
    for name, command in table.items():
        print(f"  python -m {name:<{width}}  {command.summary}")
    print("\nEach answers to --help. docs/quickstart.md goes through them.")


if __name__ == "__main__":
    main(COMMAND, run)
