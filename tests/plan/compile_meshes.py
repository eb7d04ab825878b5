"""What libtpu makes of topologies and meshes: a process of its own, since libtpu lets one in at a time.

    python tests/plan/compile_meshes.py < jobs.json     [{"topology": name, "mesh": {axis: size}, "compile": bool}, ...]

Prints a list: devices, kind, axes that cross slices, or the error; of what is compiled, how often each collective stands
in the program of a weight gathered over fsdp and its gradient summed over the batch.
"""

from __future__ import annotations

import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np

from neo.config.schema import MeshConfig
from neo.errors import InputError
from neo.parallel.mesh import AXES, make_mesh
from neo.parallel.rules import Layout
from neo.plan.topology import parse, tpu_devices

COLLECTIVE = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def crossing(mesh: jax.sharding.Mesh) -> list[str]:
    """Axes along which neighbours are of different slices."""
    slices = np.vectorize(lambda device: getattr(device, "slice_index", 0))(mesh.devices)
    return [axis for i, axis in enumerate(AXES) if (np.diff(slices, axis=i) != 0).any()]


def program(mesh: jax.sharding.Mesh) -> str:
    layout = Layout(mesh)

    def loss(weight: jax.Array, x: jax.Array) -> jax.Array:
        whole = layout.gather(weight.astype(jnp.bfloat16), ("embed", "mlp"), ("gathered", "mlp"))
        return jnp.square(x @ whole).astype(jnp.float32).sum()

    weight = jax.ShapeDtypeStruct((8192, 8192), jnp.float32, sharding=layout.sharding("embed", "mlp"))
    x = jax.ShapeDtypeStruct((128 * mesh.devices.size, 8192), jnp.bfloat16, sharding=layout.sharding("batch", None))
    grad = jax.jit(jax.grad(loss), out_shardings=layout.sharding("embed", "mlp"))
    return grad.lower(weight, x).compile().as_text()


def answer(job: dict) -> dict:
    topology = parse(job["topology"])
    devices = tpu_devices(topology)
    found = {"devices": len(devices), "kind": devices[0].device_kind}
    try:
        mesh = make_mesh(MeshConfig(**job["mesh"]), devices)
    except InputError as error:
        return {**found, "refused": str(error)}
    found |= {"mesh": dict(mesh.shape), "crossing": crossing(mesh)}
    if job.get("compile"):
        text = program(mesh)
        operations = [match[1] for match in COLLECTIVE.finditer(text)]
        found |= {"operations": {name: operations.count(name) for name in set(operations)},
                  "groups": sorted(set(re.findall(r"replica_groups=(\{\{.*?\}\}|[^{]\S*)", text))),
                  "between": sorted(set(re.findall(r'_xla_megascale_target="([^"]*)"', text)))}
    return found


if __name__ == "__main__":
    print(json.dumps([answer(job) for job in json.load(sys.stdin)]))
