"""Learning rates and token counts as functions of the step."""

from __future__ import annotations

import math
from fractions import Fraction

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import neo.config
from neo.config.schema import LR_SHAPES, Config, PhaseConfig
from neo.train.schedule import learning_rate, phase_rate, place, tokens_after


@st.composite
def phases(draw):
    seq_len, batch, steps = draw(st.integers(1, 64)), draw(st.integers(1, 8)), draw(st.integers(1, 60))
    tokens = steps * seq_len * batch - draw(st.integers(0, seq_len * batch - 1))
    final = draw(st.floats(0, 1e-3))
    return PhaseConfig(
        tokens=tokens, seq_len=seq_len, global_batch=batch, warmup_tokens=draw(st.integers(0, tokens)),
        start_lr=draw(st.floats(0, 1e-3)), peak_lr=draw(st.floats(1e-3, 1e-2)), final_lr=final,
        lr_shape=draw(st.sampled_from(LR_SHAPES)), mixture={"a": 1.0})


configs = st.lists(phases(), min_size=1, max_size=4).map(lambda some: Config(phases=tuple(some)))


@given(configs)
def test_tokens_are_the_sum_of_the_steps_before(config):
    seen = 0
    for step in range(config.total_steps):
        at = place(config, step)
        assert at.tokens_before == seen == tokens_after(config, step)
        assert 0 <= at.step_in_phase < config.phases[at.phase].steps
        seen += config.phases[at.phase].tokens_per_step
    assert tokens_after(config, config.total_steps) == seen
    assert seen >= sum(phase.tokens for phase in config.phases)
    with pytest.raises(ValueError, match="past the end"):
        place(config, config.total_steps)


@given(phases())
def test_rate_is_continuous_and_bounded(phase):
    """Between two steps the rate moves no more than the steepest slope of its pieces."""
    total, warmup, per_step = phase.steps * phase.tokens_per_step, phase.warmup_tokens, phase.tokens_per_step
    rates = [phase_rate(phase, n) for n in range(0, total + 1, per_step)]
    low, high = min(phase.start_lr, phase.final_lr, phase.peak_lr), max(phase.start_lr, phase.peak_lr)
    assert all(low - 1e-12 <= rate <= high + 1e-12 for rate in rates)
    up = abs(phase.peak_lr - phase.start_lr) * per_step / max(warmup, 1)
    down = math.pi / 2 * (phase.peak_lr - phase.final_lr) * per_step / max(total - warmup, 1)
    jumps = np.abs(np.diff(rates))
    assert (jumps <= min(up, high) + min(down, high) + 1e-12).all()


@given(phases())
def test_endpoints(phase):
    total = phase.steps * phase.tokens_per_step
    assert phase_rate(phase, phase.warmup_tokens) == pytest.approx(phase.peak_lr)
    if phase.warmup_tokens:
        assert phase_rate(phase, 0) == phase.start_lr
    if phase.warmup_tokens < total:
        end = phase.peak_lr if phase.lr_shape == "constant" else phase.final_lr
        assert phase_rate(phase, total) == pytest.approx(end, abs=1e-18)


@given(configs, phases())
def test_later_phases_change_nothing_before_them(config, later):
    longer = Config(phases=(*config.phases, later))
    steps = range(config.total_steps)
    assert [learning_rate(config, s) for s in steps] == [learning_rate(longer, s) for s in steps]
    assert place(longer, config.total_steps).phase == len(config.phases)


def test_cosine_and_linear_by_hand():
    phase = PhaseConfig(tokens=1000, seq_len=10, global_batch=1, warmup_tokens=200, start_lr=0.1, peak_lr=1.0, final_lr=0.2)
    assert phase_rate(phase, 100) == pytest.approx(0.55)
    assert phase_rate(phase, 600) == pytest.approx(0.6)                                    # half way: the mean
    assert phase_rate(phase, 400) == pytest.approx(0.2 + 0.8 * (1 + math.sqrt(0.5)) / 2)   # a quarter
    linear = PhaseConfig(tokens=1000, seq_len=10, global_batch=1, peak_lr=1.0, final_lr=0.0, lr_shape="linear")
    assert phase_rate(linear, 250) == pytest.approx(0.75)


def test_exact_at_trillions_of_tokens():
    """A step at 3.7e12 tokens: the count is exact, and the rate differs from its neighbour's as it should."""
    config = neo.config.load("neo_7b")
    phase, step = config.phases[0], 441_000
    assert step < config.total_steps
    assert tokens_after(config, step) == 441_000 * 1024 * 8192 == 3_699_376_128_000
    total, warmup = phase.steps * phase.tokens_per_step, phase.warmup_tokens
    done = Fraction((step + 1) * phase.tokens_per_step - warmup, total - warmup)
    exact = phase.final_lr + (phase.peak_lr - phase.final_lr) * (1 + math.cos(math.pi * float(done))) / 2
    assert learning_rate(config, step) == pytest.approx(exact, rel=1e-12)
    assert learning_rate(config, step + 1) < learning_rate(config, step)
    assert phase.final_lr < learning_rate(config, step) < phase.final_lr * 1.01
    assert learning_rate(config, config.total_steps - 1) == pytest.approx(phase.final_lr, rel=1e-12)


def test_the_recipe_warms_up_as_published():
    """MAP-NEO: 2e-5 to 2e-4 over 2000 steps."""
    config = neo.config.load("neo_7b")
    assert learning_rate(config, 1999) == pytest.approx(2e-4, rel=1e-12)
    assert learning_rate(config, 0) == pytest.approx(2e-5 + 1.8e-4 / 2000, rel=1e-12)
    assert max(learning_rate(config, s) for s in range(1990, 2010)) == pytest.approx(2e-4, rel=1e-12)
