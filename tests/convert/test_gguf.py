"""GGUF files of every architecture, run by llama.cpp (the xllamacpp wheel): log-probabilities and greedy text against neo's."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from neo.config.schema import ModelConfig
from neo.convert.gguf import write_gguf
from neo.convert.gguf_arch import ARCHS
from neo.convert.gguf_reader import GGUFWeights, read_header
from neo.convert.gguf_runtime import run_llama
from neo.convert.gguf_verify import plain_token
from neo.errors import InputError, StoppedForPerson
from neo.models.decoder import Decoder
from neo.models.hf.fold import FoldedWeights
from neo.models.weights import parameter_shapes

gguf = pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


ROWS, LENGTH, START, NEW = 320, 70, 20, 50   # rows of the table (20 of them padding), prompt, prompt and text of the greedy run
POSITIONS = (1, 9, 33, 57, 70)
W = 16
FLOAT = 2e-5     # float32 sums in another order: 1e-6 to 4e-6 measured, on log-probabilities of spread 1
GELU = 2e-2      # llama.cpp's GELU is the tanh form, read from a float16 table


@dataclasses.dataclass(frozen=True)
class Case:
    arch: str
    changes: dict
    asked: str = "auto"
    tolerance: float = FLOAT


MPT = dict(norm="layer", mlp="plain", activation="gelu", positions=("alibi",), num_kv_heads=4, tied_embeddings=True)
GEMMA2 = dict(norm_placement="sandwich", norm_offset=1.0, activation="gelu_tanh", tied_embeddings=True,
              embedding_multiplier=8.0, windows=(W, 0), attention_softcap=2.0, logit_softcap=3.0, attention_scale=0.2,
              num_layers=4)
GEMMA3 = dict(norm_placement="sandwich", norm_offset=1.0, activation="gelu_tanh", tied_embeddings=True,
              embedding_multiplier=8.0, windows=(W, W, W, W, W, 0), positions=("local_rope",) * 5 + ("rope",),
              local_rope_base=100.0, qk_norm="head", rope_scaling="linear", rope_factor=4.0, attention_scale=0.3, num_layers=7)
MULTIPLIERS = dict(embedding_multiplier=2.0, residual_multiplier=0.7, logit_multiplier=0.5, attention_scale=0.2)
CASES = {
    "llama": Case("llama", {}),
    "llama, tied, small heads, one key head": Case("llama", dict(tied_embeddings=True, head_dim=8, num_kv_heads=1)),
    "llama, all biases, llama3 scaling": Case("llama", dict(
        qkv_bias=True, output_bias=True, mlp_bias=True, rope_scaling="llama3", rope_factor=8.0, rope_old_seq_len=32)),
    "llama, linear scaling": Case("llama", dict(rope_scaling="linear", rope_factor=4.0)),
    "qwen2": Case("qwen2", dict(qkv_bias=True)),
    "qwen3": Case("qwen3", dict(qk_norm="head", head_dim=32)),
    "olmo2": Case("olmo2", dict(norm_placement="post", qk_norm="full", tied_embeddings=True)),
    "smollm3": Case("smollm3", dict(positions=("rope", "rope", "rope", "none"), num_layers=5)),
    "gemma2": Case("gemma2", GEMMA2, tolerance=GELU),
    "gemma3": Case("gemma3", GEMMA3, tolerance=GELU),
    "mpt": Case("mpt", MPT, tolerance=GELU),
    "mpt, 6 heads, grouped, clipped, biases": Case("mpt", {**MPT, **dict(
        num_heads=6, num_kv_heads=3, d_model=96, clip_qkv=0.5, tied_embeddings=False, qkv_bias=True,
        output_bias=True, mlp_bias=True, alibi_bias_max=16.0)}, tolerance=GELU),
    "mpt, another scale": Case("mpt", {**MPT, "attention_scale": 0.4, "qkv_bias": True}, tolerance=GELU),
    "granite": Case("granite", {**MULTIPLIERS, "tied_embeddings": True}),
    "granite, no positions": Case("granite", dict(positions=("none",))),
    "YuLan-Mini, its gains folded": Case("granite", {**MULTIPLIERS, "wesar": True, "qkv_bias": True, "tied_embeddings": True}),
    "YuLan-Mini, all folded": Case("qwen2", {**MULTIPLIERS, "wesar": True, "qkv_bias": True, "tied_embeddings": True}, "qwen2"),
    "granite_swa": Case("granite_swa", dict(windows=(W,))),
    "granite_swa, sinks": Case("granite_swa", dict(windows=(W, 0), attention_sinks=True)),
    "granite_swa, no window": Case("granite_swa", dict(positions=("rope", "none"))),
    "granite_swa, mixed": Case("granite_swa", dict(
        windows=(W, 0, W), positions=("rope", "none"), num_layers=4, qkv_bias=True, output_bias=True, **MULTIPLIERS)),
}


class InMemory:
    """Parameters of a decoder as `Weights`."""

    def __init__(self, config: ModelConfig, params: dict):
        leaves = jax.tree_util.tree_leaves_with_path(params)
        self.config = config
        self.arrays = {"/".join(key.key for key in path): np.asarray(leaf) for path, leaf in leaves}

    def dtype(self, path: str) -> np.dtype:
        return self.arrays[path].dtype

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        return self.arrays[path] if layer is None else self.arrays[path][layer]


def small(**changes) -> ModelConfig:
    shape = dict(vocab_size=ROWS, num_layers=3, d_model=64, num_heads=4, num_kv_heads=2, d_ff=96, max_seq_len=256,
                 rope_base=1000.0)
    return ModelConfig(**{**shape, **changes})


def shaken(config: ModelConfig, std: float = 0.15) -> tuple[Decoder, InMemory, dict]:
    """Random parameters, all of them: zero biases and unit gains would hide mistakes."""
    from neo.config.schema import InitConfig
    decoder = Decoder(config, attention="dense")
    draw = np.random.default_rng(0)

    def make(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        name = path[-1].key
        # A tied table that outweighs the blocks would only repeat the last token.
        x = draw.normal(scale=0.05 if name == "table" and config.tied_embeddings else std, size=leaf.shape)
        if name == "scale":
            x += (4.0 if path[0].key == "final_norm" and config.tied_embeddings else 1.0) - config.norm_offset
        return (x + (name == "gain" or name.endswith("_gain"))).astype(np.float32)

    params = jax.tree_util.tree_map_with_path(make, jax.eval_shape(lambda: decoder.init(jax.random.key(0), InitConfig())))
    return decoder, InMemory(config, params), params


def logprobs(decoder: Decoder, params: dict, tokens: np.ndarray) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        logits = np.asarray(jax.jit(decoder.apply)(params, jnp.asarray(tokens)), np.float64)
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@functools.cache
def prompt() -> tuple[int, ...]:
    return tuple(np.random.default_rng(1).integers(0, ROWS, LENGTH).tolist())


def run(path: Path, tokenizer):
    return run_llama(path, vocab_size=ROWS, plain_token=plain_token(tokenizer), prefixes=[prompt()[:n] for n in POSITIONS],
                     prompts=[prompt()[:START]], max_new_tokens=NEW)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_llama_computes_what_neo_computes(case: Case, tokenizer, tmp_path):
    """In float32, at positions before and beyond the window, and for 50 greedy tokens."""
    config = small(**case.changes)
    decoder, weights, params = shaken(config)
    out = write_gguf(weights, tokenizer, tmp_path / "m.gguf", type="f32", arch=case.asked)
    assert out.arch == case.arch
    theirs = run(out.path, tokenizer)
    continuation = np.array([*prompt()[:START], *theirs.continuations[0]])
    ours = logprobs(decoder, params, np.stack([prompt(), continuation]))
    found = ours[0, np.array(POSITIONS) - 1]
    assert found.std() > 0.3, "the model says next to nothing"
    np.testing.assert_allclose(theirs.logprobs, found, atol=case.tolerance, rtol=0)
    # Their token is our best, or as good as.
    rows = ours[1, START - 1:-1]
    behind = rows.max(-1) - np.take_along_axis(rows, continuation[START:, None], -1)[:, 0]
    assert len(behind) == NEW and behind.max() <= 2 * case.tolerance
    assert len(set(continuation[START:])) > 3, "a degenerate text proves little"


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_file_reads_back_as_the_weights_it_is_made_of(case: Case, tokenizer, tmp_path):
    """The reader of `verify` undoes every layout."""
    config = small(**case.changes)
    _, weights, _ = shaken(config)
    out = write_gguf(weights, tokenizer, tmp_path / "m.gguf", type="f32", arch=case.asked)
    arch = ARCHS[case.arch]
    read, folded = GGUFWeights(out.path, config), FoldedWeights(weights, arch.fold_class)
    scaled = "query_norm" if config.qk_norm != "none" else "query"
    for path in parameter_shapes(read.config):
        tied = path == "head/kernel" and folded.config.tied_embeddings   # olmo2 writes the table twice
        expected = folded.read("embed/table").T if tied else folded.read(path)
        expected = expected + config.norm_offset * path.endswith("scale")
        if path.split("/")[-1].startswith(scaled) or f"/{scaled}/" in path:
            expected = expected * arch.query_factor(folded.config)
        np.testing.assert_allclose(read.read(path), expected, rtol=1e-6, atol=1e-7, err_msg=path)


def kl(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float((np.exp(ours) * (ours - theirs)).sum(-1).mean())


# Mean divergence in nats over five positions of a random model (spread of the log-probabilities: 1), times about 3.
TYPES = {"f16": 1e-5, "bf16": 2e-4, "q8_0": 1e-3, "q5_1": 3e-2, "q5_0": 3e-2, "q4_1": 0.1, "q4_0": 0.1, "tq2_0": 2.0,
         "q6_k": 3e-3, "q5_k_m": 2e-2, "q4_k_m": 0.1, "q4_k_s": 0.1, "q3_k_m": 0.3, "q2_k": 1.0, "iq4_xs": 0.1}


@pytest.fixture(scope="module")
def wide():
    """A model with rows of 256 numbers, which K-quants need; what neo makes of the prompt."""
    config = small(d_model=256, num_layers=2, d_ff=256)
    decoder, weights, params = shaken(config, 0.06)
    return weights, logprobs(decoder, params, np.array([prompt()]))[0, np.array(POSITIONS) - 1]


@pytest.mark.parametrize("kind", TYPES)
def test_types_lose_no_more_than_their_bits(kind, wide, tokenizer, tmp_path):
    weights, ours = wide
    out = write_gguf(weights, tokenizer, tmp_path / "m.gguf", type=kind)
    assert read_header(out.path).type.lower() == kind.removesuffix("_m").removesuffix("_s")
    theirs = run_llama(out.path, vocab_size=ROWS, plain_token=plain_token(tokenizer),
                       prefixes=[prompt()[:n] for n in POSITIONS])
    assert 0 < kl(ours, theirs.logprobs) < TYPES[kind]


def test_ggml_and_gguf_encode_alike():
    """The types that both make; so a file does not depend on what else is installed."""
    from neo.convert import gguf_types
    rows = np.random.default_rng(0).normal(size=(40, 512)).astype(np.float32)
    assert gguf_types.libggml() is not None
    for kind in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "TQ1_0", "TQ2_0", "BF16", "F16", "F32"):
        expected = gguf.quants.quantize(rows, gguf.GGMLQuantizationType[kind]).view(np.uint8)
        np.testing.assert_array_equal(gguf_types.encode(rows, kind, "x"), expected, err_msg=kind)


def test_libggml_is_found_in_llama_cpp_python_too(tmp_path, monkeypatch):
    """Whose libraries lie in llama_cpp/lib; and nowhere else is fine as well."""
    import sys

    import xllamacpp.xllamacpp

    from neo.convert import gguf_types
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    gguf_types.libggml.cache_clear()
    try:
        assert gguf_types.libggml() is None
        gguf_types.libggml.cache_clear()
        (tmp_path / "llama_cpp" / "lib").mkdir(parents=True)
        (tmp_path / "llama_cpp" / "__init__.py").write_text("raise SystemExit('only found, never imported')")
        (tmp_path / "llama_cpp" / "lib" / "libggml-base.so").symlink_to(xllamacpp.xllamacpp.__file__)
        monkeypatch.syspath_prepend(tmp_path)
        assert gguf_types.libggml() is not None
    finally:
        gguf_types.libggml.cache_clear()


def test_blocks_of_rows_make_no_difference(monkeypatch):
    from neo.convert import gguf_types
    rows = np.random.default_rng(0).normal(size=(50, 256)).astype(np.float32)
    whole = {kind: gguf_types.encode(rows, kind, "x") for kind in ("F32", "BF16", "Q8_0", "Q4_K")}
    monkeypatch.setattr(gguf_types, "_ELEMENTS_AT_ONCE", 256 * 7)
    for kind, expected in whole.items():
        np.testing.assert_array_equal(gguf_types.encode(np.asfortranarray(rows), kind, "x"), expected)


def test_rows_that_fill_no_block_fall_back():
    from neo.convert.gguf_types import Place, tensor_type
    other = Place("other")
    assert [tensor_type("q8_0", other, row) for row in (64, 48)] == ["Q8_0", "F16"]
    assert [tensor_type("q4_k_m", other, row) for row in (256, 96, 48)] == ["Q4_K", "Q5_0", "F16"]
    assert tensor_type("q6_k", Place("output"), 96) == "Q8_0"


# https://huggingface.co/QuantFactory/mpt-7b-GGUF, sizes in GB (file list)
PUBLISHED = {"q2_k": 2.56, "q3_k_s": 2.94, "q3_k_m": 3.53, "q3_k_l": 3.85, "q4_k_s": 3.83, "q4_k_m": 4.27, "q5_k_s": 4.60,
             "q5_k_m": 4.96, "q6_k": 5.46, "q8_0": 7.07}


@pytest.mark.parametrize("kind", PUBLISHED)
def test_mpt_7b_has_its_published_sizes(kind):
    from neo.convert.gguf import _num_bytes
    from neo.convert.gguf_arch import ARCHS
    from neo.convert.gguf_tensors import plan
    from neo.convert.gguf_types import tensor_type
    config = ModelConfig(vocab_size=50432, num_layers=32, d_model=4096, num_heads=32, num_kv_heads=32, d_ff=16384,
                         **{name: value for name, value in MPT.items() if name != "num_kv_heads"})
    kinds = [(one, "F32" if one.place is None else tensor_type(kind, one.place, one.shape[-1]))
             for one in plan(InMemory(config, {}), ARCHS["mpt"])]
    assert sum(_num_bytes(*one) for one in kinds) / 1e9 == pytest.approx(PUBLISHED[kind], abs=0.012)


def test_the_scale_of_what_llama_takes_for_a_27b_gemma():
    """By the number of layers (46, 62), its graph has another scale; found equal in llama.cpp with such a depth, to 1e-2."""
    config = small(**{**GEMMA2, "num_layers": 46, "head_dim": 32, "attention_scale": 0.0})
    assert ARCHS["gemma2"].query_factor(config) == pytest.approx(32 ** -0.5 / 16 ** -0.5)
    assert ARCHS["gemma2"].query_factor(dataclasses.replace(config, num_layers=45)) == 1
    assert ARCHS["gemma3"].query_factor(dataclasses.replace(config, num_layers=62)) == pytest.approx(0.5 ** 0.5)


class TestWindows:
    def test_llama_gets_the_window_as_context_and_says_so(self, tokenizer, tmp_path):
        config = small(windows=(W,))
        decoder, weights, params = shaken(config)
        out = write_gguf(weights, tokenizer, tmp_path / "m.gguf", type="f32", arch="llama")
        assert (out.arch, out.context_length) == ("llama", W)
        assert "up to 16 tokens" in out.notes[0]
        ask = functools.partial(run_llama, out.path, vocab_size=ROWS, plain_token=plain_token(tokenizer))
        ours = logprobs(decoder, params, np.array([prompt()]))[0]
        np.testing.assert_allclose(ask(prefixes=[prompt()[:5], prompt()[:15]]).logprobs, ours[[4, 14]], atol=FLOAT, rtol=0)
        with pytest.raises(InputError, match="refuses a request: .*context size"):
            ask(prefixes=[prompt()[:40]])

    def test_a_refusal_is_found_under_what_the_server_logs_after_it(self):
        from neo.convert.gguf_runtime import REFUSED, _reason
        log = f"load\n{REFUSED}exceeds the context size (16)\n0.00.016 E srv send_error: task id = 0, error: too long\n"
        assert _reason(log, 1) == f"{REFUSED}exceeds the context size (16)"

    def test_a_window_as_long_as_the_context_is_none(self, tokenizer, tmp_path):
        _, weights, _ = shaken(small(windows=(256,)))
        assert write_gguf(weights, tokenizer, tmp_path / "m.gguf", type="f32").arch == "llama"

    def test_a_context_beyond_the_window_is_refused(self, tokenizer, tmp_path):
        _, weights, _ = shaken(small(windows=(W,)))
        with pytest.raises(InputError, match="llama cannot hold this model: it has a window of 16 .*granite_swa"):
            write_gguf(weights, tokenizer, tmp_path / "m.gguf", arch="llama", context_length=64)


@pytest.mark.parametrize(("changes", "asked", "message"), [
    (dict(windows=(16, 32)), "auto", "no architecture .* granite_swa: windows of different sizes"),
    (dict(norm="layer"), "auto", "no architecture .*norm=layer"),
    ({**MPT, "qk_norm": "full"}, "mpt", "mpt cannot hold this model: it has qk_norm=full"),   # its graph aborts there
    ({**MPT, "clip_qkv": 6.0, "attention_scale": 0.4}, "mpt", "it has attention_scale=0.4 behind clip_qkv"),
    (dict(qk_norm="head"), "qwen2", "qwen2 cannot hold this model: it has qk_norm=head.*; it fits --gguf_arch=qwen3"),
    (dict(), "lama", "'lama' is none of auto, qwen2, llama"),
    (dict(logit_softcap=30.0), "llama", "it has logit_softcap=30"),
    (dict(output_bias=True, qkv_bias=True), "qwen2", "it has output_bias=True; it fits --gguf_arch=llama"),
])
def test_what_llama_cannot_compute_is_refused(changes, asked, message, tokenizer, tmp_path):
    weights = InMemory(small(**changes), {})
    with pytest.raises(InputError, match=message):
        write_gguf(weights, tokenizer, tmp_path / "m.gguf", arch=asked)
    assert not list(tmp_path.iterdir())


class TestBadInput:
    def test_unknown_type(self, tokenizer, tmp_path):
        with pytest.raises(InputError, match="--type: 'q9' is none of f32, "):
            write_gguf(InMemory(small(), {}), tokenizer, tmp_path / "m.gguf", type="q9")

    def test_k_quants_without_ggml(self, tokenizer, tmp_path, monkeypatch):
        from neo.convert import gguf_types
        monkeypatch.setattr(gguf_types, "libggml", lambda: None)
        with pytest.raises(InputError, match="q4_k_m: K-quants .* pip install -e"):
            write_gguf(InMemory(small(), {}), tokenizer, tmp_path / "m.gguf", type="q4_k_m")

    def test_tokenizer_larger_than_the_model(self, tokenizer, tmp_path):
        with pytest.raises(InputError, match="the tokenizer has 300 ids, model.vocab_size is 256"):
            write_gguf(InMemory(small(vocab_size=256), {}), tokenizer, tmp_path / "m.gguf")

    @pytest.mark.parametrize(("value", "kind", "message"), [
        (1e6, "f16", "blk.0.ffn_up.weight has values up to 1e.06, float16 ends at 65504"), (np.nan, "q8_0", "holds NaN")])
    def test_values_that_do_not_fit(self, value, kind, message, tokenizer, tmp_path):
        _, weights, _ = shaken(small())
        weights.arrays["layers/mlp/up"] = weights.arrays["layers/mlp/up"].copy()
        weights.arrays["layers/mlp/up"][0, 3, 4] = value
        with pytest.raises(InputError, match=message):
            write_gguf(weights, tokenizer, tmp_path / "m.gguf", type=kind)
        assert not (tmp_path / "m.gguf").exists()

    def test_what_is_there_is_kept(self, tokenizer, tmp_path):
        _, weights, _ = shaken(small())
        path = tmp_path / "m.gguf"
        path.write_bytes(b"mine")
        with pytest.raises(InputError, match="exists; choose another name"):
            write_gguf(weights, tokenizer, path)
        assert path.read_bytes() == b"mine"
        write_gguf(weights, tokenizer, path, overwrite=True)
        assert read_header(path).type == "Q8_0"

    def test_no_room(self, tokenizer, tmp_path, monkeypatch):
        from neo.convert import gguf as writer
        full = type("Usage", (), {"free": 1000})
        monkeypatch.setattr(writer.shutil, "disk_usage", lambda path: full)
        with pytest.raises(StoppedForPerson, match="needs 0.00 GB, its disk has 0.00 GB left; nothing was written"):
            write_gguf(shaken(small())[1], tokenizer, tmp_path / "m.gguf")
        assert not list(tmp_path.iterdir())

    def test_a_folder_is_no_file(self, tokenizer, tmp_path):
        with pytest.raises(InputError, match="is a folder; give the name of a file"):
            write_gguf(shaken(small())[1], tokenizer, tmp_path)

    def test_no_gguf_file(self, tmp_path, tokenizer):
        path = tmp_path / "m.gguf"
        path.write_bytes(b"GGUF" + bytes(100))
        with pytest.raises(InputError, match="not a whole GGUF file"):
            read_header(path)
        with pytest.raises(InputError, match="llama.cpp cannot run"):
            run_llama(path, vocab_size=ROWS, plain_token=4)
        with pytest.raises(InputError, match="no such file"):
            read_header(tmp_path / "none.gguf")

    def test_file_of_another_model(self, tokenizer, tmp_path):
        _, weights, _ = shaken(small())
        out = write_gguf(weights, tokenizer, tmp_path / "m.gguf")
        with pytest.raises(InputError, match="holds another model: block_count 3 instead of 2"):
            GGUFWeights(out.path, small(num_layers=2))


def test_an_interrupted_file_is_continued(tokenizer, tmp_path):
    """Killed in the middle of a tensor: the next start keeps what is whole, and the file is the same to the byte."""
    _, weights, _ = shaken(small())
    expected = write_gguf(weights, tokenizer, tmp_path / "m.gguf", source="a").path.read_bytes()

    class Killed(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise Killed

    seen: list[int] = []
    (tmp_path / "other").mkdir()
    out = tmp_path / "other" / "m.gguf"
    with pytest.raises(Killed):
        write_gguf(weights, tokenizer, out, source="a", progress=stop)
    assert not out.exists()
    with open(out.with_name("m.gguf.partial"), "ab") as file:
        file.write(b"half a tensor")
    write_gguf(weights, tokenizer, out, source="a", progress=lambda done, total: seen.append(done))
    assert out.read_bytes() == expected and min(seen) > len(expected) / 2

    with pytest.raises(Killed):
        write_gguf(weights, tokenizer, out, source="b", overwrite=True, progress=stop)
    seen.clear()
    write_gguf(weights, tokenizer, out, source="a", overwrite=True, progress=lambda done, total: seen.append(done))
    assert min(seen) < len(expected) / 2, "an unfinished file of another source must not be continued"
    assert out.read_bytes() == expected and math.isclose(max(seen), len(expected))
