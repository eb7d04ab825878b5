"""FLOPs of the matrix products that stand in a compiled program, as the compiler left them."""

from __future__ import annotations

import math
import re

from neo.plan.hlo import Op, Program


def matmul_flops(program: Program, computation: str, op: Op) -> float:
    """FLOPs (2 per multiply-add) of the matrix products in a dot, a convolution or a fusion; 0 where there is none."""
    if op.kind == "fusion":
        inner = op.called("calls")
        cache = program.__dict__.setdefault("_flops", {})
        if inner is not None and inner not in cache:
            cache[inner] = sum(matmul_flops(program, inner, part) for part in program.computations.get(inner, ()))
        return cache.get(inner, 0.0)
    if op.kind not in ("dot", "convolution") or len(op.operands) < 2:
        return 0.0
    left, right = (program.operation(computation, name) for name in op.operands[:2])
    if left is None or right is None or not (left.results and right.results and op.results):
        return 0.0
    left_dims, right_dims, dims = left.results[0].dims, right.results[0].dims, op.results[0].dims
    if op.kind == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.attributes)
        over = [int(i) for i in (contracted[1] if contracted else "").split(",") if i]
        return 2.0 * math.prod(dims) * math.prod(left_dims[i] for i in over)
    return _convolution_flops(op.attributes, left_dims, right_dims, dims)


def _convolution_flops(text: str, left: tuple[int, ...], right: tuple[int, ...], out: tuple[int, ...]) -> float:
    """A TPU matrix product is a convolution whose window dimensions are batch dimensions: taps outside the input are not
    multiplied, so they are counted one dimension at a time."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", text)
    if not labels:
        return 0.0
    window = re.search(r"window=\{([^}]*)\}", text)
    fields = dict(part.split("=", 1) for part in window[1].split()) if window else {}
    spatial = sum(c.isdigit() for c in labels[1])
    field = lambda key, default: fields[key].split("x") if key in fields else [default] * spatial   # noqa: E731
    flops = 2.0 * out[labels[3].index("b")] * out[labels[3].index("f")] * right[labels[2].index("i")]
    sizes, strides, pads = field("size", "1"), field("stride", "1"), field("pad", "0_0")
    spread_left, spread_right = field("lhs_dilate", "1"), field("rhs_dilate", "1")
    for i in range(spatial):
        flops *= _taps(left[labels[1].index(str(i))], out[labels[3].index(str(i))], int(sizes[i]), int(strides[i]),
                       int(pads[i].split("_")[0]), int(spread_left[i]), int(spread_right[i]))
    return flops


def _taps(size: int, outputs: int, window: int, stride: int, pad: int, spread_left: int, spread_right: int) -> int:
    """Pairs (output, window position) that fall on an input element."""
    last, total = (size - 1) * spread_left, 0
    for k in range(window):
        shift = k * spread_right - pad                      # output o reads position o * stride + shift
        if spread_left == 1:
            total += max(0, min(outputs - 1, (last - shift) // stride) - max(0, -(shift // stride)) + 1)
        else:
            total += sum(0 <= o * stride + shift <= last and (o * stride + shift) % spread_left == 0 for o in range(outputs))
    return total
