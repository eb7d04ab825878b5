"""The two stages of preparation: pieces of input to tokenized, bucketed documents; buckets to shuffled shards.

Which bucket a document goes to, and its place there, follow from (seed, id) alone; the number of buckets follows from
the size of the input alone. So the output is the same whatever the pieces, the workers and the interruptions. A group of
documents goes by its group's name in place of the id, and stays in input order. Each variant has buckets of its own,
one variant after the other.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from neo.data import held_out, spill
from neo.data.canary import Canaries
from neo.data.documents import Part, Unreadable, read_part
from neo.data.inputs import InputFile
from neo.data.records import Document, ReadOptions, Tally
from neo.data.store import dtype_for
from neo.data.store_writer import Entry, ShardWriter, append_packed, write_json, write_packed_end
from neo.data.tokenizer import AnyTokenizer
from neo.data.transforms import NAMES, Encoded, Transforms, plain, transformed
from neo.errors import InputError

LARGEST_GROUPS = 4 << 30  # ours: bytes of a bucket that a worker takes on where groups may have made it large


@dataclasses.dataclass(frozen=True)
class Settings:
    """What both stages need to know. `work` is the folder of temporary files inside `folder`.

    There are `num_buckets` of each variant. `pack` is the sequence length to pack documents for, 0 for no packing.
    """

    folder: str
    work: str
    tokenizer: AnyTokenizer
    options: ReadOptions
    seed: int
    num_buckets: int
    layout: str
    validation: float = 0.0
    transforms: Transforms = Transforms()
    pack: int = 0

    @property
    def dtype(self) -> np.dtype:
        """Stored type of the tokens, little-endian."""
        return np.dtype(dtype_for(self.tokenizer.vocab_size)).newbyteorder("<")

    @property
    def key(self) -> str:
        """Digest of everything that a piece's file depends on besides the piece."""
        facts = [spill.MAGIC.decode(), self.options.arguments(), self.tokenizer.sha256, self.seed, self.num_buckets,
                 self.transforms.arguments(), self.validation if self.transforms.changes_documents else None]
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
    writer = spill.SpillWriter(path, settings.num_buckets, settings.transforms.variants)
    facts = PieceFacts()
    for part, file in zip(piece.parts, piece.files, strict=True):
        tally, mine = Tally(), PieceFacts()
        if file.kind != "txt":  # a .txt gives its one document at the end or none: nothing to take back
            writer.mark()
        try:
            for document in read_part(file, part, settings.options, tally):
                if _usable(settings, document, (part.file, document.row, f"{file.name}:{document.row}"), tally):
                    for record in _records(settings, document, mine):
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


def _usable(settings: Settings, document: Document, place: tuple[int, int, str], tally: Tally) -> bool:
    """Whether ids of a pre-tokenized document are the tokenizer's, and there is one besides its end; counted where not."""
    if document.tokens is None:
        return True
    for ids in (document.prompt, document.tokens):
        wrong = ids[(ids < 0) | (ids >= settings.tokenizer.vocab_size)]
        if len(wrong):
            tally.add("skipped", f"token id outside 0 .. {settings.tokenizer.vocab_size - 1}",
                      (*place[:2], f"{place[2]}, id {wrong[0]}"))
            return False
    if len(document.tokens) == 1 and document.tokens[0] == settings.tokenizer.eod_id:
        tally.add("skipped", "empty", place)
        return False
    return True


def _records(settings: Settings, document: Document, facts: PieceFacts) -> Iterator[spill.Record]:
    """The document in all its variants, and as it is where validation may need it so."""
    by, tokenizer = document.group or document.id, settings.tokenizer
    position = held_out.position(by)
    exact: Encoded | None = None
    if not settings.transforms.changes_documents:
        exact = plain(document, tokenizer, settings.dtype)
    num_bytes = document.num_bytes
    if document.tokens is None:
        num_bytes = len(document.text.encode("utf-8")) + len(document.prompt.encode("utf-8"))
    elif num_bytes < 0:
        num_bytes = int(tokenizer.token_bytes[document.tokens].sum()) + int(tokenizer.token_bytes[document.prompt].sum())

    def record(encoded: Encoded, variant: int, is_plain: bool = False) -> spill.Record:
        key = held_out.shuffle_key(settings.seed, _variant_name(by, variant))
        return spill.Record(key, document.file, document.row, document.id, encoded.tokens, num_bytes, document.group,
                            encoded.prompt, variant, encoded.flags, is_plain)

    for variant in range(settings.transforms.variants):
        yield record(exact or transformed(document, tokenizer, settings.dtype, settings.transforms, settings.seed, variant),
                     variant)
    # The final limit is not known yet; a source with none below it holds out its lowest, so one of the lowest so far.
    if exact is None and settings.validation and (position < held_out.limit(settings.validation)
                                                  or position <= facts.lowest):
        yield record(plain(document, tokenizer, settings.dtype), 0, is_plain=True)
    facts.add(position, num_bytes)


def _variant_name(document_id: str, variant: int) -> str:
    return f"{document_id}#v{variant}" if variant else document_id


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
    total = settings.num_buckets * settings.transforms.variants
    if settings.options.group_field:
        size = sum(spill.bucket_bytes(path, bucket.number, total) for path in bucket.pieces)
        if size > LARGEST_GROUPS:
            raise InputError(f"--group_field={settings.options.group_field}: {size >> 20} MiB of tokens have to be sorted at "
                             "once, because a group is never cut; name a field of smaller groups, or leave it out")
    data = [spill.read_bucket(path, bucket.number, total) for path in bucket.pieces]
    records = [record for piece in data for record in spill.unpack(piece, settings.dtype)]
    tally, counts = Tally(), collections.Counter()
    held, train = _sides(settings, bucket, records, tally, counts)
    temporary = f"{bucket.validation_path(settings)}.{os.getpid()}.tmp"
    with open(temporary, "wb") as file:
        for record in held:
            file.write(record.packed())
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, bucket.validation_path(settings))
    # A packed split has one shard more, for the last target of its last bin.
    stem = f"train-{bucket.number:05d}-of-{total + (settings.pack > 0):05d}"
    writer = ShardWriter(settings.folder, stem, settings.dtype.name, settings.layout)
    packing = None
    if settings.pack:
        packed = append_packed(writer, train, settings.pack, settings.tokenizer.eod_id)
        packing = {"documents": len(train), "bins": packed.bins, "padding": packed.padding,
                   "cut": num_cut(train, settings.pack)}
    else:
        for entry in train:
            writer.append(*entry)
    shard = writer.close()
    if not writer.num_documents:
        for name in writer.names:
            os.remove(os.path.join(settings.folder, name))
        shard = None
    result = {"inputs": bucket.inputs, "limit": bucket.limit, "shard": shard, "bytes": writer.num_bytes,
              "tally": tally.counts, "transforms": counts, "packing": packing}
    write_json(bucket.result_path(settings), result)
    return result


def _sides(settings: Settings, bucket: Bucket, records: list[spill.Record], tally: Tally,
           counts: collections.Counter[str]) -> tuple[list[spill.Record], list[Entry]]:
    """The held-out documents of a bucket and those to train on, canaries among them, in order and under their names."""
    records.sort(key=lambda record: (record.key, record.group != "", record.group or record.id, record.file, record.row))
    has_plain = settings.transforms.changes_documents
    canaries = settings.transforms.canaries
    held: list[spill.Record] = []
    train: list[Entry] = []
    waiting: list[Entry] = []  # canaries, until the group that they follow is complete
    seen: collections.Counter[str] = collections.Counter()
    before: spill.Record | None = None
    for record in records:
        is_held = held_out.position(record.group or record.id) < bucket.limit
        if (is_held and record.variant) or (has_plain and record.plain != is_held):
            continue
        joined = before is not None and record.group != "" and record.group == before.group
        if before is None or record.key != before.key:
            seen.clear()
        before = record
        seen[record.id] += 1
        name = record.id
        if seen[name] > 1:
            # The same id twice (a bad id field, or two inputs with the same file names): both are kept, on the same
            # side of the split, the later one under a name of its own.
            name = f"{name}#{seen[name]}"
            if not record.variant:
                tally.add("repaired", "repeated id, #2, #3, ... appended", (record.file, record.row, record.id))
        if is_held:
            held.append(dataclasses.replace(record, id=name))
            continue
        if not joined:
            train += waiting
            waiting = []
        shown = _variant_name(name, record.variant)
        train.append(Entry(record.tokens, shown, record.num_bytes, record.prompt, joined))
        counts.update(kind for i, kind in enumerate(NAMES) if record.flags >> i & 1)
        if canaries is not None and (number := canaries.after(settings.seed, name, record.variant)) >= 0:
            waiting.append(_canary(settings, canaries, number, shown))
            counts[f"canary/{canaries.texts[number][0]}"] += 1
    return held, train + waiting


def _canary(settings: Settings, canaries: Canaries, number: int, after: str) -> Entry:
    """Canary `number` as a document, named after the one that it follows."""
    line, text = canaries.texts[number]
    tokens = settings.tokenizer.encode_document(text, settings.dtype)
    return Entry(tokens, f"canary/{line}#{after}", len(text.encode("utf-8")))


def num_cut(entries: Sequence[Entry], seq_len: int) -> int:
    """How many documents packing cuts: those longer than a bin, and of a longer group those across a border."""
    cut = begin = 0
    for entry in entries:
        begin = begin if entry.joined else 0
        cut += begin // seq_len != (begin + len(entry.tokens) - 1) // seq_len
        begin += len(entry.tokens)
    return cut


def write_end(settings: Settings) -> dict[str, Any]:
    """The last shard of a packed training split: its manifest entry."""
    total = settings.num_buckets * settings.transforms.variants
    return write_packed_end(settings.folder, f"train-{total:05d}-of-{total + 1:05d}", settings.dtype.name,
                            settings.tokenizer.eod_id, settings.layout)


def write_validation(settings: Settings, buckets: list[Bucket]) -> tuple[list[dict[str, Any]], int]:
    """All held-out documents as one shard, in bucket order: its manifest entries (none or one) and its text bytes."""
    writer = ShardWriter(settings.folder, "validation-00000-of-00001", settings.dtype.name, settings.layout)
    before: spill.Record | None = None
    for bucket in buckets:
        with open(bucket.validation_path(settings), "rb") as file:
            for record in spill.unpack(file.read(), settings.dtype):
                joined = before is not None and record.group != "" and record.group == before.group
                writer.append(record.tokens, record.id, record.num_bytes, record.prompt, joined)
                before = record
    shard = writer.close()
    if not writer.num_documents:
        for name in writer.names:
            with contextlib.suppress(FileNotFoundError):
                os.remove(os.path.join(settings.folder, name))
        return [], 0
    return [shard], writer.num_bytes
