"""What the scalar operands of neo's TPU attention kernels hold when each row of a batch is one document.

Which tiles such a kernel visits follows from the segment ids, by arrays that XLA makes of them before the kernel runs. A
planner has no batch: it takes rows of one document, which leave out nothing. Rows of several documents cost less.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from neo.config import PhaseConfig
from neo.models.decoder import Decoder, layer_pattern


def one_document(decoder: Decoder, phase: PhaseConfig, sizes: Mapping[str, int], micro_batch: int,
                 device_kind: str) -> list[dict[str, Any]]:
    """[{"name", "operands", "words"}] of every kernel of a device's layers, forward and backward.

    operands: as HLO writes their types ("s32[98]"). words: {position of a scalar operand: its 32-bit words}. [] where
    attention is not neo's TPU kernel, and where the sequence is split over devices, whose offsets no one device knows.
    """
    if decoder.attention != "pallas_tpu" or sizes["context"] > 1:
        return []
    import jax
    import jax.numpy as jnp

    from neo.kernels.attention.kernel import Extras, Plan
    from neo.kernels.attention.tpu import KERNEL

    model, length = decoder.config, phase.seq_len
    heads, kv_heads = max(1, model.num_heads // sizes["tensor"]), max(1, model.num_kv_heads // sizes["tensor"])
    found: list[dict[str, Any]] = []
    for kind in dict.fromkeys(layer_pattern(model)):
        window = kind.window if kind.window and kind.window < length else None
        plan = Plan(scale=1.0, window=window, softcap=model.attention_softcap or None, device_kind=device_kind, platform="tpu")
        slopes = np.ones(heads, np.float32) if kind.position == "alibi" else None
        sinks = np.zeros(heads, np.float32) if model.attention_sinks else None
        query = jax.ShapeDtypeStruct((micro_batch, length, heads, model.head_size), decoder.compute_dtype)
        keys = jax.ShapeDtypeStruct((micro_batch, length, kv_heads, model.head_size), decoder.compute_dtype)
        rows = jax.ShapeDtypeStruct((micro_batch, heads, length), jnp.float32)
        forward = jax.make_jaxpr(
            lambda ids, q, k, v, s=slopes, t=sinks, p=plan: KERNEL.forward(q, k, v, Extras(ids, ids, s, t), p))
        backward = jax.make_jaxpr(lambda ids, q, k, v, lse, delta, dout, s=slopes, t=sinks, p=plan: KERNEL.backward(
            q, k, v, lse, delta, dout, Extras(ids, ids, s, t), p))
        ids = np.ones((micro_batch, length), np.int32)
        for jaxpr in (forward(ids, query, keys, keys), backward(ids, query, keys, keys, rows, rows, query)):
            found += [call for call in _calls(jaxpr, ids) if call not in found]
    return found


def _calls(closed: Any, ids: np.ndarray) -> list[dict[str, Any]]:
    """The kernels of a jaxpr whose first argument are the segment ids, with the words of their scalar operands."""
    found = []
    for equation in closed.jaxpr.eqns:
        if equation.primitive.name != "pallas_call":
            continue
        scalars = {position: operand for position, operand in enumerate(equation.invars)
                   if operand.aval.dtype == np.int32 and operand.aval.ndim == 1}
        values = _evaluate(closed, list(scalars.values()), ids)
        words = {str(position): np.asarray(value).tolist() for position, value in zip(scalars, values, strict=True)}
        name = equation.params.get("name") or equation.params["name_and_src_info"].name
        found.append({"name": name, "operands": [_hlo(operand.aval) for operand in equation.invars], "words": words})
    return found


def _evaluate(closed: Any, wanted: list[Any], ids: np.ndarray) -> list[Any]:
    """Values of some variables of a jaxpr that depend on nothing but its first argument: only what leads to them is run."""
    from jax.extend.core import ClosedJaxpr, Literal, jaxpr_as_fun

    needed, kept = {v for v in wanted if not isinstance(v, Literal)}, []
    for equation in reversed(closed.jaxpr.eqns):
        if needed & set(equation.outvars):
            kept.append(equation)
            needed |= {v for v in equation.invars if not isinstance(v, Literal)}
    first, *others = closed.jaxpr.invars
    assert not needed & set(others), "scalar operands of a kernel depend on more than the segment ids"
    part = closed.jaxpr.replace(invars=[first], outvars=wanted, eqns=kept[::-1], debug_info=None)
    return jaxpr_as_fun(ClosedJaxpr(part, closed.consts))(ids)


_HLO = {"int32": "s32", "float32": "f32", "bfloat16": "bf16", "float16": "f16"}


def _hlo(aval: Any) -> str:
    return f"{_HLO.get(str(aval.dtype), str(aval.dtype))}[{','.join(map(str, aval.shape))}]"
