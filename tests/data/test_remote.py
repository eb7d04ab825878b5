"""Token stores at addresses: the same batches as from a folder, the cache, stores that fail, what is missing.

s3:// is read from moto's server and gs:// from gcp-storage-emulator, started here, where these packages are installed:
`pip install 'moto[s3]' flask flask-cors gcp-storage-emulator -e '.[cloud]'`.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import json
import os
import pickle
import re
import shutil
import sys
import threading
import time

import fsspec
import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from neo.config.schema import Config, DataConfig, ModelConfig, PhaseConfig
from neo.data import block_cache, remote, store, store_files
from neo.data.loader import TrainData, open_sources, open_tokenizer
from neo.data.store_writer import write_source
from neo.errors import InputError, RestartSafe

VOCAB, EOD, SHA = 300, 2, "c" * 64
KINDS = ["memory", "local", "s3", "gs"]


class Flaky(MemoryFileSystem):
    """memory:// under another name that counts requests and answers them as `answers` says."""

    protocol = "flaky"
    store: dict = {}
    pseudo_dirs = [""]
    asked: list = []
    now = most = 0
    lock = threading.Lock()
    delay = 0.0
    answers = staticmethod(lambda what, path: None)  # may raise

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(path.removeprefix("flaky://"))

    def _count(self, what, path):
        with Flaky.lock:
            Flaky.asked.append((what, path))
            Flaky.now += 1
            Flaky.most = max(Flaky.most, Flaky.now)
        try:
            time.sleep(Flaky.delay)
            Flaky.answers(what, path)
        finally:
            with Flaky.lock:
                Flaky.now -= 1

    def cat_file(self, path, start=None, end=None, **kwargs):
        self._count("read", path)
        return super().cat_file(path, start, end, **kwargs)

    def ls(self, path, detail=True, **kwargs):
        self._count("list", path)
        return super().ls(path, detail, **kwargs)


fsspec.register_implementation("flaky", Flaky)


def fail(times, error=lambda: ConnectionError("connection reset"), what="read", name=""):
    """An `answers` that fails so many times."""
    left = [times]

    def answers(asked, path):
        if asked == what and name in path and left[0]:
            left[0] -= 1
            raise error()
    return answers


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.setattr(block_cache, "disk", None)
    monkeypatch.setattr(remote, "WAITS", (0.0,) * 5)
    for name, value in (("asked", []), ("most", 0), ("delay", 0.0), ("answers", staticmethod(lambda what, path: None))):
        monkeypatch.setattr(Flaky, name, value)
    block_cache.memory.clear()
    remote.forget()
    yield
    remote.forget()


def documents(name, count, seed):
    draw = np.random.default_rng(seed)
    return [(f"{name}{i}", draw.integers(3, VOCAB, int(draw.integers(1, 200))).tolist()) for i in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    for seed, name in enumerate(("prose", "code", "web")):
        write_source(str(folder / name), name, {"train": documents(name, 120, seed), "validation": documents("v", 9, 9)},
                     vocab_size=VOCAB, eod_id=EOD, tokenizer_sha256=SHA, shard_documents=50)
    return folder


def config_for(address, **data):
    phases = (PhaseConfig(name="one", tokens=24 * 4 * 150, seq_len=24, global_batch=4, mixture={"prose": 2.0, "code": 1.0}),
              PhaseConfig(name="two", tokens=64 * 6 * 20, seq_len=64, global_batch=6, mixture={"code": 1.0, "web": 1.0}))
    return Config(name="tiny", model=ModelConfig(vocab_size=VOCAB), data=DataConfig(store=address, **data), phases=phases)


def upload(folder, address):
    fs, path = fsspec.core.url_to_fs(address)
    for place, _, names in os.walk(folder):
        for name in names:
            to = f"{path}/{os.path.relpath(os.path.join(place, name), folder)}"
            if isinstance(fs, MemoryFileSystem):
                fs.makedirs(to.rsplit("/", 1)[0], exist_ok=True)
            with open(os.path.join(place, name), "rb") as file:
                fs.pipe_file(to, file.read())


def start_s3():
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    environment = {"AWS_ENDPOINT_URL": "http://{}:{}".format(*server.get_host_and_port()), "AWS_ACCESS_KEY_ID": "a",
                   "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
    return server, environment


def start_gs():
    pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    server = emulator.create_server("127.0.0.1", 0, in_memory=True, default_bucket="neo-test")
    server.start()
    return server, {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server._api._httpd.server_address[1]}",
                    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false"}  # asks Google, not the emulator


@pytest.fixture(scope="module", params=KINDS)
def address(request, folder):
    """The store `folder`, somewhere else."""
    kind = request.param
    if kind == "local":
        yield folder.as_uri()
        return
    with contextlib.ExitStack() as stack, pytest.MonkeyPatch.context() as environment:
        url = f"{kind}://neo-test/stores/tiny"
        if kind in ("s3", "gs"):
            server, variables = {"s3": start_s3, "gs": start_gs}[kind]()
            stack.callback(server.stop)
            for name, value in variables.items():
                environment.setenv(name, value)
            fsspec.get_filesystem_class(kind).clear_instance_cache()
            if kind == "s3":
                fsspec.filesystem("s3").mkdir("neo-test")
        upload(folder, url)
        yield url
        if kind == "memory":
            fsspec.filesystem("memory").rm("/neo-test", recursive=True)


@pytest.fixture
def flaky(folder):
    """The store at flaky://tiny."""
    Flaky.store.clear()
    upload(folder, "flaky://tiny")
    Flaky.asked.clear()
    return "flaky://tiny"


def all_batches(config):
    data = TrainData(config, open_sources(config))
    return [data.host_batch(step) for step in range(data.order.num_steps)], [data.documents(step) for step in (0, 160)]


def assert_same(one, two):
    for a, b in zip(one[0], two[0], strict=True):
        assert a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
    assert one[1] == two[1]


# --- the same as from a folder ---------------------------------------------------------------------------------------


def test_same_batches_as_from_a_folder(address, folder, tmp_path):
    local = all_batches(config_for(str(folder)))
    assert_same(all_batches(config_for(address)), local)
    config = config_for(address, cache=str(tmp_path / "cache"))
    for _ in range(2):  # into the cache, out of it
        block_cache.memory.clear()
        assert_same(all_batches(config), local)
    assert len([name for _, _, names in os.walk(tmp_path / "cache") for name in names]) > 6
    store.verify(open_sources(config)["web"])
    assert store.list_sources(address) == ["code", "prose", "web"]


def test_what_is_missing_is_named_in_one_message(address):
    config = config_for(f"{address}/nowhere", stores={"code": f"{address}/code"})
    with pytest.raises(InputError, match="2 of 3 sources have no finished token store.*'prose'.*nowhere/prose.*'web'"):
        open_sources(config)
    one = dataclasses.replace(config, phases=config.phases[:1])
    with pytest.raises(InputError, match="source 'prose' at .*nowhere/prose: there is no token store"):
        open_sources(one)
    kind = address.partition("://")[0]
    with pytest.raises(InputError, match="3 of 3 sources"):
        open_sources(config_for(f"{kind}://no-such-bucket/none"))


def test_listings_are_never_of_yesterday(address):
    before = store_files.list_sizes(f"{address}/web")
    another = fsspec.filesystem(address.partition("://")[0], skip_instance_cache=True)  # as another process
    another.pipe_file(f"{address}/web/new", b"12345")
    try:
        assert store_files.list_sizes(f"{address}/web") == {**before, "new": 5}
    finally:
        another.rm(f"{address}/web/new")
    assert store_files.list_sizes(f"{address}/web") == before


@pytest.mark.parametrize("layout", store.LAYOUTS)
def test_a_pickled_split_reads_the_same(tmp_path, layout):
    write_source(str(tmp_path / "a"), "a", {"train": documents("a", 60, 1), "validation": []}, vocab_size=VOCAB, eod_id=EOD,
                 tokenizer_sha256=SHA, shard_documents=25, layout=layout)
    Flaky.store.clear()
    upload(tmp_path / "a", "flaky://pickled/a")
    block_cache.configure(str(tmp_path / "cache"), 1e8)
    local, split = (store.open_source(path).split("train") for path in (str(tmp_path / "a"), "flaky://pickled/a"))
    split.tokens(0, 10)
    copy = pickle.loads(pickle.dumps(split))  # noqa: S301  (our own)
    for one in (split, copy):
        assert np.array_equal(one.tokens(0, one.num_tokens), local.tokens(0, local.num_tokens))
        assert one.document_ids(5, 900) == local.document_ids(5, 900)


# --- blocks and the cache --------------------------------------------------------------------------------------------


def shard_reads():
    return [name for what, name in Flaky.asked if what == "read" and not name.endswith(".json")]


def test_another_process_reads_from_the_cache_alone(flaky, tmp_path):
    config = config_for(flaky, cache=str(tmp_path))
    first = all_batches(config)
    assert len(shard_reads()) == len(set(shard_reads())) > 6  # each file is one block, asked for once
    Flaky.asked.clear()
    block_cache.memory.clear()  # as in another process
    assert_same(all_batches(config), first)
    assert not shard_reads()


@pytest.mark.parametrize("harm", ["vanish", "damage", "cut"])
def test_a_harmed_cache_does_no_harm(flaky, tmp_path, harm):
    config = config_for(flaky, cache=str(tmp_path))
    first = all_batches(config)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    for path in files:
        if harm == "damage":
            path.write_bytes(path.read_bytes()[::-1])
        elif harm == "cut":
            os.truncate(path, path.stat().st_size // 2)
    if harm == "vanish":
        shutil.rmtree(tmp_path)
    block_cache.memory.clear()
    assert_same(all_batches(config), first)
    if harm != "vanish":  # whole again
        Flaky.asked.clear()
        block_cache.memory.clear()
        assert_same(all_batches(config), first)
        assert not shard_reads()


def test_a_replaced_file_never_gives_old_bytes(flaky, tmp_path):
    block_cache.configure(str(tmp_path), 1e8)
    fs = fsspec.filesystem("flaky")
    for content in (b"a" * 5000, b"b" * 5000):
        fs.pipe_file("/tiny/file", content)
        for clear in (False, True):
            if clear:
                block_cache.memory.clear()
            assert store_files.RemoteBytes("flaky://tiny/file", 5000).read(100, 4000).tobytes() == content[100:4000]


def test_several_blocks_are_one_request_and_threads_agree(flaky, monkeypatch):
    monkeypatch.setattr(store_files, "BLOCK_BYTES", 512)
    content = np.random.default_rng(0).integers(0, 256, 20_000).astype(np.uint8)
    fsspec.filesystem("flaky").pipe_file("/tiny/file", content.tobytes())
    file, calls = store_files.RemoteBytes("flaky://tiny/file", len(content)), []
    plain = Flaky.cat_ranges
    monkeypatch.setattr(Flaky, "cat_ranges", lambda self, paths, *more, **named: calls.append(len(paths)) or plain(
        self, paths, *more, **named))
    assert np.array_equal(file.read(1000, 6000), content[1000:6000]) and calls == [11]

    def some(seed):
        draw = np.random.default_rng(seed)
        for _ in range(40):
            start, stop = sorted(draw.integers(0, len(content) + 1, 2).tolist())
            assert np.array_equal(file.read(start, stop), content[start:stop])
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(some, range(8)))
    assert len(shard_reads()) == 40  # 20,000 bytes, each block once


@hypothesis.given(numbers=st.lists(st.integers(0, 40), max_size=60), value=st.integers(0, 41),
                  side=st.sampled_from(["left", "right"]), places=st.tuples(st.integers(0, 60), st.integers(0, 60)))
def test_numbers_of_a_remote_file_are_searched_as_an_array_is(numbers, value, side, places):
    array = np.sort(np.array(numbers, "<u8"))
    fsspec.filesystem("flaky").pipe_file("/tiny/numbers", bytes(16) + array.tobytes() + b"more")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_files, "BLOCK_BYTES", 64)
        got = store_files.rising_numbers(store_files.RemoteBytes("flaky://tiny/numbers", 20 + array.nbytes), 16, len(array))
        assert got.searchsorted(np.uint64(value), side=side) == array.searchsorted(np.uint64(value), side=side)
        assert np.array_equal(got[places[0]:places[1]], array[places[0]:places[1]])


def test_memory_of_all_files_together_is_bounded(flaky, monkeypatch):
    monkeypatch.setattr(store_files, "BLOCK_BYTES", 512)
    monkeypatch.setattr(block_cache.memory, "limit", 10_000)
    files = []
    for number in range(30):
        fsspec.filesystem("flaky").pipe_file(f"/tiny/file{number}", bytes([number]) * 3000)
        files.append(store_files.RemoteBytes(f"flaky://tiny/file{number}", 3000))
    for number in (*range(30), 3):
        assert set(files[number].read(0, 3000).tolist()) == {number} and block_cache.memory.used <= 10_000


@pytest.mark.parametrize("room, kept", [(10**6, 2), (200_000, 1), (100, 0)])
def test_whole_shards_of_records_are_kept_within_the_limit(tmp_path, room, kept):
    both = {name: documents(name, 40, seed) for seed, name in enumerate("ab")}
    for name, some in both.items():
        write_source(str(tmp_path / name), name, {"train": some, "validation": []}, vocab_size=VOCAB, eod_id=EOD,
                     tokenizer_sha256=SHA, layout="array_record")
        upload(tmp_path / name, f"flaky://records/{name}")
    assert {path.stat().st_size for path in tmp_path.rglob("*.array_record")} == {1 << 17}
    block_cache.disk = block_cache.DiskBlocks(str(tmp_path / "cache"), room)
    splits = {name: store.open_source(f"flaky://records/{name}").split("train") for name in both}
    flat = {name: [token for _, body in some for token in (*body, EOD)] for name, some in both.items()}
    for name in "abab":
        if kept:  # a stays readable while b takes its room
            assert splits[name].tokens(0, splits[name].num_tokens).tolist() == flat[name]
        else:
            with pytest.raises(InputError, match="no room in .*cache"):
                splits[name].tokens(0, 5)
    files = [path for path in (tmp_path / "cache").rglob("*") if path.is_file() and path.name != "used"]
    assert len(files) == kept and sum(path.stat().st_size for path in files) <= room


# --- stores that fail ------------------------------------------------------------------------------------------------


def test_a_store_that_fails_twice_is_asked_again(flaky, folder, monkeypatch):
    for what in ("read", "list"):
        monkeypatch.setattr(Flaky, "answers", staticmethod(fail(2, what=what)))
        block_cache.memory.clear()
        assert_same(all_batches(config_for(flaky)), all_batches(config_for(str(folder))))


def test_a_store_that_does_not_answer(flaky, monkeypatch):
    data = TrainData(config_for(flaky), open_sources(config_for(flaky)))
    monkeypatch.setattr(Flaky, "answers", staticmethod(fail(10**9, error=lambda: TimeoutError("read timed out"))))
    Flaky.asked.clear()
    with pytest.raises(RestartSafe, match=r"flaky://tiny/\w+/train-.*: the store does not answer.*read timed out"):
        data.row(0)
    assert len(Flaky.asked) == 1 + len(remote.WAITS)
    with pytest.raises(InputError, match=r"flaky://tiny/prose/manifest.json: the store does not answer.*check the address"):
        open_sources(config_for(flaky))  # it may be the address that is wrong


def test_patience_ends(flaky, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", 0.05)
    monkeypatch.setattr(Flaky, "delay", 0.06)
    monkeypatch.setattr(Flaky, "answers", staticmethod(fail(10**9)))
    with pytest.raises(InputError, match="does not answer"):
        store_files.read_bytes("flaky://tiny/prose/manifest.json")
    assert len(Flaky.asked) == 1


@pytest.mark.parametrize("error, message", [
    (PermissionError("Access Denied"), "refuses to be read .Access Denied.: check who may read it"),
    (OSError("Forbidden: b/x"), "refuses"), (OSError(22, "The specified bucket is not valid."), "does not take the request")])
def test_what_waiting_does_not_cure_is_told_at_once(flaky, monkeypatch, error, message):
    def refuse():
        raise error
    monkeypatch.setattr(Flaky, "answers", staticmethod(lambda what, path: refuse()))
    with pytest.raises(InputError, match=f"flaky://tiny/prose/manifest.json: the store {message}"):
        open_sources(dataclasses.replace(config_for(flaky), phases=config_for(flaky).phases[:1]))
    assert sum(name.endswith("manifest.json") for _, name in Flaky.asked) <= 2  # once for each source


def test_a_bug_is_not_taken_for_a_store_that_fails(flaky, monkeypatch):
    monkeypatch.setattr(Flaky, "answers", staticmethod(fail(1, error=lambda: TypeError("a bug"))))
    with pytest.raises(TypeError):
        store_files.read_bytes("flaky://tiny/prose/manifest.json")


def test_files_that_go_or_change_under_a_run(flaky):
    split = store.open_source(f"{flaky}/prose").split("train")
    file = next(path for path in sorted(Flaky.store) if path.endswith(".tokens") and "prose/train" in path)
    content = fsspec.filesystem("flaky").cat_file(file)
    fsspec.filesystem("flaky").rm(file)
    with pytest.raises(InputError, match=r"flaky://tiny/prose/train-.*\.tokens: the file is gone"):
        split.tokens(0, 10)
    fsspec.filesystem("flaky").pipe_file(file, content[:100])
    with pytest.raises(InputError, match="100 bytes from byte 0 on where .*replaced"):
        split.tokens(0, 10)
    with pytest.raises(InputError, match="truncated"):
        store.open_source(f"{flaky}/prose")
    fsspec.filesystem("flaky").pipe_file(file, content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(InputError, match=r"train-.*\.tokens: content differs from what was written \(sha256"):
        store.verify(store.open_source(f"{flaky}/prose"))


# --- many sources, tokenizers ----------------------------------------------------------------------------------------


def test_many_sources_are_opened_at_once(flaky, monkeypatch, folder):
    names = [f"s{i}" for i in range(60)]
    for name in names:
        upload(folder / "prose", f"flaky://many/{name}")
    phase = PhaseConfig(name="one", tokens=64 * 64 * 9, seq_len=24, global_batch=64, mixture=dict.fromkeys(names, 1.0))
    config = dataclasses.replace(config_for("flaky://many"), phases=(phase,))
    monkeypatch.setattr(Flaky, "delay", 0.01)
    assert list(open_sources(config)) == names
    assert Flaky.most > 8


def test_tokenizers_at_addresses(store, tmp_path):
    upload(store, "flaky://main")
    shutil.copytree(store / "a", tmp_path / "a")
    base = config_for("flaky://main")
    phase = dataclasses.replace(base.phases[0], mixture={"a": 1.0, "b": 1.0})
    config = dataclasses.replace(base, model=ModelConfig(vocab_size=400), phases=(phase,))
    sources = open_sources(config)
    sha = sources["a"].tokenizer_sha256
    assert open_tokenizer(config, sources).sha256 == sha
    # Beside the first source that lies elsewhere, where the store has none.
    spread = dataclasses.replace(config, data=DataConfig(store=str(tmp_path / "none"), stores={
        "a": str(tmp_path / "a"), "b": "flaky://main/b"}))
    assert open_tokenizer(spread, open_sources(spread)).sha256 == sha
    fsspec.filesystem("flaky").rm("/main/tokenizer", recursive=True)
    with pytest.raises(InputError, match="no tokenizer at .*none/tokenizer or .* or flaky://main/tokenizer"):
        open_tokenizer(spread, sources)
    manifest = json.loads((tmp_path / "a" / "manifest.json").read_text())
    (tmp_path / "a" / "manifest.json").write_text(json.dumps({**manifest, "tokenizer_sha256": "0" * 64}))
    with pytest.raises(InputError, match=f"'a' and 'b' were prepared with different tokenizers .sha256 0{{12}} and {sha[:12]}"):
        open_sources(spread)


# --- packages and credentials ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind, package", [("s3", "s3fs"), ("gs", "gcsfs")])
def test_a_missing_package_is_named(monkeypatch, kind, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, kind, raising=False)
    with pytest.raises(InputError, match=rf"{kind}://bucket/x/\w+.*needs the package '{package}'.*pip install .*\[cloud\]"):
        open_sources(config_for(f"{kind}://bucket/x"))


def test_missing_credentials_are_named(monkeypatch, tmp_path):
    s3fs = pytest.importorskip("s3fs")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    with pytest.raises(InputError, match=re.escape("s3://bucket/x") + ".*refuses.*credentials.*AWS_ACCESS_KEY_ID"):
        store.open_source("s3://bucket/x")
    s3fs.S3FileSystem.clear_instance_cache()


def test_an_address_of_no_known_kind(tmp_path):
    with pytest.raises(InputError, match="nosuch://x/prose"):
        open_sources(config_for("nosuch://x"))
    with pytest.raises(InputError, match="data.cache=s3://b: give a folder"):
        open_sources(config_for(str(tmp_path), cache="s3://b"))
