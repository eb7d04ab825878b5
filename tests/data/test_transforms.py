"""Fill-in-the-middle, reversal and canaries: pure functions of text, seed, id and variant."""

from __future__ import annotations

import dataclasses
import json
import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from neo.data import fim, reversal, tokenizer_training
from neo.data.canary import read_canaries
from neo.data.draws import below, chosen, draw
from neo.data.fim import Sentinels
from neo.data.records import Document, ReadOptions
from neo.data.tokenizer import Tokenizer
from neo.data.transforms import Transforms, continued, plain, transformed
from neo.errors import InputError

TEXT = st.text(st.sampled_from("abc ABC\n\t.,é狐🦊\u00a0"), max_size=60)
SENTINELS = Sentinels(900, 901, 902)
DTYPE = np.dtype("<u2")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    texts = (f"the {word} fox says {i} times naïve 狐狸" for i in range(50) for word in ("quick", "slow"))
    trained = tokenizer_training.train(texts, 300)
    return dataclasses.replace(trained, extra_tokens=fim.TOKENS)


def document(text: str, name: str = "d") -> Document:
    return Document(name, text, 0, 1)


# Draws


def test_draws_are_fixed_for_ever():
    # A change here would transform other documents in stores that exist.
    assert draw("fim", 7, "a.txt", 2) == GOLDEN
    assert len({draw("fim", 7, "a.txt"), draw("fim", 8, "a.txt"), draw("fim", 7, "b.txt"), draw("x", 7, "a.txt"),
                draw("fim", 7, "a.txt", 1)}) == 5


GOLDEN = 2373573553611132421


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("variant", [0, 1, 6])
def test_a_rate_is_kept_within_chance(rate, variant):
    count = sum(chosen(rate, "fim", 1, f"doc {i}", variant) for i in range(5000))
    assert abs(count - 5000 * rate) <= 4 * math.sqrt(5000 * rate * (1 - rate))


@pytest.mark.parametrize("rate, variants, counts", [
    (0.5, 2, {1}), (0.5, 8, {4}), (0.25, 4, {1}), (0.3, 8, {2, 3}), (1, 3, {3})])
def test_the_variants_of_a_document_share_out_its_rate(rate, variants, counts):
    found = {sum(chosen(rate, "reverse", 3, f"doc {i}", variant) for variant in range(variants)) for i in range(300)}
    assert found == counts


def test_whole_numbers_are_uniform():
    counts = np.bincount([below(4, "fim a", 0, str(i)) for i in range(4000)], minlength=4)
    assert len(counts) == 4 and (abs(counts - 1000) < 4 * math.sqrt(4000 * 3 / 16)).all()


# Fill-in-the-middle


def test_the_two_orders_are_those_of_megatron():
    assert fim.arrange([1, 2], [3], [4, 5], SENTINELS, spm=False) == [900, 1, 2, 901, 4, 5, 902, 3]
    assert fim.arrange([1, 2], [3], [4, 5], SENTINELS, spm=True) == [900, 901, 4, 5, 902, 1, 2, 3]


IDS = st.lists(st.integers(0, 899), max_size=6)


@hypothesis.given(prefix=IDS, middle=IDS, suffix=IDS, spm=st.booleans())
def test_restore_undoes_arrange(prefix, middle, suffix, spm):
    assert fim.restore(fim.arrange(prefix, middle, suffix, SENTINELS, spm), SENTINELS) == prefix + middle + suffix
    assert fim.restore(prefix, SENTINELS) == prefix


@pytest.mark.parametrize("tokens", [[900, 1, 902, 901], [900, 901], [902], [900, 901, 902, 902]])
def test_restore_refuses_other_orders(tokens):
    with pytest.raises(ValueError, match="once each"):
        fim.restore(tokens, SENTINELS)


@hypothesis.given(text=TEXT, seed=st.integers(0, 9), variant=st.integers(0, 3))
def test_a_split_loses_no_character(text, seed, variant):
    parts = fim.split(text, seed, "d", variant)
    assert "".join(parts) == text and parts == fim.split(text, seed, "d", variant)


def test_cuts_are_uniform_over_characters():
    places = [len(part) for i in range(3000) for part in fim.split("abc", 0, str(i))[:1]]
    # The lower of two cuts among 4 places is 0, 1, 2, 3 in 7, 5, 3, 1 of 16 cases.
    for place, share in enumerate((7, 5, 3, 1)):
        assert abs(places.count(place) - 3000 * share / 16) < 4 * math.sqrt(3000 * share / 16)


@hypothesis.given(text=TEXT.filter(lambda text: text.strip()), name=st.text("ab", max_size=3), variant=st.integers(0, 3))
def test_the_tokens_of_a_document_give_its_text_back(tokenizer, text, name, variant):
    sentinels = fim.find_sentinels(tokenizer, fim.TOKENS)
    for spm_rate, flag in ((0.0, 1), (1.0, 2)):
        transforms = Transforms(fim_rate=1.0, fim_spm_rate=spm_rate)
        tokens, prompt, flags = transformed(document(text, name), tokenizer, DTYPE, transforms, 5, variant)
        assert (prompt, flags, tokens[-1], tokens.dtype) == (0, flag, tokenizer.eod_id, DTYPE)
        assert tokens.tolist().count(tokenizer.eod_id) == 1
        prefix, middle, suffix = (tokenizer.encode(part) for part in fim.split(text, 5, name, variant))
        assert tokens[:-1].tolist() == fim.arrange(prefix, middle, suffix, sentinels, spm=bool(spm_rate))
        assert fim.restore(tokens[:-1].tolist(), sentinels) == prefix + middle + suffix
        assert tokenizer.decode(prefix + middle + suffix) == text


def test_documents_that_draw_nothing_are_plain(tokenizer):
    transforms = Transforms(fim_rate=0.5, reverse="word", reverse_rate=0.2)
    flags = []
    for i in range(2000):
        one = document("the quick fox", str(i))
        tokens, _, flag = transformed(one, tokenizer, DTYPE, transforms, 1)
        flags.append(flag)
        if not flag:
            assert tokens.tolist() == plain(one, tokenizer, DTYPE).tokens.tolist()
    shares = {0: 0.4, 1: 0.2, 2: 0.2, 4: 0.1, 5: 0.05, 6: 0.05}  # each of the three draws is independent
    assert set(flags) == set(shares)
    for flag, share in shares.items():
        assert abs(flags.count(flag) - 2000 * share) < 4 * math.sqrt(2000 * share * (1 - share))


@pytest.mark.parametrize("names, message", [
    (("<fim_prefix>", "<fim_suffix>"), "three different"), (("<fim_prefix>",) * 3, "three different"),
    (("<fim_prefix>", "<fim_sufix>", "<fim_middle>"), "<fim_sufix> is no special token of the tokenizer (did you mean "
                                                      "'<fim_suffix>'?); make a tokenizer that has them: python -m "
                                                      "neo.data.tokenizer import FOLDER --out=NEW_FOLDER "
                                                      "--extra_token='<fim_prefix>' --extra_token='<fim_suffix>' "
                                                      "--extra_token='<fim_middle>' --extra_token='<fim_sufix>'"),
    (("<fim_prefix>", "the", "<fim_middle>"), "the is no special token")])
def test_tokens_that_the_tokenizer_lacks(tokenizer, names, message):
    with pytest.raises(InputError) as caught:
        fim.find_sentinels(tokenizer, names)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_sentinels_of_a_hugging_face_tokenizer():
    tokenizers = pytest.importorskip("tokenizers")
    from neo.data.tokenizer_hf import from_hf_files
    made = tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0, "b": 1}, []))
    made.add_special_tokens(["<eos>", "<P>", "<S>", "<M>"])
    made.add_tokens(["<plain>"])
    files = {"tokenizer.json": made.to_str().encode(), "tokenizer_config.json": b'{"eos_token": "<eos>"}'}
    tokenizer = from_hf_files(files, "here")
    assert fim.find_sentinels(tokenizer, ("<P>", "<S>", "<M>")) == (3, 4, 5)
    one = dataclasses.replace(document("a<S>b"), prompt="<P>b")
    tokens, prompt, _ = plain(one, tokenizer, DTYPE)
    assert tokens[:prompt].tolist() == tokenizer.encode_prompt("<P>b") == [3, 1], "as it is read when the model is used"
    assert 4 not in tokens, "what is learned cannot contain a special token by accident"
    with pytest.raises(InputError, match="<plain> is no special token.*name those of this tokenizer"):
        fim.find_sentinels(tokenizer, ("<P>", "<S>", "<plain>"))


def test_text_inside_a_document_gets_no_space_of_its_own(tmp_path):
    import io

    import sentencepiece

    from neo.data.tokenizer import from_model
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick fox and the slow fox"] * 20), model_writer=model, vocab_size=300, model_type="bpe",
        add_dummy_prefix=True, remove_extra_whitespaces=False, byte_fallback=True, hard_vocab_limit=False,
        minloglevel=2)
    tokenizer = from_model(model.getvalue(), "here")
    assert tokenizer.decode(tokenizer.encode("a") * 2) == "a a"
    for left, right in (("the quick", " fox"), ("the qu", "ick fox"), ("the ", "fox"), ("the", "")):
        assert tokenizer.decode(tokenizer.encode(left) + continued(tokenizer, right)) == left + right


# Reversal


@hypothesis.given(TEXT)
def test_reversing_words_twice_gives_the_text_back(text):
    assert reversal.reverse_words(reversal.reverse_words(text)) == text
    assert reversal.reverse_words(text).split() == text.split()[::-1]


@hypothesis.given(TEXT)
def test_names_keep_their_order(text):
    units = reversal.units(text)
    assert "".join(units) == text
    assert reversal.reverse_keeping_entities(text) == "".join(units[::-1])
    for unit in units:
        words = unit.split()
        assert len(words) <= 1 or all(word[0].isupper() for word in words)
        assert all(word[-1].isalnum() for word in words[:-1]), "a punctuation mark ends a name"


def test_reversal_by_name():
    assert reversal.reverse_words("Paris is  the capital.") == "capital. the  is Paris"
    text = "In May, Barack Obama met Angela Merkel. She  spoke"
    assert reversal.reverse_keeping_entities(text) == "spoke  She Angela Merkel. met Barack Obama In May,"
    assert reversal.reverse_words("one two") == reversal.reverse_keeping_entities("one two") == "two one"


@pytest.mark.parametrize("unit", reversal.UNITS)
def test_reversed_documents(tokenizer, unit):
    text = "The Quick Fox says naïve 7 times"
    tokens, _, flags = transformed(document(text), tokenizer, DTYPE, Transforms(reverse=unit, reverse_rate=1.0), 0)
    assert flags == 4 and tokens[-1] == tokenizer.eod_id
    body = tokens[:-1].tolist()
    if unit == "token":
        assert body[::-1] == tokenizer.encode(text)
    else:
        assert tokenizer.decode(body) == {"word": "times 7 naïve says Fox Quick The",
                                          "entity": "times 7 naïve says The Quick Fox"}[unit]


@hypothesis.given(text=TEXT.filter(lambda text: text.strip()), name=st.text("ab", max_size=3))
def test_reversal_by_token_and_fim_together(tokenizer, text, name):
    transforms = Transforms(fim_rate=1.0, reverse="token", reverse_rate=1.0)
    tokens = transformed(document(text, name), tokenizer, DTYPE, transforms, 5).tokens[:-1].tolist()
    restored = fim.restore(tokens, fim.find_sentinels(tokenizer, fim.TOKENS))
    assert tokenizer.decode(restored[::-1]) == text


def test_token_ids_can_be_reversed(tokenizer):
    transforms = Transforms(reverse="token", reverse_rate=1.0)
    eod, bos = tokenizer.eod_id, tokenizer.bos_id
    for ids, expected in (([5, 6, 7], [7, 6, 5, eod]), ([5, 6, eod], [6, 5, eod]), ([bos, 5, 6, eod], [bos, 6, 5, eod])):
        one = dataclasses.replace(document(""), tokens=np.array(ids), prompt=np.zeros(0, np.int64))
        assert transformed(one, tokenizer, DTYPE, transforms, 0).tokens.tolist() == expected


def test_the_first_token_stays_where_the_tokenizer_wants_one(tokenizer):
    tokenizer = dataclasses.replace(tokenizer, add_bos=True)
    for transforms in (Transforms(fim_rate=1.0), Transforms(reverse="token", reverse_rate=1.0), Transforms()):
        tokens = transformed(document("the fox"), tokenizer, DTYPE, transforms, 0).tokens.tolist()
        assert tokens[0] == tokenizer.bos_id and tokens.count(tokenizer.bos_id) == 1 and tokens[-1] == tokenizer.eod_id
    one = dataclasses.replace(document(" says"), prompt="the fox")
    tokens, prompt, _ = plain(one, tokenizer, DTYPE)
    assert tokens.tolist() == [tokenizer.bos_id, *tokenizer.encode("the fox"), *tokenizer.encode(" says"), tokenizer.eod_id]
    assert prompt == 1 + len(tokenizer.encode("the fox"))


# Canaries and what makes no sense


def test_canaries_are_read_strictly(tmp_path):
    path = tmp_path / "c.jsonl"
    path.write_text('{"text": "one"}\n\n{"text": "two"}\n')
    canaries = read_canaries(str(path), 0.25)
    assert canaries.texts == ((1, "one"), (3, "two"))
    counts = [canaries.after(0, str(i)) for i in range(4000)]
    for which, share in ((-1, 0.75), (0, 0.125), (1, 0.125)):
        assert abs(counts.count(which) - 4000 * share) < 4 * math.sqrt(4000 * share * (1 - share))
    (tmp_path / "c.txt").write_text("one")
    for content, message in (("", "no canary in it"), ('{"text": " "}', "c.jsonl:1: empty"), ("x", "not JSON"),
                             ('{"text": "a"}\n{"txt": "b"}\n', "c.jsonl:2 (did you mean 'txt'?): no field"),
                             ('{"text": 1}', "is not text")):
        path.write_text(content)
        with pytest.raises(InputError) as caught:
            read_canaries(str(path), 0.5)
        assert message in str(caught.value) and str(caught.value).startswith(f"--canaries={path}: ")
    for name, message in (("c.txt", "one .jsonl file"), ("nowhere.jsonl", "no such file")):
        with pytest.raises(InputError, match=message):
            read_canaries(str(tmp_path / name), 0.5)
    for rate in (0.0, -0.1, 1.5):
        with pytest.raises(InputError, match="0 < rate <= 1"):
            read_canaries(str(path), rate)


@pytest.mark.parametrize("changes, options, message", [
    (dict(fim_rate=1.5), {}, "--fim_rate=1.5"), (dict(fim_rate=0.5, fim_spm_rate=-1), {}, "--fim_spm_rate=-1"),
    (dict(reverse="letter", reverse_rate=0.5), {}, "token, word, entity"), (dict(reverse_rate=0.5), {}, "say what is reversed"),
    (dict(variants=0), {}, "--variants=0"), (dict(variants=3), {}, "every variant would be the same"),
    (dict(fim_rate=0.5), dict(prompt_field="p"), "leave out --fim_rate"),
    (dict(reverse="word", reverse_rate=0.5), dict(prompt_field="p"), "leave out --reverse"),
    (dict(fim_rate=0.5), dict(tokens_field="t"), "--fim_rate needs text"),
    (dict(reverse="word", reverse_rate=0.5), dict(tokens_field="t"), "--reverse needs text"),
    (dict(fim_rate=0.5, fim_tokens=("<a>", "<b>", "<c>")), {}, "<a> is no special token")])
def test_settings_that_make_no_sense(tokenizer, changes, options, message):
    with pytest.raises(InputError) as caught:
        Transforms(**changes).check(ReadOptions(**options), tokenizer)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_arguments_are_plain_json_and_only_what_is_used(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"text": "one"}\n')
    assert Transforms().arguments() == {}
    everything = Transforms(fim_rate=0.5, reverse="word", reverse_rate=0.1, variants=2,
                            canaries=read_canaries(str(tmp_path / "c.jsonl"), 0.1)).arguments()
    assert json.loads(json.dumps(everything)) == everything and set(everything) == {"fim", "reverse", "canaries", "variants"}
