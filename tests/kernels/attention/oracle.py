"""Attention and its gradients in float64 numpy, the judge of every kernel; written from the definitions alone.

It shares nothing with the implementations: the mask is a T x S array made of comparisons, the gradients are formulas and
not derived by JAX. test_oracle.py beside it holds it against loops and finite differences.

With `rounded_to` it is the plain implementation of FlashAttention's rule (hopper/test_flash_attn.py: `attention_ref` with
upcast=False): fp32 arithmetic whose scores, probabilities and products are each rounded to the dtype of the inputs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Result(NamedTuple):
    """out [B,T,H,h], lse [B,H,T] and, given cotangents, the gradients of sum(out * dout) + sum(lse * dlse).

    sizes: of each array, the sum of the terms of its largest entry without their signs, down to the products q k of the
    scores: a relative error e of each product, score and probability moves the array by about e times this.
    """

    out: np.ndarray
    lse: np.ndarray
    dq: np.ndarray | None = None
    dk: np.ndarray | None = None
    dv: np.ndarray | None = None
    dsinks: np.ndarray | None = None
    sizes: dict[str, float] | None = None


def visibility(B, T, S, *, causal=True, window=None, offset=0, segment_ids=None, kv_segment_ids=None, first_key=None):
    """[B, T, S] bool: does query i see key j? Query 0 stands at key `offset`; a window counts the query's own key."""
    i, j = offset + np.arange(T)[:, None], np.arange(S)[None, :]
    seen = np.ones((T, S), bool)
    if causal:
        seen &= j <= i
    if window is not None:
        seen &= i - j < window
    if first_key is not None:
        seen &= j >= int(first_key)
    seen = np.broadcast_to(seen, (B, T, S))
    if segment_ids is not None:
        seen = seen & (np.asarray(segment_ids)[:, :, None] == np.asarray(kv_segment_ids)[:, None, :])
    return seen


def attention(
    q, k, v, *, scale, causal=True, window=None, softcap=None, offset=0, segment_ids=None, kv_segment_ids=None,
    slopes=None, two_sided=False, sinks=None, first_key=None, dout=None, dlse=None, rounded_to=None,
    base=np.e,
) -> Result:  # fmt: skip
    """softmax([sink, cap(scale * q k^T) + slope * (j - i)]) [0, v] over the visible keys of each query.

    q [B,T,H,h], k and v [B,S,K,h]; query head n reads key/value head n // (H / K). A query that sees nothing: out 0, lse
    -inf without a sink, the sink with one. slopes: [H]; two_sided takes -|j - i| for the distance instead of j - i.
    dout, dlse: cotangents of out and lse; without dout no gradients. base: of the powers of the plain implementation, with
    2 its queries are rounded with log2(e) in them.
    """
    number = np.float64 if rounded_to is None else np.float32

    def r(x):
        return x if rounded_to is None else x.astype(rounded_to).astype(number)

    def array(x):
        return np.asarray(x).astype(number)

    (B, T, H, h), (S, K) = q.shape, k.shape[1:3]
    G = H // K
    q, k, v = (array(x).swapaxes(1, 2) for x in (q, k, v))  # [B, heads, T, h]
    k, v = np.repeat(k, G, axis=1), np.repeat(v, G, axis=1)
    seen = visibility(
        B, T, S, causal=causal, window=window, offset=offset, segment_ids=segment_ids, kv_segment_ids=kv_segment_ids,
        first_key=first_key,
    )[:, None]  # fmt: skip

    products = r(r(q * number(scale / np.log(base))) @ k.mT * number(np.log(base)))
    scores, slope_of_cap = products, number(1)
    if softcap is not None:
        tanh = r(np.tanh(products / number(softcap)))
        scores, slope_of_cap = r(number(softcap) * tanh), 1 - tanh**2
    if slopes is not None:
        distance = array(np.arange(S)[None, :] - (offset + np.arange(T)[:, None]))
        scores = r(scores + r(array(slopes)[:, None, None] * (-np.abs(distance) if two_sided else distance)))
    masked = np.where(seen, scores, -np.inf)
    sink = np.full((H, 1), -np.inf, number) if sinks is None else array(sinks)[:, None]

    top = np.maximum(masked.max(-1), sink)  # [B, H, T]
    base = np.where(np.isfinite(top), top, 0)
    weights, sink_weight = np.exp(masked - base[..., None]), np.exp(sink - base)
    total = weights.sum(-1) + sink_weight
    nothing = total == 0
    total = np.where(nothing, 1, total)
    lse = np.where(nothing, -np.inf, r(base + np.log(total)))
    p, p_sink = r(weights / total[..., None]), r(sink_weight / total)
    out = r(p @ v)

    if dout is None:
        return Result(out.swapaxes(1, 2), lse)

    do = array(dout).swapaxes(1, 2)
    dl = np.zeros((B, H, T), number) if dlse is None else np.where(nothing, 0, array(dlse))  # a constant -inf moves nothing
    dp = r(do @ v.mT)
    delta = (out * do).sum(-1) - dl  # equals sum_j p dp; of the rounded output where that is rounded, as in FlashAttention
    ds = r(r(r(p * (dp - delta[..., None])) * slope_of_cap) * number(scale))  # of the products q k^T

    def heads(x):  # the query heads of one key head add up
        return r(x.reshape(B, K, G, S, h).sum(2).swapaxes(1, 2))

    gradients = {"dq": r(ds @ k).swapaxes(1, 2), "dk": heads(r(ds.mT @ q)), "dv": heads(r(p.mT @ do)), "dsinks": None}
    if sinks is not None:
        gradients["dsinks"] = -(p_sink * delta).sum((0, 2))
    sizes = None
    if rounded_to is None:
        # Terms without their signs, each times how far a relative error of a product q k moves it.
        score_size = (np.abs(q) @ np.abs(k).mT) * scale * slope_of_cap + np.abs(np.where(seen, scores, 0))
        worth = 1 + np.abs(np.where(nothing, 0, lse)) + (p * score_size).sum(-1)
        p_size = p * (worth[..., None] + score_size)
        dp_size = np.abs(do) @ np.abs(v).mT
        delta_size, delta_worth = (p * dp_size).sum(-1) + np.abs(dl), (p_size * dp_size).sum(-1) + np.abs(dl)
        ds_size = (p_size * (dp_size + delta_size[..., None]) + p * delta_worth[..., None]) * scale
        sizes = {
            "out": _top(p_size @ np.abs(v)),
            "lse": _top(worth),
            "dq": _top(ds_size @ np.abs(k)),
            "dk": _top(heads(ds_size.mT @ np.abs(q))),
            "dv": _top(heads(p_size.mT @ np.abs(do))),
            "dsinks": _top((p_sink * delta_worth * worth).sum((0, 2))),
            # Rounding each entry of out moves its row's delta, and so dsinks, by independent amounts: root of squares.
            "dsinks of out": float(np.sqrt(((p_sink**2 * ((out * do) ** 2).sum(-1)).sum((0, 2))).max())),
        }
    return Result(out.swapaxes(1, 2), lse, **gradients, sizes=sizes)


def _top(x) -> float:
    return float(np.abs(x).max(initial=0.0))
