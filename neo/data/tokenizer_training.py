"""Training a SentencePiece model, and measuring how one does on a corpus."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from neo.data import held_out
from neo.data.documents import Document, ReadOptions, Tally, Unreadable, read_part, split_file
from neo.data.inputs import Inputs, find_inputs
from neo.data.tokenizer import AnyTokenizer, Tokenizer, from_model
from neo.errors import InputError

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
WHOLE_FILE = 1 << 62  # a piece size that cuts nothing
_COMMON: dict[str, Any] = dict(
    model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
    remove_extra_whitespaces=False, character_coverage=0.9999, unk_id=UNK_ID, bos_id=BOS_ID, eos_id=EOS_ID, pad_id=-1)


@dataclasses.dataclass(frozen=True)
class Preset:
    """SentencePiece settings; how text is fed to the trainer; control tokens after the model, one of them the end."""

    options: Mapping[str, Any]
    sentence_characters: int
    whole_lines: bool
    extra_tokens: tuple[str, ...] = ()
    eod: int | None = None


PRESETS = {
    # Newline and tab are pieces of their own: as bytes, newline alone was 9 % of all tokens (measured). Runs of spaces
    # are learnt: 3.06 instead of 2.07 bytes per token on Python source with 4096 pieces (measured). num_threads is
    # fixed because the model records it.
    "default": Preset(
        {**_COMMON, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True,
         "user_defined_symbols": ["\n", "\t"], "max_sentence_length": 1 << 16, "num_threads": 16},
        sentence_characters=4000, whole_lines=False),
    # The model MAP-NEO ships (read from multimodal-art-projection/Megatron-LM-NEO, neo/tokenizer.model), with the
    # tokens Megatron adds at run time; documents end with <EOD>, not </s>.
    "map_neo": Preset(
        {**_COMMON, "input_sentence_size": 50_000_000, "shuffle_input_sentence": True, "max_sentence_length": 64000,
         "num_threads": 35},
        sentence_characters=16000, whole_lines=True,
        extra_tokens=("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>"), eod=2),
}


def train(texts: Iterable[str], vocab_size: int, preset: str = "default") -> Tokenizer:
    """Train a tokenizer whose SentencePiece model has exactly `vocab_size` ids; the same texts give the same bytes.

    Raises InputError: no text, vocabulary too large for the corpus or too small for its characters.
    """
    import sentencepiece

    chosen = PRESETS[preset]
    failure: list[Exception] = []

    def sentences() -> Iterator[str]:
        try:
            for text in texts:
                yield from _sentences(text, chosen.sentence_characters, chosen.whole_lines)
        except Exception as error:  # SentencePiece would turn it into a text
            failure.append(error)
            raise

    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    try:
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=sentences(), model_writer=model,
                                                 vocab_size=vocab_size, minloglevel=2, **chosen.options)
    except RuntimeError as error:
        if failure:
            raise failure[0] from None
        raise InputError(_explain(str(error), vocab_size)) from error
    eod = None if chosen.eod is None else vocab_size + chosen.eod
    return from_model(model.getvalue(), "trained model", eod_id=eod, extra_tokens=chosen.extra_tokens)


def _explain(text: str, vocab_size: int) -> str:
    if "sentences_.empty()" in text:
        return "empty corpus: there is no text to train a tokenizer on (outside the validation split)"
    if found := re.search(r"too high \((\d+)\).*<= (\d+)", text):
        return f"--vocab_size={vocab_size}: too large for this corpus, at most {found[2]} pieces can be learnt from it"
    if found := re.search(r"smaller than required_chars\. (\d+) vs (\d+)", text):
        return (f"--vocab_size={vocab_size}: too small, the special tokens, 256 bytes and characters of this corpus "
                f"need {found[2]} at least")
    return f"SentencePiece refuses: {' '.join(text.split())}"


def _sentences(text: str, characters: int, whole_lines: bool) -> Iterator[str]:
    """Text in stretches the trainer takes: lines without their end, or blocks of lines; longer lines are cut."""
    block: list[str] = []
    room = characters
    for line in text.split("\n"):
        while len(line) > characters:
            if block:
                yield "\n".join(block)
                block, room = [], characters
            cut = line.rfind(" ", characters // 2, characters)
            cut = characters if cut < 0 else cut
            yield line[:cut]
            line = line[cut:]
        if block and (whole_lines or len(line) > room):
            yield "\n".join(block)
            block, room = [], characters
        if line or not whole_lines:
            block.append(line)
            room -= len(line) + 1
    if any(block):
        yield "\n".join(block)


@dataclasses.dataclass(frozen=True)
class Corpus:
    """What to train on: inputs as the user named them, how to read them, what is held out, how much at most."""

    inputs: tuple[str, ...]
    options: ReadOptions = ReadOptions()
    validation: float = 0.001
    sample_bytes: int = 0

    def find(self) -> list[Inputs]:
        """Each input's files, on their own: the small-source rule of the held-out split goes by source."""
        return [find_inputs([name]) for name in self.inputs]


def read_documents(inputs: Inputs, options: ReadOptions, unreadable: list[str]) -> Iterator[Document]:
    """All documents, in order; names of files that cannot be read are added to `unreadable`."""
    unreadable += inputs.unreadable
    for number, file in enumerate(inputs.files):
        try:
            for part in split_file(number, file, WHOLE_FILE):
                yield from read_part(file, part, options, Tally())
        except Unreadable as error:
            unreadable.append(str(error))


def training_texts(corpus: Corpus, unreadable: list[str]) -> Iterator[str]:
    """Texts outside the validation split; of a corpus larger than `sample_bytes`, a sample chosen by hash of the id."""
    groups = corpus.find()
    total = sum(group.text_size for group in groups)
    bound = held_out.RANGE if not 0 < corpus.sample_bytes < total else held_out.RANGE * corpus.sample_bytes // total

    def sampled(pairs: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        for document_id, text in pairs:
            if int.from_bytes(held_out.shuffle_key(0, document_id)[:8], "big") < bound:
                yield document_id, text

    for group in groups:
        pairs = ((document.id, document.text) for document in read_documents(group, corpus.options, unreadable))
        yield from held_out.without_held_out(sampled(pairs), corpus.validation)


def train_on(corpus: Corpus, task: tuple[int, str]) -> tuple[Tokenizer, list[str]]:
    """`train` on a corpus, as a task for a worker process; returns also what could not be read."""
    vocab_size, preset = task
    unreadable: list[str] = []
    try:
        return train(training_texts(corpus, unreadable), vocab_size, preset), sorted(unreadable)
    except InputError as error:
        if unreadable:
            raise InputError(f"{error}; {len(unreadable)} inputs could not be read, first {unreadable[0]}") from error
        raise


def report(tokenizer: AnyTokenizer, corpus: Corpus) -> dict[str, Any]:
    """How the tokenizer does on all documents of a corpus, held-out ones included.

    bytes_per_token (UTF-8 bytes of text), byte_share (share of tokens that are single bytes), vocabulary_used (share
    of ids that occur), round_trip_failures (documents that decode to something else) and the first such id.
    """
    import numpy as np

    seen = np.zeros(tokenizer.vocab_size, np.int64)
    documents = num_bytes = failures = 0
    first_failure = None
    unreadable: list[str] = []
    for group in corpus.find():
        for document in read_documents(group, corpus.options, unreadable):
            ids = tokenizer.encode(document.text)
            seen += np.bincount(np.array(ids, np.int64), minlength=tokenizer.vocab_size)
            documents += 1
            num_bytes += len(document.text.encode())
            if tokenizer.decode(ids) != document.text:
                failures += 1
                first_failure = first_failure or document.id
    if not documents:
        raise InputError(f"empty corpus: no document in {' '.join(corpus.inputs[:3])}")
    tokens = int(seen.sum())
    byte_tokens = int(seen[tokenizer.byte_tokens].sum())
    return {"vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256, "documents": documents, "bytes": num_bytes,
            "tokens": tokens, "bytes_per_token": num_bytes / tokens, "byte_share": byte_tokens / tokens,
            "vocabulary_used": float((seen > 0).mean()), "round_trip_failures": failures,
            "first_round_trip_failure": first_failure, "unreadable": sorted(unreadable)}
