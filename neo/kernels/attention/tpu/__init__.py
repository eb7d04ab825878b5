"""Attention on TPU by our own Mosaic kernels: O(T W) work and memory, forward and one-pass backward."""

from __future__ import annotations

from neo.kernels.attention.kernel import Kernel, Request
from neo.kernels.attention.tpu.backward import backward
from neo.kernels.attention.tpu.forward import forward

HEAD_SIZES = (64, 80, 96, 128, 192, 256)  # those the tests cover and libtpu was seen to compile
DTYPES = ("bfloat16", "float32")


def lacks(request: Request) -> str:
    """See `kernel.Kernel`: what these kernels cannot do of a request, "" if nothing."""
    if request.platform != "tpu" and not request.interpret:
        return f"a TPU: it is to run on {request.platform}"
    if request.dtype not in DTYPES:
        return f"dtype {request.dtype}: {' and '.join(DTYPES)} are there"
    if request.head_size not in HEAD_SIZES:
        return f"head size {request.head_size}: {', '.join(map(str, HEAD_SIZES))} are there"
    if request.num_heads % request.num_kv_heads:
        return f"{request.num_heads} query heads over {request.num_kv_heads} kv heads: they must divide"
    if request.causal and request.kv_len is not None and request.kv_len < request.seq_len:
        return f"causal queries before the first key: {request.seq_len} queries, {request.kv_len} keys"
    if request.window is not None and not request.causal:
        return "a window without causal"
    return ""


KERNEL = Kernel("pallas_tpu", forward, backward, lacks)
