"""How a tokenizer does on a corpus: by source, by language or script, and how fast."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from neo.data.progress import amount
from neo.data.tokenizer import AnyTokenizer
from neo.data.tokenizer_training import Corpus, read_documents
from neo.errors import InputError

LOOKED_AT = 20_000  # ours: characters of a document that its script is told by
NO_LETTERS, UNNAMED = "no letters", "other letters"
# First and last code point of blocks and stretches of them that hold the letters of a script (Unicode 16, Blocks.txt).
SCRIPTS = {
    "Latin": ((0x41, 0x5A), (0x61, 0x7A), (0xAA, 0xAA), (0xBA, 0xBA), (0xC0, 0xD6), (0xD8, 0xF6), (0xF8, 0x2AF),
              (0x1E00, 0x1EFF), (0x2C60, 0x2C7F), (0xA720, 0xA7FF), (0xAB30, 0xAB6F), (0xFF21, 0xFF3A), (0xFF41, 0xFF5A)),
    "Greek": ((0x370, 0x3FF), (0x1F00, 0x1FFF)),
    "Cyrillic": ((0x400, 0x52F), (0x1C80, 0x1C8F), (0x2DE0, 0x2DFF), (0xA640, 0xA69F)),
    "Armenian": ((0x530, 0x58F),),
    "Hebrew": ((0x590, 0x5FF), (0xFB1D, 0xFB4F)),
    "Arabic": ((0x600, 0x6FF), (0x750, 0x77F), (0x870, 0x8FF), (0xFB50, 0xFDFF), (0xFE70, 0xFEFE)),
    "Devanagari": ((0x900, 0x97F), (0xA8E0, 0xA8FF)),
    "Bengali": ((0x980, 0x9FF),),
    "Gurmukhi": ((0xA00, 0xA7F),),
    "Gujarati": ((0xA80, 0xAFF),),
    "Oriya": ((0xB00, 0xB7F),),
    "Tamil": ((0xB80, 0xBFF),),
    "Telugu": ((0xC00, 0xC7F),),
    "Kannada": ((0xC80, 0xCFF),),
    "Malayalam": ((0xD00, 0xD7F),),
    "Sinhala": ((0xD80, 0xDFF),),
    "Thai": ((0xE00, 0xE7F),),
    "Lao": ((0xE80, 0xEFF),),
    "Tibetan": ((0xF00, 0xFFF),),
    "Myanmar": ((0x1000, 0x109F),),
    "Georgian": ((0x10A0, 0x10FF), (0x1C90, 0x1CBF), (0x2D00, 0x2D2F)),
    "Ethiopic": ((0x1200, 0x139F), (0x2D80, 0x2DDF)),
    "Khmer": ((0x1780, 0x17FF),),
    "Mongolian": ((0x1800, 0x18AF),),
    "Hangul": ((0x1100, 0x11FF), (0x3130, 0x318F), (0xA960, 0xA97F), (0xAC00, 0xD7FF)),
    "Kana": ((0x3041, 0x30FF), (0x31F0, 0x31FF), (0xFF66, 0xFF9F)),
    "Han": ((0x2E80, 0x2FDF), (0x3005, 0x3007), (0x3400, 0x4DBF), (0x4E00, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF)),
}
_BLOCKS = sorted((first, last, name) for name, blocks in SCRIPTS.items() for first, last in blocks)
_EDGES = np.array([edge for first, last, _ in _BLOCKS for edge in (first, last + 1)], np.uint32)
_NAMES = [name for *_, name in _BLOCKS]


def script_of(text: str) -> str:
    """The script of most letters, counted in UTF-8 bytes, among the first 20,000 characters.

    Bytes, because a Chinese character says what three Latin letters do. Of code it is the script of its words.
    """
    characters = np.frombuffer(text[:LOOKED_AT].encode("utf-32-le", "replace"), "<u4")
    sizes = 1 + sum((characters >= first).astype(np.int64) for first in (0x80, 0x800, 0x10000))
    place = np.searchsorted(_EDGES, characters, "right")  # odd: inside of block place // 2
    inside = place % 2 == 1
    counts = dict.fromkeys(SCRIPTS, 0)
    for block, count in enumerate(np.bincount(place[inside] // 2, sizes[inside], minlength=len(_NAMES)).tolist()):
        counts[_NAMES[block]] += count
    best = max(counts, key=counts.__getitem__)
    if counts[best]:
        return best
    return UNNAMED if any(map(str.isalpha, text[:LOOKED_AT])) else NO_LETTERS


@dataclasses.dataclass
class Sums:
    """What is added up over documents; UTF-8 bytes, characters, tokens without those at the ends of a document."""

    documents: int = 0
    bytes: int = 0
    characters: int = 0
    tokens: int = 0
    byte_tokens: int = 0

    def add(self, *values: int) -> None:
        """One more document: its bytes, characters, tokens and tokens that are single bytes."""
        for field, value in zip(dataclasses.fields(self), (1, *values), strict=True):
            setattr(self, field.name, getattr(self, field.name) + value)

    def rates(self) -> dict[str, Any]:
        """The sums and what follows from them."""
        tokens = max(self.tokens, 1)
        return {**dataclasses.asdict(self), "bytes_per_token": self.bytes / tokens,
                "characters_per_token": self.characters / tokens, "byte_share": self.byte_tokens / tokens}


def report(tokenizer: AnyTokenizer, corpus: Corpus) -> dict[str, Any]:
    """How the tokenizer does on all documents of a corpus, held-out ones included.

    Of the whole, of each input ("sources") and of each language ("languages"): documents, bytes (UTF-8), characters,
    tokens, bytes_per_token, characters_per_token, byte_share (share of tokens that are single bytes). "language_by"
    tells what a language is: the value of `corpus.options.group_field`, else the script of most letters. Of the whole
    also vocabulary_used (share of ids that occur), encode_MB_per_s (encoding alone, in this process),
    round_trip_failures (documents that decode to something else) and the first such id.
    """
    field = corpus.options.group_field
    seen = np.zeros(tokenizer.vocab_size, np.int64)
    whole, languages = Sums(), {}
    sources = [(name, Sums()) for name in corpus.inputs]
    failures, seconds, first_failure = 0, 0.0, None
    unreadable: list[str] = []
    tokenizer.encode_document("first use", np.uint32)  # what is made at first use is no part of the speed
    for (_, source), group in zip(sources, corpus.find(), strict=True):
        for document in read_documents(group, corpus.options, unreadable):
            begin = time.perf_counter()
            ids = tokenizer.encode_document(document.text, np.uint32)
            seconds += time.perf_counter() - begin
            ids = ids[int(tokenizer.add_bos):-1]
            counts = np.bincount(ids, minlength=tokenizer.vocab_size)
            seen += counts
            language = (document.group or f"no {field}") if field else script_of(document.text)
            for sums in (whole, source, languages.setdefault(language, Sums())):
                sums.add(len(document.text.encode()), len(document.text), len(ids), int(counts[tokenizer.byte_tokens].sum()))
            if tokenizer.decode(ids.tolist()) != document.text:
                failures += 1
                first_failure = first_failure or document.id
    if not whole.documents:
        raise InputError(f"empty corpus: no document in {' '.join(corpus.inputs[:3])}")
    largest_first = sorted(languages.items(), key=lambda item: (-item[1].bytes, item[0]))
    return {"vocab_size": tokenizer.vocab_size, "padded_vocab_size": tokenizer.padded_vocab_size,
            "sha256": tokenizer.sha256, **whole.rates(), "vocabulary_used": float((seen > 0).mean()),
            "encode_MB_per_s": whole.bytes / 1e6 / max(seconds, 1e-9), "round_trip_failures": failures,
            "first_round_trip_failure": first_failure, "language_by": f"field {field}" if field else "script",
            "sources": [{"source": name, **sums.rates()} for name, sums in sources],
            "languages": [{"language": name, **sums.rates()} for name, sums in largest_first],
            "unreadable": sorted(unreadable)}


def lines(result: Mapping[str, Any]) -> list[str]:
    """A report for people."""
    failures = f"{result['round_trip_failures']:,} of {result['documents']:,} documents"
    if result["first_round_trip_failure"]:
        failures += f" (first: {result['first_round_trip_failure']})"
    by = result["language_by"]
    parts = [*(("source", part["source"], part) for part in result["sources"]),
             *((by.removeprefix("field "), part["language"], part) for part in result["languages"]), ("all", "", result)]
    rows = [("", "", "documents", "text", "tokens", "bytes/token", "chars/token", "byte pieces")]
    before = ""
    for kind, name, part in parts:
        rows.append((kind if kind != before else "", name, f"{part['documents']:,}", amount(part["bytes"]),
                     f"{part['tokens']:,}", f"{part['bytes_per_token']:.3f}", f"{part['characters_per_token']:.3f}",
                     f"{part['byte_share']:.2%}"))
        before = kind
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    table = ["  ".join(cell.ljust(width) if i < 2 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in rows]
    return [*table, "",
            f"vocabulary        {result['vocab_size']:,} ids, {result['vocabulary_used']:.1%} of them used; rows of the "
            f"model: {result['padded_vocab_size']:,}",
            f"encoding          {result['encode_MB_per_s']:.1f} MB/s (this machine, one process)",
            f"round trip fails  {failures}"]
