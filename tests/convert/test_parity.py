"""Every class against transformers itself, in float32: logits both ways, gradients of one loss, greedy text.

Differences come from the order of float32 sums alone. With logits of size 1 to 5 they stay below TOLERANCE.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from neo.config.schema import ModelConfig  # noqa: E402
from neo.convert.source import Source  # noqa: E402
from neo.convert.to_hf import Options, write_hf  # noqa: E402
from neo.infer.generate import generate  # noqa: E402
from neo.models.decoder import Decoder  # noqa: E402
from neo.models.hf.names import from_hf, tensors  # noqa: E402
from neo.models.hf.weights import HFWeights  # noqa: E402
from neo.models.weights import parameter_shapes  # noqa: E402

TOLERANCE = 1e-5
VOCAB, LENGTH = 97, 40
SHAPE = dict(vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=None, pad_token_id=0)
LLAMA3 = dict(rope_type="llama3", rope_theta=5e5, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=32)
GEMMA3_ROPE = dict(full_attention=dict(rope_type="linear", rope_theta=1e6, factor=8.0),
                   sliding_attention=dict(rope_type="default", rope_theta=1e4))
FULL, SLIDING = "full_attention", "sliding_attention"

# name -> class of transformers, settings beyond SHAPE
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),                                                             # MAP-NEO 7B, Llama 2
    "llama-mqa": ("Llama", dict(num_key_value_heads=1)),                                # MAP-NEO 2B and smaller
    "llama-mha-tied": ("Llama", dict(num_key_value_heads=4, tie_word_embeddings=True)),
    "llama3": ("Llama", dict(rope_parameters=LLAMA3, head_dim=16)),
    "llama-linear": ("Llama", dict(rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=4.0))),
    "llama-biases": ("Llama", dict(attention_bias=True, mlp_bias=True, hidden_act="gelu")),
    "mistral": ("Mistral", dict(sliding_window=7)),                                     # Moxin, Mistral
    "mistral-full": ("Mistral", dict(sliding_window=None)),
    "ministral": ("Ministral", dict(head_dim=8, sliding_window=7, layer_types=[SLIDING, SLIDING, FULL])),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen2-window": ("Qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=1)),
    "qwen3": ("Qwen3", dict(head_dim=16)),
    "olmo2": ("Olmo2", {}),
    "gemma2": ("Gemma2", dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=7, attn_logit_softcapping=2.0,
                              final_logit_softcapping=3.0)),
    "gemma3": ("Gemma3", dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=7, num_hidden_layers=4,
                              layer_types=[SLIDING, FULL, SLIDING, FULL], rope_parameters=GEMMA3_ROPE)),
    "granite": ("Granite", dict(embedding_multiplier=3.0, residual_multiplier=0.4, logits_scaling=0.5,
                                attention_multiplier=0.2, tie_word_embeddings=True)),
    "smollm3": ("SmolLM3", dict(num_hidden_layers=4, no_rope_layer_interval=2)),
    "mpt": ("Mpt", {}),                                                                 # MPT-7B
    "mpt-30b": ("Mpt", dict(n_heads=6, d_model=48, attn_config=dict(clip_qkv=0.4), tie_word_embeddings=False)),
}

# One of each class: a compiled backward pass costs seconds.
WITH_GRADIENTS = ("llama-biases", "llama3", "mistral", "ministral", "qwen2-window", "qwen3", "olmo2", "gemma2", "gemma3",
                  "granite", "smollm3", "mpt-30b")


@functools.cache
def reference(case: str) -> Any:
    """A random model of transformers, every parameter drawn."""
    kind, changes = CASES[case]
    if kind == "Mpt":
        settings = {**dict(vocab_size=VOCAB, d_model=32, n_heads=4, n_layers=3, max_seq_len=128), **changes}
        config = transformers.MptConfig(**settings)
    else:
        name = "Gemma3TextConfig" if kind == "Gemma3" else f"{kind}Config"
        config = getattr(transformers, name)(**{**SHAPE, **changes})
    config._attn_implementation = "eager"     # the others have no soft-cap
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        # Norm gains around the value at which they do nothing, matrices large enough to show.
        centre = parameter.data.round() if "norm" in name else 0.0
        parameter.data = centre + 0.15 * torch.randn_like(parameter)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(case) -> the reference model as save_pretrained writes it."""
    @functools.cache
    def make(case: str):
        path = tmp_path_factory.mktemp("hf") / case
        reference(case).save_pretrained(path)
        return path
    return make


@functools.cache
def batch() -> np.ndarray:
    return np.random.default_rng(0).integers(3, VOCAB, (2, LENGTH))


def tree(weights: Any) -> dict:
    """All parameters of a Weights in memory, float32."""
    nested: dict = {}
    for path in parameter_shapes(weights.config):
        place, (*outer, name) = nested, path.split("/")
        for part in outer:
            place = place.setdefault(part, {})
        place[name] = jnp.asarray(np.asarray(weights.read(path), np.float32))
    return nested


def imported(path: Any) -> tuple[Decoder, dict]:
    weights = HFWeights(path)
    return Decoder(weights.config, attention="dense"), tree(weights)


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens), use_cache=False).logits.numpy()


@functools.cache
def forward(decoder: Decoder) -> Any:
    return jax.jit(decoder.apply)


def loss_and_logits(decoder: Decoder, params: dict, tokens: np.ndarray) -> tuple[jax.Array, jax.Array]:
    logits = decoder.apply(params, tokens)
    log_p = jax.nn.log_softmax(logits[:, :-1])
    return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean(), logits


@pytest.mark.parametrize("case", [case for case in CASES if case not in WITH_GRADIENTS])
def test_logits_of_imported_models(case, folder):
    decoder, params = imported(folder(case))
    theirs = torch_logits(reference(case), batch())
    assert np.abs(theirs).max() > 0.5                        # otherwise the comparison would say little
    np.testing.assert_allclose(forward(decoder)(params, batch()), theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", WITH_GRADIENTS)
def test_logits_and_gradients_of_imported_models(case, folder):
    model, tokens = reference(case), batch()
    decoder, params = imported(folder(case))
    ours, logits = jax.jit(jax.grad(lambda p: loss_and_logits(decoder, p, tokens), has_aux=True))(params)

    model.zero_grad()
    found = model(torch.from_numpy(tokens), use_cache=False).logits
    assert found.abs().max() > 0.5
    np.testing.assert_allclose(logits, found.detach().numpy(), atol=TOLERANCE, rtol=0)
    target = torch.from_numpy(tokens[:, 1:])
    torch.nn.functional.cross_entropy(found[:, :-1].reshape(-1, VOCAB), target.reshape(-1)).backward()
    theirs = {name: parameter.grad.numpy() for name, parameter in model.named_parameters() if parameter.grad is not None}
    cls = HFWeights(folder(case)).hf_class
    compared = 0
    for tensor in tensors(decoder.config, cls):
        for path, expected in from_hf(tensor.rule, decoder.config, theirs[tensor.name]).items():
            leaf = functools.reduce(dict.__getitem__, path.split("/"), ours)
            leaf = leaf if tensor.layer is None else leaf[tensor.layer]
            # Relative to the largest entry, where that is above 1.
            np.testing.assert_allclose(leaf, expected, atol=TOLERANCE * max(1.0, np.abs(expected).max()), rtol=0,
                                       err_msg=f"{tensor.name} ({path})")
            compared += leaf.size
    assert compared == sum(x.size for x in jax.tree.leaves(ours))


@pytest.mark.parametrize("case", ["llama3", "mistral", "mpt", "qwen2", "qwen3", "olmo2", "gemma2", "gemma3", "granite",
                                  "smollm3"])
def test_greedy_text_of_imported_models(case, folder):
    """50 tokens behind prompts of different length, past the window: the caches of both agree."""
    decoder, params = imported(folder(case))
    prompts = [batch()[0, :13].tolist(), batch()[1, :5].tolist()]
    ours = generate(decoder, params, prompts, max_new_tokens=50, temperature=0.0, eod_id=None)
    for prompt, found in zip(prompts, ours, strict=True):
        settings = transformers.GenerationConfig(do_sample=False, max_new_tokens=50, pad_token_id=0, eos_token_id=None)
        with torch.no_grad():
            theirs = reference(case).generate(torch.tensor([prompt]), generation_config=settings)
        assert found == theirs[0, len(prompt):].tolist()


def test_the_comparison_can_fail(folder):
    """One more visible key, another base, a missing bias: each is far beyond the tolerance."""
    for case, changes in (("mistral", dict(windows=(8,))), ("llama", dict(rope_base=10100.0)),
                          ("gemma2", dict(attention_softcap=2.1)), ("mpt", dict(alibi_bias_max=8.1)),
                          ("granite", dict(residual_multiplier=0.41)), ("llama3", dict(rope_factor=8.1)),
                          ("gemma3", dict(norm_offset=1.001)), ("qwen3", dict(norm_eps=1e-3))):
        decoder, params = imported(folder(case))
        other = Decoder(dataclasses.replace(decoder.config, **changes), attention="dense")
        difference = np.abs(forward(other)(params, batch()) - torch_logits(reference(case), batch())).max()
        assert difference > 10 * TOLERANCE, (case, changes, difference)


# -- the other way -------------------------------------------------------------------------------------------

BASE = dict(vocab_size=VOCAB, num_layers=3, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=128)
YULAN = dict(wesar=True, qkv_bias=True, tied_embeddings=True, embedding_multiplier=10.0, residual_multiplier=1.4 / 56**0.5,
             logit_multiplier=0.5, norm_eps=1e-6)
GEMMA = dict(norm_placement="sandwich", norm_offset=1.0, activation="gelu_tanh", embedding_multiplier=32**0.5,
             tied_embeddings=True, head_dim=16, attention_scale=24**-0.5)

# name -> (model, class asked for, class it must become)
EXPORTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "llama": ({}, "auto", "llama"),
    "llama3": (dict(rope_scaling="llama3", rope_factor=8.0, rope_old_seq_len=32, rope_base=5e5), "auto", "llama"),
    "llama-biases": (dict(qkv_bias=True, output_bias=True, mlp_bias=True), "auto", "llama"),
    "mistral": (dict(windows=(7,), head_dim=12), "auto", "mistral"),
    "ministral": (dict(windows=(7, 0)), "auto", "ministral"),
    "qwen2": (dict(qkv_bias=True), "auto", "qwen2"),
    "qwen2-as-llama": (dict(qkv_bias=True), "llama", "llama"),
    "qwen3": (dict(qk_norm="head"), "auto", "qwen3"),
    "olmo2": (dict(qk_norm="full", norm_placement="post"), "auto", "olmo2"),
    "gemma2": ({**GEMMA, "windows": (7, 0), "attention_softcap": 2.0, "logit_softcap": 3.0}, "auto", "gemma2"),
    "gemma3": ({**GEMMA, "windows": (7, 0), "positions": ("local_rope", "rope"), "qk_norm": "head", "rope_base": 1e6,
                "num_layers": 4}, "auto", "gemma3_text"),
    "smollm3": (dict(positions=("rope", "none"), num_layers=4), "auto", "smollm3"),
    "mpt": (dict(positions=("alibi",), norm="layer", mlp="plain", activation="gelu", d_ff=128, num_kv_heads=4, clip_qkv=0.4,
                 tied_embeddings=True), "auto", "mpt"),
    "mpt-from-grouped": (dict(positions=("alibi",), norm="layer", mlp="plain", activation="gelu", d_ff=128), "mpt", "mpt"),
    "yulan-unfolded": (YULAN, "auto", "granite"),
    "yulan-as-llama": (YULAN, "llama", "llama"),
    "yulan-as-qwen2": (YULAN, "qwen2", "qwen2"),
    "multipliers-untied": (dict(embedding_multiplier=3.0, residual_multiplier=0.4, logit_multiplier=2.0), "auto", "granite"),
}


class InMemory:
    """Weights drawn at random, every parameter of them."""

    def __init__(self, config: ModelConfig):
        self.config = config
        draw = np.random.default_rng(0)
        self.arrays = {}
        for path, shape in parameter_shapes(config).items():
            name = path.rpartition("/")[2]
            centre = {"scale": 1.0 - config.norm_offset}.get(name, 0.5 if name.endswith("gain") else 0.0)
            self.arrays[path] = (centre + 0.15 * draw.standard_normal(shape)).astype(np.float32)

    def dtype(self, path: str) -> np.dtype:
        return self.arrays[path].dtype

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        return self.arrays[path] if layer is None else self.arrays[path][layer]


@pytest.mark.parametrize("case", EXPORTS)
def test_logits_of_exported_models(case, tmp_path):
    changes, asked, becomes = EXPORTS[case]
    weights = InMemory(ModelConfig(**{**BASE, **changes}))
    source = tmp_path / "source"
    source.mkdir()
    out = tmp_path / "out"
    options = Options("fp32", 30_000, asked, repeat_kv=case == "mpt-from-grouped")   # several shards
    assert write_hf(Source(str(source), weights), out, options)
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    assert model.config.model_type == becomes
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    ours = forward(Decoder(weights.config, attention="dense"))(tree(weights), batch())
    theirs = torch_logits(model.eval(), batch())
    assert np.abs(theirs).max() > 0.5
    np.testing.assert_allclose(ours, theirs, atol=TOLERANCE * max(1.0, np.abs(theirs).max()), rtol=0)


def test_yulan_mini_against_its_published_forward():
    """The forward pass of pretrain/modeling_yulanmini.py (RUC-GSAI/YuLan-Mini) in float64 numpy."""
    config = ModelConfig(**{**BASE, **YULAN, "num_layers": 2})
    weights = InMemory(config)
    p = {path: array.astype(np.float64) for path, array in weights.arrays.items()}
    tokens, heads, kv, h = batch()[0], config.num_heads, config.num_kv_heads, config.head_size

    def norm(x: np.ndarray, name: str, layer: Any = ...) -> np.ndarray:
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * p[f"{name}/scale"][layer]
        return y * p[f"{name}/gain"][layer]

    def rotate(x: np.ndarray) -> np.ndarray:
        angle = np.arange(LENGTH)[:, None, None] * 1e4 ** (-np.arange(0, h, 2) / h)
        a, b = np.split(x, 2, -1)
        return np.concatenate([a * np.cos(angle) - b * np.sin(angle), b * np.cos(angle) + a * np.sin(angle)], -1)

    x = p["embed/table"][tokens] * 10.0
    for i in range(2):
        def w(name: str, i: int = i) -> np.ndarray:
            return p[f"layers/{name}"][i]
        a = norm(x, "layers/attention_norm", i)
        q, k, v = ((np.einsum("td,dhk->thk", a, w(f"attention/{n}")) + w(f"attention/{n}_bias")) * w(f"attention/{n}_gain")
                   for n in ("query", "key", "value"))
        q, k = rotate(q), np.repeat(rotate(k), heads // kv, 1)
        scores = np.einsum("thk,shk->hts", q, k) * np.sqrt(h) / h
        scores = np.where(np.tril(np.ones((LENGTH, LENGTH), bool)), scores, -np.inf)
        mixed = np.exp(scores - scores.max(-1, keepdims=True))
        mixed /= mixed.sum(-1, keepdims=True)
        o = np.einsum("hts,shk,hkd->td", mixed, np.repeat(v, heads // kv, 1), w("attention/output"))
        x = x + o * w("attention/output_gain") * 1.4 / np.sqrt(56)
        m = norm(x, "layers/mlp_norm", i) * w("mlp/input_gain")
        gate = m @ w("mlp/gate")
        y = (gate / (1 + np.exp(-gate)) * (m @ w("mlp/up"))) @ w("mlp/down")
        x = x + y * w("mlp/down_gain") * 1.4 / np.sqrt(56)
    logits = norm(x, "final_norm") * 0.5 * p["head/gain"] @ p["embed/table"].T
    ours = forward(Decoder(config, attention="dense"))(tree(weights), tokens[None])[0]
    assert np.abs(logits).max() > 0.05
    np.testing.assert_allclose(ours, logits, atol=TOLERANCE, rtol=0)
