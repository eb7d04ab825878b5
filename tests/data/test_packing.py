"""Best-fit packing: nothing lost, nothing cut without need; and packed stores, where each scored pair is accounted for."""

from __future__ import annotations

import itertools
import json
import pickle
import time

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from neo.config.schema import Config, DataConfig, ModelConfig, PhaseConfig
from neo.data import store, store_writer
from neo.data.loader import TrainData, open_sources
from neo.data.packing import best_fit, fill, pack
from neo.data.windows import assemble, read_window
from neo.errors import InputError

EOD = 2


def first_fit(lengths: list[int], seq_len: int) -> int:
    """Number of bins that first-fit needs, in the order given."""
    rooms: list[int] = []
    for length in lengths:
        at = next((i for i, room in enumerate(rooms) if room >= length), None)
        if at is None:
            rooms.append(seq_len - length)
        else:
            rooms[at] -= length
    return len(rooms)


def slow_best_fit(lengths: list[int], seq_len: int) -> list[list[int]]:
    """The rule in plain Python: longest first, into the bin left fullest, of those the one filled last."""
    bins: list[list[int]] = []
    rooms: list[int] = []
    filled: list[int] = []
    for moment, item in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fitting = [b for b in range(len(bins)) if rooms[b] >= lengths[item]]
        if not fitting:
            bins.append([])
            rooms.append(seq_len)
            filled.append(0)
            fitting = [len(bins) - 1]
        best = min(fitting, key=lambda b: (rooms[b], -filled[b]))
        bins[best].append(item)
        rooms[best] -= lengths[item]
        filled[best] = moment
    return bins


sizes = st.integers(1, 30).flatmap(lambda t: st.tuples(st.lists(st.integers(1, t), max_size=40), st.just(t)))


@hypothesis.given(sizes)
def test_best_fit_is_the_rule(case):
    lengths, seq_len = case
    assert best_fit(lengths, seq_len) == slow_best_fit(lengths, seq_len)


@hypothesis.given(st.lists(st.integers(1, 70), max_size=40), st.integers(1, 30))
def test_every_token_is_packed_once(lengths, seq_len):
    bins = pack(lengths, seq_len)
    assert all(0 < sum(piece.count for piece in pieces) <= seq_len for pieces in bins)
    places = [(p.document, i) for pieces in bins for p in pieces for i in range(p.first, p.first + p.count)]
    assert sorted(places) == [(d, i) for d, length in enumerate(lengths) for i in range(length)]
    pieces = [p for some in bins for p in some]
    assert all(p.count > 0 and p.first % seq_len == 0 for p in pieces)  # cut only at multiples of seq_len
    assert [some[0] for some in bins] == sorted(some[0] for some in bins)
    assert all(some == sorted(some) for some in bins)
    assert fill(bins, seq_len) == (sum(lengths) / (len(bins) * seq_len) if bins else 1.0)


def test_never_worse_than_first_fit():
    rng = np.random.default_rng(0)
    for seq_len in (16, 100, 1000):
        for _ in range(30):
            lengths = np.minimum(rng.lognormal(np.log(seq_len / 5), 1, 200).astype(int) + 1, seq_len).tolist()
            assert len(best_fit(lengths, seq_len)) <= first_fit(lengths, seq_len)


@pytest.mark.parametrize("seq_len", [2048, 8192])
def test_usual_lengths_fill_the_bins(seq_len):
    """Web pages of some 600 tokens, and a tenth of them books of some 20,000."""
    rng = np.random.default_rng(1)
    lengths = [*rng.lognormal(6.4, 1.0, 18_000).astype(int) + 1, *rng.lognormal(9.9, 0.7, 2_000).astype(int) + 1]
    assert fill(pack(rng.permutation(lengths).tolist(), seq_len), seq_len) > 0.99


def test_the_order_of_the_bins_does_not_follow_the_lengths():
    rng = np.random.default_rng(2)
    bins = pack(rng.integers(1, 60, 4000).tolist(), 64)
    longest = [max(piece.count for piece in pieces) for pieces in bins]
    assert abs(np.corrcoef(np.arange(len(bins)), longest)[0, 1]) < 0.2


def test_bad_lengths():
    for lengths in ([5], [0], [-1, 2]):
        with pytest.raises(ValueError, match="do not fit"):
            best_fit(lengths, 4)
    with pytest.raises(ValueError, match="without a token"):
        pack([3, 0], 4)
    assert pack([], 4) == best_fit([], 4) == [] and fill([], 4) == 1.0


documents_strategy = st.lists(st.tuples(st.integers(0, 25), st.integers(0, 8), st.booleans()), min_size=1, max_size=15)


def write(folder, shapes, seq_len, shard_documents=1000, layout="flat"):
    """A packed source whose tokens are all different, but for the ends: 10 + 100 document + place."""
    documents = [(f"d{d}", [10 + 100 * d + i for i in range(length)], min(prompt, length + 1), joined)
                 for d, (length, prompt, joined) in enumerate(shapes)]
    store_writer.write_source(str(folder), "x", {"train": documents, "validation": documents}, vocab_size=70000, eod_id=EOD,
                              tokenizer_sha256="ab" * 32, layout=layout, shard_documents=shard_documents, pack=seq_len)
    return store.open_source(str(folder)), documents


@hypothesis.given(shapes=documents_strategy, seq_len=st.integers(1, 12), shard_documents=st.sampled_from([3, 1000]),
                  cross=st.booleans(), mask_eod=st.booleans())
@hypothesis.settings(max_examples=70)
def test_what_counts_in_the_loss_of_a_packed_store(tmp_path_factory, shapes, seq_len, shard_documents, cross, mask_eod):
    """The targets with loss: neighbours within a document beyond its prompt, each once unless a cut is between them;
    first tokens only after the end of another document, unless masked; nothing of the padding."""
    source, documents = write(tmp_path_factory.mktemp("s"), shapes, seq_len, shard_documents)
    split = source.split("train")
    assert source.alignment == seq_len and split.num_tokens % seq_len == 1 % seq_len
    scored, seen = [], []
    for k in range((split.num_tokens - 1) // seq_len):
        row = assemble([read_window(split, k * seq_len, seq_len, 0)], cross_document_attention=cross,
                       mask_end_of_document=mask_eod)
        inputs, targets, mask = (row[name][0].tolist() for name in ("inputs", "targets", "loss_mask"))
        seen += inputs
        scored += [(a, b) for a, b, m in zip(inputs, targets, mask, strict=True) if m]
        assert len(inputs) == seq_len

    bodies = [[*tokens, EOD] for _, tokens, _, _ in documents]
    assert sorted(t for t in seen if t != EOD) == sorted(t for body in bodies for t in body[:-1])  # all of it, once
    names = {body[0]: d for d, body in enumerate(bodies) if len(body) > 1}
    inner, first = [], []
    for a, b in scored:
        (first if a == EOD else inner).append((a, b))
    # Within documents: each pair at most once, beyond the prompt, and missing only where a cut (a multiple of seq_len,
    # counted from the beginning of the document's group) may be.
    prompts = [prompt for _, _, prompt, _ in documents]
    assert len(inner) == len(set(inner)) and set(inner) <= {pair for body in bodies for pair in itertools.pairwise(body)}
    begin = 0
    for d, body in enumerate(bodies):
        begins_group = not documents[d][3] or d % shard_documents == 0
        begin = 0 if begins_group else begin + len(bodies[d - 1])
        for i in range(1, len(body)):
            pair = (body[i - 1], body[i])
            if i < prompts[d]:
                assert pair not in inner
            elif (begin + i) % seq_len:
                assert pair in inner
    # First tokens: only of documents, never of padding.
    assert all(b in names and prompts[names[b]] == 0 for _, b in first if b != EOD) and not (mask_eod and first)
    assert sum(b == EOD for _, b in first) <= sum(len(body) == 1 for body in bodies)  # empty documents
    known = [b for _, b in first if b != EOD]
    assert len(known) == len(set(known))


@pytest.mark.parametrize("layout", store.LAYOUTS)
def test_a_packed_store(tmp_path, layout):
    """T = 8: 20 tokens cut at 8 and 16, its rest and all others whole; what is read of each place."""
    shapes = [(3, 0, False), (19, 0, False), (2, 0, False), (4, 2, False)]
    source, _ = write(tmp_path, shapes, 8, layout=layout)
    split = source.split("train")
    assert source.packing == {"kind": "best_fit", "seq_len": 8} and split.packed and not source.split("validation").packed
    a, b, c, d = ([10 + 100 * n + i for i in range(length)] + [EOD] for n, (length, _, _) in enumerate(shapes))
    pad = [EOD] * 8
    assert split.tokens(0, split.num_tokens).tolist() == a + b[16:] + b[:16] + c + d + pad[:1]
    for copy in (split, pickle.loads(pickle.dumps(split))):  # noqa: S301  (our own bytes)
        assert copy.document_ids(0, split.num_tokens) == ["d0", "d1", "d1", "d2", "d3"]
    rows = assemble([read_window(split, start, 8, 0) for start in range(0, split.num_tokens - 1, 8)],
                    cross_document_attention=False, mask_end_of_document=False)
    assert rows["segment_ids"].tolist() == [[1, 1, 1, 1, 2, 2, 2, 2], [1] * 8, [1] * 8, [1, 1, 1, 2, 2, 2, 2, 2]]
    assert rows["loss_mask"].tolist() == [
        [1, 1, 1, 0, 1, 1, 1, 1],  # not the first token of b's rest
        [1] * 8,  # b goes on in the next bin
        [1] * 7 + [0],  # c after a cut
        [1, 1, 0, 0, 1, 1, 1, 0]]  # d's prompt, the padding


def test_padding_is_no_document(tmp_path):
    source, _ = write(tmp_path, [(5, 0, False), (5, 0, False)], 8)
    split = source.split("train")
    assert split.tokens(0, 17).tolist() == [10, 11, 12, 13, 14, 2, 2, 2, 110, 111, 112, 113, 114, 2, 2, 2, 2]
    assert split.document_ids(0, 17) == ["d0", "d1"] and split.document_ids(6, 8) == []
    rows = assemble([read_window(split, start, 8, 0) for start in (0, 8)], cross_document_attention=False,
                    mask_end_of_document=False)
    assert rows["segment_ids"].tolist() == [[1, 1, 1, 1, 1, 1, 2, 2]] * 2
    assert rows["loss_mask"].tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]] * 2


def test_padding_does_not_count_as_repetition(tmp_path):
    source, _ = write(tmp_path, [(60, 0, False), (8, 0, False)], 64)
    split = source.split("train")
    rows = assemble([read_window(split, start, 64, 0) for start in (0, 64)], cross_document_attention=False,
                    mask_end_of_document=False, mask_repetition=True)
    assert rows["loss_mask"].sum(axis=1).tolist() == [60, 8]


def test_joined_documents_stay_together(tmp_path):
    """Groups of 3 and 5 tokens would be mixed by length alone; a group longer than the bin is cut like a document."""
    shapes = [(2, 0, False), (2, 0, True), (4, 0, False), (5, 0, False), (6, 0, True), (1, 0, True)]
    source, _ = write(tmp_path, shapes, 8)
    split = source.split("train")
    windows = [read_window(split, start, 8, 0) for start in range(0, split.num_tokens - 1, 8)]
    rows = assemble(windows, cross_document_attention=False, mask_end_of_document=False)
    by_token = {int(t): int(s) for w, row in zip(windows, rows["segment_ids"], strict=True)
                for t, s in zip(w.tokens[:-1], row, strict=True)}
    assert by_token[10] == by_token[110] and by_token[310] == by_token[410]


def test_a_joined_document_apart_from_its_group_sees_nothing(tmp_path):
    """A group of 8 and 4 tokens is cut between its documents; the second lies after a document of no group."""
    source, _ = write(tmp_path, [(2, 0, False), (7, 0, False), (3, 0, True)], 8)
    split = source.split("train")
    assert split.tokens(0, 8).tolist() == [10, 11, EOD, 210, 211, 212, EOD, EOD]
    row = assemble([read_window(split, 0, 8, 0)], cross_document_attention=False, mask_end_of_document=False)
    assert row["segment_ids"].tolist() == [[1, 1, 1, 2, 2, 2, 2, 3]]


def test_shards_that_are_not_whole_bins_are_refused(tmp_path):
    write(tmp_path, [(5, 0, False)] * 3, 8)
    path = tmp_path / store.MANIFEST
    manifest = json.loads(path.read_text())
    assert manifest["version"] == 2
    manifest["packing"]["seq_len"] = 16
    path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="packed for seq_len 16"):
        store.open_source(str(tmp_path))


def test_a_run_reads_whole_bins(tmp_path):
    """Over two epochs beside an unpacked source; another sequence length is refused."""
    rng = np.random.default_rng(4)
    for name, pack_for in (("packed", 16), ("plain", 0)):
        documents = [(f"{name}{i}", rng.integers(4, 90, rng.integers(1, 40)).tolist()) for i in range(60)]
        store_writer.write_source(str(tmp_path / name), name, {"train": documents}, vocab_size=100, eod_id=EOD,
                                  tokenizer_sha256="ab" * 32, pack=pack_for)
    bins = (store.open_source(str(tmp_path / "packed")).split("train").num_tokens - 1) // 16

    def config(seq_len):
        phase = PhaseConfig(name="one", tokens=seq_len * 4 * bins, seq_len=seq_len, global_batch=4,
                            mixture={"packed": 1.0, "plain": 1.0})
        return Config(name="tiny", model=ModelConfig(vocab_size=100), phases=(phase,),
                      data=DataConfig(store=str(tmp_path), max_epochs=0))

    sources = open_sources(config(16))
    data = TrainData(config(16), sources)
    addresses = [data.order.address(index) for index in range(data.order.num_sequences)]
    starts = [address.start for address in addresses if address.source == "packed"]
    assert sorted(starts) == sorted(2 * [16 * k for k in range(bins)]) and len(set(starts[:bins])) == bins
    split = sources["packed"].split("train")
    index = next(i for i, address in enumerate(addresses) if address.source == "packed")
    expected = assemble([read_window(split, addresses[index].start, 16, 0)], cross_document_attention=False,
                        mask_end_of_document=False)
    assert data.row(index)["loss_mask"].tolist() == expected["loss_mask"][0].tolist()
    with pytest.raises(InputError, match="packed for sequences of 16 tokens"):
        TrainData(config(8), open_sources(config(8)))


@pytest.mark.slow
def test_a_hundred_thousand_pieces_take_seconds():
    lengths = (np.random.default_rng(3).lognormal(6.3, 1.2, 100_000).astype(int) + 1).tolist()
    started = time.perf_counter()
    pack(lengths, 8192)
    assert time.perf_counter() - started < 10
