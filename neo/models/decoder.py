"""The decoder: one Block template, parameters stacked over layers, a pure function of them.

NNX modules describe a block; everything that runs is `nnx.merge(graphdef, params)` inside plain
`jax.jit`. The parameters are a nested dict with names that do not depend on NNX internals or on the
window pattern:

    embed/table [V, D]
    layers/{attention_norm,mlp_norm}/scale [L, D]                 norm_placement pre, sandwich
    layers/{attention_post_norm,mlp_post_norm}/scale [L, D]       norm_placement post, sandwich
    layers/attention/{query [L, D, H, h], key [L, D, K, h], value [L, D, K, h], output [L, H, h, D]}
    layers/attention/{query,key,value,output}_bias, {query_norm,key_norm}/scale, sinks [L, H]
    layers/mlp/{gate [L, D, F], up [L, D, F], down [L, F, D]}     gate only when gated; {gate,up,down}_bias
    final_norm/scale [D]
    head/kernel [D, V]                                            absent when tied
    .../gain, ..._gain                                            scalars [L] or [], with wesar
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from neo.config.schema import InitConfig, ModelConfig
from neo.kernels.attention import AttentionSharding, Mask, attention
from neo.models.attention import Attend, Attention
from neo.models.cache import KVCache
from neo.models.embedding import lookup
from neo.models.init import deviation, filled, matrix, times
from neo.models.mlp import MLP
from neo.models.norm import Norm
from neo.models.position import Rotation, alibi_slopes, rotations
from neo.models.remat import rematerialise
from neo.parallel.rules import InMemory, Layout, Pin, unpinned

Params = dict[str, Any]
RESIDUAL = InMemory((0, 1, 2), ("batch", "sequence", "activation"))   # [B, T, D] as it is written


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What sets one layer of the pattern apart from another: static, so that each kind is compiled once."""

    window: int | None
    position: str


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); norms stand before the sublayer, behind it, or on both sides."""

    def __init__(self, config: ModelConfig, init: InitConfig, *, rngs: nnx.Rngs):
        self.multiplier = config.residual_multiplier
        if config.norm_placement != "post":
            self.attention_norm, self.mlp_norm = (Norm(config, gain=config.wesar) for _ in range(2))
        if config.norm_placement != "pre":
            self.attention_post_norm, self.mlp_post_norm = (Norm(config) for _ in range(2))
        self.attention = Attention(config, init, rngs=rngs)
        self.mlp = MLP(config, init, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], rotation: Rotation | None, attend: Attend,
                 pin: Pin = unpinned) -> Float[Array, "B T D"]:
        x = pin(x, RESIDUAL)
        y = self.attention(self._norm("attention_norm", x), rotation, attend, pin)
        x = x + self.multiplier * self._norm("attention_post_norm", y)
        x = checkpoint_name(pin(x, RESIDUAL), "residual_mid")
        y = self.mlp(self._norm("mlp_norm", x), pin)
        return x + self.multiplier * self._norm("mlp_post_norm", y)

    def _norm(self, name: str, x: Array) -> Array:
        norm = getattr(self, name, None)
        return x if norm is None else norm(x)


class Ends(nnx.Module):
    """What is not a block: the embedding table, the final norm and, unless tied, the output head."""

    def __init__(self, config: ModelConfig, init: InitConfig, *, rngs: nnx.Rngs):
        d, std = config.d_model, deviation(init, config, fan_in=config.d_model)
        self.embed = nnx.Dict(table=matrix(rngs, (config.vocab_size, d), ("vocab", "embed"), std))
        self.final_norm = Norm(config, gain=config.wesar)
        head = {} if config.tied_embeddings else {
            "kernel": matrix(rngs, (d, config.vocab_size), ("embed", "vocab"), std)}
        if config.wesar:
            head["gain"] = filled((), (), 1.0)
        if head:
            self.head = nnx.Dict(**head)


@functools.lru_cache(maxsize=8)
def _template(module: type, config: ModelConfig) -> tuple[Any, Params]:
    """(graphdef, logical axes as a nested dict) of a module, without allocating anything."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: module(config, InitConfig(), rngs=nnx.Rngs(0))))
    axes = jax.tree.map(lambda p: tuple(p.get_metadata("axes")), state, is_leaf=lambda x: isinstance(x, nnx.Variable))
    return graphdef, nnx.to_pure_dict(axes)


def layer_pattern(config: ModelConfig) -> tuple[LayerKind, ...]:
    """The shortest pattern of layer kinds that, repeated, gives every layer its window and position."""
    size = min(math.lcm(len(config.windows), len(config.positions)), config.num_layers)
    pairs = zip(config.layer_windows[:size], config.layer_positions[:size], strict=True)
    return tuple(LayerKind(window, position) for window, position in pairs)


def _is_axes(x: Any) -> bool:
    return isinstance(x, tuple)


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder's shape and how it is run; holds no arrays.

    Attributes:
        config: the shape.
        compute_dtype: of activations and matrix products. Parameters stay float32; norms, softmax and
            logits are computed in float32.
        remat: name of a policy in remat.py.
        attention: name of an attention implementation, already resolved.
        layout: mesh and rules; the default places nothing.
    """

    config: ModelConfig
    compute_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "auto"
    layout: Layout = Layout()

    # -- parameters ------------------------------------------------------------------------------

    def init(self, key: jax.Array, init: InitConfig | float) -> Params:
        """Draw all parameters as `init` says (a number: its std). The values do not depend on the mesh."""
        rule = init if isinstance(init, InitConfig) else InitConfig(std=init)

        def draw(module: type, key: jax.Array) -> Params:
            return nnx.to_pure_dict(nnx.state(module(self.config, rule, rngs=nnx.Rngs(params=key)), nnx.Param))

        ends_key, layers_key = jax.random.split(key)
        layers = jax.vmap(lambda k: draw(Block, k))(jax.random.split(layers_key, self.config.num_layers))
        return {**draw(Ends, ends_key), "layers": layers}

    def axes(self) -> Params:
        """Logical axes of every parameter, in the structure of the parameters."""
        layers = jax.tree.map(lambda axes: ("layers", *axes), _template(Block, self.config)[1], is_leaf=_is_axes)
        return {**_template(Ends, self.config)[1], "layers": layers}

    def abstract_params(self) -> Params:
        """Shapes and dtypes of the parameters, with shardings where the layout has a mesh."""
        shapes = jax.eval_shape(lambda: self.init(jax.random.key(0), 0.0))
        if self.layout.mesh is None:
            return shapes
        return jax.tree.map(lambda s, sharding: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
                            shapes, self.layout.shardings(self.axes()))

    # -- forward ---------------------------------------------------------------------------------

    def apply(self, params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None,
              segment_ids: Int[Array, "B T"] | None = None, rope_base: float = 0.0) -> Float[Array, "B T V"]:
        """Logits in float32. Convenience for short inputs; training takes `hidden` and a chunked loss."""
        return self.logits(params, self.hidden(params, tokens, positions, segment_ids, rope_base))

    def hidden(self, params: Params, tokens: Int[Array, "B T"], positions: Int[Array, "B T"] | None = None,
               segment_ids: Int[Array, "B T"] | None = None, rope_base: float = 0.0) -> Float[Array, "B T D"]:
        """The residual stream after the final norm, as the head takes it.

        Args:
            positions: of each token in its document, for the rotation; default 0..T-1.
            segment_ids: tokens attend only within equal ids; default one segment.
            rope_base: of the phase; 0 means the model's.
        """
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
        x = self._embed(params, tokens)
        rotation = rotations(self.config, positions, rope_base, self.layout.on_tpu)

        def block(module: Block, x: Array, kind: LayerKind, _: None) -> tuple[Array, None]:
            return module(x, rotation[kind.position], self._attend(kind, segment_ids), self.layout.pin), None

        x, _ = self._scan_layers(params, x, block)
        return self._finish(params, x)

    def logits(self, params: Params, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """Output head, accumulated in float32."""
        logits = jnp.einsum("btd,dv->btv", hidden, self.head_kernel(params), preferred_element_type=jnp.float32)
        return self.finish_logits(self.layout.constrain(logits, "batch", "sequence", "vocab"))

    def finish_logits(self, logits: Float[Array, "..."]) -> Float[Array, "..."]:
        """What follows the product with the head: multiplier and soft-cap."""
        logits = logits * self.config.logit_multiplier
        cap = self.config.logit_softcap
        return cap * jnp.tanh(logits / cap) if cap else logits

    def head_kernel(self, params: Params) -> Float[Array, "D V"]:
        """The output matrix in the compute dtype, gathered over fsdp once, split over the vocabulary."""
        if self.config.tied_embeddings:
            return self._table(params).T
        kernel = params["head"]["kernel"].astype(self.compute_dtype)
        return self.layout.gather(kernel, ("embed", "vocab"), ("gathered", "vocab"))

    def decode(self, params: Params, tokens: Int[Array, "B T"], cache: KVCache,
               rope_base: float = 0.0) -> tuple[Float[Array, "B T V"], KVCache]:
        """Append `tokens` to every sequence of the cache; logits for each of them and the longer cache.

        Sequences are not split: on a mesh with `context` > 1 its devices hold the same cache and repeat each other's work.
        """
        if self.layout.split("sequence") > 1:
            return dataclasses.replace(self, layout=self.layout.whole_sequences()).decode(params, tokens, cache, rope_base)
        positions = cache.length[:, None] + jnp.arange(tokens.shape[1])
        x = self._embed(params, tokens)
        rotation = rotations(self.config, positions, rope_base)

        def block(module: Block, x: Array, kind: LayerKind, layer: Any) -> tuple[Array, Any]:
            updated = {}

            def attend(query: Array, key: Array, value: Array, sinks: Array | None) -> Array:
                updated["layer"] = keys, values = cache.write(layer, key, value)
                keys, values = self._spread_kv(keys.astype(query.dtype)), self._spread_kv(values.astype(query.dtype))
                return attention(query, keys, values, mask=Mask(window=kind.window), q_offset=cache.length, sinks=sinks,
                                 implementation="dense", sharding=self._attention_sharding(), **self._scores(kind))

            x = module(x, rotation[kind.position], attend)
            return x, updated["layer"]

        x, layers = self._scan_layers(params, x, block, (cache.key, cache.value))
        logits = self.logits(params, self._finish(params, x))
        return logits, dataclasses.replace(cache, key=layers[0], value=layers[1], length=cache.length + tokens.shape[1])

    # -- parts -----------------------------------------------------------------------------------

    def _ends(self, params: Params) -> Ends:
        return nnx.merge(_template(Ends, self.config)[0], {k: v for k, v in params.items() if k != "layers"})

    def _table(self, params: Params) -> Float[Array, "V D"]:
        # Gathered over fsdp before use: a product with a table split along D makes the partitioner
        # rematerialise activations in full.
        table = params["embed"]["table"].astype(self.compute_dtype)
        return self.layout.gather(table, ("vocab", "embed"), ("vocab", "gathered"))

    def _embed(self, params: Params, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        x = lookup(params["embed"]["table"], tokens, self.layout, self.compute_dtype)
        return x * self.config.embedding_multiplier

    def _finish(self, params: Params, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        ends = self._ends(params)
        # YuLan-Mini's place for the head's gain: on what goes into the head, once, not on every chunk of logits.
        return times(ends.final_norm(x), ends.head["gain"] if self.config.wesar else None)

    def _scores(self, kind: LayerKind) -> dict[str, Any]:
        """What a layer of this kind does to its attention scores."""
        config, options = self.config, {}
        if config.attention_scale:
            options["scale"] = config.attention_scale
        if config.attention_softcap:
            options["softcap"] = config.attention_softcap
        if kind.position == "alibi":
            options["alibi_slopes"] = jnp.asarray(alibi_slopes(config.num_heads, config.alibi_bias_max))
        return options

    def _attention_sharding(self) -> AttentionSharding | None:
        layout = self.layout
        if layout.mesh is None or layout.size("context") > layout.split("sequence"):
            return None   # on a mesh: decoding with whole sequences, left to the partitioner, which has nothing to move
        return AttentionSharding(layout.mesh)

    def _spread_kv(self, x: Float[Array, "B S K h"]) -> Array:
        """Keys or values for a split over `tensor`: where there are fewer heads than devices, repeated first."""
        tensor, num_kv = self.layout.size("tensor"), self.config.num_kv_heads
        return x if num_kv % tensor == 0 else jnp.repeat(x, tensor // num_kv, axis=2)

    def _attend(self, kind: LayerKind, segment_ids: Array | None) -> Attend:
        def attend(query: Array, key: Array, value: Array, sinks: Array | None) -> Array:
            key, value = self._spread_kv(key), self._spread_kv(value)
            return attention(query, key, value, mask=Mask(window=kind.window), segment_ids=segment_ids, sinks=sinks,
                             implementation=self.attention, sharding=self._attention_sharding(), **self._scores(kind))
        return attend

    def _scan_layers(self, params: Params, x: Array, block: Callable, per_layer: Any = None) -> tuple[Array, Any]:
        """Run `block(module, x, kind, its slice of per_layer) -> (x, output)` over the L layers.

        Scans over groups of the layer pattern, so that the program holds each distinct layer once,
        whatever the depth; layers left over after whole groups follow one by one.
        """
        graphdef = _template(Block, self.config)[0]
        kinds = layer_pattern(self.config)

        layers, size, total = (params["layers"], per_layer), len(kinds), self.config.num_layers
        groups = total // size

        def run(kind: LayerKind, in_loop: bool) -> Callable:
            def body(x: Array, layer: Any) -> tuple[Array, Any]:
                x = self.layout.constrain(x, "batch", "sequence", "activation")
                return block(nnx.merge(graphdef, layer[0]), x, kind, layer[1])
            return rematerialise(body, self.remat, in_loop)

        # The compiler unrolls a loop of one turn.
        bodies = [run(kind, in_loop=groups > 1) for kind in kinds]

        def group(x: Array, stacked: Any) -> tuple[Array, Any]:
            outputs = []
            for i, body in enumerate(bodies):
                x, output = body(x, jax.tree.map(lambda a, i=i: a[i], stacked))
                outputs.append(output)
            return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *outputs)

        stacked = jax.tree.map(lambda a: a[:groups * size].reshape((groups, size) + a.shape[1:]), layers)
        x, outputs = jax.lax.scan(group, x, stacked)
        outputs = jax.tree.map(lambda a: a.reshape((groups * size,) + a.shape[2:]), outputs)
        for i in range(groups * size, total):
            left_over = run(kinds[i - groups * size], in_loop=False)
            x, output = left_over(x, jax.tree.map(lambda a, i=i: a[i], layers))
            outputs = jax.tree.map(lambda all_, one: jnp.concatenate([all_, one[None]]), outputs, output)
        return x, outputs
