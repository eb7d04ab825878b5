"""Does a kernel compute the right thing on this device? A small random problem, forward and backward, in some seconds.

The Pallas kernels are proven in interpreters and by compilers; no compiler bug and no misread instruction shows there. So
a run that is about to train on one holds it against the `blockwise` form first, on the device it will train on.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from neo.kernels.attention import blockwise
from neo.kernels.attention.kernel import Extras, Kernel, Plan, Request

# Ours: long enough for several of the largest tiles (1,024) and for the shipped tile of W = 4,096; short enough that the
# comparison takes less time than the compiler.
MAX_TOKENS = 8192
MAX_KV_HEADS = 2  # one would hide a kernel that mixes up key heads
# Ours: makes logits of standard deviation 4, so that a few keys own most of a row. Measured on the CPU (8,192 tokens, W
# 4,096, one head): one key too many at the border puts output and gradients off by 6 to 10 times what is allowed; with
# deviation 1 it drowns.
SHARPNESS = 4.0
SOFTCAP = 10.0  # bends those logits visibly
# The rule of FlashAttention's tests (Dao 2023): at most twice the error of a plain implementation of the same type, and
# beside that roundings at the largest value: in float32 sums in another order; in bfloat16 a kernel that rounds scale * q,
# as the one for TPU does, which on these logits errs up to 3.4 times as much as blockwise (measured on the CPU; it
# uses a third of what is allowed).
TIMES = 2.0
ALLOWED = {"bfloat16": 2.0**-6, "float32": 1e-4}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A random call for an implementation: arrays on the host, made from `request` alone, the same on every process."""

    plan: Plan
    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    extras: Extras
    dout: np.ndarray
    dlse: np.ndarray

    @classmethod
    def of(cls, request: Request, *, causal: bool = True) -> Problem:
        """causal=False is the pair of two shards of a ring: all keys visible."""
        rng = np.random.default_rng(0)
        T, window = _sizes(request)
        window = window if causal else None
        K = min(request.num_kv_heads, MAX_KV_HEADS)
        H = K * (request.num_heads // request.num_kv_heads)
        h = request.head_size
        # Windows of a split sequence: the keys of the halo stand before the queries, and the first shards lack some.
        halo = window - 1 if request.sequence_shards > 1 and window is not None else 0
        S = T + halo

        def normal(*shape: int) -> np.ndarray:
            return rng.standard_normal(shape, np.float32)

        def segments() -> np.ndarray:
            cuts = np.sort(rng.choice(np.arange(1, S), min(4, S - 1), replace=False))
            return np.searchsorted(cuts, np.arange(S), side="right").astype(np.int32)[None]

        ids = segments() if request.segments else None
        extras = Extras(
            segment_ids=None if ids is None else ids[:, halo:],
            kv_segment_ids=ids,
            slopes=(2.0 ** -np.linspace(1, 8, H)).astype(np.float32) if request.alibi else None,
            sinks=normal(H) * SHARPNESS if request.sinks else None,
            first_key=np.int32(halo // 2) if halo else None,
        )
        if not causal and ids is not None:  # the queries of a later shard: some keys are of their document, some are not
            extras = extras._replace(segment_ids=np.sort(ids[:, ::-1] + 1)[:, :T])
        plan = Plan(
            scale=SHARPNESS * h**-0.5, causal=causal, window=window, softcap=SOFTCAP if request.softcap else None,
            offset=halo if causal else S, interpret=request.interpret,
            device_kind=request.device_kind, platform=request.platform,
        )  # fmt: skip
        return cls(plan, normal(1, T, H, h), normal(1, S, K, h), normal(1, S, K, h), extras, normal(1, T, H, h),
                   normal(1, H, T))  # fmt: skip

    def run(self, implementation: Any, dtype: str, *, times: int = 1, exact: bool = False) -> list[dict[str, np.ndarray]]:
        """out, lse, dq, dk, dv and dsinks as float32, of each of `times` runs on the first local device.

        The arrays are rounded to `dtype`, and then taken to float32 if the result is to be `exact`.
        """
        work = "float32" if exact else dtype
        with jax.default_device(jax.local_devices(backend=self.plan.platform)[0]):
            q, k, v, dout = (jnp.asarray(x, dtype).astype(work) for x in (self.q, self.k, self.v, self.dout))
            extras = jax.tree.map(jnp.asarray, self.extras)
            run = jax.jit(functools.partial(_everything, implementation, self.plan))
            # One after the other: the interpreters of Pallas keep their state in one place.
            runs = [jax.block_until_ready(run(q, k, v, extras, dout, jnp.asarray(self.dlse))) for _ in range(times)]
        return [{name: np.asarray(x, np.float32) for name, x in out.items() if x is not None} for out in runs]


def _everything(
    implementation: Any, plan: Plan, q: Array, k: Array, v: Array, extras: Extras, dout: Array, dlse: Array
) -> dict[str, Array | None]:
    def attend(q, k, v, sinks):
        return implementation.attend(q, k, v, extras._replace(sinks=sinks), plan)

    (out, lse), pull = jax.vjp(attend, q, k, v, extras.sinks)
    dq, dk, dv, dsinks = pull((dout.astype(out.dtype), None if lse is None else dlse))
    return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv, "dsinks": dsinks}


def verify(implementation: Any, request: Request) -> str:
    """"" if `implementation` computes what `blockwise` computes, on the first local device; else what differs.

    implementation: a `Kernel` or `CuDNN` (a value of `IMPLEMENTATIONS`, not "dense") that lacks nothing of `request`.
    request: what it will be asked, with local shapes. Head size, query heads per key head, type, window and options are
        those; batch is 1, the sequence at most `MAX_TOKENS` (a longer window is cut to half of it), heads `MAX_KV_HEADS`.
    Twice the error of `blockwise` in the same type against `blockwise` in float32 is allowed; a `Kernel` must also give
    the same bits twice. No collectives: every process checks its own device. Takes about as long as compiling the
    kernel and `blockwise` twice. Never raises: a kernel that does not compile or run is a difference too.
    """
    found = []
    # A ring also takes whole shards of earlier keys against the queries of its own.
    for causal in (True, False) if request.sequence_shards > 1 and request.window is None else (request.causal,):
        try:
            what = _compare(implementation, Problem.of(request, causal=causal), request.dtype)
        except Exception as error:  # the compiler's and the driver's errors have no common class
            what = f"it does not run: {type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
        if what:
            found.append(what)
    return "; ".join(found)


def _compare(implementation: Any, problem: Problem, dtype: str) -> str:
    once_more = isinstance(implementation, Kernel)
    ours, *again = problem.run(implementation, dtype, times=1 + once_more)
    if "lse" not in ours:  # no cotangent of it then
        problem = dataclasses.replace(problem, dlse=np.zeros_like(problem.dlse))
    compiled = dataclasses.replace(problem, plan=dataclasses.replace(problem.plan, interpret=False))
    with jax.default_matmul_precision("highest"):
        (truth,) = compiled.run(blockwise.KERNEL, dtype, exact=True)
    (plain,) = (truth,) if dtype == "float32" else compiled.run(blockwise.KERNEL, dtype)
    wrong = [difference(name, ours[name], plain[name], truth[name], dtype) for name in ours]
    for other in again:
        changed = [name for name in ours if not np.array_equal(ours[name], other[name], equal_nan=True)]
        wrong.append(f"{', '.join(changed)} of two runs differ" if changed else "")
    return ", ".join(filter(None, wrong))


def difference(name: str, ours: np.ndarray, plain: np.ndarray, truth: np.ndarray, dtype: str) -> str:
    """"" if `ours` is about as near to `truth` (float32) as `plain` (`dtype`) is, else by how much it is not."""
    none = np.isneginf(truth)  # the lse of a row that sees nothing
    odd = np.count_nonzero(np.where(none, ~np.isneginf(ours), ~np.isfinite(ours)))
    if odd:
        return f"{name} is not finite (or is, in the lse of a row that sees nothing) in {odd} of {truth.size} places"
    ours, plain, truth = ours[~none], plain[~none], truth[~none]
    error, usual = (float(np.abs(x - truth).max(initial=0.0)) for x in (ours, plain))
    allowed = TIMES * usual + ALLOWED[dtype] * float(np.abs(truth).max(initial=0.0))
    return "" if error <= allowed else f"{name} is off by {error:.2g} ({allowed:.2g} allowed)"


def _sizes(request: Request) -> tuple[int, int | None]:
    """Tokens and window of the check."""
    whole = max(1, request.seq_len // request.sequence_shards)
    T = min(whole, MAX_TOKENS)
    window = request.window
    if window is None or window >= request.seq_len:
        return T, None
    return T, window if whole == T else min(window, T // 2)
