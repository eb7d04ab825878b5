"""Attention: one entry point (`attention`), a mask specification (`Mask`) and the implementations behind it.

* `dense`: the readable oracle; every option, O(T*S) memory. For tests, short sequences and decoding.
* `blockwise`: pure JAX, O(T*W) time and memory, forward and backward. For training on long sequences.
"""

from __future__ import annotations

from neo.kernels.attention.api import IMPLEMENTATIONS, AttentionSharding, attention, resolve
from neo.kernels.attention.spec import Mask

__all__ = ["IMPLEMENTATIONS", "AttentionSharding", "Mask", "attention", "resolve"]
