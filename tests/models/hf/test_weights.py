"""Hugging Face folders under neo's names: every value in its place, and each way in which a folder can be wrong."""

from __future__ import annotations

import json
import os

import ml_dtypes
import numpy as np
import pytest

from neo.errors import InputError
from neo.models.hf.files import INDEX, ONE_FILE, ShardWriter
from neo.models.hf.names import leaf_shapes
from neo.models.hf.weights import HFWeights
from neo.models.weights import parameter_shapes

BF16 = np.dtype(ml_dtypes.bfloat16)
L, D, H, K, h, F, V = 2, 12, 3, 1, 4, 20, 26
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": V, "hidden_size": D,
         "num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": K, "intermediate_size": F,
         "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
         "tie_word_embeddings": False, "torch_dtype": "bfloat16"}
MPT = {"model_type": "mpt", "architectures": ["MPTForCausalLM"], "vocab_size": V, "d_model": D, "n_layers": L, "n_heads": H,
       "max_seq_len": 64, "expansion_ratio": 4, "no_bias": True,
       "attn_config": {"alibi": True, "attn_type": "multihead_attention"}}


def llama_tensors(tied=False):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.standard_normal(shape).astype(BF16)
    tensors = {"model.embed_tokens.weight": draw(V, D), "model.norm.weight": draw(D)}
    for i in range(L):
        block = f"model.layers.{i}."
        tensors |= {block + "input_layernorm.weight": draw(D), block + "post_attention_layernorm.weight": draw(D),
                    block + "self_attn.q_proj.weight": draw(H * h, D), block + "self_attn.k_proj.weight": draw(K * h, D),
                    block + "self_attn.v_proj.weight": draw(K * h, D), block + "self_attn.o_proj.weight": draw(D, H * h),
                    block + "mlp.gate_proj.weight": draw(F, D), block + "mlp.up_proj.weight": draw(F, D),
                    block + "mlp.down_proj.weight": draw(D, F)}
    return tensors if tied else {**tensors, "lm_head.weight": draw(V, D)}


def mpt_tensors():
    rng = np.random.default_rng(1)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)
    tensors = {"transformer.wte.weight": draw(V, D), "transformer.norm_f.weight": draw(D)}
    for i in range(L):
        block = f"transformer.blocks.{i}."
        tensors |= {block + "norm_1.weight": draw(D), block + "norm_2.weight": draw(D),
                    block + "attn.Wqkv.weight": draw(3 * D, D), block + "attn.out_proj.weight": draw(D, D),
                    block + "ffn.up_proj.weight": draw(4 * D, D), block + "ffn.down_proj.weight": draw(D, 4 * D)}
    return tensors


@pytest.fixture
def folder(tmp_path):
    """folder(config, tensors) -> path of a Hugging Face folder in several shards."""
    def make(config, tensors):
        (tmp_path / "config.json").write_text(json.dumps(config))
        writer = ShardWriter(tmp_path, {name: (array.shape, array.dtype) for name, array in tensors.items()}, 1500)
        for name in writer.pending:
            writer.write(name, tensors[name])
        writer.close()
        return tmp_path
    return make


def test_a_llama_under_neos_names(folder):
    tensors = llama_tensors()
    path = folder(LLAMA, tensors)
    assert (path / INDEX).exists()
    weights = HFWeights(path)
    assert (weights.config.num_layers, weights.config.d_ff, weights.config.tied_embeddings) == (L, F, False)
    for i in range(L):
        block = f"model.layers.{i}."
        query = weights.read("layers/attention/query", i)
        for head in range(H):   # head by head, as the formulas say: q = a @ Wq
            np.testing.assert_array_equal(query[:, head], tensors[block + "self_attn.q_proj.weight"][head * h:(head + 1) * h].T)
            np.testing.assert_array_equal(weights.read("layers/attention/output", i)[head],
                                          tensors[block + "self_attn.o_proj.weight"][:, head * h:(head + 1) * h].T)
        np.testing.assert_array_equal(weights.read("layers/mlp/down", i), tensors[block + "mlp.down_proj.weight"].T)
        np.testing.assert_array_equal(weights.read("layers/mlp_norm/scale", i),
                                      tensors[block + "post_attention_layernorm.weight"])
    np.testing.assert_array_equal(weights.read("head/kernel"), tensors["lm_head.weight"].T)
    np.testing.assert_array_equal(weights.read("embed/table"), tensors["model.embed_tokens.weight"])


@pytest.mark.parametrize("config,tensors", [(LLAMA, llama_tensors()), (MPT, mpt_tensors())], ids=["llama", "mpt"])
def test_every_parameter_has_its_shape_and_the_files_type(folder, config, tensors):
    weights = HFWeights(folder(config, tensors))
    seen = 0
    for path, shape in parameter_shapes(weights.config).items():
        stack = weights.read(path)
        assert stack.shape == shape and stack.dtype == weights.dtype(path) == next(iter(tensors.values())).dtype
        if path.startswith("layers/"):
            for i in range(L):
                one = weights.read(path, i)
                assert one.shape == leaf_shapes(weights.config)[path]
                np.testing.assert_array_equal(one, stack[i])
        seen += stack.size
    assert seen == sum(array.size for array in tensors.values())


def test_a_fused_tensor_is_read_by_its_rows(folder):
    tensors = mpt_tensors()
    weights = HFWeights(folder(MPT, tensors))
    fused = tensors["transformer.blocks.1.attn.Wqkv.weight"]
    for start, name in ((0, "query"), (D, "key"), (2 * D, "value")):
        np.testing.assert_array_equal(weights.read(f"layers/attention/{name}", 1).reshape(D, D), fused[start:start + D].T)


def test_constants_of_old_files_and_a_true_copy_of_tied_embeddings_are_fine(folder):
    tensors = llama_tensors(tied=True)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    weights = HFWeights(folder({**LLAMA, "tie_word_embeddings": True}, tensors))
    assert "head/kernel" not in parameter_shapes(weights.config)
    with pytest.raises(InputError, match="has no parameter head/kernel"):
        weights.read("head/kernel")


def changed(**arrays):
    """The Llama with some tensors changed, or taken away where None is given."""
    tensors = llama_tensors()
    for name, array in arrays.items():
        if array is None:
            del tensors[name]
        else:
            tensors[name] = array
    return tensors


Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))


@pytest.mark.parametrize("config,tensors,named", [
    ({}, changed(**{Q1: None}), rf"lacks the tensor {Q1}, which config.json asks for \(LlamaForCausalLM\)"),
    ({}, changed(**{"lm_head.weight": None}), "lacks the tensor lm_head.weight"),
    ({"num_hidden_layers": 3}, changed(), r"lacks the tensors model.layers.2.input_layernorm.weight, .* and 6 more tensors"),
    ({"num_hidden_layers": 1}, changed(), r"holds the tensors model.layers.1.input_layernorm.weight, .*has no place for"),
    ({}, changed(extra=np.zeros(3, np.float32)), "holds the tensor extra, which a LlamaForCausalLM of its config.json has no"),
    ({}, changed(**{Q1[:-6] + "bias": np.zeros(D, BF16)}), "holds the tensor model.layers.1.self_attn.q_proj.bias"),
    ({}, changed(**{Q1: np.zeros((D, D + 1), BF16)}), rf"tensor {Q1} has shape \[12, 13\], config.json needs \[12, 12\]"),
    ({"vocab_size": V + 6}, changed(), r"tensor model.embed_tokens.weight has shape \[26, 12\], config.json needs \[32, 12\]"),
    ({"num_key_value_heads": H}, changed(), r"k_proj.weight has shape \[4, 12\], config.json needs \[12, 12\]"),
    ({}, changed(**{Q0: np.zeros((D, D), np.int8), Q1: np.zeros((D, D), np.int8)}),
     f"tensor {Q0} has type int8; weights are read as float32, bfloat16.* quantised"),
    ({}, changed(**{Q1: np.zeros((D, D), np.float32)}), f"tensor {Q1} has type float32, {Q0} has bfloat16"),
    ({"tie_word_embeddings": True}, changed(), "lm_head.weight differs from model.embed_tokens.weight, .*tie_word_embeddings"),
    ({"model_type": "lama"}, changed(), "config.json: model_type 'lama'"),
])
def test_a_folder_that_does_not_fit_its_config_is_refused(folder, config, tensors, named):
    with pytest.raises(InputError, match=named) as caught:
        HFWeights(folder({**LLAMA, **config}, tensors))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize("text,named", [("{", "config.json cannot be read"), ("[1]", "config.json is not a JSON object"),
                                        (None, "has no config.json; it is not a Hugging Face model")])
def test_a_config_that_is_none(folder, text, named):
    path = folder(LLAMA, llama_tensors())
    (path / "config.json").unlink() if text is None else (path / "config.json").write_text(text)
    with pytest.raises(InputError, match=named):
        HFWeights(path)
    with pytest.raises(InputError, match="is not a folder"):
        HFWeights(path / "config.json")


def test_pickled_weights_are_refused_with_the_way_to_get_others(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(InputError, match="only pickled weights"):
        HFWeights(tmp_path)


def test_opening_reads_no_weights(tmp_path):
    """A sparse file of 100 GB: headers and shapes are all that is looked at."""
    config = {**LLAMA, "vocab_size": 10**9, "hidden_size": D}
    specs = {name: (array.shape, array.dtype) for name, array in llama_tensors().items()}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        specs[name] = ((10**9, D), BF16)
    (tmp_path / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, (shape, dtype) in specs.items():
        size = int(np.prod(shape)) * dtype.itemsize
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    (tmp_path / ONE_FILE).write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(tmp_path / ONE_FILE, 8 + len(text) + offset)
    weights = HFWeights(tmp_path)
    assert weights.read("layers/mlp/up", 1).shape == (D, F)
