"""The parameters of a GGUF file as neo's weights, dequantised: what `verify` compares llama.cpp's results with."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from neo.config.schema import ModelConfig
from neo.convert.gguf_arch import ARCHS, Arch
from neo.convert.gguf_tensors import plan
from neo.convert.gguf_types import encode
from neo.errors import InputError
from neo.extras import need
from neo.models.hf.fold import FoldedWeights, fold
from neo.models.weights import LAYERS, Weights

_NORMS = {"attention_norm": "attn_norm", "mlp_norm": "ffn_norm", "attention_post_norm": "post_attention_norm",
          "mlp_post_norm": "post_ffw_norm", "attention/query_norm": "attn_q_norm", "attention/key_norm": "attn_k_norm"}
_ENDS = {"embed/table": "token_embd.weight", "final_norm/scale": "output_norm.weight", "head/kernel": "output.weight"}


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file says about itself, as far as it is compared.

    Attributes:
        arch: llama.cpp's name of the architecture.
        type: ggml's name of the type of most matrices.
        vocab_size: rows of the embedding table.
        context_length: longest input it declares.
    """

    arch: str
    type: str
    vocab_size: int
    context_length: int


class GGUFWeights:
    """A file written by `write_gguf` seen as `Weights`, float32. Its config has what was folded taken out.

    Raises InputError when the file is none, or of another model than `config`.
    """

    def __init__(self, path: str | Path, config: ModelConfig):
        self.path = str(path)
        reader = _open(path)
        self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        self.header = _header(reader, self.path)
        if self.header.arch not in ARCHS:
            raise InputError(f"{path}: architecture {self.header.arch} is none that neo writes ({', '.join(ARCHS)})")
        self.arch = ARCHS[self.header.arch]
        self.config = _config(config, self.arch, "output.weight" in self._tensors)
        found = _shape(reader, self.header.arch)
        wanted = {name: getattr(config, field) for name, field in _SHAPE.items()}
        if found != wanted:
            differing = [f"{name} {found[name]} instead of {wanted[name]}" for name in found if found[name] != wanted[name]]
            raise InputError(f"{path} holds another model: {', '.join(differing)}")

    def dtype(self, path: str) -> np.dtype:
        """Always float32."""
        return np.dtype(np.float32)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """One parameter in neo's layout; see `Weights.read`."""
        if not path.startswith(LAYERS):
            content = self._content(_ENDS[path])
            return content.T if path == "head/kernel" else content
        if layer is None:
            return np.stack([self.read(path, i) for i in range(self.config.num_layers)])
        return self._block(path.removeprefix(LAYERS), f"blk.{layer}.")

    def _block(self, path: str, blk: str) -> np.ndarray:
        config = self.config
        if path.endswith("/scale"):
            content = self._content(f"{blk}{_NORMS[path.removesuffix('/scale')]}.weight")
            full = config.qk_norm == "full" and path.startswith("attention/")
            return content.reshape(-1, config.head_size) if full else content
        room, name = path.split("/")
        kind = "bias" if name.endswith("_bias") else "weight"
        name = name.removesuffix("_bias")
        if room == "mlp":
            return self._content(f"{blk}ffn_{name}.{kind}").T
        if name == "sinks":
            return self._content(f"{blk}attn_sinks.weight")
        if name == "output":
            content = self._content(f"{blk}attn_output.{kind}")
            return content if kind == "bias" else content.T.reshape(config.num_heads, config.head_size, config.d_model)
        return self._projection(name, kind, blk)

    def _projection(self, name: str, kind: str, blk: str) -> np.ndarray:
        """Queries, keys or values: rows of heads -> [D, heads, h], or [heads, h] of a bias."""
        config = self.config
        if self.arch.fused:
            q, k = config.num_heads * config.head_size, config.num_kv_heads * config.head_size
            rows = {"query": slice(0, q), "key": slice(q, q + k), "value": slice(q + k, None)}[name]
            content = self._content(f"{blk}attn_qkv.{kind}")[rows]
        else:
            content = self._content(f"{blk}attn_{name[0]}.{kind}")
        heads = content.reshape(-1, config.head_size, *content.shape[1:])
        if self.arch.interleaved and name != "value":   # pairs side by side -> half a head apart
            pairs = heads.reshape(heads.shape[0], -1, 2, *heads.shape[2:])
            heads = np.swapaxes(pairs, 1, 2).reshape(heads.shape)
        return heads if kind == "bias" else np.moveaxis(heads, -1, 0)

    def kind(self, name: str) -> str:
        """ggml's name of the type of a tensor. InputError when the file lacks it."""
        if name not in self._tensors:
            raise InputError(f"{self.path}: the tensor {name} is missing")
        return self._tensors[name].tensor_type.name

    def _content(self, name: str) -> np.ndarray:
        kind = self.kind(name)
        tensor = self._tensors[name]
        return _decoded(tensor.data, kind, tuple(int(n) for n in reversed(tensor.shape)))


class RoundedWeights(GGUFWeights):
    """What a checkpoint's parameters become in the types of a file: the file's own content, if it was made of them."""

    def __init__(self, file: GGUFWeights, weights: Weights):
        self.path, self.config, self.arch, self._file = file.path, file.config, file.arch, file
        self._plan = {tensor.name: tensor for tensor in plan(FoldedWeights(weights, file.arch.fold_class), file.arch)}

    def _content(self, name: str) -> np.ndarray:
        tensor, kind = self._plan[name], self._file.kind(name)
        return _decoded(encode(tensor.read().reshape(tensor.shape), kind, name), kind, tensor.shape)


def _decoded(data: np.ndarray, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    gguf = need("gguf", extra="gguf")
    content = gguf.quants.dequantize(np.ascontiguousarray(data), gguf.GGMLQuantizationType[kind])
    return np.asarray(content, np.float32).reshape(shape)


_SHAPE = {"block_count": "num_layers", "embedding_length": "d_model", "feed_forward_length": "d_ff",
          "attention.head_count": "num_heads", "attention.head_count_kv": "num_kv_heads", "vocab_size": "vocab_size"}


def _shape(reader: Any, arch: str) -> dict[str, int]:
    fields = {name: reader.fields.get(f"{arch}.{name}") for name in _SHAPE}
    return {name: 0 if field is None else int(field.contents()) for name, field in fields.items()}


def _config(config: ModelConfig, arch: Arch, has_output: bool) -> ModelConfig:
    """The model as the file holds it."""
    folded = fold(config, arch.fold_class).config
    scale = folded.attention_scale if arch.multipliers else arch.attention_scale(folded)
    return dataclasses.replace(folded, norm_offset=0.0, attention_scale=scale, tied_embeddings=not has_output)


def read_header(path: str | Path) -> Header:
    """Read a GGUF file's keys. InputError when it is none, or not of a decoder."""
    return _header(_open(path), str(path))


def _open(path: str | Path) -> Any:
    gguf = need("gguf", extra="gguf")
    try:
        return gguf.GGUFReader(str(path))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise InputError(f"{path} is not a whole GGUF file: {error}") from None


def _header(reader: Any, path: str) -> Header:
    try:
        arch = reader.fields["general.architecture"].contents()
        context = int(reader.fields[f"{arch}.context_length"].contents())
        kinds = [tensor.tensor_type.name for tensor in reader.tensors if tensor.name.endswith("ffn_up.weight")]
        rows = next(int(tensor.shape[1]) for tensor in reader.tensors if tensor.name == "token_embd.weight")
        return Header(arch, max(set(kinds), key=kinds.count), rows, context)
    except (KeyError, ValueError, StopIteration) as error:
        raise InputError(f"{path} is a GGUF file, but not of a decoder: {error}") from None
