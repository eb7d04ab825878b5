"""Inference: `python -m neo.infer CHECKPOINT --prompt=TEXT`, or `neo.load(CHECKPOINT)` from Python."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jax

    from neo.infer.model import Model

__all__ = ["Model", "load"]


def load(checkpoint: str, mesh: jax.sharding.Mesh | None = None) -> Model:
    """A trained model, ready for use.

    Args:
        checkpoint: a workdir (its newest checkpoint), `workdir@STEP`, `workdir@16.78B`, a checkpoint folder, or a
            Hugging Face folder with safetensors.
        mesh: devices to spread the model over, as `neo.parallel.mesh.make_mesh` makes them. Default: the first
            device, or all of them along `fsdp` when the weights do not fit on one.

    Raises InputError: no checkpoint there, damaged, a Hugging Face class that neo does not have, or too large for the devices.
    """
    from neo.infer.model import load as load_model
    return load_model(str(checkpoint), mesh)


def __getattr__(name: str) -> Any:
    # Lazily: `python -m neo.infer --help` must not import jax.
    if name == "Model":
        from neo.infer.model import Model
        return Model
    raise AttributeError(f"module 'neo.infer' has no attribute {name!r}")
