"""The data order: exact, contiguous, reading nothing twice, and untouched by what comes later."""

from __future__ import annotations

import dataclasses
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from neo.config.schema import PhaseConfig
from neo.data.order import Address, Order
from neo.errors import InputError


def phase(name="main", tokens=0, seq_len=8, global_batch=4, **mixture):
    return PhaseConfig(name=name, tokens=tokens, seq_len=seq_len, global_batch=global_batch,
                       mixture=mixture or {"a": 1.0})


def create(phases, sizes, seed=0):
    return Order.create(phases, tuple(sizes), sizes, seed)


def targets(address: Address) -> range:
    return range(address.start + 1, address.start + address.length + 1)


@given(tokens=st.integers(20, 3000), seq_len=st.integers(1, 19))
@settings(max_examples=50, deadline=None)
def test_one_source_one_phase_one_epoch_reads_each_token_once(tokens, seq_len):
    windows = (tokens - 1) // seq_len
    order = create([phase(tokens=windows * seq_len, seq_len=seq_len, global_batch=1)], {"a": tokens})
    assert order.num_sequences == windows
    read = sorted(t for i in range(windows) for t in targets(order.address(i)))
    assert read == list(range(1, windows * seq_len + 1))  # all but token 0 and a tail shorter than T
    assert tokens - 1 - windows * seq_len < seq_len


phases_strategy = st.lists(
    st.tuples(st.integers(1, 40), st.integers(1, 30), st.integers(1, 5), st.lists(st.sampled_from([0.0, 0.2, 1.0, 3.0]),
              min_size=3, max_size=3).filter(any)), min_size=1, max_size=6)


@given(phases_strategy, st.tuples(st.integers(40, 900), st.integers(40, 900), st.integers(40, 900)), st.integers(0, 9))
@settings(max_examples=80, deadline=None)
def test_no_token_is_read_twice_before_its_epoch_ended(raw, sizes, seed):
    sizes = dict(zip("abc", sizes, strict=True))
    phases = [phase(f"p{i}", steps * batch * seq_len, seq_len, batch, **dict(zip("abc", weights, strict=True)))
              for i, (steps, seq_len, batch, weights) in enumerate(raw)]
    order = create(phases, sizes, seed)
    seen: dict[tuple[str, int], set[int]] = {}
    last_epoch = dict.fromkeys(sizes, 0)
    counts = dict.fromkeys(sizes, 0)
    furthest: dict[tuple[int, str], dict[int, list[int]]] = {}
    for index in range(order.num_sequences):
        address = order.address(index)
        assert address.start >= 0 and address.start + address.length + 1 <= sizes[address.source]
        assert address.epoch in (last_epoch[address.source], last_epoch[address.source] + 1)
        last_epoch[address.source] = address.epoch
        done = seen.setdefault((address.source, address.epoch), set())
        assert done.isdisjoint(targets(address))
        done.update(targets(address))
        counts[address.source] += 1
        furthest.setdefault((address.phase, address.source), {}).setdefault(address.epoch, []).append(address.start)
    # Ranges are contiguous: what an epoch has read is one stretch from its first token, without a hole.
    for (source, epoch), done in seen.items():
        assert done == set(range(1, len(done) + 1))
        if epoch < last_epoch[source]:  # left behind: less than one window of the phase that moved on
            longest = max(p.seq_len for p in phases)
            assert sizes[source] - 1 - len(done) < longest
    assert counts == {name: order.num_windows(i) for i, name in enumerate(order.sources)}


@given(phases_strategy, st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_later_phases_and_sources_change_nothing_before(raw, extra):
    phases = [phase(f"p{i}", steps * batch * seq_len, seq_len, batch, **dict(zip("bcd", weights, strict=True)))
              for i, (steps, seq_len, batch, weights) in enumerate(raw)]
    sizes = {"b": 500, "c": 333, "d": 801}
    before = create(phases, sizes)
    more = [*phases, phase("later", 700 + extra, 5, 2, a=1.0, d=2.0), phase("last", 90, 9, 2, b=1.0)]
    after = Order.create(more, ("a", "b", "c", "d"), {"a": 77, **sizes}, 0)
    assert [before.address(i) for i in range(before.num_sequences)] == \
           [after.address(i) for i in range(before.num_sequences)]
    changed = [*phases, phase("later", 99, 3, 1, c=1.0)]
    other = create(changed, sizes)
    assert [before.address(i) for i in range(before.num_sequences)] == \
           [other.address(i) for i in range(before.num_sequences)]


def test_many_epochs_and_the_remainder_goes_to_the_next_phase():
    # 29 windows' worth: 30 tokens = 29 targets; T=8 -> 3 windows an epoch, 5 tokens over.
    order = create([phase("one", 8 * 3, 8, 1), phase("two", 5, 5, 1), phase("three", 8 * 7, 8, 1)], {"a": 30})
    assert [sorted(order.address(i).start for i in range(3))] == [[0, 8, 16]]
    assert order.address(3) == Address(1, "a", 0, 24, 5)  # the remainder, used by the phase that can
    epochs = [order.address(i).epoch for i in range(4, 11)]
    assert epochs == [1, 1, 1, 2, 2, 2, 3]
    assert order.address(10).start == 0


def test_trillions_of_tokens_exactly():
    """3.7e12 tokens of fundamental (1e13 in all), sources from 1 M tokens (millions of epochs) to 4e12."""
    phases = [phase("fundamental", int(3.7e12), 8192, 1024, big=0.9, small=0.1),
              phase("decay", int(6.3e12), 4096, 2048, big=0.5, small=0.5)]
    sizes = {"big": 4 * 10**12, "small": 10**6 + 3}
    order = create(phases, sizes)
    first = phases[0].steps
    assert order.first_index(first) == first * 1024
    assert order.tokens_before(first) == first * 1024 * 8192 >= int(3.7e12)
    assert order.tokens_before(order.num_steps) == order.num_tokens >= 10**13
    assert order.phase_of_step(first - 1) == 0 and order.phase_of_step(first) == 1
    near = order.first_index(first) - 3
    for index in [*range(near, near + 6), order.num_sequences - 1]:
        address = order.address(index)
        assert address.start >= 0 and address.start + address.length + 1 <= sizes[address.source]
        assert address.phase == (index >= order.first_index(first))
    small = order.window(1, order.num_windows(1) - 1)
    taken = order.num_windows(1)
    assert small.epoch == pytest.approx(taken * 4096 / 10**6, rel=0.2) and small.epoch > 10**6
    tokens = order.tokens_by_source(first)
    assert sum(tokens.values()) == order.tokens_before(first)
    assert abs(tokens["small"] - order.tokens_before(first) // 10) <= 8192
    # Neighbours around that place: each target once, over the border of the phases.
    n = order.select(order.first_index(first))[1]
    assert order.window(0, n).start != order.window(0, n + 1).start


def test_numpy_integers_do_not_overflow():
    order = create([phase("main", 10**12, 512, 512, a=1.0, b=2.0)], {"a": 10**12, "b": 10**12})
    index = 1_900_000_001
    assert order.address(np.int64(index)) == order.address(index)
    assert order.address(np.int32(index)) == order.address(index)
    assert type(order.address(np.int32(index)).start) is int
    assert order.tokens_before(np.int32(order.num_steps)) == order.num_tokens


def test_consecutive_windows_of_a_huge_piece_are_distinct():
    order = create([phase("main", 10**12, 2048, 512)], {"a": 10**12 + 10**6})
    starts = [order.address(i).start for i in range(order.num_sequences - 500, order.num_sequences)]
    assert len(set(starts)) == 500 and all(s % 2048 == 0 for s in starts)
    assert max(starts) - min(starts) > 9 * 10**11


def test_creation_and_lookup_are_quick():
    """28 phases x 291 sources (YuLan-Mini): built in well under a second, looked up in microseconds."""
    rng = random.Random(1)
    names = [f"source{i:03d}" for i in range(291)]
    phases = [phase(f"p{p}", 40 * 10**9, 4096, 1024,
                    **{n: rng.random() ** 3 if rng.random() < 0.4 else 0.0 for n in names}) for p in range(28)]
    sizes = {n: rng.randrange(10**8, 10**11) for n in names}
    begin = time.process_time()
    order = create(phases, sizes)
    created = time.process_time() - begin
    begin = time.process_time()
    for _ in range(2000):
        order.address(rng.randrange(order.num_sequences))
    looked_up = (time.process_time() - begin) / 2000
    assert created < 0.5  # measured 0.03 s
    assert looked_up < 2e-4  # measured 2e-5 s
    assert order.num_tokens >= 28 * 40 * 10**9


def test_golden_addresses():
    """May never change: past runs must find their data where it was."""
    order = create([phase("one", 4000, 16, 4, a=3.0, b=1.0), phase("two", 9000, 32, 8, a=1.0, b=1.0)],
                   {"a": 5000, "b": 3000}, seed=11)
    got = [order.address(i)[2:4] for i in (0, 1, 2, 100, 251, 252, 300, order.num_sequences - 1)]
    assert got == [(0, 2624), (0, 2304), (0, 464), (0, 2800), (0, 1696), (0, 4720), (0, 3216), (1, 480)]


def test_steps_and_bounds():
    order = create([phase("one", 100, 8, 4), phase("two", 100, 4, 2)], {"a": 1000})
    assert order.num_steps == 4 + 13
    assert [order.first_index(s) for s in (0, 1, 4, 5, 17)] == [0, 4, 16, 18, 42]
    assert [order.tokens_before(s) for s in (0, 4, 5, 17)] == [0, 128, 136, 232]
    for call, value in ((order.address, 42), (order.address, -1), (order.phase_of_step, 17), (order.first_index, 18),
                        (order.phase_of_step, -1)):
        with pytest.raises(IndexError):
            call(value)
    with pytest.raises(IndexError):
        order.window(0, 42)
    assert order.select(41) == (0, 41)


def test_seed_changes_the_order():
    one, two = (create([phase(tokens=800, global_batch=1)], {"a": 1000}, seed) for seed in (1, 2))
    starts = [[o.address(i).start for i in range(100)] for o in (one, two)]
    assert starts[0] != starts[1] and sorted(starts[0]) == sorted(starts[1])


@pytest.mark.parametrize(("phases", "sizes", "words"), [
    ([], {"a": 100}, ["no tokens"]),
    ([phase(tokens=0)], {"a": 100}, ["no tokens"]),
    ([dataclasses.replace(phase(tokens=100), mixture={})], {"a": 100}, ["phases.main.mixture", "empty"]),
    ([phase(tokens=100, a=0.0)], {"a": 100}, ["phases.main.mixture", "positive"]),
    ([phase(tokens=100, a=-1.0, b=2.0)], {"a": 100, "b": 100}, ["'a'", "-1"]),
    ([phase(tokens=100, cod=1.0)], {"code": 100}, ["'cod'", "did you mean 'code'"]),
    ([phase(tokens=100)], {"a": 8}, ["'a'", "8 training tokens", "seq_len + 1 = 9"]),
    ([phase(tokens=100, global_batch=0)], {"a": 800}, ["global_batch"]),
])
def test_bad_input(phases, sizes, words):
    with pytest.raises(InputError) as error:
        create(phases, sizes)
    assert all(word in str(error.value) for word in words), str(error.value)
