"""The one entry point of attention: checks, choice of the implementation, and sharding."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, Float, Int

from neo.errors import InputError, nearest
from neo.kernels.attention.dense import dense
from neo.kernels.attention.kernel import Extras, Plan, Request
from neo.kernels.attention.select import IMPLEMENTATIONS, resolve
from neo.kernels.attention.spec import Mask


@dataclasses.dataclass(frozen=True)
class AttentionSharding:
    """Which mesh axes split the batch, the heads (query and key/value alike) and the sequence."""

    mesh: Mesh
    batch: tuple[str, ...] = ("replica", "fsdp", "expert")
    heads: str = "tensor"
    sequence: str = "context"


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
    sinks: Float[Array, "H"] | None = None,
    implementation: str = "auto",
    sharding: AttentionSharding | None = None,
    return_lse: bool = False,
    interpret: object = False,
) -> Float[Array, "B T H h"] | tuple[Float[Array, "B T H h"], Float[Array, "B H T"]]:
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
    sinks: a learned logit a head that takes its share of the softmax and has no value (gpt-oss, arXiv:2508.10925,
        section 2; a bias in the denominator).
    implementation: a name of `IMPLEMENTATIONS`, or "auto" (`resolve` for these shapes).
    sharding: runs the implementation in one `jax.shard_map`, so that it sees local shapes and no mesh. A sequence that is
        split runs `ring`.
    return_lse: also give the fp32 log-sum-exp of each row's scores, [B, H, T], with the sink in it, -inf for a row that
        sees nothing; differentiable.
    interpret: run a Pallas kernel on any platform, slowly, for tests (see `Plan`).
    Errors: `InputError` for shapes that do not fit, and for what the implementation lacks (never another one instead).
    """
    if alibi_slopes is not None:
        alibi_slopes = jax.lax.stop_gradient(jnp.asarray(alibi_slopes, jnp.float32))
    kv_segment_ids = _check(q, k, v, segment_ids, kv_segment_ids, q_offset, alibi_slopes, sinks)
    if not isinstance(mask, Mask):
        raise InputError(f"attention: mask is {mask!r}; a Mask would be right")
    if scale is not None and (not isinstance(scale, (int, float)) or isinstance(scale, bool) or not math.isfinite(scale)):
        raise InputError(f"attention: scale is {scale!r}; a finite number, or None for h ** -0.5, would be right")
    if softcap is not None and (isinstance(softcap, bool) or not 0 < softcap < math.inf):
        raise InputError(f"attention: softcap is {softcap!r}; a number above 0, or None for no cap, would be right")
    (_, T, H, h), (S, K) = q.shape, k.shape[1:3]
    sizes = {} if sharding is None else _check_sharding(sharding, q.shape, k.shape)
    tensor, shards = (sizes[sharding.heads], sizes[sharding.sequence]) if sizes else (1, 1)
    device = None if sharding is None else sharding.mesh.devices.flat[0]
    platform = jax.default_backend() if device is None else device.platform
    kind = device.device_kind if device is not None else jax.devices(platform)[0].device_kind
    request = Request(
        platform=platform, device_kind=kind, dtype=str(q.dtype), seq_len=T, kv_len=S, num_heads=H // tensor,
        num_kv_heads=K // tensor, head_size=h, causal=mask.causal, window=mask.window, softcap=softcap is not None,
        segments=segment_ids is not None, alibi=alibi_slopes is not None, sinks=sinks is not None,
        q_offset=q_offset is not None, sequence_shards=shards, interpret=bool(interpret), lse=return_lse,
    )  # fmt: skip
    name, _ = resolve(implementation, request)
    plan = Plan(
        scale=h**-0.5 if scale is None else float(scale), causal=mask.causal,
        window=None if mask.window is None or mask.window >= S else mask.window,
        softcap=None if softcap is None else float(softcap), device_kind=kind, platform=platform, interpret=interpret,
    )  # fmt: skip
    arrays = {"segment_ids": segment_ids, "kv_segment_ids": kv_segment_ids, "q_offset": q_offset,
              "slopes": alibi_slopes, "sinks": sinks}  # fmt: skip

    def local(q: Array, k: Array, v: Array, given: dict[str, Array]) -> tuple[Array, Array | None]:
        given = dict(given)
        offset = given.pop("q_offset", None)
        if name == "dense":
            given["alibi_slopes"] = given.pop("slopes", None)
            options = {"segment_ids": None, "kv_segment_ids": None} | given
            return dense(q, k, v, mask=mask, q_offset=offset, scale=plan.scale, softcap=plan.softcap, **options)
        if shards > 1:
            from neo.kernels.attention import ring

            return ring.attend(q, k, v, Extras(**given), plan, IMPLEMENTATIONS[name], axis=sharding.sequence, size=shards)
        return IMPLEMENTATIONS[name].attend(q, k, v, Extras(**given), plan)

    given = {name: array for name, array in arrays.items() if array is not None}
    out, lse = (local if sharding is None else _sharded(local, sharding, set(given)))(q, k, v, given)
    return (out, lse) if return_lse else out


def _sharded(local: Any, sharding: AttentionSharding, names: set[str]) -> Any:
    batch, sequence, head = sharding.batch, sharding.sequence, sharding.heads
    heads, tokens = PartitionSpec(batch, sequence, head, None), PartitionSpec(batch, sequence)
    specs = {"segment_ids": tokens, "kv_segment_ids": tokens, "q_offset": PartitionSpec(batch),
             "slopes": PartitionSpec(head), "sinks": PartitionSpec(head)}  # fmt: skip
    return jax.shard_map(
        local,
        mesh=sharding.mesh,
        in_specs=(heads, heads, heads, {name: specs[name] for name in names}),
        out_specs=(heads, PartitionSpec(batch, head, sequence)),
        # The loops of the implementations start from plain zeros, which the varying-axes check refuses; every mesh axis
        # that splits anything stands in the specs, so there is nothing replicated for it to check. Replicated inputs
        # (sinks) get their gradients summed over the other axes all the same.
        check_vma=False,
    )


def _check(q, k, v, segment_ids, kv_segment_ids, q_offset, alibi_slopes, sinks):
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
    if not q.dtype == k.dtype == v.dtype or not jnp.issubdtype(q.dtype, jnp.floating):
        raise InputError(
            f"attention: q, k, v have dtypes {q.dtype}, {k.dtype}, {v.dtype}; one floating type for all would be right"
        )
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
        "sinks": (sinks, (H,)),
    }
    for name, (array, shape) in wanted.items():
        if array is None:
            continue
        if array.shape != shape:
            raise InputError(f"attention: {name} has shape {array.shape}; {shape} would be right")
        whole = name.endswith(("_ids", "_offset"))
        if whole != jnp.issubdtype(array.dtype, jnp.integer):
            raise InputError(
                f"attention: {name} has dtype {array.dtype}; {'an integer' if whole else 'a floating'} type would be right"
            )
    return kv_segment_ids


def _check_sharding(sharding: AttentionSharding, q_shape: Sequence[int], k_shape: Sequence[int]) -> dict[str, int]:
    """Sizes of the mesh axes, which split these shapes evenly, or `InputError`."""
    sizes = dict(sharding.mesh.shape)
    for axis in (*sharding.batch, sharding.heads, sharding.sequence):
        if axis not in sizes:
            raise InputError(
                f"attention: the mesh has no axis {axis!r}{nearest(axis, sizes)}; it has {', '.join(sizes)}"
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
    context = sizes[sharding.sequence]
    for what, length in (("queries", q_shape[1]), ("keys", k_shape[1])):
        if length % context:
            raise InputError(
                f"attention: {length} {what} are not divisible by mesh axis {sharding.sequence!r} of {context}"
            )
    return sizes
