"""Compile a layer scan with parameters split over the devices of a TPU topology, and count its collectives.

    LIBTPU_INIT_ARGS=... python tests/parallel/fsdp_program.py '{"topology_name": "v6e:16x16"}' IDLE

Parameters are split over all devices but a factor IDLE, an axis that holds copies: the split then takes fewer sides of the
torus.

A process of its own: libtpu reads its flags once. Prints one line of JSON.
"""

from __future__ import annotations

import json
import re
import sys

import jax
import jax.numpy as jnp
from jax.experimental import topologies

WIDTH, LAYERS, LENGTH = 2048, 4, 512   # small, and large enough that the compiler finds the matrices worth moving early


def main() -> None:
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(sys.argv[1]).items()}
    devices = topologies.get_topology_desc(platform="tpu", **arguments).devices
    idle = int(sys.argv[2])
    mesh = jax.make_mesh((len(devices) // idle, idle), ("fsdp", "idle"), axis_types=(jax.sharding.AxisType.Auto,) * 2,
                         devices=devices)
    place = lambda *axes: jax.NamedSharding(mesh, jax.P(*axes))   # noqa: E731

    def loss(params, x):
        def layer(h, matrices):
            up, down = (w.astype(jnp.bfloat16) for w in matrices)
            return jax.lax.with_sharding_constraint(jnp.tanh(h @ up) @ down, place("fsdp")), None
        h, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), x, params)
        return (h.astype(jnp.float32) ** 2).sum()

    def step(params, x):
        value, gradients = jax.value_and_grad(loss)(params, x)
        return value, jax.tree.map(lambda w, g: w - 0.1 * g, params, gradients)

    split = place(None, "fsdp")
    params = tuple(jax.ShapeDtypeStruct(shape, jnp.float32, sharding=split)
                   for shape in ((LAYERS, WIDTH, 4 * WIDTH), (LAYERS, 4 * WIDTH, WIDTH)))
    x = jax.ShapeDtypeStruct((2 * len(devices), LENGTH, WIDTH), jnp.bfloat16, sharding=place("fsdp"))
    compiled = jax.jit(step, donate_argnums=0, out_shardings=(None, (split, split))).lower(params, x).compile()
    hlo = compiled.as_text()
    print(json.dumps({
        "kind": devices[0].device_kind,
        "sparse_core": len(re.findall(r'async_execution_thread="sparsecore"', hlo)),
        "reduce_scatters": len(re.findall(r" reduce-scatter\(", hlo)),
        "all_gathers": len(re.findall(r" all-gather(?:-start)?\(", hlo)),
    }))


if __name__ == "__main__":
    main()
