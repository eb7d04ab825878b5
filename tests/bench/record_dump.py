"""Writes the dump that test_tpu_static.py reads: a small kernel, compiled by libtpu for v5e.

    python tests/bench/record_dump.py

The kernel's grid is (3, 8): for each of 3 blocks of q the 8 blocks of k, of which block i sees those with
`lowest(i) <= j <= 2 i + 1`. Block 0 of a row sets the accumulator, the last one writes it, a visible pair multiplies once,
and a pair on the diagonal (j == 2 i + 1) also runs a loop of i + 2 rounds.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

DATA = Path(__file__).resolve().parent / "data"
ROWS, COLUMNS, BLOCK = 3, 8, 128


def lowest(i):
    return i


def compile_it() -> None:
    import jax
    import jax.numpy as jnp
    from jax import lax
    from jax.experimental import pallas as pl
    from jax.experimental import topologies
    from jax.experimental.pallas import tpu as pltpu
    from jax.sharding import SingleDeviceSharding

    def kernel(q, k, out, total):
        i, j = pl.program_id(0), pl.program_id(1)

        @pl.when(j == 0)
        def _():
            total[...] = jnp.zeros_like(total)

        @pl.when((lowest(i) <= j) & (j <= 2 * i + 1))
        def _():
            total[...] += jnp.dot(q[...], k[...], preferred_element_type=jnp.float32)

            @pl.when(j == 2 * i + 1)
            def _():
                def again(_, carry):
                    total[...] = total[...] * 0.5
                    return carry
                lax.fori_loop(0, i + 2, again, 0)

        @pl.when(j == COLUMNS - 1)
        def _():
            out[...] = jnp.exp2(total[...])

    block = lambda index: pl.BlockSpec((BLOCK, BLOCK), index)   # noqa: E731
    call = pl.pallas_call(
        kernel, grid=(ROWS, COLUMNS), in_specs=[block(lambda i, j: (i, 0)), block(lambda i, j: (jnp.minimum(j, 2 * i + 1), 0))],
        out_specs=block(lambda i, j: (i, 0)), out_shape=jax.ShapeDtypeStruct((ROWS * BLOCK, BLOCK), jnp.float32),
        scratch_shapes=[pltpu.VMEM((BLOCK, BLOCK), jnp.float32)], name="staircase")
    device = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    # Far larger than the grid needs, so that the operands stay in HBM.
    x = jax.ShapeDtypeStruct((2**20, BLOCK), jnp.bfloat16, sharding=SingleDeviceSharding(device))
    jax.jit(call).lower(x, x).compile()


def main() -> None:
    if "--compile" in sys.argv:
        compile_it()
        return
    with tempfile.TemporaryDirectory() as folder:
        env = {**os.environ, "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu",
               "LIBTPU_INIT_ARGS": f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true "
                                   "--xla_jf_dump_llo_pass_label_regex=final.*"}
        subprocess.run([sys.executable, __file__, "--compile"], env=env, check=True)
        DATA.mkdir(exist_ok=True)
        for path in sorted(Path(folder).glob("*-staircase*")):
            for kind in ("-schedule-analysis_final_bundles", "-final_bundles", "-final_hlo-static-per-bundle-utilization"):
                if path.stem.endswith(kind) and (kind[1:] != "final_bundles" or "schedule" not in path.name):
                    number = re.search(r"-(\d+)" + kind, path.name)
                    (DATA / f"1-staircase.1-{number[1]}{kind}.txt").write_text(path.read_text())


if __name__ == "__main__":
    main()
