"""Compiler flags: the table, which chip a machine has, and how the flags reach the compiler."""

from __future__ import annotations

import fcntl
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from neo.parallel import compiler_flags
from neo.parallel.compiler_flags import FLAGS, apply, detect, flags_for, given, inspect, report

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def pci(root: Path, slot: str, vendor: str, device: str) -> None:
    folder = root / "sys/bus/pci/devices" / slot
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "device").write_text(f"{device}\n")


def nvidia(root: Path, model: str) -> None:
    folder = root / "proc/driver/nvidia/gpus/0000:01:00.0"
    folder.mkdir(parents=True)
    (folder / "information").write_text(f"Model: \t\t {model}\nIRQ:   \t\t 12\n")


@pytest.fixture
def v5p(tmp_path):
    """The folders of a machine with two v5p chips, and Google's network card, which is no TPU."""
    pci(tmp_path, "0000:00:03.0", "0x1ae0", "0x0042")
    pci(tmp_path, "0000:00:04.0", "0x1ae0", "0x0062")
    pci(tmp_path, "0000:00:05.0", "0x1ae0", "0x0062")
    return tmp_path


def test_every_flag_has_a_reason_and_an_effect():
    for chip, flags in FLAGS.items():
        names = [flag.name for flag in flags]
        assert len(set(names)) == len(names), chip
        for flag in flags:
            assert re.fullmatch(r"xla_\w+", flag.name) and flag.value and " " not in flag.value
            assert len(flag.why) > 10 and len(flag.effect) > 10, flag.name
    assert flags_for("v5p") and flags_for("h100") == flags_for("gpu") and flags_for("abacus") == ()
    # A fusion and the SparseCore cannot both take a collective; v5e has fusions, and no SparseCore collectives.
    assert not [flag for flag in flags_for("v5e") if "sparse_core" in flag.name]
    assert [flag.name for flag in flags_for("v5p") if flag.slow] == ["xla_tpu_scoped_vmem_limit_kib"]


@pytest.mark.parametrize(("device", "chip"), [("0x0063", "v5e"), ("0x0062", "v5p"), ("0x006f", "v6e"), ("0x005e", "v4"),
                                              ("0x0076", "tpu7x"), ("0x0042", ""), ("0x001f", "")])
def test_tpus_are_known_by_their_pci_numbers(tmp_path, device, chip):
    pci(tmp_path, "0000:00:04.0", "0x1ae0", device)
    pci(tmp_path, "0000:00:09.0", "0x8086", "0x0062")   # another maker's card of that number
    found = detect({}, tmp_path)
    assert found.name == chip and (device in found.how if chip else "no TPU" in found.how)


def test_pci_numbers_are_those_of_jax():
    """JAX has no public table; where it has one of its own, ours must not differ."""
    hardware = pytest.importorskip("jax._src.hardware_utils")
    jax_table = {device: version.name for device, version in hardware._TPU_PCI_DEVICE_IDS.items()}
    for device, chip in compiler_flags._PCI.items():
        assert jax_table[device] == chip


@pytest.mark.parametrize(("said", "chip"), [("v5litepod-16", "v5e"), ("v5p-128", "v5p"), ("v6e-8", "v6e"), ("v4-32", "v4"),
                                            ("tpu7x-16", "tpu7x"), ("", ""), ("v99-8", "")])
def test_tpus_are_known_by_their_product_name(tmp_path, said, chip):
    assert detect({"TPU_ACCELERATOR_TYPE": said}, tmp_path).name == chip


@pytest.mark.parametrize(("model", "chip"), [("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA A100-SXM4-40GB", "a100"),
                                             ("NVIDIA H200", "h200"), ("NVIDIA B200", "b200"), ("Tesla T4", "gpu")])
def test_gpus_are_known_by_the_driver(tmp_path, model, chip):
    nvidia(tmp_path, model)
    found = detect({}, tmp_path)
    assert found.name == chip and model in found.how and found.variable == "XLA_FLAGS"


def test_gpus_of_containers_are_known_by_their_device(tmp_path):
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/nvidia0").touch()
    assert detect({}, tmp_path).name == "gpu"


@pytest.mark.parametrize(("platforms", "chip"), [("", "v5p"), ("tpu,cpu", "v5p"), ("cuda", "h100"), ("cpu", ""),
                                                 ("cpu,cuda", "")])
def test_jax_platforms_decides_between_them(v5p, platforms, chip):
    nvidia(v5p, "NVIDIA H100 80GB HBM3")
    assert detect({"JAX_PLATFORMS": platforms}, v5p).name == chip


def test_flags_go_where_the_compiler_reads_them(v5p):
    env = {"LIBTPU_INIT_ARGS": " --xla_tpu_use_enhanced_launch_barrier=true"}   # as JAX leaves it when imported
    applied = apply("auto", env, v5p, started=False)
    assert applied.chip.name == "v5p" and applied.active == flags_for("v5p") and not applied.absent and not applied.users
    words = env["LIBTPU_INIT_ARGS"].split()
    assert words == ["--xla_tpu_use_enhanced_launch_barrier=true", *(flag.text for flag in flags_for("v5p"))]
    assert "XLA_FLAGS" not in env
    before = dict(env)
    assert apply("auto", env, v5p, started=False) == applied and env == before   # once more: nothing twice
    assert inspect("auto", env, v5p) == applied


def test_gpu_flags_go_into_xla_flags(tmp_path):
    nvidia(tmp_path, "NVIDIA H200")
    env = {"XLA_FLAGS": "--xla_dump_to=here"}
    apply("auto", env, tmp_path, started=False)
    assert env["XLA_FLAGS"].split()[0] == "--xla_dump_to=here" and "latency_hiding" in env["XLA_FLAGS"]
    assert "LIBTPU_INIT_ARGS" not in env


@pytest.mark.parametrize("users", ["--xla_tpu_scoped_vmem_limit_kib=1024", "-xla_tpu_scoped_vmem_limit_kib=1024"])
def test_what_the_user_set_stays(v5p, users):
    env = {"LIBTPU_INIT_ARGS": users}
    applied = apply("auto", env, v5p, started=False)
    (flag, value), = applied.users
    assert (flag.name, value) == ("xla_tpu_scoped_vmem_limit_kib", "1024")
    assert len(re.findall("scoped_vmem", env["LIBTPU_INIT_ARGS"])) == 1
    assert flag not in applied.active and len(applied.active) == len(flags_for("v5p")) - 1
    assert "--xla_tpu_scoped_vmem_limit_kib=1024 as you set it (the table has 49152)" in report(applied)


def test_none_changes_nothing_and_drops_none_silently(v5p):
    env: dict[str, str] = {}
    applied = apply("none", env, v5p, started=False)
    assert not env and applied.absent == flags_for("v5p")
    text = "\n".join(report(applied))
    assert "NOT in force, because config.train.compiler_flags=none" in text
    assert all(flag.text in text for flag in flags_for("v5p"))


def test_too_late_is_said(v5p):
    env: dict[str, str] = {}
    applied = apply("auto", env, v5p, started=True)
    assert not env and applied.absent == flags_for("v5p") and "JAX had started" in applied.why
    assert "LIBTPU_INIT_ARGS" in applied.why


def test_a_file_of_flags_is_left_alone(tmp_path):
    """XLA reads XLA_FLAGS without a dash as a file's name: text after it would be part of the name."""
    nvidia(tmp_path, "NVIDIA H100 80GB HBM3")
    env = {"XLA_FLAGS": "/etc/flags.txt"}
    applied = apply("auto", env, tmp_path, started=False)
    assert env == {"XLA_FLAGS": "/etc/flags.txt"} and "names a file" in applied.why and applied.absent


def test_reports_of_machines_without_flags(tmp_path):
    assert report(apply("auto", {"JAX_PLATFORMS": "cpu"}, tmp_path, started=False)) == ["none (JAX_PLATFORMS=cpu)"]
    pci(tmp_path, "0000:00:04.0", "0x1ae0", "0x005e")
    assert "v4" in report(apply("auto", {}, tmp_path, started=False))[0]


def test_reports_name_every_flag(v5p):
    lines = report(apply("auto", {}, v5p, started=False))
    assert "v5p" in lines[0] and "LIBTPU_INIT_ARGS" in lines[0] and "compiler_flags=none" in lines[0]
    assert lines[1:] == [flag.text for flag in flags_for("v5p")]


def test_flags_are_read_in_all_their_forms():
    assert given("--a=1 -b=two --c --nod --e='x'") == {"a": "1", "b": "two", "c": "true", "d": "false", "e": "x"}


def test_backend_started_is_known():
    """Before the first array and after, in a process of its own; also that flags set in between reach XLA."""
    program = ("import os, jax; from neo.parallel.compiler_flags import backend_started as b\n"
               "first = b()\nos.environ['XLA_FLAGS'] = '--xla_no_such_flag=1'\nprint(first, flush=True)\n"
               "jax.numpy.ones(3)\nprint(b(), flush=True)")
    clean = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"JAX_PLATFORMS": "cpu"}
    refused = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, cwd=ROOT, check=False)
    assert refused.stdout.split() == ["False"] and "xla_no_such_flag" in refused.stderr   # read only now, and refused
    done = subprocess.run([sys.executable, "-c", program.replace("--xla_no_such_flag=1", "")], env=clean, capture_output=True,
                          text=True, cwd=ROOT, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr


def test_xla_knows_the_gpu_flags():
    """XLA parses all flags on any platform, ends at one it does not know, and writes those that differ from its defaults."""
    with tempfile.TemporaryDirectory() as folder:
        flags = " ".join(flag.text for flag in flags_for("gpu"))
        env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": f"{flags} --xla_dump_to={folder}"}
        done = subprocess.run([sys.executable, "-c", "import jax; jax.jit(lambda x: x + 1)(1.0)"], env=env, capture_output=True,
                              text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        used = "\n".join(path.read_text() for path in Path(folder).glob("*debug_options*"))
    for flag in flags_for("gpu"):
        assert re.search(rf"^{flag.name}: {flag.value}$", used, re.MULTILINE), f"{flag.text} is the default, or means nothing"


# The smallest shapes with links on every axis that the flags of the chip are about.
TOPOLOGIES = {"v5e": dict(topology_name="v5e:4x4"), "v6e": dict(topology_name="v6e:16x16"),
              "v5p": dict(topology_name="v5:4x4x4", chip_config_name="megacore", chips_per_host_bounds=(2, 2, 1), num_slices=1,
                          wrap=(True, True, True))}


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed: pip install -e '.[plan]'")
@pytest.mark.parametrize(("chip", "tensor"), [("v5e", 1), ("v6e", 1), ("v5p", 1), ("v5p", 4)])
def test_libtpu_takes_the_flags(chip, tensor):
    """A tiny FSDP program compiles with the flags of its chip, and they do to its collectives what they are there for."""
    env = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")}
    env |= {"TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "JAX_PLATFORMS": "cpu",
            "LIBTPU_INIT_ARGS": " ".join(flag.text for flag in flags_for(chip))}
    with open(Path(tempfile.gettempdir()) / "neo-libtpu.lock", "w") as turn:   # libtpu lets one process at a time in
        fcntl.flock(turn, fcntl.LOCK_EX)
        done = subprocess.run([sys.executable, HERE / "fsdp_program.py", json.dumps(TOPOLOGIES[chip]), str(tensor)], env=env,
                              capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kind"].startswith({"v5e": "TPU v5 lite", "v6e": "TPU v6", "v5p": "TPU v5"}[chip])
    if chip != "v5e":
        # Two matrices: gathered forward, gathered backward, their gradients scattered.
        assert found["sparse_core"] == 6, found
        assert found["reduce_scatters"] == 2, found


def test_the_printer_prints_the_table(tmp_path):
    """From any folder, and without neo being installed: its output goes straight into LIBTPU_INIT_ARGS."""
    def printed(*words):
        return subprocess.run([sys.executable, ROOT / "launch" / "tpu_flags.py", *words], cwd=tmp_path, capture_output=True,
                              text=True, check=False)
    assert printed("v5p").stdout.split() == [flag.text for flag in flags_for("v5p")]
    reasons = printed("v5p", "--why").stdout
    assert all(flag.text in reasons and flag.why in reasons and flag.effect in reasons for flag in flags_for("v5p"))
    for wrong in ((), ("v99",), ("v5p", "v6e")):
        assert printed(*wrong).returncode == 2 and "v5e" in printed(*wrong).stderr
