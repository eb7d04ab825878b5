"""Temporary files of the external shuffle: tokenized documents grouped into buckets by their shuffle key.

One file per piece of input. It holds runs (what fitted into memory at a time); a run holds the records of bucket 0,
then of bucket 1, and so on; at the end stand the offsets of each run's buckets, a JSON summary and a trailer. A file
appears under its name only when it is complete.
"""

from __future__ import annotations

import array
import dataclasses
import json
import os
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np

from neo.errors import InputError

# Key, file, row, bytes of id and group, tokens, bytes of text, prompt, variant, flags, whether plain.
RECORD = struct.Struct("<16sIQIIQQIHBB")
TRAILER = struct.Struct("<QQQ8s")  # offset of the tables, number of runs, offset of the summary, magic
MAGIC = b"NEOSPIL2"
RUN_BYTES = 64 << 20  # ours: tokens kept in memory before they are written as a run


@dataclasses.dataclass(frozen=True)
class Record:
    """One tokenized document; `tokens` (with the end-of-document token) is raw little-endian.

    The first `prompt` tokens are not learned. `variant` counts from 0 the forms that one document is written in, `flags`
    say what was done to it (transforms.NAMES), and a `plain` one is for validation alone.
    """

    key: bytes
    file: int
    row: int
    id: str
    tokens: np.ndarray
    num_bytes: int
    group: str = ""
    prompt: int = 0
    variant: int = 0
    flags: int = 0
    plain: bool = False

    def packed(self) -> bytes:
        """The record as it stands in a file."""
        name, group = self.id.encode("utf-8"), self.group.encode("utf-8")
        return RECORD.pack(self.key, self.file, self.row, len(name), len(group), len(self.tokens), self.num_bytes,
                           self.prompt, self.variant, self.flags, self.plain) + name + group + self.tokens.tobytes()


def unpack(data: bytes | memoryview, dtype: np.dtype) -> Iterator[Record]:
    """The records of a stretch of bytes, in order; tokens are views of `data`."""
    view, position = memoryview(data), 0
    while position < len(view):
        key, file, row, name_size, group_size, num_tokens, num_bytes, prompt, variant, flags, plain = RECORD.unpack_from(
            view, position)
        position += RECORD.size
        name = str(view[position:position + name_size], "utf-8")
        position += name_size
        group = str(view[position:position + group_size], "utf-8")
        position += group_size
        tokens = np.frombuffer(view, dtype, num_tokens, position)
        position += num_tokens * dtype.itemsize
        yield Record(key, file, row, name, tokens, num_bytes, group, prompt, variant, flags, bool(plain))


class SpillWriter:
    """Writes the file of one piece. Nothing added since `mark` counts after `roll_back`.

    Each of the variants has `num_buckets` buckets of its own, those of variant 0 first.
    """

    def __init__(self, path: str, num_buckets: int, variants: int = 1):
        self.path, self.num_buckets = path, num_buckets
        self._temporary = f"{path}.{os.getpid()}.tmp"
        self._file = open(self._temporary, "wb")  # noqa: SIM115  (closed by close)
        self._buckets = [bytearray() for _ in range(num_buckets * variants)]
        self._held = 0
        self._runs: list[array.array] = []
        self._mark = (0, 0)

    def add(self, record: Record) -> None:
        """Add a document to its bucket."""
        packed = record.packed()
        self._buckets[record.variant * self.num_buckets + bucket_of(record.key, self.num_buckets)] += packed
        self._held += len(packed)
        if self._held >= RUN_BYTES:
            self._flush()

    def mark(self) -> None:
        """Remember this place."""
        self._flush()
        self._mark = (self._file.tell(), len(self._runs))

    def roll_back(self) -> None:
        """Forget everything since `mark`."""
        for bucket in self._buckets:
            bucket.clear()
        self._held = 0
        self._file.seek(self._mark[0])
        self._file.truncate()
        del self._runs[self._mark[1]:]

    def _flush(self) -> None:
        if not self._held:
            return
        offsets = array.array("Q", [self._file.tell()])
        for bucket in self._buckets:
            self._file.write(bucket)
            offsets.append(offsets[-1] + len(bucket))
            bucket.clear()
        self._runs.append(offsets)
        self._held = 0

    def close(self, summary: Any) -> None:
        """Finish the file; `summary` (JSON) comes back from `read_summary`."""
        self._flush()
        tables = self._file.tell()
        for offsets in self._runs:
            self._file.write(offsets.tobytes())
        place = self._file.tell()
        self._file.write(json.dumps(summary).encode())
        self._file.write(TRAILER.pack(tables, len(self._runs), place, MAGIC))
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        os.replace(self._temporary, self.path)


def bucket_of(key: bytes, num_buckets: int) -> int:
    """Buckets cut the range of keys into equal stretches, in order."""
    return int.from_bytes(key[:8], "big") * num_buckets >> 64


def _trailer(file: Any, path: str) -> tuple[int, int, int, int]:
    size = file.seek(0, os.SEEK_END)
    if size >= TRAILER.size:
        file.seek(size - TRAILER.size)
        tables, runs, place, magic = TRAILER.unpack(file.read(TRAILER.size))
        if magic == MAGIC:
            return tables, runs, place, size - TRAILER.size
    raise InputError(f"{path}: damaged work file; remove it and run the same command again")


def read_summary(path: str) -> Any:
    """The summary given to `SpillWriter.close`."""
    with open(path, "rb") as file:
        _, _, place, end = _trailer(file, path)
        file.seek(place)
        return json.loads(file.read(end - place))


def bucket_bytes(path: str, bucket: int, num_buckets: int) -> int:
    """How many bytes `read_bucket` would give."""
    with open(path, "rb") as file:
        return sum(stop - start for start, stop in _stretches(file, path, bucket, num_buckets))


def read_bucket(path: str, bucket: int, num_buckets: int) -> bytes:
    """All records of one bucket in one piece's file, as bytes for `unpack`."""
    found = []
    with open(path, "rb") as file:
        for start, stop in _stretches(file, path, bucket, num_buckets):
            file.seek(start)
            found.append(file.read(stop - start))
    return b"".join(found)


def _stretches(file: Any, path: str, bucket: int, num_buckets: int) -> list[tuple[int, int]]:
    """Where the bucket stands in each run of a piece's file."""
    tables, runs, _, _ = _trailer(file, path)
    found = []
    for run in range(runs):
        file.seek(tables + 8 * (run * (num_buckets + 1) + bucket))
        found.append(struct.unpack("=QQ", file.read(16)))
    return found
