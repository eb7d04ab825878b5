from __future__ import annotations

import dataclasses
import io
import json
import os
import pickle
import random
import subprocess
import sys

import hypothesis
import hypothesis.strategies as st
import pytest
import sentencepiece
from sentencepiece import sentencepiece_model_pb2

from neo.cli import invoke
from neo.data import held_out, tokenizer, tokenizer_training
from neo.data.documents import ReadOptions
from neo.data.tokenizer import Tokenizer
from neo.data.tokenizer_training import Corpus, train
from neo.errors import InputError

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))


def texts(count=300, seed=0):
    rng = random.Random(seed)
    words = ["def", "return", "self", "naïve", "the", "quick", "brown", "狐狸", "1984", "x", "=", "(value):", "jumps"]
    syllables = [a + b for a in "bdfglmnprst" for b in "aeiou"]
    words += ["".join(rng.choices(syllables, k=3)) for _ in range(200)]
    for _ in range(count):
        yield "".join("    " * rng.randrange(4) + " ".join(rng.choices(words, k=8))
                      + rng.choice(["\n", "\n\n", "\t#\n"]) for _ in range(10))


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train(texts(), 400)


def test_training_twice_gives_the_same_bytes(trained):
    assert train(texts(), 400).files() == trained.files()
    code = ("from tests.data.test_tokenizer import texts, train; print(train(texts(), 400).sha256)")
    other = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert other.stdout.split()[-1] == trained.sha256


def test_special_ids_and_pieces(trained):
    p = trained.processor
    assert (p.unk_id(), trained.bos_id, trained.eod_id, p.pad_id()) == (0, 1, 2, -1)
    assert trained.vocab_size == 400 == p.vocab_size()
    newline, tab = p.piece_to_id("\n"), p.piece_to_id("\t")
    assert trained.encode("\n\t\n") == [newline, tab, newline]
    assert trained.encode("12") == trained.encode("1") + trained.encode("2")  # digits are split
    assert len(trained.encode("        ")) < 8  # runs of spaces are pieces
    assert trained.piece(newline) == "\n"


@hypothesis.given(text=st.text(st.characters(exclude_characters="\u2581")) | st.text(" \n\tdef狐1"))
@hypothesis.settings(max_examples=300, deadline=None)
def test_any_text_comes_back(trained, text):
    # U+2581 is SentencePiece's own sign for a space, the one character that does not survive.
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert trained.token_bytes[ids].sum() == len(text.encode())
    assert all(0 <= i < trained.vocab_size for i in ids) and trained.eod_id not in ids


def test_large_texts_are_encoded_in_stretches_without_a_difference(trained, monkeypatch):
    text = "".join(texts(30)) + "no line end " * 50
    whole = trained.encode(text)
    calls = []

    class Counting:
        def __init__(self, inner):
            self.inner = inner

        def encode(self, text, **options):
            calls.append(len(text))
            return self.inner.encode(text, **options)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    copy = dataclasses.replace(trained)
    copy.__dict__.update(processor=Counting(trained.processor), words=None)
    monkeypatch.setattr(tokenizer, "STRETCH", 500)
    assert copy.encode(text) == whole
    assert len(calls) > 10 and max(calls[:-1]) <= 500


def test_ids_past_the_vocabulary_and_control_tokens_decode_to_nothing(trained):
    ids = [1, *trained.encode("fox"), 2, 400, 10**6]
    assert trained.decode(ids) == "fox"
    with pytest.raises(ValueError, match="negative"):
        trained.decode([-1])
    assert trained.decode(trained.encode("lone \ud800")) == "lone ?"


def test_files_round_trip(trained, tmp_path):
    other = dataclasses.replace(trained, extra_tokens=("<CLS>", "<EOD>"), eod_id=401)
    other.save(str(tmp_path / "store" / "tokenizer"))
    for path in (tmp_path / "store", tmp_path / "store" / "tokenizer"):
        loaded = Tokenizer.load(str(path))
        assert loaded == other and (loaded.eod_id, loaded.vocab_size, loaded.piece(401)) == (401, 402, "<EOD>")
    assert Tokenizer.from_files(other.files()) == other
    assert pickle.loads(pickle.dumps(loaded)).sha256 == other.sha256 != trained.sha256  # noqa: S301  (our own bytes)
    assert Tokenizer.load(str(tmp_path / "store" / "tokenizer" / "tokenizer.model")) == trained
    assert Tokenizer.from_files({"tokenizer.model": trained.model}) == trained


def test_tokenizers_are_read_from_urls(trained):
    import fsspec
    memory = fsspec.filesystem("memory")
    for name, content in trained.files().items():
        memory.pipe_file(f"/tok-test/tokenizer/{name}", content)
    assert Tokenizer.load("memory://tok-test") == trained


def test_bad_tokenizers_are_one_line(trained, tmp_path):
    (tmp_path / "a.model").write_bytes(b"garbage")
    (tmp_path / "empty").mkdir()
    (tmp_path / "newer").mkdir()
    trained.save(str(tmp_path / "newer"))
    meta = json.loads((tmp_path / "newer" / "neo_tokenizer.json").read_text())
    (tmp_path / "newer" / "neo_tokenizer.json").write_text(json.dumps({**meta, "version": 3}))
    trained.save(str(tmp_path / "damaged"))
    (tmp_path / "damaged" / "neo_tokenizer.json").write_text("{}")
    trained.save(str(tmp_path / "outside"))
    (tmp_path / "outside" / "neo_tokenizer.json").write_text(json.dumps({**meta, "eod_id": 400}))
    words = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(["a b c"] * 9), model_writer=words, vocab_size=6,
                                             model_type="word", minloglevel=2)
    (tmp_path / "word.model").write_bytes(words.getvalue())
    for name, message in {"a.model": "not a SentencePiece model", "empty": "no tokenizer.model", "x": "no such",
                          "newer": "version 3", "damaged": "damaged", "outside": "outside the vocabulary",
                          "word.model": "BPE .2. and unigram"}.items():
        with pytest.raises(InputError, match=message) as caught:
            Tokenizer.load(str(tmp_path / name))
        assert "\n" not in str(caught.value) and name in str(caught.value)


def test_map_neo_has_the_settings_of_the_published_model():
    # The table read from the published model: see PRESETS.
    made = train(texts(), 400, "map_neo")
    proto = sentencepiece_model_pb2.ModelProto.FromString(made.model)
    spec, normalizer = proto.trainer_spec, proto.normalizer_spec
    assert spec.model_type == spec.BPE and spec.split_digits and spec.byte_fallback and spec.shuffle_input_sentence
    assert abs(spec.character_coverage - 0.9999) < 1e-6 and spec.max_sentencepiece_length == 16
    assert (spec.input_sentence_size, spec.max_sentence_length) == (50_000_000, 64000)
    assert normalizer.name == "identity" and normalizer.add_dummy_prefix and not normalizer.remove_extra_whitespaces
    assert [proto.pieces[i].piece for i in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert (made.vocab_size, made.eod_id, made.piece(made.eod_id)) == (405, 402, "<EOD>")
    assert made.decode(made.encode("the  fox\n jumps")) == "the  fox\n jumps"


def test_sentences_keep_all_text_of_a_document():
    for whole_lines in (False, True):
        text = "short\n" + "long word " * 100 + "\n\n" + "x" * 250 + "\nend"
        cut = list(tokenizer_training._sentences(text, 100, whole_lines))
        assert max(map(len, cut)) <= 101
        assert "".join(cut).replace("\n", "") == text.replace("\n", "")


@pytest.mark.parametrize("corpus, vocab_size, message", [
    ([], 400, "empty corpus"), (["", " \n"], 400, "empty corpus|too large"),
    (["hello world"] * 5, 4096, "at most \\d+ pieces"), (["hello world"] * 5, 100, "too small")])
def test_corpora_that_do_not_fit_the_vocabulary(corpus, vocab_size, message):
    with pytest.raises(InputError, match=message) as caught:
        train(corpus, vocab_size)
    assert "\n" not in str(caught.value)


def test_errors_while_reading_keep_their_kind():
    def broken():
        yield "text"
        raise InputError("the reader's own words")

    with pytest.raises(InputError, match="the reader's own words"):
        train(broken(), 400)


def write_corpus(folder, count=60):
    folder.mkdir()
    for i, text in enumerate(texts(count)):
        (folder / f"{i}.txt").write_text(text)


def test_held_out_documents_are_not_trained_on(tmp_path):
    write_corpus(tmp_path / "in", 60)
    corpus = Corpus((str(tmp_path / "in"),), ReadOptions(), 0.2)
    used = sorted(tokenizer_training.training_texts(corpus, []))
    held = [f"{i}.txt" for i in range(60) if held_out.position(f"{i}.txt") < held_out.limit(0.2)]
    expected = sorted(text for i, text in enumerate(texts(60)) if f"{i}.txt" not in held)
    assert 3 < len(held) < 30 and used == expected


def test_large_corpora_are_sampled_by_document(tmp_path):
    write_corpus(tmp_path / "in", 200)
    whole = list(tokenizer_training.training_texts(Corpus((str(tmp_path / "in"),), ReadOptions(), 0.1), []))
    size = sum(len(text.encode()) for text in texts(200))
    corpus = Corpus((str(tmp_path / "in"),), ReadOptions(), 0.1, sample_bytes=size // 4)
    part = list(tokenizer_training.training_texts(corpus, []))
    assert set(part) < set(whole) and 0.1 < len(part) / len(whole) < 0.4


# The command


def command(capfd, *argv):
    code = invoke(tokenizer.COMMAND, tokenizer.run, [str(word) for word in argv])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_train_report_import(tmp_path, capfd):
    write_corpus(tmp_path / "in")
    arguments = ("train", tmp_path / "in", f"--out={tmp_path / 'tok'}", "--vocab_size=400")
    code, out, err = command(capfd, *arguments)
    assert code == 0 and out.startswith("Wrote ") and "Next: python -m neo.data.tokenizer report" in out
    made = Tokenizer.load(str(tmp_path / "tok"))
    assert made.vocab_size == 400 and made.sha256 in out
    code, out, _ = command(capfd, *arguments)
    assert code == 0 and "finished already" in out
    code, out, err = command(capfd, *arguments, "--validation=0.5")
    assert code == 2 and "another tokenizer already" in err and Tokenizer.load(str(tmp_path / "tok")) == made
    code, out, err = command(capfd, *arguments, "--validation=0.5", "--overwrite")
    assert code == 0 and Tokenizer.load(str(tmp_path / "tok")) != made

    code, out, _ = command(capfd, "report", tmp_path / "tok", tmp_path / "in", "--json")
    result = json.loads(out)
    assert code == 0 and result["documents"] == 60 and result["round_trip_failures"] == 0
    assert result["bytes"] == sum(len(text.encode()) for text in texts(60))
    assert result["bytes_per_token"] == result["bytes"] / result["tokens"] > 1
    assert 0 <= result["byte_share"] < 0.05 and 0 < result["vocabulary_used"] <= 1
    code, out, _ = command(capfd, "report", tmp_path / "tok", tmp_path / "in")
    assert code == 0 and f"{result['bytes_per_token']:.3f}" in out

    model = tmp_path / "tok" / "tokenizer.model"
    code, out, _ = command(capfd, "import", model, f"--out={tmp_path / 'new'}", "--extra_token=<a>",
                           "--extra_token=<b>", "--eod_id=401")
    assert code == 0 and Tokenizer.load(str(tmp_path / "new")).extra_tokens == ("<a>", "<b>")
    code, _, err = command(capfd, "import", model, f"--out={tmp_path / 'new'}")
    assert code == 2 and "another tokenizer" in err
    code, _, _ = command(capfd, "import", tmp_path / "new", f"--out={tmp_path / 'third'}")
    assert code == 0 and Tokenizer.load(str(tmp_path / "third")) == Tokenizer.load(str(tmp_path / "new"))


def test_byte_pieces_and_round_trip_failures_are_counted(trained, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("fox \u2581 space")
    (tmp_path / "in" / "b.txt").write_text("€€€€")
    result = tokenizer_training.report(trained, Corpus((str(tmp_path / "in"),)))
    assert (result["round_trip_failures"], result["first_round_trip_failure"]) == (1, "a.txt")
    b = tokenizer_training.report(trained, Corpus((str(tmp_path / "in" / "b.txt"),)))
    assert b["byte_share"] == 1.0 and b["tokens"] == 12


def test_wrong_command_lines_are_one_line(trained, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "in", 3)
    (tmp_path / "void").mkdir()
    (tmp_path / "void" / "a.txt").write_text("")
    cases = {
        ("train", "in"): "--out is missing",
        ("train", "--out=tok"): "INPUT... is missing",
        ("train", "in", "--out=tok", "--vocab_size=64000"): "too large for this corpus",
        ("train", "in", "--out=tok", "--vocab_size=10"): "too small",
        ("train", "in", "--out=tok", "--vocab_size=-1"): "positive",
        ("train", "in", "--out=tok", "--preset=mapneo"): "did you mean 'map_neo'",
        ("train", "in", "--out=tok", "--validation=2"): "0 <= share < 1",
        ("train", "void", "--out=tok"): "empty corpus",
        ("import", "in/0.txt", "--out=tok"): "not a SentencePiece model",
        ("import", "nowhere", "--out=tok"): "no such tokenizer",
        ("report", "nowhere", "in"): "no such tokenizer",
        ("learn",): "unknown verb",
    }
    for argv, message in cases.items():
        code, out, err = command(capfd, *argv)
        errors = [line for line in err.splitlines() if "error:" in line]
        assert (code, len(errors)) == (2, 1) and message in errors[0] and not out, (argv, err)
        assert not os.path.exists("tok")


def test_importing_the_tokenizer_stays_cheap():
    code = "import sys, neo.data.tokenizer as t; print([m for m in ('jax', 'sentencepiece') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
