"""neo: an open LLM pre-training stack, JAX first.

    cfg = neo.config.load("neo_demo", {"train.steps": 20})
    run = neo.train.run(cfg, workdir="runs/try")         # neo.Run(workdir) looks at it from outside
    model = neo.load("runs/try")                         # any workdir or checkpoint
    model.generate("import ", max_new_tokens=50)

Mistakes in the input raise `neo.InputError` with one clear line. Everything is loaded when first used, so that
`import neo` takes milliseconds and never imports jax.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from typing import Any

from neo.errors import InputError, NeoError, RestartSafe, StoppedForPerson

__version__ = "0.1.0"

DISTRIBUTION = "neo-pretrain"  # `neo` on the package index is an unrelated project with the same import name

_PACKAGES = ("config", "data", "eval", "infer", "kernels", "models", "parallel", "train")
_NAMES = {"Run": "neo.train", "load": "neo.infer"}

__all__ = ["InputError", "NeoError", "RestartSafe", "Run", "StoppedForPerson", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"neo.{name}")
    if name in _NAMES:
        value = getattr(importlib.import_module(_NAMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'neo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_PACKAGES, *_NAMES})


def _foreign_neo() -> str | None:
    """One line about the unrelated distribution called `neo` if this environment has it, else None.

    Both put a folder `neo` in site-packages. Installed there together, their files mix and the later `__init__.py`
    wins; beside an editable install the unrelated one wins everywhere but in the clone's own folder.
    """
    try:
        version = importlib.metadata.version("neo")
    except importlib.metadata.PackageNotFoundError:
        return None
    return (f"neo: the unrelated package 'neo' {version} is installed here too and shares the import name; "
            f"`pip uninstall neo {DISTRIBUTION}`, then install {DISTRIBUTION} again")


_TOLD = "NEO_FOREIGN_PACKAGE_TOLD"  # in the environment, so that worker processes do not say it again
if _TOLD not in os.environ and (_foreign := _foreign_neo()):
    os.environ[_TOLD] = "1"
    print(_foreign, file=sys.stderr)
