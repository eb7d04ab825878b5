"""The token store: prepared tokens of one source, read by position.

A store is a folder (local, or any fsspec address such as gs://bucket/x) with `tokenizer/` and one folder per source;
docs/formats.md describes the files. `open_source` checks everything that can be checked without reading the tokens.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import hashlib
import itertools
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from neo.data import store_files
from neo.errors import InputError

FORMAT = "neo.token_store"
VERSION = 2
MANIFEST = "manifest.json"
LAYOUTS = ("flat", "array_record")
SPLITS = ("train", "validation")
PACKINGS = ("best_fit",)
DOCUMENTS_MAGIC = b"NEODOCS1"
DOCUMENTS_HEADER = 16  # bytes: magic, then the number of documents as uint64
PROMPT_MAX = (1 << 31) - 1  # tokens: the low bits of an extra
JOINED = 1 << 31  # its highest bit
SEARCHED_IDS = 1 << 18  # ours: 2 MB of id ends, some 10 MB of ids
OPEN_SHARDS = 128  # ours: well below the usual limit of 1024 open files


def dtype_for(vocab_size: int) -> str:
    """The smallest type that holds every id below `vocab_size`."""
    return "uint16" if vocab_size <= 1 << 16 else "uint32"


@dataclasses.dataclass(frozen=True)
class Shard:
    """The files of one shard: tokens, document index and, where used, extras.

    Offsets and `sizes` are in bytes, counts in tokens and documents; `sizes` and `sha256` are in the order of `files`.
    """

    tokens: str
    documents: str
    num_tokens: int
    num_documents: int
    sizes: tuple[int, ...]
    sha256: tuple[str, ...]
    extras: str | None = None

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the shard's two or three files."""
        return (self.tokens, self.documents) + ((self.extras,) if self.extras else ())


class Extras(NamedTuple):
    """What is known of some documents in order: int64 [n] first position of each in the split, int64 [n] how many
    leading tokens are left out of the loss (at most its length), bool [n] whether it may see the document before it."""

    begins: np.ndarray
    prompts: np.ndarray
    joined: np.ndarray


def _bytes(path: str, size: int) -> Any:
    return (store_files.RemoteBytes if store_files.is_url(path) else store_files.LocalBytes)(path, size)


class DocumentIndex:
    """Ends and ids of a shard's documents: magic, n, uint64 ends[n], uint64 id_ends[n], ids as UTF-8."""

    def __init__(self, path: str, size: int, num_documents: int):
        self._bytes = _bytes(path, size)
        self.num_documents = num_documents
        head = self._bytes.read(0, DOCUMENTS_HEADER).tobytes()
        if head[:8] != DOCUMENTS_MAGIC or int.from_bytes(head[8:], "little") != num_documents:
            raise InputError(f"{path}: not the document index that the manifest describes; prepare the source again")
        # Contiguous copies would cost memory for nothing: local files stay memory-mapped views.
        self._ends = store_files.rising_numbers(self._bytes, DOCUMENTS_HEADER, num_documents)

    def find(self, position: int, side: str) -> int:
        """Number of documents that end before (`side` left) or at or before (right) `position`."""
        return int(self._ends.searchsorted(np.uint64(position), side=side))

    def ends(self, first: int, last: int) -> np.ndarray:
        """Exclusive end offsets of documents [first, last) within the shard, int64."""
        return self._ends[first:last].astype(np.int64)

    def ids(self, first: int, last: int) -> list[str]:
        """Ids of documents [first, last)."""
        if first >= last:
            return []
        table = DOCUMENTS_HEADER + 8 * self.num_documents
        texts = table + 8 * self.num_documents
        low = max(first - 1, 0)
        ends = self._bytes.read(table + 8 * low, table + 8 * last).view("<u8").astype(np.int64).tolist()
        if first == 0:
            ends = [0, *ends]
        blob = self._bytes.read(texts + ends[0], texts + ends[-1]).tobytes()
        return [blob[a - ends[0]:b - ends[0]].decode("utf-8") for a, b in itertools.pairwise(ends)]

    def find_id(self, name: str) -> list[int]:
        """Numbers of the documents with this id. Reads the table of ids once, SEARCHED_IDS at a time."""
        wanted = np.frombuffer(name.encode("utf-8", "replace"), np.uint8)
        table = DOCUMENTS_HEADER + 8 * self.num_documents
        texts = table + 8 * self.num_documents
        found: list[int] = []
        begin = 0
        for first in range(0, self.num_documents, SEARCHED_IDS):
            last = min(first + SEARCHED_IDS, self.num_documents)
            ends = self._bytes.read(table + 8 * first, table + 8 * last).view("<u8").astype(np.int64)
            starts = np.concatenate([[begin], ends[:-1]])
            begin, low = int(ends[-1]), begin
            same = np.flatnonzero(ends - starts == len(wanted))
            if len(same):
                blob = self._bytes.read(texts + low, texts + begin)
                for place in range(len(wanted) - 1, -1, -1):  # ids differ most at their ends
                    same = same[blob[starts[same] - low + place] == wanted[place]]
                found += (same + first).tolist()
        return found


class Split:
    """All tokens of one split of a source, addressed by position 0 .. num_tokens.

    In a packed split (`packed`) pieces of documents and padding count as documents, and padding has the empty id.
    Safe to use from several threads, and picklable: a copy opens its own files.
    """

    def __init__(self, path: str, name: str, dtype: str, layout: str, shards: tuple[Shard, ...], num_bytes: int,
                 packed: bool = False):
        self.path, self.name, self.dtype, self.layout, self.shards = path, name, dtype, layout, shards
        self.num_bytes, self.packed = num_bytes, packed
        self.has_extras = any(shard.extras for shard in shards)
        self._token_starts = [0, *itertools.accumulate(shard.num_tokens for shard in shards)]
        self._document_starts = [0, *itertools.accumulate(shard.num_documents for shard in shards)]
        self.num_tokens: int = self._token_starts[-1]
        self.num_documents: int = self._document_starts[-1]
        self._open: collections.OrderedDict[tuple[str, int], Any] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return (Split, (self.path, self.name, self.dtype, self.layout, self.shards, self.num_bytes, self.packed))

    def __repr__(self) -> str:
        return f"Split({self.path!r}, {self.name!r}, {self.num_tokens} tokens, {self.num_documents} documents)"

    def _file(self, kind: str, number: int) -> Any:
        """The open token, index or extras file of a shard, from a bounded cache."""
        key = (kind, number)
        with self._lock:
            if key in self._open:
                self._open.move_to_end(key)
                return self._open[key]
            shard = self.shards[number]
            if kind == "documents":
                path = store_files.join(self.path, shard.documents)
                opened: Any = DocumentIndex(path, shard.sizes[1], shard.num_documents)
            elif kind == "extras":
                opened = _bytes(store_files.join(self.path, shard.extras), shard.sizes[2])
            else:
                reader = store_files.FlatTokens if self.layout == "flat" else store_files.ArrayRecordTokens
                opened = reader(store_files.join(self.path, shard.tokens), shard.sizes[0], self.dtype)
            self._open[key] = opened
            if len(self._open) > OPEN_SHARDS:
                self._open.popitem(last=False)
            return opened

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.num_tokens:
            raise IndexError(f"positions [{start}, {stop}) are outside {self.path} {self.name}, "
                             f"which has {self.num_tokens} tokens")

    def _parts(self, start: int, stop: int):
        """(shard number, start, stop) within each shard that [start, stop) touches."""
        number = bisect.bisect_right(self._token_starts, start) - 1
        while start < stop:
            base = self._token_starts[number]
            end = min(stop, self._token_starts[number + 1])
            if end > start:
                yield number, start - base, end - base
            start, number = end, number + 1

    def tokens(self, start: int, stop: int) -> np.ndarray:
        """Tokens at positions [start, stop): int32 [stop - start], across shard borders.

        Raises IndexError outside the split.
        """
        self._check(start, stop)
        parts = [self._file("tokens", number).read(a, b) for number, a, b in self._parts(start, stop)]
        if len(parts) == 1:
            return parts[0].astype(np.int32)
        return np.concatenate([part.astype(np.int32) for part in parts]) if parts else np.zeros(0, np.int32)

    def document_ends(self, start: int, stop: int) -> np.ndarray:
        """Sorted positions e, start < e < stop, where a document ends: e is the next one's first token. int64."""
        self._check(start, stop)
        found = []
        for number, a, b in self._parts(start, stop):
            index = self._file("documents", number)
            # A shard ends with a document; that end belongs to this range only if the range goes on after it.
            base, goes_on = self._token_starts[number], self._token_starts[number] + b < stop
            found.append(index.ends(index.find(a, "right"), index.find(b, "right" if goes_on else "left")) + base)
        if len(found) == 1:
            return found[0]
        return np.concatenate(found) if found else np.zeros(0, np.int64)

    def document_ids(self, start: int, stop: int) -> list[str]:
        """Ids of the documents that have a token in [start, stop), in order; a packed document once per piece."""
        self._check(start, stop)
        ids: list[str] = []
        for number, a, b in self._parts(start, stop):
            index = self._file("documents", number)
            ids += index.ids(index.find(a, "right"), index.find(b - 1, "right") + 1)
        return [name for name in ids if name] if self.packed else ids

    def documents(self, start: int, stop: int) -> list[tuple[int, int, str]]:
        """(first position, end, id) of the documents that have a token in [start, stop), in order; in a packed split of
        every piece, and of padding with the empty id.
        """
        self._check(start, stop)
        found: list[tuple[int, int, str]] = []
        for number, a, b in self._parts(start, stop):
            index = self._file("documents", number)
            first, last = index.find(a, "right"), index.find(b - 1, "right") + 1
            found += zip(*self._spans(number, first, last), index.ids(first, last), strict=True)
        return found

    def find_id(self, name: str) -> list[tuple[int, int]]:
        """Positions [first, end) of every document, or piece of one, with this id. Reads all tables of ids once."""
        return [span for number in range(len(self.shards)) for one in self._file("documents", number).find_id(name)
                for span in zip(*self._spans(number, one, one + 1), strict=True)]

    def _spans(self, number: int, first: int, last: int) -> tuple[list[int], list[int]]:
        """First positions and ends of documents [first, last) of a shard."""
        ends = self._file("documents", number).ends(max(first - 1, 0), last) + self._token_starts[number]
        if first == 0:
            ends = np.concatenate([[self._token_starts[number]], ends])
        return ends[:-1].tolist(), ends[1:].tolist()

    def extras(self, start: int, stop: int) -> Extras:
        """Beginnings, prompts and groups of the documents that have a token in [start, stop), in order."""
        self._check(start, stop)
        found = [self._extras(number, a, b) for number, a, b in self._parts(start, stop)]
        if len(found) == 1:
            return found[0]
        none = Extras(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, bool))
        return Extras(*(np.concatenate(parts) for parts in zip(none, *found, strict=True)))

    def _extras(self, number: int, a: int, b: int) -> Extras:
        """Of the documents with a token in [a, b) of a shard."""
        index = self._file("documents", number)
        first, last = index.find(a, "right"), index.find(b - 1, "right") + 1
        begins = np.empty(last - first, np.int64)
        if first:
            begins[:] = index.ends(first - 1, last - 1)
        else:
            begins[0] = 0
            begins[1:] = index.ends(0, last - 1)
        begins += self._token_starts[number]
        if not self.shards[number].extras:
            return Extras(begins, np.zeros(len(begins), np.int64), np.zeros(len(begins), bool))
        words = self._file("extras", number).read(4 * first, 4 * last).view("<u4")
        return Extras(begins, (words & PROMPT_MAX).astype(np.int64), words > PROMPT_MAX)


@dataclasses.dataclass(frozen=True)
class Source:
    """One prepared source: what the manifest says, and its splits."""

    path: str
    name: str
    dtype: str
    vocab_size: int
    eod_id: int
    tokenizer_sha256: str
    layout: str
    prepare: Mapping[str, Any]
    splits: Mapping[str, Split]
    packing: Mapping[str, Any] | None = None

    @property
    def alignment(self) -> int:
        """Where training windows begin: at any position (1), or at multiples of the length T it was packed for."""
        return self.packing["seq_len"] if self.packing else 1

    def split(self, name: str) -> Split:
        """The split called `name`, train or validation. Raises InputError for another name."""
        if name not in self.splits:
            raise InputError(f"{self.path}: no split {name!r}; it has {', '.join(self.splits)}")
        return self.splits[name]


def read_manifest(path: str) -> dict[str, Any] | None:
    """The manifest of the source folder `path`, checked for format and version; None where there is none."""
    file = store_files.join(path, MANIFEST)
    try:
        manifest = store_files.read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror or error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise InputError(f"{path}: not a token store (its {MANIFEST} is not one of format {FORMAT!r}); "
                         "give a folder written by neo.data.prepare")
    version = manifest.get("version")
    if not isinstance(version, int) or version < 1:
        raise InputError(f"{file}: damaged, version is {version!r}")
    if version > VERSION:
        raise InputError(f"{path}: token store version {version}, this neo reads versions up to {VERSION}; "
                         "install a newer neo, or prepare the source again")
    return manifest


def open_source(path: str) -> Source:
    """Open the source folder `path` (local or a URL) and check its files against the manifest.

    Raises InputError, naming path and cure: nothing there, not a token store, newer version, damaged manifest,
    a shard that is missing or whose size differs.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise InputError(_missing(path))
    try:
        source = _parse(path, manifest)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{store_files.join(path, MANIFEST)}: damaged ({type(error).__name__}: {error}); "
                         "prepare the source again or copy it again") from error
    sizes = store_files.list_sizes(path) or {}
    for split in source.splits.values():
        for shard in split.shards:
            for name, size in zip(shard.files, shard.sizes, strict=True):
                if name not in sizes:
                    raise InputError(f"{store_files.join(path, name)}: shard file is missing; "
                                     "prepare the source again or copy it again")
                if sizes[name] != size:
                    state = "truncated" if sizes[name] < size else "longer than it was written"
                    raise InputError(f"{store_files.join(path, name)}: shard file is {state}: {sizes[name]} bytes, "
                                     f"the manifest says {size}; prepare the source again or copy it again")
    return source


def verify(source: Source) -> None:
    """Read every file of `source` and compare its SHA-256 with the manifest; InputError names the first difference."""
    for split in source.splits.values():
        for shard in split.shards:
            for name, expected in zip(shard.files, shard.sha256, strict=True):
                digest = hashlib.sha256()
                for piece in store_files.iterate_bytes(store_files.join(source.path, name)):
                    digest.update(piece)
                if digest.hexdigest() != expected:
                    raise InputError(f"{store_files.join(source.path, name)}: content differs from what was written "
                                     f"(sha256 {digest.hexdigest()}, the manifest says {expected}); "
                                     "copy it again or prepare the source again")


def list_sources(store: str) -> list[str]:
    """Names of the finished sources in a store folder, sorted."""
    return [name for name in store_files.list_folders(store)
            if MANIFEST in (store_files.list_sizes(store_files.join(store, name)) or {})]


def _missing(path: str) -> str:
    sizes = store_files.list_sizes(path)
    if sizes is None:
        return f"{path}: no such folder; make it with python -m neo.data.prepare"
    inside = list_sources(path)
    if inside:
        return f"{path}: this is a store, not a source; its sources are {', '.join(inside)}"
    if ".work" in store_files.list_folders(path):
        return f"{path}: preparation has not finished; run the same python -m neo.data.prepare command again"
    return f"{path}: not a token store (no {MANIFEST}); give a folder written by python -m neo.data.prepare"


def _parse(path: str, manifest: dict[str, Any]) -> Source:
    dtype, layout = manifest["dtype"], manifest.get("layout", "flat")
    vocab_size, eod_id = _count(manifest["vocab_size"]), _count(manifest["eod_id"])
    if dtype not in ("uint16", "uint32") or layout not in LAYOUTS:
        raise ValueError(f"dtype {dtype!r}, layout {layout!r}")
    if not eod_id < vocab_size <= np.iinfo(dtype).max + 1:
        raise ValueError(f"vocab_size {vocab_size} with dtype {dtype} and eod_id {eod_id}")
    packing = manifest.get("packing")
    if packing is not None and (packing["kind"] not in PACKINGS or _count(packing["seq_len"]) < 1):
        raise ValueError(f"packing {packing!r}")
    splits = {}
    for name in SPLITS:
        entry = manifest["splits"][name]
        shards = tuple(_shard(shard, dtype, layout) for shard in entry["shards"])
        packed = packing is not None and name == "train"
        if packed:
            _check_packing([shard.num_tokens for shard in shards], packing["seq_len"])
        splits[name] = Split(path, name, dtype, layout, shards, _count(entry["bytes"]), packed)
        totals = (splits[name].num_tokens, splits[name].num_documents)
        if totals != (entry["tokens"], entry["documents"]):
            raise ValueError(f"shards of {name} have {totals} tokens and documents, their sum is given as "
                             f"{(entry['tokens'], entry['documents'])}")
    return Source(path, str(manifest["source"]), dtype, vocab_size, eod_id, str(manifest["tokenizer_sha256"]), layout,
                  manifest.get("prepare", {}), splits, packing)


def _check_packing(tokens: list[int], seq_len: int) -> None:
    """Whole bins in every shard, so that bins stay aligned; one token more at the end, the last window's last target."""
    if tokens and (any(count % seq_len for count in tokens[:-1]) or sum(tokens) % seq_len != 1 % seq_len):
        raise ValueError(f"shards of {tokens} tokens in a store packed for seq_len {seq_len}")


def _shard(entry: dict[str, Any], dtype: str, layout: str) -> Shard:
    extras = entry.get("extras")
    names = (entry["tokens"], entry["documents"]) + (() if extras is None else (extras,))
    for name in names:
        if not isinstance(name, str) or "/" in name or "\\" in name or name in ("", ".", ".."):
            raise ValueError(f"shard file name {name!r}")  # a manifest must not point outside its folder
    shard = Shard(*names[:2], _count(entry["num_tokens"]), _count(entry["num_documents"]),
                  tuple(_count(entry["size"][name]) for name in names),
                  tuple(str(entry["sha256"][name]) for name in names), extras)
    if layout == "flat" and shard.sizes[0] != shard.num_tokens * np.dtype(dtype).itemsize:
        raise ValueError(f"{shard.tokens}: {shard.num_tokens} {dtype} tokens cannot be {shard.sizes[0]} bytes")
    if shard.sizes[1] < DOCUMENTS_HEADER + 16 * shard.num_documents:
        raise ValueError(f"{shard.documents}: {shard.num_documents} documents cannot be {shard.sizes[1]} bytes")
    if extras is not None and shard.sizes[2] != 4 * shard.num_documents:
        raise ValueError(f"{extras}: {shard.num_documents} documents cannot be {shard.sizes[2]} bytes")
    return shard


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{value!r} where a count is expected")
    return value
