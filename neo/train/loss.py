"""Next-token loss: sums over target tokens per row, over chunks of the sequence so that logits stay small."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neo.models.decoder import Decoder, Params

# Largest number of logits per sequence (of a device's part of it) alive at once (ours): 2^26 float32 are 256 MiB.
MAX_LOGITS = 1 << 26


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowSums:
    """Sums over the target tokens of each row: [B] float32 each."""

    loss: Float[Array, "B"]      # cross-entropy, nats
    z: Float[Array, "B"]         # logsumexp(logits)^2
    correct: Float[Array, "B"]   # tokens whose target has the largest logit
    tokens: Float[Array, "B"]    # target tokens counted


def chunk_length(seq_len: int, vocab_size: int) -> int:
    """Tokens per chunk: the largest divisor of T whose logits fit MAX_LOGITS."""
    limit = max(1, MAX_LOGITS // vocab_size)
    return max(c for c in range(1, seq_len + 1) if seq_len % c == 0 and c <= limit)


def token_sums(logits: Float[Array, "B T V"], targets: Int[Array, "B T"], mask: Float[Array, "B T"]) -> RowSums:
    """RowSums of logits that are in memory."""
    peak = jax.lax.stop_gradient(logits.max(axis=-1))
    log_z = jnp.log(jnp.sum(jnp.exp(logits - peak[..., None]), axis=-1)) + peak
    target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    hit = (jax.lax.stop_gradient(target) >= peak).astype(jnp.float32)
    rows = lambda x: jnp.sum(x * mask, axis=-1)   # noqa: E731
    return RowSums(rows(log_z - target), rows(log_z * log_z), rows(hit), jnp.sum(mask, axis=-1))


def _head_before_layers(decoder: Decoder, hidden: Array, params: Params) -> tuple[Array, Params]:
    """Both as they are; in the backward pass the layers wait until the head's gradient has been summed over the devices.

    Left to itself the compiler sums it at the end, and its unreduced [D, V] lies in memory meanwhile: 0.25 GiB more at the
    peak of a 7B step.
    """
    @jax.custom_vjp
    def joined(hidden: Array, weights: Array) -> tuple[Array, Array]:
        return hidden, weights

    joined.defvjp(lambda hidden, weights: ((hidden, weights), None), lambda _, grads: jax.lax.optimization_barrier(grads))
    group, name = ("embed", "table") if decoder.config.tied_embeddings else ("head", "kernel")
    hidden, weights = joined(hidden, params[group][name])
    return hidden, {**params, group: {**params[group], name: weights}}


def row_sums(decoder: Decoder, params: Params, batch: dict[str, Array], rope_base: float = 0.0) -> RowSums:
    """RowSums of a batch with `inputs`, `targets`, `positions`, `segment_ids` [B, T] and `loss_mask` [B, T].

    The head and the softmax run chunk by chunk and are repeated in the backward pass, so that at most
    MAX_LOGITS logits per sequence exist at a time. Where the mesh splits the sequence, each device does so with its part.
    """
    layout = decoder.layout
    hidden = decoder.hidden(params, batch["inputs"], batch["positions"], batch["segment_ids"], rope_base)
    hidden, params = _head_before_layers(decoder, hidden, params)
    kernel = layout.copies(decoder.head_kernel(params), ("embed", "vocab"), ("gathered", "vocab"))
    # Each device takes the chunks of the tokens that it has: of N parts, `along` of each sequence.
    parts, along = kernel.shape[0], layout.split("sequence")
    local = hidden.shape[1] // along
    length = chunk_length(local, decoder.config.vocab_size)

    def by_part(x: Array) -> Array:
        """[B, T, ...] -> [B along, T / along, ...]: the parts of sequences as rows of their own, still where they were."""
        if along == 1:
            return x
        x = x.reshape(parts // along, -1, along, local, *x.shape[2:]).swapaxes(1, 2)
        return layout.constrain(x.reshape(-1, *x.shape[3:]), "shards", *(None,) * (x.ndim - 3))

    def chunk(hidden: Array, targets: Array, mask: Array) -> RowSums:
        rows = hidden.shape[0]
        logits = jnp.einsum("nbtd,ndv->nbtv", hidden.reshape(parts, -1, *hidden.shape[1:]), kernel,
                            preferred_element_type=jnp.float32).reshape(rows, hidden.shape[1], -1)
        logits = decoder.finish_logits(layout.constrain(logits, "shards", None, "vocab"))
        return token_sums(logits, targets, mask)

    def whole_rows(x: Array) -> Array:
        return x if along == 1 else x.reshape(parts // along, along, -1).sum(1).reshape(-1)

    arrays = tuple(map(by_part, (hidden, batch["targets"], batch["loss_mask"])))
    if length == local:
        return jax.tree.map(whole_rows, chunk(*arrays))

    def split(x: Array) -> Array:
        return x.reshape(x.shape[0], local // length, length, *x.shape[2:]).swapaxes(0, 1)

    step = jax.checkpoint(lambda total, x: (jax.tree.map(jnp.add, total, chunk(*x)), None), prevent_cse=False)
    zero = jnp.zeros(arrays[0].shape[:1], jnp.float32)
    sums, _ = jax.lax.scan(step, RowSums(zero, zero, zero, zero), tuple(map(split, arrays)))
    return jax.tree.map(whole_rows, sums)
