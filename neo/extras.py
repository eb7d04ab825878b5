"""Optional packages: import one, or say in one line how to install it."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

from neo.errors import InputError

# extra -> what it is for; setup.py says which packages each holds.
EXTRAS = {
    "tpu": "training on TPUs",
    "cuda": "training on NVIDIA GPUs",
    "cloud": "gs:// and s3:// addresses",
    "data": "seqio tasks and mixtures",
    "hf": "Hugging Face tokenizers, models and data sets",
    "gguf": "GGUF export, and running the result in llama.cpp",
    "plan": "compiling for TPUs without one",
    "aot": "compiling GPU kernels without a GPU",
    "wandb": "logging to Weights & Biases",
    "notebook": "notebooks",
    "test": "the tests",
    "parity": "the tests against transformers on torch and llama.cpp",
    "remote": "the tests against a local S3 server",
    "bench": "the benchmarks against torch",
}


def need(module: str, *, extra: str, why: str = "") -> ModuleType:
    """Import an optional module (`"transformers"`, `"google.cloud.storage"`) and return it.

    Raises InputError naming the missing package and its install line; `why` says what needs it
    ("reading .bin tokenizers"). An installed package that fails to import keeps its own error.
    """
    if extra not in EXTRAS:
        raise ValueError(f"no extra called {extra!r}: {', '.join(EXTRAS)}")
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != module.split(".")[0]:
            raise  # it is there; something it needs is not
        purpose = why or EXTRAS[extra]
        raise InputError(f"{purpose} needs the package {module.split('.')[0]!r}, which is not installed: "
                         f"{install_line(extra)}") from None


def install_line(extra: str) -> str:
    """The command that installs an extra, from the clone this package runs from or else from the package index."""
    clone = Path(__file__).resolve().parent.parent
    if not (clone / "setup.py").is_file():
        return f"pip install 'neo-pretrain[{extra}]'"
    return f"pip install -e '{'.' if clone == Path.cwd() else clone}[{extra}]'"
