"""Multipliers and gains that a class cannot hold, multiplied into the weights while they are read.

The function of the model stays the same; only where its constants live changes:

    embedding multiplier       embedding table; a tied head keeps the table as it was, so the two come apart
    residual multiplier        attention output and MLP down, or the norms after them
    attention scale            queries and their bias, or the query norm
    logit multiplier, head     final norm (not the head, so that a tied one stays tied)
    WeSaR (arXiv:2410.05052)   query, key, value, output, down: the matrix *and its bias*, as the gain follows the bias;
                               norms: their scale; the MLP's input gain: the norm before it

Products are float32, of the stored weight and one constant made in float64: converted to bfloat16 afterwards, a folded
weight is rounded once more, unless the constant is a power of two.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from neo.config.schema import ModelConfig
from neo.models.hf.classes import HFClass, default_scale, kept_multipliers
from neo.models.hf.names import leaf_shapes
from neo.models.weights import LAYERS, Weights


@dataclasses.dataclass(frozen=True)
class Factor:
    """What one parameter w becomes: (w + offset) * constant * the product of the gains - offset.

    Attributes:
        constant: the part that is known without reading anything.
        gains: paths of the scalar gains, one value per layer under layers/.
        offset: what the norm adds to w before using it (Gemma's 1), else 0.
    """

    constant: float = 1.0
    gains: tuple[str, ...] = ()
    offset: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether the product is exact in any floating-point type: a power of two alone."""
        return not self.gains and not self.offset and abs(math.frexp(self.constant)[0]) == 0.5


@dataclasses.dataclass(frozen=True)
class Fold:
    """A model after folding.

    Attributes:
        config: without what was folded; the class holds it as it is.
        factors: the parameters that change, and how.
        untied: whether the head, tied before, is now the unscaled embedding table.
    """

    config: ModelConfig
    factors: Mapping[str, Factor]
    untied: bool


def fold(config: ModelConfig, cls: HFClass) -> Fold:
    """What has to be multiplied in so that the class holds the model; nothing when it does already."""
    kept = kept_multipliers(config, cls)
    constants: dict[str, float] = {}
    gains: dict[str, tuple[str, ...]] = {}
    leaves = leaf_shapes(config)

    def multiply(path: str, constant: float) -> None:
        for leaf in (path, path + "_bias"):
            if leaf in leaves:
                constants[leaf] = constants.get(leaf, 1.0) * constant

    def gain(path: str, by: str) -> None:
        for leaf in (path, path + "_bias"):
            if leaf in leaves and by in leaves:
                gains[leaf] = (*gains.get(leaf, ()), by)

    multiply("embed/table", config.embedding_multiplier / kept["embedding_multiplier"])
    residual = config.residual_multiplier / kept["residual_multiplier"]
    after = config.norm_placement != "pre"
    for norm, matrix in (("attention_post_norm", "attention/output"), ("mlp_post_norm", "mlp/down")):
        multiply(LAYERS + (norm + "/scale" if after else matrix), residual)
    if not default_scale(config) and not kept["attention_scale"]:
        query = "attention/query" if config.qk_norm == "none" else "attention/query_norm/scale"
        multiply(LAYERS + query, config.attention_scale * math.sqrt(config.head_size))
    multiply("final_norm/scale", config.logit_multiplier / kept["logit_multiplier"])

    wesar = config.wesar and not cls.wesar
    if wesar:
        for name in ("query", "key", "value", "output"):
            gain(f"{LAYERS}attention/{name}", f"{LAYERS}attention/{name}_gain")
        gain(LAYERS + "mlp/down", LAYERS + "mlp/down_gain")
        for norm in (LAYERS + "attention_norm", LAYERS + "mlp_norm", "final_norm"):
            gain(norm + "/scale", norm + "/gain")
        gain(LAYERS + "mlp_norm/scale", LAYERS + "mlp/input_gain")
        gain("final_norm/scale", "head/gain")

    def factor(path: str) -> Factor:
        offset = config.norm_offset if path.endswith("/scale") else 0.0
        return Factor(constants.get(path, 1.0), gains.get(path, ()), offset)

    factors = {path: factor(path) for path in leaves if constants.get(path, 1.0) != 1.0 or path in gains}
    untied = config.tied_embeddings and "embed/table" in factors
    folded = dataclasses.replace(config, **kept, wesar=config.wesar and not wesar,
                                 tied_embeddings=config.tied_embeddings and not untied)
    return Fold(folded, factors, untied)


class FoldedWeights:
    """Weights after `fold`: what changes is multiplied as it is read, everything else passes through as stored.

    Folded parameters are float32, whatever they are stored in, except where the factor is a power of two and cannot
    round: those, and all others, keep their type.
    """

    def __init__(self, weights: Weights, cls: HFClass):
        self._weights = weights
        self._fold = fold(weights.config, cls)
        self.config = self._fold.config

    @property
    def folded(self) -> tuple[str, ...]:
        return tuple(self._fold.factors)

    def dtype(self, path: str) -> np.dtype:
        """The type `read` gives."""
        stored = self._weights.dtype("embed/table" if self._is_old_head(path) else path)
        factor = self._fold.factors.get(path)
        return stored if factor is None or _stays(factor, stored) else np.dtype(np.float32)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One parameter in neo's layout, folded; see `Weights.read`."""
        if self._is_old_head(path):
            return self._weights.read("embed/table").T
        array = self._weights.read(path, layer)
        factor = self._fold.factors.get(path)
        if factor is None:
            return array
        constant = np.asarray(factor.constant, np.float64)
        for by in factor.gains:     # [] or, for a whole stack, [L]
            constant = constant * np.asarray(self._weights.read(by, layer if by.startswith(LAYERS) else None), np.float64)
        dtype = self.dtype(path)
        out = array.astype(np.promote_types(dtype, np.float32))     # a copy, changed in place: large matrices pass here
        constant = constant.astype(out.dtype).reshape(constant.shape + (1,) * (out.ndim - constant.ndim))
        if factor.offset:
            out += np.float32(factor.offset)
        out *= constant
        if factor.offset:
            out -= np.float32(factor.offset)
        return out.astype(dtype, copy=False)

    def _is_old_head(self, path: str) -> bool:
        return self._fold.untied and path == "head/kernel"


def _stays(factor: Factor, stored: np.dtype) -> bool:
    """Whether the product fits the stored type exactly (float16 has too few exponents to promise it)."""
    return factor.exact and stored != np.float16


class RepeatedKV:
    """Weights with the key/value heads repeated until there is one per query head, for classes without grouped heads.

    The function stays exactly the same; keys, values and a decoder's cache become H / K times larger.
    """

    def __init__(self, weights: Weights):
        self._weights = weights
        self._times = weights.config.num_heads // weights.config.num_kv_heads
        self.config = dataclasses.replace(weights.config, num_kv_heads=weights.config.num_heads)

    def dtype(self, path: str) -> np.dtype:
        """The type it is stored in."""
        return self._weights.dtype(path)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One parameter in neo's layout; see `Weights.read`."""
        array = self._weights.read(path, layer)
        name = path.removeprefix(LAYERS + "attention/")
        # The norm over all key heads together has a gain per head, and the mean square of repeated heads is the same.
        if name in ("key", "value", "key_bias", "value_bias") or (name == "key_norm/scale" and self.config.qk_norm == "full"):
            return np.repeat(array, self._times, axis=-2)
        return array
