"""From a document to its tokens, plain or transformed: a pure function of the text, the seed, its id and the variant.

What is applied, in this order, each by a draw of its own:

1. reversal by word or entity, of the text (neo/data/reversal.py);
2. fill-in-the-middle: the text is cut at two characters (neo/data/fim.py);
3. the text, or each of the three parts, is tokenized;
4. reversal by token: the parts and the tokens in each are reversed, so the whole document is, before
5. the parts are put in their order (PSM or SPM).

Canaries (neo/data/canary.py) are put among the finished documents.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from neo.data import fim, reversal
from neo.data.canary import Canaries
from neo.data.draws import chosen
from neo.data.records import Document, ReadOptions
from neo.data.tokenizer import AnyTokenizer
from neo.errors import InputError

NAMES = ("fim_psm", "fim_spm", "reversed")  # what a document's flags stand for, from the lowest bit on
LARGEST_VARIANTS = 1000  # ours: variants are epochs, and every one is written out


@dataclasses.dataclass(frozen=True)
class Transforms:
    """What is done to the documents to train on; nothing by default. Rates are shares of the documents.

    `fim_tokens` are the names of three special tokens; `reverse` is one of `reversal.UNITS`.
    """

    fim_rate: float = 0.0
    fim_spm_rate: float = 0.5
    fim_tokens: tuple[str, ...] = fim.TOKENS
    reverse: str = ""
    reverse_rate: float = 0.0
    canaries: Canaries | None = None
    variants: int = 1

    @property
    def active(self) -> bool:
        """Whether any document is changed or added."""
        return self.changes_documents or self.canaries is not None

    @property
    def changes_documents(self) -> bool:
        """Whether documents to train on differ from their plain selves."""
        return self.fim_rate > 0 or self.reverse_rate > 0

    def arguments(self) -> dict[str, Any]:
        """What a manifest records, in JSON's types: only what is used."""
        found: dict[str, Any] = {}
        if self.fim_rate:
            found["fim"] = {"rate": self.fim_rate, "spm_rate": self.fim_spm_rate, "tokens": list(self.fim_tokens)}
        if self.reverse_rate:
            found["reverse"] = {"unit": self.reverse, "rate": self.reverse_rate}
        if self.canaries:
            found["canaries"] = self.canaries.arguments
        if self.variants > 1:
            found["variants"] = self.variants
        return found

    def check(self, options: ReadOptions, tokenizer: AnyTokenizer) -> None:
        """Raises InputError for values and combinations that make no sense."""
        for name in ("fim_rate", "fim_spm_rate", "reverse_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"--{name}={getattr(self, name)}: give a share, 0 <= share <= 1")
        if self.reverse and self.reverse not in reversal.UNITS:
            raise InputError(f"--reverse={self.reverse}: choose one of {', '.join(reversal.UNITS)}")
        if self.reverse_rate and not self.reverse:
            raise InputError(f"--reverse_rate={self.reverse_rate}: say what is reversed: "
                             f"--reverse={'/'.join(reversal.UNITS)}")
        if not 1 <= self.variants <= LARGEST_VARIANTS:
            raise InputError(f"--variants={self.variants}: give a number of epochs from 1 to {LARGEST_VARIANTS}")
        if self.variants > 1 and not self.active:
            raise InputError(f"--variants={self.variants}: without a transform every variant would be the same; "
                             "leave it out: training reads a source in several epochs by itself")
        if self.changes_documents and options.prompt_field:
            raise InputError("--prompt_field: a document with a prompt is not cut or reversed; leave out "
                             f"{'--fim_rate' if self.fim_rate else '--reverse'}")
        if options.tokens_field and (self.fim_rate or (self.reverse_rate and self.reverse != "token")):
            raise InputError(f"--tokens_field={options.tokens_field}: {'--fim_rate' if self.fim_rate else '--reverse'} "
                             "needs text; token ids can only be reversed by token")
        if self.fim_rate:
            fim.find_sentinels(tokenizer, self.fim_tokens)


class Encoded(NamedTuple):
    """Ids of a document with its end-of-document token, how many of the first are its prompt, and what was done to it.

    `flags` has bit i set for NAMES[i].
    """

    tokens: np.ndarray
    prompt: int = 0
    flags: int = 0


def plain(document: Document, tokenizer: AnyTokenizer, dtype: Any) -> Encoded:
    """The document as it is: [BOS if the tokenizer wants it] prompt, text, end of document.

    A prompt and what follows it are encoded apart, so that where one ends a token ends; and the prompt as neo.infer
    does, so a special token written out in it may be that token.
    """
    if document.tokens is not None:
        prompt = np.asarray(document.prompt if len(document.prompt) else [], np.int64)
        return Encoded(_ended([*_chunks(prompt), *_chunks(document.tokens)], tokenizer, dtype), len(prompt))
    if not document.prompt:
        return Encoded(tokenizer.encode_document(document.text, dtype))
    before = tokenizer.encode_prompt(document.prompt)
    return Encoded(_ended([before, continued(tokenizer, document.text), [tokenizer.eod_id]], tokenizer, dtype), len(before))


def transformed(document: Document, tokenizer: AnyTokenizer, dtype: Any, transforms: Transforms, seed: int,
                variant: int = 0) -> Encoded:
    """The document as variant `variant` of it is trained on; the plain one where no draw chooses it."""
    where = (seed, document.id, variant)
    is_reversed = chosen(transforms.reverse_rate, "reverse", *where)
    is_fim = chosen(transforms.fim_rate, "fim", *where)
    if not is_reversed and not is_fim:
        return plain(document, tokenizer, dtype)
    by_token = is_reversed and transforms.reverse == "token"
    flags = 4 if is_reversed else 0
    text = document.text
    if is_reversed and transforms.reverse == "word":
        text = reversal.reverse_words(text)
    elif is_reversed and transforms.reverse == "entity":
        text = reversal.reverse_keeping_entities(text)
    begin = [tokenizer.bos_id] * tokenizer.add_bos
    if not is_fim:
        ids: Any = tokenizer.encode(text)
        if document.tokens is not None:
            first = int(document.tokens[0] == tokenizer.bos_id)
            begin = [tokenizer.bos_id] * first
            ids = document.tokens[first:len(document.tokens) - int(document.tokens[-1] == tokenizer.eod_id)]
        return Encoded(_ended([begin, ids[::-1] if by_token else ids, [tokenizer.eod_id]], tokenizer, dtype), 0, flags)
    prefix, *rest = fim.split(text, *where)
    parts = [tokenizer.encode(prefix), *(continued(tokenizer, part) for part in rest)]
    if by_token:
        parts = [part[::-1] for part in reversed(parts)]
    is_spm = chosen(transforms.fim_spm_rate, "fim spm", *where)
    ids = fim.arrange(*parts, fim.find_sentinels(tokenizer, transforms.fim_tokens), spm=is_spm)
    return Encoded(_ended([begin, ids, [tokenizer.eod_id]], tokenizer, dtype), 0, flags | (2 if is_spm else 1))


def _chunks(ids: Any) -> list[Any]:
    return [ids] if len(ids) else []


def _ended(chunks: Sequence[Any], tokenizer: AnyTokenizer, dtype: Any) -> np.ndarray:
    """The chunks as one array that ends with the end-of-document token."""
    tokens = np.concatenate([np.asarray(chunk, dtype) for chunk in chunks])
    return tokens if tokens[-1] == tokenizer.eod_id else np.append(tokens, np.asarray(tokenizer.eod_id, dtype))


MARK = "\u263a"  # no tokenizer merges it with what follows


def continued(tokenizer: AnyTokenizer, text: str) -> list[int]:
    """Ids of `text` as it stands after other text.

    Some tokenizers (Llama 2's) put a space before all they encode; inside a document it would be one too many. Code
    Llama's way out: encode a mark before the text, and take its tokens off again.
    """
    if not text or not _adds_space(tokenizer):
        return tokenizer.encode(text)
    mark, ids = tokenizer.encode(MARK), tokenizer.encode(MARK + text)
    return ids[len(mark):] if ids[:len(mark)] == mark else tokenizer.encode(text)


@functools.lru_cache(maxsize=4)
def _adds_space(tokenizer: AnyTokenizer) -> bool:
    return tokenizer.decode(tokenizer.encode("a") * 2) == "a a"
