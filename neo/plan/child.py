"""The process that compiles: `python -m neo.plan.child JOB`, started by neo.plan.compile with libtpu's flags set.

JOB is a JSON file: {"config", "topology", "phase", "capacity", "flags", "cache"}. It lowers the real training step with an
abstract state, looks the program up in the cache, and compiles it when it is not there. It prints a line of JSON for each
stage; the last one holds the key of the cache entry, or "input" or "refused" with one line of text.

A cache entry is a folder named by its key: facts.json (`Compiled` but for the program) and step.hlo.gz.
"""

from __future__ import annotations

import dataclasses
import functools
import gzip
import hashlib
import json
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

FORMAT = 2   # of a cache entry; another number leaves old ones unread
_BYTES = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# What the compiler says when a program needs more memory than there is: a property of the plan, not a fault.
_TOO_LARGE = re.compile(r"RESOURCE_EXHAUSTED|exceeds? (?:the )?(?:hbm|vmem|scoped vmem)|scoped vmem|[Rr]an out of memory",
                        re.IGNORECASE)
_USED = re.compile(r"(?:Used|required for HLO temporaries \() ?([\d.]+)([KMGT]?)(?:iB)?\)? (?:of|exceeds available HBM) "
                   r"\(?([\d.]+)([KMGT]?)(?:iB)?", re.IGNORECASE)


def say(**event: Any) -> None:
    """A line of JSON for the process that waits."""
    print(json.dumps(event), flush=True)


@dataclasses.dataclass(frozen=True)
class Lowered:
    """A step before compilation, and what is known of it by then."""

    program: Any        # jax.stages.Lowered
    facts: dict[str, Any]
    words: Callable[[], list[dict[str, Any]]]   # `kernel_words.one_document` of it
    devices: str        # which they are and how the mesh orders them: the program's text does not say


def lower(config: Any, devices: Any, phase: Any, capacity: int | None) -> Lowered:
    """Trace and lower the step of a phase on these devices, everything "auto" resolved as a run on them would.

    But for the check of the attention kernel on the device itself, which is not there.
    """
    import jax
    import jax.numpy as jnp

    from neo.config.checks import check_on_mesh
    from neo.models.decoder import Decoder
    from neo.parallel.devices import has_bfloat16
    from neo.parallel.mesh import AXES, BATCH_AXES, make_mesh
    from neo.parallel.rules import Layout, rules_for
    from neo.plan.kernel_words import one_document
    from neo.train import attention_choice, memory
    from neo.train.optimizer import Optimizer
    from neo.train.step import StepOptions, abstract_batch, abstract_state, make_step

    mesh = make_mesh(config.mesh, devices)
    sizes = {axis: mesh.shape[axis] for axis in AXES}
    check_on_mesh(config, sizes)
    device = devices[0]
    dtype = config.train.compute_dtype
    if dtype == "auto":
        dtype = "bfloat16" if has_bfloat16(device) else "float32"
    asked = attention_choice.requests(config, dtype, sizes, device.platform, device.device_kind)
    attention, why = attention_choice.choose(config, asked)
    layout = Layout(mesh, rules_for(config.model.num_kv_heads, sizes["tensor"]))
    decoder = Decoder(config.model, jnp.dtype(dtype), config.train.remat, attention, layout)
    optimizer = Optimizer(config.optimizer, decoder.axes())
    micro = memory.choose_micro_batch(config, decoder, phase, sizes, capacity, device.platform)
    local = phase.global_batch // math.prod(sizes[axis] for axis in BATCH_AXES)
    options = StepOptions(num_sources=len(config.sources), accumulation=local // micro, rope_base=phase.rope_base,
                          clip_norm=config.optimizer.clip_norm, z_loss=config.optimizer.z_loss)
    state = abstract_state(decoder, optimizer)
    batch = abstract_batch(decoder, phase.global_batch, phase.seq_len)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=layout.sharding())
    program = make_step(decoder, optimizer, options).lower(state, batch, rate, rate)
    facts = {"mesh": sizes, "device_kind": device.device_kind, "compute_dtype": dtype, "attention": attention,
             "attention_reason": why, "remat": config.train.remat, "micro_batch": micro, "accumulation": local // micro,
             "global_batch": phase.global_batch, "seq_len": phase.seq_len, "phase": phase.name,
             "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state["params"]))}
    places = [getattr(one, "id", i) for i, one in enumerate(mesh.devices.flat)]
    words = functools.partial(one_document, decoder, phase, sizes, micro, device.device_kind)
    return Lowered(program, facts, words, json.dumps([device.device_kind, list(mesh.devices.shape), places]))


def key_of(lowered: Lowered, topology: str, flags: list[str], versions: Mapping[str, str]) -> str:
    """Hash of all that goes into the compiler: program, devices, flags (their order does not matter), versions."""
    parts = (str(FORMAT), lowered.program.as_text(), topology, lowered.devices, *sorted(flags),
             *(f"{name} {version}" for name, version in sorted(versions.items())))
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]


def used_bytes(text: str) -> tuple[int, int] | None:
    """(bytes needed, bytes there are) of the compiler's refusal, where it says them."""
    found = _USED.search(text)
    if not found:
        return None
    need, unit, have, unit_of_have = found.groups()
    return round(float(need) * _BYTES[unit.upper()]), round(float(have) * _BYTES[unit_of_have.upper()])


def first_lines(text: str) -> str:
    """A refusal in one line: its first sentence and, for HBM, how much was needed."""
    words = " ".join(text.split())
    found = _USED.search(words)
    if found:
        need, unit, have, unit_of_have = found.groups()
        return f"the compiler ran out of HBM: {need} {unit}iB needed, {have} {unit_of_have}iB there"
    return words[:300]


def memory_facts(compiled: Any) -> dict[str, int]:
    """The compiler's account of HBM on one device, bytes."""
    usage = compiled.memory_analysis()
    facts = {"arguments": usage.argument_size_in_bytes, "temporaries": usage.temp_size_in_bytes,
             "outputs": usage.output_size_in_bytes, "aliased": usage.alias_size_in_bytes,
             "host_temporaries": getattr(usage, "host_temp_size_in_bytes", 0),
             "code": getattr(usage, "generated_code_size_in_bytes", 0)}
    # All arrays of the step, were none of them to share its place with another: results in the place of donated ones do.
    held = facts["arguments"] + facts["temporaries"] + max(0, facts["outputs"] - facts["aliased"])
    # The most at one time, by the compiler's own simulation of its heap; temporaries are counted with the gaps between them.
    return {**facts, "held": held, "peak": getattr(usage, "peak_memory_in_bytes", 0) or held}


def store(cache: Path, key: str, facts: Mapping[str, Any], hlo: str) -> None:
    """A cache entry, whole or not at all."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=cache) as made:
        folder = Path(made) / "entry"
        folder.mkdir()
        (folder / "facts.json").write_text(json.dumps(facts, indent=1))
        with gzip.open(folder / "step.hlo.gz", "wt", compresslevel=3) as file:
            file.write(hlo)
        try:
            os.replace(folder, cache / key)
        except OSError:   # another process was as fast
            if not (cache / key / "facts.json").exists():
                raise


def work(job: Mapping[str, Any]) -> None:
    """Lower, look up, compile, store; `say` what came of it."""
    import jax

    from neo.config import from_dict
    from neo.plan.libtpu import version
    from neo.plan.topology import parse, tpu_devices

    jax.config.update("jax_enable_compilation_cache", False)   # JAX's own cache does not keep HLO texts
    config = from_dict(job["config"])
    phase = next(one for one in config.phases if one.name == job["phase"])
    devices = tpu_devices(parse(job["topology"]))
    start = time.monotonic()
    lowered = lower(config, devices, phase, job["capacity"])
    versions = {"jax": jax.__version__, "libtpu": version()}
    key = key_of(lowered, job["topology"], job["flags"], versions)
    lower_s = round(time.monotonic() - start, 2)
    cache = Path(job["cache"])
    facts = {**lowered.facts, "versions": versions, "topology": job["topology"], "flags": job["flags"], "lower_s": lower_s}
    if (cache / key / "facts.json").exists() and not job.get("again"):
        say(key=key, cached=True)
        return
    say(stage="compiling", lower_s=lower_s)
    start = time.monotonic()
    hlo, compile_s = "", 0.0
    try:
        compiled = lowered.program.compile()
        compile_s = round(time.monotonic() - start, 2)
        hlo, facts["memory"] = compiled.as_text(), memory_facts(compiled)
        facts["kernel_words"] = lowered.words() if "tpu_custom_call" in hlo else []
    except Exception as error:
        if not _TOO_LARGE.search(str(error)):
            raise
        facts["refused"], facts["refused_bytes"] = first_lines(str(error)), used_bytes(str(error))
    facts["compile_s"] = compile_s or round(time.monotonic() - start, 2)
    store(cache, key, facts, hlo)
    say(key=key, cached=False)


def main() -> None:
    """The job named on the command line; exit code 2 with {"input": text} for what the user can mend."""
    from neo.errors import InputError

    try:
        work(json.loads(Path(sys.argv[1]).read_text()))
    except InputError as error:
        say(input=str(error))
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
