"""The parameters of a Hugging Face folder under neo's names, a layer at a time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from neo.config.schema import ModelConfig
from neo.errors import InputError, nearest
from neo.models.hf.classes import HFClass
from neo.models.hf.config import class_of, read_config
from neo.models.hf.files import SafetensorsFolder
from neo.models.hf.names import copies, is_buffer, leaf_shapes, piece_from_hf, pieces, tensors

CONFIG_FILE = "config.json"
_READABLE = tuple(np.dtype(kind) for kind in (np.float32, ml_dtypes.bfloat16, np.float16, np.float64))
_ROWS = 8192   # compared at a time


class HFWeights:
    """Weights (neo.models.weights) of a folder with config.json and safetensors.

    Opening it reads headers only and checks them whole, so that what opens can be read.

    Args:
        folder: a Hugging Face model folder.

    Raises InputError, naming the tensor: unknown class or config key, a tensor that is missing, unexpected, of another shape
    (both shapes) or of a type that is no floating-point number; the layers of one parameter stored in different types; a
    second copy of tied embeddings that differs. Constants of old files (rotary inv_freq) are ignored.
    """

    def __init__(self, folder: str | Path):
        folder = Path(folder)
        self.hf_config: Mapping[str, Any] = read_config_file(folder)
        self.config: ModelConfig = read_config(self.hf_config, str(folder / CONFIG_FILE))
        self.hf_class: HFClass = class_of(self.hf_config, str(folder / CONFIG_FILE))
        self.files = SafetensorsFolder(folder)
        self._shapes = leaf_shapes(self.config)
        self._pieces = pieces(self.config, self.hf_class)
        self._check_names()
        self._check_shapes()
        self._check_copies()

    def dtype(self, path: str) -> np.dtype:
        """The type the parameter has in the file."""
        rule = self._piece(path).rule
        return self.files[rule.tensor(0 if rule.layered else None)].dtype

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One parameter, or one layer's slice of it, in the file's type and neo's layout (matrices as transposed views)."""
        piece = self._piece(path)
        if piece.rule.layered and layer is None:
            stack = np.empty((self.config.num_layers, *self._shapes[path]), self.dtype(path))
            for index in range(len(stack)):
                stack[index] = self.read(path, index)
            return stack
        rows = (0, None) if piece.whole else (piece.start, piece.stop)
        return piece_from_hf(path, self.config, self.files.read(piece.rule.tensor(layer), *rows))

    def _piece(self, path: str) -> Any:
        if path not in self._pieces:
            raise InputError(f"{self.files.folder} has no parameter {path}{nearest(path, self._pieces)}")
        return self._pieces[path]

    def _check_names(self) -> None:
        known = {tensor.name for tensor in tensors(self.config, self.hf_class)}
        optional = {tensor.name for tensor in tensors(self.config, self.hf_class) if not tensor.rule.paths}
        found = {name for name in self.files.tensors if not is_buffer(name)} - set(copies(self.config, self.hf_class))
        if missing := sorted(known - optional - found):
            raise InputError(f"{self.files.folder} lacks {_listing(missing)}, which {CONFIG_FILE} asks for "
                             f"({self.hf_class.architecture})")
        if unexpected := sorted(found - known):
            raise InputError(f"{self.files.folder} holds {_listing(unexpected)}, which a {self.hf_class.architecture} of its "
                             f"{CONFIG_FILE} has no place for")

    def _check_shapes(self) -> None:
        first_of: dict[str, str] = {}
        for tensor in tensors(self.config, self.hf_class):
            if tensor.name not in self.files:
                continue   # a bias of zeros that the file need not hold
            found = self.files[tensor.name]
            if found.shape != tensor.shape:
                raise InputError(f"{found.file}: tensor {tensor.name} has shape {list(found.shape)}, {CONFIG_FILE} needs "
                                 f"{list(tensor.shape)}")
            if found.dtype not in _READABLE:
                raise InputError(f"{found.file}: tensor {tensor.name} has type {found.dtype}; weights are read as "
                                 f"{', '.join(str(dtype) for dtype in _READABLE)}, quantised models are not")
            first = first_of.setdefault(tensor.rule.name, tensor.name)
            if self.files[first].dtype != found.dtype:
                raise InputError(f"{found.file}: tensor {tensor.name} has type {found.dtype}, {first} has "
                                 f"{self.files[first].dtype}; the layers of one parameter need one type")
            if not tensor.rule.paths and np.any(self.files.read(tensor.name)):
                raise InputError(f"{found.file}: tensor {tensor.name} is not zero, and the model of {CONFIG_FILE} has no "
                                 "parameter for it")

    def _check_copies(self) -> None:
        for name, original in copies(self.config, self.hf_class).items():
            if name not in self.files:
                continue
            one, other = self.files[name], self.files[original]
            same = (one.shape, one.dtype) == (other.shape, other.dtype)
            if not same or any(self._bits(name, i) != self._bits(original, i) for i in range(0, one.shape[0], _ROWS)):
                raise InputError(f"{one.file}: tensor {name} differs from {original}, but {CONFIG_FILE} says "
                                 "tie_word_embeddings: true; set it to false to read both")

    def _bits(self, name: str, row: int) -> bytes:
        return self.files.read(name, row, row + _ROWS).tobytes()


def read_config_file(folder: Path) -> Mapping[str, Any]:
    """config.json of a folder, with an InputError when there is none or it is no JSON object."""
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; a Hugging Face model is a folder with {CONFIG_FILE} and safetensors")
    path = folder / CONFIG_FILE
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{folder} has no {CONFIG_FILE}; it is not a Hugging Face model") from None
    except (ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}") from None
    if not isinstance(found, dict):
        raise InputError(f"{path} is not a JSON object")
    return found


def _listing(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - 3} more tensors" if len(names) > 3 else ""
    return f"the tensor{'s' if len(names) > 1 else ''} {', '.join(names[:3])}{more}"
