"""Make the compiled programs of this folder again: a small training step by libtpu 0.0.50.1, for TPUs that are not there.

    python tests/plan/data/make.py NAME      # two_slices_v5e, windowed_v5e, tensor_v5e, offload_v5p or sparsecore_v5p

Four layers of two matrix products, parameters sharded over `fsdp`. One process at a time may hold libtpu.
"""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path

from neo.plan.topology import parse, tpu_devices

# name -> (topology, (replica, fsdp, tensor), whether activations wait in the host's memory, flags)
SPARSE_CORE = ("--xla_tpu_enable_sparse_core_collective_offload_all_gather=true",
               "--xla_tpu_enable_sparse_core_collective_offload_reduce_scatter=true",
               "--xla_tpu_enable_sparse_core_collective_offload_all_reduce=true",
               "--xla_tpu_enable_all_gather_offload_tracing=true", "--xla_tpu_enable_reduce_scatter_offload_tracing=true",
               "--xla_tpu_use_tc_device_shape_on_sc=true", "--xla_sc_disable_megacore_partitioning=true",
               "--xla_tpu_enable_sparse_core_collective_offload_3d_all_gather=true",
               "--xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter=true")
PROGRAMS = {
    "two_slices_v5e": ("2*v5e:2x2", (2, 4, 1), False, ()),
    "windowed_v5e": ("v5e:4x4", (1, 16, 1), False, ()),
    "tensor_v5e": ("v5e:4x4", (1, 4, 4), False, ()),
    "offload_v5p": ("v5p:4x4x4", (1, 64, 1), True, ()),
    "sparsecore_v5p": ("v5p:4x4x4", (1, 64, 1), False, SPARSE_CORE),
}
LAYERS, WIDTH, HIDDEN, LENGTH = 4, 1024, 4096, 512


def main(name: str) -> None:
    """Compile one program and write NAME.hlo.gz beside this file."""
    topology, sides, offload, flags = PROGRAMS[name]
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu",
                      LIBTPU_INIT_ARGS=" ".join(flags))
    import jax
    import jax.numpy as jnp
    from jax.ad_checkpoint import checkpoint_name
    from jax.experimental import mesh_utils
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    devices = tpu_devices(parse(topology))
    if sides[0] > 1:
        grid = mesh_utils.create_hybrid_device_mesh((1, *sides[1:]), (sides[0], 1, 1), devices)
    else:
        grid = mesh_utils.create_device_mesh(sides, devices)
    mesh = Mesh(grid, ("replica", "fsdp", "tensor"))
    on = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))   # noqa: E731
    batch = on(("replica", "fsdp"))
    params = {"up": jax.ShapeDtypeStruct((LAYERS, WIDTH, HIDDEN), jnp.float32, sharding=on(None, "fsdp", "tensor")),
              "down": jax.ShapeDtypeStruct((LAYERS, HIDDEN, WIDTH), jnp.float32, sharding=on(None, "tensor", "fsdp"))}
    x = jax.ShapeDtypeStruct((2 * len(devices), LENGTH, WIDTH), jnp.bfloat16, sharding=batch)
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[], names_which_can_be_offloaded=["hidden"] if offload else [], offload_src="device",
        offload_dst="pinned_host")

    def layer(x, weights):
        weights = jax.tree.map(lambda a: a.astype(jnp.bfloat16), weights)
        hidden = checkpoint_name(x @ weights["up"], "hidden")
        hidden = jax.lax.with_sharding_constraint(jax.nn.silu(hidden), on(("replica", "fsdp"), None, "tensor"))
        return jax.lax.with_sharding_constraint(x + hidden @ weights["down"], batch), None

    def loss(params, x):
        y, _ = jax.lax.scan(jax.checkpoint(layer, prevent_cse=False, policy=policy), x, params)
        return (y.astype(jnp.float32) ** 2).mean()

    def step(params, x):
        value, slopes = jax.value_and_grad(loss)(params, x)
        return jax.tree.map(lambda a, b: a - 1e-3 * b, params, slopes), value

    shardings = ({key: value.sharding for key, value in params.items()}, None)
    text = jax.jit(step, donate_argnums=0, out_shardings=shardings).lower(params, x).compile().as_text()
    text = text.replace(str(Path(__file__).parent) + "/", "")
    out = Path(__file__).parent / f"{name}.hlo.gz"
    out.write_bytes(gzip.compress(text.encode(), mtime=0))


if __name__ == "__main__":
    main(sys.argv[1])
