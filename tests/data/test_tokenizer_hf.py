"""Tokenizers of Hugging Face folders: tiny ones of each kind, made here with the package tokenizers."""

from __future__ import annotations

import dataclasses
import json
import pickle
import re
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from neo.cli import invoke
from neo.data import prepare, tokenizer, tokenizer_hf
from neo.data.store import open_source
from neo.data.tokenizer import Tokenizer, load_tokenizer
from neo.data.tokenizer_export import hf_files
from neo.data.tokenizer_hf import HFTokenizer, byte_of, from_hf_folder
from neo.data.tokenizer_training import train
from neo.errors import InputError
from tests.data.test_tokenizer import texts

tk = pytest.importorskip("tokenizers")

FIXTURES = Path(__file__).parent / "fixtures"

LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
QWEN2 = LLAMA3.replace("{1,3}", "")
END, BOS = "<|endoftext|>", "<|begin_of_text|>"


def byte_level(pattern: str = "", *, specials=(END,), normalizer=None, bos: str = "", size: int = 400):
    """A byte-level BPE as of GPT-NeoX (no pattern), Llama 3 or Qwen2."""
    made = tk.Tokenizer(tk.models.BPE())
    split = [tk.pre_tokenizers.Split(tk.Regex(pattern), "isolated")] if pattern else []
    made.pre_tokenizer = tk.pre_tokenizers.Sequence(
        [*split, tk.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)])
    made.decoder = tk.decoders.ByteLevel()
    made.normalizer = normalizer
    made.train_from_iterator(texts(60), tk.trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=tk.pre_tokenizers.ByteLevel.alphabet(), special_tokens=list(specials),
        show_progress=False))
    if bos:
        made.post_processor = tk.processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[
            (bos, made.token_to_id(bos))])
    return made


def sentencepiece_like():
    """As Llama 2's tokenizer.json: BPE with byte fallback and a leading space."""
    content = hf_files(train(texts(60), 350, "map_neo"), vocab_rows=400, max_seq_len=8, add_bos=True)["tokenizer.json"]
    return tk.Tokenizer.from_str(content.decode())


KINDS = {
    "gpt_neox": (byte_level, {"bos_token": END, "eos_token": END}),
    "llama3": (lambda: byte_level(LLAMA3, specials=(BOS, END), bos=BOS), {"bos_token": BOS, "eos_token": END}),
    "qwen2": (lambda: byte_level(QWEN2, specials=(END, "<|im_start|>"), normalizer=tk.normalizers.NFC()),
              {"bos_token": None, "eos_token": {"__type": "AddedToken", "content": END}, "add_bos_token": False}),
    "llama2": (sentencepiece_like, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}),
}


def write(path, made, settings, **others):
    """A folder as the hub has them."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "tokenizer.json").write_text(made.to_str())
    if settings is not None:
        settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **settings}
        (path / "tokenizer_config.json").write_text(json.dumps(settings))
    for name, content in others.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return str(path)


@pytest.fixture(scope="module", params=KINDS)
def found(request, tmp_path_factory):
    make, config = KINDS[request.param]
    folder = write(tmp_path_factory.mktemp("hf") / request.param, make(), config)
    return request.param, folder, from_hf_folder(folder)


@pytest.fixture(scope="module")
def neox(tmp_path_factory):
    return from_hf_folder(write(tmp_path_factory.mktemp("hf") / "neox", byte_level(), KINDS["gpt_neox"][1]))


def test_ids_of_what_is_special(found):
    name, _, ours = found
    expected = {"gpt_neox": (0, 0, False), "llama3": (0, 1, True), "qwen2": (-1, 0, False), "llama2": (1, 2, True)}
    assert (ours.bos_id, ours.eod_id, ours.add_bos) == expected[name] and ours.eos_ids == (ours.eod_id,)
    assert ours.piece(ours.eod_id) == (END if name != "llama2" else "</s>")
    assert ours.vocab_size == {"llama2": 355}.get(name, 400)


@hypothesis.given(text=st.text() | st.text(" \n\tdef狐1") | st.lists(st.sampled_from(
    [END, "<s>", "e\u0301", "\ud800", "\x00", "👩\u200d👩", "  \n\n", "a" * 300, "שלום"])).map("".join))
@hypothesis.settings(max_examples=200, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_any_text_comes_back_and_never_ends_itself(found, text):
    name, _, ours = found
    ids = ours.encode(text)
    text = text.encode("utf-8", "replace").decode()
    assert all(0 <= i < ours.vocab_size for i in ids)
    if name != "llama2":  # which shows its own sign for a space as one
        expected = tk.normalizers.NFC().normalize_str(text) if name == "qwen2" else text
        assert ours.decode(ids) == expected
        assert ours.token_bytes[ids].sum() == len(expected.encode())
    else:
        assert ours.decode(ids) == text.replace("\u2581", " ")
        assert ours.token_bytes[ids].sum() == len(text.replace("\u2581", " ").encode()) + bool(text)
    assert not {ours.eod_id, ours.bos_id} & set(ids)
    document = ours.encode_document(text, np.uint16)
    assert document.dtype == np.uint16 and document.tolist() == [*[ours.bos_id] * ours.add_bos, *ids, ours.eod_id]


def test_prompts_are_what_transformers_makes_of_them(found):
    transformers = pytest.importorskip("transformers")
    _, folder, ours = found
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    for text in ("", "the fox", "  def x:\n\n\treturn 12", f"a{END}b", "狐狸é", "<|im_start|>user\n", " </s>x"):
        assert ours.encode_prompt(text) == theirs(text)["input_ids"], text
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert theirs.eos_token_id == ours.eod_id and len(theirs) == ours.vocab_size


def test_long_texts_are_cut_where_it_makes_no_difference(found, monkeypatch):
    name, _, ours = found
    text = "".join(texts(20)).replace("\n    ", "\n") + "\n\n  \n don't\r\nstop.\nNow " + "no line end " * 60 + "x\nThe end\n"
    whole = ours.encode(text)
    monkeypatch.setattr(tokenizer_hf, "STRETCH", 100)
    pieces = list(ours._encode_stretches(text))
    assert [i for ids in pieces for i in ids] == whole
    assert len(pieces) > 5 if name != "llama2" else len(pieces) == 1
    assert ours.encode_document(text, np.uint16).tolist() == [*[ours.bos_id] * ours.add_bos, *whole, ours.eod_id]


@hypothesis.given(before=st.text("ab1.,! \n\r\t'狐", max_size=12), after=st.text("ab1.,! \n\r\t'狐", max_size=12))
@hypothesis.settings(max_examples=300, deadline=None, suppress_health_check=list(hypothesis.HealthCheck))
def test_lines_can_be_cut_apart(found, before, after):
    _, _, ours = found
    text = f"{before}.\nb{after}"
    if ours._lines_apart:
        for match in tokenizer_hf.LINE_END.finditer(text):
            assert ours.encode(text[:match.end()]) + ours.encode(text[match.end():]) == ours.encode(text)


def test_unknown_patterns_are_not_cut(tmp_path):
    made = byte_level(r"\s+|\S+")
    ours = from_hf_folder(write(tmp_path / "a", made, {"eos_token": END}))
    assert not ours._lines_apart and ours.pre_tokenizer_patterns == (r"\s+|\S+",)


def test_decoding_leaves_out_what_is_no_text(neox):
    ids = [neox.eod_id, *neox.encode("fox"), 400, 10**6]
    assert neox.decode(ids) == "fox"
    assert neox.decode(neox.encode("é")[:1]) == "\ufffd"
    with pytest.raises(ValueError, match="negative"):
        neox.decode([-1])


def test_files_round_trip(found, tmp_path):
    _, folder, ours = found
    assert Tokenizer.load(folder) == Tokenizer.load(f"{folder}/tokenizer.json") == ours
    ours.save(str(tmp_path / "store" / "tokenizer"))
    again = Tokenizer.load(str(tmp_path / "store"))
    assert again == ours == load_tokenizer(ours.files()) == Tokenizer.from_files(ours.files())
    assert pickle.loads(pickle.dumps(ours)).sha256 == again.sha256 == ours.sha256  # noqa: S301  (our own bytes)
    handed = hf_files(ours, vocab_rows=512, max_seq_len=8)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        with open(f"{folder}/{name}", "rb") as file:
            assert handed[name] == file.read()
    with pytest.raises(InputError, match="rows"):
        hf_files(ours, vocab_rows=ours.vocab_size - 1, max_seq_len=8)
    with pytest.raises(InputError, match="own files say"):
        hf_files(ours, vocab_rows=512, max_seq_len=8, add_bos=not ours.add_bos)


def test_a_folder_changed_by_others_is_read_anew(neox, tmp_path):
    neox.save(str(tmp_path))
    made = byte_level()
    made.add_tokens(["<new>"])
    (tmp_path / "tokenizer.json").write_text(made.to_str())
    assert from_hf_folder(str(tmp_path)).vocab_size == 401


def test_the_digest_is_that_of_the_tokens(neox):
    contents = dict(neox.contents)
    other = dataclasses.replace(neox, contents=tuple({**contents, "chat_template.jinja": b"x"}.items()))
    assert other.sha256 == neox.sha256 != dataclasses.replace(neox, eod_id=5, eos_ids=(5,)).sha256


def test_digests_of_stores_made_before_stay():
    old = Tokenizer.load(str(FIXTURES / "tokenizer_v1"))
    assert old.sha256 == "6347fed6587722c6aea1c90086219554a9c0e5ba3d0f52f42b4ecb9ba6bce46d"
    assert (old.vocab_size, old.eod_id, old.bos_id, old.add_bos) == (332, 331, 1, False)
    assert old.encode("def fox\n 12 é") == [288, 308, 272, 296, 328, 3, 293, 312, 55, 293, 200, 174]


def test_tokenizers_of_this_version_stay_readable():
    kept = Tokenizer.load(str(FIXTURES / "tokenizer_v2"))
    assert isinstance(kept, HFTokenizer) and kept.sha256 == (
        "b7e13c4547825d99d9912a92a80397f97575fcd633deb8b32f61bcb24405ea2b")
    assert (kept.vocab_size, kept.eod_id, kept.eos_ids, kept.bos_id, kept.add_bos) == (300, 1, (1, 2), 0, True)
    assert kept.encode("def fox\n 12 é") == [70, 71, 72, 267, 81, 90, 201, 223, 19, 20, 223, 130, 105]


# Where a folder says what


def test_ids_from_the_files_of_the_model(tmp_path):
    made = byte_level(specials=(BOS, END, "<|eot|>"))
    ours = from_hf_folder(write(tmp_path / "a", made, None, config={"bos_token_id": 0, "eos_token_id": [1, 2]}))
    assert (ours.bos_id, ours.eod_id, ours.eos_ids, ours.add_bos) == (0, 1, (1, 2), False)
    ours = from_hf_folder(write(tmp_path / "b", made, {"eos_token": "<|eot|>"}, generation_config={"eos_token_id": [1, 2]},
                                config={"text_config": {"bos_token_id": 0, "vocab_size": 400}}))
    assert (ours.bos_id, ours.eod_id, ours.eos_ids) == (0, 2, (2, 1))
    assert from_hf_folder(str(tmp_path / "b"), eod_id=1).eos_ids == (1, 2)
    ours = from_hf_folder(write(tmp_path / "c", made, None, special_tokens_map={"eos_token": {"content": END}}))
    assert (ours.bos_id, ours.eod_id) == (-1, 1)
    write(tmp_path / "d", made, None)
    with pytest.raises(InputError, match="no file says which token ends a document"):
        from_hf_folder(str(tmp_path / "d"))
    assert from_hf_folder(str(tmp_path / "d"), eod_id=1).eod_id == 1
    told = {"bos_token": BOS, "eos_token": END}
    with_template = byte_level(specials=(BOS, END), bos=BOS)
    assert from_hf_folder(write(tmp_path / "e", with_template, {"eos_token": END})).bos_id == 0
    for expected, config in ((True, told), (False, {**told, "add_bos_token": False})):
        assert from_hf_folder(write(tmp_path / "f", with_template, config)).add_bos is expected
    assert from_hf_folder(write(tmp_path / "g", made, {**told, "add_bos_token": True})).add_bos is True


def test_tokens_past_the_rows_of_the_model(tmp_path):
    made = byte_level()
    made.add_special_tokens(["<image>"])
    path = write(tmp_path / "a", made, KINDS["gpt_neox"][1], config={"vocab_size": 400})
    ours = from_hf_folder(path)  # a text model's tokenizer with the image token of a larger relative
    assert ours.vocab_size == 400 and max(ours.encode_prompt("<image>")) < 400 and ours.decode([400]) == ""
    assert load_tokenizer(ours.files()) == ours and max(load_tokenizer(ours.files()).encode_prompt("<image>")) < 400
    write(tmp_path / "b", made, KINDS["gpt_neox"][1], config={"vocab_size": 399})
    with pytest.raises(InputError, match="vocab_size=399: this tokenizer belongs to another model"):
        from_hf_folder(str(tmp_path / "b"))
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "tokenizer.model").write_bytes(train(texts(60), 350).model)
    (tmp_path / "c" / "config.json").write_text(json.dumps({"vocab_size": 349}))
    with pytest.raises(InputError, match="vocab_size=349: this tokenizer belongs to another model"):
        from_hf_folder(str(tmp_path / "c"))


def test_folders_with_a_sentencepiece_model_alone(tmp_path):
    model = train(texts(60), 350).model
    (tmp_path / "tokenizer.model").write_bytes(model)
    assert from_hf_folder(str(tmp_path)) == Tokenizer(model, 1, 2, (), True)  # as LlamaTokenizer reads it
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": 351, "<|x|>": 350}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False, "eos_token": "<|end|>"}))
    assert Tokenizer.load(str(tmp_path)) == Tokenizer(model, 1, 351, ("<|x|>", "<|end|>"), False)
    assert from_hf_folder(str(tmp_path), eod_id=2).eod_id == 2
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|end|>": 352}))
    with pytest.raises(InputError, match="do not follow"):
        from_hf_folder(str(tmp_path))


def test_bad_folders_are_one_line(tmp_path):
    made = byte_level()
    good, config = json.loads(made.to_str()), {"eos_token": END}
    map_panics = {"type": "Precompiled", "precompiled_charsmap": "AAAA"}
    cases = {
        "damaged": ("{", config), "damaged|not a tokenizer.json": ("[]", config), "not a tokenizer.json": ("{}", config),
        "that tokenizers .* reads": (json.dumps({**good, "normalizer": map_panics}), config),
        "ids up to": (json.dumps({**good, "model": {**good["model"], "vocab": {"a": 4_000_000_000}, "merges": []},
                                  "added_tokens": []}), config),
        "no file says": (json.dumps(good), {"eos_token": "<none>"}),
    }
    for number, (message, (content, settings)) in enumerate(cases.items()):
        path = tmp_path / str(number)
        write(path, made, settings)
        (path / "tokenizer.json").write_text(content)
        with pytest.raises(InputError, match=message) as caught:
            Tokenizer.load(str(path))
        assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    write(tmp_path / "config", made, config)
    (tmp_path / "config" / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config.json: damaged, not JSON"):
        Tokenizer.load(str(tmp_path / "config"))
    (tmp_path / "slow").mkdir()
    (tmp_path / "slow" / "vocab.json").write_text("{}")
    with pytest.raises(InputError, match="vocab.json with merges.txt alone"):
        from_hf_folder(str(tmp_path / "slow"))
    with pytest.raises(InputError, match="no such folder"):
        from_hf_folder(str(tmp_path / "nowhere"))


def test_damaged_copies_are_refused(neox):
    files, meta = neox.files(), json.loads(neox.files()["neo_tokenizer.json"])
    for change, message in (({"version": 3}, "version 3"), ({"kind": "pickle"}, "damaged"), ({"eod_id": "0"}, "damaged"),
                            ({"vocab_size": 401}, "vocab_size is 401"), ({"eod_id": 400, "eos_ids": []}, "outside"),
                            ({"bos_id": -1, "add_bos": True}, "outside")):
        with pytest.raises(InputError, match=message) as caught:
            load_tokenizer({**files, "neo_tokenizer.json": json.dumps({**meta, **change}).encode()}, "the place")
        assert str(caught.value).startswith("the place")
    with pytest.raises(InputError, match=r"tokenizer.json is not the one"):
        load_tokenizer({**files, "tokenizer.json": files["tokenizer.json"] + b" "}, "the place")
    with pytest.raises(InputError, match=r"tokenizer.json is missing"):
        load_tokenizer({"neo_tokenizer.json": files["neo_tokenizer.json"]}, "the place")


def test_the_package_is_asked_for(neox, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(InputError, match=r"\[hf\]"):
        load_tokenizer(neox.files(), "store/tokenizer")


# What GGUF is written from


def test_vocabulary_merges_and_patterns(found):
    name, _, ours = found
    assert len(ours.vocabulary) == ours.vocab_size and ours.is_byte_level == (name != "llama2")
    assert ours.model_type == "BPE" and len(ours.merges) > 50
    assert ours.pre_tokenizer_patterns == {"gpt_neox": (tokenizer_hf.GPT2_PATTERN,), "llama3": (LLAMA3,), "qwen2": (QWEN2,),
                                           "llama2": ()}[name]
    pieces = ours.gguf_pieces()
    assert len(pieces) == ours.vocab_size and pieces[ours.eod_id][2] == tokenizer.CONTROL
    if ours.is_byte_level:
        for i, (piece, _, kind) in enumerate(pieces):
            assert kind == (tokenizer.CONTROL if i in ours.added_tokens else tokenizer.NORMAL)
            if kind == tokenizer.NORMAL:
                assert len(bytes(byte_of()[c] for c in piece.decode())) == ours.token_bytes[i]
        assert ours.byte_tokens.sum() == 128
    else:
        assert [kind for _, _, kind in pieces[:4]] == [tokenizer.UNKNOWN, tokenizer.CONTROL, tokenizer.CONTROL, tokenizer.BYTE]
        order = [score for piece, score, kind in pieces if kind == tokenizer.NORMAL and len(piece.decode()) > 1]
        assert order == sorted(order, reverse=True) and ours.byte_tokens.sum() == 256


def test_the_byte_alphabet_is_that_of_the_package():
    assert sorted(byte_of()) == sorted(tk.pre_tokenizers.ByteLevel.alphabet())
    assert tk.decoders.ByteLevel().decode([next(c for c, byte in byte_of().items() if byte == 0x20)]) == " "
    assert len(set(byte_of().values())) == 256 and byte_of()["A"] == 0x41


def test_a_sentencepiece_model_beside_the_json_gives_the_scores(tmp_path):
    own = train(texts(60), 350, "map_neo")
    folder = write(tmp_path / "a", sentencepiece_like(), KINDS["llama2"][1])
    assert from_hf_folder(folder).sentencepiece is None
    (tmp_path / "a" / "tokenizer.model").write_bytes(own.model)
    ours = from_hf_folder(folder)
    assert isinstance(ours, HFTokenizer) and ours.gguf_pieces() == own.gguf_pieces()
    assert ours.sentencepiece == Tokenizer(own.model, 1, 2, own.extra_tokens, True)
    (tmp_path / "a" / "tokenizer.model").write_bytes(train(texts(60), 340, "map_neo").model)
    assert from_hf_folder(folder).sentencepiece is None  # another model's
    (tmp_path / "a" / "tokenizer.model").write_bytes(b"IQ== 0\n")
    assert from_hf_folder(folder).sentencepiece is None  # tiktoken's


def test_pieces_of_a_sentencepiece_model():
    own = train(texts(60), 350)
    pieces = own.gguf_pieces()
    assert [(name, kind) for name, _, kind in pieces[:4]] == [(b"<unk>", 2), (b"<s>", 3), (b"</s>", 3), (b"\n", 4)]
    assert dataclasses.replace(own, extra_tokens=("<x>",)).gguf_pieces() == [*pieces, (b"<x>", 0.0, 3)]
    assert own.byte_tokens.sum() == 256


# The commands


def command(capfd, module, *argv):
    code = invoke(module.COMMAND, module.run, [str(word) for word in argv])
    captured = capfd.readouterr()
    return code, captured.out, captured.err


def test_a_store_is_prepared_with_a_folder(tmp_path, capfd, neox):
    (tmp_path / "in").mkdir()
    documents = {f"{i}.txt": text for i, text in enumerate([*texts(20), f"About {END} and its kin."])}
    for name, text in documents.items():
        (tmp_path / "in" / name).write_text(text)
    source = write(tmp_path / "hub", byte_level(), KINDS["gpt_neox"][1], config={"vocab_size": 512})

    code, out, err = command(capfd, prepare, tmp_path / "in", f"--out={tmp_path / 'store'}", "--source=text",
                             f"--tokenizer={source}", "--workers=2")
    assert code == 0, err
    there = Tokenizer.load(str(tmp_path / "store"))
    assert there == dataclasses.replace(neox, padded_size=512) and there.sha256 == neox.sha256
    assert "c.model.vocab_size = 512   # at least 400" in out
    source_of_text = open_source(str(tmp_path / "store" / "text"))
    assert source_of_text.tokenizer_sha256 == neox.sha256
    code, out, err = command(capfd, prepare, tmp_path / "in", f"--out={tmp_path / 'store'}", "--source=more", "--seed=1")
    assert code == 0, err  # with the store's own tokenizer
    code, out, err = command(capfd, tokenizer, "import", source, f"--out={tmp_path / 'tok'}")
    assert code == 0 and neox.sha256 in out and f"{END}" in out
    code, out, err = command(capfd, tokenizer, "import", f"{source}/tokenizer.json", f"--out={tmp_path / 'tok'}")
    assert code == 0 and "finished already" in out
    code, out, err = command(capfd, tokenizer, "report", tmp_path / "tok", tmp_path / "in", "--json")
    result = json.loads(out)
    assert code == 0 and result["round_trip_failures"] == 0 and result["bytes_per_token"] > 1
    assert result["tokens"] + len(documents) == sum(split.num_tokens for split in source_of_text.splits.values())

    model = tmp_path / "other.model"
    model.write_bytes(train(texts(60), 350).model)
    code, _, err = command(capfd, tokenizer, "import", model, f"--out={tmp_path / 'tok'}")
    assert code == 2 and "another tokenizer" in err
    code, _, _ = command(capfd, tokenizer, "import", model, f"--out={tmp_path / 'tok'}", "--overwrite")
    assert code == 0 and sorted(p.name for p in (tmp_path / "tok").iterdir()) == ["neo_tokenizer.json", "tokenizer.model"]
    code, _, err = command(capfd, tokenizer, "import", source, f"--out={tmp_path / 'x'}", "--extra_token=<x>")
    assert code == 2 and re.search(r"--extra_token=<x>: a tokenizer.json has its own", err)
    code, out, _ = command(capfd, tokenizer, "import", source, f"--out={tmp_path / 'y'}", "--eod_id=7")
    assert code == 0 and Tokenizer.load(str(tmp_path / "y")).eod_id == 7
