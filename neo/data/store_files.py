"""Reading bytes of store files: memory-mapped when local, cached range reads through fsspec otherwise.

A reader object can be pickled: it carries the path only and opens its file again at first use.
"""

from __future__ import annotations

import collections
import json
import os
import threading
from typing import Any

import numpy as np

from neo.errors import InputError

BLOCK_BYTES = 1 << 20  # ours: one range request of a remote file; a window of 8192 tokens is 16 or 32 KiB
CACHED_BLOCKS = 16  # ours: 16 MiB per open remote file at most
RECORD_TOKENS = 8192  # ours: tokens per ArrayRecord record, the longest window of the first recipes


def is_url(path: str) -> bool:
    """True for fsspec addresses such as gs://bucket/x and memory://x."""
    return "://" in path


def join(path: str, *names: str) -> str:
    """Path or URL of something below `path`."""
    return "/".join([path.rstrip("/"), *names]) if is_url(path) else os.path.join(path, *names)


def _remote(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url`, and the path within it."""
    try:
        import fsspec
    except ImportError as error:
        raise InputError(f"{url}: reading from a URL needs fsspec: pip install fsspec") from error
    try:
        return fsspec.core.url_to_fs(url)
    except ImportError as error:
        raise InputError(f"{url}: this kind of address needs one more package: {error}") from error
    except ValueError as error:
        raise InputError(f"{url}: {error}") from error


def list_sizes(folder: str) -> dict[str, int] | None:
    """Names and sizes in bytes of the files and links directly inside `folder`; None where there is no such folder."""
    if is_url(folder):
        fs, path = _remote(folder)
        try:
            entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            return None
        return {e["name"].rstrip("/").rsplit("/", 1)[-1]: int(e["size"] or 0) for e in entries if e["type"] == "file"}
    if not os.path.isdir(folder):
        return None
    with os.scandir(folder) as entries:
        return {e.name: e.stat().st_size for e in entries if e.is_file()}


def list_folders(folder: str) -> list[str]:
    """Sorted names of the folders directly inside `folder`; empty where there is no such folder."""
    if is_url(folder):
        fs, path = _remote(folder)
        try:
            entries = fs.ls(path, detail=True)
        except FileNotFoundError:
            return []
        return sorted(e["name"].rstrip("/").rsplit("/", 1)[-1] for e in entries if e["type"] == "directory")
    if not os.path.isdir(folder):
        return []
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir())


def read_bytes(path: str) -> bytes:
    """The whole content of a small file. Raises FileNotFoundError where there is none."""
    if is_url(path):
        fs, inner = _remote(path)
        return fs.cat_file(inner)
    with open(path, "rb") as file:
        return file.read()


def iterate_bytes(path: str, chunk: int = 1 << 24):
    """The content of a file of any size, `chunk` bytes at a time."""
    if is_url(path):
        fs, inner = _remote(path)
        file = fs.open(inner, "rb")
    else:
        file = open(path, "rb")  # noqa: SIM115  (closed below)
    with file:
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
    """A file behind a URL, read in blocks of 1 MiB of which the last 16 used are kept."""

    def __init__(self, path: str, size: int):
        self.path, self.size = path, size
        self._fs: Any = None
        self._inner = ""
        self._blocks: collections.OrderedDict[int, np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self):
        return (self.path, self.size)

    def __setstate__(self, state):
        self.__init__(*state)

    def _block(self, number: int) -> np.ndarray:
        with self._lock:
            if number in self._blocks:
                self._blocks.move_to_end(number)
                return self._blocks[number]
            if self._fs is None:
                self._fs, self._inner = _remote(self.path)
        start = number * BLOCK_BYTES
        data = self._fs.cat_file(self._inner, start=start, end=min(start + BLOCK_BYTES, self.size))
        block = np.frombuffer(data, np.uint8)
        with self._lock:
            self._blocks[number] = block
            while len(self._blocks) > CACHED_BLOCKS:
                self._blocks.popitem(last=False)
        return block

    def read(self, start: int, stop: int) -> np.ndarray:
        """Bytes [start, stop) as uint8."""
        if start >= stop:
            return np.zeros(0, np.uint8)
        first, last = start // BLOCK_BYTES, (stop - 1) // BLOCK_BYTES
        parts = [self._block(i)[max(start - i * BLOCK_BYTES, 0):stop - i * BLOCK_BYTES] for i in range(first, last + 1)]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


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

    The library reads local files only, so a remote shard is first copied to the local disk by fsspec (whole shards,
    kept until the process ends).
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
        path = self.path
        if is_url(path):
            import fsspec
            path = fsspec.open_local(f"simplecache::{path}")
        # No read-ahead: windows are read in random order.
        return ArrayRecordReader(path, options="readahead_buffer_size:0,max_parallelism:0")

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
