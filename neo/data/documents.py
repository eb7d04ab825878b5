"""Reading documents from files: .txt, .jsonl (.gz, .zst), .parquet, folders, globs and Hugging Face data sets.

A document's id never depends on where the input lies or how it is cut into pieces: it is the value of the id field,
else the path relative to the input (and `:row`, counted from 1, where a file holds several documents).
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import functools
import gzip
import io
import itertools
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from neo.data.inputs import InputFile
from neo.data.records import LARGEST_DOCUMENT, Document, ReadOptions, Tally, cleaned, decoded, from_record
from neo.errors import InputError, nearest
from neo.extras import need


@dataclasses.dataclass(frozen=True)
class Part:
    """A stretch of one input: bytes of plain .jsonl, row groups of .parquet, rows of hf, else the whole file.

    `first_row` is the number of rows (lines) of the file before it; `size` its estimated bytes of text.
    """

    file: int
    start: int = 0
    stop: int = -1
    first_row: int = 0
    size: int = 0


class Unreadable(Exception):
    """An input that cannot be read to its end; nothing of it is used."""


def read_part(file: InputFile, part: Part, options: ReadOptions, tally: Tally) -> Iterator[Document]:
    """The documents of a part, in order; what is skipped or repaired goes to `tally`.

    Raises Unreadable for a file that cannot be read, also in the middle of it.
    """
    reader = {"txt": _read_txt, "jsonl": _read_jsonl, "parquet": _read_parquet, "hf": _read_hf}[file.kind]
    with _unreadable(file):
        yield from reader(file, part, options, tally)


@contextlib.contextmanager
def _unreadable(file: InputFile) -> Iterator[None]:
    """Turn what the libraries raise for files they cannot read into Unreadable."""
    errors: tuple[type[BaseException], ...] = (OSError, EOFError, zlib.error)
    if file.compression == "zst":
        import zstandard
        errors += (zstandard.ZstdError,)
    if file.kind == "parquet":
        import pyarrow
        errors += (pyarrow.ArrowException,)
    try:
        yield
    except errors as error:
        text = (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip()
        raise Unreadable(f"{file.name}: {text.splitlines()[0]}") from error


def _open(file: InputFile) -> Any:
    if file.compression == "gz":
        return gzip.open(file.path, "rb")
    if file.compression == "zst":
        return io.BufferedReader(_ZstdStream(file.path), 1 << 20)
    return open(file.path, "rb", buffering=1 << 20)


class _ZstdStream(io.RawIOBase):
    """Decompressed frames of a .zst file. Unlike zstandard's own reader it raises EOFError for a truncated file."""

    def __init__(self, path: str):
        import zstandard
        self._file = open(path, "rb")  # noqa: SIM115  (closed by close)
        self._make = zstandard.ZstdDecompressor().decompressobj
        self._frame, self._ready, self._rest = self._make(), b"", b""
        self._begun = False

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            if self._frame.eof:
                self._rest, self._frame, self._begun = self._frame.unused_data, self._make(), False
            chunk = self._rest or self._file.read(1 << 17)
            self._rest = b""
            if not chunk:
                if self._begun:
                    raise EOFError("compressed file ended before its end-of-frame marker")
                return 0
            self._begun = True
            self._ready = self._frame.decompress(chunk)
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _read_txt(file: InputFile, part: Part, options: ReadOptions, tally: Tally) -> Iterator[Document]:
    place = (part.file, 0, file.name)
    if options.tokens_field:
        tally.add("skipped", f"text without a field {options.tokens_field!r}", place)
        return
    with _open(file) as stream:
        raw = stream.read(LARGEST_DOCUMENT + 1)
    if len(raw) > LARGEST_DOCUMENT:
        tally.add("skipped", "larger than 1 GiB", place)
        return
    raw = raw.removeprefix(codecs.BOM_UTF8)
    text = decoded(raw, place, options, tally)
    if text is not None and (text := cleaned(text, place, options, tally)) is not None:
        yield Document(file.name, text, part.file, 0)


def _lines(file: InputFile, part: Part) -> Iterator[bytes]:
    """Lines that start in [start, stop) of the file; all of them where stop is -1."""
    with _open(file) as stream:
        if part.start:
            stream.seek(part.start - 1)
            stream.readline()  # the line that starts before this part belongs to the part before
        while part.stop < 0 or stream.tell() < part.stop:
            line = stream.readline()
            if not line:
                return
            yield line


def _read_jsonl(file: InputFile, part: Part, options: ReadOptions, tally: Tally) -> Iterator[Document]:
    for row, line in enumerate(_lines(file, part), part.first_row + 1):
        if row == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        place = (part.file, row, f"{file.name}:{row}")
        text = decoded(line, place, options, tally)
        if text is None:
            continue
        try:
            record = json.loads(text)
        except (ValueError, RecursionError):
            tally.add("skipped", "not JSON", place)
            continue
        if not isinstance(record, dict):
            tally.add("skipped", "not a JSON object", place)
            continue
        document = from_record(file, part.file, row, record, options, tally)
        if document is not None:
            yield document


def _read_parquet(file: InputFile, part: Part, options: ReadOptions, tally: Tally) -> Iterator[Document]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file.path) as table:
        names = table.schema_arrow.names
        groups = list(range(part.start, part.stop))
        if options.content_field not in names:
            rows = sum(table.metadata.row_group(group).num_rows for group in groups)
            return _no_column(file, part, options, tally, names, rows)
        columns = [name for name in options.columns if name in names]
        row = part.first_row
        for batch in table.iter_batches(batch_size=256, row_groups=groups, columns=columns):
            for record in _records(batch):
                row += 1
                document = from_record(file, part.file, row, record, options, tally)
                if document is not None:
                    yield document


def _records(batch: Any) -> Iterator[dict[str, Any]]:
    """The rows of a pyarrow batch; lists (of token ids) as arrays: as Python numbers they take 30 times as long."""
    import pyarrow.types

    columns = []
    for column in batch.columns:
        kind = column.type
        if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
            columns.append([value.values.to_numpy(zero_copy_only=False) if value.is_valid else None for value in column])
        else:
            columns.append(column.to_pylist())
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def _no_column(file: InputFile, part: Part, options: ReadOptions, tally: Tally, names: Sequence[str],
               rows: int) -> None:
    hint = nearest(options.content_field, names) or f" (columns: {', '.join(names[:8])})"
    row = part.first_row + 1
    tally.add("skipped", f"no field {options.content_field!r}", (part.file, row, f"{file.name}:{row}{hint}"), rows)


def _read_hf(file: InputFile, part: Part, options: ReadOptions, tally: Tally) -> Iterator[Document]:
    dataset = hf_dataset(file.path)
    if options.content_field not in dataset.column_names:
        return _no_column(file, part, options, tally, dataset.column_names, part.stop - part.start)
    dataset = dataset.select_columns([name for name in options.columns if name in dataset.column_names])
    for start in range(part.start, part.stop, 256):
        columns = dataset[start:min(start + 256, part.stop)]
        names = list(columns)
        for offset, values in enumerate(zip(*columns.values(), strict=True)):
            record = dict(zip(names, values, strict=True))
            document = from_record(file, part.file, start + offset + 1, record, options, tally)
            if document is not None:
                yield document


@functools.lru_cache(maxsize=4)
def hf_dataset(spec: str) -> Any:
    """The data set `NAME[/SUBSET][:SPLIT]` of the Hugging Face hub (or a local folder `datasets` understands).

    SPLIT defaults to train. Raises InputError: library missing, not found, no network, no such split.
    """
    datasets = need("datasets", extra="hf", why=f"hf:{spec}")
    name, _, split = spec.partition(":")
    parts = name.strip("/").split("/") if not name.startswith((".", "/")) else [name]
    # NAME is `x` or `owner/x`, so two words can be an owner's data set or a data set's subset: try both.
    attempts = ([("/".join(parts[:2]), parts[2])] if len(parts) == 3 else
                [(name, None), (parts[0], parts[1])] if len(parts) == 2 else [(name, None)])
    problem: Exception | None = None
    for path, subset in attempts:
        try:
            return datasets.load_dataset(path, subset, split=split or "train")
        except Exception as error:  # the library raises many kinds; the text of the first is what the user needs
            problem = problem or error
    text = str(problem).strip().splitlines() or [type(problem).__name__]
    raise InputError(f"hf:{spec}: {text[0]}")


def count_lines(path: str, start: int, stop: int) -> int:
    """Number of line ends at bytes [start - 1, stop - 1): with it the lines that start in a range get their numbers.

    A line starts at byte 0 and after each line end, so [start, stop) with start > 0 holds this many line starts.
    """
    first = max(start - 1, 0)
    count, left = 0, stop - 1 - first
    with open(path, "rb") as stream:
        stream.seek(first)
        while left > 0 and (chunk := stream.read(min(left, 1 << 22))):
            count += chunk.count(b"\n")
            left -= len(chunk)
    return count + (start == 0)


def group_parts(parts: Iterable[Part], piece_bytes: int) -> list[tuple[Part, ...]]:
    """Neighbouring parts bundled into pieces of work of about `piece_bytes` of text."""
    pieces: list[tuple[Part, ...]] = []
    pending: list[Part] = []
    size = 0
    for part in parts:
        # 4 KiB a file at least: opening a million tiny files is work too.
        pending.append(part)
        size += max(part.size, 4096)
        if size >= piece_bytes:
            pieces.append(tuple(pending))
            pending, size = [], 0
    return pieces + [tuple(pending)] if pending else pieces


def split_file(number: int, file: InputFile, piece_bytes: int) -> list[Part]:
    """A file as parts that can be read on their own, of about `piece_bytes` of text where the format allows it.

    For plain .jsonl `first_row` is left at 0 for the caller to fill in (`count_lines`). Raises Unreadable.
    """
    if file.kind == "jsonl" and not file.compression and file.size > piece_bytes:
        borders = [*range(0, file.size, piece_bytes), file.size]
        return [Part(number, a, b, 0, b - a) for a, b in itertools.pairwise(borders)]
    if file.kind == "parquet":
        return _split_parquet(number, file, piece_bytes)
    if file.kind == "hf":
        rows = file.rows
        step = max(1, rows * piece_bytes // max(file.text_size, 1))
        return [Part(number, a, min(a + step, rows), a, min(step, rows - a) * file.text_size // max(rows, 1))
                for a in range(0, rows, step)]
    return [Part(number, size=file.text_size)]


def _split_parquet(number: int, file: InputFile, piece_bytes: int) -> list[Part]:
    import pyarrow.parquet

    with _unreadable(file), pyarrow.parquet.ParquetFile(file.path) as table:
        metadata = table.metadata
        groups = [(metadata.row_group(i).num_rows, metadata.row_group(i).total_byte_size)
                  for i in range(metadata.num_row_groups)]
    parts: list[Part] = []
    start = row = rows = size = 0
    for group, (group_rows, group_size) in enumerate(groups):
        rows, size = rows + group_rows, size + group_size
        if size >= piece_bytes or group == len(groups) - 1:
            parts.append(Part(number, start, group + 1, row, size))
            start, row, rows, size = group + 1, row + rows, 0, 0
    return parts


def modified(path: str) -> int:
    """Modification time in nanoseconds; 0 where there is none."""
    with contextlib.suppress(OSError):
        return os.stat(path).st_mtime_ns
    return 0
