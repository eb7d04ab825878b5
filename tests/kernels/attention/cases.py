"""What the attention kernels are asked in test_numerics.py: calls as data, inputs that make it hard, and the judgement."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any, NamedTuple

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from neo.kernels.attention.kernel import Extras, Plan

from . import oracle

GRADIENTS = ("dq", "dk", "dv", "dsinks")


@dataclasses.dataclass(frozen=True)
class Case:
    """The static facts of one call. S: given for causal=False only; else offset + T. segments: "packed" documents, "gaps"
    (ids that skip numbers, and queries and keys whose id the other side does not have) or "". dtype: of q, k and v.
    """

    T: int
    window: int | None = None
    heads: tuple[int, int] = (2, 1)
    h: int = 64
    B: int = 1
    causal: bool = True
    offset: int = 0
    keys: int | None = None
    segments: str = ""
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    first_key: int | None = None
    dtype: str = "float32"
    scale: float | None = None

    @property
    def S(self) -> int:
        return self.offset + self.T if self.keys is None else self.keys

    def plan(self, interpret: object) -> Plan:
        return Plan(scale=self.multiplier, causal=self.causal, window=self.window, softcap=self.softcap, offset=self.offset,
                    interpret=interpret)  # fmt: skip

    @property
    def multiplier(self) -> float:
        return self.h**-0.5 if self.scale is None else self.scale

    def __str__(self) -> str:
        changed = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if getattr(self, f.name) != f.default]
        return " ".join(f"{name}={value}" for name, value in changed).replace("'", "")


class Arrays(NamedTuple):
    """The arrays of one call, as numpy has them."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    dout: np.ndarray
    dlse: np.ndarray
    segment_ids: np.ndarray | None = None
    kv_segment_ids: np.ndarray | None = None
    slopes: np.ndarray | None = None
    sinks: np.ndarray | None = None
    first_key: np.ndarray | None = None

    @property
    def extras(self) -> Extras:
        some = self.segment_ids, self.kv_segment_ids, self.slopes, self.sinks, self.first_key
        return Extras(*(None if x is None else jnp.asarray(x) for x in some))


# How the logits are spread (standard deviation of scale * q k^T) and what else is hard about the inputs: "normal";
# "tails": Student's t with 3 degrees of freedom, single entries 20 standard deviations out; "peak": a channel of the keys
# that grows with the position, as outlier channels of trained models are large, and one query row that is 40 times as
# large and looks at that channel: its largest logit, some hundreds, moves with every block.
REGIMES = ((1.0, "normal"), (30.0, "tails"), (0.1, "tails"), (8.0, "normal"), (1.0, "peak"))


def draw(case: Case, seed: int = 0, spread: float = 1.0, kind: str = "normal") -> Arrays:
    """Inputs and cotangents, in the dtype of the case."""
    rng = np.random.default_rng([seed, zlib.crc32(str(case).encode())])
    (H, K), B, T, S, h = case.heads, case.B, case.T, case.S, case.h
    dtype = np.dtype(case.dtype) if case.dtype == "float32" else ml_dtypes.bfloat16

    def values(*shape):
        if kind == "tails":
            return rng.standard_t(3, size=shape) / 3**0.5
        return rng.normal(size=shape)

    q = values(B, T, H, h) * spread / (case.multiplier * h**0.5)
    k, v, dout = values(B, S, K, h), values(B, S, K, h), values(B, T, H, h)
    if kind == "peak":
        row, channel = T - 1 - rng.integers(min(T, 4)), rng.integers(h)
        q[:, row] *= 40
        q[:, row, :, channel] = np.abs(q[:, row, :, channel]) + 40
        k[..., channel] += np.linspace(0, 50, S)[:, None]
    some: dict[str, Any] = {}
    if case.segments:
        some["segment_ids"], some["kv_segment_ids"] = segments(case, rng)
    if case.alibi:
        some["slopes"] = (0.74 * 2.0 ** -np.arange(1, H + 1)).astype(np.float32)
    if case.sinks:
        some["sinks"] = rng.normal(size=H).astype(np.float32) * spread
    if case.first_key is not None:
        some["first_key"] = np.asarray(case.first_key, np.int32)
    dlse = rng.normal(size=(B, H, T)).astype(np.float32)
    return Arrays(*(x.astype(dtype) for x in (q, k, v, dout)), dlse, **some)


def segments(case: Case, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Ids of queries [B, T] and keys [B, S]: documents of random length, of a third of the keys in the mean."""
    ids = 1 + np.cumsum(rng.random((case.B, case.S)) < 3 / case.S, axis=1)
    first = case.offset if case.causal else 0
    # Without causality queries and keys need not be as many: both walk through the same documents.
    mine = ids[:, first : first + case.T] if case.causal else ids[:, np.arange(case.T) * case.S // case.T]
    if case.segments == "gaps":
        ids, mine = 3 * ids, 3 * mine
        mine = mine + (rng.random(mine.shape) < 0.1)  # a query here and there of a document without keys: sees nothing
        mine[:, : case.T // 3] += 1  # and a whole stretch of them
    return mine.astype(np.int32), ids.astype(np.int32)


def seen(case: Case, arrays: Arrays) -> np.ndarray:
    """[B, T, S] bool: which key each query sees."""
    return oracle.visibility(
        case.B, case.T, case.S, causal=case.causal, window=case.window, offset=case.offset,
        segment_ids=arrays.segment_ids, kv_segment_ids=arrays.kv_segment_ids, first_key=arrays.first_key,
    )  # fmt: skip


def exact(case: Case, arrays: Arrays, **options: Any) -> oracle.Result:
    """What the oracle says."""
    return oracle.attention(
        **arrays._asdict(), scale=case.multiplier, causal=case.causal, window=case.window, softcap=case.softcap,
        offset=case.offset, **options,
    )  # fmt: skip


# What is left to an implementation beside twice the error of the plain one, in units of rounding of fp32 times the size
# of the sums (oracle.Result.sizes). Ours, measured over 10 draws of every fp32 call of
# test_numerics.py: at most half of what it allows is used.
SLACK = 4 * 2.0**-24
UNDERFLOW = 1e-35  # probabilities near the smallest normal fp32 number, 1.2e-38, may become 0
ROUNDING = {"float32": 2.0**-24, "bfloat16": 2.0**-9}


def judge(case: Case, arrays: Arrays, got: dict[str, Any], bases: tuple[float, ...] = (np.e,), **options: Any) -> dict:
    """FlashAttention's rule, for the largest error and for the root of the mean square: at most twice that of the plain
    implementation in the same dtype (the worse of those with these bases), rounding the result once more, and SLACK.
    Returns error / allowed of each array.
    """
    want = exact(case, arrays, **options)
    plain = [exact(case, arrays, **options, rounded_to=arrays.q.dtype, base=base) for base in bases]
    ratios = {}
    for name in ("out", "lse", *GRADIENTS):
        if got.get(name) is None:
            continue
        a, b, *others = (np.asarray(x, np.float64) for x in (got[name], *(getattr(x, name) for x in (want, *plain))))
        assert a.shape == b.shape, f"{name} has shape {a.shape}, not {b.shape}"
        if name == "lse":
            assert ((a == -np.inf) == (b == -np.inf)).all(), "lse is -inf elsewhere than at the rows that see nothing"
            a, b, *others = (np.where(b == -np.inf, 0, x) for x in (a, b, *others))
        assert np.isfinite(a).all(), f"{name} is not finite at {np.argwhere(~np.isfinite(a))[:3].tolist()}"
        unit = ROUNDING[case.dtype]
        rounding = 2 * want.sizes["dsinks of out"] if name == "dsinks" else 0.0 if name == "lse" else None
        for measure in (_largest, _mean):
            rounded = 2 * unit * (measure(b) if rounding is None else rounding)
            allowed = 2 * max(measure(c - b) for c in others) + rounded + SLACK * want.sizes[name]
            ratios[f"{name} {measure.__name__[1:]}"] = measure(a - b) / (allowed + UNDERFLOW)
    return ratios


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max())


def _mean(x: np.ndarray) -> float:
    return float(np.sqrt((x * x).mean()))


@functools.cache
def windows(T: int, b: int) -> tuple[int | None, ...]:
    """Where windows go wrong: one key, two, around a block and several, around the whole sequence."""
    some = {1, 2, b - 1, b, b + 1, 2 * b, 2 * b + 1, T - 1, T, T + 7}
    return (*sorted(w for w in some if w >= 1), None)
