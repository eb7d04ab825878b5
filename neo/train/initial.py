"""The parameters a run starts from when it does not draw them: another model's, made to fit, straight onto the mesh.

The source is a `Weights`, read one block at a time; wrappers around it add blocks (initial_blocks.py) and rows
(initial_vocabulary.py). Each process keeps what its own devices hold, one parameter at a time.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jax
import numpy as np

from neo.config import Config
from neo.config.schema import InitConfig, ModelConfig
from neo.errors import InputError
from neo.models.decoder import Decoder, Params
from neo.models.hf.arrays import ahead, contiguous
from neo.models.hf.hub import local_folder
from neo.models.weights import LAYERS, Weights
from neo.train.checkpoint_format import Checkpoint, resolve
from neo.train.checkpoint_hf import HFCheckpoint
from neo.train.checkpoints import restore
from neo.train.initial_blocks import DeepenedWeights, added, block_map
from neo.train.initial_shape import differences, require_same_model
from neo.train.initial_vocabulary import ExtendedVocabulary, padded, require_same_ids, rows_of
from neo.train.progress import Log

Box = tuple[tuple[int, int], ...]   # of an array: (start, stop) along each axis


def given(init: InitConfig) -> bool:
    """Whether the options name a model to start from."""
    return bool(init.checkpoint or init.from_hf)


def find(init: InitConfig) -> Checkpoint | HFCheckpoint:
    """What init.from_hf or init.checkpoint names; a repository of the hub is downloaded first."""
    if not init.from_hf:
        return resolve(init.checkpoint)
    found = resolve(str(local_folder(init.from_hf)))
    if found.kind != "hf":
        raise InputError(f"config.init.from_hf={init.from_hf} is a checkpoint of neo: "
                         f"use --config.init.checkpoint={init.from_hf}")
    return found


def parameters(config: Config, decoder: Decoder, tokenizer: Any, log: Log) -> tuple[Params, dict[str, Any]]:
    """(float32 parameters on the decoder's mesh, facts for the run's events) from what the init options name.

    Args:
        tokenizer: of the data; None for synthetic data.

    Raises InputError, before anything is placed on a device: the model or the tokenizer is another one.
    """
    begun = time.monotonic()
    init, found, abstract = config.init, find(config.init), decoder.abstract_params()
    log(f"starting from {found.path} ({found.title})")
    old_model = found.config().model
    changed = init.depth != "none" or init.extend_vocab or config.model.vocab_size > old_model.vocab_size
    old = _tokenizer_of(found, tokenizer, init, log)
    facts: dict[str, Any] = {"from": str(found.path), "kind": found.kind}
    if found.kind == "neo" and not changed:
        # Orbax reads each device's part by itself, and names the first shape that differs.
        for name, (theirs, mine) in differences(old_model, config.model).items():
            log(f"config.model.{name}: {theirs} there, {mine} here")
        if old is not None:
            require_same_ids(old, tokenizer, str(found.path))
        with log.stage("reading its parameters"):
            params = restore(found, {"params": abstract})["params"]
        size = sum(_local(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
    else:
        weights, remarks = fitted(found.weights(), config.model, init, old, tokenizer, str(found.path))
        for remark in remarks:
            log(remark)
        with log.stage("reading its parameters"):
            params = place(weights, abstract)
        size = sum(_local(leaf) * weights.dtype(path).itemsize for path, leaf in _flat(params).items())
        facts["changes"] = remarks
    seconds = time.monotonic() - begun
    log(f"{size / 1e9:.2f} GB read from {found.path} in {seconds:.1f} s")
    return params, {**facts, "bytes": size, "seconds": round(seconds, 1)}


def fitted(source: Weights, model: ModelConfig, init: InitConfig, old: Any, new: Any, where: str) -> tuple[Weights, list[str]]:
    """(the source as weights of `model`, remarks for the log).

    Args:
        old, new: tokenizers of the source and of the data; None where there is none to compare.
        where: the source's name in messages.

    Raises InputError: the model differs beyond what the options change, tokenizers that differ without extend_vocab.
    """
    remarks = require_same_model(source.config, model, init, where)
    blocks = block_map(source.config.num_layers, model.num_layers, init.depth)
    rows, weights = dataclasses.replace(source.config, vocab_size=model.vocab_size), source
    if init.extend_vocab:
        if old is None or new is None:
            whose = f"{where} has" if old is None else "synthetic data has"
            raise InputError(f"config.init.extend_vocab=True needs two tokenizers, and {whose} none")
        if old.vocab_size > source.config.vocab_size:
            raise InputError(f"{where} has a tokenizer of {old.vocab_size} ids and a table of {source.config.vocab_size} rows: "
                             "it is another model's")
        found = rows_of(old, new)
        weights = ExtendedVocabulary(source, rows, found, old.vocab_size)
        remarks.append(f"vocabulary: {new.vocab_size} ids instead of {old.vocab_size}; {_told(found)}")
    else:
        if old is not None and new is not None:
            require_same_ids(old, new, where)
        weights = padded(source, rows)
        if model.vocab_size > source.config.vocab_size:
            remarks.append(f"{model.vocab_size - source.config.vocab_size} rows of padding start at the mean of the "
                           f"{source.config.vocab_size} rows")
    if len(blocks) > source.config.num_layers:
        new_at = [i for i, is_new in enumerate(added(blocks)) if is_new]
        remarks.append(f"{len(new_at)} added blocks ({init.new_blocks}) at {_spans(new_at)}, copies of "
                       f"{_spans([blocks[i] for i in new_at])}")
        weights = DeepenedWeights(weights, model, blocks, init.new_blocks == "identity")
    return weights, remarks


def load_parameters(found: Checkpoint | HFCheckpoint, abstract: Params) -> Params:
    """The parameters of any checkpoint in the shapes, dtypes and shardings of `abstract`."""
    return restore(found, {"params": abstract})["params"] if found.kind == "neo" else place(found.weights(), abstract)


def place(weights: Weights, abstract: Params) -> Params:
    """Parameters on their devices, cast to the dtypes of `abstract` (jax.ShapeDtypeStruct with shardings).

    Each process keeps what its own devices hold, and in host memory one parameter of it at a time. InputError naming
    the parameter when a shape differs.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, spec: _placed(weights, "/".join(key.key for key in path), spec), abstract)


def _placed(weights: Weights, path: str, spec: jax.ShapeDtypeStruct) -> jax.Array:
    boxes = {_box(index, spec.shape) for index in spec.sharding.addressable_devices_indices_map(spec.shape).values()}
    shards = {box: np.empty([stop - start for start, stop in box], spec.dtype) for box in boxes}
    if path.startswith(LAYERS):
        wanted = sorted({layer for box in boxes for layer in range(*box[0])})
        for layer, part in ahead(lambda layer: weights.read(path, layer), wanted):
            _check(part, path, spec.shape[1:])
            for box in boxes:
                if box[0][0] <= layer < box[0][1]:
                    shards[box][layer - box[0][0]] = contiguous(part[_slices(box[1:])])
    else:
        whole = weights.read(path)
        _check(whole, path, spec.shape)
        for box, shard in shards.items():
            shard[...] = contiguous(whole[_slices(box)])
    return jax.make_array_from_callback(spec.shape, spec.sharding, lambda index: shards[_box(index, spec.shape)])


def _check(part: np.ndarray, path: str, shape: tuple[int, ...]) -> None:
    if part.shape != tuple(shape):
        raise InputError(f"{path} has shape {part.shape}, the model of this config needs {tuple(shape)}")


def _box(index: tuple[slice, ...], shape: tuple[int, ...]) -> Box:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _slices(box: Box) -> tuple[slice, ...]:
    return tuple(slice(start, stop) for start, stop in box)


def _tokenizer_of(found: Checkpoint | HFCheckpoint, tokenizer: Any, init: InitConfig, log: Log) -> Any:
    """The source's tokenizer where there is one to compare with."""
    if tokenizer is None:
        return None
    from neo.data.tokenizer import load_tokenizer
    files = found.tokenizer_files()
    if files:
        old = load_tokenizer(files, str(found.path))
        if old.add_bos != tokenizer.add_bos:
            log(f"{found.path} {'knows' if old.add_bos else 'does not know'} texts that begin with a token (BOS), the data "
                f"{'has one' if tokenizer.add_bos else 'has none'}; prepare it with that model's tokenizer to have the same")
        return old
    log(f"{found.path} has no tokenizer: whether its ids are those of the data is not known")
    return None


def _local(leaf: jax.Array) -> int:
    """Values of an array that this process read: one copy of each part on its devices."""
    parts = {_box(shard.index, leaf.shape): shard.data.size for shard in leaf.addressable_shards}
    return sum(parts.values())


def _flat(params: Params) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def _told(rows: tuple[tuple[int, ...], ...]) -> str:
    kept = sum(len(row) == 1 for row in rows)
    means = sum(len(row) > 1 for row in rows)
    return f"{kept} start at one old row, {means} at the mean of several, {len(rows) - kept - means} at the mean of all"


def _spans(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) if len(numbers) <= 12 else f"{numbers[0]} to {numbers[-1]}"
