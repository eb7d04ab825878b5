"""The tensors of a GGUF file: llama.cpp's name of each, its shape, and how it comes from neo's parameters.

A matrix of GGUF has one row per output; neo's have one per input, with heads as an axis of their own. Names are those of
llama.cpp (src/llama-arch.cpp), roles those that the choice of a number type depends on.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from neo.config.schema import ModelConfig
from neo.convert.gguf_arch import Arch
from neo.convert.gguf_types import Place
from neo.models.weights import Weights

Layout = Callable[[np.ndarray], np.ndarray]
Part = tuple[str, Layout]   # a path of neo's, and how its slice of one layer becomes rows
NO_SINK = -1e9   # of an attention sink: exp of it is 0, so that the softmax is the plain one


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of the file, described without reading anything.

    Attributes:
        name: llama.cpp's, as in "blk.0.attn_q.weight".
        shape: numpy's order, rows first.
        read: its content in the stored type (or float32), of this shape.
        place: of a matrix; None for what stays float32.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray] = dataclasses.field(repr=False)
    place: Place | None = None


def plan(weights: Weights, arch: Arch) -> list[Tensor]:
    """Every tensor of the model in the order of the file; `weights` hold what the architecture can express."""
    config = weights.config
    tensors = [
        _matrix(weights, "token_embd.weight", (("embed/table", _as_it_is),), None, (config.vocab_size, config.d_model),
                "embedding" if _writes_output(config, arch) else "output"),
        _vector(weights, "output_norm.weight", "final_norm/scale", None, config.d_model, config.norm_offset),
    ]
    if _writes_output(config, arch):
        tied = config.tied_embeddings
        part = ("embed/table", _as_it_is) if tied else ("head/kernel", np.transpose)
        tensors.append(_matrix(weights, "output.weight", (part,), None, (config.vocab_size, config.d_model), "output"))
    if config.rope_scaling == "llama3":
        tensors.append(Tensor("rope_freqs.weight", (config.head_size // 2,), lambda: rope_factors(config)))
    for layer in range(config.num_layers):
        tensors += _block(weights, arch, layer)
    return tensors


def _writes_output(config: ModelConfig, arch: Arch) -> bool:
    return arch.needs_output or not config.tied_embeddings


def _block(weights: Weights, arch: Arch, layer: int) -> Iterator[Tensor]:
    config = weights.config
    d, f, h = config.d_model, config.d_ff, config.head_size
    heads = config.num_heads
    blk = f"blk.{layer}."

    def norm(name: str, path: str) -> Tensor:
        return _vector(weights, f"{blk}{name}.weight", f"layers/{path}/scale", layer, d, config.norm_offset)

    def matrix(name: str, parts: tuple[Part, ...], shape: tuple[int, int], role: str = "other") -> Tensor:
        return _matrix(weights, f"{blk}{name}.weight", parts, layer, shape, role)

    def bias(name: str, parts: tuple[Part, ...], length: int) -> Tensor:
        return Tensor(f"{blk}{name}.bias", (length,), lambda: _joined(weights, parts, layer))

    if config.norm_placement != "post":
        yield norm("attn_norm", "attention_norm")
    yield from _attention(weights, arch, layer, matrix, bias)
    yield matrix("attn_output", (("layers/attention/output", _input_heads),), (d, heads * h), "attention_output")
    if config.output_bias:
        yield bias("attn_output", (("layers/attention/output_bias", np.ravel),), d)
    if config.norm_placement != "pre":
        yield norm("post_attention_norm", "attention_post_norm")
    if config.norm_placement != "post":
        yield norm("ffn_norm", "mlp_norm")
    for name, width in ((("gate", f),) if config.mlp == "gated" else ()) + (("up", f), ("down", d)):
        other = f if name == "down" else d
        yield matrix(f"ffn_{name}", ((f"layers/mlp/{name}", np.transpose),), (width, other),
                     "down" if name == "down" else "other")
        if config.mlp_bias:
            yield bias(f"ffn_{name}", ((f"layers/mlp/{name}_bias", np.ravel),), width)
    if config.norm_placement != "pre":
        yield norm("post_ffw_norm", "mlp_post_norm")
    if config.attention_sinks:
        yield _vector(weights, f"{blk}attn_sinks.weight", "layers/attention/sinks", layer, heads, 0.0)
    elif arch.sinks:
        yield Tensor(f"{blk}attn_sinks.weight", (heads,), lambda: np.full(heads, NO_SINK, np.float32))


def _attention(weights: Weights, arch: Arch, layer: int, matrix: Callable[..., Tensor],
               bias: Callable[..., Tensor]) -> Iterator[Tensor]:
    config = weights.config
    d, h = config.d_model, config.head_size
    rows = {"query": config.num_heads * h, "key": config.num_kv_heads * h, "value": config.num_kv_heads * h}
    rotated: Layout = _side_by_side if arch.interleaved else _as_it_is
    scale = np.float32(arch.query_factor(config))
    turns: dict[str, Layout] = {"key": rotated, "value": _as_it_is, "query": rotated}
    if not math.isclose(scale, 1.0, rel_tol=1e-6) and config.qk_norm == "none":
        turns["query"] = lambda x: rotated(x).astype(np.float32) * scale

    def rows_of(turn: Layout) -> Layout:   # [D, H, h] -> [H h, D]
        return lambda x: np.moveaxis(turn(x), 0, -1).reshape(-1, x.shape[0])

    def flat(turn: Layout) -> Layout:      # [H, h] -> [H h]
        return lambda x: turn(x).ravel()

    matrices = {part: (f"layers/attention/{part}", rows_of(turns[part])) for part in rows}
    biases = {part: (f"layers/attention/{part}_bias", flat(turns[part])) for part in rows}
    if arch.fused:
        yield matrix("attn_qkv", tuple(matrices.values()), (sum(rows.values()), d), "fused")
        if config.qkv_bias:
            yield bias("attn_qkv", tuple(biases.values()), sum(rows.values()))
    else:
        for part, count in rows.items():
            yield matrix(f"attn_{part[0]}", (matrices[part],), (count, d), "value" if part == "value" else "other")
            if config.qkv_bias:
                yield bias(f"attn_{part[0]}", (biases[part],), count)
    if config.qk_norm != "none":
        for part in ("query", "key"):
            length = h if config.qk_norm == "head" else rows[part]
            path = f"layers/attention/{part}_norm/scale"
            factor = float(scale) if part == "query" else 1.0
            yield _vector(weights, f"blk.{layer}.attn_{part[0]}_norm.weight", path, layer, length, config.norm_offset, factor)


def _vector(weights: Weights, name: str, path: str, layer: int | None, length: int, offset: float,
            factor: float = 1.0) -> Tensor:
    def read() -> np.ndarray:
        return (weights.read(path, layer).astype(np.float32).ravel() + np.float32(offset)) * np.float32(factor)
    return Tensor(name, (length,), read)


def _matrix(weights: Weights, name: str, parts: tuple[Part, ...], layer: int | None, shape: tuple[int, int],
            role: str) -> Tensor:
    config = weights.config
    place = Place(role, layer or 0, config.num_layers, config.num_heads // config.num_kv_heads)
    return Tensor(name, shape, lambda: _joined(weights, parts, layer), place)


def _joined(weights: Weights, parts: tuple[Part, ...], layer: int | None) -> np.ndarray:
    """The parts one below the other."""
    read = [layout(weights.read(path, layer)) for path, layout in parts]
    return read[0] if len(read) == 1 else np.concatenate(read)


def _as_it_is(x: np.ndarray) -> np.ndarray:
    return x


def _input_heads(x: np.ndarray) -> np.ndarray:
    """[H, h, D] -> [D, H h]."""
    return x.reshape(-1, x.shape[-1]).T


def _side_by_side(x: np.ndarray) -> np.ndarray:
    """[..., h] with the pairs of the rotation at (i, i + h/2) -> at (2i, 2i + 1), as ggml's plain rope has them."""
    halves = x.reshape(*x.shape[:-1], 2, x.shape[-1] // 2)
    return np.swapaxes(halves, -1, -2).reshape(x.shape)


def rope_factors(config: ModelConfig) -> np.ndarray:
    """By what each rotary frequency is divided under llama3 scaling: float32 [h/2].

    Frequencies that turn more than `rope_high_frequency` times in the old context stay, those below `rope_low_frequency`
    are divided by `rope_factor`, with a ramp between (Llama 3.1; transformers, _compute_llama3_parameters).
    """
    frequency = config.rope_base ** -(np.arange(0, config.head_size, 2, dtype=np.float64) / config.head_size)
    turns = config.rope_old_seq_len * frequency / (2 * np.pi)
    low, high = config.rope_low_frequency, config.rope_high_frequency
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - kept) / config.rope_factor + kept)).astype(np.float32)
