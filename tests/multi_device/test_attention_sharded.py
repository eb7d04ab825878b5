"""Attention split over a mesh gives what it gives on one device, forward and backward."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from neo.errors import InputError
from neo.kernels.attention import AttentionSharding, Mask, attention
from neo.kernels.attention.kernel import LSE_NAME, OUT_NAME

AXES = ("replica", "fsdp", "expert", "context", "tensor")
B, T, H, K, h = 8, 72, 4, 2, 16


def mesh_of(**sizes):
    return jax.make_mesh(tuple(sizes.get(a, 1) for a in AXES), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def inputs():
    rng = np.random.default_rng(0)
    q, k, v, do = (jnp.asarray(rng.normal(size=(B, T, n, h)), jnp.float32) for n in (H, K, K, H))
    segment_ids = jnp.asarray(1 + np.cumsum(rng.random((B, T)) < 0.05, axis=1), jnp.int32)
    return q, k, v, do, segment_ids


def run(implementation, window, packed, sharding):
    q, k, v, do, segment_ids = inputs()
    if sharding is not None:

        def put(x, *spec):
            return jax.device_put(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))

        q, k, v, do = (put(x, sharding.batch, None, sharding.heads) for x in (q, k, v, do))
        segment_ids = put(segment_ids, sharding.batch)

    def loss(q, k, v):
        out = attention(
            q, k, v, mask=Mask(window=window), segment_ids=segment_ids if packed else None,
            implementation=implementation, sharding=sharding,
        )  # fmt: skip
        return (out * do).sum(), out

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))
    text = step.lower(q, k, v).compile().as_text() if sharding is not None else ""
    (_, out), gradients = step(q, k, v)
    return (out, *gradients), text


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
@pytest.mark.parametrize("sizes", [{"fsdp": 4, "tensor": 2}, {"replica": 2, "fsdp": 2, "expert": 2}, {"fsdp": 8}])
@pytest.mark.parametrize(("window", "packed"), [(20, True), (None, False)])
def test_sharded_equals_one_device(implementation, sizes, window, packed):
    want, _ = run(implementation, window, packed, None)
    got, text = run(implementation, window, packed, AttentionSharding(mesh_of(**sizes)))
    shards = sizes.get("replica", 1) * sizes["fsdp"] * sizes.get("expert", 1)
    local = (B // shards, T, H // sizes.get("tensor", 1), h)
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        # The same sums of the same numbers; only the matmuls' blocking may differ with the local batch.
        np.testing.assert_allclose(a, b, atol=1e-5, err_msg=name)
    assert got[0].sharding.shard_shape(got[0].shape) == local
    # Each device works on its own rows and heads: nothing but the scalar loss crosses devices.
    for collective in ("all-gather(", "all-to-all(", "collective-permute(", "reduce-scatter("):
        assert collective not in text, collective


def test_decoding_offsets_are_split_with_the_batch():
    q, k, v, _, segment_ids = inputs()
    offsets = jnp.arange(B, dtype=jnp.int32) * 3

    def call(sharding):
        return attention(
            q[:, :1], k, v, mask=Mask(window=9), q_offset=offsets, segment_ids=segment_ids[:, :1],
            kv_segment_ids=segment_ids, sharding=sharding,
        )  # fmt: skip

    got = call(AttentionSharding(mesh_of(fsdp=4, tensor=2)))
    np.testing.assert_allclose(got, call(None), atol=1e-6)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_slopes_are_split_like_the_heads(implementation):
    q, k, v, do, segment_ids = inputs()
    slopes = jnp.asarray([0.5, 0.03, 0.2, 0.01])

    def gradient(sharding):
        def loss(q, k, v):
            out = attention(
                q, k, v, mask=Mask(window=40), segment_ids=segment_ids, alibi_slopes=slopes, softcap=2.0,
                implementation=implementation, sharding=sharding,
            )  # fmt: skip
            return (out * do).sum(), out

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v))[1:]

    for a, b in zip(gradient(AttentionSharding(mesh_of(fsdp=4, tensor=2))), gradient(None), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("implementation", ["dense", "blockwise"])
def test_sinks_are_split_like_the_heads_and_their_gradients_summed(implementation):
    q, k, v, do, _ = inputs()
    sinks = jnp.asarray([0.5, -1.0, 2.0, 0.0])

    def gradient(sharding):
        def loss(q, sinks):
            out, lse = attention(q, k, v, mask=Mask(window=40), sinks=sinks, implementation=implementation,
                                 sharding=sharding, return_lse=True)  # fmt: skip
            return (out * do).sum() + jnp.sin(lse).sum(), (out, lse)

        return jax.tree.leaves(jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(q, sinks))[1:]

    got, want = gradient(AttentionSharding(mesh_of(fsdp=4, tensor=2))), gradient(None)
    assert got[1].shape == (B, H, T)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def test_inside_checkpointed_scan():
    """As in a decoder: one block, scanned over layers and rematerialised."""
    q, k, v, do, _ = inputs()

    def gradient(sharding):
        def loss(q, k, v):
            def block(x, _):
                return (
                    x + attention(x, k, v, mask=Mask(window=7), implementation="blockwise", sharding=sharding),
                    None,
                )

            return (jax.lax.scan(jax.checkpoint(block, prevent_cse=False), q, None, length=2)[0] * do).sum()

        return jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v)

    sharded = gradient(AttentionSharding(mesh_of(fsdp=4, tensor=2)))
    for a, b in zip(sharded, gradient(None), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


@pytest.mark.parametrize(
    ("sizes", "shape", "message"),
    [
        ({"context": 8}, (8, 4, 2), "12 queries are not divisible by mesh axis 'context' of 8"),
        ({"fsdp": 8}, (4, 4, 2), r"batch 4 is not divisible by the 8 shards of replica\*fsdp\*expert"),
        ({"tensor": 4, "fsdp": 2}, (8, 4, 2), "2 key/value heads are not divisible by mesh axis 'tensor' of 4"),
        ({"tensor": 8}, (8, 4, 4), "4 query heads are not divisible by mesh axis 'tensor' of 8"),
    ],
)
def test_impossible_splits_are_refused(sizes, shape, message):
    batch, heads, kv_heads = shape
    q, k = jnp.ones((batch, 12, heads, 8)), jnp.ones((batch, 12, kv_heads, 8))
    with pytest.raises(InputError, match=message):
        attention(q, k, k, mask=Mask(), sharding=AttentionSharding(mesh_of(**sizes)))


def test_a_mesh_without_the_axis_is_refused():
    q = jnp.ones((8, 16, 4, 8))
    sharding = AttentionSharding(mesh_of(fsdp=8), batch=("replica", "fdsp"))
    with pytest.raises(InputError, match="no axis 'fdsp' \\(did you mean 'fsdp'\\?\\)"):
        attention(q, q, q, mask=Mask(), sharding=sharding)


def test_remat_policy_reaches_the_residuals_through_shard_map():
    q, k, v, do, _ = inputs()
    sharding = AttentionSharding(mesh_of(fsdp=4, tensor=2))

    def loss(q, k, v):
        out = attention(q, k, v, mask=Mask(window=8), implementation="blockwise", sharding=sharding)
        return (out * do).sum()

    def gradient(policy):
        return jax.grad(jax.checkpoint(loss, policy=policy, prevent_cse=False), (0, 1, 2))

    names = checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME)
    assert str(jax.make_jaxpr(gradient(names))(q, k, v)).count("scan[") == 2
    assert str(jax.make_jaxpr(gradient(checkpoint_policies.nothing_saveable))(q, k, v)).count("scan[") == 3
    for a, b in zip(jax.jit(gradient(names))(q, k, v), jax.jit(jax.grad(loss, (0, 1, 2)))(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
