"""More blocks than the source has: which source block each one starts from, and how added ones start."""

from __future__ import annotations

import dataclasses

import numpy as np

from neo.config.schema import ModelConfig
from neo.errors import InputError
from neo.models.weights import LAYERS, Weights


def block_map(source: int, target: int, scheme: str) -> tuple[int, ...]:
    """Source block of each of `target` blocks; what comes up a second time is an added block.

    Args:
        source: blocks there are.
        target: blocks of the model; at least as many.
        scheme: interleave: block i is source block ceil((i + 1) source / target) - 1, so that added blocks are spread
            evenly, each behind the one it repeats. From 32 to 36: 0..7 7 8..15 15 16..23 23 24..31 31, the places of
            LLaMA Pro (arXiv:2401.02415). stack: all blocks in order, then the last target - source ones again.
            none: as many blocks as there are.

    Raises InputError: fewer blocks than the source, none where more are needed, stack beyond twice the source.
    """
    if target < source:
        raise InputError(f"config.model.num_layers={target} is fewer than the {source} blocks of the source: blocks can be "
                         f"added, not taken away; use --config.model.num_layers={source} or more")
    if scheme == "none":
        if target > source:
            raise InputError(f"config.model.num_layers={target}, the source has {source} blocks; say how to add some with "
                             "--config.init.depth=interleave or stack")
        return tuple(range(source))
    if target == source:
        raise InputError(f"config.init.depth={scheme} adds blocks, and config.model.num_layers={target} is what the source "
                         "has already; leave init.depth out, or give more layers")
    if scheme == "interleave":
        return tuple(-(-(i + 1) * source // target) - 1 for i in range(target))
    if target > 2 * source:
        raise InputError(f"config.init.depth=stack repeats the last blocks once: {source} blocks become at most {2 * source}, "
                         f"not config.model.num_layers={target}; use --config.init.depth=interleave")
    return (*range(source), *range(2 * source - target, source))


def added(blocks: tuple[int, ...]) -> tuple[bool, ...]:
    """For each block of a `block_map`, whether its source block stood at an earlier place already."""
    return tuple(source in blocks[:i] for i, source in enumerate(blocks))


def silent(config: ModelConfig) -> dict[str, float]:
    """Path -> value of the parameters that make a block add exactly nothing to the residual stream.

    Norms before the sublayers: its last matrices and their biases are zero. Norms behind them: the gains of those norms
    are zero instead; a norm of zeros would multiply the first gradients by 1 / sqrt(eps).
    """
    if config.norm_placement != "pre":
        return {f"{LAYERS}{name}_post_norm/scale": -config.norm_offset for name in ("attention", "mlp")}
    return {f"{LAYERS}{name}": 0.0
            for name in ("attention/output", "attention/output_bias", "mlp/down", "mlp/down_bias")}


@dataclasses.dataclass(frozen=True)
class DeepenedWeights:
    """Weights with blocks repeated: `blocks` says which source block each one is (see `block_map`).

    With identity, added blocks are `silent`: the model computes what the source computes. Otherwise they are copies.
    Windows and positions belong to the place of a block in `config`, not to where its parameters are from.
    """

    source: Weights
    config: ModelConfig
    blocks: tuple[int, ...]
    identity: bool = False

    def dtype(self, path: str) -> np.dtype:
        """That of the source."""
        return self.source.dtype(path)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """As `Weights.read`."""
        if not path.startswith(LAYERS):
            return self.source.read(path)
        if layer is None:
            return np.stack([self.read(path, i) for i in range(len(self.blocks))])
        part = self.source.read(path, self.blocks[layer])
        fixed = silent(self.config).get(path)
        return part if fixed is None or not self.identity or not added(self.blocks)[layer] else np.full_like(part, fixed)
