"""`neo.convert to-hf`: a Hugging Face folder from any checkpoint, streamed one tensor at a time.

    OUT/model.safetensors, or model-00001-of-000NN.safetensors ... and model.safetensors.index.json
    OUT/config.json  generation_config.json  tokenizer.json  tokenizer_config.json  ...  README.md  neo_conversion.json
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

import neo
from neo.cli import Namespace
from neo.convert import endings, output
from neo.convert.card import model_card
from neo.convert.source import Source, open_source
from neo.data.progress import Progress, say
from neo.data.tokenizer_export import hf_files
from neo.errors import InputError
from neo.models.hf.arrays import ahead, contiguous
from neo.models.hf.classes import CLASSES, HFClass, choose_class, obstacles
from neo.models.hf.config_write import write_config
from neo.models.hf.files import SafetensorsFolder, ShardWriter
from neo.models.hf.fold import FoldedWeights, RepeatedKV
from neo.models.hf.names import Tensor, tensors, to_hf
from neo.models.weights import Weights

DTYPES = {"bf16": np.dtype(ml_dtypes.bfloat16), "fp16": np.dtype(np.float16), "fp32": np.dtype(np.float32)}
UNITS = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "": 1, "B": 1}


class Overflow(InputError):
    """A value that the type asked for cannot hold."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How the folder is written; all of it decides the bytes."""

    dtype: str = "bf16"
    shard_bytes: int = 5 * 10**9
    model_type: str = "auto"
    repeat_kv: bool = False

    def typed(self) -> str:
        """As flags of the command."""
        flags = [f"--dtype={self.dtype}"]
        flags += [f"--shard_size={self.shard_bytes}"] if self.shard_bytes != Options.shard_bytes else []
        flags += [f"--model_type={self.model_type}"] if self.model_type != "auto" else []
        return " ".join([*flags, *(["--repeat_kv"] if self.repeat_kv else [])])


@dataclasses.dataclass(frozen=True)
class Plan:
    """A conversion that is known to be possible: everything that can be refused has been."""

    source: Source
    options: Options
    cls: HFClass
    weights: Weights            # folded, heads repeated: what the class holds
    dtype: np.dtype | None      # None: each tensor keeps its own
    specs: dict[str, tuple[tuple[int, ...], np.dtype]]
    files: dict[str, bytes]     # all but the weights and the card
    facts: dict[str, Any]

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(shape) for shape, _ in self.specs.values())

    @property
    def num_bytes(self) -> int:
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.specs.values())


def run(args: Namespace) -> None:
    """One checkpoint, or with --all every one of a workdir."""
    options = Options(args.dtype, parse_size(args.shard_size), args.model_type, args.repeat_kv)
    if args.all:
        from neo.convert.every import run_all
        run_all(args.checkpoint, args.out, options, args.overwrite)
        return
    source = open_source(args.checkpoint)
    out = output.check_place(args.out, [source.path])
    write_hf(source, out, options, args.overwrite)
    print(endings.after_hf(out, source, args.checkpoint))


def write_hf(source: Source, out: Path, options: Options, overwrite: bool = False) -> bool:
    """Write the folder, unless it is finished already; returns whether anything was done.

    Interrupted anywhere, the same call goes on after the last complete file of weights. Raises InputError before anything
    is written: a model no class holds (all reasons in the line), an output in the way; and, with nothing left behind, a value
    that float16 cannot hold.
    """
    plan = make_plan(source, options)
    if output.is_finished(out, plan.facts, overwrite, SafetensorsFolder):
        say(f"{out} is finished already: nothing to do")
        return False
    partial, resumed = output.open_partial(out, plan.facts, overwrite)
    try:
        _write_weights(plan, partial, resumed)
    except Overflow:
        output.discard(partial)   # no start of the same command could finish it
        raise
    for name, content in plan.files.items():
        output.write_file(partial / name, content)
    hf = json.loads(plan.files["config.json"])
    command = f"python -m neo.convert to-hf {source.name} {out.name} {options.typed()}"
    output.write_file(partial / "README.md", model_card(source, hf, command, plan.num_parameters, plan.num_bytes).encode())
    output.finish(partial, out)
    return True


def make_plan(source: Source, options: Options) -> Plan:
    """Choose the class and everything that follows from it; reads no weights."""
    weights: Weights = source.weights
    if options.repeat_kv and weights.config.num_kv_heads != weights.config.num_heads:
        weights = RepeatedKV(weights)
    cls = choose_class(weights.config, options.model_type)
    own = CLASSES.get(source.hf_class)
    if options.model_type == "auto" and own is not None and not obstacles(weights.config, own):
        cls = own   # what came as a Mistral without a window leaves as one
    plain, weights = weights, FoldedWeights(weights, cls)
    if weights.folded:
        say(f"written as {cls.architecture}; multiplied into the weights: {_some(weights.folded)}")
    dtype = None if options.dtype == "source" else DTYPES[options.dtype]
    specs = {tensor.name: (tensor.shape, dtype or _stored(plain, tensor)) for tensor in tensors(weights.config, cls)}
    facts = {"format": "neo.conversion", "version": 1, "verb": "to-hf", "checkpoint": source.digest, "class": cls.model_type,
             "options": dataclasses.asdict(options), "neo": neo.__version__}
    return Plan(source, options, cls, weights, dtype, specs, _small_files(source, weights, cls, specs), facts)


def _small_files(source: Source, weights: Weights, cls: HFClass, specs: dict[str, Any]) -> dict[str, bytes]:
    tokenizer, config = source.tokenizer, weights.config
    files = {}
    ids: dict[str, Any] = {}
    if tokenizer is not None:
        files |= hf_files(tokenizer, vocab_rows=config.vocab_size, max_seq_len=config.max_seq_len)
        ids = {"bos_token_id": tokenizer.bos_id if tokenizer.bos_id >= 0 else None,
               "eos_token_id": tokenizer.eos_ids[0] if len(tokenizer.eos_ids) == 1 else list(tokenizer.eos_ids),
               "pad_token_id": pad_id(tokenizer, files)}
    dtype = max((dtype for _, dtype in specs.values()), key=lambda one: one.itemsize)
    files["config.json"] = _json(write_config(config, cls, max_seq_len=config.max_seq_len, dtype=dtype.name, **ids))
    # As `neo.infer` samples; a model without a tokenizer says nothing about ids.
    generation = {**{name: value for name, value in ids.items() if value is not None},
                  "do_sample": True, "temperature": 0.8, "top_p": 1.0}
    files["generation_config.json"] = _json(generation)
    return {**files, **source.passed_on}


def pad_id(tokenizer: Any, files: dict[str, bytes]) -> int:
    """Id of the padding token that tokenizer_config.json names, else the end of a document."""
    try:
        named = json.loads(files["tokenizer_config.json"]).get("pad_token")
        text = named.get("content") if isinstance(named, dict) else named
        found = next(i for i in range(tokenizer.vocab_size) if text is not None and tokenizer.piece(i) == text)
    except (KeyError, ValueError, StopIteration):
        return tokenizer.eod_id
    return found


def _write_weights(plan: Plan, folder: Path, resumed: bool) -> None:
    writer = ShardWriter(folder, plan.specs, plan.options.shard_bytes)
    output.check_room(folder, writer.pending_bytes)
    if resumed and writer.pending_bytes < writer.num_bytes:
        done = writer.num_bytes - writer.pending_bytes
        say(f"going on: {done / 1e9:.2f} of {writer.num_bytes / 1e9:.2f} GB were written before")
    with Progress(f"{plan.source.name} as {plan.cls.architecture}", writer.pending_bytes) as progress:
        by_name = {tensor.name: tensor for tensor in tensors(plan.weights.config, plan.cls)}
        for name, array in ahead(lambda name: _tensor(plan, by_name[name]), writer.pending):
            writer.write(name, array)
            progress.advance(array.nbytes)
    writer.close()


def _tensor(plan: Plan, tensor: Tensor) -> np.ndarray:
    """One tensor of the file; matrices come as transposed views."""
    dtype = plan.specs[tensor.name][1]
    arrays = [_cast(plan.weights.read(path, tensor.layer), dtype, path, tensor.layer) for path in tensor.rule.paths]
    return to_hf(tensor.rule, plan.weights.config, arrays, dtype)


def _cast(array: np.ndarray, dtype: np.dtype, path: str, layer: int | None) -> np.ndarray:
    with np.errstate(over="ignore"):   # an overflow is told below, in words
        cast = contiguous(array, dtype)
    if dtype == np.float16 and array.dtype != dtype and not np.isfinite(cast).all():
        lost = int((~np.isfinite(cast) & np.isfinite(array)).sum())
        if lost:
            largest = float(np.abs(array[np.isfinite(array)].astype(np.float32)).max())
            where = path if layer is None else f"{path} of layer {layer}"
            raise Overflow(f"{where}: {lost} values are beyond float16, which ends at 65504 (the largest is {largest:g}); "
                             "use --dtype=bf16")
    return cast


def _stored(weights: Weights, tensor: Tensor) -> np.dtype:
    """The type a tensor is stored in, before folding; that of the embedding for one the class makes up."""
    path = tensor.rule.paths[0] if tensor.rule.paths else "embed/table"
    return weights.dtype("embed/table" if path == "head/kernel" and weights.config.tied_embeddings else path)


def parse_size(text: str) -> int:
    """Bytes from 5GB, 500MB or 1e9. InputError otherwise."""
    plain = text.strip().upper().replace("IB", "B")
    unit = next((unit for unit in ("KB", "MB", "GB", "TB", "B") if plain.endswith(unit)), "")
    try:
        size = int(float(plain.removesuffix(unit)) * UNITS[unit])
        if size < 1:
            raise ValueError
    except (ValueError, OverflowError):
        raise InputError(f"--shard_size={text}: a size as 5GB or 500MB is needed") from None
    return size


def _some(paths: tuple[str, ...]) -> str:
    return ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")


def _json(tree: Any) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()
