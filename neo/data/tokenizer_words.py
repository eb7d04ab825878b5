"""The ids of a SentencePiece BPE model, word by word: each word is encoded once and then looked up.

SentencePiece merges over a whole text. No piece crosses certain borders (a space after a letter, a line's end), so no
merge does, and what lies between two borders has the same ids in every text. `borders` finds, for a model, the finest
set of borders that no piece of its crosses. Words are mostly old acquaintances: looking them up takes 100 ms a MB where
merging takes 270 (ours: 64,000 pieces; English, code and manuals in 20 languages).
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

SPACE = "\u2581"  # what SentencePiece writes for a space
LARGEST_MEMORY = 128 << 20  # ours: about so many bytes of words and their ids are kept by a process
WORD_BYTES = 200  # of a word in the dictionary, beside its characters (measured: 160 to 220)
AT_ONCE = 100  # ours: words encoded together; the merging gets slower with the length of the text
STRETCH = 1 << 17  # ours: characters cut into words at a time; the list of them takes 20 bytes a character
# Letters of the scripts of Unicode; characters that join whatever is beside them (accents, joiners, variants); the rest
# is punctuation and symbols. Nothing depends on these being complete: `borders` tests them against the pieces.
_LETTERS = ("A-Za-z\xaa\xb5\xba\xc0-\xd6\xd8-\xf6\xf8-\u02af\u0370-\u1fff\u2c00-\u2dff\u2e80-\u2fdf\u3005-\u3007"
            "\u3021-\u302f\u3031-\u3035\u3038-\u303c\u3040-\ud7ff\uf900-\ufdff\ufe70-\ufefc\uff21-\uff3a\uff41-\uff5a"
            "\uff66-\uffdc\U00010000-\U0001cfff\U00020000-\U0003ffff")
_JOINING = "\u0300-\u036f\u200c\u200d\u20d0-\u20ff\ufe00-\ufe0f"


def _pattern(line_ends: str, digits_apart: bool) -> str:
    """Words are letters, a digit, or a run of neither, with the spaces before them; joining characters go on with it."""
    run = (rf"(?:[{_LETTERS}]+|[0-9]|[^ {line_ends}0-9{_LETTERS}{_JOINING}]+)" if digits_apart else
           rf"(?:[{_LETTERS}]+|[^ {line_ends}{_LETTERS}{_JOINING}]+)")
    return rf" *+(?:{run}|(?=[{_JOINING}]))(?:[{_JOINING}]+{run}?)*+| ++|[{line_ends}]++"


_LINE_ENDS = (r"\n\t", r"\n")  # a tab stands alone too, or not
# The finest first. Each cuts between two neighbouring characters or not, whatever stands around them: that makes the
# test against the pieces enough.
PATTERNS = (*(_pattern(ends, apart) for apart in (True, False) for ends in _LINE_ENDS),
            *(rf" *+[^ {ends}]++| ++|[{ends}]++" for ends in _LINE_ENDS))  # what lies between spaces and line ends
_BORDER = re.compile(r"(?<=[^ \n\t])[ \n]")  # one that every pattern has


def borders(proto: Any) -> re.Pattern[str] | None:
    """The pattern whose matches are the words of a model (a sentencepiece ModelProto), None where there is none.

    None also for models whose ids depend on more than pieces: unigram, another normalization than identity, no bytes
    to fall back on.
    """
    spec, trainer = proto.normalizer_spec, proto.trainer_spec
    kinds = [piece.type for piece in proto.pieces]
    kind = proto.pieces[0].Type if proto.pieces else None
    if (kind is None or trainer.model_type != trainer.BPE or spec.name != "identity" or spec.precompiled_charsmap
            or spec.remove_extra_whitespaces or not spec.escape_whitespaces or trainer.treat_whitespace_as_suffix
            or not trainer.byte_fallback or kinds.count(kind.Value("BYTE")) != 256 or kind.Value("UNUSED") in kinds):
        return None
    whole = {kind.Value("NORMAL"), kind.Value("USER_DEFINED")}
    texts = [piece.piece.replace(SPACE, " ") for piece in proto.pieces if piece.type in whole]
    for pattern in map(re.compile, PATTERNS):
        if all(pattern.fullmatch(text) for text in texts):
            return pattern
    return None


class Words:
    """Text to ids through the words of a model, those met before kept up to `LARGEST_MEMORY`."""

    def __init__(self, proto: Any, pattern: re.Pattern[str]):
        import sentencepiece

        plain = type(proto)()
        plain.CopyFrom(proto)
        plain.normalizer_spec.add_dummy_prefix = False  # a word in the middle of a text has no space of its own
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=plain.SerializeToString())
        self._prefix = " " * proto.normalizer_spec.add_dummy_prefix
        self._find = pattern.findall
        self._dtype = np.dtype("<u2" if len(proto.pieces) <= 1 << 16 else "<u4")
        [self._line_end] = self._processor.encode("\n")  # a piece, or the byte
        self._lock = threading.Lock()  # the words of one thread must not be forgotten by another
        self._known: dict[str, bytes] = {}
        self._room = LARGEST_MEMORY

    def encode(self, text: str) -> Iterator[np.ndarray]:
        """Ids of `text` (without lone surrogates) as arrays, one for each stretch of it; unsigned, [n]."""
        if text:
            text = self._prefix + (text.replace(SPACE, " ") if SPACE in text else text)
        start = 0
        while start < len(text):
            border = _BORDER.search(text, start + STRETCH)
            stop = border.start() if border else len(text)
            with self._lock:
                ids = self._ids(text[start:stop] if start or border else text)
            yield ids
            start = stop

    def _ids(self, text: str) -> np.ndarray:
        words = self._find(text)
        new = set(words).difference(self._known)
        if new:
            self._room -= WORD_BYTES * len(new) + sum(map(len, new))
            if self._room < 0:
                new, self._room = set(words), LARGEST_MEMORY
                self._known.clear()
            self._learn(list(new))
        return np.frombuffer(bytearray().join(map(self._known.__getitem__, words)), self._dtype)

    def _learn(self, words: Sequence[str]) -> None:
        plain = []
        for word in words:
            if "\n" in word or "\t" in word:
                self._known[word] = self._encode(word).tobytes()
            else:
                plain.append(word)
        # Many words a call, with line ends between them, which are borders: calls cost more than words, and giving the
        # package a list makes it start threads.
        size = self._dtype.itemsize
        for first in range(0, len(plain), AT_ONCE):
            some = plain[first:first + AT_ONCE]
            ids = self._encode("\n".join(some))
            ends = np.flatnonzero(ids == self._line_end)
            content = ids.tobytes()
            for word, start, end in zip(some, [0, *(size * (ends + 1)).tolist()], [*(size * ends).tolist(), len(content)],
                                        strict=True):
                self._known[word] = content[start:end]

    def _encode(self, text: str) -> np.ndarray:
        return np.array(self._processor.encode(text), self._dtype)
