"""Logical axis names -> mesh axes, in one table, and the few calls that use it."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental.layout import Layout as MemoryOrder
from jax.experimental.layout import with_layout_constraint
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float

from neo.parallel.mesh import BATCH_AXES

MeshAxes = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class InMemory:
    """How an array should lie in memory: its dimensions from major to minor, and its logical axes.

    gradient: whether its gradient should lie so too. Not that of a parameter as it was gathered: it is split among the devices.
    """

    order: tuple[int, ...]
    axes: tuple[str | None, ...]
    gradient: bool = True


Pin = Callable[[jax.Array, InMemory], jax.Array]


@dataclasses.dataclass(frozen=True)
class ShardingRules:
    """Which mesh axis each logical axis of a parameter or activation is split over; None = not split.

    Parameters are split twice: along `embed` over `fsdp` (their owner shards), and along heads,
    feed-forward width or vocabulary over `tensor`.
    """

    batch: MeshAxes = BATCH_AXES
    sequence: MeshAxes = "context"
    activation: MeshAxes = None   # the residual stream's D in activations
    embed: MeshAxes = "fsdp"      # the residual stream's D in parameters
    vocab: MeshAxes = "tensor"
    heads: MeshAxes = "tensor"
    kv: MeshAxes = "tensor"
    mlp: MeshAxes = "tensor"
    head: MeshAxes = None
    norm: MeshAxes = None
    layers: MeshAxes = None
    gathered: MeshAxes = None     # a parameter axis at the moment of use, when fsdp has been gathered

    @property
    def shards(self) -> MeshAxes:
        """What splits the tokens, along batch and sequence: an axis with one entry for each part of them."""
        return (*_names(self.batch), *_names(self.sequence))

    def spec(self, axes: tuple[str | None, ...]) -> P:
        """PartitionSpec of an array with these logical axes.

        Raises ValueError when two of them would use one mesh axis, which would shard nothing twice.
        """
        entries = [getattr(self, axis) if axis is not None else None for axis in axes]
        used = [name for entry in entries for name in _names(entry)]
        twice = {name for name in used if used.count(name) > 1}
        if twice:
            raise ValueError(f"mesh axis {sorted(twice)} is used twice by logical axes {axes}")
        return P(*entries)


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh with its rules. Without a mesh (one device, no placement) every call does nothing."""

    mesh: Mesh | None = None
    rules: ShardingRules = ShardingRules()

    def size(self, axis: str) -> int:
        """Devices along one mesh axis."""
        return 1 if self.mesh is None else self.mesh.shape[axis]

    def split(self, axis: str) -> int:
        """Parts into which the mesh splits a logical axis."""
        return math.prod(self.size(name) for name in _names(getattr(self.rules, axis)))

    def whole_sequences(self) -> Layout:
        """The same mesh with every sequence on all devices of `context`, which repeat each other's work: for decoding, where
        a token at a time cannot be split."""
        return dataclasses.replace(self, rules=dataclasses.replace(self.rules, sequence=PRESETS["decode"].sequence))

    def sharding(self, *axes: str | None) -> NamedSharding:
        """Placement of an array with these logical axes; with no axes: replicated."""
        assert self.mesh is not None
        return NamedSharding(self.mesh, self.rules.spec(axes))

    def shardings(self, axes_tree: Any) -> Any:
        """The same for a nested dict whose leaves are tuples of logical axes."""
        return jax.tree.map(lambda axes: self.sharding(*axes), axes_tree, is_leaf=lambda x: isinstance(x, tuple))

    def constrain(self, x: jax.Array, *axes: str | None) -> jax.Array:
        """Tell the compiler where `x` lives at this point of the program."""
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, self.sharding(*axes))

    def gather(self, x: jax.Array, stored: tuple[str | None, ...], used: tuple[str | None, ...]) -> jax.Array:
        """`x` with the logical axes `stored` as it lies where `used` says; its gradient comes back as `stored`.

        A plain `constrain` would hold the gradient to `used` too: an all-reduce of the full array, where
        the sum over devices can be a reduce-scatter.
        """
        if self.mesh is None:
            return x

        @jax.custom_vjp
        def moved(x: jax.Array) -> jax.Array:
            return self.constrain(x, *used)

        moved.defvjp(lambda x: (moved(x), None), lambda _, grad: (self.constrain(grad, *stored),))
        return moved(x)

    def copies(self, x: Float[Array, "D V"], stored: tuple[str | None, ...],
               used: tuple[str | None, ...]) -> Float[Array, "N D V"]:
        """One copy of a gathered matrix for each of the N parts of the tokens (`shards`): each device holds its own.

        So a gradient that is added up in a loop stays a sum inside each shard, and the sum over the shards
        is one reduce-scatter to `stored` behind the loop. With a single [D, V] the partitioner reduces
        over the devices in each turn of the loop.
        """
        shards = self.split("shards")

        def spread(x: jax.Array) -> jax.Array:
            return self.constrain(jax.numpy.broadcast_to(x, (shards, *x.shape)), "shards", *used)

        if self.mesh is None:
            return spread(x)

        def back(_: None, grad: jax.Array) -> tuple[jax.Array]:
            # Padding is per part of the last axis, which `tensor` may split.
            parts = self.split(used[-1])
            rows, width = grad.shape[1], grad.shape[2] // parts
            wide = _tileable(width) if self.on_tpu else width
            grad = grad.reshape(shards, rows, parts, width)
            grad = jax.numpy.pad(grad, ((0, 0), (0, 0), (0, 0), (0, wide - width)))
            # The barrier keeps the slice that belongs to this device in one piece: an all-reduce with one slice
            # behind it becomes a reduce-scatter, one with a slice fused into each user does not.
            if (along := self.split("sequence")) > 1:   # over the batch first, and of the rest only this device's slice
                grad = grad.reshape(shards // along, along, *grad.shape[1:]).sum(0)
                grad = jax.lax.optimization_barrier(self.constrain(grad, "sequence", *stored, None))
            grad = jax.lax.optimization_barrier(self.constrain(grad.sum(0), *stored, None))
            return (self.constrain(grad[..., :width].reshape(rows, parts * width), *stored),)

        copied = jax.custom_vjp(spread)
        copied.defvjp(lambda x: (spread(x), None), back)
        return copied(x)

    def pin(self, x: jax.Array, there: InMemory) -> jax.Array:
        """On TPUs: `x` (and its gradient) in memory as `there` says.

        The compiler chooses orders loop by loop. What the forward loop keeps for the backward loop is then often turned
        twice; pinned, it is not: 4 % of a 7B step on v5p by the compiler's account, half of that by the gradients.
        """
        if not self.on_tpu:
            return x
        # Each device pins its own part: the partitioner of JAX 0.10 (libtpu 0.0.42) does not see through the request and
        # would gather the whole batch for it.
        spec = self.rules.spec(there.axes)
        order = functools.partial(with_layout_constraint, layouts=MemoryOrder(major_to_minor=there.order))
        put = jax.shard_map(order, mesh=self.mesh, in_specs=spec, out_specs=spec)

        @jax.custom_vjp
        def pinned(x: jax.Array) -> jax.Array:
            return put(x)

        pinned.defvjp(lambda x: (pinned(x), None), lambda _, grad: (put(grad) if there.gradient else grad,))
        return pinned(x)

    @property
    def on_tpu(self) -> bool:
        """Whether the mesh is of TPUs."""
        return self.mesh is not None and self.mesh.devices.flat[0].platform == "tpu"


def unpinned(x: jax.Array, there: InMemory) -> jax.Array:
    """`Layout.pin` where there is nothing to pin."""
    return x


def _names(entry: MeshAxes) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


def _tileable(width: int) -> int:
    """The next width at which libtpu reduce-scatters instead of all-reducing: whole lanes of 128, smooth in number.

    Seen with libtpu 0.0.51 on v5p: 250, 504, 506, 512 lanes work, 502 = 2 x 251 and 508 = 4 x 127 do not (a MAP-NEO
    vocabulary of 64,256 has 502). 23 is the largest prime factor that was seen to work.
    """
    lanes = -(-width // 128)
    while _largest_prime_factor(lanes) > 23:
        lanes += 1
    return lanes * 128


def _largest_prime_factor(n: int) -> int:
    factor, largest = 2, 1
    while n > 1:
        while n % factor == 0:
            n, largest = n // factor, factor
        factor += 1
    return largest


PRESETS = {
    # Parameters over fsdp and tensor, tokens over batch and context.
    "fsdp": ShardingRules(),
    # The same with more devices along tensor than K/V heads: each holds the K/V projections it needs whole.
    "whole_kv": ShardingRules(kv=None),
    # One token at a time: nothing to split along the sequence. For forward passes only: the devices of `context` repeat
    # each other's work, and gradients would be counted once for each.
    "decode": ShardingRules(sequence=None),
}


def rules_for(num_kv_heads: int, tensor: int) -> ShardingRules:
    """Rules for a model on `tensor` devices: K/V projections are replicated when there are fewer heads than devices."""
    return PRESETS["fsdp" if num_kv_heads % tensor == 0 else "whole_kv"]
