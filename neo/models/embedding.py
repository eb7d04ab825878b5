"""Token look-up, with a backward pass of its own."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from neo.parallel.rules import Layout


def lookup(table: Float[Array, "V D"], tokens: Int[Array, "B T"], layout: Layout, dtype: Any) -> Float[Array, "B T D"]:
    """Rows of a float32 `table` in `dtype`, split as activations; tokens must be below V.

    The gradient of a row is added up over its tokens in float32: a common token has 1e5 of them in a large
    batch, and a bfloat16 sum stands still after a few hundred.

    On a mesh the backward pass is written out. The tokens' gradients are exchanged over `fsdp` (all-to-all) so
    that each device adds up its own columns of its own rows of the table: B T D / fsdp values move, not the V D of
    a reduce-scatter. Left to itself the partitioner does this too where only `fsdp` is split, and elsewhere
    replicates the gradients of all tokens ("involuntary full rematerialization").
    """
    def rows(table: Array, tokens: Array) -> Array:
        whole = layout.constrain(table.astype(dtype), "vocab", "gathered")
        return layout.constrain(whole[tokens], "batch", "sequence", "activation")

    def back(tokens: Array, grad: Array) -> tuple[Array, None]:
        if layout.mesh is None:
            return _add_rows(tokens, grad, table.shape[0]), None
        rules = layout.rules
        summed = jax.shard_map(
            _exchange_and_add(table.shape[0] // layout.size(rules.vocab), rules.embed, rules.vocab, _others(layout)),
            mesh=layout.mesh,
            in_specs=(rules.spec(("batch", "sequence")), rules.spec(("batch", "sequence", "activation"))),
            out_specs=rules.spec(("vocab", "embed")), check_vma=False)
        return summed(tokens, grad), None

    embed = jax.custom_vjp(rows)
    embed.defvjp(lambda table, tokens: (rows(table, tokens), tokens), back)
    return embed(table, tokens)


def _add_rows(tokens: Int[Array, "B T"], grad: Float[Array, "B T D"], rows: int) -> Float[Array, "V D"]:
    """Sum in float32 of the gradients of each row's tokens; tokens outside of 0..rows-1 are left out."""
    tokens = jnp.where((tokens >= 0) & (tokens < rows), tokens, rows)
    return jnp.zeros((rows, grad.shape[-1]), jnp.float32).at[tokens].add(grad.astype(jnp.float32), mode="drop")


def _exchange_and_add(rows: int, embed: str, vocab: str, others: tuple[str, ...]):
    """What one device does with the gradients of its tokens [b, t, D]: its part [V / tensor, D / fsdp] of the sum."""
    def local(tokens: Array, grad: Array) -> Array:
        grad = jax.lax.all_to_all(grad, embed, split_axis=2, concat_axis=0, tiled=True)
        tokens = jax.lax.all_gather(tokens, embed, axis=0, tiled=True)
        part = _add_rows(tokens - jax.lax.axis_index(vocab) * rows, grad, rows)
        return jax.lax.psum(part, others)
    return local


def _others(layout: Layout) -> tuple[str, ...]:
    """Mesh axes that split tokens but not the table: the sum goes over them."""
    return tuple(axis for axis in layout.mesh.axis_names if axis not in (layout.rules.embed, layout.rules.vocab))
