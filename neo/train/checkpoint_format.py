"""A checkpoint on disk: its folders, its version, and how any command finds and reads one.

    <step>/params/      Orbax (zarr3 in OCDBT), one array per parameter, one layer a chunk; float32
    <step>/opt/         the same for the optimizer state; absent in weights-only saves
    <step>/data/data.json        where the data order and the step count stand (readable)
    <step>/config/config.json    the resolved config
    <step>/tokenizer/            the tokenizer's files, so that the folder stands alone

Orbax writes the folder under another name and renames it when all is there, so a folder that has its
number for a name is complete.
"""

from __future__ import annotations

import dataclasses
import decimal
import json
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from etils import epath

from neo.config import Config, from_dict
from neo.errors import InputError
from neo.train.checkpoint_hf import HFCheckpoint, is_hf_folder, open_hf

if TYPE_CHECKING:
    from neo.models.weights import Weights

CHECKPOINT_VERSION = 1
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def absolute(path: str | epath.Path) -> epath.Path:
    """Orbax takes absolute paths only; addresses such as gs:// already are."""
    path = epath.Path(path)
    return path if "://" in str(path) else epath.Path(os.path.abspath(path))


class JsonFiles:
    """Named files as an Orbax checkpointable; process 0 writes them. Readable without Orbax, big integers exact."""

    def __init__(self, files: Mapping[str, bytes], primary: bool = True):
        self.files = dict(files)
        self.primary = primary

    @classmethod
    def of(cls, name: str, tree: Any, primary: bool = True) -> JsonFiles:
        """One JSON file."""
        return cls({name: (json.dumps(tree, indent=2) + "\n").encode()}, primary)

    async def save(self, directory: Any) -> Any:
        """Orbax protocol: prepare now, write in the background once the folder exists."""
        async def write() -> None:
            folder = await directory.await_creation()
            for name, data in self.files.items() if self.primary else ():
                (folder / name).write_bytes(data)
        return write()

    async def load(self, directory: Any) -> Any:
        """Orbax protocol: read all files back."""
        async def read() -> None:
            self.files = {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}
        return read()


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """One complete checkpoint folder."""

    path: epath.Path
    step: int
    tokens: int
    kind: ClassVar[str] = "neo"

    @property
    def title(self) -> str:
        """What it is, for the log."""
        return f"step {self.step}, {self.tokens:,} tokens"

    def config(self) -> Config:
        """The resolved config of the run that wrote it."""
        return from_dict(_read_json(self.path / "config" / "config.json"))

    def data(self) -> dict[str, Any]:
        """data.json: version, step, tokens, phase, synthetic, and the state of the data order."""
        return _read_json(self.path / "data" / "data.json")

    def tokenizer_files(self) -> dict[str, bytes]:
        """The tokenizer's files by name; empty for a run on synthetic data."""
        folder = self.path / "tokenizer"
        if not folder.exists():
            return {}
        return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p.name != "commit_success.txt"}

    def weights(self) -> Weights:
        """The parameters, read one block at a time when asked for."""
        from neo.train.weights import CheckpointWeights
        return CheckpointWeights(self)


def open_checkpoint(path: str | epath.Path) -> Checkpoint:
    """The checkpoint in a folder. InputError when it is none, unreadable, or of a later version."""
    path = epath.Path(path)
    if not (path / "params").exists() or not (path / "data" / "data.json").exists():
        raise InputError(f"{path} is not a checkpoint: it has no params/ and data/data.json")
    data = _read_json(path / "data" / "data.json")
    version = data.get("version") if isinstance(data, dict) else None
    if version != CHECKPOINT_VERSION:
        raise InputError(f"checkpoint {path} has version {version} in data/data.json, "
                         f"this neo reads version {CHECKPOINT_VERSION}")
    if not all(type(data.get(name)) is int for name in ("step", "tokens")):
        raise InputError(f"checkpoint {path} cannot be read: data/data.json lacks step and tokens as whole numbers")
    return Checkpoint(path, data["step"], data["tokens"])


def checkpoints_in(workdir: str | epath.Path) -> list[Checkpoint]:
    """Complete checkpoints of a workdir, oldest first."""
    folder = epath.Path(workdir) / "checkpoints"
    if not folder.exists():
        return []
    steps = sorted((int(path.name), path) for path in folder.iterdir() if path.name.isdigit())
    return [open_checkpoint(path) for _, path in steps]


def resolve(text: str) -> Checkpoint | HFCheckpoint:
    """What every command means by CHECKPOINT.

    A workdir (its newest checkpoint), `workdir@STEP`, `workdir@16.78B` (nearest at or below that many
    tokens), a checkpoint folder, or a Hugging Face folder. InputError names what is there instead.
    """
    base, at, wanted = text.rpartition("@")
    if not at or "/" in wanted or epath.Path(text).exists():   # an @ of the folder's own name
        base, at, wanted = text, "", ""
    path = epath.Path(base)
    if not path.exists():
        raise InputError(f"{base} does not exist; give a workdir (runs/neo_demo), workdir@STEP, a checkpoint folder "
                         "or a Hugging Face folder")
    if not at and (path / "params").exists():
        return open_checkpoint(path)
    if is_hf_folder(path):
        if at:
            raise InputError(f"{text}: {base} is a Hugging Face folder, which has no steps; give it without @{wanted}")
        return open_hf(path)
    found = checkpoints_in(path)
    if not found:
        raise InputError(f"{base} has no checkpoint: no numbered folder under {path / 'checkpoints'}")
    return _at(found, wanted, base) if at else found[-1]


def _at(found: list[Checkpoint], wanted: str, base: str) -> Checkpoint:
    if wanted.isdigit():
        for one in found:
            if one.step == int(wanted):
                return one
        raise InputError(f"{base} has no checkpoint at step {wanted}; it has {_listing(found)}")
    unit = wanted[-1:].upper()
    try:
        tokens = int(decimal.Decimal(wanted[:-1]) * _UNITS[unit])
    except (KeyError, ValueError, ArithmeticError):   # no unit, NaN, no number or infinity
        raise InputError(f"@{wanted}: a step (@5000) or tokens with a unit (@16.78B) is needed") from None
    below = [one for one in found if one.tokens <= tokens]
    if not below:
        raise InputError(f"{base} has no checkpoint at or below {wanted} tokens; it has {_listing(found)}")
    return below[-1]


def _listing(found: list[Checkpoint]) -> str:
    return ", ".join(f"step {one.step} ({one.tokens:,} tokens)" for one in found)


def _read_json(path: epath.Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        where, name = path.parent.parent, f"{path.parent.name}/{path.name}"
        raise InputError(f"checkpoint {where} is incomplete: {name} is missing") from None
    except (ValueError, OSError) as error:
        raise InputError(f"checkpoint file {path} cannot be read: {error}") from None
