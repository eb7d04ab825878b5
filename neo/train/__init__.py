"""Training: `python -m neo.train`, or `neo.train.run(config, workdir=...)` from Python."""

from __future__ import annotations

from typing import Any

__all__ = ["Run", "run"]


def __getattr__(name: str) -> Any:
    # Lazily: `python -m neo.train --help` must not import jax.
    if name == "run":
        from neo.train.runner import run
        return run
    if name == "Run":
        from neo.train.workdir import Run
        return Run
    raise AttributeError(f"module 'neo.train' has no attribute {name!r}")
