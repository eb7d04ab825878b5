"""One training step: (state, batch, rates) -> (state, metrics), jitted and donated; and one of evaluation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from neo.config.schema import InitConfig
from neo.models.decoder import Decoder, Params
from neo.train.loss import RowSums, row_sums
from neo.train.optimizer import Optimizer, clip_scale, global_norm

State = dict[str, Any]     # {"params": ..., "opt": ..., "step": int32}
Batch = dict[str, Array]
Step = Callable[[State, Batch, Array, Array], tuple[State, dict[str, Array]]]


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """What is fixed in the program of a step; a phase with other values compiles another one."""

    num_sources: int
    accumulation: int = 1      # micro-batches per step
    clip_norm: float = 1.0
    z_loss: float = 0.0
    rope_base: float = 0.0     # 0 = the model's


def init_state(decoder: Decoder, optimizer: Optimizer, seed: int, init: InitConfig | float) -> State:
    """The state before the first step: jitted, so that each device draws its own shard only."""
    def build() -> State:
        params = decoder.init(jax.random.key(seed), init)
        return {"params": params, "opt": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    if decoder.layout.mesh is None:
        return jax.jit(build)()
    return jax.jit(build, out_shardings=state_shardings(decoder, optimizer))()


def state_axes(decoder: Decoder, optimizer: Optimizer) -> State:
    """Logical axes of every array of the state."""
    return {"params": decoder.axes(), "opt": optimizer.state_axes(), "step": ()}


def state_shardings(decoder: Decoder, optimizer: Optimizer) -> State:
    """Where every array of the state lives on the layout's mesh."""
    return decoder.layout.shardings(state_axes(decoder, optimizer))


def abstract_state(decoder: Decoder, optimizer: Optimizer) -> State:
    """Shapes, dtypes and shardings of the state, with nothing allocated."""
    def build() -> State:
        params = decoder.init(jax.random.key(0), 0.0)
        return {"params": params, "opt": optimizer.init(params), "step": jnp.zeros((), jnp.int32)}

    shapes = jax.eval_shape(build)
    if decoder.layout.mesh is None:
        return shapes
    return jax.tree.map(lambda s, where: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where),
                        shapes, state_shardings(decoder, optimizer))


def abstract_batch(decoder: Decoder, global_batch: int, seq_len: int) -> Batch:
    """Shapes, dtypes and shardings of a batch: what `TrainData.batch` returns, with nothing allocated."""
    def array(dtype: Any, *axes: str) -> jax.ShapeDtypeStruct:
        shape = (global_batch, seq_len)[:len(axes)]
        where = None if decoder.layout.mesh is None else decoder.layout.sharding(*axes)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    tokens = {name: array(jnp.int32, "batch", "sequence") for name in ("inputs", "targets", "segment_ids", "positions")}
    return {**tokens, "loss_mask": array(jnp.float32, "batch", "sequence"), "source": array(jnp.int32, "batch")}


def make_step(decoder: Decoder, optimizer: Optimizer, options: StepOptions) -> Step:
    """The jitted step `(state, batch, learning_rate, weight_decay) -> (state, metrics)`; the old state is donated.

    The loss is the mean over the target tokens of the global batch, whatever the masks and the number
    of micro-batches: the denominator is known before the first forward pass. Gradients accumulate in
    float32. When loss or gradient norm is not finite, parameters and optimizer state stay as they
    were and `ok` is False; `step` counts on, because the data is spent.

    Metrics (float32 scalars, `source_*` of shape [S]): loss, z_loss, accuracy, tokens, grad_norm,
    param_norm, ok, source_loss, source_accuracy, source_tokens (means over each source's tokens).
    """
    grads_of = _gradients(decoder, options)

    def step(state: State, batch: Batch, learning_rate: Array, weight_decay: Array) -> tuple[State, dict[str, Array]]:
        params = state["params"]
        total = jnp.maximum(jnp.sum(batch["loss_mask"]), 1.0)
        grads, sums = grads_of(params, batch, total)
        norm = global_norm(grads)
        loss = jnp.sum(sums["loss"]) / total
        ok = jnp.isfinite(loss) & jnp.isfinite(norm)
        scale = clip_scale(norm, options.clip_norm)
        grads = jax.tree.map(lambda g: g * scale, grads)
        new_params, new_opt = optimizer.update(grads, state["opt"], params, learning_rate, weight_decay)
        keep = lambda new, old: jax.tree.map(lambda n, o: jnp.where(ok, n, o), new, old)   # noqa: E731
        new_state = {"params": keep(new_params, params), "opt": keep(new_opt, state["opt"]), "step": state["step"] + 1}
        per_source = jnp.maximum(sums["tokens"], 1.0)
        metrics = {
            "loss": loss, "z_loss": options.z_loss * jnp.sum(sums["z"]) / total,
            "accuracy": jnp.sum(sums["correct"]) / total, "tokens": jnp.sum(sums["tokens"]),
            "grad_norm": norm, "param_norm": global_norm(new_state["params"]), "ok": ok,
            "source_loss": sums["loss"] / per_source, "source_accuracy": sums["correct"] / per_source,
            "source_tokens": sums["tokens"],
        }
        return new_state, metrics

    shardings = {}
    if decoder.layout.mesh is not None:
        where = state_shardings(decoder, optimizer)
        shardings = {"out_shardings": (where, decoder.layout.sharding())}
    return jax.jit(step, donate_argnums=0, **shardings)


def make_eval_step(decoder: Decoder, rope_base: float = 0.0) -> Callable[[Params, Batch], Array]:
    """Jitted (params, batch) -> float32 [3]: summed loss (nats), correct tokens, target tokens."""
    def evaluate(params: Params, batch: Batch) -> Array:
        sums = row_sums(decoder, params, batch, rope_base)
        return jnp.stack([sums.loss.sum(), sums.correct.sum(), sums.tokens.sum()])

    replicated = {} if decoder.layout.mesh is None else {"out_shardings": decoder.layout.sharding()}
    return jax.jit(evaluate, **replicated)


def _gradients(
    decoder: Decoder, options: StepOptions
) -> Callable[[Params, Batch, Array], tuple[Params, dict[str, Array]]]:
    layout = decoder.layout

    def objective(params: Params, batch: Batch, total: Array) -> tuple[Array, dict[str, Array]]:
        rows = row_sums(decoder, params, batch, options.rope_base)
        loss = (jnp.sum(rows.loss) + options.z_loss * jnp.sum(rows.z)) / total
        return loss, _by_source(rows, batch["source"], options.num_sources)

    def whole(params: Params, batch: Batch, total: Array) -> tuple[Params, dict[str, Array]]:
        grads, sums = jax.grad(objective, has_aux=True)(params, batch, total)
        return _constrain_like_params(decoder, grads), sums

    if options.accumulation == 1:
        return whole

    def split(x: Array) -> Array:
        # Device d holds rows [d*B/n, (d+1)*B/n): each micro-batch takes an equal part of every device's
        # rows, so that nothing moves between devices.
        rest = x.shape[1:]
        parts = x.reshape(layout.split("batch"), options.accumulation, -1, *rest).swapaxes(0, 1)
        return layout.constrain(parts.reshape(options.accumulation, -1, *rest), None, *("batch", "sequence")[:x.ndim])

    def accumulated(params: Params, batch: Batch, total: Array) -> tuple[Params, dict[str, Array]]:
        def add(carry: Any, micro: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, carry, whole(params, micro, total)), None

        zero_sums = {name: jnp.zeros((options.num_sources,)) for name in ("loss", "z", "correct", "tokens")}
        zero = (_constrain_like_params(decoder, jax.tree.map(jnp.zeros_like, params)), zero_sums)
        return jax.lax.scan(add, zero, jax.tree.map(split, batch))[0]

    return accumulated


def _constrain_like_params(decoder: Decoder, tree: Params) -> Params:
    """Gradients live where their parameters live: the sum over devices becomes a reduce-scatter."""
    return jax.tree.map(lambda x, axes: decoder.layout.constrain(x, *axes), tree, decoder.axes())


def _by_source(rows: RowSums, source: Array, num_sources: int) -> dict[str, Array]:
    """Row sums [B] added up by source: [S] each."""
    member = (source[:, None] == jnp.arange(num_sources)).astype(jnp.float32)
    return {name: jax.lax.stop_gradient(getattr(rows, name)) @ member for name in ("loss", "z", "correct", "tokens")}
