"""What was read of remote files: the latest blocks in memory, more of them on the local disk where a folder is given.

`configure` says where; it acts on the whole process and on nothing else, so a process that is to use the disk calls it
itself (`open_sources` does). Without it, blocks are kept in memory only.

On disk, a folder is shared by all processes of a host:

    FOLDER/neo_blocks/used       bytes held, in decimal; locked by whoever adds something
    FOLDER/neo_blocks/ab/ab...   one block and 16 bytes of BLAKE2b over it, or a whole file

Names are digests of what the content is, a replaced remote file gives other names. The time of last use is the file's
modification time. Whatever is missing or damaged there is read again from the store.
"""

from __future__ import annotations

import atexit
import collections
import concurrent.futures
import contextlib
import fcntl
import functools
import hashlib
import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from neo.errors import InputError

BLOCK_BYTES = 1 << 20  # ours: one range request; a window of 8192 tokens is 16 or 32 KiB, and windows are read side by side
MEMORY_BYTES = 256 << 20  # ours: blocks in memory, of all files together
CHECK_BYTES = 16
TEMPORARY_BYTES = 10_000_000_000  # as data.cache_gb
KEPT = 0.9  # ours: a full folder is emptied to this share, so that it is not searched for each block


def digest(*parts: object) -> str:
    """The name of a block or file in the cache: hex, 64 characters."""
    return hashlib.blake2b("\n".join(map(str, parts)).encode(), digest_size=32).hexdigest()


class MemoryBlocks:
    """The latest blocks used, at most `limit` bytes of them. For several threads; a block is fetched once."""

    def __init__(self, limit: int):
        self.limit, self.used = limit, 0
        self._blocks: collections.OrderedDict[str, np.ndarray] = collections.OrderedDict()
        self._coming: dict[str, concurrent.futures.Future] = {}
        self._lock = threading.Lock()

    def get(self, names: Sequence[str], fetch: Callable[[list[int]], Sequence[np.ndarray]]) -> list[np.ndarray]:
        """Blocks by name; `fetch(places in names)` brings those that neither are here nor on their way."""
        found: dict[int, np.ndarray] = {}
        awaited: dict[int, concurrent.futures.Future] = {}
        ours = []
        with self._lock:
            for place, name in enumerate(names):
                if name in self._blocks:
                    self._blocks.move_to_end(name)
                    found[place] = self._blocks[name]
                elif name in self._coming:
                    awaited[place] = self._coming[name]
                else:
                    self._coming[name] = concurrent.futures.Future()
                    ours.append(place)
        if ours:
            found |= zip(ours, self._bring([names[place] for place in ours], ours, fetch), strict=True)
        # Ours are done before we wait for those of others, so two readers never wait for each other.
        found |= {place: future.result() for place, future in awaited.items()}
        return [found[place] for place in range(len(names))]

    def _bring(self, names: list[str], places: list[int], fetch: Callable) -> Sequence[np.ndarray]:
        try:
            blocks = fetch(places)
        except BaseException as error:
            with self._lock:
                futures = [self._coming.pop(name) for name in names]
            for future in futures:
                future.set_exception(error)
            raise
        with self._lock:
            futures = [self._coming.pop(name) for name in names]
            for name, block in zip(names, blocks, strict=True):
                self._blocks[name] = block
                self.used += block.nbytes
            while self.used > self.limit and self._blocks:
                self.used -= self._blocks.popitem(last=False)[1].nbytes
        for future, block in zip(futures, blocks, strict=True):
            future.set_result(block)
        return blocks

    def clear(self) -> None:
        """Forget all blocks."""
        with self._lock:
            self._blocks.clear()
            self.used = 0


class DiskBlocks:
    """Blocks and whole files in a folder, never more than `limit` bytes of them, whoever adds them."""

    def __init__(self, folder: str, limit: int):
        self.folder, self.limit = os.path.join(folder, "neo_blocks"), limit
        self._warned = False

    def trim(self) -> None:
        """Remove what is there beyond the limit, as after a run with a higher one."""
        with contextlib.suppress(OSError), self._locked():  # a disk that cannot be written is warned of when it matters
            pass

    def _path(self, name: str) -> str:
        return os.path.join(self.folder, name[:2], name)

    def read(self, name: str, size: int) -> np.ndarray | None:
        """The block of `size` bytes called `name`; None where it is not here or damaged."""
        path = self._path(name)
        try:
            with open(path, "rb") as file:
                data = file.read()
        except OSError:
            return None
        content = memoryview(data)[:-CHECK_BYTES]
        if len(content) != size or _check(content) != data[-CHECK_BYTES:]:
            _remove(path)
            return None
        with contextlib.suppress(OSError):  # a read-only disk, or another process has just removed it
            os.utime(path)
        return np.frombuffer(content, np.uint8)

    def write(self, name: str, block: np.ndarray) -> None:
        """Keep a block, if there is room; one warning on stderr where the disk does not take it."""
        def content(path: str) -> None:
            with open(path, "wb") as file:
                file.write(block)
                file.write(_check(block))
        self._add(name, block.nbytes + CHECK_BYTES, content)

    def keep_file(self, name: str, size: int, copy: Callable[[str], None]) -> str | None:
        """Path of a local file that `copy(path)` wrote, now or earlier; None where the disk or the limit does not take it.

        It may be removed for newer ones while it is open, which leaves it readable.
        """
        path = self._path(name)
        if _size(path) != size and not self._add(name, size, copy):
            return None
        with contextlib.suppress(OSError):
            os.utime(path)
        return path if _size(path) == size else None

    def _add(self, name: str, size: int, content: Callable[[str], None]) -> bool:
        """Write a file through a temporary name; whether it is there now."""
        path = self._path(name)
        if self._warned or size > self.limit:
            return False
        try:
            with self._locked() as used:
                if _size(path) == size:  # another process was quicker
                    return True
                if used.bytes + size > self.limit:
                    used.set(self._evict(min(self.limit * KEPT, self.limit - size)))
                used.set(used.bytes + size)  # before the file, so that a process killed here leaves too high a number
                os.makedirs(os.path.dirname(path), exist_ok=True)
                temporary = f"{path}.tmp"
                try:
                    content(temporary)
                    os.replace(temporary, path)
                except BaseException:
                    _remove(temporary)
                    raise
        except OSError as error:
            self._warned = True
            print(f"neo.data: warning: data.cache {os.path.dirname(self.folder)}: cannot be written "
                  f"({error.strerror or error}); what is read of remote stores is kept in memory only", file=sys.stderr)
            return False
        return True

    @contextlib.contextmanager
    def _locked(self) -> Iterator[_Used]:
        os.makedirs(self.folder, exist_ok=True)
        handle = os.open(os.path.join(self.folder, "used"), os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            used = _Used(handle)
            if not 0 <= used.bytes <= self.limit:  # a new folder, a damaged number, a lower limit than before
                used.set(self._evict(self.limit))
            yield used
        finally:
            os.close(handle)  # gives the lock back

    def _evict(self, target: float) -> int:
        """Remove the longest unused files, and what killed processes left, until `target` bytes are held: the bytes held."""
        held = []
        for folder in _folders(self.folder):
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith(".tmp"):  # only the holder of the lock writes, and that is us
                        _remove(entry.path)
                        continue
                    with contextlib.suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        held.append((status.st_mtime_ns, status.st_size, entry.path))
        total = sum(size for _, size, _ in held)
        for _, size, path in sorted(held):
            if total <= target:
                break
            if _remove(path):
                total -= size
        return total


class _Used:
    """The number in the locked file `used`: bytes held, at least as many as there are; -1 where it is not known."""

    def __init__(self, handle: int):
        self._handle = handle
        text = os.pread(handle, 32, 0)
        self.bytes = int(text) if text.strip().isdigit() else -1

    def set(self, number: int) -> None:
        self.bytes = number
        os.pwrite(self._handle, b"%31d\n" % number, 0)  # always as long, so it is never half of a longer one


def _check(content: memoryview | np.ndarray) -> bytes:
    return hashlib.blake2b(content, digest_size=CHECK_BYTES).digest()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def _remove(path: str) -> bool:
    """Remove a file; whether it is gone."""
    with contextlib.suppress(FileNotFoundError):
        try:
            os.unlink(path)
        except OSError:
            return False
    return True


def _folders(folder: str) -> list[str]:
    with os.scandir(folder) as entries:
        return [entry.path for entry in entries if len(entry.name) == 2 and entry.is_dir(follow_symlinks=False)]


memory = MemoryBlocks(MEMORY_BYTES)
disk: DiskBlocks | None = None


def configure(folder: str, limit: float) -> None:
    """Keep blocks in `folder` too, at most `limit` bytes of them; no folder: in memory only.

    For this process, all its threads and all stores, also those opened before. Raises InputError if the folder is an
    address or cannot be made, or the limit holds less than a block.
    """
    global disk
    if not folder:
        disk = None
        return
    if "://" in folder:
        raise InputError(f"data.cache={folder}: give a folder on a local disk; this is an address")
    if limit < BLOCK_BYTES + CHECK_BYTES:
        raise InputError(f"data.cache_gb={limit / 1e9:g} holds no block of {BLOCK_BYTES} bytes; give 1 or more, or leave "
                         "data.cache empty")
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise InputError(f"data.cache={folder}: cannot be made ({error.strerror}); give another folder") from error
    if disk is None or (disk.folder, disk.limit) != (os.path.join(folder, "neo_blocks"), int(limit)):
        disk = DiskBlocks(folder, int(limit))
        disk.trim()


def for_files() -> DiskBlocks:
    """Where whole files are kept: the configured folder, else a temporary one that goes when the process ends."""
    return disk or _temporary()


@functools.cache
def _temporary() -> DiskBlocks:
    folder = tempfile.mkdtemp(prefix="neo_blocks_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return DiskBlocks(folder, TEMPORARY_BYTES)


def blocks(names: Sequence[str], sizes: Sequence[int],
           fetch: Callable[[list[int]], Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Blocks by name, from memory, disk or `fetch(places in names)`, each uint8 [size]; new ones are kept in both."""
    keep = disk

    def bring(places: list[int]) -> list[np.ndarray]:
        found = {place: keep.read(names[place], sizes[place]) if keep else None for place in places}
        absent = [place for place in places if found[place] is None]
        if absent:
            for place, block in zip(absent, fetch(absent), strict=True):
                found[place] = block
                if keep:
                    keep.write(names[place], block)
        return [found[place] for place in places]
    return memory.get(names, bring)
