"""Attention over a sequence that is split over a mesh axis, around any `Kernel`; inside `jax.shard_map`.

n devices hold T/n consecutive tokens each. Two forms, chosen by the window:

* A window W: each device needs the W - 1 keys before its own, no more. They travel from the neighbour (a window longer than
  a shard: from neighbour to neighbour), and the local kernel sees them in front of the local keys. `first_key` hides the
  part that stands before the sequence. The gradients of the travelled keys go back the same way.
* Full causal: a ring (Liu et al., arXiv:2310.01889). Keys and values pass from device to device, each visit gives a partial
  result with its log-sum-exp, and these merge exactly. With consecutive tokens the last device would work n times as long
  as the first, so the work is done on another division (zigzag: Llama 3, arXiv:2407.21783, section 3.3.2): of 2n chunks
  device i takes i and 2n-1-i. Then each visit is one product of T/n x T/2n scores without a mask on every device, and the
  visit to the own keys is plain causal. Queries, keys and values are brought there and the result brought back by two
  permutations each, so that the model around sees consecutive tokens only.

Both forms keep q, k, v, the output and the log-sum-exp of their own T/n tokens for the backward, nothing that travelled.
The backward of the ring sends k and v round again, together with fp32 sums of their gradients. The next keys are sent
before the present ones are worked on, and the sums arrive only after it: no product waits for what is on its way.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from neo.errors import InputError
from neo.kernels.attention.kernel import (
    LSE_NAME,
    OUT_NAME,
    Extras,
    Kernel,
    Plan,
    hide_empty_rows,
    row_delta,
    sink_gradient,
)


def attend(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B T K h"],
    v: Float[Array, "B T K h"],
    extras: Extras,
    plan: Plan,
    kernel: Kernel,
    *,
    axis: str,
    size: int,
) -> tuple[Float[Array, "B T H h"], Float[Array, "B H T"]]:
    """(out, lse) of the local tokens, differentiable in q, k, v and the sinks, like `Kernel.attend` of the whole sequence.

    All arrays are local: T tokens of n T, the heads of this device. Call it inside `jax.shard_map`, on every device of
    `axis` at once.

    plan: of the whole sequence: causal, with the window as the model has it, offset 0.
    extras: segment_ids and kv_segment_ids are local too; slopes and sinks those of the local heads; no first_key.
    axis, size: the mesh axis that splits the sequence, and n.
    Errors: `InputError` for what cannot be split (see `check_split`) and for causal=False.
    """
    if size == 1:
        return kernel.attend(q, k, v, extras, plan)
    if not plan.causal:
        raise InputError("attention over a split sequence (mesh axis context) lacks causal=False; use causal=True")
    if plan.offset or extras.first_key is not None or k.shape[1] != q.shape[1]:
        raise InputError(
            f"attention over a split sequence needs one key per query and no offset; got {k.shape[1]} keys for "
            f"{q.shape[1]} queries a device, offset {plan.offset}"
        )
    length = q.shape[1] * size
    check_split(length, plan.window, size)
    if plan.window is not None and plan.window >= length:
        plan = dataclasses.replace(plan, window=None)
    return _attend(q, k, v, extras, plan, kernel, axis, size)


def check_split(length: int, window: int | None, size: int) -> None:
    """`InputError` unless `length` tokens can be split `size` ways for this window."""
    parts = split_parts(length, window, size)
    if length % parts:
        why = f"{size} devices" if parts == size else f"2 x {size} chunks (causal without a window: two a device)"
        fits = max(parts, length // parts * parts)
        raise InputError(
            f"attention: {length} tokens cannot be split over mesh axis 'context' of {size}: {why} need a multiple of "
            f"{parts}, such as {fits}"
        )


def split_parts(length: int, window: int | None, size: int) -> int:
    """What must divide the length: the devices, twice their number where every earlier token is visible."""
    return size if size == 1 or (window is not None and window < length) else 2 * size


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6, 7))
def _attend(
    q: Array, k: Array, v: Array, extras: Extras, plan: Plan, kernel: Kernel, axis: str, size: int
) -> tuple[Array, Array]:
    form = _full_forward if plan.window is None else _window_forward
    return form(q, k, v, extras, plan, kernel, _Axis(axis, size))


def _attend_forward(q: Array, k: Array, v: Array, extras: Extras, plan: Plan, kernel: Kernel, axis: str, size: int):
    out, lse = _attend(q, k, v, extras, plan, kernel, axis, size)
    out, lse = checkpoint_name(out, OUT_NAME), checkpoint_name(lse, LSE_NAME)
    return (out, lse), (q, k, v, extras, out, lse)


def _attend_backward(plan: Plan, kernel: Kernel, axis: str, size: int, residuals, cotangents):
    q, k, v, extras, out, lse = residuals
    dout, dlse = cotangents
    delta = row_delta(out, dout) - dlse
    form = _full_backward if plan.window is None else _window_backward
    dq, dk, dv = form(q, k, v, hide_empty_rows(lse), delta, dout, extras, plan, kernel, _Axis(axis, size))
    return dq, dk, dv, Extras(sinks=sink_gradient(extras.sinks, lse, delta))


_attend.defvjp(_attend_forward, _attend_backward)


@dataclasses.dataclass(frozen=True)
class _Axis:
    """The mesh axis that splits the sequence, as a ring of `size` devices."""

    name: str
    size: int

    def index(self) -> Int[Array, ""]:
        return jax.lax.axis_index(self.name)

    def send(self, tree: Any, pairs: list[tuple[int, int]]) -> Any:
        """Each array from device a to device b; zeros where nothing arrives."""
        return jax.tree.map(lambda x: jax.lax.ppermute(x, self.name, pairs), tree)

    def onward(self, tree: Any) -> Any:
        """From each device to the next one, from the last to the first."""
        return self.send(tree, [(i, (i + 1) % self.size) for i in range(self.size)])

    def up(self, x: Array) -> Array:
        """From each device to the next one; zeros on the first."""
        return self.send(x, [(i, i + 1) for i in range(self.size - 1)])

    def down(self, x: Array) -> Array:
        """From each device to the one before; zeros on the last."""
        return self.send(x, [(i + 1, i) for i in range(self.size - 1)])


# -- windows: a halo of W - 1 keys ---------------------------------------------------------------------------------------


def halo_pieces(window: int, shard: int, size: int) -> list[int]:
    """Tokens that come from each of the devices before, the nearest first: W - 1 in all, or all that there are."""
    left, pieces = min(window - 1, (size - 1) * shard), []
    while left:
        pieces.append(min(left, shard))
        left -= pieces[-1]
    return pieces


def _with_halo(x: Array, pieces: list[int], axis: _Axis) -> Array:
    """[B, T, ...] -> [B, halo + T, ...]: what the earlier devices end with, before the own part."""
    parts, last = [x], x
    for tokens in pieces:  # what came from the neighbour goes on to the next one: a whole shard, as long as more is to come
        last = axis.up(last[:, last.shape[1] - tokens :])
        parts.insert(0, last)
    return jnp.concatenate(parts, axis=1)


def _halo_home(x: Array, pieces: list[int], axis: _Axis) -> Array:
    """The transpose of `_with_halo`: [B, halo + T, ...] -> [B, T, ...] sums over all devices that saw a token.

    What has not been added to travels in x's dtype, sums in fp32.
    """
    bounds = [0]  # where each part begins in x, the farthest first
    for tokens in reversed(pieces):
        bounds.append(bounds[-1] + tokens)
    parts = [x[:, a:b] for a, b in zip(bounds, [*bounds[1:], x.shape[1]], strict=True)]
    total = parts[0]
    for part in parts[1:]:
        moved = axis.down(total).astype(jnp.float32)
        at = part.shape[1] - moved.shape[1]
        total = part.astype(jnp.float32).at[:, at:].add(moved)
    return total.astype(x.dtype)


def _windowed(k: Array, v: Array, extras: Extras, plan: Plan, axis: _Axis) -> tuple[Array, Array, Extras, Plan, list[int]]:
    """The local problem with its halo."""
    shard = k.shape[1]
    pieces = halo_pieces(plan.window, shard, axis.size)
    halo = sum(pieces)
    k, v = _with_halo(k, pieces, axis), _with_halo(v, pieces, axis)
    if extras.kv_segment_ids is not None:
        extras = extras._replace(kv_segment_ids=_with_halo(extras.kv_segment_ids, pieces, axis))
    if halo:
        extras = extras._replace(first_key=jnp.maximum(0, halo - axis.index() * shard).astype(jnp.int32))
    return k, v, extras, dataclasses.replace(plan, offset=halo), pieces


def _window_forward(q: Array, k: Array, v: Array, extras: Extras, plan: Plan, kernel: Kernel, axis: _Axis):
    k, v, extras, plan, _ = _windowed(k, v, extras, plan, axis)
    return kernel.forward(q, k, v, extras, plan)


def _window_backward(
    q: Array, k: Array, v: Array, lse: Array, delta: Array, dout: Array, extras: Extras, plan: Plan, kernel: Kernel, axis: _Axis
) -> tuple[Array, Array, Array]:
    k, v, extras, plan, pieces = _windowed(k, v, extras, plan, axis)
    dq, dk, dv = kernel.backward(q, k, v, lse, delta, dout, extras, plan)
    return dq, _halo_home(dk, pieces, axis), _halo_home(dv, pieces, axis)


# -- full causal: a ring over chunks in zigzag order ---------------------------------------------------------------------


def _homes(axis: _Axis) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Where the first (even) and second (odd) chunk of each device go; each is a permutation of the devices."""
    home = [c if c < axis.size else 2 * axis.size - 1 - c for c in range(2 * axis.size)]
    return [(i, home[2 * i]) for i in range(axis.size)], [(i, home[2 * i + 1]) for i in range(axis.size)]


def _to_zigzag(x: Array, axis: _Axis, dim: int = 1) -> Array:
    """From chunks 2i, 2i+1 of the sequence on device i to chunks i, 2n-1-i."""
    evens, odds = _homes(axis)
    first, second = jnp.split(x, 2, axis=dim)
    even, odd = axis.send(first, evens), axis.send(second, odds)
    # Of i and 2n-1-i one is even: i on even devices.
    swapped = axis.index() % 2 == 1
    return jnp.concatenate([jnp.where(swapped, odd, even), jnp.where(swapped, even, odd)], axis=dim)


def _from_zigzag(x: Array, axis: _Axis, dim: int = 1) -> Array:
    """The inverse of `_to_zigzag`."""
    evens, odds = _homes(axis)
    low, high = jnp.split(x, 2, axis=dim)
    swapped = axis.index() % 2 == 1
    even, odd = jnp.where(swapped, high, low), jnp.where(swapped, low, high)
    back = [axis.send(part, [(b, a) for a, b in pairs]) for part, pairs in ((even, evens), (odd, odds))]
    return jnp.concatenate(back, axis=dim)


class _Keys(NamedTuple):
    """What travels."""

    k: Float[Array, "B T K h"]
    v: Float[Array, "B T K h"]
    segment_ids: Int[Array, "B T"] | None


class _Tile(NamedTuple):
    """One kernel call of a visit: halves [first, end) of the local queries against halves of the keys."""

    q: tuple[int, int]
    k: tuple[int, int]
    causal: bool = False


# The own keys, those of an earlier device (its high chunk is later than both of ours), those of a later one.
_OWN, _EARLIER, _LATER = (_Tile((0, 2), (0, 2), True),), (_Tile((0, 2), (0, 1)),), (_Tile((1, 2), (0, 2)),)
# With ALiBi each call has one distance between its chunks, so both must be single ones.
_OWN_CHUNKS = (_Tile((0, 1), (0, 1), True), _Tile((1, 2), (1, 2), True), _Tile((1, 2), (0, 1)))
_EARLIER_CHUNKS = (_Tile((0, 1), (0, 1)), _Tile((1, 2), (0, 1)))
_LATER_CHUNKS = (_Tile((1, 2), (0, 1)), _Tile((1, 2), (1, 2)))


@dataclasses.dataclass(frozen=True)
class _Ring:
    """The local side of a ring, in zigzag order: what stays on the device, and how a tile becomes a kernel call."""

    q: Float[Array, "B T H h"]
    extras: Extras  # segment_ids in zigzag order
    plan: Plan
    kernel: Kernel
    axis: _Axis

    @property
    def chunk(self) -> int:
        return self.q.shape[1] // 2

    def cut(self, x: Array, halves: tuple[int, int], dim: int = 1) -> Array:
        return jax.lax.slice_in_dim(x, halves[0] * self.chunk, halves[1] * self.chunk, axis=dim)

    def call(self, tile: _Tile, keys: _Keys) -> tuple[Array, Array, Array, Extras, Plan]:
        """(q, k, v, extras, plan) of a tile. The sink is no key of any device: it enters when all is merged."""
        segments = (None, None)
        if keys.segment_ids is not None:
            segments = self.cut(self.extras.segment_ids, tile.q), self.cut(keys.segment_ids, tile.k)
        # ALiBi: distances are counted as if the queries followed right after the keys; `shift` has the rest. So the
        # largest bias of a tile is near 0, where fp32 is finest.
        offset = 0 if tile.causal or self.extras.slopes is None else self.chunk
        plan = dataclasses.replace(self.plan, causal=tile.causal, window=None, offset=offset)
        extras = Extras(*segments, slopes=self.extras.slopes)
        return self.cut(self.q, tile.q), self.cut(keys.k, tile.k), self.cut(keys.v, tile.k), extras, plan

    def shift(self, tile: _Tile, source: Array) -> Array:
        """[H, 1] or 0: what ALiBi adds to all scores of a tile beyond the kernel's own distances; keys of device `source`."""
        if tile.causal or self.extras.slopes is None:
            return jnp.float32(0)
        n = self.axis.size

        def place(device: Array, half: int) -> Array:
            return device if half == 0 else 2 * n - 1 - device

        between = (place(self.axis.index(), tile.q[0]) - place(source, tile.k[0]) - 1) * self.chunk
        return -self.extras.slopes[:, None] * between.astype(jnp.float32)

    def tiles(self, earlier: bool | None) -> tuple[_Tile, ...]:
        """Of a visit to the own keys (None), to an earlier device, to a later one."""
        kinds = (_OWN, _EARLIER, _LATER) if self.extras.slopes is None else (_OWN_CHUNKS, _EARLIER_CHUNKS, _LATER_CHUNKS)
        return kinds[0 if earlier is None else 1 if earlier else 2]

    def visit(self, run: Any, hop: Array | int, keys: _Keys, carry: Any) -> Any:
        """run(tiles, source, keys, carry) -> carry for the keys that have come `hop` devices far."""
        source = (self.axis.index() - hop) % self.axis.size
        return jax.lax.cond(
            hop <= self.axis.index(),
            functools.partial(run, self.tiles(earlier=True)),
            functools.partial(run, self.tiles(earlier=False)),
            source, keys, carry,
        )  # fmt: skip


def _start(q: Array, k: Array, v: Array, extras: Extras, plan: Plan, kernel: Kernel, axis: _Axis) -> tuple[_Ring, _Keys]:
    q, k, v = (_to_zigzag(x, axis) for x in (q, k, v))
    segments = kv_segments = None
    if extras.segment_ids is not None:
        segments, kv_segments = _to_zigzag(extras.segment_ids, axis), _to_zigzag(extras.kv_segment_ids, axis)
    return _Ring(q, extras._replace(segment_ids=segments), plan, kernel, axis), _Keys(k, v, kv_segments)


def _full_forward(q: Array, k: Array, v: Array, extras: Extras, plan: Plan, kernel: Kernel, axis: _Axis):
    ring, keys = _start(q, k, v, extras, plan, kernel, axis)

    def run(tiles: tuple[_Tile, ...], source: Array, keys: _Keys, merged: tuple[Array, Array]) -> tuple[Array, Array]:
        out, lse = merged
        for tile in tiles:
            part_out, part_lse = kernel.forward(*ring.call(tile, keys))
            part_lse = part_lse + ring.shift(tile, source)
            a, b = merge(ring.cut(out, tile.q), ring.cut(lse, tile.q, dim=2), part_out, part_lse)
            at = tile.q[0] * ring.chunk
            out = jax.lax.dynamic_update_slice_in_dim(out, a, at, axis=1)
            lse = jax.lax.dynamic_update_slice_in_dim(lse, b, at, axis=2)
        return out, lse

    def step(carry: tuple[_Keys, Any], hop: Array) -> tuple[tuple[_Keys, Any], None]:
        keys, merged = carry
        coming = axis.onward(keys)
        return (coming, ring.visit(run, hop, keys, merged)), None

    B, T, H, _ = q.shape
    coming = axis.onward(keys)
    merged = jnp.zeros(q.shape, jnp.float32), jnp.full((B, H, T), -jnp.inf)
    merged = run(ring.tiles(None), axis.index(), keys, merged)
    if axis.size > 2:
        (coming, merged), _ = jax.lax.scan(step, (coming, merged), jnp.arange(1, axis.size - 1))
    out, lse = ring.visit(run, axis.size - 1, coming, merged)
    if extras.sinks is not None:
        total = jnp.logaddexp(lse, extras.sinks.astype(jnp.float32)[:, None])
        out, lse = out * jnp.exp(lse - total).swapaxes(1, 2)[..., None], total
    return _from_zigzag(out.astype(q.dtype), axis), _from_zigzag(lse, axis, dim=2)


def merge(
    out: Float[Array, "B T H h"], lse: Float[Array, "B H T"], more_out: Float[Array, "B T H h"], more_lse: Float[Array, "B H T"]
) -> tuple[Float[Array, "B T H h"], Float[Array, "B H T"]]:
    """Attention over two sets of keys from the fp32 results over each: weights exp(lse - lse of both), exactly 0 for none."""
    total = jnp.logaddexp(lse, more_lse)
    base = jnp.where(total == -jnp.inf, 0.0, total)

    def share(part: Array, weight: Array) -> Array:
        return part.astype(jnp.float32) * jnp.exp(weight - base).swapaxes(1, 2)[..., None]

    return share(out, lse) + share(more_out, more_lse), total


def _full_backward(
    q: Array, k: Array, v: Array, lse: Array, delta: Array, dout: Array, extras: Extras, plan: Plan, kernel: Kernel, axis: _Axis
) -> tuple[Array, Array, Array]:
    ring, keys = _start(q, k, v, extras, plan, kernel, axis)
    dout, lse, delta = _to_zigzag(dout, axis), _to_zigzag(lse, axis, dim=2), _to_zigzag(delta, axis, dim=2)

    def run(tiles: tuple[_Tile, ...], source: Array, keys: _Keys, dq: Array) -> tuple[Array, tuple[Array, Array]]:
        """dq with what this visit adds, and the gradients of the visited keys and values by this device, all fp32."""
        grads = [jnp.zeros(keys.k.shape, jnp.float32) for _ in "kv"]
        for tile in tiles:
            queries, key, value, local, part_plan = ring.call(tile, keys)
            parts = kernel.backward(
                queries, key, value, ring.cut(lse, tile.q, dim=2) - ring.shift(tile, source), ring.cut(delta, tile.q, dim=2),
                ring.cut(dout, tile.q), local, part_plan,
            )  # fmt: skip
            dq, *grads = (
                total.at[:, half[0] * ring.chunk : half[1] * ring.chunk].add(part.astype(jnp.float32))
                for total, half, part in zip((dq, *grads), (tile.q, tile.k, tile.k), parts, strict=True)
            )
        return dq, tuple(grads)

    def visit(hop: Array | int, keys: _Keys, dq: Array, grads: Any) -> tuple[Array, Any]:
        # The sums of the devices before arrive while this one works.
        arrived = axis.onward(grads)
        dq, added = ring.visit(run, hop, keys, dq)
        return dq, jax.tree.map(jnp.add, arrived, added)

    def step(carry: tuple[_Keys, Array, Any], hop: Array) -> tuple[tuple[_Keys, Array, Any], None]:
        keys, dq, grads = carry
        coming = axis.onward(keys)
        return (coming, *visit(hop, keys, dq, grads)), None

    coming = axis.onward(keys)
    dq, grads = run(ring.tiles(None), axis.index(), keys, jnp.zeros(q.shape, jnp.float32))
    carry = (coming, dq, grads)
    if axis.size > 2:
        carry, _ = jax.lax.scan(step, carry, jnp.arange(1, axis.size - 1))
    dq, grads = visit(axis.size - 1, *carry)
    dk, dv = axis.onward(grads)
    return tuple(_from_zigzag(x.astype(like.dtype), axis) for x, like in ((dq, q), (dk, k), (dv, v)))
