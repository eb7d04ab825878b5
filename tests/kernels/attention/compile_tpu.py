"""Compiles the TPU kernels with the libtpu wheel, with no TPU, and describes the programs.

    python tests/kernels/attention/compile_tpu.py '{"chip": "v5e", "T": 8192, "W": 4096, "H": 32, "K": 8, "h": 128}' ...

A line of JSON per job. A job with "sharded" compiles for four chips, batch on fsdp and heads on tensor. A process of its own:
libtpu reads its flags once and logs to stderr from C++.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
TOPOLOGIES = {"v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2", "tpu7x": "tpu7x:2x2x1"}
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "s16": 2, "s32": 4, "u32": 4, "f32": 4}
COLLECTIVE = re.compile(r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\(")


def arrays(text: str) -> list[int]:
    """Bytes of every array whose shape stands in a piece of HLO."""
    return [BYTES.get(kind, 8) * math.prod(int(n) for n in dims.split(",") if n)
            for kind, dims in re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", text)]


def describe(compiled) -> dict:
    """Temporaries, collectives, and for each kernel the bytes of its operands and results."""
    text = compiled.as_text()
    kernels = []
    for operation in re.split(r"\n  (?=(?:ROOT )?%)", text):
        if '"tpu_custom_call"' in operation:
            name, results = re.match(r"(?:ROOT )?%([\w.\-]+) = (.*?) custom-call\(", operation).groups()
            operands = re.search(r"operand_layout_constraints=\{(.*?)\}(?:\}|, \w+=)", operation)[1]
            kernels.append({"name": name, "results": arrays(results), "operands": arrays(operands)})
    return {"temp_bytes": compiled.memory_analysis().temp_size_in_bytes, "largest": max(arrays(text)), "kernels": kernels,
            "collectives": sorted(set(COLLECTIVE.findall(text)))}


def program(job: dict):
    """(q, k, v, dout) -> out and gradients, jitted, and its abstract arguments."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.experimental.layout import Format, Layout
    from jax.sharding import Mesh, NamedSharding
    from jax.sharding import PartitionSpec as P

    from neo.kernels.attention.kernel import Extras, Plan
    from neo.kernels.attention.tpu import KERNEL

    devices = topologies.get_topology_desc(platform="tpu", topology_name=TOPOLOGIES[job["chip"]]).devices
    plan = Plan(scale=job["h"] ** -0.5, window=job["W"])

    def gradients(q, k, v, dout):
        out, backward = jax.vjp(lambda *qkv: KERNEL.attend(*qkv, Extras(), plan)[0], q, k, v)
        return out, backward(dout)

    if job.get("sharded"):
        mesh = Mesh(np.array(devices[:4]).reshape(1, 2, 2), ("replica", "fsdp", "tensor"))
        spec = P(("replica", "fsdp"), None, "tensor", None)
        gradients = jax.shard_map(gradients, mesh=mesh, in_specs=(spec,) * 4, out_specs=(spec, (spec,) * 3), check_vma=False)
    else:
        mesh, spec = Mesh(np.array(devices[:1]), ("one",)), P()
    # As inside a model, where XLA lays the arrays out as the kernels want them: else they are copied first.
    where = Format(Layout.AUTO, NamedSharding(mesh, spec))
    batch = 4 if job.get("sharded") else 1
    q, kv = (jax.ShapeDtypeStruct((batch, job["T"], n, job["h"]), jnp.bfloat16) for n in (job["H"], job["K"]))
    return jax.jit(gradients, in_shardings=(where,) * 4, out_shardings=where), (q, kv, kv, q)


def main() -> None:
    os.environ.update(TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1", JAX_PLATFORMS="cpu")
    sys.path.insert(0, str(ROOT))
    from neo.kernels.attention.tpu import blocks

    for text in sys.argv[1:]:
        job = json.loads(text)
        start = time.time()
        gradients, arguments = program(job)
        with blocks.for_chip(job["chip"]):
            lowered = gradients.lower(*arguments)
        compiled = lowered.compile()
        print(json.dumps({**describe(compiled), "job": job, "seconds": round(time.time() - start, 1)}), flush=True)


if __name__ == "__main__":
    main()
