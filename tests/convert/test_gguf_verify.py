"""`neo.convert verify` on GGUF files: right ones pass, wrong ones do not."""

from __future__ import annotations

import dataclasses

import pytest

from neo.convert.gguf import write_gguf
from neo.convert.gguf_verify import _before_the_end, ending_tokens, verify_gguf
from neo.convert.source import Source
from neo.errors import InputError
from tests.convert.test_gguf import InMemory, shaken, small

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def windowed(tokenizer):
    _, weights, _ = shaken(small(windows=(40,), num_layers=2))
    return Source("windowed", weights, tokenizer)


def altered(weights: InMemory, **changes) -> InMemory:
    """The same parameters, said to be of another model."""
    new = InMemory(weights.config, {})
    new.config, new.arrays = dataclasses.replace(weights.config, **changes), weights.arrays
    return new


@pytest.mark.parametrize("kind", ["f32", "q8_0", "q4_k_m"])
def test_a_right_file_passes(kind, windowed, tokenizer, tmp_path):
    out = write_gguf(windowed.weights, tokenizer, tmp_path / "m.gguf", type=kind)
    report = verify_gguf(windowed, str(out.path))
    assert report.passed, report.table()
    same, whole = report.comparisons
    assert same.tolerance <= whole.tolerance and (kind == "f32") == (whole.max_difference < 1e-4)
    assert kind != "f32" or report.greedy == "4 x 40 tokens, equal", "one of the prompts is longer than the window"


@pytest.mark.parametrize("wrong", [dict(rope_base=990.0), dict(windows=(39,)), dict(norm_eps=1e-3)], ids=str)
def test_a_file_with_another_constant_does_not(wrong, windowed, tokenizer, tmp_path):
    out = write_gguf(altered(windowed.weights, **wrong), tokenizer, tmp_path / "m.gguf", type="f32")
    report = verify_gguf(windowed, str(out.path))
    assert not report.comparisons[0].passed and not report.passed


def test_a_file_with_other_weights_does_not(windowed, tokenizer, tmp_path):
    """llama.cpp computes what neo computes with them, but they are not the checkpoint's."""
    other = altered(windowed.weights)
    name = "layers/mlp/up"
    other.arrays = {**other.arrays, name: other.arrays[name] + 0.02}
    out = write_gguf(other, tokenizer, tmp_path / "m.gguf", type="f16")
    same, whole = verify_gguf(windowed, str(out.path)).comparisons
    assert same.passed and not whole.passed


def test_a_file_of_another_shape_is_refused(windowed, tokenizer, tmp_path):
    _, weights, _ = shaken(small())
    out = write_gguf(weights, tokenizer, tmp_path / "m.gguf")
    with pytest.raises(InputError, match="holds another model: block_count 3 instead of 2"):
        verify_gguf(windowed, str(out.path))
    with pytest.raises(InputError, match="has no tokenizer"):
        verify_gguf(dataclasses.replace(windowed, tokenizer=None), str(out.path))


def test_text_counts_up_to_its_end(tokenizer):
    ends = ending_tokens(tokenizer)
    assert tokenizer.eod_id in ends and 50 not in ends
    assert _before_the_end([5, 2, 7], [5, 9, 7], {2}) == ([5], [5])
    assert _before_the_end([5, 8, 7], [5, 9, 7], {2}) == ([5, 8, 7], [5, 9, 7])
