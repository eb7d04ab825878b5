"""Compiler flags per chip, as data: what each is for, what it does, and how it reaches the compiler before JAX starts.

TPU flags go into LIBTPU_INIT_ARGS and GPU flags into XLA_FLAGS; both are read once, when the backend starts, so the chip
has to be known before: from TPU_ACCELERATOR_TYPE or the PCI ids that the kernel shows. `flags_for` is the table,
`apply` puts it into the environment, `report` says what is in force.

Where the figures of `Flag.effect` come from:

* v5p: our step at Mistral-7B's shape on 64 chips, 128 sequences of 4096, as libtpu 0.0.50.1 compiles it, replayed with
  the compiler's own cycles: 1403 ms without flags, 1045 ms with all (matrix products 1050 -> 793 ms, exposed collectives
  104 -> 1 ms). Flag by flag: MaxText's step at the same shape with libtpu 0.0.51, full remat: 1610 ms without flags, 1376
  with the VMEM limit, 1562 with SPARSE_CORE, 1271 with all.
* v5e, v6e: MaxText's steps where a figure is given; else what became of the collectives of a small FSDP program
  (tests/parallel/fsdp_program.py). That program came out the same on v4 and tpu7x with v5p's flags and without, so these
  have none: v4 offloads nothing, and tpu7x does by default.
* GPUs: of MaxText's flags (`configs/gpu/a3/llama_2_7b/*.sh`) those about collectives, less what is the default or what one
  of the JAX versions we run on ignores. Nothing of ours was measured on GPUs.

No TPU figure was measured on hardware.
"""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping, MutableMapping
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Flag:
    """One compiler flag. `slow`: compiling takes a multiple of the time with it (the step does not)."""

    name: str        # without the dashes
    value: str
    why: str
    effect: str      # what it is known to do to a step, or "not measured"
    slow: bool = False

    @property
    def text(self) -> str:
        """As a command line has it."""
        return f"--{self.name}={self.value}"


_SOURCE = "MaxText xla_flags_library.py, ENABLE_SPARSECORE_OFFLOADING_FOR_RS_AG_AR"
_WITH_SC = "with the other SparseCore flags"


def _sparse_core(v6e: bool) -> tuple[Flag, ...]:
    """SparseCore collectives; the last ones, over several axes, are not in MaxText's set and do most of the work."""
    offload = ("v5p: all-reduces become asynchronous, all-gathers stay synchronous: MaxText 1610 -> 1562 ms, all flags of this "
               "set together" if not v6e else "MaxText 682 -> 613 ms a step on 256 chips, all flags of this set together")
    no_fusion = [Flag(f"xla_tpu_enable_async_collective_fusion_fuse_{kind}", "false",
                      f"a collective runs on the SparseCore or inside a matmul fusion, not both ({_SOURCE})",
                      f"none alone; needed {_WITH_SC}")
                 for kind in ("all_gather", "all_reduce", "reduce_scatter")]
    kinds = [Flag(f"xla_tpu_enable_sparse_core_collective_offload_{kind}", "true",
                  f"the SparseCore moves the data while the TensorCore computes ({_SOURCE})", offload)
             for kind in ("all_gather", "reduce_scatter", "all_reduce")]
    tracing = [Flag(f"xla_tpu_enable_{kind}_offload_tracing", "true", f"offloaded collectives show in a profile ({_SOURCE})",
                    "none on the schedule") for kind in ("all_gather", "reduce_scatter", "all_reduce")]
    rest = [Flag("xla_tpu_use_tc_device_shape_on_sc", "true", f"one layout on both cores, no conversion ({_SOURCE})",
                 f"not separated; {_WITH_SC}"),
            Flag("xla_sc_enable_instruction_fusion", "false", _SOURCE, f"not separated; {_WITH_SC}"),
            Flag("xla_sc_disjoint_spmem", "false", _SOURCE, f"not separated; {_WITH_SC}"),
            Flag("xla_sc_disable_megacore_partitioning", "true", _SOURCE, f"not separated; {_WITH_SC}")]
    gather = "xla_tpu_enable_sparse_core_collective_offload_{}_all_gather"
    two = Flag(gather.format("2d"), "true", "all-gathers over two axes are offloaded too (ours; not in MaxText's set)",
               "every all-gather of a small FSDP program becomes asynchronous" if v6e else "the same where fsdp goes over two "
               "axes of the torus (16 x 4 with tensor=4); nothing changes where it goes over three")
    three = Flag(gather.format("3d"), "true", "all-gathers over three axes are offloaded too (ours; not in MaxText's set)",
                 "every all-gather becomes asynchronous; with nd_reduce_scatter and the VMEM limit MaxText 1376 -> 1271 ms")
    scatter = Flag("xla_tpu_enable_sparse_core_collective_offload_nd_reduce_scatter", "true",
                   "gradients are reduce-scattered, not all-reduced: half the bytes (ours; not in MaxText's set)",
                   "gradient all-reduces become asynchronous reduce-scatters")
    nd = (two, scatter) if v6e else (two, three, scatter)
    return (*no_fusion, *kinds, *tracing, *rest, *nd)


def _scoped_vmem(kib: int, effect: str) -> Flag:
    return Flag("xla_tpu_scoped_vmem_limit_kib", str(kib), "VMEM that one fusion may use: larger matmul tiles "
                "(MaxText, DENSE_VMEM_LIMIT_FLAG)", effect, slow=True)


def _gpu() -> tuple[Flag, ...]:
    recipe = "MaxText configs/gpu/a3/llama_2_7b; docs.jax.dev/en/latest/gpu_performance_tips.html"
    combine = [Flag(f"xla_gpu_{kind}_combine_threshold_bytes", str(size << 20),
                    f"collectives of small arrays travel together up to this size ({recipe})", "not measured by us")
               for kind, size in (("all_gather", 128), ("reduce_scatter", 64), ("all_reduce", 128))]   # 1vm.sh's sizes
    return (Flag("xla_gpu_enable_latency_hiding_scheduler", "true",
                 f"starts collectives early and ends them late, so that computation hides them; off by default ({recipe})",
                 "not measured by us"), *combine)


# v5e has no SparseCore collectives; its defaults already hide most all-gathers inside matmul fusions.
_TPU: dict[str, tuple[Flag, ...]] = {
    "v4": (),
    "v5e": (_scoped_vmem(49152, "matmul efficiency 80 -> 94 %: ours at Llama-2-7B's shape on 256 chips, 1678 -> 1481 ms. 98304 "
                                "gives 96 %, and compiling takes a multiple of the time (MaxText 48 -> 219 s)"),),
    "v5p": (*_sparse_core(v6e=False),
            _scoped_vmem(49152, "matmul efficiency 79 -> 97 %: MaxText 1610 -> 1376 ms; compile 32 -> 81 s")),
    "v6e": (*_sparse_core(v6e=True), _scoped_vmem(98304, "matmul efficiency 81 % with it; not compared without")),
    "tpu7x": (),
}
_NVIDIA = ("a100-40", "a100-80", "a100", "h100", "h200", "b200", "gpu")
FLAGS: dict[str, tuple[Flag, ...]] = {**_TPU, **dict.fromkeys(_NVIDIA, _gpu())}


def flags_for(chip: str) -> tuple[Flag, ...]:
    """The flags of a chip (v5e, v5p, h100, ... ; "gpu" for any NVIDIA GPU); () for one that has none or is not known."""
    return FLAGS.get(chip, ())


# Google's PCI device numbers, as JAX 0.10 and 0.12 have them (jax/_src/hardware_utils.py); v2 and v3 share one.
_GOOGLE = "0x1ae0"
_PCI = {"0x0027": "v3", "0x005e": "v4", "0x0062": "v5p", "0x0063": "v5e", "0x006f": "v6e", "0x0076": "tpu7x"}
# Beginnings of TPU_ACCELERATOR_TYPE, which Cloud TPU sets: v5litepod-16, v5p-128, v6e-8.
_TYPES = {"v5litepod": "v5e", "v5lite": "v5e", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "tpu7x": "tpu7x", "v4": "v4",
          "v3": "v3", "v2": "v2"}
_GPU_MODELS = ("A100", "H100", "H200", "B200")


@dataclasses.dataclass(frozen=True)
class Chip:
    """What this machine computes on, known without starting JAX. `name` is "" where no accelerator is seen or allowed."""

    name: str
    how: str

    @property
    def variable(self) -> str:
        """The environment variable that its compiler reads flags from."""
        if not self.name:
            return ""
        return "LIBTPU_INIT_ARGS" if re.match(r"v\d|tpu", self.name) else "XLA_FLAGS"


@dataclasses.dataclass(frozen=True)
class Applied:
    """The flags of this process.

    Attributes:
        chip: what they are for.
        active: flags that the environment holds as the table has them, put there by us or before.
        users: flags the user has set otherwise, with his value; they stay.
        absent: flags of the table that are not in force.
        why: why they are not.
    """

    chip: Chip
    active: tuple[Flag, ...] = ()
    users: tuple[tuple[Flag, str], ...] = ()
    absent: tuple[Flag, ...] = ()
    why: str = ""


def detect(environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Chip:
    """The accelerator that JAX will choose here: the first of JAX_PLATFORMS, else TPUs, else NVIDIA GPUs.

    `root` holds the kernel's sys/ and proc/ folders.
    """
    asked = environment.get("JAX_PLATFORMS", "").split(",")[0].strip()
    if asked in ("", "tpu"):
        for vendor in sorted((root / "sys/bus/pci/devices").glob("*/vendor")):
            number = _read(vendor.with_name("device"))
            if _read(vendor) == _GOOGLE and number in _PCI:
                return Chip(_PCI[number], f"PCI device {number}")
        said = environment.get("TPU_ACCELERATOR_TYPE", "")
        known = next((chip for start, chip in _TYPES.items() if said.lower().startswith(start)), "")
        if known:
            return Chip(known, f"TPU_ACCELERATOR_TYPE={said}")
    if asked in ("", "cuda", "gpu"):
        for facts in sorted((root / "proc/driver/nvidia/gpus").glob("*/information")):
            found = re.search(r"^Model:[ \t]*(.*)$", _read(facts), re.MULTILINE)
            model = found[1] if found else ""
            name = next((name.lower() for name in _GPU_MODELS if name in model), "gpu")
            return Chip(name, f"the driver's {model or 'GPU'}")
        if any((root / path).exists() for path in ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")):
            return Chip("gpu", "a device of the NVIDIA driver")   # containers and WSL need not show /proc/driver/nvidia
    return Chip("", f"JAX_PLATFORMS={environment['JAX_PLATFORMS']}" if asked else "no TPU or NVIDIA GPU is seen")


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def given(text: str) -> dict[str, str]:
    """Flags of an environment variable: name -> value; `--flag` alone is true, `--noflag` is false."""
    flags = {}
    for word in text.split():
        name, is_set, value = word.lstrip("-").partition("=")
        if not is_set:
            value = "true"
            if name.startswith("no"):
                name, value = name[2:], "false"
        flags[name] = value.strip("\"'")
    return flags


def apply(mode: str, environment: MutableMapping[str, str] = os.environ, root: Path = Path("/"),
          started: bool | None = None) -> Applied:
    """Put the flags of this machine's chip into `environment`, each unless it is set there already.

    Args:
        mode: config.train.compiler_flags: "auto", or "none" to change nothing.
        environment: read and, with "auto", written.
        root: as for `detect`.
        started: whether JAX's backend runs already and has read the variable; None: look.

    Calling it twice changes nothing more.
    """
    chip = detect(environment, root)
    wanted = flags_for(chip.name)
    if not wanted:
        return Applied(chip)
    text = environment.get(chip.variable, "")
    if text and not text.lstrip().startswith("-"):   # XLA reads such a value as the name of a file of flags
        return Applied(chip, absent=wanted, why=f"{chip.variable}={text} names a file, which is left as it is")
    present = given(text)
    missing = tuple(flag for flag in wanted if flag.name not in present)
    why = ""
    if mode != "auto":
        why = f"config.train.compiler_flags={mode}"
    elif backend_started() if started is None else started:
        why = f"JAX had started before this run: set {chip.variable} before JAX is imported"
    elif missing:
        environment[chip.variable] = " ".join([text.strip(), *(flag.text for flag in missing)]).strip()
        present = given(environment[chip.variable])
        missing = ()
    kept = [flag for flag in wanted if flag.name in present]
    return Applied(chip, active=tuple(flag for flag in kept if present[flag.name] == flag.value),
                   users=tuple((flag, present[flag.name]) for flag in kept if present[flag.name] != flag.value),
                   absent=missing, why=why if missing else "")


def inspect(mode: str, environment: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Applied:
    """What `apply` has left, for reports once JAX has started; changes nothing."""
    return apply(mode, dict(environment), root, started=True)


def backend_started() -> bool:
    """Whether JAX has started a backend in this process, after which flags are no longer read."""
    # JAX has no public question for it; without an answer the flags are set, which at worst changes nothing.
    bridge = sys.modules.get("jax._src.xla_bridge")
    return bool(getattr(bridge, "_backends", None))


def report(applied: Applied) -> list[str]:
    """What was done, every flag of the table on a line; one line where there is nothing to set."""
    chip = applied.chip
    if not chip.name:
        return [f"none ({chip.how})"]
    if not flags_for(chip.name):
        return [f"none are known to help on {chip.name} ({chip.how})"]
    lines = [f"for {chip.name} ({chip.how}), in {chip.variable}; --config.train.compiler_flags=none leaves them out"]
    lines += [flag.text for flag in applied.active]
    lines += [f"--{flag.name}={value} as you set it (the table has {flag.value})" for flag, value in applied.users]
    if applied.absent:
        lines += [f"NOT in force, because {applied.why}:", *(flag.text for flag in applied.absent)]
    return lines
