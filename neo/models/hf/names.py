"""Tensor names and layouts of each class: rules as data, and pure functions that turn one layout into the other.

A rule says which tensor of a Hugging Face file holds which of neo's parameters. torch keeps a matrix as [out, in] with the
heads flattened, neo as [in, out] with them apart:

    as it is     embed/table [V, D]; norms, biases and gains, flattened or not
    transposed   every other matrix: query [D, H, h] <-> q_proj [H h, D], output [H, h, D] <-> o_proj [D, H h], ...
    fused        MPT's Wqkv [(H + 2 K) h, D]: rows of queries, keys, values, one after another
    zeros        a tensor the class has and the model lacks (o_proj.bias of a Llama with attention_bias): no parameter at all

Everything here works on one layer's slices, without the L axis; single matrices come back as views, in their own dtype.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from neo.config.schema import ModelConfig
from neo.errors import InputError
from neo.models.hf.classes import HFClass, zero_biases
from neo.models.weights import LAYERS

Shape = tuple[int, ...]


# -- neo's side ----------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=32)
def leaf_shapes(config: ModelConfig) -> Mapping[str, Shape]:
    """Shape of every parameter by path, one layer's slice for those under layers/ (`parameter_shapes` has the L axis)."""
    D, H, K, h, F = config.d_model, config.num_heads, config.num_kv_heads, config.head_size, config.d_ff
    gated, before, after = config.mlp == "gated", config.norm_placement != "post", config.norm_placement != "pre"
    full = config.qk_norm == "full"
    gains = config.wesar
    leaves: list[tuple[bool, str, Shape]] = [
        (True, "embed/table", (config.vocab_size, D)),
        (before, "layers/attention_norm/scale", (D,)),
        (before and gains, "layers/attention_norm/gain", ()),
        (True, "layers/attention/query", (D, H, h)),
        (True, "layers/attention/key", (D, K, h)),
        (True, "layers/attention/value", (D, K, h)),
        (config.qkv_bias, "layers/attention/query_bias", (H, h)),
        (config.qkv_bias, "layers/attention/key_bias", (K, h)),
        (config.qkv_bias, "layers/attention/value_bias", (K, h)),
        (config.qk_norm != "none", "layers/attention/query_norm/scale", (H, h) if full else (h,)),
        (config.qk_norm != "none", "layers/attention/key_norm/scale", (K, h) if full else (h,)),
        (True, "layers/attention/output", (H, h, D)),
        (config.output_bias, "layers/attention/output_bias", (D,)),
        (config.attention_sinks, "layers/attention/sinks", (H,)),
        *((gains, f"layers/attention/{name}_gain", ()) for name in ("query", "key", "value", "output")),
        (after, "layers/attention_post_norm/scale", (D,)),
        (before, "layers/mlp_norm/scale", (D,)),
        (before and gains, "layers/mlp_norm/gain", ()),
        (gated, "layers/mlp/gate", (D, F)),
        (gated and config.mlp_bias, "layers/mlp/gate_bias", (F,)),
        (True, "layers/mlp/up", (D, F)),
        (config.mlp_bias, "layers/mlp/up_bias", (F,)),
        (True, "layers/mlp/down", (F, D)),
        (config.mlp_bias, "layers/mlp/down_bias", (D,)),
        *((gains, f"layers/mlp/{name}_gain", ()) for name in ("input", "down")),
        (after, "layers/mlp_post_norm/scale", (D,)),
        (True, "final_norm/scale", (D,)),
        (gains, "final_norm/gain", ()),
        (not config.tied_embeddings, "head/kernel", (D, config.vocab_size)),
        (gains, "head/gain", ()),
    ]
    return {path: shape for present, path, shape in leaves if present}


def _is_matrix(path: str) -> bool:
    """Whether torch keeps the parameter transposed: all matrices but the embedding table."""
    return path.rsplit("/", 1)[-1] in ("query", "key", "value", "output", "gate", "up", "down", "kernel")


def _inputs(path: str, shape: Shape) -> int:
    """How many values a matrix takes in: the first axis, or the first two of [H, h, D]."""
    return math.prod(shape[:2]) if path.endswith("/output") else shape[0]


# -- the classes' side ---------------------------------------------------------------------------------------

# (tensor of one layer, parameters under layers/ that it holds). Parameters the model lacks are left out, or zeros.
Row = tuple[str, str]
_ATTENTION: tuple[Row, ...] = (
    ("self_attn.q_proj.weight", "attention/query"), ("self_attn.k_proj.weight", "attention/key"),
    ("self_attn.v_proj.weight", "attention/value"), ("self_attn.o_proj.weight", "attention/output"),
    ("self_attn.q_proj.bias", "attention/query_bias"), ("self_attn.k_proj.bias", "attention/key_bias"),
    ("self_attn.v_proj.bias", "attention/value_bias"), ("self_attn.o_proj.bias", "attention/output_bias"),
    ("self_attn.q_norm.weight", "attention/query_norm/scale"), ("self_attn.k_norm.weight", "attention/key_norm/scale"),
)
_MLP: tuple[Row, ...] = (
    ("mlp.gate_proj.weight", "mlp/gate"), ("mlp.gate_proj.bias", "mlp/gate_bias"),
    ("mlp.up_proj.weight", "mlp/up"), ("mlp.up_proj.bias", "mlp/up_bias"),
    ("mlp.down_proj.weight", "mlp/down"), ("mlp.down_proj.bias", "mlp/down_bias"),
)
_NORMS: dict[str, tuple[Row, ...]] = {
    "pre": (("input_layernorm.weight", "attention_norm/scale"), ("post_attention_layernorm.weight", "mlp_norm/scale")),
    "post": (("post_attention_layernorm.weight", "attention_post_norm/scale"),
             ("post_feedforward_layernorm.weight", "mlp_post_norm/scale")),
    "sandwich": (("input_layernorm.weight", "attention_norm/scale"),
                 ("post_attention_layernorm.weight", "attention_post_norm/scale"),
                 ("pre_feedforward_layernorm.weight", "mlp_norm/scale"),
                 ("post_feedforward_layernorm.weight", "mlp_post_norm/scale")),
}
_GAINS: tuple[Row, ...] = (
    *((f"self_attn.{letter}_proj_alpha", f"attention/{name}_gain")
      for letter, name in zip("qkvo", ("query", "key", "value", "output"), strict=True)),
    ("input_layernorm_alpha", "attention_norm/gain"), ("post_attention_layernorm_alpha", "mlp_norm/gain"),
    ("gate_up_proj_alpha", "mlp/input_gain"), ("down_proj_alpha", "mlp/down_gain"),
)
_MPT: tuple[Row, ...] = (
    ("norm_1.weight", "attention_norm/scale"), ("attn.Wqkv.weight", "attention/query attention/key attention/value"),
    ("attn.q_ln.weight", "attention/query_norm/scale"), ("attn.k_ln.weight", "attention/key_norm/scale"),
    ("attn.out_proj.weight", "attention/output"), ("norm_2.weight", "mlp_norm/scale"),
    ("ffn.up_proj.weight", "mlp/up"), ("ffn.down_proj.weight", "mlp/down"),
)


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of the file, or one per layer.

    Attributes:
        name: the tensor's name, with {layer} where there is one per layer.
        paths: neo's parameters it holds; several are rows one after another, none is a constant zero.
        shape: the tensor's.
    """

    name: str
    paths: tuple[str, ...]
    shape: Shape

    @property
    def layered(self) -> bool:
        return "{layer}" in self.name

    def tensor(self, layer: int | None = None) -> str:
        """The name in the file, of one layer where there are several."""
        return self.name.format(layer=layer)


@dataclasses.dataclass(frozen=True)
class Tensor:
    """One tensor of a file: what it is called, its rule, its layer (None outside the blocks) and its shape."""

    name: str
    rule: Rule
    layer: int | None
    shape: Shape


@dataclasses.dataclass(frozen=True)
class Piece:
    """Where one parameter of neo lies: in the rows [start, stop) of the tensors of a rule."""

    rule: Rule
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        """Whether it is the only one in its tensor."""
        return len(self.rule.paths) == 1


@functools.lru_cache(maxsize=32)
def rules(config: ModelConfig, cls: HFClass) -> tuple[Rule, ...]:
    """All tensors of a model in this class, in file order: embedding, a block, final norm, head.

    Raises InputError when a parameter of the model has no place in the class.
    """
    shapes = leaf_shapes(config)
    mpt = cls.model_type == "mpt"
    top, block = ("transformer.", "transformer.blocks.{layer}.") if mpt else ("model.", "model.layers.{layer}.")
    rows = _MPT if mpt else (*_NORMS[cls.norm_placement][:1], *_ATTENTION, *_NORMS[cls.norm_placement][1:], *_MLP)
    table: list[tuple[str, tuple[str, ...]]] = [(top + ("wte.weight" if mpt else "embed_tokens.weight"), ("embed/table",))]
    for name, held in rows + (_GAINS if cls.wesar else ()):
        if mpt or _has(cls, held):
            table.append((block + name, tuple(LAYERS + path for path in held.split())))
    table.append((top + ("norm_f.weight" if mpt else "norm.weight"), ("final_norm/scale",)))
    if cls.wesar:
        table.append((top + "norm_alpha", ("final_norm/gain",)))
    table.append(("lm_head.weight", ("head/kernel",)))
    if cls.wesar:
        table.append(("lm_head_alpha", ("head/gain",)))

    zeros = _zero_shapes(config, cls)
    made = []
    for name, paths in table:
        if all(path in shapes for path in paths):
            made.append(Rule(name, paths, _hf_shape(cls, paths, shapes)))
        elif paths[0] in zeros:
            made.append(Rule(name, (), zeros[paths[0]]))
    homeless = sorted(set(shapes) - {path for rule in made for path in rule.paths})
    if homeless:
        raise InputError(f"a {cls.architecture} has no place for {', '.join(homeless)}")
    return tuple(made)


def _has(cls: HFClass, path: str) -> bool:
    """Whether tensors that only some of the Llama-like classes have are there: biases and query-key norms."""
    if path.endswith("_bias"):
        return cls.mlp_bias if path.startswith("mlp/") else cls.biases in (("all",) if "output" in path else ("all", "qkv"))
    return cls.qk_norm != "none" if path.endswith(("query_norm/scale", "key_norm/scale")) else True


def _zero_shapes(config: ModelConfig, cls: HFClass) -> dict[str, Shape]:
    """Parameters the class has and the model lacks, which are written as zeros: attention biases."""
    if not zero_biases(config, cls):
        return {}
    biased = leaf_shapes(dataclasses.replace(config, qkv_bias=True, output_bias=cls.biases == "all"))
    return {path: (math.prod(shape),) for path, shape in biased.items()
            if path.startswith(LAYERS + "attention/") and path.endswith("_bias")}


def _hf_shape(cls: HFClass, paths: Sequence[str], shapes: Mapping[str, Shape]) -> Shape:
    """Shape of the tensor that holds these parameters."""
    first = shapes[paths[0]]
    if _is_matrix(paths[0]):
        return (sum(math.prod(shapes[path]) for path in paths) // _inputs(paths[0], first), _inputs(paths[0], first))
    if paths[0].endswith("_gain") and "/attention/" in paths[0]:
        return (1,)     # the remote code makes these with torch.ones(1), the others as scalars
    return first if len(first) < 2 or paths[0] == "embed/table" else (math.prod(first),)


def tensors(config: ModelConfig, cls: HFClass) -> Iterator[Tensor]:
    """Every tensor of the model in file order: embedding, layer 0, layer 1, ..., final norm, head."""
    every = rules(config, cls)
    first = next(i for i, rule in enumerate(every) if rule.layered)
    last = len(every) - next(i for i, rule in enumerate(reversed(every)) if rule.layered)
    for rule in every[:first]:
        yield Tensor(rule.name, rule, None, rule.shape)
    for layer in range(config.num_layers):
        for rule in every[first:last]:
            yield Tensor(rule.tensor(layer), rule, layer, rule.shape)
    for rule in every[last:]:
        yield Tensor(rule.name, rule, None, rule.shape)


def hf_shapes(config: ModelConfig, cls: HFClass) -> dict[str, Shape]:
    """Shape of every tensor by name, in file order."""
    return {tensor.name: tensor.shape for tensor in tensors(config, cls)}


@functools.lru_cache(maxsize=32)
def pieces(config: ModelConfig, cls: HFClass) -> Mapping[str, Piece]:
    """For every parameter of neo, the tensor (one per layer) and the rows of it that hold it."""
    shapes = leaf_shapes(config)
    found = {}
    for rule in rules(config, cls):
        start = 0
        for path in rule.paths:
            rows = _rows(rule, path, shapes)
            found[path] = Piece(rule, start, start + rows)
            start += rows
    return found


def _rows(rule: Rule, path: str, shapes: Mapping[str, Shape]) -> int:
    if len(rule.paths) == 1:
        return rule.shape[0] if rule.shape else 1
    return math.prod(shapes[path]) // rule.shape[1]


def copies(config: ModelConfig, cls: HFClass) -> dict[str, str]:
    """Tensors a file may hold twice: {name: the name it must be equal to}. Today the head of a tied model."""
    if not config.tied_embeddings:
        return {}
    return {"lm_head.weight": rules(config, cls)[0].name}


def is_buffer(name: str) -> bool:
    """Whether a tensor is one of the constants that older files carry along and every loader ignores."""
    return name.endswith(("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias"))


# -- layouts -------------------------------------------------------------------------------------------------


def to_hf(rule: Rule, config: ModelConfig, arrays: Sequence[np.ndarray], dtype: np.dtype | type = np.float32) -> np.ndarray:
    """The tensor of a rule from one layer's parameters, in the order of `rule.paths`.

    A single parameter comes back as a view (matrices transposed, so not contiguous), fused ones as a copy; the dtype is
    kept. `dtype` is that of zeros, which have no parameter to take it from.
    """
    if not rule.paths:
        return np.zeros(rule.shape, dtype)
    shapes = leaf_shapes(config)
    for path, array in zip(rule.paths, arrays, strict=True):
        if array.shape != shapes[path]:
            raise InputError(f"{path} has shape {list(array.shape)}, the model's config says {list(shapes[path])}")
    parts = [array.reshape(_inputs(path, array.shape), -1).T if _is_matrix(path) else array
             for path, array in zip(rule.paths, arrays, strict=True)]
    return parts[0].reshape(rule.shape) if len(parts) == 1 else np.concatenate(parts)


def from_hf(rule: Rule, config: ModelConfig, tensor: np.ndarray) -> dict[str, np.ndarray]:
    """The parameters of neo in one tensor, as views of it; nothing for a tensor of zeros."""
    if tensor.shape != rule.shape:
        raise InputError(f"{rule.name} has shape {list(tensor.shape)}, the config says {list(rule.shape)}")
    shapes = leaf_shapes(config)
    if len(rule.paths) == 1:
        return {rule.paths[0]: piece_from_hf(rule.paths[0], config, tensor)}
    found, start = {}, 0
    for path in rule.paths:
        rows = _rows(rule, path, shapes)
        found[path] = piece_from_hf(path, config, tensor[start:start + rows])
        start += rows
    return found


def piece_from_hf(path: str, config: ModelConfig, rows: np.ndarray) -> np.ndarray:
    """One parameter from the rows of the tensor that hold it (`pieces`), as a view of them."""
    return (rows.T if _is_matrix(path) else rows).reshape(leaf_shapes(config)[path])
