"""What every test process starts from. Tests of one part of neo have their own conftest beside them.

Tests that need an optional package say `pytest.importorskip("transformers")`; packages of the base install and of
[test] are never skipped.
"""

from __future__ import annotations

import dataclasses
import glob
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# Before anything imports jax: without an accelerator, looking for one only costs time and warnings.
if not (glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*") or shutil.which("nvidia-smi")):
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    # Most of the tests' time is LLVM optimizing programs that then run for milliseconds: a third less without (measured).
    if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

# A shell starts what runs in its background with Ctrl-C ignored, and processes hand that on: tests that press it would fail.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples on every machine, and no failures because a machine is slow.
hypothesis.settings.register_profile("neo", deadline=None, derandomize=True)
hypothesis.settings.load_profile("neo")

ROOT = Path(__file__).resolve().parents[1]
OWN_PROCESS = ("multi_device",)  # they set XLA_FLAGS for the whole process: collected only when named


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave `tests/multi_device` out of `pytest tests`: it needs a process of its own."""
    if collection_path.name in OWN_PROCESS and not any(collection_path.name in str(arg) for arg in config.args):
        return True
    return None


@pytest.fixture(scope="session")
def compile_cache(request: pytest.FixtureRequest) -> Path:
    """Where tests that train keep compiled programs, over sessions: compiling is most of what they cost."""
    return Path(request.config.cache.mkdir("compiled"))


@pytest.fixture(scope="session")
def environment(compile_cache: Path) -> dict[str, str]:
    """For processes of neo that a test starts in any folder: this clone, one CPU device, the shared compile cache."""
    # tests/multi_device asks for eight devices, for this process.
    flags = re.sub(r"--xla_force_host_platform_device_count=\d+", "", os.environ.get("XLA_FLAGS", "")).strip()
    return {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(compile_cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}


@pytest.fixture(scope="session")
def tiny(root: Path) -> Path:
    """A recipe with two phases, two sources and a model of some thousand parameters."""
    return root / "tests" / "recipes" / "tiny.py"


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A token store with sources a and b, real text and a tokenizer of its own."""
    import numpy as np

    from neo.data.store_writer import write_source
    from neo.data.tokenizer_training import train
    folder = tmp_path_factory.mktemp("store")
    words = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "it", "rains", "in", "spain")
    draw = np.random.default_rng(0)

    def text() -> str:
        return " ".join(draw.choice(words, draw.integers(20, 90))) + "\n"

    texts = [text() for _ in range(600)]
    tokenizer = train(texts, 300)
    tokenizer.save(str(folder / "tokenizer"))
    for name, some in (("a", texts[:400]), ("b", texts[400:])):
        documents = [(f"{name}{i}", tokenizer.encode(one)) for i, one in enumerate(some)]
        write_source(str(folder / name), name, {"train": documents[20:], "validation": documents[:20]},
                     vocab_size=tokenizer.vocab_size, eod_id=tokenizer.eod_id, tokenizer_sha256=tokenizer.sha256)
    return folder


@dataclasses.dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str
    prog: str

    @property
    def error(self) -> str:
        """The last line of stderr, which must be the only one that says error, without a traceback."""
        lines = self.err.strip().splitlines()
        assert "Traceback" not in self.err, self.err
        assert sum("error:" in line for line in lines) == 1 and lines[-1].startswith(f"{self.prog}: error: "), self.err
        return lines[-1]


@pytest.fixture
def invoked(capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """invoked(COMMAND, run, [argument, ...]) -> Ended: a command of neo in this process."""
    from neo.cli import invoke

    def start(command: Any, run: Any, argv: list[Any]) -> Ended:
        capfd.readouterr()
        code = invoke(command, run, [str(word) for word in argv])
        return Ended(code, *capfd.readouterr(), command.prog)
    return start


@pytest.fixture(scope="session")
def root() -> Path:
    """The clone's folder."""
    return ROOT


@pytest.fixture(scope="session")
def save_hf_model():
    """save_hf_model(folder, "Mistral", tokenizer=None, **config) -> a tiny random model of transformers, saved there.

    With a tokenizer of neo its files stand beside the weights. Weights are large enough that each shows in the logits.
    """
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

    def save(folder: Path, kind: str, tokenizer=None, add_bos: bool = False, dtype: str = "float32", **changes):
        shape = dict(vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
                     num_key_value_heads=2, max_position_embeddings=200, rms_norm_eps=1e-5, tie_word_embeddings=False,
                     initializer_range=0.2, attn_implementation="eager")
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**{**shape, **changes}))
        model = model.to(getattr(torch, dtype)).eval()
        model.save_pretrained(folder)
        if tokenizer is not None:
            from neo.data.tokenizer_export import hf_files
            for name, content in hf_files(tokenizer, vocab_rows=model.config.vocab_size, max_seq_len=200,
                                          add_bos=add_bos).items():
                (Path(folder) / name).write_bytes(content)
        return model
    return save
