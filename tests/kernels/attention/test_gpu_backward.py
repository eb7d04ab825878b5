"""The Hopper backward, interpreted with race detection against the float64 oracle; its walks against brute force.

Not run on hardware here: test_gpu_compile.py compiles what `SHIPPED` lists.
"""

from __future__ import annotations

import dataclasses
import functools
import re

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.kernels.attention.gpu import backward_dkv, backward_dq, mosaic
from neo.kernels.attention.gpu.backward import SHIPPED, TILES, Tiles, backward, tiles_for
from neo.kernels.attention.gpu.backward_tiles import MASKED, SKIPPED, WHOLE, Band, list_walks
from neo.kernels.attention.kernel import Extras, Plan, hide_empty_rows

from . import oracle

interpreted = pytest.mark.skipif(not mosaic.can_interpret(), reason="JAX 0.10 cannot interpret these kernels, 0.12 can")


@dataclasses.dataclass(frozen=True)
class Call:
    """A call of the kernel. segments: ids of [B, T] from how many documents; a query side whose last id no key has.

    rings: slots of the dq and the dkv kernel, fewer than shipped, so that so short a call goes round them.
    """

    T: int
    heads: tuple[int, int] = (1, 1)
    h: int = 64
    keys: int | None = None
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    offset: int = 0
    alibi: bool = False
    segments: bool = False
    first_key: int | None = None
    rings: tuple[int, int] | None = None

    @property
    def S(self) -> int:
        return self.keys if self.keys is not None else self.offset + self.T

    @functools.cached_property
    def arrays(self) -> dict:
        rng = np.random.default_rng(0)
        (H, K), bf16 = self.heads, ml_dtypes.bfloat16

        def normal(*shape):
            return rng.normal(size=shape).astype(bf16)

        found = dict(q=normal(1, self.T, H, self.h), k=normal(1, self.S, K, self.h), v=normal(1, self.S, K, self.h),
                     dout=normal(1, self.T, H, self.h))  # fmt: skip
        if self.alibi:
            found["slopes"] = 2.0 ** -np.arange(1, H + 1, dtype=np.float32)
        if self.segments:
            ids = np.sort(rng.integers(0, 4, (1, self.T))).astype(np.int32)
            found |= dict(segment_ids=np.where(np.arange(self.T) >= self.T - 9, 7, ids), kv_segment_ids=ids)
        if self.first_key is not None:
            found["first_key"] = np.int32(self.first_key)
        return found

    @property
    def options(self) -> dict:
        return dict(scale=self.h**-0.5, causal=self.causal, window=self.window, softcap=self.softcap, offset=self.offset)

    @functools.cached_property
    def truth(self) -> oracle.Result:
        return oracle.attention(**self.arrays, **self.options)

    @functools.cached_property
    def plain(self) -> oracle.Result:
        return oracle.attention(**self.arrays, **self.options, rounded_to=ml_dtypes.bfloat16)

    def run(self, **changed) -> tuple[np.ndarray, ...]:
        """(dq, dk, dv) as float32. changed: arrays in the place of the call's."""
        arrays = self.arrays | changed
        q, k, v, dout = (jnp.asarray(arrays.pop(name)) for name in ("q", "k", "v", "dout"))
        delta = (self.truth.out * self.arrays["dout"].astype(np.float64)).sum(-1).swapaxes(1, 2)
        lse = hide_empty_rows(jnp.asarray(self.truth.lse, jnp.float32))
        plan = Plan(interpret=plgpu.InterpretGPUParams(detect_races=True, num_tma_threads_per_device=2), **self.options)
        extras = Extras(**jax.tree.map(jnp.asarray, arrays))
        chosen = None
        if self.rings is not None:
            shipped, (dq, dkv) = tiles_for(self.h), self.rings
            chosen = Tiles(dataclasses.replace(shipped.dq, slots=dq), dataclasses.replace(shipped.dkv, slots=dkv))
        found = backward(q, k, v, lse, jnp.asarray(delta, jnp.float32), dout, extras, plan, chosen)
        return tuple(np.asarray(x, np.float32) for x in found)

    def judge(self, found: tuple[np.ndarray, ...]) -> None:
        """FlashAttention's rule: no more than twice the error of the plain bf16 implementation (3 times with soft-cap)."""
        for name, array in zip(("dq", "dk", "dv"), found, strict=True):
            truth, plain = getattr(self.truth, name), getattr(self.plain, name).astype(np.float64)
            allowed = (2 if self.softcap is None else 3) * np.abs(plain - truth).max() + 1e-3 * np.abs(truth).max()
            assert np.abs(array - truth).max() <= allowed, name


CALLS = {
    "window, GQA, offset, ragged": Call(100, (2, 1), offset=160, window=70, rings=(4, 3)),
    "full causal, h=128": Call(192, h=128, rings=(5, 2)),
    "all features, h=80 padded to 128": Call(200, (2, 1), 80, window=90, softcap=5.0, alibi=True, segments=True, first_key=40),
    "not causal, ragged": Call(70, keys=140, causal=False),
    "h=192": Call(128, (2, 1), 192, window=40),
    "h=256": Call(128, h=256, window=40),
}


@interpreted
@pytest.mark.parametrize("name", CALLS)
def test_gradients_match_the_oracle(name):
    call = CALLS[name]
    call.judge(call.run())


@interpreted
def test_unseen_blocks_are_not_read_and_two_runs_agree_bitwise():
    """128 keys lie before every window, and 128 more belong to a document that no query has: one block each of the dkv
    kernel, two of the dq kernel."""
    call = Call(128, offset=256, window=180)
    ids = np.repeat(np.array([[0, 1, 2]], np.int32), 128, axis=1)
    call.arrays.update(segment_ids=ids[:, 256:], kv_segment_ids=ids)
    clean = call.run()
    call.judge(clean)
    k, v = (call.arrays[name].copy() for name in ("k", "v"))
    k[:, :256], v[:, :256] = np.nan, np.nan
    poisoned = call.run(k=k, v=v)
    for before, after in zip(clean, poisoned, strict=True):
        np.testing.assert_array_equal(before, after)
    for gradient in clean[1:]:
        assert not gradient[:, :256].any() and gradient[:, 256:].any(-1).all()


@settings(max_examples=150)
@given(
    blocks=st.sampled_from([(64, 128), (128, 64), (64, 64), (128, 128)]),
    T=st.integers(1, 700),
    offset=st.sampled_from([0, 1, 63, 64, 200]),
    window=st.sampled_from([None, 1, 2, 63, 64, 65, 127, 128, 129, 300, 5000]),
    causal=st.booleans(),
    S=st.integers(1, 500),
)
def test_walks_visit_what_is_visible_and_mask_what_is_not_whole(blocks, T, offset, window, causal, S):
    block_q, block_kv = blocks
    S = offset + T if causal else S
    num_q, num_kv = -(-T // 128) * 128 // block_q, -(-S // 128) * 128 // block_kv
    band = Band(block_q, block_kv, num_q, num_kv, S, causal, window if causal else None, offset)
    i = np.arange(num_q * block_q)[:, None] + offset
    j = np.arange(num_kv * block_kv)[None, :]
    seen = np.broadcast_to((j <= i) if causal else (j < S), (i.size, j.size)).copy()
    if causal and window is not None:
        seen &= j > i - window
    pairs = seen.reshape(num_q, block_q, num_kv, block_kv).swapaxes(1, 2)
    some, every = pairs.any((2, 3)), pairs.all((2, 3))
    for walk_of, number, longest, any_seen, all_seen in (
        (band.kv_walk, num_q, band.longest_kv_walk, some, every),
        (band.q_walk, num_kv, band.longest_q_walk, some.T, every.T),
    ):
        for block in range(number):
            walk = walk_of(block)
            visited = [walk.block(step) for step in range(walk.total)]
            assert sorted(visited) == list(range(walk.low, walk.high))
            assert set(np.flatnonzero(any_seen[block])) <= set(visited)
            assert all(all_seen[block][n] for n in visited[walk.masked :])  # those without a mask need none
            assert [walk.block(step, masked=step < walk.masked) for step in range(walk.total)] == visited
            assert walk.total <= longest
            if causal:  # padded queries see later keys than there are, so only there is the walk not the least
                assert len(visited) == any_seen[block].sum()
                assert walk.masked == (any_seen[block] & ~all_seen[block]).sum()


def test_work_of_a_window_does_not_grow_with_the_length():
    for T in (8192, 32768):
        band = Band(64, 128, T // 64, T // 128, T, True, 4096, 0)
        assert max(band.q_walk(n).total for n in range(T // 128)) == 66
        assert max(band.kv_walk(n).total for n in range(T // 64)) == 33
        assert max(band.q_walk(n).masked for n in range(T // 128)) == 4
        # What lists have room for: one more where blocks of queries and keys are not aligned (an offset).
        assert (band.longest_q_walk, band.longest_kv_walk) == (67, 34)
    blocks, _ = jax.eval_shape(lambda: list_walks(band, "kv", None, None, jnp.int32(0), 1))
    assert blocks.shape == (1, T // 128, 67)


@pytest.mark.parametrize("stationary", ["q", "kv"])
@pytest.mark.parametrize("window", [None, 100])
def test_lists_hold_every_pair_that_can_meet_and_no_other(stationary, window):
    rng = np.random.default_rng(1)
    T, block_q, block_kv, first_key = 512, 64, 128, 200
    band = Band(block_q, block_kv, T // block_q, T // block_kv, T, True, window, 0)
    ids = np.stack([np.sort(rng.integers(0, 9, T)), rng.permutation(np.repeat(np.arange(8), 64)), np.zeros(T, int)])
    make = jax.jit(lambda ids, first_key: list_walks(band, stationary, ids, ids, first_key, len(ids)))
    blocks, counts = map(np.asarray, make(jnp.asarray(ids), jnp.int32(first_key)))
    by_q, by_kv = ids.reshape(3, -1, block_q), ids.reshape(3, -1, block_kv)
    for b in range(len(ids)):
        for block in range(blocks.shape[1]):
            expected = {MASKED: [], WHOLE: [], SKIPPED: []}
            for other in range(T // (block_q if stationary == "kv" else block_kv)):
                m, n = (other, block) if stationary == "kv" else (block, other)
                i, j = np.mgrid[m * block_q : (m + 1) * block_q, n * block_kv : (n + 1) * block_kv]
                seen = (j <= i) & (j >= first_key) & (True if window is None else j > i - window)
                mine, theirs = by_q[b, m], by_kv[b, n]
                meet = mine.min() <= theirs.max() and theirs.min() <= mine.max()
                in_band = ((j <= i) & (True if window is None else j > i - window)).any() and (n + 1) * block_kv > first_key
                one = mine.min() == mine.max() == theirs.min() == theirs.max()
                expected[SKIPPED if not (meet and in_band) else WHOLE if seen.all() and one else MASKED].append(other)
            masked, total = counts[b, block]
            assert list(blocks[b, block, :masked]) == expected[MASKED]
            assert list(blocks[b, block, masked:total]) == expected[WHOLE]


@pytest.mark.parametrize("h", sorted(TILES))
def test_shared_memory_of_the_tiles(h):
    """What the scratch of `_entry` adds up to, in bytes; barriers are 8 bytes each."""
    for chosen in (tiles_for(h), tiles_for(h, crowded=True)):
        dq, dkv = chosen.dq, chosen.dkv
        assert 2 * h * (2 * dq.block_q + dq.slots * dq.block_kv) + 8 * 64 <= mosaic.SMEM_BYTES
        rows = 2 * 4 * dkv.slots * dkv.block_q
        assert 2 * h * 2 * (dkv.block_kv + dkv.slots * dkv.block_q) + rows + 8 * 64 <= mosaic.SMEM_BYTES


def test_a_ring_too_small_for_the_overlap_is_refused():
    with pytest.raises(AssertionError):
        backward_dq.Config(64, 3)


@pytest.mark.parametrize("shipped", [s for s in SHIPPED if str(s) == "backward h=128 all of them"], ids=str)
def test_lowers_for_cuda(shipped):
    """On both versions of JAX, without a GPU: two Mosaic GPU kernels, and no copy of q, k or v with other axes."""
    text = shipped.lower().as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", text)) == 2
    assert "stablehlo.transpose" not in text


def test_configurations_say_how_many_keys_they_hold():
    assert backward_dkv.Config(64, 4).block_kv == 128
    assert backward_dkv.Config(64, 4, "gradients").block_kv == 64
