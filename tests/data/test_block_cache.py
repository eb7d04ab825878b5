"""The cache of blocks: bounded whoever writes, least recent use, damage, disks that do not take it."""

from __future__ import annotations

import concurrent.futures
import errno
import multiprocessing
import os
import threading
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from neo.data import block_cache
from neo.data.block_cache import CHECK_BYTES, DiskBlocks, MemoryBlocks, digest
from neo.errors import InputError


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch):
    monkeypatch.setattr(block_cache, "disk", None)
    block_cache.memory.clear()


def block(number, size=100):
    return np.random.default_rng(number).integers(0, 256, size).astype(np.uint8)


def held(folder):
    """Bytes of all blocks and whole files in a cache folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            total += 0 if name == "used" else os.stat(os.path.join(place, name)).st_size
    return total


def paths(folder):
    return sorted(os.path.join(place, name) for place, _, names in os.walk(folder) for name in names if name != "used")


# --- on disk ---------------------------------------------------------------------------------------------------------


ACTIONS = ["write", "read", "file", "restart", "damage number"]


@hypothesis.given(limit=st.integers(20, 2000), steps=st.lists(
    st.tuples(st.integers(0, 8), st.integers(0, 400), st.sampled_from(ACTIONS)), max_size=40))
def test_never_more_than_the_limit_and_never_other_bytes(tmp_path_factory, limit, steps):
    folder = str(tmp_path_factory.mktemp("cache"))
    cache = DiskBlocks(folder, limit)
    for number, size, what in steps:
        name, content = digest(number, size, what == "file"), block(number, size)
        if what == "write":
            cache.write(name, content)
        elif what == "file":
            path = cache.keep_file(name, size, lambda to, content=content: content.tofile(to))
            assert (path is None) == (size > limit)
            assert path is None or np.array_equal(np.fromfile(path, np.uint8), content)
        elif what == "read":
            got = cache.read(name, size)
            assert got is None or np.array_equal(got, content)
        elif what == "restart":
            cache = DiskBlocks(folder, limit)
        elif os.path.exists(f"{cache.folder}/used"):
            with open(f"{cache.folder}/used", "wb") as file:
                file.write(b"-?")
        assert held(folder) <= limit


def test_what_was_just_written_is_there(tmp_path):
    cache = DiskBlocks(str(tmp_path), 1000)
    for number in range(30):
        cache.write(digest(number), block(number))
        assert np.array_equal(cache.read(digest(number), 100), block(number))


def test_the_longest_unused_goes_first(tmp_path):
    cache = DiskBlocks(str(tmp_path), 5 * (100 + CHECK_BYTES))
    for number in range(5):
        cache.write(digest(number), block(number))
        time.sleep(0.02)  # file times tick every few milliseconds
    assert cache.read(digest(0), 100) is not None  # 1 is now the longest unused
    time.sleep(0.02)
    cache.write(digest(5), block(5))
    kept = [number for number in range(6) if cache.read(digest(number), 100) is not None]
    assert 1 not in kept and kept[0] == 0 and kept[-1] == 5 and len(kept) == 5


@pytest.mark.parametrize("damage", [
    lambda data: data[:-1], lambda data: b"", lambda data: data + b"x", lambda data: bytes([data[0] ^ 1]) + data[1:],
    lambda data: data[:-1] + bytes([data[-1] ^ 1])])
def test_damaged_blocks_are_not_given(tmp_path, damage):
    cache = DiskBlocks(str(tmp_path), 1000)
    cache.write(digest(0), block(0))
    path, = paths(tmp_path)
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(damage(data))
    assert cache.read(digest(0), 100) is None and not os.path.exists(path)
    cache.write(digest(0), block(0))
    assert np.array_equal(cache.read(digest(0), 100), block(0))


def test_a_lower_limit_and_what_a_killed_process_left(tmp_path):
    block_cache.configure(str(tmp_path), 1e9)
    for number in range(30):
        block_cache.disk.write(digest(number), block(number, 1 << 16))
    left = f"{paths(tmp_path)[0]}.tmp"
    open(left, "wb").close()
    block_cache.configure(str(tmp_path), 1.1e6)
    assert 0 < held(tmp_path) <= 1.1e6 and not os.path.exists(left)


def test_nothing_but_blocks_is_ever_removed(tmp_path):
    mine = [tmp_path / "thesis.txt", tmp_path / "neo_blocks" / "notes.txt"]
    for path in mine:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes(5000))
    cache = DiskBlocks(str(tmp_path), 1000)
    for number in range(20):
        cache.write(digest(number), block(number))
    assert all(path.stat().st_size == 5000 for path in mine)


@pytest.mark.parametrize("why", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_takes_nothing_gives_one_warning(tmp_path, monkeypatch, capsys, why):
    block_cache.configure(str(tmp_path), 2e6)
    block_cache.disk.write(digest(0), block(0))

    def refuse(*_):
        raise OSError(why, os.strerror(why))
    monkeypatch.setattr(os, "replace", refuse)
    for number in range(3):
        name = digest("new", number)
        got, = block_cache.blocks([name], [100], lambda _, number=number: [block(number)])
        assert np.array_equal(got, block(number))
    warning, = capsys.readouterr().err.splitlines()
    assert str(tmp_path) in warning and os.strerror(why) in warning
    assert len(paths(tmp_path)) == 1  # nothing half written
    assert np.array_equal(block_cache.disk.read(digest(0), 100), block(0))  # what it holds is still used


def fill(folder, limit, first):
    cache = DiskBlocks(folder, limit)
    for number in range(first, first + 150):
        cache.write(digest(number), block(number, 500))
        got = cache.read(digest(number - 3), 500)
        assert got is None or np.array_equal(got, block(number - 3, 500))
    return cache._warned


def test_several_processes_share_one_limit(tmp_path):
    limit, most, done = 20_000, 0, threading.Event()
    with concurrent.futures.ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(fill, str(tmp_path), limit, first) for first in (0, 100)]
        threading.Thread(target=lambda: ([one.result() for one in running], done.set()), daemon=True).start()
        cache = DiskBlocks(str(tmp_path), limit)
        while not done.is_set():
            with cache._locked():  # else blocks come and go while we walk
                most = max(most, held(tmp_path))
            time.sleep(0.002)
        assert not any(one.result() for one in running)
    assert most <= limit and limit / 2 < held(tmp_path) <= limit


def test_configure_refuses_what_cannot_work(tmp_path):
    (tmp_path / "file").write_text("")
    for folder, limit, message in (("gs://bucket/cache", 1e9, "an address"), (tmp_path / "file" / "x", 1e9, "cannot be made"),
                                   (tmp_path / "file", 1e9, "cannot be made"), (tmp_path, 1e5, "holds no block")):
        with pytest.raises(InputError, match=message):
            block_cache.configure(str(folder), limit)
    block_cache.configure("", 0)
    assert block_cache.disk is None


# --- in memory -------------------------------------------------------------------------------------------------------


def test_memory_is_bounded_and_keeps_the_latest():
    memory, fetched = MemoryBlocks(1000), []

    def get(number):
        return memory.get([str(number)], lambda _: fetched.append(number) or [block(number)])[0]
    for number in (*range(10), 0, 10, 0, 1):
        assert np.array_equal(get(number), block(number)) and memory.used <= 1000
    assert fetched == [*range(11), 1]


def test_a_block_that_several_threads_want_is_fetched_once():
    memory, fetched, together = MemoryBlocks(10**6), [], threading.Barrier(8)

    def read(seed):
        together.wait()
        for first in np.random.default_rng(seed).integers(0, 20, 40).tolist():
            numbers = list(range(first, first + 3))

            def fetch(places, numbers=numbers):
                time.sleep(0.001)
                fetched.extend(numbers[place] for place in places)
                return [block(numbers[place]) for place in places]
            for number, got in zip(numbers, memory.get([str(one) for one in numbers], fetch), strict=True):
                assert np.array_equal(got, block(number))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(read, range(8)))
    assert sorted(fetched) == sorted(set(fetched))


def test_a_failed_fetch_is_told_to_all_who_wait_and_then_tried_again():
    memory, began = MemoryBlocks(1000), threading.Event()

    def fail(_):
        began.set()
        time.sleep(0.1)
        raise ConnectionError("gone")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        first = pool.submit(memory.get, ["a"], fail)
        began.wait()
        second = pool.submit(memory.get, ["a"], fail)
        for one in (first, second):
            with pytest.raises(ConnectionError):
                one.result()
    assert np.array_equal(memory.get(["a"], lambda _: [block(1)])[0], block(1))
