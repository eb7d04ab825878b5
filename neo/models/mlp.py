"""The feed-forward layer."""

from __future__ import annotations

import functools

import jax
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from neo.config.schema import InitConfig, ModelConfig
from neo.models.init import deviation, filled, matrix, plus, starting_gain, times
from neo.parallel.rules import InMemory, Pin, unpinned

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
# The down projection [F, D] in memory as it is gathered, D first: where D / fsdp is no multiple of 8 (3072 / 256 = 12) the
# compiler turned it on the way, which cost more than the product.
AS_GATHERED = InMemory((1, 0), ("mlp", "gathered"), gradient=False)


class MLP(nnx.Module):
    """(activation(x gate) * (x up)) down, a gated unit such as SwiGLU (Shazeer, arXiv:2002.05202); plain without gate."""

    def __init__(self, config: ModelConfig, init: InitConfig, *, rngs: nnx.Rngs):
        d, f = config.d_model, config.d_ff
        self.activation = config.activation
        if config.mlp == "gated":
            self.gate = matrix(rngs, (d, f), ("embed", "mlp"), deviation(init, config, fan_in=d))
        self.up = matrix(rngs, (d, f), ("embed", "mlp"), deviation(init, config, fan_in=d))
        self.down = matrix(rngs, (f, d), ("mlp", "embed"), deviation(init, config, fan_in=f, residual=True))
        if config.mlp_bias:
            if config.mlp == "gated":
                self.gate_bias = filled((f,), ("mlp",), 0.0)
            self.up_bias = filled((f,), ("mlp",), 0.0)
            self.down_bias = filled((d,), ("norm",), 0.0)
        if config.wesar:
            self.input_gain = filled((), (), starting_gain(init, config))
            self.down_gain = filled((), (), starting_gain(init, config, residual=True))

    def __call__(self, x: Float[Array, "B T D"], pin: Pin = unpinned) -> Float[Array, "B T D"]:
        x = times(x, getattr(self, "input_gain", None))
        y = checkpoint_name(plus(x @ self.up[...].astype(x.dtype), getattr(self, "up_bias", None)), "mlp_up")
        activation = ACTIVATIONS[self.activation]
        if hasattr(self, "gate"):
            gate = checkpoint_name(plus(x @ self.gate[...].astype(x.dtype), getattr(self, "gate_bias", None)), "mlp_gate")
            y = activation(gate) * y
        else:
            y = activation(y)
        y = plus(y @ pin(self.down[...].astype(x.dtype), AS_GATHERED), getattr(self, "down_bias", None))
        return times(y, getattr(self, "down_gain", None))
