"""Set before JAX makes its CPU client."""

from __future__ import annotations

import os

# XLA's thread pool has a thread a core unless NPROC says more. Pallas' GPU interpreter runs each warpgroup in a thread of
# its own and lets those that wait at a barrier block a thread of the pool: on 2 cores the one they wait for then never
# gets a thread, and the test hangs (seen with JAX 0.12.0.1).
os.environ.setdefault("NPROC", "16")
