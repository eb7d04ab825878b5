"""Writing token stores: shards as a stream of documents, then the manifest as the last file.

A source without its manifest is unfinished; the manifest is written to a temporary name, flushed to the disk and
renamed, so that a reader never sees half of one.
"""

from __future__ import annotations

import array
import hashlib
import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from neo.data import packing, store
from neo.data.store_files import RECORD_TOKENS
from neo.errors import InputError


class ShardWriter:
    """One shard being written: `append` documents, then `close`. Its files appear under their names at `close`."""

    def __init__(self, folder: str, stem: str, dtype: str, layout: str = "flat"):
        self.folder, self.layout, self._stem = folder, layout, stem
        self.names = (f"{stem}.tokens" if layout == "flat" else f"{stem}.array_record", f"{stem}.documents")
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self.num_tokens = self.num_documents = self.num_bytes = 0
        # The process id keeps apart a killed run's orphan and the run that follows it.
        self._temporary = [os.path.join(folder, f"{name}.{os.getpid()}.tmp") for name in self.names]
        self._ends, self._id_ends, self._ids = array.array("Q"), array.array("Q"), bytearray()
        self._extras = array.array("I")  # as many as documents, or fewer: those after the last that is not 0 are missing
        self._pending: list[np.ndarray] = []
        self._num_pending = 0
        self._writer = _array_record_writer(self._temporary[0]) if layout == "array_record" else None
        self._file = None if self._writer else open(self._temporary[0], "wb")  # noqa: SIM115  (closed by close)

    def append(self, tokens: np.ndarray, document_id: str, num_bytes: int, prompt: int = 0, joined: bool = False) -> None:
        """Add one document: its tokens, end-of-document token included, its id and the UTF-8 size of its text.

        The first `prompt` tokens are never targets that count in the loss. A `joined` document may see the one
        before it, and so all that this one may see. ValueError for a prompt longer than the document.
        """
        tokens = np.ascontiguousarray(tokens, self.dtype)
        if not 0 <= prompt <= min(len(tokens), store.PROMPT_MAX):
            raise ValueError(f"document {document_id!r} of {len(tokens)} tokens cannot have a prompt of {prompt}")
        if prompt or joined:
            self._extras.extend([0] * (self.num_documents - len(self._extras)))
            self._extras.append(prompt | (store.JOINED if joined else 0))
        if self._file:
            self._file.write(tokens.data)
        else:
            self._pending.append(tokens)
            self._num_pending += len(tokens)
            self._write_records(final=False)
        self.num_tokens += len(tokens)
        self.num_documents += 1
        self.num_bytes += num_bytes
        self._ends.append(self.num_tokens)
        self._ids += document_id.encode("utf-8")
        self._id_ends.append(len(self._ids))

    def append_padding(self, count: int, token: int) -> None:
        """Fill `count` places of a packed store with `token`; they carry no loss and are in no list of documents."""
        self.append(np.full(count, token, self.dtype), "", 0, prompt=count)

    def _write_records(self, final: bool) -> None:
        if self._num_pending < RECORD_TOKENS and not final:
            return
        tokens = np.concatenate([np.zeros(0, self.dtype), *self._pending])
        full = len(tokens) // RECORD_TOKENS * RECORD_TOKENS
        for start in range(0, full, RECORD_TOKENS):
            self._writer.write(tokens[start:start + RECORD_TOKENS].tobytes())
        rest = tokens[full:]
        if final and len(rest):
            self._writer.write(rest.tobytes())
            rest = rest[:0]
        self._pending, self._num_pending = [rest], len(rest)

    def close(self) -> dict[str, Any]:
        """Finish the files and return the shard's manifest entry."""
        if self._file:
            _sync(self._file)
            self._file.close()
        else:
            self._write_records(final=True)
            self._writer.close()
        with open(self._temporary[1], "wb") as file:
            file.write(store.DOCUMENTS_MAGIC + self.num_documents.to_bytes(8, "little"))
            for numbers in (self._ends, self._id_ends):
                if sys.byteorder == "big":
                    numbers.byteswap()
                file.write(numbers.tobytes())
            file.write(self._ids)
            _sync(file)
        if self._extras:
            self._extras.extend([0] * (self.num_documents - len(self._extras)))
            self.names += (f"{self._stem}.extras",)
            self._temporary.append(os.path.join(self.folder, f"{self.names[2]}.{os.getpid()}.tmp"))
            with open(self._temporary[2], "wb") as file:
                file.write(np.asarray(self._extras, "<u4").tobytes())
                _sync(file)
        entry: dict[str, Any] = {"tokens": self.names[0], "documents": self.names[1],
                                 "num_tokens": self.num_tokens, "num_documents": self.num_documents,
                                 "sha256": {}, "size": {}}
        if self._extras:
            entry["extras"] = self.names[2]
        for name, temporary in zip(self.names, self._temporary, strict=True):
            with open(temporary, "rb") as file:
                entry["sha256"][name] = hashlib.file_digest(file, "sha256").hexdigest()
            entry["size"][name] = os.path.getsize(temporary)
            os.replace(temporary, os.path.join(self.folder, name))
        return entry


class Entry(NamedTuple):
    """One document to write, as `ShardWriter.append` takes it."""

    tokens: np.ndarray
    document_id: str
    num_bytes: int
    prompt: int = 0
    joined: bool = False


class Packed(NamedTuple):
    """What `append_packed` wrote: bins, and how many of their places hold padding."""

    bins: int
    padding: int


class _Part(NamedTuple):
    """Tokens [first, last) of document number `document`; -1 for padding."""

    document: int
    first: int
    last: int


def append_packed(writer: ShardWriter, entries: Sequence[Entry], seq_len: int, eod_id: int) -> Packed:
    """Write documents in bins of exactly `seq_len` tokens (packing.pack); joined ones are packed as one.

    Every pair of neighbours within a document counts in the loss unless a bin's border cuts it. The first token of a
    document counts where it follows the end of another, as in a store that is not packed; never after padding, a cut
    or as the first of the shard. A document in several places is in the index once per place, by the same id.
    """
    groups: list[list[int]] = []
    for number, entry in enumerate(entries):
        if entry.joined and groups:
            groups[-1].append(number)
        else:
            groups.append([number])
    lengths = [len(entry.tokens) for entry in entries]
    bins = packing.pack([sum(lengths[number] for number in group) for group in groups], seq_len)
    parts: list[_Part] = []
    padding = 0
    for pieces in bins:
        for piece in pieces:
            for part in _parts(groups[piece.document], lengths, piece):
                if parts and parts[-1].document == part.document and parts[-1].last == part.first:
                    part = parts.pop()._replace(last=part.last)  # a long document goes on in the next bin
                parts.append(part)
        room = seq_len - sum(piece.count for piece in pieces)
        if room:
            parts.append(_Part(-1, 0, room))
            padding += room
    before = _Part(-1, 0, 0)
    for part in parts:
        number, first, last = part
        if number < 0:
            writer.append_padding(last, eod_id)
        else:
            entry = entries[number]
            follows = before.document >= 0 and before.last == lengths[before.document] and first == 0
            prompt = min(max(entry.prompt - first, 0 if follows else 1), last - first)
            writer.append(entry.tokens[first:last], entry.document_id, 0 if first else entry.num_bytes, prompt,
                          entry.joined and follows and before.document == number - 1)
        before = part
    return Packed(len(bins), padding)


def _parts(group: Sequence[int], lengths: Sequence[int], piece: packing.Piece) -> Iterable[_Part]:
    """The parts of documents that a piece of their group is made of."""
    begin, first, last = 0, piece.first, piece.first + piece.count
    for number in group:
        low, high = max(first - begin, 0), min(last - begin, lengths[number])
        if low < high:
            yield _Part(number, low, high)
        begin += lengths[number]


def write_packed_end(folder: str, stem: str, dtype: str, eod_id: int, layout: str = "flat") -> dict[str, Any]:
    """The last shard of a packed split: one token of padding, the last target of the last bin; its manifest entry."""
    writer = ShardWriter(folder, stem, dtype, layout)
    writer.append_padding(1, eod_id)
    return writer.close()


def split_entry(shards: Iterable[Mapping[str, Any]], num_bytes: int) -> dict[str, Any]:
    """The manifest's part about one split; `num_bytes` is the UTF-8 size of the split's text."""
    shards = list(shards)
    return {"tokens": sum(s["num_tokens"] for s in shards), "documents": sum(s["num_documents"] for s in shards),
            "bytes": num_bytes, "shards": shards}


def write_manifest(folder: str, *, source: str, vocab_size: int, eod_id: int, tokenizer_sha256: str, layout: str,
                   splits: Mapping[str, Any], prepare: Mapping[str, Any],
                   packing: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Write the manifest that makes the source in `folder` complete, and return it.

    `packing` is {"kind": "best_fit", "seq_len": T} where the training split was written by `append_packed`. A store
    without packing and extras is one of version 1, which older readers take.
    """
    extras = any("extras" in shard for split in splits.values() for shard in split["shards"])
    manifest = {"format": store.FORMAT, "version": 2 if extras or packing else 1, "source": source, "layout": layout,
                "dtype": store.dtype_for(vocab_size), "vocab_size": vocab_size, "eod_id": eod_id,
                "tokenizer_sha256": tokenizer_sha256, **({"packing": dict(packing)} if packing else {}),
                "splits": dict(splits), "prepare": dict(prepare)}
    write_json(os.path.join(folder, store.MANIFEST), manifest)
    return manifest


def write_json(path: str, value: Any) -> None:
    """Write readable JSON so that the file is either the old or the new one, never half of it."""
    temporary = f"{path}.{os.getpid()}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, ensure_ascii=False)
        file.write("\n")
        _sync(file)
    os.replace(temporary, path)


def write_source(folder: str, source: str, documents: Mapping[str, Iterable[tuple]], *,
                 vocab_size: int, eod_id: int, tokenizer_sha256: str, layout: str = "flat",
                 shard_documents: int = 1000, pack: int = 0) -> None:
    """Write a whole source from memory: split name -> (document id, tokens without the final eod_id) and, if wanted,
    prompt and joined as `ShardWriter.append` takes them.

    For tests, and for tokens that come from elsewhere: the order is kept, nothing is shuffled, and a token counts as
    one byte of text. With `pack` the training split is packed for that sequence length, shard by shard.
    """
    os.makedirs(folder, exist_ok=True)
    dtype, splits = store.dtype_for(vocab_size), {}
    for split in store.SPLITS:
        items = [_entry(source, item, vocab_size, eod_id) for item in documents.get(split, ())]
        groups = [items[i:i + shard_documents] for i in range(0, len(items), shard_documents)]
        packed = pack and split == "train" and items
        stems = [f"{split}-{number:05d}-of-{len(groups) + bool(packed):05d}" for number in range(len(groups) + 1)]
        entries, num_bytes = [], 0
        for stem, group in zip(stems, groups, strict=False):
            writer = ShardWriter(folder, stem, dtype, layout)
            if packed:
                append_packed(writer, group, pack, eod_id)
            else:
                for entry in group:
                    writer.append(*entry)
            entries.append(writer.close())
            num_bytes += writer.num_bytes
        if packed:
            entries.append(write_packed_end(folder, stems[-1], dtype, eod_id, layout))
        splits[split] = split_entry(entries, num_bytes)
    write_manifest(folder, source=source, vocab_size=vocab_size, eod_id=eod_id, tokenizer_sha256=tokenizer_sha256,
                   layout=layout, splits=splits, prepare={},
                   packing={"kind": "best_fit", "seq_len": pack} if pack else None)


def _entry(source: str, item: tuple, vocab_size: int, eod_id: int) -> Entry:
    document_id, body, *extras = item
    tokens = np.asarray([*body, eod_id], np.int64)
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise InputError(f"{source}: document {document_id!r} has a token outside 0 .. {vocab_size - 1}")
    return Entry(tokens, document_id, len(tokens) - 1, *extras)


def _array_record_writer(path: str) -> Any:
    try:
        from array_record.python.array_record_module import ArrayRecordWriter
    except ImportError as error:
        raise InputError("layout array_record needs array_record: pip install array_record") from error
    # One record a group: larger groups are 1.7 to 2.3 times slower to read at random (measured).
    return ArrayRecordWriter(path, "group_size:1")


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
