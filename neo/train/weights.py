"""neo's own checkpoints, a layer at a time: parameters read, averaged, and written without ever being whole in memory.

A checkpoint's params/ is an OCDBT database of zarr3 arrays named "layers.attention.query", which Orbax writes through
tensorstore. Reading takes the chunks it needs. Writing lets Orbax save a skeleton of the same tree, so that every file of
the folder but the arrays is its own, and then makes the arrays of plain chunks. They are not compressed: zstd saves a fifth
of random-looking bfloat16, at a third of the speed (measured).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from neo.config import Config, to_dict
from neo.config.schema import ModelConfig
from neo.errors import InputError, StoppedForPerson
from neo.models.hf.arrays import ahead, contiguous
from neo.models.weights import LAYERS, Weights, parameter_shapes
from neo.train.checkpoint_format import CHECKPOINT_VERSION, Checkpoint, JsonFiles, absolute
from neo.train.checkpoints import is_disk_full, quiet_orbax

Progress = Callable[[int, int], None]
Job = tuple[str, int | None]
_WORK = ".unfinished"   # in the folder that is being written
_PLAN, _ARRAYS, _WHOLE = "plan.json", "checkpoint", "whole"


class CheckpointWeights:
    """Weights (neo.models.weights) of a neo checkpoint, whatever type and sharding it was saved with.

    Raises InputError when a parameter of its config is missing, of another shape or damaged.
    """

    def __init__(self, checkpoint: Checkpoint):
        self.checkpoint = checkpoint
        self.config: ModelConfig = checkpoint.config().model
        self._arrays: dict[str, ts.TensorStore] = {}
        shapes = parameter_shapes(self.config)
        folder, context = absolute(checkpoint.path / "params"), ts.Context()
        opening = {path: ts.open(_spec(folder, path), open=True, read=True, context=context) for path in shapes}
        for path, future in opening.items():
            try:
                self._arrays[path] = future.result()
            except Exception as error:
                raise self._damaged(path, error) from None
            if self._arrays[path].shape != shapes[path]:
                raise InputError(f"checkpoint {checkpoint.path}: params/{path} has shape {self._arrays[path].shape}, its "
                                 f"config needs {shapes[path]}")
        there = {key.partition("/")[0].replace(".", "/") for key in _keys(folder)}
        if unexpected := sorted(there - set(shapes)):
            raise InputError(f"checkpoint {checkpoint.path} holds params/{unexpected[0]}, which its config has no place for")

    def dtype(self, path: str) -> np.dtype:
        """The type the parameter is stored in: float32 from training, the source's from an import."""
        return self._array(path).dtype.numpy_dtype

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One parameter, or one layer's slice of it."""
        array = self._array(path)
        try:
            return np.asarray((array if layer is None else array[layer]).read().result())
        except Exception as error:
            raise self._damaged(path, error) from None

    def _array(self, path: str) -> ts.TensorStore:
        if path not in self._arrays:
            raise InputError(f"checkpoint {self.checkpoint.path} has no parameter {path}")
        return self._arrays[path]

    def _damaged(self, path: str, error: Exception) -> InputError:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:160]
        return InputError(f"checkpoint {self.checkpoint.path}: params/{path} cannot be read, a file is damaged or missing "
                          f"({reason})")


class AverageWeights:
    """Weights (neo.models.weights): the mean of several models of one config, computed in float32.

    Args:
        weights: one or more.
        coefficients: how much each counts; they are divided by their sum. None = all the same. One of 0 is not read.

    Raises InputError: configs that differ (naming the fields), as many coefficients as weights are needed; their sum is 0.
    """

    def __init__(self, weights: Sequence[Weights], coefficients: Sequence[float] | None = None):
        coefficients = [1.0] * len(weights) if coefficients is None else list(coefficients)
        if not weights or len(coefficients) != len(weights):
            raise InputError(f"an average of {len(weights)} checkpoints needs as many weights, {len(coefficients)} were given")
        total = math.fsum(coefficients)
        if not (math.isfinite(total) and total):
            raise InputError(f"the weights of an average must be finite and their sum other than 0, not {coefficients}")
        self.config: ModelConfig = weights[0].config
        for i, other in enumerate(weights[1:], 2):
            if difference := _differences(self.config, other.config):
                raise InputError(f"checkpoints 1 and {i} of the average are of different models: {difference}")
        self._terms = [(c / total, one) for c, one in zip(coefficients, weights, strict=True) if c]

    def dtype(self, path: str) -> np.dtype:
        """float32."""
        return np.dtype(np.float32)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """The mean of one parameter, or of one layer's slice of it, as float32."""
        total = None
        for coefficient, one in self._terms:
            term = contiguous(one.read(path, layer), np.float32)
            if coefficient != 1:
                term = term * np.float32(coefficient)
            total = term if total is None else total + term
        return total


def write_checkpoint(weights: Weights, out: str | Path, config: Config, data: Mapping[str, Any],
                     tokenizer_files: Mapping[str, bytes], progress: Progress | None = None) -> Path:
    """Write the checkpoint folder `out` through OUT.partial, which an interrupted call goes on with; see fill_checkpoint.

    Raises InputError when `out` exists.
    """
    out = Path(os.path.abspath(out))
    if out.exists():
        raise InputError(f"{out} exists; give a folder that does not")
    partial = out.with_name(out.name + ".partial")
    fill_checkpoint(weights, partial, config, data, tokenizer_files, progress)
    os.replace(partial, out)
    _sync(out.parent)
    return out


def fill_checkpoint(weights: Weights, folder: str | Path, config: Config, data: Mapping[str, Any],
                    tokenizer_files: Mapping[str, bytes], progress: Progress | None = None) -> None:
    """Write the parameters as a checkpoint (checkpoint_format; no opt/) into a local folder, in their stored types.

    One layer's slice of a parameter is a chunk and is committed by itself: a call for the same shapes, types, config and
    data goes on after the last chunk of the interrupted one, and the folder is a checkpoint only when all is there. That
    the weights are the same ones is for the caller to know.

    Args:
        weights: of the model of `config`.
        folder: made if need be; other files in it stay.
        config: the resolved config that goes along.
        data: data.json, at least step and tokens; "version" is added.
        tokenizer_files: name -> content; empty for none.
        progress: called with (bytes written, bytes in all), first for what was there already.

    Holds two slices and what the disk has not yet taken of a third. Raises StoppedForPerson when the disk is full.
    """
    work = Path(os.path.abspath(folder)) / _WORK
    try:
        _fill(weights, work, config, {"version": CHECKPOINT_VERSION, **data}, tokenizer_files, progress or (lambda *_: None))
        _move(work)
    except Exception as error:
        if is_disk_full(error):
            raise StoppedForPerson(f"the disk of {work.parent} is full; free space and start the same command again, it goes "
                                   "on from here") from None
        raise


def _fill(weights: Weights, work: Path, config: Config, data: Mapping[str, Any], tokenizer_files: Mapping[str, bytes],
          progress: Progress) -> None:
    shapes = parameter_shapes(config.model)
    leaves = {path: (shape, np.dtype(weights.dtype(path))) for path, shape in shapes.items()}
    plan = json.dumps({
        "leaves": {path: [shape, str(dtype)] for path, (shape, dtype) in leaves.items()},
        "config": to_dict(config), "data": data,
        "tokenizer": {name: hashlib.sha256(content).hexdigest() for name, content in tokenizer_files.items()}}, indent=1)
    if not (work / _PLAN).exists() or (work / _PLAN).read_text() != plan:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        (work / _PLAN).write_text(plan)
    if (work / _WHOLE).exists():
        return
    if not (work / _ARRAYS).exists():
        _write_skeleton(work / _ARRAYS, leaves, config, data, tokenizer_files)
    params = absolute(work / _ARRAYS / "params")
    arrays = _make_arrays(params, leaves)
    there = _keys(params)
    jobs = list(_jobs(leaves))
    sizes = {(path, layer): _slice_bytes(*leaves[path], layer) for path, layer in jobs}
    total = sum(sizes.values())
    done = sum(size for job, size in sizes.items() if _chunk(arrays, job) in there)
    progress(done, total)
    writing: tuple[Any, int] | None = None
    for (path, layer), array in ahead(lambda job: contiguous(weights.read(*job)),
                                      [job for job in jobs if _chunk(arrays, job) not in there]):
        if writing:
            writing[0].result()
            progress(done := done + writing[1], total)
        if layer is not None:
            array = array[None]
        into = arrays[path] if layer is None else arrays[path][layer:layer + 1]   # whole chunks are written without a copy
        if array.shape != into.shape or array.dtype != leaves[path][1]:
            raise ValueError(f"{path}: read {array.dtype}{array.shape}, expected {leaves[path][1]}{into.shape}")
        writing = into.write(array, can_reference_source_data_indefinitely=True), sizes[path, layer]
    if writing:
        writing[0].result()
        progress(done + writing[1], total)
    _sync_tree(work / _ARRAYS)
    (work / _WHOLE).touch()


def _move(work: Path) -> None:
    """Put the parts in their places; data/ last, without which a folder is no checkpoint."""
    parts = sorted((work / _ARRAYS).iterdir(), key=lambda path: path.name == "data")
    for part in parts:
        place = work.parent / part.name
        if place.is_dir():
            shutil.rmtree(place)
        os.replace(part, place)
    _sync(work.parent)
    shutil.rmtree(work)


def _write_skeleton(folder: Path, leaves: Mapping[str, tuple[tuple[int, ...], np.dtype]], config: Config,
                    data: Mapping[str, Any], tokenizer_files: Mapping[str, bytes]) -> None:
    """What Orbax writes for this tree, with scalars for arrays; for NumPy arrays its own files do not know their shapes."""
    quiet_orbax()
    tree: dict[str, Any] = {}
    for path, (_, dtype) in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = np.zeros((), dtype)
    items: dict[str, Any] = {"params": tree, "data": JsonFiles.of("data.json", data),
                             "config": JsonFiles.of("config.json", to_dict(config))}
    if tokenizer_files:
        items["tokenizer"] = JsonFiles(tokenizer_files)
    skeleton = folder.with_name("skeleton")
    ocp.save_checkpointables(skeleton, items, overwrite=True)
    for name in ("d", "manifest.ocdbt", "ocdbt.process_0"):   # the scalars
        part = skeleton / "params" / name
        shutil.rmtree(part) if part.is_dir() else part.unlink(missing_ok=True)
    os.replace(skeleton, folder)


def _make_arrays(params: Any, leaves: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> dict[str, ts.TensorStore]:
    # Each commit would wait for the disk; the folder is only renamed after one fsync of everything.
    context = ts.Context({"file_io_sync": False})
    futures = {}
    for path, (shape, dtype) in leaves.items():
        chunk = list(shape)
        if path.startswith(LAYERS):
            chunk[0] = 1
        metadata = {"shape": list(shape), "data_type": str(dtype), "fill_value": 0.0,
                    "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
                    "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": chunk}},
                    "chunk_key_encoding": {"name": "default"}}
        spec = {**_spec(params, path), "metadata": metadata, "store_data_equal_to_fill_value": True}
        futures[path] = ts.open(spec, open=True, create=True, context=context)
    return {path: future.result() for path, future in futures.items()}


def _spec(params: Any, path: str) -> dict[str, Any]:
    return {"driver": "zarr3", "kvstore": {"driver": "ocdbt", "base": _base(params), "path": path.replace("/", ".") + "/"}}


def _base(params: Any) -> str:
    return f"{params}/" if "://" in str(params) else f"file://{params}/"


def _jobs(leaves: Mapping[str, tuple[tuple[int, ...], np.dtype]]) -> Iterator[Job]:
    """What is one chunk each: all outside the blocks, then layer by layer, as the shards of most sources lie."""
    yield from ((path, None) for path in leaves if not path.startswith(LAYERS))
    stacked = {path: shape[0] for path, (shape, _) in leaves.items() if path.startswith(LAYERS)}
    for layer in range(max(stacked.values(), default=0)):
        yield from ((path, layer) for path in stacked)


def _chunk(arrays: Mapping[str, ts.TensorStore], job: Job) -> str:
    """The key of the chunk in the database."""
    path, layer = job
    index = [layer or 0] + [0] * (arrays[path].rank - 1) if arrays[path].rank else []
    return "/".join([path.replace("/", "."), "c", *map(str, index)])


def _keys(params: Any) -> set[str]:
    """All keys of the database: NAME/zarr.json, and NAME/c/0/0 for every chunk."""
    store = ts.KvStore.open({"driver": "ocdbt", "base": _base(params)}).result()
    return {key.decode() for key in store.list().result()}


def _slice_bytes(shape: tuple[int, ...], dtype: np.dtype, layer: int | None) -> int:
    return math.prod(shape if layer is None else shape[1:]) * dtype.itemsize


def _differences(one: ModelConfig, other: ModelConfig) -> str:
    return ", ".join(f"{name} {getattr(one, name)!r} and {getattr(other, name)!r}" for name in vars(one)
                     if getattr(one, name) != getattr(other, name))


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            _sync(os.path.join(place, name))
        _sync(place)


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
