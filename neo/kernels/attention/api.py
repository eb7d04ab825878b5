"""The one entry point of attention: checks, choice of the implementation, and sharding."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from neo.errors import InputError, nearest
from neo.kernels.attention.blockwise import blockwise
from neo.kernels.attention.dense import dense
from neo.kernels.attention.spec import Mask

IMPLEMENTATIONS = {"dense": dense, "blockwise": blockwise}

# At or below this length "auto" takes the dense implementation; above, the blockwise one. Ours, measured on 2 CPU
# cores, forward and backward, 8 heads of 32 or 64: dense is 1.3x faster at 32 tokens, level at 64 and 128, 1.6x slower
# at 256, 2x at 512. Inferred for other platforms.
DENSE_MAX_LENGTH = 128


@dataclasses.dataclass(frozen=True)
class AttentionSharding:
    """Which mesh axes split the batch, the heads (query and key/value alike) and the sequence."""

    mesh: Mesh
    batch: tuple[str, ...] = ("replica", "fsdp", "expert")
    heads: str = "tensor"
    sequence: str = "context"


def resolve(
    implementation: str, platform: str, *, seq_len: int | None = None, decoding: bool = False
) -> tuple[str, str]:
    """Turn "auto" into the name of one implementation, and say why; call it once at start-up and log the reason.

    platform: "cpu", "gpu" or "tpu". seq_len: the longest training sequence, None when not known. decoding: queries are
    fewer than keys (a cache), which only the dense implementation has. Errors: `InputError` for an unknown name.
    """
    if implementation in IMPLEMENTATIONS:
        return implementation, "asked for by name"
    if implementation != "auto":
        known = ("auto", *IMPLEMENTATIONS)
        raise InputError(
            f"unknown attention implementation {implementation!r}{nearest(implementation, known)}; "
            f"known: {', '.join(known)}"
        )
    if decoding:
        return "dense", "decoding against a cache"
    if seq_len is not None and seq_len <= DENSE_MAX_LENGTH:
        return (
            "dense",
            f"{seq_len} tokens on {platform}: up to {DENSE_MAX_LENGTH} the dense form is as fast and simpler",
        )
    length = "sequences of unknown length" if seq_len is None else f"{seq_len} tokens"
    return (
        "blockwise",
        f"{length} on {platform}: time and memory grow with the window, not with the square of the length",
    )


def attention(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    *,
    mask: Mask,
    segment_ids: Int[Array, "B T"] | None = None,
    kv_segment_ids: Int[Array, "B S"] | None = None,
    q_offset: Int[Array, "B"] | None = None,
    scale: float | None = None,
    alibi_slopes: Float[Array, "H"] | None = None,
    softcap: float | None = None,
    implementation: str = "auto",
    sharding: AttentionSharding | None = None,
) -> Float[Array, "B T H h"]:
    """softmax(cap(scale * q k^T) + bias) v over the keys that `mask` and the segments let each query see.

    q, k, v: H query heads share K key/value heads, query head n reads head n // (H / K). Output: q's shape and dtype;
        the softmax is fp32. A query that sees no key gets zeros.
    segment_ids: a query sees only keys of its own segment. kv_segment_ids: of the keys; defaults to segment_ids when
        there are as many keys as queries.
    q_offset: index in the key array of query 0 of each row (decoding against a cache); default 0.
    scale: default h ** -0.5.
    alibi_slopes: ALiBi (Press et al., arXiv:2108.12409): the bias of head n is -alibi_slopes[n] * |i - j|, with i and j
        the indices in the key array (q_offset counts; only the difference matters, so packed segments need nothing).
        Constants: their gradient is zero.
    softcap: cap(s) = softcap * tanh(s / softcap), a number > 0, before bias and mask (Gemma 2, arXiv:2408.00118,
        section 2); None does not cap.
    implementation: a name of `IMPLEMENTATIONS`, or "auto" (`resolve` for these shapes).
    sharding: runs the implementation in one `jax.shard_map`, so that it sees local shapes and no mesh.
    Errors: `InputError` for shapes that do not fit, and for what the implementation lacks (never another one instead).
    """
    if alibi_slopes is not None:
        alibi_slopes = jax.lax.stop_gradient(jnp.asarray(alibi_slopes, jnp.float32))
    kv_segment_ids = _check(q, k, v, segment_ids, kv_segment_ids, q_offset, alibi_slopes)
    if softcap is not None and (isinstance(softcap, bool) or not 0 < softcap < math.inf):
        raise InputError(f"attention: softcap is {softcap!r}; a number above 0, or None for no cap, would be right")
    h = q.shape[3]
    platform = jax.default_backend() if sharding is None else sharding.mesh.devices.flat[0].platform
    if implementation not in IMPLEMENTATIONS:
        decoding = q_offset is not None or k.shape[1] != q.shape[1] or not mask.causal
        implementation, _ = resolve(implementation, platform, seq_len=q.shape[1], decoding=decoding)
    run = functools.partial(
        IMPLEMENTATIONS[implementation],
        mask=mask,
        scale=h**-0.5 if scale is None else float(scale),
        softcap=None if softcap is None else float(softcap),
        platform=platform,
    )
    arrays = {
        "segment_ids": segment_ids, "kv_segment_ids": kv_segment_ids, "q_offset": q_offset, "alibi_slopes": alibi_slopes
    }  # fmt: skip

    if sharding is None:
        return run(q, k, v, **arrays)

    _check_sharding(sharding, q.shape, k.shape)
    heads = PartitionSpec(sharding.batch, sharding.sequence, sharding.heads, None)
    tokens = PartitionSpec(sharding.batch, sharding.sequence)
    specs = {
        "segment_ids": tokens,
        "kv_segment_ids": tokens,
        "q_offset": PartitionSpec(sharding.batch),
        "alibi_slopes": PartitionSpec(sharding.heads),
    }
    given = {name: array for name, array in arrays.items() if array is not None}
    absent = {name: None for name in arrays if name not in given}

    def local(q, k, v, given):
        return run(q, k, v, **given, **absent)

    return jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(heads, heads, heads, {name: specs[name] for name in given}),
        out_specs=heads,
        # The loops of the implementations start from plain zeros, which the varying-axes check refuses; every mesh axis
        # that splits anything stands in the specs, so there is nothing replicated for it to check.
        check_vma=False,
    )(q, k, v, given)


def _check(q, k, v, segment_ids, kv_segment_ids, q_offset, alibi_slopes):
    """Shapes that fit, or `InputError`. Returns the segments of the keys."""
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise InputError(
            f"attention needs q, k, v of 4 dimensions [B, T, heads, h]; got {q.shape}, {k.shape}, {v.shape}"
        )
    if k.shape != v.shape:
        raise InputError(f"attention needs keys and values of one shape; got {k.shape} and {v.shape}")
    (B, T, H, h), (_, S, K, _) = q.shape, k.shape
    if k.shape[0] != B or k.shape[3] != h:
        raise InputError(f"attention queries {q.shape} and keys {k.shape} differ in batch or head size")
    if min(B, T, S, H, K, h) < 1:
        raise InputError(f"attention needs at least one of everything; got queries {q.shape} and keys {k.shape}")
    if H % K:
        raise InputError(f"attention: {H} query heads are not a multiple of {K} key/value heads")
    if segment_ids is None and kv_segment_ids is not None:
        raise InputError("attention: kv_segment_ids given without segment_ids")
    if segment_ids is not None and kv_segment_ids is None:
        if S != T:
            raise InputError(f"attention: segment_ids of {T} queries need kv_segment_ids for the {S} keys")
        kv_segment_ids = segment_ids
    wanted = {
        "segment_ids": (segment_ids, (B, T)),
        "kv_segment_ids": (kv_segment_ids, (B, S)),
        "q_offset": (q_offset, (B,)),
        "alibi_slopes": (alibi_slopes, (H,)),
    }
    for name, (array, shape) in wanted.items():
        if array is not None and array.shape != shape:
            raise InputError(f"attention: {name} has shape {array.shape}; {shape} would be right")
    return kv_segment_ids


def _check_sharding(sharding: AttentionSharding, q_shape: Sequence[int], k_shape: Sequence[int]) -> None:
    sizes = dict(sharding.mesh.shape)
    for axis in (*sharding.batch, sharding.heads, sharding.sequence):
        if axis not in sizes:
            raise InputError(
                f"attention: the mesh has no axis {axis!r}{nearest(axis, sizes)}; it has {', '.join(sizes)}"
            )
    if sizes[sharding.sequence] != 1:
        raise InputError(
            f"attention: mesh axis {sharding.sequence!r} is {sizes[sharding.sequence]}; splitting the sequence needs "
            "ring attention, which is not available yet: set it to 1"
        )
    shards = math.prod(sizes[axis] for axis in sharding.batch)
    if q_shape[0] % shards:
        raise InputError(
            f"attention: batch {q_shape[0]} is not divisible by the {shards} shards of {'*'.join(sharding.batch)}"
        )
    tensor = sizes[sharding.heads]
    for what, count in (("query", q_shape[2]), ("key/value", k_shape[2])):
        if count % tensor:
            raise InputError(
                f"attention: {count} {what} heads are not divisible by mesh axis {sharding.heads!r} of {tensor}"
            )
