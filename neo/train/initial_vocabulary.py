"""Another vocabulary than the source's: which of its rows each new row starts from."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from neo.config.schema import ModelConfig
from neo.errors import InputError
from neo.models.weights import Weights

TABLE, HEAD = "embed/table", "head/kernel"
Rows = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class ExtendedVocabulary:
    """Weights whose embedding table (and output head) have other rows: row i is the mean of the source's `rows[i]`.

    A row that names none, and rows past the end of `rows` up to config.vocab_size, are the mean of the first
    `used` rows of the source: such an id's logit is the mean of theirs, so n of them raise a loss by at most
    log(1 + n / used) nats (Jensen). Means are taken and returned in float32.
    """

    source: Weights
    config: ModelConfig
    rows: Rows
    used: int

    def dtype(self, path: str) -> np.dtype:
        """float32 for table and head, else that of the source."""
        return np.dtype(np.float32) if path in (TABLE, HEAD) else self.source.dtype(path)

    def read(self, path: str, layer: int | None = None) -> np.ndarray:
        """As `Weights.read`."""
        if path not in (TABLE, HEAD):
            return self.source.read(path, layer)
        return self._table(self.source.read(TABLE)) if path == TABLE else self._table(self.source.read(HEAD).T).T

    def _table(self, old: np.ndarray) -> np.ndarray:
        new = np.empty((self.config.vocab_size, old.shape[1]), np.float32)
        one = np.array([row[0] if len(row) == 1 else -1 for row in self.rows], np.int64)
        new[np.flatnonzero(one >= 0)] = old[one[one >= 0]]
        for i in np.flatnonzero(one < 0):
            if self.rows[i]:
                new[i] = old[list(self.rows[i])].astype(np.float32).mean(0)
        rest = [i for i, row in enumerate(self.rows) if not row] + list(range(len(self.rows), len(new)))
        if rest:
            new[rest] = old[:self.used].mean(0, dtype=np.float32)
        return new


def padded(source: Weights, config: ModelConfig) -> Weights:
    """The source with rows added up to config.vocab_size; itself when it has as many."""
    count = source.config.vocab_size
    if count == config.vocab_size:
        return source
    return ExtendedVocabulary(source, config, tuple((i,) for i in range(count)), count)


def rows_of(old: Any, new: Any) -> Rows:
    """For each id of tokenizer `new`, the ids of tokenizer `old` whose rows it starts at.

    A piece that both have keeps its row, whatever its ids. Any other starts from the pieces that `old` makes of its text
    (in the middle of a text, not at its beginning). The end and the beginning of a document keep their rows under
    another name. Nothing is named for control tokens and for single bytes that `old` does not have.
    """
    known = {old.piece(i): i for i in range(old.vocab_size)} if _byte_level(old) == _byte_level(new) else {}
    known.pop("", None)   # an id without a token
    roles = {new.bos_id: old.bos_id, new.eod_id: old.eod_id}
    control = new.token_bytes == 0
    found = []
    for i in range(new.vocab_size):
        piece = new.piece(i)
        if piece in known:
            found.append((known[piece],))
        elif roles.get(i, -1) >= 0:
            found.append((roles[i],))
        elif control[i]:
            found.append(())
        else:
            found.append(tuple(encode_inside(old, text_of(new, i))))
    return tuple(found)


def _byte_level(tokenizer: Any) -> bool:
    """Whether pieces are bytes in other characters ("Ġthe", not "▁the"): a name then means another text."""
    return getattr(tokenizer, "is_byte_level", False)


def text_of(tokenizer: Any, token: int) -> str:
    """What a token adds to a text, its leading space included; empty when it is a part of a character."""
    before = tokenizer.encode("a")
    start, whole = tokenizer.decode(before), tokenizer.decode([*before, token])
    text = whole[len(start):] if whole.startswith(start) else tokenizer.decode([token])
    return "" if "\ufffd" in text else text


def encode_inside(tokenizer: Any, text: str) -> list[int]:
    """Ids of a text that stands behind other text, where no space is put before it."""
    if not text:
        return []
    before = tokenizer.encode("\n")
    whole = tokenizer.encode("\n" + text)
    # A newline may form one piece with what follows; then the text is taken alone.
    return whole[len(before):] if whole[:len(before)] == before and len(whole) > len(before) else tokenizer.encode(text)


def require_same_ids(old: Any, new: Any, where: str) -> None:
    """InputError unless every id of tokenizer `new` (the data's) is the same token in `old` (the source's)."""
    cure = ("prepare the data with the tokenizer of that model, or give --config.init.extend_vocab=True to carry its rows "
            "over to the new tokenizer")
    if new.vocab_size > old.vocab_size:
        raise InputError(f"the tokenizer of the data has {new.vocab_size} ids, that of {where} {old.vocab_size}; {cure}")
    for i in range(new.vocab_size):
        if old.piece(i) != new.piece(i):
            raise InputError(f"the tokenizer of the data is not that of {where}: id {i} is {new.piece(i)!r}, there "
                             f"{old.piece(i)!r}; {cure}")
