"""The process that compiles kernels alone: `python -m neo.plan.kernel_child JOB`, started by neo.plan.kernels.

JOB is a JSON file: {"topology", "kernels": {key: job of `kernels.kernel_job`}, "cache"}. For each kernel it writes KEY.json
into the cache folder: {"cycles", "issue_cycles", "hbm_bytes", "steps", "note"}, or {"error": why there is no price}.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from neo.plan.kernel_dump import Dump, dump_flags, kernels
from neo.plan.kernel_scalar import NotKnown, execute

_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")


def _array(text: str) -> Any:
    """A jax.ShapeDtypeStruct of "bf16[8,128]"."""
    import jax
    import jax.numpy as jnp

    dtypes = {"bf16": jnp.bfloat16, "f32": jnp.float32, "f16": jnp.float16, "s32": jnp.int32, "u32": jnp.uint32,
              "s8": jnp.int8, "u8": jnp.uint8, "s16": jnp.int16, "u16": jnp.uint16, "pred": jnp.bool_}
    kind, dims = _SHAPE.fullmatch(text).groups()
    return jax.ShapeDtypeStruct(tuple(int(n) for n in dims.split(",") if n), dtypes[kind])


def compile_alone(job: Mapping[str, Any], device: Any) -> None:
    """Compile a program of one kernel for a device; the compiler leaves its dumps where its flags say."""
    import jax
    from jax.sharding import SingleDeviceSharding

    results = [_array(text) for text in job["results"]]
    call = jax.ffi.ffi_call("tpu_custom_call", results, custom_call_api_version=1,
                            legacy_backend_config=json.dumps(job["config"]))
    where = SingleDeviceSharding(device)
    jitted = jax.jit(lambda *operands: call(*operands), in_shardings=(where,) * len(job["operands"]), out_shardings=where)
    jitted.lower(*(_array(text) for text in job["operands"])).compile()


def count(job: Mapping[str, Any], dump: Dump, cores: int, bytes_per_cycle: float) -> dict[str, Any]:
    """The price of a dumped kernel.

    Scalar operands that steer it hold what the job says; of a kernel of neo's about which it says nothing they are taken as
    zeros, with which its attention kernels visit every tile. A kernel that branches on anything else has no price.
    """
    from neo.plan.kernels import price_of

    words = {int(position): values for position, values in (job["words"] or {}).items()}
    note = "rows of one document are taken; rows of several cost less" if words else ""
    try:
        runs = [execute(dump, core, words) for core in range(cores)]
    except NotKnown as unknown:
        scalars = {i: _array(text).shape for i, text in enumerate(job["operands"]) if text.startswith("s32[")}
        if words or not job["name"].startswith("neo_") or not scalars:
            return {"error": str(unknown)}
        words = {i: [0] * shape[0] for i, shape in scalars.items() if len(shape) == 1}
        try:
            runs = [execute(dump, core, words) for core in range(cores)]
        except NotKnown:
            return {"error": str(unknown)}
        note = "scalar operands are taken as zeros: every tile is visited"
    return {**price_of(runs, bytes_per_cycle), "note": note}


def main() -> None:
    """Price the kernels of the job named on the command line."""
    job = json.loads(Path(sys.argv[1]).read_text())
    with tempfile.TemporaryDirectory(prefix="neo-llo-") as made:
        folder = Path(made)
        # libtpu reads its flags when it is loaded, so here is early enough.
        os.environ["LIBTPU_INIT_ARGS"] = " ".join((os.environ.get("LIBTPU_INIT_ARGS", ""), *dump_flags(folder))).strip()
        import jax

        from neo.plan.topology import parse, tpu_devices

        jax.config.update("jax_enable_compilation_cache", False)
        topology = parse(job["topology"])
        device = tpu_devices(topology)[0]
        cores = int(device.num_cores)   # of a device of v4 and v5p two, and they share a kernel
        bytes_per_cycle = topology.chip.hbm_bandwidth / topology.chip.clock
        cache = Path(job["cache"])
        cache.mkdir(parents=True, exist_ok=True)
        for key, kernel in job["kernels"].items():
            for old in folder.iterdir():
                old.unlink()
            compile_alone(kernel, device)
            dumps = [dump for dump in kernels(folder) if dump.name != "TLP"]   # the top-level program, which calls it
            if len(dumps) == 1:
                price = count(kernel, dumps[0], cores, bytes_per_cycle)
            else:
                price = {"error": f"the compiler's dumps hold {len(dumps)} kernels where one was compiled"}
            new = cache / f".{key}.{os.getpid()}"
            new.write_text(json.dumps({"name": kernel["name"], "operands": kernel["operands"], **price}))
            new.replace(cache / f"{key}.json")
    print(json.dumps({"done": len(job["kernels"])}), flush=True)


if __name__ == "__main__":
    main()
