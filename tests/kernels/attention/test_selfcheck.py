"""The check at start-up passes what is right and names what is wrong."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo.kernels.attention import blockwise, selfcheck
from neo.kernels.attention.cudnn import CuDNN
from neo.kernels.attention.kernel import Kernel, Request

FULL = Request(platform="cpu", dtype="bfloat16", seq_len=40, num_heads=8, num_kv_heads=4, head_size=16)
WINDOW = dataclasses.replace(FULL, window=12)


def kernel(forward=blockwise.forward, backward=blockwise.backward) -> Kernel:
    return Kernel("altered", forward, backward, lambda request: "")


def other_blocks() -> Kernel:
    """Right, but with sums in another order, as any real kernel has them."""
    return kernel(lambda *a: blockwise.forward(*a, block=16), lambda *a: blockwise.backward(*a, block=24))


def altered(plan=None, extras=None) -> Kernel:
    """Asked for one thing, does another, forward and backward."""

    def changed(function):
        def run(*args):
            *arrays, given, asked = args
            given = given._replace(**(extras(given) if extras else {}))
            return function(*arrays, given, dataclasses.replace(asked, **(plan(asked) if plan else {})))

        return run

    return kernel(changed(blockwise.forward), changed(blockwise.backward))


@pytest.mark.parametrize("request_", [
    FULL,
    dataclasses.replace(WINDOW, dtype="float32"),
    dataclasses.replace(WINDOW, segments=True, sinks=True, seq_len=37),
    dataclasses.replace(FULL, alibi=True, softcap=True, num_kv_heads=1),
    dataclasses.replace(WINDOW, sequence_shards=2, segments=True),
    dataclasses.replace(FULL, sequence_shards=2, segments=True),
])  # fmt: skip
def test_passes_what_is_right(request_):
    assert selfcheck.verify(other_blocks(), request_) == ""


def test_passes_an_implementation_without_log_sum_exp():
    assert selfcheck.verify(CuDNN(jax_nn="xla"), WINDOW) == ""


def replaced(**fields):
    return lambda _: fields


@pytest.mark.parametrize(("wrong", "request_"), [
    (altered(plan=lambda plan: dict(window=plan.window + 1)), WINDOW),
    (altered(plan=lambda plan: dict(scale=plan.scale * 1.05)), FULL),
    (altered(plan=replaced(softcap=None)), dataclasses.replace(FULL, softcap=True)),
    (altered(extras=replaced(segment_ids=None, kv_segment_ids=None)), dataclasses.replace(FULL, segments=True)),
    (altered(extras=replaced(slopes=None)), dataclasses.replace(FULL, alibi=True)),
    (altered(extras=lambda extras: dict(sinks=extras.sinks + 0.5)), dataclasses.replace(FULL, sinks=True)),
    (altered(extras=replaced(first_key=None)), dataclasses.replace(WINDOW, sequence_shards=2)),
    # Key heads mixed up: head n reads n % K.
    (kernel(lambda q, k, *a: blockwise.forward(q, k[:, :, ::-1], *a)), FULL),
])  # fmt: skip
def test_names_what_is_wrong(wrong, request_):
    assert "out is off by" in selfcheck.verify(wrong, request_)


def test_names_the_gradients_that_are_wrong():
    def backward(*args):
        dq, dk, dv = blockwise.backward(*args)
        return dq * 1.1, dk, dv * 1.1

    said = selfcheck.verify(kernel(backward=backward), WINDOW)
    assert "dq is off by" in said and "dv is off by" in said
    assert "dk" not in said and "out" not in said


def test_pairs_of_a_ring_are_checked_too():
    """ALiBi between shards: a shift by the distance of the shards is seen in nothing but the log-sum-exp."""
    wrong = altered(plan=lambda plan: dict(offset=plan.offset if plan.causal else 0))
    said = selfcheck.verify(wrong, dataclasses.replace(FULL, alibi=True, sequence_shards=2))
    assert said.startswith("lse is off by")


def test_float32_that_is_not():
    """Products of bfloat16 where float32 was asked for."""

    def rounded(function):
        return lambda q, k, *a: function(q.astype(jnp.bfloat16).astype(q.dtype), k, *a)

    wrong = kernel(rounded(blockwise.forward), rounded(blockwise.backward))
    assert "out is off by" in selfcheck.verify(wrong, dataclasses.replace(WINDOW, dtype="float32"))


def test_what_is_not_finite():
    """-inf is right where the truth has it (the log-sum-exp of a row that sees nothing), and nowhere else."""
    right = np.array([1.0, -np.inf, 2.0], np.float32)
    assert selfcheck.difference("lse", right, right, right, "bfloat16") == ""
    for wrong in ([1.0, -np.inf, np.nan], [1.0, -np.inf, -np.inf], [1.0, 0.0, 2.0], [np.inf, -np.inf, 2.0]):
        assert "in 1 of 3 places" in selfcheck.difference("lse", np.array(wrong), right, right, "bfloat16")


def test_runs_that_differ():
    """What a race on the device does: some element is another one in the second run."""
    count = itertools.count()

    def forward(*args):
        out, lse = blockwise.forward(*args)
        noise = jax.pure_callback(lambda: np.float32(next(count) * 1e-2), jax.ShapeDtypeStruct((), jnp.float32))
        return (out + noise * jnp.arange(out.size).reshape(out.shape) / out.size).astype(out.dtype), lse

    assert "out" in selfcheck.verify(kernel(forward=forward), FULL).partition("of two runs differ")[0]


def test_a_kernel_that_does_not_run():
    def forward(*args):
        raise NotImplementedError("no such instruction\nand a long story")

    said = selfcheck.verify(kernel(forward=forward), FULL)
    assert said == "it does not run: NotImplementedError: no such instruction"


def test_small_problem_of_a_large_request():
    large = dataclasses.replace(FULL, seq_len=1 << 20, num_heads=64, num_kv_heads=8, window=4096, segments=True)
    problem = selfcheck.Problem.of(large)
    assert problem.q.shape == (1, 8192, 16, 16)
    assert problem.k.shape == (1, 8192, 2, 16)
    assert problem.plan.window == 4096
    assert problem.extras.segment_ids.max() > 0
    assert selfcheck.Problem.of(dataclasses.replace(large, window=100_000)).plan.window == 4096
    again = selfcheck.Problem.of(large)
    np.testing.assert_array_equal(problem.q, again.q)
