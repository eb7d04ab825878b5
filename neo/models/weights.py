"""Parameters that lie somewhere on disk, read a slice at a time: what conversion, import and averaging share."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from neo.config.schema import ModelConfig

LAYERS = "layers/"


class Weights(Protocol):
    """The parameters of one model by neo's names ("layers/attention/query"), wherever they come from.

    Nothing is read before it is asked for, and nothing is kept: a model of any size passes through a few layers' memory.
    """

    config: ModelConfig

    def dtype(self, path: str) -> np.dtype:
        """The type the parameter is stored in (bfloat16 is ml_dtypes')."""

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One parameter in its stored type and neo's layout.

        Args:
            path: a name of `parameter_shapes`.
            layer: of a path under layers/, one block's slice without the L axis; None reads the whole stack.
        """


def parameter_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every parameter by path, in the order of the tree; those under layers/ with their leading L."""
    import jax

    from neo.models.decoder import Decoder
    leaves = jax.tree_util.tree_flatten_with_path(Decoder(config).abstract_params())[0]
    return {"/".join(key.key for key in path): tuple(leaf.shape) for path, leaf in leaves}
