"""AdamW over a nested dict of parameters, with rates given per step.

The moments come from optax; neo keeps their names plain (`mu`, `nu`, `count`), so that a checkpoint's
optimizer state reads without optax.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import ScaleByAdamState

from neo.config.schema import OptimizerConfig

Tree = Any


def decays(name: str) -> bool:
    """Whether weight decay applies to a parameter of this name: to every matrix, to no norm scale, bias, scalar gain
    or attention sink.

    Decided by name: stacking over layers makes every scale a matrix, so the number of dimensions says nothing.
    """
    return name not in ("scale", "gain", "sinks") and not name.endswith(("_bias", "_gain"))


@dataclasses.dataclass(frozen=True)
class Optimizer:
    """Decoupled weight decay Adam (Loshchilov & Hutter, arXiv:1711.05101)."""

    config: OptimizerConfig
    axes: Tree   # logical axes of every parameter

    def init(self, params: Tree) -> Tree:
        """Zero moments in float32, shaped as the parameters, and the count of updates (int32)."""
        return self._adam().init(params)._asdict()

    def state_axes(self) -> Tree:
        """Logical axes of the state: moments lie where their parameters lie."""
        return {"count": (), "mu": self.axes, "nu": self.axes}

    def update(self, grads: Tree, state: Tree, params: Tree, learning_rate: jax.Array,
               weight_decay: jax.Array) -> tuple[Tree, Tree]:
        """(new parameters, new state) for gradients that are already clipped."""
        direction, new = self._adam().update(grads, ScaleByAdamState(**state))

        def move(path: tuple[Any, ...], param: jax.Array, step: jax.Array) -> jax.Array:
            return param - learning_rate * (step + weight_decay * param if decays(path[-1].key) else step)

        return jax.tree_util.tree_map_with_path(move, params, direction), new._asdict()

    def _adam(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.config.b1, self.config.b2, self.config.eps)


def global_norm(tree: Tree) -> jax.Array:
    """Euclidean norm over all leaves, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def clip_scale(norm: jax.Array, clip_norm: float) -> jax.Array:
    """Factor that brings gradients of this norm down to `clip_norm`; 1 below it, and when clip_norm is 0."""
    return jnp.where(norm > clip_norm, clip_norm / norm, 1.0) if clip_norm else jnp.ones(())
