"""The loader on one device: rows against the store, state, bad input, prefetch, validation."""

from __future__ import annotations

import dataclasses
import gc
import json
import threading
import time

import grain
import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.config.schema import Config, DataConfig, ModelConfig, PhaseConfig
from neo.data import loader, store
from neo.data.loader import TrainData, ValidationData, open_sources, prefetch
from neo.data.store_writer import write_source
from neo.errors import InputError

VOCAB, EOD, SHA = 100, 3, "f" * 64


def documents(name, count, seed):
    rng = np.random.default_rng(seed)
    return [(f"{name}{i}", rng.integers(4, VOCAB, int(rng.integers(1, 60))).tolist()) for i in range(count)]


def write(folder, name, count=200, seed=0, held_out=40, **changes):
    write_source(str(folder / name), name,
                 {"train": documents(name, count, seed), "validation": documents(f"v{name}", held_out, seed + 1)},
                 **{"vocab_size": VOCAB, "eod_id": EOD, "tokenizer_sha256": SHA, "shard_documents": 33, **changes})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("store")
    for seed, name in enumerate(("prose", "code", "web")):
        write(folder, name, seed=10 * seed)
    return folder


def config_for(folder, phases=None, **data):
    phases = phases or (PhaseConfig(name="one", tokens=24 * 4 * 9, seq_len=24, global_batch=4,
                                    mixture={"prose": 2.0, "code": 1.0}),
                        PhaseConfig(name="two", tokens=16 * 6 * 9, seq_len=16, global_batch=6,
                                    mixture={"code": 1.0, "web": 1.0}))
    return Config(name="tiny", model=ModelConfig(vocab_size=VOCAB), data=DataConfig(store=str(folder), **data),
                  phases=tuple(phases))


@pytest.fixture(scope="module")
def data(folder):
    config = config_for(folder)
    return TrainData(config, open_sources(config))


def test_rows_hold_the_tokens_of_their_address(data, folder):
    for index in (0, 1, 17, 35, 36, 60, data.order.num_sequences - 1):
        address, row = data.order.address(index), data.row(index)
        split = store.open_source(str(folder / address.source)).split("train")
        tokens = split.tokens(address.start, address.start + address.length + 1)
        assert np.array_equal(row["inputs"], tokens[:-1]) and np.array_equal(row["targets"], tokens[1:])
        assert np.array_equal(row["segment_ids"], 1 + np.cumsum(np.concatenate([[0], tokens[:-2] == EOD])))
        assert ("prose", "code", "web")[row["source"]] == address.source
        assert row["inputs"].shape == (24 if index < 36 else 16,)
        assert row["loss_mask"].dtype == np.float32 and row["inputs"].dtype == np.int32


def test_host_batch_is_the_rows_of_the_step(data):
    for step in (0, 8, 9, 17):
        batch = data.host_batch(step)
        first = data.order.first_index(step)
        for r in range(len(batch["source"])):
            for name, value in data.row(first + r).items():
                assert np.array_equal(batch[name][r], value)
    some = data.host_batch(9, rows=[1, 4])
    assert np.array_equal(some["inputs"], data.host_batch(9)["inputs"][[1, 4]])


def test_grain_random_access_is_the_same_dataset(data):
    from neo.data import rows
    dataset = rows.windows(data.order, {name: source.split("train") for name, source in data.sources.items()})
    assert isinstance(dataset, grain.MapDataset) and len(dataset) == data.order.num_sequences
    assert np.array_equal(dataset[37].tokens[:-1], data.row(37)["inputs"])
    with pytest.raises(IndexError):
        data.row(data.order.num_sequences)
    with pytest.raises(IndexError):
        data.host_batch(18)


def test_batch_on_one_device(data):
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
    batch, expected = data.batch(10, sharding), data.host_batch(10)
    assert batch.keys() == expected.keys()
    for name, value in expected.items():
        assert batch[name].dtype == value.dtype and np.array_equal(batch[name], value)


def test_documents_of_a_step(data, folder):
    names = data.documents(0)
    assert len(set(names)) == len(names) > 4
    expected = set()
    for index in range(4):
        a = data.order.address(index)
        total = 0
        for i, tokens in documents(a.source, 200, {"prose": 0, "code": 10, "web": 20}[a.source]):
            if total < a.start + a.length + 1 and total + len(tokens) + 1 > a.start:
                expected.add(f"{a.source}/{i}")
            total += len(tokens) + 1
    assert set(names) == expected


def test_synthetic_far_away():
    """Index 1e9 of a run of 8e12 tokens, without a store; another object gives the same row."""
    phases = (PhaseConfig(name="main", tokens=8 * 10**12, seq_len=2048, global_batch=1024,
                          mixture={"a": 1.0, "b": 3.0}),)
    config = Config(name="x", model=ModelConfig(vocab_size=64_000), data=DataConfig(synthetic=True), phases=phases)
    one, two = (TrainData(config, open_sources(config)) for _ in range(2))
    assert one.order.num_sequences > 3 * 10**9
    for index in (10**9, one.order.num_sequences - 1):
        for name, value in one.row(index).items():
            assert np.array_equal(value, two.row(index)[name])
    assert one.row(10**9)["positions"].max() < 2048
    assert one.row(10**9)["segment_ids"].max() in range(2, 5)


def test_source_switched_off_needs_no_store_and_keeps_its_number(folder):
    phases = (PhaseConfig(name="one", tokens=400, seq_len=10, global_batch=2, mixture={"absent": 0.0, "web": 1.0}),)
    config = config_for(folder, phases)
    sources = open_sources(config)
    assert list(sources) == ["web"]
    assert TrainData(config, sources).row(3)["source"] == config.sources.index("web") == 1


# --- state -----------------------------------------------------------------------------------------------------------


def changed(config, number, **fields):
    phases = list(config.phases)
    phases[number] = dataclasses.replace(phases[number], **fields)
    return dataclasses.replace(config, phases=tuple(phases))


def test_state_is_readable_json_and_says_where_to_go_on(data):
    state = json.loads(json.dumps(data.state(10)))
    assert state["next_step"] == 10 and state["next_index"] == 9 * 4 + 6
    assert state["tokens"] == 24 * 4 * 9 + 16 * 6
    assert [p["name"] for p in state["phases"]] == ["one", "two"]
    assert sum(s["tokens_used"] for s in state["sources"].values()) == state["tokens"]
    assert TrainData(data.config, data.sources, state).order.num_steps == data.order.num_steps
    early = data.state(9)
    assert [p["name"] for p in early["phases"]] == ["one"] and set(early["sources"]) == {"prose", "code"}
    assert data.state(0)["phases"] == []


def test_later_phases_may_change_and_past_ones_may_not(data, folder):
    state = json.loads(json.dumps(data.state(9)))
    sources = open_sources(data.config)
    for fields in ({"tokens": 10**4}, {"seq_len": 8}, {"mixture": {"prose": 1.0}}, {"global_batch": 2}):
        TrainData(changed(data.config, 1, **fields), sources, state)
    more = dataclasses.replace(data.config, phases=(*data.config.phases, dataclasses.replace(
        data.config.phases[1], name="three")))
    TrainData(more, sources, state)
    same_weights = {"code": 10.0, "prose": 20.0, "web": 0.0}
    TrainData(changed(data.config, 0, mixture=same_weights), sources, state)
    for fields, word in (({"tokens": 24 * 4 * 10}, "phases.one.tokens"), ({"seq_len": 12}, "phases.one.seq_len"),
                         ({"mixture": {"prose": 1.0, "code": 1.0}}, "phases.one.mixture"),
                         ({"global_batch": 2}, "phases.one.*global_batch.*4.*2")):
        with pytest.raises(InputError, match=word):
            TrainData(changed(data.config, 0, **fields), sources, state)
    fewer = dataclasses.replace(data.config, phases=data.config.phases[1:])
    with pytest.raises(InputError, match="phases.two.seq_len"):
        TrainData(fewer, open_sources(fewer, ("prose", "code")), state)
    with pytest.raises(InputError, match="'two'.*no longer"):
        TrainData(dataclasses.replace(data.config, phases=data.config.phases[:1]), sources, data.state(10))


@pytest.mark.parametrize(("path", "value", "words"), [
    (("seed",), 1, ["data.seed", "was 1"]),
    (("synthetic",), True, ["data.synthetic"]),
    (("sources", "code", "tokens"), 5, ["'code'", "was 5"]),
    (("sources", "code", "tokenizer_sha256"), "0" * 64, ["tokenizer", "'code'", "0" * 64]),
    (("sources", "gone"), {"tokens": 1, "tokenizer_sha256": ""}, ["'gone'"]),
    (("version",), 1, ["version 1", "reads 2"]),
    (("next_index",), 7, ["sequence index"]),
    (("next_step",), 400, ["400"]),
    (("phases",), 3, ["damaged"]),
    (("seed",), None, ["data.seed"]),
])
def test_state_that_does_not_fit(data, path, value, words):
    state = json.loads(json.dumps(data.state(10)))
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(InputError) as error:
        TrainData(data.config, data.sources, state)
    assert all(word in str(error.value) for word in words), str(error.value)


# --- bad input -------------------------------------------------------------------------------------------------------


def test_missing_source_names_everything(folder, tmp_path):
    phases = (PhaseConfig(name="one", tokens=400, seq_len=10, global_batch=2, mixture={"cod": 1.0}),)
    with pytest.raises(InputError) as error:
        open_sources(config_for(folder, phases))
    text = str(error.value)
    for part in ("'cod'", str(folder / "cod"), "python -m neo.data.prepare", f"--out={folder}", "--source=cod",
                 "--config.data.synthetic=True", "did you mean 'code'"):
        assert part in text, text
    assert "\n" not in text
    (tmp_path / "cod" / ".work").mkdir(parents=True)
    with pytest.raises(InputError, match="has not finished"):
        open_sources(config_for(tmp_path, phases))


def test_default_store_path():
    assert loader.store_path(Config(name="neo_7b")) == "data/neo_7b"
    assert loader.store_path(Config(name="neo_7b", data=DataConfig(store="gs://b/s"))) == "gs://b/s"


def test_other_bad_stores(tmp_path):
    write(tmp_path, "prose")
    write(tmp_path, "code", tokenizer_sha256="a" * 64)
    with pytest.raises(InputError, match="different tokenizers"):
        open_sources(config_for(tmp_path, config_for(tmp_path).phases[:1]))
    config = config_for(tmp_path, [dataclasses.replace(config_for(tmp_path).phases[0], mixture={"prose": 1.0})])
    with pytest.raises(InputError, match="vocabulary of 100, more than model.vocab_size=99"):
        open_sources(dataclasses.replace(config, model=ModelConfig(vocab_size=99)))
    with pytest.raises(InputError, match="fewer than one window"):
        long = changed(config, 0, seq_len=10**5)
        TrainData(long, open_sources(long))
    shard = next((tmp_path / "prose").glob("train*.tokens"))
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(InputError, match="truncated"):
        open_sources(config)


def test_batch_that_the_mesh_cannot_split(data):
    class Refuses:
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("fsdp",))
        spec = jax.sharding.PartitionSpec("fsdp")

        def addressable_devices_indices_map(self, shape):
            raise ValueError("not divisible")

    with pytest.raises(InputError, match="batch of 4 sequences of 24 tokens cannot be split"):
        data.batch(0, Refuses())


# --- remote stores ---------------------------------------------------------------------------------------------------


def test_remote_store_gives_the_same_batches(data, folder):
    fsspec = pytest.importorskip("fsspec")
    memory = fsspec.filesystem("memory")
    memory.put(str(folder), "/loader-test", recursive=True)
    try:
        config = dataclasses.replace(data.config, data=DataConfig(store="memory://loader-test"))
        remote = TrainData(config, open_sources(config))
        for step in (0, 12):
            for name, value in remote.host_batch(step).items():
                assert np.array_equal(value, data.host_batch(step)[name])
    finally:
        memory.rm("/loader-test", recursive=True)


def test_array_record_gives_the_same_batches(data, tmp_path):
    pytest.importorskip("array_record")
    for seed, name in enumerate(("prose", "code", "web")):
        write(tmp_path, name, seed=10 * seed, layout="array_record")
    config = dataclasses.replace(data.config, data=DataConfig(store=str(tmp_path)))
    records = TrainData(config, open_sources(config))
    for step in (0, 12):
        for name, value in records.host_batch(step).items():
            assert np.array_equal(value, data.host_batch(step)[name])


# --- prefetch --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [0, 1, 3])
def test_prefetch_gives_everything_in_order(depth):
    assert list(prefetch(lambda i: i * i, 5, 30, depth)) == [(i, i * i) for i in range(5, 30)]
    assert list(prefetch(lambda i: i, 5, 5, depth)) == []


def test_prefetch_works_ahead_but_not_further_than_depth():
    made = []
    values = prefetch(lambda i: made.append(i) or i, 0, 100, 3)
    with values:
        deadline = time.monotonic() + 10
        while len(made) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert made == [0, 1, 2, 3]  # three in the queue, one in hand
        assert next(values) == (0, 0)


def test_prefetch_overlaps_with_the_consumer():
    begun = [threading.Event() for _ in range(12)]

    def make(i):
        begun[i].set()
        return i

    for i, _ in prefetch(make, 0, 12, 2):
        assert begun[min(i + 1, 11)].wait(20)  # made while this one is in use


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize("error", [InputError("shard lost"), KeyboardInterrupt(), ZeroDivisionError()])
def test_prefetch_raises_here_what_make_raises_there(depth, error):
    def make(i):
        if i == 3:
            raise error
        return i

    values = prefetch(make, 0, 10, depth)
    assert [next(values) for _ in range(3)] == [(0, 0), (1, 1), (2, 2)]
    with pytest.raises(type(error)) as raised:
        next(values)
    assert raised.value is error
    values.close()


def test_prefetch_does_not_take_stop_iteration_for_the_end():
    with pytest.raises(RuntimeError, match="value 0"):
        list(prefetch(lambda i: next(iter(())), 0, 3, 2))


def alive():
    return [t for t in threading.enumerate() if t.name == "neo-prefetch"]


def test_closing_never_hangs_and_leaves_no_thread(monkeypatch):
    values = prefetch(lambda i: i, 0, 10**9, 2)
    next(values)
    begin = time.monotonic()
    values.close()
    values.close()
    assert time.monotonic() - begin < 2 and not alive()
    with pytest.raises(StopIteration):
        next(values)

    monkeypatch.setattr("neo.data.prefetch.CLOSE_SECONDS", 0.3)
    release = threading.Event()
    stuck = prefetch(lambda i: release.wait(20), 0, 2, 1)  # such as a read that does not return
    begin = time.monotonic()
    stuck.close()
    assert time.monotonic() - begin < 2
    release.set()

    forgotten = prefetch(lambda i: i, 0, 10**9, 2)
    next(forgotten)
    del forgotten
    gc.collect()
    deadline = time.monotonic() + 5
    while alive() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive()


def test_close_from_another_thread_wakes_the_consumer():
    release = threading.Event()
    values = prefetch(lambda i: release.wait(20), 0, 2, 1)
    threading.Timer(0.2, values.close).start()
    begin = time.monotonic()
    assert list(values) == []
    assert time.monotonic() - begin < 3
    release.set()


# --- validation ------------------------------------------------------------------------------------------------------


@given(st.integers(1, 50), st.integers(1, 5), st.integers(0, 1500), st.booleans())
@settings(max_examples=40, deadline=None)
def test_validation_scores_every_token_once(folder, seq_len, batch_size, max_tokens, mask):
    config = config_for(folder, mask_end_of_document=mask)
    split = store.open_source(str(folder / "code")).split("validation")
    batches = ValidationData(config, open_sources(config)).batches("code", seq_len, batch_size, max_tokens)
    covered = min(split.num_tokens, max_tokens or split.num_tokens)
    tokens = split.tokens(0, covered)
    previous = np.concatenate([[EOD], tokens[:-1]])
    keep = previous != EOD if mask else np.ones(covered, bool)
    targets, inputs = [], []
    for batch in batches:
        assert batch["inputs"].shape == (batch_size, seq_len)
        scored = batch["loss_mask"] > 0
        targets.append(batch["targets"][scored])
        inputs.append(batch["inputs"][scored])
        assert (batch["source"] == 1).all()
        # Positions restart where documents do.
        starts = np.pad(batch["inputs"][:, :-1] == EOD, ((0, 0), (1, 0)))
        assert (batch["positions"][starts & (np.cumsum(batch["loss_mask"][:, ::-1], 1)[:, ::-1] > 0)] == 0).all()
    assert len(targets) == len(batches) == -(-covered // (seq_len * batch_size))
    assert np.array_equal(np.concatenate(targets), tokens[keep])
    assert np.array_equal(np.concatenate(inputs), previous[keep])
    assert batches.num_targets == covered and batches.num_scored == keep.sum()
    assert batches.num_bytes == pytest.approx(split.num_bytes * keep.sum() / split.num_tokens)
    if covered == split.num_tokens and not mask:
        assert batches.num_bytes == split.num_bytes  # exactly


def test_validation_of_a_source_that_holds_none_out(tmp_path):
    write(tmp_path, "prose", held_out=0)
    write(tmp_path, "code")
    config = config_for(tmp_path, config_for(tmp_path).phases[:1])
    validation = ValidationData(config, open_sources(config))
    assert validation.names == ("code",)
    empty = validation.batches("prose", 8, 2, 0)
    assert len(empty) == 0 and list(empty) == [] and empty.num_bytes == 0
    with pytest.raises(IndexError):
        empty.batch(0)


# --- tokenizer -------------------------------------------------------------------------------------------------------


def test_tokenizer_of_the_store_must_be_the_one_the_sources_have(tmp_path, data):
    spm = pytest.importorskip("sentencepiece")
    from neo.data.tokenizer import from_model

    def train(folder, letters):
        text = tmp_path / f"{letters}.txt"
        text.write_text("\n".join(" ".join(letters[i % 7:i % 7 + 3] for i in range(j, j + 9)) for j in range(200)))
        spm.SentencePieceTrainer.train(input=str(text), model_prefix=str(folder / "spm"), vocab_size=60,
                                       model_type="bpe", minloglevel=2, hard_vocab_limit=False)
        return from_model((folder / "spm.model").read_bytes(), "test")

    tokenizer = train(tmp_path, "abcdefghijkl")
    write(tmp_path, "prose", tokenizer_sha256=tokenizer.sha256)
    config = config_for(tmp_path, [dataclasses.replace(data.config.phases[0], mixture={"prose": 1.0})])
    sources = open_sources(config)
    with pytest.raises(InputError, match="tokenizer"):
        loader.open_tokenizer(config, sources)
    tokenizer.save(str(tmp_path / "tokenizer"))
    assert loader.open_tokenizer(config, sources).sha256 == tokenizer.sha256
    train(tmp_path, "mnopqrstuvwx").save(str(tmp_path / "tokenizer"))
    with pytest.raises(InputError, match="not the one that source 'prose' was prepared with"):
        loader.open_tokenizer(config, sources)
    assert loader.open_tokenizer(dataclasses.replace(config, data=DataConfig(synthetic=True)), sources) is None
