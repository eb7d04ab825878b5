"""Tokenizers in GGUF files: llama.cpp must give the ids of the tokenizer the model was trained with."""

from __future__ import annotations

import json
import random
import unicodedata

import numpy as np
import pytest

from neo.convert.gguf import write_gguf
from neo.convert.gguf_runtime import run_llama
from neo.convert.gguf_tokenizer import PRE_TOKENIZERS, vocabulary
from neo.convert.gguf_verify import plain_token
from neo.convert.verify import TEXTS
from neo.data.tokenizer import from_model, load_tokenizer
from neo.data.tokenizer_training import train
from neo.errors import InputError
from tests.convert.test_gguf import InMemory, small

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

ROWS = 640
END, BOS, TURN = "<|endoftext|>", "<|begin|>", "<|turn|>"


def documents(count: int = 80) -> list[str]:
    draw = random.Random(0)
    words = ["def", "return", "naïve", "the", "quick", "brown", "狐狸", "1984", "x", "=", "(value):", "jumps", "don't", "it's"]
    words += ["".join(draw.choices(["ba", "ce", "di", "fo", "gu", "na", "re"], k=3)) for _ in range(60)]
    return ["".join("    " * draw.randrange(3) + " ".join(draw.choices(words, k=8)) + draw.choice(["\n", "\n\n", "\t#\n"])
                    for _ in range(8)) for _ in range(count)]


def nasty() -> list[str]:
    """Fixed texts that others got wrong, and 300 drawn from what is hard."""
    draw = random.Random(1)
    parts = [" ", "  ", "    ", "\n", "\n\n", "\t", "\r\n", "a", "the", "quick", "don't", "I'LL", "12345", "0.5", "狐狸", "é",
             "e\u0301", "👩\u200d👩", "שלום", "…", "(x)", "==", "\u00a0", "\u3000", "_", "<s>", "</s>", END, "\u2581", "ﬁ",
             "'s"]
    return [*TEXTS, *("".join(draw.choices(parts, k=draw.randrange(1, 9))) for _ in range(300))]


def ids_in_llama(tokenizer, folder, texts: list[str]) -> list[list[int]]:
    """What llama.cpp makes of texts with a file of a tiny model that has this tokenizer."""
    config = small(vocab_size=ROWS, num_layers=1, d_model=32, num_heads=2, num_kv_heads=1, d_ff=32)

    class Zeros(InMemory):
        def __init__(self):
            from neo.models.weights import parameter_shapes
            self.config = config
            self.arrays = {path: np.zeros(shape, np.float32) for path, shape in parameter_shapes(config).items()}

    out = write_gguf(Zeros(), tokenizer, folder / "m.gguf", type="f16")
    return [list(ids) for ids in run_llama(out.path, vocab_size=ROWS, plain_token=plain_token(tokenizer), texts=texts).tokens]


def check(tokenizer, folder, texts: list[str] | None = None) -> None:
    texts = texts or nasty()
    found = ids_in_llama(tokenizer, folder, texts)
    first = [tokenizer.bos_id] * tokenizer.add_bos
    wrong = [(text, ours, theirs) for text, theirs in zip(texts, found, strict=True)
             if (ours := first + tokenizer.encode(text)) != theirs]
    assert not wrong, f"{len(wrong)} of {len(texts)}: {wrong[:3]}"


@pytest.mark.parametrize("preset", ["default", "map_neo"])
def test_sentencepiece(preset, tmp_path):
    """map_neo adds a leading space, and control tokens behind the model's ids."""
    check(train(documents(), 420, preset), tmp_path)


def test_sentencepiece_that_begins_with_bos(tokenizer, tmp_path):
    import dataclasses
    check(dataclasses.replace(tokenizer, add_bos=True), tmp_path, TEXTS)


def sentencepiece(**options) -> bytes:
    import io

    import sentencepiece
    model = io.BytesIO()
    settings = {**dict(model_type="bpe", byte_fallback=True, vocab_size=400, minloglevel=2), **options}
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(documents()), model_writer=model, **settings)
    return model.getvalue()


def test_a_model_that_normalises_is_noted():
    """SentencePiece's own defaults, which llama.cpp does not follow."""
    notes = vocabulary(from_model(sentencepiece(), "m"), ROWS).notes
    assert "normalises text (nmt_nfkc)" in notes[0] and "removes extra spaces" in notes[1]


def test_a_unigram_model_is_refused():
    with pytest.raises(InputError, match="unigram model; llama.cpp reads SentencePiece models of type BPE"):
        vocabulary(from_model(sentencepiece(model_type="unigram", vocab_size=300), "m"), ROWS)


def test_rows_of_padding_have_names_of_their_own(tokenizer):
    keys = dict(vocabulary(tokenizer, ROWS).keys)
    assert len(keys["add_token_list"]) == len(set(keys["add_token_list"])) == len(keys["add_token_scores"]) == ROWS
    assert keys["add_token_types"][-1] == 5 and not keys["add_add_bos_token"] and keys["add_eos_token_id"] == tokenizer.eod_id
    assert dict(vocabulary(tokenizer, ROWS, "{{ messages }}").keys)["add_chat_template"] == "{{ messages }}"


# -- byte-level BPE ------------------------------------------------------------------------------------------


def byte_level(steps: tuple[str, ...] = (), ignore_merges: bool = False, normalizer=None, added=("<|tool|>",), **settings):
    """A tokenizer of the Hugging Face kind; without steps the words are cut by ByteLevel itself."""
    tk = pytest.importorskip("tokenizers")
    made = tk.Tokenizer(tk.models.BPE(ignore_merges=ignore_merges))
    splits = [tk.pre_tokenizers.Split(tk.Regex(step), "isolated") for step in steps]
    made.pre_tokenizer = tk.pre_tokenizers.Sequence(
        [*splits, tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not steps)])
    made.decoder = tk.decoders.ByteLevel()
    made.normalizer = normalizer
    made.train_from_iterator(documents(), tk.trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(), special_tokens=[END, BOS, TURN],
        show_progress=False))
    made.add_tokens([tk.AddedToken(name, special=False) for name in added])
    config = {"eos_token": END, "bos_token": BOS, "tokenizer_class": "PreTrainedTokenizerFast", **settings}
    return load_tokenizer({"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": json.dumps(config).encode()})


NAMES = {name: key for key, name in PRE_TOKENIZERS.items()}


@pytest.mark.parametrize("name", NAMES)
def test_byte_level(name, tmp_path):
    """Each pre-tokenizer that is chosen by its expressions cuts, in llama.cpp, where the tokenizer does."""
    steps, ignore_merges = NAMES[name]
    tokenizer = byte_level(steps, ignore_merges)
    made = vocabulary(tokenizer, ROWS)
    keys = dict(made.keys)
    assert (keys["add_tokenizer_model"], keys["add_tokenizer_pre"]) == ("gpt2", name)
    texts = [*nasty(), "a <|tool|> b<|tool|>"]
    if name == "tekken":
        assert "combining marks" in made.notes[0]
        texts = [text for text in texts if unicodedata.normalize("NFC", text) == text]
    check(tokenizer, tmp_path, texts)


def test_byte_level_as_gpt_neox(tmp_path):
    """MPT's: ByteLevel cuts by its own expression, runs of spaces are added tokens; NFC before it is noted."""
    tk = pytest.importorskip("tokenizers")
    tokenizer = byte_level(normalizer=tk.normalizers.NFC(), added=[" " * n for n in range(24, 1, -1)], add_bos_token=True)
    made = vocabulary(tokenizer, ROWS)
    assert dict(made.keys)["add_tokenizer_pre"] == "gpt-2" and "normalises text (NFC)" in made.notes[0]
    texts = [*nasty(), *(f"{' ' * n}x{' ' * (30 - n)}" for n in range(30))]
    check(tokenizer, tmp_path, [text for text in texts if text == tk.normalizers.NFC().normalize_str(text)])


def test_an_unknown_pre_tokenizer_is_refused(tmp_path):
    tokenizer = byte_level((r"\p{L}+|\p{N}+|[^\p{L}\p{N}]+",))
    with pytest.raises(InputError, match=r"cuts text like this tokenizer \(\\p\{L\}\+.*known: gpt-2, starcoder, dbrx"):
        write_gguf(InMemory(small(vocab_size=ROWS), {}), tokenizer, tmp_path / "m.gguf")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_json_of_sentencepiece(tmp_path):
    """Llama 2's kind without its tokenizer.model: scores come from the order of the merges."""
    pytest.importorskip("tokenizers")
    from neo.data.tokenizer_export import hf_files
    for preset in ("default", "map_neo"):
        files = hf_files(train(documents(), 420, preset), vocab_rows=ROWS, max_seq_len=64)
        folder = tmp_path / preset
        folder.mkdir()
        tokenizer = load_tokenizer({name: files[name] for name in ("tokenizer.json", "tokenizer_config.json")})
        assert dict(vocabulary(tokenizer, ROWS).keys)["add_tokenizer_model"] == "llama"
        check(tokenizer, folder)
