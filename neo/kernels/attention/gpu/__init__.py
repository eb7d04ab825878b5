"""Attention on NVIDIA Hopper by our own Mosaic GPU kernels: O(T W) work and memory, deterministic.

Compiled for H200 (tests/kernels/attention/test_gpu_compile.py) and interpreted; not run on hardware.
"""

from __future__ import annotations

from neo.kernels.attention.gpu import mosaic
from neo.kernels.attention.gpu.backward import backward
from neo.kernels.attention.gpu.forward import forward
from neo.kernels.attention.kernel import Kernel, Request

HEAD_SIZES = (64, 80, 96, 128, 192, 256)  # those the tests cover


def lacks(request: Request) -> str:
    """See `kernel.Kernel`: what these kernels cannot do of a request, "" if nothing."""
    if request.interpret:
        if not mosaic.can_interpret():
            return "an interpreter in this JAX: 0.11 or later has one"
    elif request.platform != "gpu":
        return f"a Hopper GPU (H100, H200): it is to run on {request.platform}"
    elif request.device_kind and not mosaic.is_hopper(request.device_kind):
        return f"a Hopper GPU (H100, H200), compute capability 9.0: this one is {request.device_kind}"
    if request.dtype != "bfloat16":
        return (
            f"dtype {request.dtype} (Hopper's tensor cores round float32 to 10 bits of mantissa): bfloat16 is there; "
            "implementation='blockwise' has others"
        )
    if request.head_size not in HEAD_SIZES:
        return f"head size {request.head_size}: {', '.join(map(str, HEAD_SIZES))} are there"
    if request.num_heads % request.num_kv_heads:
        return f"{request.num_heads} query heads over {request.num_kv_heads} kv heads: they must divide"
    if request.causal and request.kv_len is not None and request.kv_len < request.seq_len:
        return f"causal queries before the first key: {request.seq_len} queries, {request.kv_len} keys"
    if request.window is not None and not request.causal:
        return "a window without causal"
    return ""


KERNEL = Kernel("pallas_gpu", forward, backward, lacks)
