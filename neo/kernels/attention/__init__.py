"""Attention: one entry point (`attention`), a mask specification (`Mask`) and the implementations behind it.

* `dense`: the readable form; every option, O(T*S) memory. For tests, short sequences and decoding.
* `blockwise`: plain JAX, O(T*W) time and memory, forward and backward. Any device.
* `pallas_tpu`: neo's own kernels for TPUs (`tpu/`).
* `pallas_gpu`: neo's own kernels for Hopper GPUs (`gpu/`).
* `cudnn`: cuDNN through `jax.nn`, where it can do what is asked.

docs/kernels.md explains them and how to add one.
"""

from __future__ import annotations

from neo.kernels.attention.api import AttentionSharding, attention
from neo.kernels.attention.kernel import Request
from neo.kernels.attention.select import IMPLEMENTATIONS, resolve
from neo.kernels.attention.spec import Mask

__all__ = ["IMPLEMENTATIONS", "AttentionSharding", "Mask", "Request", "attention", "resolve"]
