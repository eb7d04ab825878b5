"""Tokenizers of MPT-7B's and YuLan-Mini's kinds, from a folder as the hub has it to a token store with the library's ids."""

from __future__ import annotations

import json

import numpy as np
import pytest

from neo.cli import invoke
from neo.data import prepare, tokenizer
from neo.data.store import open_source
from neo.data.tokenizer import Tokenizer
from neo.data.tokenizer_export import bpe_merges
from neo.data.tokenizer_training import train
from tests.data.test_tokenizer import texts

tk = pytest.importorskip("tokenizers")

TEXTS = [*texts(20), "  two\n    four      six\t\ttabs", "Café e\u0301 naïve", "東京、狐狸！ 1984", "x" * 300, "   ",
         "About <|endoftext|> and </s>.", "def f(x):\n        return x\n"]
END = "<|endoftext|>"


def mpt(folder):
    """EleutherAI/gpt-neox-20b, as read from its tokenizer.json: byte-level BPE, NFC, id 0 ends a text, id 1 pads, runs
    of 24 to 2 spaces as the last tokens, cut out after normalization. MPT-7B's config.json: more rows than ids."""
    made = tk.Tokenizer(tk.models.BPE())
    made.normalizer = tk.normalizers.NFC()
    made.pre_tokenizer = tk.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tk.decoders.ByteLevel()
    made.post_processor = tk.processors.ByteLevel(trim_offsets=True)
    made.train_from_iterator(texts(60), tk.trainers.BpeTrainer(
        vocab_size=477, initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(), special_tokens=[END, "<|padding|>"],
        show_progress=False))
    made.add_tokens([tk.AddedToken(" " * count, normalized=True, special=False) for count in range(24, 1, -1)])
    assert made.get_vocab_size() == 500 and made.token_to_id(" " * 24) == 477
    special = {"bos_token": END, "eos_token": END, "unk_token": END}
    return save(folder, made, {"tokenizer_class": "GPTNeoXTokenizer", "add_prefix_space": False, **special},
                special_tokens_map=special, config={"model_type": "mpt", "vocab_size": 768})


def yulan(folder):
    """yulan-team/YuLan-Mini has, as far as its config and lineage tell, tokenizer.json alone: SentencePiece-like BPE with byte
    fallback, a leading space, <s> before a text; more special tokens among the others (102 is <pad>), no row unused."""
    proto = train(texts(60), 500, "map_neo").proto
    merges = bpe_merges(proto)
    vocab = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    parts = {part for merge in merges for part in merge}
    for name in ("<pad>", "<reasoning_step>", "<|start_header_id|>"):  # each in the place of a piece
        old = next(a + b for a, b in reversed(merges) if a + b not in parts and a + b in vocab)
        vocab[name] = vocab.pop(old)
        merges = [(a, b) for a, b in merges if a + b != old]
    made = tk.Tokenizer(tk.models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = tk.normalizers.Sequence([tk.normalizers.Prepend("▁"), tk.normalizers.Replace(" ", "▁")])
    steps = tk.decoders
    made.decoder = steps.Sequence([steps.Replace("▁", " "), steps.ByteFallback(), steps.Fuse(), steps.Strip(" ", 1, 0)])
    made.add_special_tokens([tk.AddedToken(name, normalized=False, special=True) for name in (
        "<unk>", "<s>", "</s>", "<pad>", "<reasoning_step>", "<|start_header_id|>")])
    made.post_processor = tk.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    assert made.get_vocab_size() == 500 and made.token_to_id("<pad>") < 490
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    return save(folder, made, {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
                               "add_prefix_space": None, **special}, special_tokens_map=special,
                config={"model_type": "llama", "vocab_size": 500, "bos_token_id": 1, "eos_token_id": 2,
                        "pad_token_id": made.token_to_id("<pad>")})


def save(folder, made, settings, **others):
    folder.mkdir()
    (folder / "tokenizer.json").write_text(made.to_str())
    for name, content in {"tokenizer_config": settings, **others}.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return made


def command(capfd, module, *argv):
    code = invoke(module.COMMAND, module.run, [str(word) for word in argv])
    captured = capfd.readouterr()
    assert code == 0, captured.err
    return captured.out


@pytest.mark.parametrize("kind, eod, bos, rows", [(mpt, 0, None, 768), (yulan, 2, 1, 512)], ids=["mpt", "yulan"])
def test_a_store_has_the_ids_of_the_library(kind, eod, bos, rows, tmp_path, capfd):
    library = kind(tmp_path / "hub")
    library.encode_special_tokens = True  # a special token written out in a document is text
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    out = command(capfd, tokenizer, "import", tmp_path / "hub", f"--out={tmp_path / 'tok'}")
    assert f"end of document is id {eod} " in out and f"rows of the model {rows}" in out
    assert ("texts begin with <s>" in out) == (bos is not None)
    out = command(capfd, prepare, tmp_path / "in.jsonl", f"--out={tmp_path / 'store'}", "--source=text", "--validation=0",
                  f"--tokenizer={tmp_path / 'tok'}", "--workers=1")
    assert f"c.model.vocab_size = {rows}   # at least 500" in out

    split = open_source(str(tmp_path / "store" / "text")).splits["train"]
    tokens = split.tokens(0, split.num_tokens).tolist()
    ends = [place + 1 for place, token in enumerate(tokens) if token == eod]
    documents = [tokens[start:end] for start, end in zip([0, *ends], ends, strict=False)]
    written = [text for text in TEXTS if text.strip()]
    first = [] if bos is None else [bos]
    expected = [[*first, *library.encode(text, add_special_tokens=False).ids, eod] for text in written]
    assert ends[-1] == len(tokens) and sorted(documents) == sorted(expected)
    stored = Tokenizer.load(str(tmp_path / "store"))
    assert (stored.eod_id, stored.add_bos, stored.padded_vocab_size) == (eod, bos is not None, rows)
    for text in written:
        shown = stored.decode(stored.encode(text))
        assert shown == (tk.normalizers.NFC().normalize_str(text) if kind is mpt else text)


def test_documents_without_bos_as_yulan_mini_was_trained(tmp_path, capfd):
    library = yulan(tmp_path / "hub")
    out = command(capfd, tokenizer, "import", tmp_path / "hub", f"--out={tmp_path / 'tok'}", "--no_bos", "--pad_vocab_to=100")
    assert "texts begin" not in out and "rows of the model 500" in out
    ours = Tokenizer.load(str(tmp_path / "tok"))
    ids = library.encode("the quick fox", add_special_tokens=False).ids
    assert ours.encode_document("the quick fox", np.uint16).tolist() == [*ids, 2] and ours.encode_prompt("the quick fox") == ids
