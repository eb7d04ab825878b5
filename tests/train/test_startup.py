"""The table at the start of a run."""

from __future__ import annotations

import json
import types

import jax

from neo.config import load
from neo.parallel import compiler_flags
from neo.parallel.mesh import make_mesh
from neo.train import startup


def test_table_has_what_a_start_must_tell(tiny, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    config = load(str(tiny))
    lines = startup.table(config, make_mesh(config.mesh), "blockwise (because)", "float32")
    rows = {line.split()[0]: line for line in lines if not line.startswith(" ")}
    assert list(rows) == ["processes", "devices", "mesh", "attention", "precision", "flags", "versions"]
    assert "1, this is number 0" in rows["processes"] and f"{jax.device_count()} x cpu" in rows["devices"]
    assert "blockwise (because)" in rows["attention"] and "float32 products" in rows["precision"]
    assert "none (JAX_PLATFORMS=cpu)" in rows["flags"] and f"jax {jax.__version__}" in rows["versions"]


def test_table_lists_every_flag(tiny, monkeypatch):
    flags = compiler_flags.flags_for("v5p")
    chip = compiler_flags.Chip("v5p", "PCI device 0x0062")
    applied = compiler_flags.Applied(chip, active=flags[1:], users=((flags[0], "x"),))
    monkeypatch.setattr(compiler_flags, "inspect", lambda mode: applied)
    config = load(str(tiny))
    text = "\n".join(startup.table(config, make_mesh(config.mesh), "a", "b"))
    assert "PCI device 0x0062" in text and all(flag.text in text for flag in flags[1:])
    assert f"--{flags[0].name}=x as you set it" in text
    facts = json.loads(json.dumps(startup.facts(config)))
    assert facts["chip"] == "v5p" and len(facts["compiler_flags"]) == len(flags)
    assert f"--{flags[0].name}=x" in facts["compiler_flags"]


def test_versions_of_a_gpu(tmp_path):
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build  (dvs-builder)  Thu Jan 23\n"
        "GCC version:  gcc version 12.3.0\n")
    gpu = types.SimpleNamespace(platform="gpu", client=types.SimpleNamespace(platform_version="PJRT C API\ncuda 12090"))
    lines = startup.versions(gpu, tmp_path)
    assert lines[1:] == ["runtime: CUDA 12.9", "NVIDIA driver 570.86.15"]
    older = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n"
    (tmp_path / "proc/driver/nvidia/version").write_text(older)
    assert startup.nvidia_driver(tmp_path) == "535.104.05"


def test_versions_of_a_tpu(tmp_path):
    said = "PJRT C API\nTFRT TPU v5 lite\nBuilt on Oct 1 2026 (1790000000) cl/1"
    tpu = types.SimpleNamespace(platform="tpu", client=types.SimpleNamespace(platform_version=said))
    assert startup.versions(tpu, tmp_path)[1] == "runtime: TFRT TPU v5 lite, Built on Oct 1 2026 (1790000000) cl/1"


def test_a_run_prints_and_keeps_it(command, tmp_path, monkeypatch):
    """The whole way: flags are set before JAX would start, the table is on stderr, the facts in environment.json."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    called = []
    apply = compiler_flags.apply
    monkeypatch.setattr(compiler_flags, "apply", lambda mode, *rest, **more: called.append(mode) or apply(mode, *rest, **more))
    ended = command(tmp_path / "run", train__steps=1, train__compiler_flags="none")
    assert ended.code == 0 and called[0] == "none"
    assert "flags      none (JAX_PLATFORMS=cpu)" in ended.err
    facts = json.loads((tmp_path / "run/environment.json").read_text())
    assert facts["chip"] is None and facts["compiler_flags"] == []
