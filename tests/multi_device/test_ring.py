"""Attention over a split sequence: what it gives, what it moves, what it keeps; against float64 and one device."""

from __future__ import annotations

import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import checkpoint_policies
from jax.sharding import AxisType, PartitionSpec

from neo.errors import InputError
from neo.kernels.attention import AttentionSharding, Mask, attention, ring
from neo.kernels.attention.kernel import LSE_NAME, OUT_NAME, Extras, Kernel, Plan

from ..kernels.attention import oracle

pytestmark = pytest.mark.usefixtures("shared_compile_cache")
AXES = ("replica", "fsdp", "expert", "context", "tensor")
B, T, H, K, h = 2, 64, 4, 2, 16
SLOPES = np.asarray([0.5, 0.03, 0.2, 0.01], np.float32)
SINKS = np.asarray([0.5, -1.0, 2.0, 0.0], np.float32)
NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")
# name -> what the layer does to its scores
PLAIN, ALL = {}, dict(segments=True, slopes=True, softcap=5.0, sinks=True)


def mesh_of(**sizes):
    shape = tuple(sizes.get(a, 1) for a in AXES)
    devices = jax.devices()[: int(np.prod(shape))]
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


@functools.cache
def inputs():
    """q, k, v, the cotangents of out and lse, segments; some shorter than a shard, some over several."""
    rng = np.random.default_rng(0)
    q, k, v, dout = (rng.normal(size=(B, T, n, h)).astype(np.float32) for n in (H, K, K, H))
    dlse = rng.normal(size=(B, H, T)).astype(np.float32)
    segment_ids = 1 + np.cumsum(rng.random((B, T)) < 0.06, axis=1)
    return q, k, v, dout, dlse, segment_ids.astype(np.int32)


def options_of(segments=False, slopes=False, softcap=None, sinks=False):
    return dict(segment_ids=inputs()[-1] if segments else None, slopes=SLOPES if slopes else None, softcap=softcap,
                sinks=SINKS if sinks else None)


def run(sharding, window, options, dtype=jnp.float32, implementation="blockwise"):
    """out, lse and the gradients, by name."""
    q, k, v, dout, dlse, _ = inputs()
    given = options_of(**options)
    given["alibi_slopes"] = given.pop("slopes")

    def loss(q, k, v, sinks):
        out, lse = attention(q, k, v, mask=Mask(window=window), implementation=implementation, sharding=sharding,
                             return_lse=True, **{**given, "sinks": sinks})  # fmt: skip
        return (out * dout.astype(dtype)).astype(jnp.float32).sum() + (lse * dlse).sum(), (out, lse)

    step = jax.jit(jax.value_and_grad(loss, (0, 1, 2) if given["sinks"] is None else (0, 1, 2, 3), has_aux=True))
    (_, results), gradients = step(*(x.astype(dtype) for x in (q, k, v)), given["sinks"])
    return dict(zip(NAMES, (*results, *gradients), strict=False))


def exact(window, options, dtype=np.float32):
    q, k, v, dout, dlse, _ = inputs()
    given = options_of(**options)
    q, k, v, dout = (x.astype(dtype) for x in (q, k, v, dout))
    found = oracle.attention(q, k, v, scale=h**-0.5, window=window, kv_segment_ids=given["segment_ids"], dout=dout, dlse=dlse,
                             **given)  # fmt: skip
    return {name: getattr(found, name) for name in NAMES if getattr(found, name) is not None}


# A shard of context=8 has 8 tokens: windows of 1 (nothing travels), 2, a shard less one, a shard, one more, over several
# shards, almost everything, no window.
CASES = [
    *((dict(context=8), window, PLAIN) for window in (1, 2, 7, 8, 9, 63, None)),
    *((dict(context=8), window, ALL) for window in (2, 19, None)),
    (dict(context=4), 33, ALL),
    (dict(context=4), None, dict(segments=True)),
    (dict(context=2), 31, dict(slopes=True)),
    (dict(context=2), None, ALL),
    (dict(context=2, tensor=2, fsdp=2), 40, ALL),
    (dict(context=2, tensor=2, fsdp=2), None, dict(slopes=True, sinks=True)),
]


@pytest.mark.parametrize(("sizes", "window", "options"), CASES, ids=str)
def test_equals_float64_of_the_whole_sequence(sizes, window, options):
    """Seen, with blockwise: 7e-7 of the largest entry. Merging with the wrong weights, a shift that is off by one chunk or a
    lost visit show from 1e-2 on."""
    wanted, got = exact(window, options), run(AttentionSharding(mesh_of(**sizes)), window, options)
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(got[name], value, atol=5e-6 * max(1.0, np.abs(value).max()), err_msg=name)


@pytest.mark.parametrize("window", [19, None])
def test_bfloat16_is_as_near_as_on_one_device(window):
    dtype, options = jnp.bfloat16, ALL if window else dict(segments=True, sinks=True)
    wanted = exact(window, options, dtype)
    whole = run(None, window, options, dtype)
    split = run(AttentionSharding(mesh_of(context=4, tensor=2)), window, options, dtype)
    for name, value in wanted.items():
        error, one = (np.abs(np.asarray(x[name], np.float64) - value).max() for x in (split, whole))
        assert error <= 2 * one + 1e-5 * np.abs(value).max(), name
        assert split[name].dtype == whole[name].dtype


# -- unseen keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [9, None])
def test_keys_of_another_segment_on_another_device_get_exactly_no_gradient(window):
    """Queries from the second segment on have a cotangent only; the first segment ends inside of a shard."""
    q, k, v, dout, _, _ = inputs()
    segment_ids = jnp.asarray(np.broadcast_to(1 + (np.arange(T) >= 27), (B, T)), jnp.int32)
    dout = np.where(np.arange(T)[:, None, None] >= 27, dout, 0)
    sharding = AttentionSharding(mesh_of(context=8))

    def loss(k, v):
        out = attention(q, k, v, mask=Mask(window=window), segment_ids=segment_ids, implementation="blockwise",
                        sharding=sharding)  # fmt: skip
        return (out * dout).sum()

    for gradient in jax.jit(jax.grad(loss, (0, 1)))(k, v):
        assert not np.asarray(gradient[:, :27]).any()
        assert np.asarray(gradient[:, 27:]).any()


# -- what moves ----------------------------------------------------------------------------------------------------------


def moved(function, *args):
    """[(shape, dtype, times)] of the ppermutes of a jaxpr; in a loop each counts as often as the loop runs."""
    found = []

    def look(jaxpr, times):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "ppermute":
                found.append((equation.invars[0].aval.shape, equation.invars[0].aval.dtype.name, times))
            inner = times * equation.params["length"] if equation.primitive.name == "scan" else times
            for value in equation.params.values():
                for one in value if isinstance(value, (tuple, list)) else (value,):
                    one = getattr(one, "jaxpr", one)
                    if hasattr(one, "eqns"):
                        look(one, inner)

    look(jax.make_jaxpr(function)(*args).jaxpr, 1)
    return found


def loss_of(window, size, **options):
    q, k, v, dout, _, segment_ids = inputs()
    sharding = AttentionSharding(mesh_of(context=size))

    def loss(q, k, v):
        out = attention(q, k, v, mask=Mask(window=window), implementation="blockwise", sharding=sharding,
                        segment_ids=segment_ids, **options)  # fmt: skip
        return (out * dout).sum()

    return loss, (q, k, v)


@pytest.mark.parametrize(("window", "size"), [(1, 8), (2, 8), (8, 8), (9, 8), (19, 8), (60, 8), (17, 4), (64, 8)])
def test_only_the_keys_that_a_window_reaches_travel(window, size):
    """W - 1 keys, values and segments forward (all that there are, where W reaches over everything but one key)."""
    loss, args = loss_of(window, size)
    tokens = collections.Counter()
    for shape, dtype, times in moved(loss, *args):
        tokens[shape[2:], dtype] += shape[1] * times
    if window == T:
        assert tokens[(K, h), "float32"] > 2 * 7 * 8, "the ring, where the window hides nothing"
        return
    halo = min(window - 1, T - T // size)
    assert +tokens == +collections.Counter({((K, h), "float32"): 2 * halo, ((), "int32"): halo})
    # Backward: k, v and segments again, and the gradients back.
    count = sum(shape[1] * times for shape, _, times in moved(jax.grad(loss, (0, 1, 2)), *args) if shape[2:] == (K, h))
    assert count == 2 * halo + 2 * halo + 2 * halo


def test_the_compiler_moves_no_more():
    """Without segments: in the compiled forward, collective-permutes of W - 1 keys and nothing else."""
    q, k, v, *_ = inputs()
    sharding = AttentionSharding(mesh_of(context=8))
    step = jax.jit(functools.partial(attention, mask=Mask(window=12), implementation="blockwise", sharding=sharding))
    spec = jax.sharding.NamedSharding(sharding.mesh, PartitionSpec(None, "context"))
    lines = step.lower(*(jax.device_put(x, spec) for x in (q, k, v))).compile().as_text().splitlines()
    permutes = [line.split("=")[1] for line in lines if "collective-permute(" in line or "collective-permute-start(" in line]
    assert sorted(line.split("{")[0].strip() for line in permutes) == sorted(2 * [f"f32[{B},8,{K},{h}]", f"f32[{B},3,{K},{h}]"])
    for other in ("all-gather", "all-to-all", "reduce-scatter", "all-reduce"):
        assert not [line for line in lines if f"{other}(" in line or f"{other}-start(" in line], other


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_ring_moves_keys_once_round_and_queries_twice(size):
    """Forward: q, k, v and out in two halves to their zigzag places or back, k and v n - 1 times on. Backward: q, k, v and
    dout there, dq, dk, dv back, k and v n - 1 times on, their fp32 gradients n times."""
    loss, args = loss_of(None, size)
    shard = T // size

    def tokens(function, heads):
        return sum(shape[1] * times for shape, _, times in moved(function, *args) if shape[2:] == (heads, h))

    forward, both = (lambda heads, f=f: tokens(f, heads) for f in (loss, jax.grad(loss, (0, 1, 2))))
    assert forward(H) == 2 * shard
    assert forward(K) == 2 * shard + 2 * (size - 1) * shard
    assert both(H) - forward(H) == 3 * shard
    assert both(K) - forward(K) == 2 * shard + 2 * (size - 1) * shard + 2 * size * shard + 2 * shard


@pytest.mark.parametrize("window", [12, None])
def test_a_remat_policy_that_keeps_output_and_lse_skips_the_forward(window):
    """As `remat` attention and minimal have it: the backward of a checkpointed block moves what the bare one moves."""
    loss, args = loss_of(window, 4, sinks=jnp.asarray(SINKS))

    def count(policy):
        block = loss if policy is None else jax.checkpoint(loss, policy=policy, prevent_cse=False)
        return sum(times for *_, times in moved(jax.grad(block, (0, 1, 2)), *args))

    bare = count(None)
    forward = sum(times for *_, times in moved(loss, *args))
    assert count(checkpoint_policies.save_only_these_names(OUT_NAME, LSE_NAME)) == bare
    # Nobody asks for the log-sum-exp but the backward: the first pass does not bring its two halves back.
    assert count(checkpoint_policies.nothing_saveable) == bare + forward - (2 if window is None else 0)


# -- what is kept --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [40, None])
def test_residuals_are_local(window):
    """q, k, v, out and lse of a device's own tokens, its segments: nothing of the halo and nothing of the ring."""
    loss, args = loss_of(window, 8)
    back = jax.eval_shape(lambda *args: jax.vjp(loss, *args)[1], *args)
    kept = sum(x.size for x in jax.tree.leaves(back) if x.ndim >= 2)
    most = B * T * (2 * H * h + 2 * K * h + H + 2) + B * T * H * h  # the last: the cotangent that this loss multiplies with
    assert kept <= most


# -- balance -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slopes", [False, True])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_every_device_does_the_same_work_in_every_visit(size, slopes):
    """And together all pairs of chunks that causality leaves, each once."""
    chunks, seen = 2 * size, np.zeros((2 * size, 2 * size))
    for device in range(size):
        for hop in range(size):
            own, source = (device, chunks - 1 - device), (device - hop) % size
            theirs = (source, chunks - 1 - source)
            earlier = None if hop == 0 else hop <= device
            extras = Extras(slopes=jnp.asarray(SLOPES) if slopes else None)
            around = ring._Ring(jnp.zeros((1, 2, 1, 1)), extras, Plan(1.0), None, ring._Axis("context", size))
            products = 0
            for tile in around.tiles(earlier):
                pairs = [(own[a], theirs[b]) for a in range(*tile.q) for b in range(*tile.k)]
                products += 4 / 2 if tile.causal and len(pairs) == 4 else len(pairs) / (2 if tile.causal else 1)
                for i, j in pairs:
                    if not tile.causal or own.index(i) >= theirs.index(j):
                        seen[i, j] += 1
            assert products == 2
    np.testing.assert_array_equal(seen, np.tri(chunks))


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_zigzag_is_two_permutations(size):
    for number, pairs in enumerate(ring._homes(ring._Axis("context", size))):
        assert sorted(a for a, _ in pairs) == sorted(b for _, b in pairs) == list(range(size))
        for a, b in pairs:
            assert 2 * a + number in (b, 2 * size - 1 - b)


@pytest.mark.parametrize(("window", "shard", "size", "pieces"), [
    (1, 8, 4, []), (2, 8, 4, [1]), (9, 8, 4, [8]), (10, 8, 4, [8, 1]), (30, 8, 4, [8, 8, 8]), (25, 8, 4, [8, 8, 8]),
    (24, 8, 4, [8, 8, 7])])  # fmt: skip
def test_halo_pieces(window, shard, size, pieces):
    assert ring.halo_pieces(window, shard, size) == pieces


# -- refusals ------------------------------------------------------------------------------------------------------------


def attend(length, window=None, causal=True, size=8, implementation="blockwise"):
    q = jnp.ones((1, length, H, h))
    sharding = AttentionSharding(mesh_of(context=size))
    return attention(q, q, q, mask=Mask(causal, window), implementation=implementation, sharding=sharding)


@pytest.mark.parametrize(("arguments", "message"), [
    (dict(length=24), "24 tokens cannot be split over mesh axis 'context' of 8.*multiple of 16, such as 16"),
    (dict(length=20, window=3), "20 queries are not divisible by mesh axis 'context' of 8"),
    (dict(length=32, causal=False), "lacks causal=False"),
    (dict(length=32, implementation="dense"), "'dense' lacks a sequence split 8 ways"),
])  # fmt: skip
def test_what_cannot_be_split_is_refused(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        attend(**arguments)
    assert "\n" not in str(caught.value)


def test_an_odd_shard_will_do_with_a_window():
    assert np.isfinite(attend(24, window=5)).all()


def test_offsets_are_refused():
    x = jnp.ones((1, 8, 1, 16))
    kernel = Kernel("none", None, None, lambda request: "")
    for extras, plan in ((Extras(), Plan(1.0, offset=3)), (Extras(first_key=jnp.int32(1)), Plan(1.0))):
        with pytest.raises(InputError, match="one key per query and no offset"):
            ring.attend(x, x, x, extras, plan, kernel, axis="context", size=2)
