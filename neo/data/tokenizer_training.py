"""Training a SentencePiece model on a sample of a corpus."""

from __future__ import annotations

import dataclasses
import io
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from neo.data import held_out
from neo.data.documents import Document, ReadOptions, Tally, Unreadable, read_part, split_file
from neo.data.inputs import Inputs, find_inputs
from neo.data.tokenizer import PAD_VOCAB_TO, Tokenizer, from_model, with_padding
from neo.errors import InputError

UNK_ID, BOS_ID, EOS_ID = 0, 1, 2
WHOLE_FILE = 1 << 62  # a piece size that cuts nothing
_COMMON: dict[str, Any] = dict(
    model_type="bpe", byte_fallback=True, split_digits=True, normalization_rule_name="identity",
    remove_extra_whitespaces=False, character_coverage=0.9999, unk_id=UNK_ID, bos_id=BOS_ID, eos_id=EOS_ID, pad_id=-1)


@dataclasses.dataclass(frozen=True)
class Preset:
    """SentencePiece settings; how text is fed to the trainer; control tokens after the model, one of them the end; and
    what number of rows the model's table is padded to a multiple of."""

    options: Mapping[str, Any]
    sentence_characters: int
    whole_lines: bool
    extra_tokens: tuple[str, ...] = ()
    eod: int | None = None
    pad_vocab_to: int = PAD_VOCAB_TO


PRESETS = {
    # Newline and tab are pieces of their own: as bytes, newline alone was 9 % of all tokens (measured). Runs of spaces
    # are learnt: 3.06 instead of 2.07 bytes per token on Python source with 4096 pieces (measured). num_threads is
    # fixed because the model records it.
    "default": Preset(
        {**_COMMON, "add_dummy_prefix": False, "allow_whitespace_only_pieces": True,
         "user_defined_symbols": ["\n", "\t"], "max_sentence_length": 1 << 16, "num_threads": 16},
        sentence_characters=4000, whole_lines=False),
    # The model MAP-NEO ships (read from multimodal-art-projection/Megatron-LM-NEO, neo/tokenizer.model), with the
    # tokens Megatron adds at run time; documents end with <EOD>, not </s>. Megatron pads to 128 rows on each of the
    # tensor-parallel devices, which were two for the 7B model: 64005 ids, 64256 rows.
    "map_neo": Preset(
        {**_COMMON, "input_sentence_size": 50_000_000, "shuffle_input_sentence": True, "max_sentence_length": 64000,
         "num_threads": 35},
        sentence_characters=16000, whole_lines=True,
        extra_tokens=("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>"), eod=2, pad_vocab_to=256),
}


def train(texts: Iterable[str], vocab_size: int, preset: str = "default", pad_vocab_to: int = 0) -> Tokenizer:
    """Train a tokenizer whose SentencePiece model has exactly `vocab_size` ids; the same texts give the same bytes.

    `pad_vocab_to` 0 leaves the padding to the preset.
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
    made = from_model(model.getvalue(), "trained model", eod_id=eod, extra_tokens=chosen.extra_tokens)
    return with_padding(made, pad_vocab_to or chosen.pad_vocab_to)  # type: ignore[return-value]


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
    """What to train on: inputs as the user named them, how to read them, what is held out, how much at most.

    `weights`, one for each input, are the shares of the text to train on; without them it is the inputs' own sizes.
    """

    inputs: tuple[str, ...]
    options: ReadOptions = ReadOptions()
    validation: float = 0.001
    sample_bytes: int = 0
    weights: tuple[float, ...] = ()

    def check(self) -> None:
        """Raises InputError for values that make no sense."""
        if not 0 <= self.validation < 1:
            raise InputError(f"--validation={self.validation}: give a share of the documents, 0 <= share < 1")
        if not self.weights:
            return
        told = f"--weights={','.join(f'{weight:g}' for weight in self.weights)}"
        if len(self.weights) != len(self.inputs):
            raise InputError(f"{told}: {len(self.weights)} weights for {len(self.inputs)} inputs; give one for each INPUT, "
                             "in the same order")
        if not all(0 <= weight < math.inf for weight in self.weights) or not any(self.weights):
            raise InputError(f"{told}: weights are 0 or more, and one of them more than 0")

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


def quotas(sizes: Sequence[int], weights: Sequence[float], sample_bytes: int) -> list[float]:
    """Bytes to take of each input of these sizes, so that the shares are those of the weights.

    No text is taken twice: of an input that is too small for its share all is taken, and the others make up for it, by
    their weights. `sample_bytes` 0 is as much as there is.
    """
    found = [0.0] * len(sizes)
    missing = [i for i, weight in enumerate(weights) if weight > 0]
    rest = float(sum(sizes[i] for i in missing))
    rest = min(rest, sample_bytes) if sample_bytes > 0 else rest
    while missing:
        unit = rest / math.fsum(weights[i] for i in missing)
        small = [i for i in missing if weights[i] * unit >= sizes[i]]
        for i in small or missing:
            found[i] = min(float(sizes[i]), weights[i] * unit)
        if not small:
            break
        rest -= sum(sizes[i] for i in small)
        missing = [i for i in missing if i not in small]
    return found


def largest_sample(sizes: Sequence[int], weights: Sequence[float]) -> int:
    """Bytes of the largest sample that has the shares of the weights exactly."""
    return int(min(size / weight for size, weight in zip(sizes, weights, strict=True) if weight) * math.fsum(weights))


def training_texts(corpus: Corpus, unreadable: list[str], used: list[int] | None = None) -> Iterator[str]:
    """Texts outside the validation split, a sample of them chosen by hash of the documents' ids.

    The sample is `sample_bytes` of the whole corpus, or has the shares of the weights: see `quotas`. `used` is filled
    with the UTF-8 bytes given of each input.
    """
    groups = corpus.find()
    sizes = [group.text_size for group in groups]
    total = sum(sizes)
    if corpus.weights:
        taken = quotas(sizes, corpus.weights, corpus.sample_bytes)
        bounds = [held_out.RANGE if size <= part else int(held_out.RANGE * (part / size))
                  for size, part in zip(sizes, taken, strict=True)]
        bounds = [bound if weight else 0 for bound, weight in zip(bounds, corpus.weights, strict=True)]
    else:
        bounds = [held_out.RANGE * corpus.sample_bytes // total if 0 < corpus.sample_bytes < total else held_out.RANGE
                  ] * len(groups)

    def sampled(pairs: Iterable[tuple[str, str]], bound: int) -> Iterator[tuple[str, str]]:
        for document_id, text in pairs:
            if int.from_bytes(held_out.shuffle_key(0, document_id)[:8], "big") < bound:
                yield document_id, text

    used = [] if used is None else used
    used[:] = [0] * len(groups)
    for number, (group, bound) in enumerate(zip(groups, bounds, strict=True)):
        if not bound:
            continue
        pairs = ((document.id, document.text) for document in read_documents(group, corpus.options, unreadable))
        for text in held_out.without_held_out(sampled(pairs, bound), corpus.validation):
            used[number] += len(text.encode("utf-8", "replace"))
            yield text


def train_on(corpus: Corpus, task: tuple[int, str, int]) -> tuple[Tokenizer, list[str], list[int]]:
    """`train` on a corpus, as a task for a worker process; returns also what could not be read, and the bytes used of
    each input. `task` is (vocab_size, preset, pad_vocab_to)."""
    unreadable: list[str] = []
    used: list[int] = []
    try:
        return train(training_texts(corpus, unreadable, used), *task), sorted(unreadable), used
    except InputError as error:
        if unreadable:
            raise InputError(f"{error}; {len(unreadable)} inputs could not be read, first {unreadable[0]}") from error
        raise
