"""Writing a model as one GGUF file, the format of llama.cpp, ollama and their kin: `write_gguf`.

The header comes from the `gguf` package; the tensors follow one at a time, so memory holds about one matrix, whatever the size
of the model. The file grows as OUT.partial and is renamed when complete; started again, the same conversion goes on behind the
last whole tensor.
"""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from neo.config.schema import ModelConfig
from neo.convert.gguf_arch import ARCHS, Arch, active_windows, choose, period
from neo.convert.gguf_tensors import Tensor, plan
from neo.convert.gguf_tokenizer import Vocabulary, vocabulary
from neo.convert.gguf_types import TYPES, check_type, encode, encoded_shape, tensor_type
from neo.errors import InputError, StoppedForPerson
from neo.extras import need
from neo.models.hf.classes import to_fold
from neo.models.hf.fold import FoldedWeights
from neo.models.weights import Weights

if TYPE_CHECKING:
    from neo.data.tokenizer import AnyTokenizer

ALIGNMENT = 32   # bytes, the default of the format

Progress = Callable[[int, int], None]   # (bytes written, bytes in all)


@dataclasses.dataclass(frozen=True)
class Written:
    """What a conversion made.

    Attributes:
        path: the file.
        arch, type: llama.cpp's architecture, and the type asked for.
        num_bytes: of the file.
        context_length: longest input the file declares.
        notes: what the reader of the file should know (a window that does not fit, folded multipliers, ...).
    """

    path: Path
    arch: str
    type: str
    num_bytes: int
    context_length: int
    notes: tuple[str, ...] = ()


def write_gguf(weights: Weights, tokenizer: AnyTokenizer, out: str | Path, *, type: str = "q8_0", arch: str = "auto",
               context_length: int | None = None, name: str = "", chat_template: str = "", source: str = "",
               overwrite: bool = False, progress: Progress | None = None) -> Written:
    """Write a model, its tokenizer and what is needed to run it into the file `out`.

    Args:
        weights: the parameters; multipliers that the architecture has no key for are folded into them.
        tokenizer: of the model, as `load_tokenizer` gives it.
        type: number type of the matrices, one of `TYPES`; norms and biases stay float32.
        arch: one of `ARCHS`, or "auto": the first that computes what neo computes. A model with windows becomes granite_swa,
            which needs a recent llama.cpp; arch="llama" has no window and gets the window's size as context.
        context_length: default the model's max_seq_len.
        name: shown by programs that load the file.
        source: says where the weights are from (a digest): an unfinished file is only continued for the same one.

    Raises InputError: nothing in llama.cpp holds the model, an unknown type, a tokenizer that does not fit, `out` exists.
    """
    type = type.lower()
    check_type(type)
    path = Path(os.path.abspath(out))
    context, notes = _context(weights.config, arch, context_length)
    chosen = choose(weights.config, arch, context)
    notes += tuple(f"{one} is folded into the weights" for one in to_fold(weights.config, chosen.fold_class))
    weights = FoldedWeights(weights, chosen.fold_class)
    words = vocabulary(tokenizer, weights.config.vocab_size, chat_template)
    tensors = [(tensor, _kind(tensor, type)) for tensor in plan(weights, chosen)]
    header = _header(weights.config, chosen, words, tensors, type, context, name or path.stem, source, path)
    total = len(header) + sum(_padded(_num_bytes(tensor, kind)) for tensor, kind in tensors)
    _check_place(path, total, overwrite)
    _write(path, header, tensors, total, progress)
    return Written(path, chosen.name, type, total, context, (*notes, *words.notes))


def _context(config: ModelConfig, arch: str, asked: int | None) -> tuple[int, tuple[str, ...]]:
    """The context to declare, and what to say about it."""
    context = asked or config.max_seq_len
    if arch not in ARCHS or ARCHS[arch].windowed or asked or not active_windows(config, context):
        return context, ()
    window = min(active_windows(config, context))
    return window, (f"llama.cpp's architecture {arch} has no window: the file is for inputs of up to {window} tokens, the "
                    f"model's window, not {config.max_seq_len}; beyond that it would see more than the model ever did",)


def _kind(tensor: Tensor, asked: str) -> str:
    return "F32" if tensor.place is None else tensor_type(asked, tensor.place, tensor.shape[-1])


def _num_bytes(tensor: Tensor, kind: str) -> int:
    return math.prod(encoded_shape(tensor.shape, kind))


def _padded(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT


def _header(config: ModelConfig, arch: Arch, words: Vocabulary, tensors: list[tuple[Tensor, str]], asked: str, context: int,
            name: str, source: str, path: Path) -> bytes:
    """All that stands before the first tensor, padded."""
    gguf = need("gguf", extra="gguf")
    writer = gguf.GGUFWriter(None, arch.name)
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(name)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(TYPES[asked][1])
    if source:
        writer.add_string("neo.source", source)
    _add_shape(writer, config, arch, context)
    for method, value in words.keys:
        getattr(writer, method)(value)
    for tensor, kind in tensors:
        writer.add_tensor_info(tensor.name, encoded_shape(tensor.shape, kind), np.dtype(np.uint8), _num_bytes(tensor, kind),
                               raw_dtype=gguf.GGMLQuantizationType[kind])
    temporary = path.with_name(f".{path.name}.{os.getpid()}.header")
    try:
        temporary.parent.mkdir(parents=True, exist_ok=True)
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        writer.close()
        content = temporary.read_bytes()
    except (PermissionError, NotADirectoryError, FileExistsError) as error:
        raise InputError(f"{path} cannot be written: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
    return content + bytes(_padded(len(content)) - len(content))


def _add_shape(writer: Any, config: ModelConfig, arch: Arch, context: int) -> None:
    """The model's keys (names: gguf.constants.Keys)."""
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.num_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.num_heads)
    writer.add_head_count_kv(config.num_kv_heads)
    writer.add_key_length(config.head_size)
    writer.add_value_length(config.head_size)
    if config.norm == "rms":
        writer.add_layer_norm_rms_eps(config.norm_eps)
    else:
        writer.add_layer_norm_eps(config.norm_eps)
    if "alibi" in config.layer_positions:
        writer.add_max_alibi_bias(config.alibi_bias_max)
    else:
        _add_rope(writer, config)
    if config.clip_qkv:
        writer.add_clamp_kqv(config.clip_qkv)
    if config.attention_softcap:
        writer.add_attn_logit_softcapping(config.attention_softcap)
    if config.logit_softcap:
        writer.add_final_logit_softcapping(config.logit_softcap)
    if arch.multipliers:
        writer.add_embedding_scale(config.embedding_multiplier)
        writer.add_residual_scale(config.residual_multiplier)
        writer.add_logit_scale(1.0 / config.logit_multiplier)   # llama.cpp divides by it
        writer.add_attention_scale(config.attention_scale or config.head_size ** -0.5)
    _add_pattern(writer, config, arch, context)


def _add_rope(writer: Any, config: ModelConfig) -> None:
    gguf = need("gguf", extra="gguf")
    writer.add_rope_dimension_count(config.head_size)
    writer.add_rope_freq_base(config.rope_base)
    if config.rope_scaling == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)
    elif config.rope_scaling == "llama3":   # the factors are a tensor; a scaling type would stretch them once more
        writer.add_rope_scaling_orig_ctx_len(config.rope_old_seq_len)
    if "local_rope" in config.layer_positions:
        writer.add_rope_freq_base_swa(config.local_rope_base)


def _add_pattern(writer: Any, config: ModelConfig, arch: Arch, context: int) -> None:
    """Which layers have a window, and which have no rotation."""
    if arch.name == "granite" and set(config.layer_positions) == {"none"}:
        writer.add_rope_scaling_finetuned(False)   # how granite says that there is no rotation
    if not arch.windowed:
        return
    windows = config.layer_windows
    writer.add_sliding_window(next(filter(None, windows), context))
    key = f"{arch.name}.attention.sliding_window_pattern"
    if arch.name == "granite_swa":
        # llama.cpp wants at least one window; one as long as the context is none.
        writer.add_array(key, [window is not None or not any(windows) for window in windows])
        if "none" in config.layer_positions:
            writer.add_array(f"{arch.name}.attention.rope_pattern", [position == "rope" for position in config.layer_positions])
    else:
        writer.add_uint32(key, period(tuple(window is not None for window in windows)))


def _check_place(path: Path, total: int, overwrite: bool) -> None:
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file, as in {path.name}/model.gguf")
    if path.exists() and not overwrite:
        raise InputError(f"{path} exists; choose another name, or replace it with --overwrite")
    partial = partial_of(path)
    free = shutil.disk_usage(path.parent).free + (partial.stat().st_size if partial.exists() else 0)
    if total > free:
        raise StoppedForPerson(f"{path} needs {total / 1e9:.2f} GB, its disk has {free / 1e9:.2f} GB left; nothing was written")


def partial_of(path: Path) -> Path:
    """Where the file grows."""
    return path.with_name(path.name + ".partial")


def _write(path: Path, header: bytes, tensors: list[tuple[Tensor, str]], total: int, progress: Progress | None) -> None:
    partial = partial_of(path)
    first, position = _resume(partial, header, tensors)
    with open(partial, "r+b" if first or position else "wb") as file:
        file.truncate(position)
        file.seek(position)
        if not position:
            file.write(header)
        for tensor, kind in tensors[first:]:
            content = encode(tensor.read().reshape(tensor.shape), kind, tensor.name)
            file.write(content.data)
            file.write(bytes(_padded(content.nbytes) - content.nbytes))
            if progress is not None:
                progress(file.tell(), total)
        file.flush()
        os.fsync(file.fileno())
    if partial.stat().st_size != total:
        raise RuntimeError(f"{partial} has {partial.stat().st_size} bytes where {total} were planned")
    os.replace(partial, path)


def _resume(partial: Path, header: bytes, tensors: list[tuple[Tensor, str]]) -> tuple[int, int]:
    """Number of tensors that an earlier start of the same conversion wrote whole, and the byte behind them."""
    if not partial.exists():
        return 0, 0
    with open(partial, "rb") as file:
        if file.read(len(header)) != header:
            return 0, 0
    size, position = partial.stat().st_size, len(header)
    for number, (tensor, kind) in enumerate(tensors):
        after = position + _padded(_num_bytes(tensor, kind))
        if after > size:
            return number, position
        position = after
    return len(tensors), position
