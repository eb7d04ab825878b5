"""The repetition filter: compared with a slow transcription of OLMo-core's rule, and at its limits."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from neo.data.repetition import repetitive


def times(row: list[int], period: int) -> int:
    """OLMo-core's largest count for a period: (tokens of a stretch with that period) // period, in plain Python."""
    best = run = 0
    for a, b in zip(row, row[period:], strict=False):
        run = run + 1 if a == b else 0
        best = max(best, run)
    return (best + period) // period


def slow(row: list[int]) -> bool:
    return any(times(row, period) >= 32 for period in range(1, min(13, len(row) // 3) + 1))


def noise(count: int) -> list[int]:
    """Tokens with no period at all."""
    return list(range(1000, 1000 + count))


@st.composite
def rows(draw: st.DrawFn) -> list[int]:
    """Noise, with stretches of about 32 repetitions put in at random; few symbols, so that chance equalities occur."""
    row: list[int] = []
    for _ in range(draw(st.integers(0, 3))):
        row += draw(st.lists(st.integers(0, 1), max_size=6))
        row += noise(draw(st.integers(0, 40)))
        unit = draw(st.lists(st.integers(0, 3), min_size=1, max_size=14))
        count = len(unit) * draw(st.integers(29, 33)) + draw(st.integers(-2, 2))
        row += (unit * 40)[:count]
    return row + draw(st.lists(st.integers(0, 1), max_size=6))


@hypothesis.given(st.lists(rows(), min_size=1, max_size=3))
@hypothesis.settings(max_examples=150)
def test_against_a_slow_reading_of_the_rule(some):
    length = max(len(row) for row in some)
    some = [row + noise(length - len(row)) for row in some]
    assert repetitive(np.array(some, np.int32).reshape(len(some), length)).tolist() == [slow(row) for row in some]


@pytest.mark.parametrize("period", range(1, 15))
def test_32_times_is_too_often_and_31_is_not(period):
    """At the start, in the middle and at the end of a row, and one token short of the 32nd time."""
    unit, length = list(range(1, period + 1)), 32 * 14 + 100
    for count, expected in ((32 * period, period <= 13), (32 * period - 1, False), (31 * period, False)):
        stretch = (unit * 33)[:count]
        rest = noise(length - count)
        rows = [stretch + rest, rest + stretch, rest[:37] + stretch + rest[37:]]
        assert repetitive(np.array(rows)).tolist() == [expected] * 3, (period, count)


def test_two_stretches_do_not_add_up():
    row = [7] * 31 + [8] + [7] * 31 + noise(40)
    assert not repetitive(np.array([row, row[::-1]])).any()
    assert repetitive(np.array([row[:31] + [7] + row[32:]])).all()


def test_rows_shorter_than_a_stretch():
    assert repetitive(np.full((2, 31), 5)).tolist() == [False, False]
    assert repetitive(np.full((2, 32), 5)).tolist() == [True, True]
    assert repetitive(np.zeros((0, 64), np.int32)).shape == (0,)
