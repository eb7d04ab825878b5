"""The TPU kernels through libtpu's compiler, with no TPU: every chip accepts them, temporaries and operands are linear in T,
and a sharded call moves nothing. The grids are linear in T too, which tracing alone shows."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from neo.kernels.attention.kernel import Extras, Plan
from neo.kernels.attention.tpu import KERNEL

WINDOW = 4096
WIDE = {"H": 32, "K": 8, "h": 128}
NEO_7B = {"H": 16, "K": 16, "h": 192}
CHIPS = ("v5e", "v5p", "v6e", "tpu7x")
GIB = 2**30

needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None,
                                  reason="libtpu is not installed: pip install -e '.[plan]'")


def job(chip, length, heads, **more):
    return {"chip": chip, "T": length, "W": WINDOW, **heads, **more}


# One compile for each chip, both kinds of heads, both lengths on one chip, one sharded: about 40 s of CPU. The rest is slow.
SOME = [job("v5e", 8192, WIDE), job("v5e", 32768, WIDE), job("v5p", 32768, NEO_7B), job("v6e", 8192, NEO_7B),
        job("tpu7x", 8192, WIDE), job("v6e", 8192, WIDE, sharded=True)]
ALL = [job(chip, length, heads) for chip in CHIPS for length in (8192, 32768) for heads in (WIDE, NEO_7B)]


def compile_jobs(jobs, timeout):
    """Compiled by one child, while no other test uses libtpu."""
    command = [sys.executable, Path(__file__).with_name("compile_tpu.py"), *map(json.dumps, jobs)]
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    with open(Path(tempfile.gettempdir()) / "neo-libtpu.lock", "w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def check(report):
    """What holds for every chip and shape, on one device."""
    what = report["job"]
    assert len(report["kernels"]) in (2, 3), report   # forward; backward in one pass or two
    assert report["collectives"] == []
    assert report["temp_bytes"] <= GIB * what["T"] // 32768 + 64 * 2**20, report
    # q in bf16, its head size padded to whole lanes, in float32: nothing may be larger. [T, T] would be.
    q = what["T"] * what["H"] * -(-what["h"] // 128) * 128
    assert report["largest"] <= 4 * q < what["T"] ** 2 * what["H"], report
    for kernel in report["kernels"]:
        assert max(kernel["operands"] + kernel["results"]) <= 2 * q, kernel   # no float32 gradients, no parts to be summed


@pytest.fixture(scope="module")
def some():
    return compile_jobs(SOME, 800)


@needs_libtpu
@pytest.mark.parametrize("index", range(len(SOME) - 1), ids=[f"{j['chip']}-{j['T']}-{j['h']}" for j in SOME[:-1]])
def test_it_compiles_in_little_memory(some, index, capsys):
    report = some[index]
    with capsys.disabled():
        print(f"\n{report['job']}: {report['temp_bytes'] / 2**20:.0f} MiB of temporaries, {report['seconds']} s")
    assert report["job"] == SOME[index]
    check(report)


@needs_libtpu
def test_operands_grow_no_faster_than_t(some):
    """Lists of blocks or masks over pairs of blocks would grow by 16."""
    short, long = some[:2]
    assert [len(k["operands"]) for k in short["kernels"]] == [len(k["operands"]) for k in long["kernels"]]
    for a, b in zip(short["kernels"], long["kernels"], strict=True):
        for x, y in zip(a["operands"] + a["results"], b["operands"] + b["results"], strict=True):
            assert y <= 4 * x
    assert long["temp_bytes"] <= 4.2 * short["temp_bytes"]


@needs_libtpu
def test_sharded_heads_and_batch_move_nothing(some):
    report = some[-1]
    assert report["job"]["sharded"]
    assert report["collectives"] == []
    per_device = 2 * 8192 * 16 * 128 * 2   # two sequences and half of the heads
    assert max(max(kernel["operands"]) for kernel in report["kernels"]) == per_device


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", CHIPS)
def test_every_chip_length_and_kind_of_heads(chip):
    for report in compile_jobs([j for j in ALL if j["chip"] == chip], 3000):
        check(report)


def grids(length, heads):
    """Steps of the grid of every kernel in attention and its gradient, by tracing."""
    q, kv = (jax.ShapeDtypeStruct((1, length, heads[n], heads["h"]), jnp.bfloat16) for n in "HK")
    plan = Plan(scale=1.0, window=WINDOW)

    def gradients(q, k, v, dout):
        out, backward = jax.vjp(lambda *qkv: KERNEL.attend(*qkv, Extras(), plan)[0], q, k, v)
        return out, backward(dout)

    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "pallas_call":
                found.append(math.prod(equation.params["grid_mapping"].grid))
                continue
            for value in equation.params.values():
                for inner in value if isinstance(value, (tuple, list)) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if hasattr(inner, "eqns"):
                        walk(inner)

    walk(jax.make_jaxpr(gradients)(q, kv, kv, q).jaxpr)
    return found


@pytest.mark.parametrize("heads", [WIDE, NEO_7B], ids=["128", "192"])
def test_grids_grow_as_t(heads):
    """Steps are a T + b, exactly: the same number more for every 16,384 tokens more."""
    lengths = [16384 * n for n in (1, 2, 3, 4)]
    steps = [grids(length, heads) for length in lengths]
    assert all(len(found) >= 2 for found in steps)
    for kernel in zip(*steps, strict=True):
        more = [b - a for a, b in zip(kernel, kernel[1:], strict=False)]
        assert len(set(more)) == 1, kernel
        tokens = 16384 * heads["K"]
        assert 0 < more[0] <= tokens * (WINDOW + 2 * 2048) / 128**2   # blocks of 128 at the least
