"""The two stages of preparation: pieces of input to tokenized, bucketed documents; buckets to shuffled shards.

Which bucket a document goes to, and its place there, follow from (seed, id) alone; the number of buckets follows from
the size of the input alone. So the output is the same whatever the pieces, the workers and the interruptions.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from typing import Any

import numpy as np

from neo.data import held_out, spill
from neo.data.documents import Part, Unreadable, read_part
from neo.data.inputs import InputFile
from neo.data.records import Document, ReadOptions, Tally
from neo.data.store import dtype_for
from neo.data.store_writer import ShardWriter, write_json
from neo.data.tokenizer import AnyTokenizer


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both stages need to know. `work` is the folder of temporary files inside `folder`."""

    folder: str
    work: str
    tokenizer: AnyTokenizer
    options: ReadOptions
    seed: int
    num_buckets: int
    layout: str

    @property
    def dtype(self) -> np.dtype:
        """Stored type of the tokens, little-endian."""
        return np.dtype(dtype_for(self.tokenizer.vocab_size)).newbyteorder("<")

    @property
    def key(self) -> str:
        """Digest of everything that a piece's file depends on besides the piece."""
        facts = [self.options.arguments(), self.tokenizer.sha256, self.seed, self.num_buckets]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Piece:
    """One task of the first stage: parts of the input, and the files they are parts of."""

    parts: tuple[Part, ...]
    files: tuple[InputFile, ...]

    def name(self, settings: Settings) -> str:
        """File name that changes with anything the piece's content depends on, so that a finished one is reused."""
        facts = [settings.key, [dataclasses.astuple(part) for part in self.parts],
                 [(file.name, file.size, file.modified) for file in self.files]]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32] + ".spill"

    @property
    def size(self) -> int:
        """Estimated bytes of text."""
        return sum(part.size for part in self.parts)


def tokenize_piece(settings: Settings, piece: Piece) -> str:
    """First stage: read, tokenize and bucket the documents of a piece; returns the path of its file."""
    path = os.path.join(settings.work, piece.name(settings))
    writer = spill.SpillWriter(path, settings.num_buckets)
    facts = PieceFacts()
    for part, file in zip(piece.parts, piece.files, strict=True):
        tally, mine = Tally(), PieceFacts()
        if file.kind != "txt":  # a .txt gives its one document at the end or none: nothing to take back
            writer.mark()
        try:
            for document in read_part(file, part, settings.options, tally):
                record = _record(settings, document, mine, (part.file, document.row, f"{file.name}:{document.row}"), tally)
                if record is not None:
                    writer.add(record)
        except Unreadable as error:
            if file.kind != "txt":
                writer.roll_back()
            facts.unreadable.append(str(error))
            continue
        facts.merge(mine)
        facts.tally.merge(tally.counts)
    writer.close(facts.as_json())
    return path


def _record(settings: Settings, document: Document, facts: PieceFacts, place: tuple[int, int, str],
            tally: Tally) -> spill.Record | None:
    tokenizer = settings.tokenizer
    if document.tokens is None:
        tokens = tokenizer.encode_document(document.text, settings.dtype)
        num_bytes = len(document.text.encode("utf-8"))
    else:
        ids = document.tokens
        wrong = ids[(ids < 0) | (ids >= tokenizer.vocab_size)]
        if len(wrong):
            return tally.add("skipped", f"token id outside 0 .. {tokenizer.vocab_size - 1}",
                             (*place[:2], f"{place[2]}, id {wrong[0]}"))
        ended = ids[-1] == tokenizer.eod_id
        if ended and len(ids) == 1:
            return tally.add("skipped", "empty", place)
        tokens = np.append(ids, [] if ended else tokenizer.eod_id).astype(settings.dtype)
        num_bytes = int(tokenizer.token_bytes[tokens].sum()) if document.num_bytes < 0 else document.num_bytes
    facts.add(held_out.position(document.id), num_bytes)
    return spill.Record(held_out.shuffle_key(settings.seed, document.id), document.file, document.row, document.id,
                        tokens, num_bytes)


@dataclasses.dataclass
class PieceFacts:
    """What is known about some documents: number, text bytes, range of their held-out positions, what was skipped."""

    documents: int = 0
    num_bytes: int = 0
    lowest: int = held_out.RANGE
    highest: int = -1
    tally: Tally = dataclasses.field(default_factory=Tally)
    unreadable: list[str] = dataclasses.field(default_factory=list)

    def add(self, position: int, num_bytes: int) -> None:
        """One more document."""
        self.documents += 1
        self.num_bytes += num_bytes
        self.lowest, self.highest = min(self.lowest, position), max(self.highest, position)

    def merge(self, other: PieceFacts) -> None:
        """The facts about both."""
        self.documents += other.documents
        self.num_bytes += other.num_bytes
        self.lowest, self.highest = min(self.lowest, other.lowest), max(self.highest, other.highest)
        self.tally.merge(other.tally.counts)
        self.unreadable += other.unreadable

    def as_json(self) -> dict[str, Any]:
        """Plain values; `from_json` reverses it."""
        return {**dataclasses.asdict(self), "tally": self.tally.counts}

    @staticmethod
    def from_json(value: dict[str, Any]) -> PieceFacts:
        """The reverse of `as_json`."""
        return PieceFacts(**{**value, "tally": Tally(value["tally"])})


@dataclasses.dataclass(frozen=True)
class Bucket:
    """One task of the second stage. `inputs` is a digest of all pieces: a result for other pieces is not reused."""

    number: int
    pieces: tuple[str, ...]
    limit: int
    inputs: str

    def result_path(self, settings: Settings) -> str:
        """Where the finished bucket is recorded."""
        return os.path.join(settings.work, f"bucket-{self.number:05d}.json")

    def validation_path(self, settings: Settings) -> str:
        """Its held-out documents, in order; they become part of one shard at the end."""
        return os.path.join(settings.work, f"bucket-{self.number:05d}.validation")

    def finished(self, settings: Settings) -> dict[str, Any] | None:
        """The recorded result, if it is for these pieces."""
        try:
            with open(self.result_path(settings), encoding="utf-8") as file:
                result = json.load(file)
        except (OSError, ValueError):
            return None
        return result if result.get("inputs") == self.inputs and result.get("limit") == self.limit else None


def write_bucket(settings: Settings, bucket: Bucket) -> dict[str, Any]:
    """Second stage: sort the documents of a bucket, write those to train on as a shard, set the others aside."""
    data = [spill.read_bucket(path, bucket.number, settings.num_buckets) for path in bucket.pieces]
    records = [record for piece in data for record in spill.unpack(piece, settings.dtype)]
    records.sort(key=lambda record: (record.key, record.id, record.file, record.row))
    tally = Tally()
    stem = f"train-{bucket.number:05d}-of-{settings.num_buckets:05d}"
    writer = ShardWriter(settings.folder, stem, settings.dtype.name, settings.layout)
    temporary = f"{bucket.validation_path(settings)}.{os.getpid()}.tmp"
    before, repeated = None, 1
    with open(temporary, "wb") as held:
        for record in records:
            repeated = repeated + 1 if record.id == before else 1
            before = record.id
            name = record.id
            if repeated > 1:
                # The same id twice (a bad id field, or two inputs with the same file names): both are kept, on the
                # same side of the split, the later one under a name of its own.
                name = f"{record.id}#{repeated}"
                tally.add("repaired", "repeated id, #2, #3, ... appended", (record.file, record.row, record.id))
            if held_out.position(record.id) < bucket.limit:
                held.write(dataclasses.replace(record, id=name).packed())
            else:
                writer.append(record.tokens, name, record.num_bytes)
        held.flush()
        os.fsync(held.fileno())
    os.replace(temporary, bucket.validation_path(settings))
    shard = writer.close()
    if not writer.num_documents:
        for name in writer.names:
            os.remove(os.path.join(settings.folder, name))
        shard = None
    result = {"inputs": bucket.inputs, "limit": bucket.limit, "shard": shard, "bytes": writer.num_bytes,
              "tally": tally.counts}
    write_json(bucket.result_path(settings), result)
    return result


def write_validation(settings: Settings, buckets: list[Bucket]) -> tuple[list[dict[str, Any]], int]:
    """All held-out documents as one shard, in bucket order: its manifest entries (none or one) and its text bytes."""
    writer = ShardWriter(settings.folder, "validation-00000-of-00001", settings.dtype.name, settings.layout)
    for bucket in buckets:
        with open(bucket.validation_path(settings), "rb") as file:
            for record in spill.unpack(file.read(), settings.dtype):
                writer.append(record.tokens, record.id, record.num_bytes)
    shard = writer.close()
    if not writer.num_documents:
        for name in writer.names:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(settings.folder, name))
        return [], 0
    return [shard], writer.num_bytes
