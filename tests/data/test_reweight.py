"""New weights from held-out losses: the published formula, and the limit on epochs."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.config.schema import Config, DataConfig, PhaseConfig
from neo.data.amendments import Amendment
from neo.data.order import Order
from neo.data.planning import epoch_limit
from neo.data.reweight import capped, most_shares, next_weights, updated

LOSSES = {"web": 2.5, "code": 1.0, "books": 2.0}
REFERENCES = {"web": 2.0, "code": 1.2, "books": 1.8}
WEIGHTS = {"web": 0.6, "code": 0.3, "books": 0.1}


def published(weights, losses, references, eta=1.0, c=1e-4):
    """Algorithm 1 of arXiv:2310.06694 in log space with a softmax, as its authors' code has it, in numpy float64."""
    difference = np.maximum(np.asarray(losses) - np.asarray(references), 0.0)
    alpha = np.log(np.asarray(weights)) + eta * difference
    alpha = np.exp(alpha - alpha.max())
    alpha /= alpha.sum()
    mixed = (1 - c) * alpha + c / len(alpha)
    return mixed / mixed.sum()


def test_by_hand():
    """0.6 e^0.5 = .989233, 0.3 e^0 = .3, 0.1 e^0.2 = .122140; sum 1.411373."""
    new = updated(WEIGHTS, LOSSES, REFERENCES, rate=1, floor=0, clip=10)
    assert new == pytest.approx({"web": 0.700901, "code": 0.212559, "books": 0.086540}, abs=1e-6)
    new = updated(WEIGHTS, LOSSES, REFERENCES, rate=1, floor=0.3, clip=10)
    assert new == pytest.approx({"web": 0.590631, "code": 0.248791, "books": 0.160578}, abs=1e-6)
    # Clipped to 0.2, both sources above their reference grow alike; at twice the rate by e^0.4.
    new = updated(WEIGHTS, LOSSES, REFERENCES, rate=2, floor=0, clip=0.2)
    grown = [0.6 * math.exp(0.4), 0.3, 0.1 * math.exp(0.4)]
    assert list(new.values()) == pytest.approx([one / sum(grown) for one in grown], rel=1e-14)


some = st.integers(2, 12).flatmap(lambda n: st.tuples(*(
    st.lists(st.floats(low, high), min_size=n, max_size=n) for low, high in ((1e-3, 1.0), (0.1, 9.0), (0.1, 9.0)))))


@given(some, st.floats(0, 3), st.sampled_from([1e-4, 1e-2, 0.5]))
def test_is_the_published_formula(drawn, rate, floor):
    names = [f"s{i}" for i in range(len(drawn[0]))]
    weights, losses, references = (dict(zip(names, values, strict=True)) for values in drawn)
    new = updated(weights, losses, references, rate=rate, floor=floor, clip=100)
    total = sum(drawn[0])
    expected = published([w / total for w in drawn[0]], drawn[1], drawn[2], eta=rate, c=floor)
    np.testing.assert_allclose(list(new.values()), expected, rtol=1e-12)
    assert min(new.values()) >= floor / len(names) * (1 - 1e-12)


def test_nothing_moves_below_the_references():
    new = updated(WEIGHTS, dict.fromkeys(WEIGHTS, 0.5), REFERENCES, rate=1, floor=0, clip=1)
    assert new == pytest.approx(WEIGHTS, rel=1e-15)


def test_a_source_without_weight_comes_back_with_the_floor():
    new = updated({"a": 1.0, "b": 0.0}, {"a": 1.0, "b": 9.0}, {"a": 1.0, "b": 1.0}, rate=1, floor=0.1, clip=1)
    assert new == pytest.approx({"a": 0.95, "b": 0.05})


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite(bad):
    with pytest.raises(ValueError, match="the loss of source 'code' is"):
        updated(WEIGHTS, {**LOSSES, "code": bad}, REFERENCES, rate=1, floor=0, clip=1)


def test_water_filling_by_hand():
    # web loses 0.2: 3/4 of it to code, 1/4 to books. Then code is above its 0.4 and 0.05 more goes to books alone.
    assert capped(WEIGHTS, {"web": 0.4, "code": 9, "books": 9}) == pytest.approx({"web": 0.4, "code": 0.45, "books": 0.15})
    assert capped(WEIGHTS, {"web": 0.4, "code": 0.4, "books": 9}) == pytest.approx({"web": 0.4, "code": 0.4, "books": 0.2})
    assert capped(WEIGHTS, {"web": 0, "code": 0, "books": 1}) == {"web": 0, "code": 0, "books": 1}
    assert capped(WEIGHTS, dict.fromkeys(WEIGHTS, math.inf)) == pytest.approx(WEIGHTS, rel=1e-15)


def test_all_at_the_limit():
    assert capped(WEIGHTS, {"web": 0.4, "code": 0.4, "books": 0.1}) is None
    assert capped(WEIGHTS, dict.fromkeys(WEIGHTS, 0.0)) is None
    assert capped({"a": 1.0, "b": 0.0}, {"a": 0.9, "b": 9.0}) is None, "a source that is switched off takes nothing over"


pairs = st.lists(st.tuples(st.sampled_from([0.0, 1e-9]) | st.floats(1e-3, 1), st.floats(0, 2)), min_size=1, max_size=9)


@given(pairs.filter(lambda some: sum(weight for weight, _ in some) > 0.1))
def test_water_filling(pairs):
    weights = {f"s{i}": weight for i, (weight, _) in enumerate(pairs)}
    most = {f"s{i}": share for i, (_, share) in enumerate(pairs)}
    new = capped(weights, most)
    if new is None:
        assert sum(most[name] for name in weights if weights[name] > 0) < 1
        return
    assert sum(new.values()) == pytest.approx(1)
    assert all(new[name] <= most[name] for name in new)
    # Whoever is below its most has grown by one factor for all, and that one is at least 1 over the sum of weights.
    below = [new[name] / weights[name] for name in new if weights[name] > 0 and new[name] < most[name] * (1 - 1e-6)]
    assert below == pytest.approx(below[:1] * len(below))
    assert all(new[name] == 0 for name in new if weights[name] == 0)


T, BATCH, INTERVAL, LEAD = 16, 8, 10, 4
PHASES = (PhaseConfig(name="one", tokens=T * BATCH * 95, seq_len=T, global_batch=BATCH, mixture={"a": 3.0, "b": 2.0, "c": 1.0},
                      batch_ramp=(2, 4), batch_ramp_tokens=T * BATCH * 20),
          PhaseConfig(name="two", tokens=T * 2 * BATCH * 20, seq_len=T * 2, global_batch=BATCH, mixture={"a": 1.0, "c": 1.0}))


def reweighted(config, tokens, draw):
    """The order after all decisions of a run with random losses, and the step at which one found too few tokens left."""
    changes = []
    order = Order.create(PHASES, "abc", tokens, 0)
    for step in range(INTERVAL, order.num_steps - LEAD, INTERVAL):
        at = step + LEAD
        if order.phase_of_step(step) != order.phase_of_step(at):
            continue
        weights = next_weights(config, order, tokens, {name: draw.uniform(0, 4) for name in "abc"}, at)
        if weights is None:
            return order, at
        changes.append(Amendment(at, order.first_index(at), PHASES[order.phase_of_step(at)].name, weights))
        order = Order.create(PHASES, "abc", tokens, 0, changes)
    return order, None


@given(st.integers(0, 10_000), st.tuples(*[st.integers(2_000, 9_000)] * 3), st.sampled_from([1.0, 1.5, 4.0]))
def test_a_run_stays_within_its_epoch_limits(seed, sizes, limit):
    tokens = dict(zip("abc", sizes, strict=True))
    config = Config(phases=PHASES, data=DataConfig(reweight_steps=INTERVAL, reweight_rate=3.0, max_epochs=limit,
                                                   max_epochs_of={"c": 2.0}, reweight_reference=dict.fromkeys("abc", 1.0)))
    most = {name: epoch_limit(config, name) * tokens[name] for name in "abc"}
    order, stopped = reweighted(config, tokens, np.random.default_rng(seed))
    second = order.spans[-1].first_step
    if stopped is not None:
        until = min(stopped + INTERVAL, second if stopped < second else order.num_steps)
        before, later = order.tokens_by_source(stopped), order.tokens_by_source(order.num_steps)
        if stopped < second:
            later = {name: later[name] - order.tokens_by_source(second)[name] for name in "abc"}
            before = {name: before[name] + later[name] for name in "abc"}
        room = sum(max(most[name] - before[name], 0) for name in order.spans[-1].mixture.names + ("b",))
        assert room < order.tokens_before(until) - order.tokens_before(stopped)
        return
    # What came before the first decision and what is left after the last one, 4 steps each, keep to the plan.
    plan = Order.create(PHASES, "abc", tokens, 0)
    start, used = plan.tokens_by_source(INTERVAL + LEAD), order.tokens_by_source(order.num_steps)
    planned = {name: plan.tokens_by_source(plan.num_steps)[name] - plan.tokens_by_source(second)[name] for name in "abc"}
    for name in "abc":
        if start[name] + planned[name] <= most[name]:
            assert used[name] <= most[name] + 2 * BATCH * T, "at most one step over"


def test_most_shares_by_hand():
    """b: 1000 tokens, read twice at most. Phase one has 100 windows of 10 by step 10, of which b had 50; phase two plans 20
    of 20 for it. So 2000 - 500 - 400 = 1100 tokens are left, 110 windows for the 100 of the interval."""
    phases = (PhaseConfig(name="one", tokens=10 * 10 * 30, seq_len=10, global_batch=10, mixture={"a": 1.0, "b": 1.0}),
              PhaseConfig(name="two", tokens=20 * 10 * 4, seq_len=20, global_batch=10, mixture={"a": 1.0, "b": 1.0}))
    tokens = {"a": 10_000, "b": 1000}
    config = Config(phases=phases, data=DataConfig(reweight_steps=10, max_epochs=0, max_epochs_of={"b": 2}))
    order = Order.create(phases, "ab", tokens, 0)
    assert most_shares(config, order, tokens, 10, 0) == {"a": math.inf, "b": 1.1}
    assert most_shares(config, order, tokens, 10, 2) == {"a": math.inf, "b": 1.08}
    # 5 steps before the end of the phase only those 5 count: 50 windows.
    assert most_shares(config, order, tokens, 25, 0)["b"] == (2000 - 1250 - 400) // 10 / 50
