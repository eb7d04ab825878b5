"""Set before JAX makes its CPU client."""

from __future__ import annotations

import os
from importlib.metadata import version

# XLA's thread pool has a thread a core unless NPROC says more. Pallas' GPU interpreter runs each warpgroup in a thread of
# its own and lets those that wait at a barrier block a thread of the pool: on 2 cores the one they wait for then never
# gets a thread, and the test hangs (seen with JAX 0.12.0.1). JAX 0.10 has no such interpreter.
if tuple(map(int, version("jax").split(".")[:2])) >= (0, 11):
    os.environ.setdefault("NPROC", "16")
