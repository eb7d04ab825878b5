"""Names and layouts: every parameter has one place, and comes back from it bit by bit."""

from __future__ import annotations

import dataclasses
import math

import ml_dtypes
import numpy as np
import pytest

from neo.config.schema import ModelConfig
from neo.errors import InputError
from neo.models.hf.classes import CLASSES, choose_class
from neo.models.hf.names import (
    copies,
    from_hf,
    hf_shapes,
    is_buffer,
    leaf_shapes,
    piece_from_hf,
    pieces,
    rules,
    tensors,
    to_hf,
)
from neo.models.weights import parameter_shapes

SHAPE = dict(vocab_size=97, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=64)
MPT = dict(positions=("alibi",), norm="layer", mlp="plain", activation="gelu", d_ff=128)
WESAR = dict(wesar=True, qkv_bias=True)
CASES = [
    ("llama", {}), ("llama", dict(qkv_bias=True)), ("llama", dict(qkv_bias=True, output_bias=True, mlp_bias=True, head_dim=24)),
    ("mistral", dict(tied_embeddings=True)), ("qwen2", dict(num_kv_heads=1)), ("qwen3", dict(qk_norm="head")),
    ("olmo2", dict(qk_norm="full", norm_placement="post")),
    ("gemma3_text", dict(qk_norm="head", norm_placement="sandwich", norm_offset=1.0)), ("smollm3", {}), ("granite", {}),
    ("mpt", dict(MPT, num_kv_heads=4)),
    ("mpt", dict(MPT, qk_norm="full", tied_embeddings=True)),       # grouped heads and these norms can be read
    ("yulanmini", WESAR), ("yulanmini", dict(WESAR, tied_embeddings=True)),
]


def model(**changes) -> ModelConfig:
    return ModelConfig(**{**SHAPE, **changes})


def draw(config: ModelConfig, dtype) -> dict[str, np.ndarray]:
    """One layer's parameters."""
    rng = np.random.default_rng(0)
    return {path: np.asarray(rng.normal(size=shape), np.float32).astype(dtype) for path, shape in leaf_shapes(config).items()}


@pytest.mark.parametrize("changes", [
    {}, dict(tied_embeddings=True), dict(wesar=True), dict(wesar=True, tied_embeddings=True, norm_placement="sandwich"),
    dict(qkv_bias=True, output_bias=True, mlp_bias=True), dict(mlp="plain", mlp_bias=True), dict(output_bias=True),
    dict(qk_norm="full", num_kv_heads=1), dict(qk_norm="head", head_dim=16), dict(norm_placement="post"),
    dict(norm_placement="sandwich")])
def test_leaves_are_the_decoders(changes):
    config = model(**changes)
    stacked = {path: (3, *shape) if path.startswith("layers/") else shape for path, shape in leaf_shapes(config).items()}
    assert stacked == parameter_shapes(config)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("name,changes", CASES)
def test_there_and_back(name, changes, dtype):
    config, cls = model(**changes), CLASSES[name]
    params = draw(config, dtype)
    shapes = hf_shapes(config, cls)
    back = {}
    for rule in rules(config, cls):
        tensor = to_hf(rule, config, [params[path] for path in rule.paths], dtype)
        assert tensor.dtype == dtype and tensor.shape == rule.shape == shapes[rule.tensor(1 if rule.layered else None)]
        for path, array in from_hf(rule, config, tensor).items():
            back[path] = array
            assert np.shares_memory(array, tensor)          # nothing is copied on the way in
        if len(rule.paths) == 1:
            assert np.shares_memory(tensor, params[rule.paths[0]])
        if not rule.paths:
            assert not tensor.any()
    assert back.keys() == params.keys()
    assert all(back[path].dtype == dtype and np.array_equal(back[path], params[path]) for path in params)


@pytest.mark.parametrize("name,changes", CASES)
def test_pieces_find_the_rows(name, changes):
    """A reader that asks for the rows of one parameter gets what converting the whole tensor gives."""
    config, cls = model(**changes), CLASSES[name]
    params, found = draw(config, np.float32), pieces(config, cls)
    assert found.keys() == params.keys()
    for path, piece in found.items():
        tensor = to_hf(piece.rule, config, [params[other] for other in piece.rule.paths])
        rows = tensor if piece.whole else tensor[piece.start:piece.stop]
        assert np.array_equal(piece_from_hf(path, config, rows), params[path])
        assert piece.whole == (piece.stop - piece.start == (piece.rule.shape[0] if piece.rule.shape else 1))


def test_layouts_are_torchs():
    """What a Linear of transformers computes with its [out, in] weight is what neo's einsum computes."""
    config = model(head_dim=24)
    params = draw(config, np.float32)
    by_path = {rule.paths[0]: to_hf(rule, config, [params[rule.paths[0]]]) for rule in rules(config, CLASSES["llama"])}
    x, heads = np.random.default_rng(1).normal(size=(5, 32)), np.random.default_rng(2).normal(size=(5, 4, 24))
    np.testing.assert_allclose(x @ by_path["layers/attention/query"].T,
                               np.einsum("td,dhk->thk", x, params["layers/attention/query"]).reshape(5, -1))
    np.testing.assert_allclose(heads.reshape(5, -1) @ by_path["layers/attention/output"].T,
                               np.einsum("thk,hkd->td", heads, params["layers/attention/output"]))
    np.testing.assert_allclose(x @ by_path["head/kernel"].T, x @ params["head/kernel"])
    assert by_path["embed/table"] is not None and np.array_equal(by_path["embed/table"], params["embed/table"])


def test_mpt_fuses_queries_keys_and_values():
    config = model(**MPT)
    fused = next(rule for rule in rules(config, CLASSES["mpt"]) if len(rule.paths) == 3)
    assert (fused.name, fused.shape) == ("transformer.blocks.{layer}.attn.Wqkv.weight", (32 + 2 * 16, 32))
    params = draw(config, np.float32)
    tensor = to_hf(fused, config, [params[path] for path in fused.paths])
    np.testing.assert_array_equal(tensor[32:48], params["layers/attention/key"].reshape(32, 16).T)
    piece = pieces(config, CLASSES["mpt"])["layers/attention/value"]
    assert (piece.start, piece.stop, piece.whole) == (48, 64, False)


def test_file_order():
    names = [tensor.name for tensor in tensors(model(), CLASSES["llama"])]
    assert names[0] == "model.embed_tokens.weight" and names[-2:] == ["model.norm.weight", "lm_head.weight"]
    layers = [int(name.split(".")[2]) for name in names[1:-2]]
    assert layers == sorted(layers) and set(layers) == {0, 1, 2} and len(names) == len(set(names)) == 3 * 9 + 3
    assert list(hf_shapes(model(), CLASSES["llama"])) == names


def test_zero_biases_where_the_class_has_them_and_the_model_does_not():
    zeros = [rule.name for rule in rules(model(qkv_bias=True), CLASSES["llama"]) if not rule.paths]
    assert zeros == ["model.layers.{layer}.self_attn.o_proj.bias"]
    zeros = [rule.name.split(".")[-2] for rule in rules(model(), CLASSES["qwen2"]) if not rule.paths]
    assert zeros == ["q_proj", "k_proj", "v_proj"]
    assert not [rule for rule in rules(model(qkv_bias=True), CLASSES["qwen2"]) if not rule.paths]


def test_a_parameter_without_a_place_is_an_error():
    with pytest.raises(InputError, match="no place for layers/mlp/down_bias, layers/mlp/gate_bias"):
        rules(model(mlp_bias=True), CLASSES["mistral"])
    for changes, name, lost in ((dict(wesar=True), "llama", "head/gain"), (dict(output_bias=True), "qwen2", "output_bias"),
                                (dict(qk_norm="head"), "llama", "query_norm"), (dict(mlp_bias=True), "mpt", "up_bias"),
                                (dict(norm_placement="sandwich"), "llama", "mlp_post_norm")):
        with pytest.raises(InputError, match=lost):
            rules(model(**changes), CLASSES[name])


def test_wrong_shapes_are_errors():
    config = model()
    query = next(rule for rule in rules(config, CLASSES["llama"]) if rule.paths == ("layers/attention/query",))
    with pytest.raises(InputError, match=r"layers/attention/query has shape \[32, 8, 4\].*\[32, 4, 8\]"):
        to_hf(query, config, [np.zeros((32, 8, 4))])
    with pytest.raises(InputError, match=r"q_proj.weight has shape \[32, 31\].*\[32, 32\]"):
        from_hf(query, config, np.zeros((32, 31)))


def test_what_a_file_may_hold_besides():
    assert copies(model(tied_embeddings=True), CLASSES["llama"]) == {"lm_head.weight": "model.embed_tokens.weight"}
    assert copies(model(tied_embeddings=True, **MPT), CLASSES["mpt"]) == {"lm_head.weight": "transformer.wte.weight"}
    assert copies(model(), CLASSES["llama"]) == {}
    assert is_buffer("model.layers.3.self_attn.rotary_emb.inv_freq")
    for config in (model(), model(**MPT), model(qkv_bias=True)):
        assert not any(map(is_buffer, hf_shapes(config, choose_class(dataclasses.replace(config, num_kv_heads=4)))))


def test_counting_reads_no_weights():
    """70 billion parameters are laid out in an instant."""
    config = ModelConfig(vocab_size=128256, num_layers=80, d_model=8192, num_heads=64, num_kv_heads=8, d_ff=28672)
    assert sum(map(math.prod, hf_shapes(config, CLASSES["llama"]).values())) == 70_553_706_496
