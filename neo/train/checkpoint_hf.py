"""A Hugging Face model folder with the face of a `Checkpoint`, so that every command can take either."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any, ClassVar

from etils import epath

from neo.config import Config
from neo.errors import InputError
from neo.models.hf.hub import PICKLED, cure_for_pickles
from neo.models.weights import Weights


@dataclasses.dataclass(frozen=True)
class HFCheckpoint:
    """A folder with config.json, *.safetensors and a tokenizer, as transformers saves it."""

    path: epath.Path
    step: int = 0
    tokens: int = 0
    kind: ClassVar[str] = "hf"

    @property
    def title(self) -> str:
        """What it is, for the log."""
        names = _read_config(self.path).get("architectures") or ["of an unnamed class"]
        return f"Hugging Face model, {names[0]}"

    def config(self) -> Config:
        """A config with the model that config.json describes, the folder's name and no phases.

        Raises InputError: a class or a setting that neo does not have.
        """
        from neo.models.hf.config import read_config
        name = re.sub(r"[^\w.-]", "_", epath.Path(self.path).name).lstrip("_.-") or "model"
        return Config(name=name, model=read_config(_read_config(self.path), str(self.path)))

    def data(self) -> dict[str, Any]:
        """As in a checkpoint before its first step."""
        return {"step": 0, "tokens": 0, "phase": "", "synthetic": False, "order": {}}

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files by name, as `load_tokenizer` takes them; empty when the folder has none."""
        from neo.data.tokenizer_hf import from_hf_folder
        has_one = any((self.path / name).exists() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))
        return from_hf_folder(str(self.path)).files() if has_one else {}

    def weights(self) -> Weights:
        """The parameters, read when asked for. InputError when files or tensors are missing or damaged."""
        from neo.models.hf.weights import HFWeights
        return HFWeights(str(self.path))


def is_hf_folder(path: epath.Path) -> bool:
    """Whether there is a config.json with safetensors beside it, or one of a Hugging Face model (a workdir has one too)."""
    if not (path / "config.json").exists():
        return False
    if any(True for _ in path.glob("*.safetensors")):
        return True
    try:
        tree = json.loads((path / "config.json").read_text())
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and ("model_type" in tree or "architectures" in tree)


def open_hf(path: epath.Path) -> HFCheckpoint:
    """The model in a Hugging Face folder. InputError when its weights are pickled, or not there."""
    names = [file.name for file in path.iterdir()]
    if not any(name.endswith(".safetensors") for name in names):
        pickled = [name for name in names if name.endswith(PICKLED)]
        if pickled:
            raise InputError(f"{path} has pickled weights only ({sorted(pickled)[0]}), which can run code when they are read; "
                             f"{cure_for_pickles()}")
        raise InputError(f"{path} has the config.json of a Hugging Face model and no *.safetensors: its weights are missing")
    return HFCheckpoint(path)


def _read_config(path: epath.Path) -> dict[str, Any]:
    try:
        tree = json.loads((path / "config.json").read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path / 'config.json'} cannot be read: {error}") from None
    if not isinstance(tree, dict):
        raise InputError(f"{path / 'config.json'} is not a JSON object")
    return tree
