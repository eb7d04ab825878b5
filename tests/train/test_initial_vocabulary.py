"""Another vocabulary: which rows a token starts from, and what that leaves of the old logits."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np
import pytest

from neo.config.schema import ModelConfig
from neo.data.tokenizer_training import train as train_tokenizer
from neo.errors import InputError
from neo.models.decoder import Decoder
from neo.train.initial_vocabulary import ExtendedVocabulary, encode_inside, padded, require_same_ids, rows_of, text_of

WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "seven", "grey", "geese")
SHAPE = dict(num_layers=2, d_model=32, num_heads=4, num_kv_heads=2, d_ff=48, max_seq_len=64)


def texts(words):
    return [" ".join(words[i % len(words):] + words[:i % len(words)]) + f" {i}\n" for i in range(60)]


@pytest.fixture(scope="module")
def old():
    return train_tokenizer(texts(WORDS), 300)


@pytest.fixture(scope="module")
def new():
    """Other merges, so that ids move; words of its own; a control token after the model's ids."""
    made = train_tokenizer(texts([*WORDS[:9], "photosynthesis", "chlorophyll", "Größe"]), 320)
    return dataclasses.replace(made, extra_tokens=("<|turn|>",))


def test_rows(old, new):
    rows = rows_of(old, new)
    where = {old.piece(i): i for i in range(old.vocab_size)}
    assert len(rows) == new.vocab_size
    kinds = {"same": 0, "moved": 0, "mean": 0}
    for i, row in enumerate(rows):
        piece = new.piece(i)
        if piece in where:
            assert row == (where[piece],)
            kinds["same" if row[0] == i else "moved"] += 1
        elif i < new.model_size:
            # Written out by hand: a piece's text is its name with spaces for SentencePiece's underline.
            text = piece.replace("\u2581", " ")
            assert old.decode(row) == text and len(row) >= 1
            kinds["mean"] += len(row) > 1
        else:
            assert row == ()   # <|turn|>
    assert min(kinds.values()) > 5, kinds
    assert rows[new.eod_id] == (old.eod_id,)


def test_end_of_document_keeps_its_row_under_another_name(old, new):
    other = dataclasses.replace(new, eod_id=new.model_size)   # <|turn|> ends a document
    assert rows_of(old, other)[new.model_size] == (old.eod_id,)


def test_every_row_of_the_same_tokenizer_stays(old):
    assert rows_of(old, old) == tuple((i,) for i in range(old.vocab_size))


class Spelled:
    """A tokenizer of whole words, with the space in front or not: other spellings of the same pieces."""

    def __init__(self, pieces, dummy_prefix=False, byte_level=False):
        self.pieces, self.dummy, self.is_byte_level = pieces, dummy_prefix, byte_level
        self.vocab_size, self.bos_id, self.eod_id = len(pieces), -1, 0
        self.token_bytes = np.array([0] + [len(piece) for piece in pieces[1:]])
        self.space = "\u0120" if byte_level else "\u2581"

    def piece(self, i):
        return self.pieces[i]

    def encode(self, text):
        text = (" " * self.dummy + text).replace(" ", self.space)
        found = []
        while text:
            piece = max((p for p in self.pieces[1:] if text.startswith(p)), key=len, default=text[0])
            found += [self.pieces.index(piece)] if piece in self.pieces else []
            text = text[len(piece):]
        return found

    def decode(self, ids):
        text = "".join(self.pieces[i] for i in ids if i).replace(self.space, " ")
        return text.removeprefix(" ") if self.dummy else text


def test_spaces_are_kept_whatever_a_tokenizer_does_at_the_beginning():
    """`fox` inside a word is not `▁fox`, though a Llama tokenizer writes `fox` as `▁fox` when it begins a text."""
    llama = Spelled(["</s>", "\u2581", "\u2581fox", "fox", "a", "\n", "f", "o", "x"], dummy_prefix=True)
    assert (text_of(llama, 2), text_of(llama, 3)) == (" fox", "fox")
    assert encode_inside(llama, "fox") == [3] and encode_inside(llama, " fox") == [2]
    assert encode_inside(llama, "foxfox") == [3, 3] and encode_inside(llama, "") == []


def test_other_spellings_are_matched_by_their_text():
    bytes_ = Spelled(["<|endoftext|>", "\u0120fox", "fox", "a", "\u0120", "b", "\u2581fox", "\n"], byte_level=True)
    llama = Spelled(["</s>", "\u2581fox", "fox", "ab", "a", "\n"], dummy_prefix=True)
    # The byte-level piece that is called ▁fox means three bytes of its own: names say nothing across spellings.
    assert rows_of(bytes_, llama) == ((0,), (1,), (2,), (3, 5), (3,), (7,))


def test_table_and_head(old, new, random_weights):
    """Old tokens keep their logits; a new one has the mean of its pieces'; padding the mean of all."""
    config = ModelConfig(vocab_size=old.vocab_size + 4, **SHAPE)   # 4 rows of padding of its own
    source, rows = random_weights(config), rows_of(old, new)
    wide = dataclasses.replace(config, vocab_size=new.vocab_size + 7)
    weights = ExtendedVocabulary(source, wide, rows, old.vocab_size)
    table, head = source.arrays["embed/table"], source.arrays["head/kernel"]
    for path, found, before in (("embed/table", weights.read("embed/table"), table),
                                ("head/kernel", weights.read("head/kernel").T, head.T)):
        assert found.dtype == weights.dtype(path) == np.float32
        assert found.shape == (wide.vocab_size, 32)
        for i, row in enumerate(rows):
            wanted = before[list(row)].mean(0) if row else before[:old.vocab_size].mean(0)
            np.testing.assert_allclose(found[i], wanted, atol=1e-6)
        np.testing.assert_allclose(found[new.vocab_size:], np.tile(before[:old.vocab_size].mean(0), (7, 1)), atol=1e-6)
    assert weights.read("layers/mlp/up", 1) is not None and weights.dtype("layers/mlp/up") == np.float32


def test_logits_of_kept_tokens_do_not_change(old, new, random_weights, on_one_device):
    config = ModelConfig(vocab_size=old.vocab_size, **SHAPE, tied_embeddings=True)
    source, rows = random_weights(config), rows_of(old, new)
    wide = dataclasses.replace(config, vocab_size=new.vocab_size)
    extended = ExtendedVocabulary(source, wide, rows, old.vocab_size)
    kept = [i for i, row in enumerate(rows) if len(row) == 1]
    ids = np.array([kept[:30], kept[30:60]])
    before = np.asarray(jax.jit(Decoder(config).apply)(on_one_device(source, config), np.vectorize(lambda i: rows[i][0])(ids)))
    after = np.asarray(jax.jit(Decoder(wide).apply)(on_one_device(extended, wide), ids))
    assert abs(before).max() > 0.5
    np.testing.assert_allclose(after[..., kept], before[..., [rows[i][0] for i in kept]], atol=1e-5)
    mean = next(i for i, row in enumerate(rows) if len(row) > 1)
    np.testing.assert_allclose(after[..., mean], before[..., list(rows[mean])].mean(-1), atol=1e-5)


def test_padding_raises_a_loss_by_no_more_than_its_share(random_weights, on_one_device):
    config = ModelConfig(vocab_size=50, **SHAPE)
    source, wide = random_weights(config), dataclasses.replace(config, vocab_size=64)
    tokens = np.random.default_rng(0).integers(0, 50, (2, 30))

    def loss(weights, config):
        logits = jax.jit(Decoder(config).apply)(on_one_device(weights, config), tokens)
        picked = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits))[:, :-1], tokens[:, 1:, None], -1)
        return -picked.mean()

    assert 0 < loss(padded(source, wide), wide) - loss(source, config) <= math.log(1 + 14 / 50)
    assert padded(source, config) is source


def test_same_ids(old, new):
    require_same_ids(old, old, "there")
    require_same_ids(dataclasses.replace(old, extra_tokens=("<x>",)), old, "there")   # more ids there
    with pytest.raises(InputError, match=r"has 321 ids, that of there 300; .*extend_vocab=True"):
        require_same_ids(old, new, "there")
    with pytest.raises(InputError, match=r"is not that of there: id \d+ is '.*', there '.*'"):
        require_same_ids(new, old, "there")
