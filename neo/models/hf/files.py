"""Safetensors folders without torch: checked before anything is allocated, read and written a tensor at a time.

The format (https://huggingface.co/docs/safetensors): 8 bytes with the header's length, little-endian; the header, JSON
{"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {text: text}}; the tensors, C order, without
gaps. The safetensors package maps whole files into memory and writes a file from memory only; here a file is read with
pread and written in place, so that what a conversion holds is one tensor.

A folder has one `model.safetensors`, or `model-00001-of-000NN.safetensors` ... and `model.safetensors.index.json`:
{"metadata": {"total_size": bytes, "total_parameters": n}, "weight_map": {tensor: file}}.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from neo.errors import InputError, nearest
from neo.models.hf.arrays import THREADS, in_order
from neo.models.hf.hub import PICKLED, cure_for_pickles

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000   # the hub's own default: 5 GB, decimal
LARGEST_HEADER = 100_000_000   # the safetensors package refuses beyond
DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16), "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
          "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
          "I16": np.dtype(np.int16), "I8": np.dtype(np.int8), "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_)}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_BLOCK_BYTES = 8 << 20   # written at a time, so that a transposed tensor is never copied whole; larger ones cost page faults


@dataclasses.dataclass(frozen=True)
class Tensor:
    """Where one tensor lies: its file, type, shape, and the bytes [begin, end) of the file."""

    file: Path
    dtype: np.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


class SafetensorsFolder:
    """The tensors of a Hugging Face folder by name. Nothing is read before it is asked for.

    Args:
        folder: holds model.safetensors, or model.safetensors.index.json and its shards.

    Raises InputError, one line that names file and tensor: no safetensors (with the way to get them where there are
    pickled weights), a missing shard, a tensor that the index names and its shard has not or the other way round, a
    truncated or oversized file, a header that is none.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.tensors: Mapping[str, Tensor] = _tensors(self.folder)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.end - tensor.begin for tensor in self.tensors.values())

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise InputError(f"{self.folder} has no tensor {name}{nearest(name, self.tensors)}")
        return self.tensors[name]

    def read(self, name: str, begin: int = 0, end: int | None = None) -> np.ndarray:
        """One tensor, or its rows [begin, end) along the first axis, in the file's type."""
        tensor = self[name]
        shape = tensor.shape
        if tensor.shape:
            begin, end, _ = slice(begin, end).indices(tensor.shape[0])
            shape = (max(end - begin, 0), *tensor.shape[1:])
        array = np.empty(shape, tensor.dtype)
        row = math.prod(tensor.shape[1:]) * tensor.dtype.itemsize
        _read_into(array, tensor.file, tensor.begin + begin * row)
        return array


class ShardWriter:
    """Writes a safetensors folder one tensor at a time; what is complete of an interrupted run is kept.

    Args:
        folder: made if need be; files get their final names when they are complete.
        tensors: name -> (shape, dtype) of everything that will be written.
        shard_bytes: a new file begins where one would grow larger; a tensor is never split.

    A file counts as complete when its size and header are as planned, so the folder must be of this conversion.
    `pending` names what is left to write, in the order that `write` takes it in; `close` ends the folder:

        writer = ShardWriter(folder, {"x": ((2, 3), np.float32)})
        for name in writer.pending:
            writer.write(name, array_of(name))
        writer.close()
    """

    def __init__(self, folder: str | Path, tensors: Mapping[str, tuple[tuple[int, ...], Any]],
                 shard_bytes: int = SHARD_BYTES):
        if shard_bytes <= 0:
            raise InputError(f"shard size {shard_bytes}: a positive number of bytes is needed")
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        specs = {name: (tuple(shape), np.dtype(dtype)) for name, (shape, dtype) in tensors.items()}
        for name, (_, dtype) in specs.items():
            if dtype not in _CODES:
                raise InputError(f"tensor {name}: safetensors has no type for {dtype}")
        self.plan = plan_shards({name: _num_bytes(*spec) for name, spec in specs.items()}, shard_bytes)
        self._shards = {file: _Shard.plan({name: specs[name] for name in names})
                        for file, names in self.plan.items()}
        self._done = {file for file, shard in self._shards.items() if shard.is_complete(self.folder / file)}
        self.pending = tuple(name for file, shard in self._shards.items() if file not in self._done
                             for name in shard.spans)
        self._next = iter(self.pending)
        self._file_of = {name: file for file, shard in self._shards.items() for name in shard.spans}
        self._handle: int | None = None
        self._open: str | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(shard.num_bytes for shard in self._shards.values())

    @property
    def pending_bytes(self) -> int:
        """Bytes of the tensors in `pending` as it was at the start."""
        return sum(shard.num_bytes for file, shard in self._shards.items() if file not in self._done)

    def write(self, name: str, array: np.ndarray) -> None:
        """Write the next tensor of `pending`; the array may be a transposed view, its shape and type must be as planned."""
        expected = next(self._next, None)
        if name != expected:
            raise ValueError(f"{name} is written out of turn: {expected} is next")
        file = self._file_of[name]
        shard, path = self._shards[file], self.folder / (file + ".partial")
        shape, dtype, begin = shard.spans[name]
        if array.shape != shape or array.dtype != dtype:
            raise ValueError(f"{name}: {array.dtype}{array.shape} was given, {dtype}{shape} was planned")
        if self._open != file:
            self._handle, self._open = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), file
            _write_all(self._handle, shard.header, 0)
        _write_array(self._handle, array, len(shard.header) + begin)
        if name == shard.last:
            os.fsync(self._handle)
            os.close(self._handle)
            self._handle = self._open = None
            os.replace(path, self.folder / file)
            self._done.add(file)

    def close(self) -> list[str]:
        """Write the index and return the names of all files. ValueError when tensors are still to be written."""
        missing = next(self._next, None)
        if missing is not None:
            raise ValueError(f"{missing} was never written")
        if len(self.plan) == 1:
            return list(self.plan)
        spans = [span for shard in self._shards.values() for span in shard.spans.values()]
        index = {"metadata": {"total_parameters": sum(math.prod(shape) for shape, _, _ in spans),
                              "total_size": self.num_bytes},
                 "weight_map": dict(sorted(self._file_of.items()))}
        temporary = self.folder / (INDEX + ".partial")
        temporary.write_text(json.dumps(index, indent=2) + "\n")
        os.replace(temporary, self.folder / INDEX)
        return [*self.plan, INDEX]


def plan_shards(num_bytes: Mapping[str, int], shard_bytes: int = SHARD_BYTES) -> dict[str, tuple[str, ...]]:
    """File name -> tensors, in the order given; a file holds at most `shard_bytes` of tensors, or one larger tensor."""
    shards: list[list[str]] = [[]]
    room = shard_bytes
    for name, size in num_bytes.items():
        if size > room and shards[-1]:
            shards.append([])
            room = shard_bytes
        shards[-1].append(name)
        room -= size
    if len(shards) == 1:
        return {ONE_FILE: tuple(shards[0])}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": tuple(names) for i, names in enumerate(shards, 1)}


@dataclasses.dataclass(frozen=True)
class _Shard:
    """One file to be: its header with the 8 bytes before it, and shape, type and offset of each tensor."""

    header: bytes
    spans: Mapping[str, tuple[tuple[int, ...], np.dtype, int]]
    num_bytes: int

    @classmethod
    def plan(cls, specs: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> _Shard:
        spans, entries, offset = {}, {}, 0
        # The widest type first, as the safetensors package does: every tensor is then aligned to its own type.
        for name, (shape, dtype) in sorted(specs.items(), key=lambda item: -item[1][1].itemsize):
            size = _num_bytes(shape, dtype)
            spans[name] = (shape, dtype, offset)
            entries[name] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return cls(len(text).to_bytes(8, "little") + text, spans, offset)

    @property
    def last(self) -> str:
        return next(reversed(self.spans), "")

    def is_complete(self, path: Path) -> bool:
        try:
            if path.stat().st_size != len(self.header) + self.num_bytes:
                return False
            with open(path, "rb") as file:
                return file.read(len(self.header)) == self.header
        except FileNotFoundError:
            return False


def _num_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize


def _tensors(folder: Path) -> dict[str, Tensor]:
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; a Hugging Face model is a folder with config.json and {ONE_FILE}")
    if (folder / ONE_FILE).exists():
        return read_header(folder / ONE_FILE)
    if not (folder / INDEX).exists():
        raise _no_safetensors(folder)
    weight_map = _weight_map(folder / INDEX)
    files = dict.fromkeys(weight_map.values())
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"{folder / file} is missing; {INDEX} puts {sum(f == file for f in weight_map.values())} "
                             f"tensors there; download the file again")
    found = {file: read_header(folder / file) for file in files}
    for name, file in weight_map.items():
        if name not in found[file]:
            raise InputError(f"{folder / file} has no tensor {name}, which {INDEX} puts there; index and shards are not "
                             f"of one model")
    for file, tensors in found.items():
        for name in tensors:
            if weight_map.get(name) != file:
                raise InputError(f"{folder / file} holds the tensor {name}, which {INDEX} does not put there; index and "
                                 f"shards are not of one model")
    return {name: found[file][name] for name, file in weight_map.items()}


def _weight_map(path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        if not weight_map or not all(isinstance(name, str) for name in weight_map.values()):
            raise ValueError("weight_map must name a file for each tensor")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is not an index of safetensors files: {error!r}; download it again") from None
    for file in weight_map.values():
        if file != os.path.basename(file) or not file.endswith(".safetensors"):
            raise InputError(f"{path} names the file {file!r}; only *.safetensors files of the same folder are read")
    return weight_map


def _no_safetensors(folder: Path) -> InputError:
    names = sorted(path.name for path in folder.iterdir())
    pickled = [name for name in names if name.endswith(PICKLED) and name != "training_args.bin"]
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return InputError(f"{folder} has {others[0]}, but neither {ONE_FILE} nor {INDEX}; download the index too")
    if pickled:
        return InputError(f"{folder} has only pickled weights ({pickled[0]}), which can run code when they are read; "
                          f"{cure_for_pickles()}")
    return InputError(f"{folder} has no weights: neither {ONE_FILE} nor {INDEX} is there")


def read_header(path: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file, by name; InputError when header and file do not fit each other."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > LARGEST_HEADER:
            raise InputError(f"{path}: the header should have {length:,} bytes, the file has {size:,} bytes "
                             f"(at most {LARGEST_HEADER:,} are allowed); it is cut short or no safetensors file")
        text = file.read(length)
    try:
        entries = json.loads(text, object_pairs_hook=_no_doubles)
        if not isinstance(entries, dict):
            raise ValueError("no JSON object")
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: the header is damaged ({error}); download the file again") from None
    entries.pop("__metadata__", None)
    tensors = {name: _entry(path, name, entry, 8 + length) for name, entry in entries.items()}
    offset = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != offset:
            raise InputError(f"{path}: tensor {name} begins at byte {tensor.begin:,}, the one before it ends at {offset:,}; "
                             f"the header is damaged, download the file again")
        offset = tensor.end
    if offset != size:
        raise InputError(f"{path}: its tensors need {offset:,} bytes, the file has {size:,}; it is "
                         f"{'cut short' if size < offset else 'damaged'}, download it again")
    return tensors


def _entry(path: Path, name: str, entry: Any, start: int) -> Tensor:
    try:
        code, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError("sizes are not whole numbers")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{path}: the header's entry of tensor {name} is damaged ({error}); download the file again") from None
    if code not in DTYPES:
        raise InputError(f"{path}: tensor {name} has type {code!r}; neo reads {', '.join(DTYPES)}")
    needed = math.prod(shape) * DTYPES[code].itemsize
    if end - begin != needed:
        raise InputError(f"{path}: tensor {name} of type {code} and shape {tuple(shape)} needs {needed:,} bytes, the header "
                         f"gives it {end - begin:,}; download the file again")
    return Tensor(path, DTYPES[code], tuple(shape), start + begin, start + end)


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    name, count = Counter(name for name, _ in pairs).most_common(1)[0] if pairs else ("", 1)
    if count > 1:
        raise ValueError(f"{name} is there {count} times")
    return dict(pairs)


def _read_into(array: np.ndarray, path: Path, offset: int) -> None:
    into = memoryview(array.reshape(-1).view(np.uint8))
    with open(path, "rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):   # read further ahead: half as fast again from a cold disk, measured
            os.posix_fadvise(file.fileno(), offset, len(into), os.POSIX_FADV_SEQUENTIAL)
        while into:
            count = os.preadv(file.fileno(), [into[:1 << 30]], offset)   # Linux reads at most 2 GB at once
            if not count:
                raise InputError(f"{path} became shorter while it was read; download it again")
            into, offset = into[count:], offset + count


def _write_array(handle: int, array: np.ndarray, offset: int) -> None:
    """Write in C order at `offset`, by blocks of rows: each is put in order and written by one of a few threads."""
    rows = array.reshape(1) if not array.ndim else array
    row_bytes = rows[:1].nbytes
    step = max(1, _BLOCK_BYTES // max(row_bytes, 1))

    def write(begin: int) -> None:
        _write_all(handle, in_order(rows[begin:begin + step]), offset + begin * row_bytes)
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(write, range(0, len(rows), step)))


def _write_all(handle: int, data: bytes | np.ndarray, offset: int) -> None:
    view = memoryview(data if isinstance(data, bytes) else data.reshape(-1).view(np.uint8))
    while view:
        count = os.pwrite(handle, view[:1 << 30], offset)
        view, offset = view[count:], offset + count
