"""Encoding word by word gives SentencePiece's own ids, for whatever text and model."""

from __future__ import annotations

import io

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sentencepiece

from neo.data import tokenizer_words
from neo.data.tokenizer import Tokenizer, from_model
from neo.data.tokenizer_training import train
from neo.data.tokenizer_words import PATTERNS, Words, borders
from tests.data.test_tokenizer import texts

MIXED = ["l'été «où»", "x−1≤y", "人々は、東京へ。", "Ωμέγα+ß", "a\u0301e\u0301", "नमस्ते दुनिया", "می\u200cخواهم", "ＡＢC１２",
         "☀\ufe0f👨\u200d👩", "foo_bar(x)[1]->y;", "    if x == 10:\n\t\treturn", "“quoted” – text…", "№5 ²³ ½"]


def made(**options) -> Tokenizer:
    settings = dict(vocab_size=600, model_type="bpe", byte_fallback=True, normalization_rule_name="identity",
                    remove_extra_whitespaces=False, add_dummy_prefix=False, minloglevel=2, character_coverage=1.0,
                    split_digits=True)
    corpus = [*texts(20), *(text * 2 for text in MIXED for _ in range(8)), *["see foo_bar(x) in 1984 and the rest\n" * 9] * 9]
    sentences = [line for text in corpus for line in text.split("\n") if line]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(sentences), model_writer=model, **settings | options)
    return from_model(model.getvalue(), "test")


MODELS = {
    "default": lambda: train([*texts(60), *MIXED * 8], 700),
    "map_neo": lambda: train([*texts(60), *MIXED * 8], 700, "map_neo"),
    "across scripts": lambda: made(split_by_unicode_script=False, split_by_number=False),
    "numbers": lambda: made(split_digits=False),
    "symbols": lambda: made(user_defined_symbols=["\n", "<|im_start|>", "\n\n", "if", "▁x"]),
    "whitespace": lambda: made(allow_whitespace_only_pieces=True, add_dummy_prefix=True),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return MODELS[request.param]()


PARTS = [*MIXED, "▁", "  ", "\n", "\n\n", "<|im_start|>", "<0x0A>", "<s>", "fox", "\x00", "\r\n", "\u3000", "x" * 70]


@hypothesis.given(text=st.text() | st.text(" \n\tdefréx1(.,«狐▁") | st.lists(st.sampled_from(PARTS)).map("".join))
@hypothesis.settings(max_examples=400, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_ids_are_those_of_sentencepiece(model, text):
    assert model.words is not None
    expected = model.processor.encode(text.encode("utf-8", "replace").decode())
    assert model.encode_document(text, np.uint16).tolist() == [*expected, model.eod_id]


def test_long_texts_and_a_full_memory_make_no_difference(model, monkeypatch):
    text = "".join(texts(40, seed=7)) + "".join(MIXED) * 3 + "x" * 500 + "\n \n  \n" + "▁▁ tail "
    expected = model.processor.encode(text)
    assert model.encode(text) == expected
    monkeypatch.setattr(tokenizer_words, "STRETCH", 100)
    monkeypatch.setattr(tokenizer_words, "LARGEST_MEMORY", 5000)
    words = Words(model.proto, borders(model.proto))
    stretches = list(words.encode(text))
    assert len(stretches) > 20 and np.concatenate(stretches).tolist() == expected
    assert 0 < len(words._known) < 100


def test_the_finest_borders_that_no_piece_crosses():
    assert borders(MODELS["default"]().proto).pattern == PATTERNS[0]
    tabs = MODELS["map_neo"]()
    assert any(piece.piece == "\t#" for piece in tabs.proto.pieces) and borders(tabs.proto).pattern == PATTERNS[1]
    joined = made()
    assert any("\u200c" in piece.piece[1:-1] for piece in joined.proto.pieces)
    assert borders(joined.proto).pattern in PATTERNS[:2]
    across = MODELS["across scripts"]()
    assert any(piece.piece == "\u2581foo_bar(x)" for piece in across.proto.pieces)
    assert borders(across.proto).pattern in PATTERNS[4:]
    numbers = made(split_digits=False)
    assert any(piece.piece == "\u25811984" for piece in numbers.proto.pieces)
    assert borders(numbers.proto).pattern in PATTERNS[2:4]


@pytest.mark.parametrize("options", [
    dict(split_by_whitespace=False), dict(model_type="unigram"), dict(normalization_rule_name="nmt_nfkc"),
    dict(remove_extra_whitespaces=True), dict(byte_fallback=False), dict(treat_whitespace_as_suffix=True),
    dict(user_defined_symbols=["a b"])], ids=lambda options: next(iter(options)))
def test_models_without_borders_are_encoded_whole(options):
    other = made(**options)
    assert other.words is None
    assert other.encode_document("foo_bar(x) a b", "int32").tolist() == [*other.processor.encode("foo_bar(x) a b"), 2]


def test_ids_that_take_four_bytes():
    tokenizer = made()
    proto = tokenizer.proto
    for i in range(1 << 16):  # never met: pieces of private characters
        proto.pieces.add(piece=chr(0xF0000 + i // 256) + chr(0xF0000 + i % 256), score=-1e6 - i)
    large = from_model(proto.SerializeToString(), "test")
    text = chr(0xF00FF) + chr(0xF00FE) + " fox " + "".join(MIXED)
    assert max(expected := large.processor.encode(text)) >= 1 << 16
    assert large.encode_document(text, np.uint32).tolist() == [*expected, 2]
