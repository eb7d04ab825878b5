"""Logits against Hugging Face transformers on random weights: the same model, written by others."""

from __future__ import annotations

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def hf_state(config, params) -> dict:
    """Parameters under the names and in the layout of transformers ([out, in] matrices, heads flattened)."""
    d = config.d_model
    layers = jax.tree.map(np.asarray, params["layers"])
    state = {"model.embed_tokens.weight": params["embed"]["table"], "model.norm.weight": params["final_norm"]["scale"]}
    state["lm_head.weight"] = state["model.embed_tokens.weight"] if config.tied_embeddings else params["head"]["kernel"].T
    for i in range(config.num_layers):
        at = f"model.layers.{i}."
        attention, mlp = layers["attention"], layers["mlp"]
        state[at + "input_layernorm.weight"] = layers["attention_norm"]["scale"][i]
        state[at + "post_attention_layernorm.weight"] = layers["mlp_norm"]["scale"][i]
        for name, key in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
            state[at + f"self_attn.{name}.weight"] = attention[key][i].reshape(d, -1).T
        state[at + "self_attn.o_proj.weight"] = attention["output"][i].reshape(-1, d).T
        for name in ("gate", "up", "down"):
            state[at + f"mlp.{name}_proj.weight"] = mlp[name][i].T
    return {name: torch.from_numpy(np.array(value)) for name, value in state.items()}


def hf_logits(kind: str, config, params, tokens, **extra):
    family = getattr(transformers, f"{kind}Config")
    hf_config = family(
        vocab_size=config.vocab_size, hidden_size=config.d_model, intermediate_size=config.d_ff,
        num_hidden_layers=config.num_layers, num_attention_heads=config.num_heads, head_dim=config.head_size,
        num_key_value_heads=config.num_kv_heads, max_position_embeddings=config.max_seq_len, rms_norm_eps=config.norm_eps,
        rope_theta=config.rope_base, rope_parameters={"rope_type": "default", "rope_theta": config.rope_base},
        tie_word_embeddings=config.tied_embeddings, attn_implementation="eager", **extra)
    model = getattr(transformers, f"{kind}ForCausalLM")(hf_config).eval()
    missing, unexpected = model.load_state_dict(hf_state(config, params), strict=False)
    assert not unexpected and not [name for name in missing if "rotary" not in name]
    with torch.no_grad():
        return model(torch.from_numpy(np.array(tokens)).long(), use_cache=False).logits.numpy()


CASES = [
    ("Llama", {}, {}),
    ("Llama", dict(num_kv_heads=1, head_dim=16), {}),
    ("Llama", dict(num_kv_heads=4, tied_embeddings=True, rope_base=5e5, norm_eps=1e-6), {}),
    ("Mistral", dict(windows=(5,)), dict(sliding_window=5)),
    ("Mistral", {}, dict(sliding_window=None)),
]


@pytest.mark.parametrize("attention", ["dense", "blockwise"])
@pytest.mark.parametrize("kind,changes,extra", CASES)
def test_logits(build, tokens, kind, changes, extra, attention):
    decoder, params = build(attention=attention, **changes)
    batch = tokens(2, 40)
    ours = np.asarray(decoder.apply(params, batch))
    theirs = hf_logits(kind, decoder.config, params, batch, **extra)
    assert np.abs(theirs).max() > 0.5                  # otherwise the comparison would say little
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_another_window_is_seen(build, tokens):
    """The comparison above can fail: W and W - 1 differ by far more than its tolerance."""
    decoder, params = build(windows=(5,))
    theirs = hf_logits("Mistral", decoder.config, params, tokens(2, 40), sliding_window=4)
    assert np.abs(np.asarray(decoder.apply(params, tokens(2, 40))) - theirs).max() > 1e-2
