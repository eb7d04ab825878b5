"""The judge judged: the float64 oracle against loops over single keys and against finite differences of itself."""

from __future__ import annotations

import itertools

import ml_dtypes
import numpy as np
import pytest

from .oracle import attention

CASES = {
    "causal": {},
    "window": {"window": 3},
    "window and offset": {"window": 4, "offset": 3},
    "everything visible": {"causal": False, "offset": 2, "slopes": [0.3, 0.7, 0.1, 0.5]},
    "ALiBi on both sides": {"causal": False, "slopes": [0.3, 0.7, 0.1, 0.5], "two_sided": True},
    "segments, some rows empty": {"segment_ids": [[1, 1, 2, 2, 9], [1, 2, 2, 3, 3]],
                                  "kv_segment_ids": [[1, 1, 2, 2, 2], [1, 2, 2, 3, 3]]},
    "first key": {"first_key": 2},
    "first key and sinks": {"first_key": 2, "sinks": [0.5, -1.0, 2.0, 0.0]},
    "all at once": {"window": 4, "offset": 2, "slopes": [0.3, 0.7, 0.1, 0.5], "softcap": 1.5, "first_key": 1,
                    "sinks": [0.5, -1.0, 2.0, 0.0], "segment_ids": [[1, 1, 1, 2, 2]] * 2,
                    "kv_segment_ids": [[1, 1, 1, 1, 1, 2, 2]] * 2},
}  # fmt: skip


def draw(case):
    rng = np.random.default_rng(0)
    T, offset = 5, case.get("offset", 0)
    S = offset + T if case.get("causal", True) else 7
    B, H, K, h = 2, 4, 2, 3
    q, k, v, dout = (rng.normal(size=(B, n, heads, h)) for n, heads in ((T, H), (S, K), (S, K), (T, H)))
    return q, k, v, dout, rng.normal(size=(B, H, T))


def by_loops(q, k, v, *, scale, causal=True, window=None, offset=0, softcap=None, slopes=None, two_sided=False, sinks=None,
             first_key=0, segment_ids=None, kv_segment_ids=None):  # fmt: skip
    (B, T, H, h), (S, K) = q.shape, k.shape[1:3]
    out, lse = np.zeros_like(q), np.full((B, H, T), -np.inf)
    for b, t, n in itertools.product(range(B), range(T), range(H)):
        i, head = offset + t, n // (H // K)
        scores, values = ([], []) if sinks is None else ([sinks[n]], [np.zeros(h)])
        for j in range(first_key, S):
            if causal and (j > i or (window is not None and j <= i - window)):
                continue
            if segment_ids is not None and segment_ids[b][t] != kv_segment_ids[b][j]:
                continue
            score = scale * (q[b, t, n] @ k[b, j, head])
            score = score if softcap is None else softcap * np.tanh(score / softcap)
            if slopes is not None:
                score += slopes[n] * (-abs(j - i) if two_sided else j - i)
            scores.append(score)
            values.append(v[b, j, head])
        if scores:
            lse[b, n, t] = np.log(np.sum(np.exp(scores)))
            out[b, t, n] = np.exp(np.asarray(scores) - lse[b, n, t]) @ np.asarray(values)
    return out, lse


@pytest.mark.parametrize("name", CASES)
def test_against_loops_and_finite_differences(name):
    case = {"scale": 0.6, **CASES[name]}
    q, k, v, dout, dlse = draw(case)
    result = attention(q, k, v, **case, dout=dout, dlse=dlse)
    for got, want in zip(result[:2], by_loops(q, k, v, **case), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-13)

    def loss(q, k, v, sinks=None):
        out, lse = by_loops(q, k, v, **case | ({} if sinks is None else {"sinks": sinks}))
        return (out * dout).sum() + (np.where(np.isfinite(lse), lse, 0) * dlse).sum()

    arguments = [q, k, v] + ([np.asarray(case["sinks"])] if "sinks" in case else [])
    for number, gradient in enumerate(result[2 : 2 + len(arguments)]):
        direction = np.random.default_rng(number).normal(size=gradient.shape)
        sides = []
        for step in (1e-5, -1e-5):
            moved = list(arguments)
            moved[number] = moved[number] + step * direction
            sides.append(loss(*moved))
        np.testing.assert_allclose((sides[0] - sides[1]) / 2e-5, (gradient * direction).sum(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize(("dtype", "unit"), [(np.float32, 2**-24), (ml_dtypes.bfloat16, 2**-9)])
def test_the_plain_one_is_off_by_its_rounding_and_no_more(dtype, unit):
    case = {"scale": 0.6, **CASES["all at once"]}
    arrays = [x.astype(dtype) for x in draw(case)]
    names = ("q", "k", "v", "dout", "dlse")
    exact = attention(**dict(zip(names, arrays, strict=True)), **case)
    plain = attention(**dict(zip(names, arrays, strict=True)), **case, rounded_to=dtype)
    for name in ("out", "lse", "dq", "dk", "dv", "dsinks"):
        error = np.abs(getattr(plain, name) - getattr(exact, name)).max()
        assert unit * 1e-3 < error <= 8 * unit * exact.sizes[name], name
