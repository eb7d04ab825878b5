"""Reading bytes of store files: memory-mapped when local, through fsspec and the block cache otherwise.

A reader object can be pickled: it carries the path only and opens its file again at first use.
"""

from __future__ import annotations

import json
import os
import threading
from typing import Any

import numpy as np

from neo.data import block_cache, remote
from neo.data.block_cache import BLOCK_BYTES
from neo.errors import InputError, RestartSafe

RECORD_TOKENS = 8192  # ours: tokens per ArrayRecord record, the longest window of the first recipes


def is_url(path: str) -> bool:
    """True for fsspec addresses such as gs://bucket/x and memory://x."""
    return "://" in path


def join(path: str, *names: str) -> str:
    """Path or URL of something below `path`."""
    return "/".join([path.rstrip("/"), *names]) if is_url(path) else os.path.join(path, *names)


def parent(path: str) -> str:
    """Path or URL of the folder that `path` lies in."""
    return path.rstrip("/").rpartition("/")[0] if is_url(path) else os.path.dirname(os.path.abspath(path))


def _entries(url: str) -> list[dict[str, Any]] | None:
    """fsspec's description of what lies directly in a remote folder; None where there is no such folder."""
    def listing(fs: Any, path: str) -> list[dict[str, Any]]:
        fs.invalidate_cache(path)  # s3fs and gcsfs remember listings for as long as the process lives
        return fs.ls(path, detail=True)
    try:
        return remote.ask(url, listing)
    except FileNotFoundError:
        return None


def _name(entry: dict[str, Any]) -> str:
    return entry["name"].rstrip("/").rsplit("/", 1)[-1]


def list_sizes(folder: str) -> dict[str, int] | None:
    """Names and sizes in bytes of the files and links directly inside `folder`; None where there is no such folder."""
    if is_url(folder):
        found = _entries(folder)
        return None if found is None else {_name(e): int(e["size"] or 0) for e in found if e["type"] == "file"}
    if not os.path.isdir(folder):
        return None
    with os.scandir(folder) as entries:
        return {e.name: e.stat().st_size for e in entries if e.is_file()}


def list_folders(folder: str) -> list[str]:
    """Sorted names of the folders directly inside `folder`; empty where there is no such folder."""
    if is_url(folder):
        return sorted(_name(e) for e in _entries(folder) or () if e["type"] == "directory")
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir())


def read_bytes(path: str) -> bytes:
    """The whole content of a small file. Raises FileNotFoundError where there is none."""
    if is_url(path):
        return remote.ask(path, lambda fs, inner: fs.cat_file(inner))
    with open(path, "rb") as file:
        return file.read()


def iterate_bytes(path: str, chunk: int = 1 << 24):
    """The content of a file of any size, `chunk` bytes at a time. Never from the block cache."""
    if is_url(path):
        def size(fs: Any, inner: str) -> int:
            fs.invalidate_cache(inner)
            return fs.info(inner)["size"]
        stop = remote.ask(path, size)
        for start in range(0, stop, chunk):
            yield remote.ask(path, lambda fs, inner, at=start: fs.cat_file(inner, start=at, end=min(at + chunk, stop)))
        return
    with open(path, "rb") as file:
        while piece := file.read(chunk):
            yield piece


def read_json(path: str) -> Any:
    """A parsed JSON file; InputError where it is not JSON."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise InputError(f"{path}: damaged, not JSON ({error}); write it again or copy it again") from error


class LocalBytes:
    """A memory-mapped local file; `read` returns views without copying."""

    def __init__(self, path: str, size: int):
        self.path, self.size = path, size
        self._map: np.ndarray | None = None

    def __getstate__(self):
        return (self.path, self.size)

    def __setstate__(self, state):
        self.__init__(*state)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) as uint8."""
        if self._map is None:
            self._map = (np.memmap(self.path, dtype=np.uint8, mode="r").view(np.ndarray) if self.size
                         else np.zeros(0, np.uint8))
        return self._map[start:stop]


class RemoteBytes:
    """A file behind a URL, read in blocks of 1 MiB through the block cache.

    Raises InputError where the file is gone or shorter than it was, RestartSafe where the store does not answer.
    """

    def __init__(self, path: str, size: int):
        self.path, self.size = path, size
        self._key = ""

    def __getstate__(self):
        return (self.path, self.size)

    def __setstate__(self, state):
        self.__init__(*state)

    def _ask(self, action: Any) -> Any:
        try:
            return remote.ask(self.path, action, RestartSafe)
        except FileNotFoundError as error:
            raise InputError(f"{self.path}: the file is gone, it was there when the store was opened; "
                             "copy it again or prepare the source again") from error

    def _fetch(self, numbers: list[int]) -> list[np.ndarray]:
        """These blocks from the store, asked for all at once."""
        starts = [number * BLOCK_BYTES for number in numbers]
        ends = [min(start + BLOCK_BYTES, self.size) for start in starts]

        def ranges(fs: Any, path: str) -> list[bytes]:
            if len(starts) == 1:
                return [fs.cat_file(path, start=starts[0], end=ends[0])]
            pieces = fs.cat_ranges([path] * len(starts), starts, ends, on_error="return")
            for piece in pieces:
                if isinstance(piece, BaseException):
                    raise piece
            return pieces

        pieces = self._ask(ranges)
        for start, end, piece in zip(starts, ends, pieces, strict=True):
            if len(piece) != end - start:
                raise InputError(f"{self.path}: {len(piece)} bytes from byte {start} on where {end - start} should be: the "
                                 "file was replaced after the store was opened; copy it again or prepare the source again")
        return [np.frombuffer(piece, np.uint8) for piece in pieces]

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) as uint8."""
        if start >= stop:
            return np.zeros(0, np.uint8)
        if not self._key:
            self._key = _remote_key(self._ask(lambda fs, path: fs.info(path)), self.path, self.size)
        numbers = range(start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES + 1)
        blocks = block_cache.blocks([f"{self._key}-{number}" for number in numbers],
                                    [min(BLOCK_BYTES, self.size - number * BLOCK_BYTES) for number in numbers],
                                    lambda places: self._fetch([numbers[place] for place in places]))
        parts = [block[max(start - number * BLOCK_BYTES, 0):stop - number * BLOCK_BYTES]
                 for number, block in zip(numbers, blocks, strict=True)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _remote_key(info: dict[str, Any], path: str, size: int) -> str:
    """Name in the cache of what the remote file holds now; another one each time where the store does not tell."""
    return block_cache.digest(path, size, remote.version(info) or os.urandom(16).hex())


class RemoteNumbers:
    """Rising uint64 numbers in a remote file, `count` of them from byte `start` (a multiple of 8) on.

    Stands for the array of them where all in memory would be too much: only the blocks that are asked for are read, and
    they stay in the block cache alone.
    """

    def __init__(self, file: RemoteBytes, start: int, count: int):
        self._file, self._start, self._stop = file, start, start + 8 * count

    def __getitem__(self, places: slice) -> np.ndarray:
        first, last, _ = places.indices((self._stop - self._start) // 8)
        return self._file.read(self._start + 8 * first, self._start + 8 * max(first, last)).view("<u8")

    def searchsorted(self, value: Any, side: str = "left") -> int:
        """How many of the numbers are below `value` (`side` left), or not above it (right)."""
        low, high = self._start // BLOCK_BYTES, max(self._stop - 1, self._start) // BLOCK_BYTES
        while low < high:
            middle = (low + high) // 2
            last = (middle + 1) * BLOCK_BYTES
            if self._file.read(last - 8, last).view("<u8").searchsorted(value, side) == 0:
                high = middle
            else:
                low = middle + 1
        first = max(low * BLOCK_BYTES, self._start)
        part = self._file.read(first, min((low + 1) * BLOCK_BYTES, self._stop)).view("<u8")
        return (first - self._start) // 8 + int(part.searchsorted(value, side))


def rising_numbers(file: LocalBytes | RemoteBytes, start: int, count: int) -> np.ndarray | RemoteNumbers:
    """Rising uint64 numbers from byte `start` of a file on, to be sliced and searched: a view of a local file."""
    if isinstance(file, RemoteBytes):
        return RemoteNumbers(file, start, count)
    return file.read(start, start + 8 * count).view("<u8")


class FlatTokens:
    """Little-endian tokens, one after the other."""

    def __init__(self, path: str, size: int, dtype: str):
        self.dtype = np.dtype(dtype).newbyteorder("<")
        self._bytes = (RemoteBytes if is_url(path) else LocalBytes)(path, size)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) in the stored type."""
        width = self.dtype.itemsize
        return self._bytes.read(start * width, stop * width).view(self.dtype)


class ArrayRecordTokens:
    """Tokens in ArrayRecord records of RECORD_TOKENS each; the last may be shorter.

    The library reads local files only, so a remote shard is first copied as a whole to the block cache's folder.
    """

    def __init__(self, path: str, size: int, dtype: str):
        self.path, self.size, self.dtype = path, size, np.dtype(dtype).newbyteorder("<")
        self._reader: Any = None
        self._lock = threading.Lock()

    def __getstate__(self):
        return (self.path, self.size, self.dtype.name)

    def __setstate__(self, state):
        self.__init__(*state)

    def _open(self) -> Any:
        try:
            from array_record.python.array_record_module import ArrayRecordReader
        except ImportError as error:
            raise InputError(f"{self.path}: this layout needs array_record: pip install array_record") from error
        path = self._local_copy() if is_url(self.path) else self.path
        # No read-ahead: windows are read in random order.
        return ArrayRecordReader(path, options="readahead_buffer_size:0,max_parallelism:0")

    def _local_copy(self) -> str:
        disk = block_cache.for_files()
        try:
            info = remote.ask(self.path, lambda fs, inner: fs.info(inner), RestartSafe)
            path = disk.keep_file(_remote_key(info, self.path, self.size), self.size, lambda to: remote.ask(
                self.path, lambda fs, inner: fs.get_file(inner, to), RestartSafe))
        except FileNotFoundError as error:
            raise InputError(f"{self.path}: the file is gone, it was there when the store was opened; "
                             "copy it again or prepare the source again") from error
        if path is None:
            raise InputError(f"{self.path}: no room in {disk.folder} for its {self.size / 1e9:.3g}e9 bytes (at most "
                             f"{disk.limit / 1e9:g}e9 in all): give another --config.data.cache=FOLDER or more "
                             "data.cache_gb, or prepare the source with --layout=flat")
        return path

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens [start, stop) in the stored type."""
        if start >= stop:
            return np.zeros(0, self.dtype)
        first, last = start // RECORD_TOKENS, (stop - 1) // RECORD_TOKENS
        with self._lock:  # the reader keeps a position
            if self._reader is None:
                self._reader = self._open()
            records = self._reader.read(list(range(first, last + 1)))
        tokens = np.frombuffer(b"".join(records), self.dtype)
        return tokens[start - first * RECORD_TOKENS:stop - first * RECORD_TOKENS]
