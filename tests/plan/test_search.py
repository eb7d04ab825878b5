"""Candidates, the memory bound, the order of compiles, and the plan nearest to one that does not fit."""

from __future__ import annotations

import pytest

from neo.config import load
from neo.plan import search
from neo.plan.planner import plan, setting
from neo.train import memory

GIB = 2 ** 30
# neo_460m: small enough that tracing it is quick, with windows and heads as the large ones have.
CONFIG = load("neo_460m")


@pytest.fixture
def topology(made_topology):
    return made_topology(gib=16)


def test_setting_is_what_a_run_would_choose(topology):
    chosen = setting(CONFIG, topology)
    assert chosen.sizes == dict(replica=1, fsdp=64, expert=1, context=1, tensor=1)
    assert chosen.decoder.attention == "pallas_tpu"
    assert chosen.local_batch == CONFIG.phases[0].global_batch // 64
    assert chosen.accumulation * chosen.micro_batch == chosen.local_batch
    need = chosen.estimate()
    assert need.peak <= 16 * GIB * memory.USABLE and need.source == "estimate"


def test_only_replica_crosses_slices(made_topology):
    from neo.errors import InputError
    two = made_topology("2*v5p:4x4x4")
    with pytest.raises(InputError, match="--config.mesh.replica=2"):
        setting(CONFIG, two)
    assert all(sizes["replica"] % 2 == 0 for sizes in search.meshes(CONFIG, two))


def test_meshes_follow_the_links(made_topology):
    """4 x 4 x 4: axes are 4, 16 or 64 devices; 16 x 16 of v5e can be split anyhow."""
    for sizes in search.meshes(CONFIG, made_topology()):
        assert set(sizes.values()) <= {1, 4, 16, 64}, sizes
    flat = made_topology("v5e:16x16")
    assert any(sizes["tensor"] == 2 for sizes in search.meshes(CONFIG, flat))
    node = made_topology("h100:8x8")
    assert all(sizes["tensor"] <= 4 for sizes in search.meshes(CONFIG, made_topology("h100:4x16")))
    assert any(sizes["tensor"] == 8 for sizes in search.meshes(CONFIG, node))


def test_candidates_are_those_that_fit_by_the_bound(topology, made_engine):
    ranked, dropped = search.candidates(CONFIG, topology, made_engine().engine)
    assert len(ranked) > 10 and dropped > 0
    assert all(one.memory.peak <= 16 * GIB for one in ranked)
    times = [one.rough.best for one in ranked]
    assert times == sorted(times)
    # The shortcut of the search is the estimate itself.
    for one in ranked[::6]:
        whole = memory.estimate(one.setting.decoder, one.setting.phase, one.setting.sizes, one.setting.micro_batch)
        assert one.memory.peak == whole.total


def test_overrides_lead_to_the_candidate(topology, made_engine):
    ranked, _ = search.candidates(CONFIG, topology, made_engine().engine)
    assert {one.setting.sizes["tensor"] for one in ranked} > {1}
    for one in ranked[::5]:
        pairs = [text.removeprefix("--config.").split("=", 1) for text in one.overrides]
        again = setting(load("neo_460m", pairs), topology)
        assert (again.sizes, again.micro_batch, again.config.train.remat) == (
            one.setting.sizes, one.setting.micro_batch, one.setting.config.train.remat)


def test_search_compiles_few_and_ranks_them(topology, made_engine):
    fake, said = made_engine(), []
    found = search.search(CONFIG, topology, fake.engine, most=4, given=("--config.log.every_steps=7",), say=said.append)
    assert len(fake.asked) == 4 == len(found.plans)
    assert found.considered == 4 + found.left + found.dropped
    times = [one.cost.best for one in found.plans]
    assert times == sorted(times) and found.winner is found.plans[0]
    assert found.winner.overrides[0] == "--config.log.every_steps=7"
    # The config as it is was compiled first: the others are seen beside it.
    own = setting(CONFIG, topology)
    assert (fake.asked[0].sizes, fake.asked[0].micro_batch, fake.asked[0].config.train.remat) == (
        own.sizes, own.micro_batch, CONFIG.train.remat)
    assert sum(line.startswith("candidate") for line in said) == 8
    # The rough order is not trusted alone: other policies and meshes are compiled too.
    assert len({one.remat for one in found.plans}) > 1 and len({str(one.mesh) for one in found.plans}) > 1


def test_what_the_compiler_needs_counts_and_not_the_bound(topology, made_engine):
    fake = made_engine(beyond=1000.0)
    found = search.search(CONFIG, topology, fake.engine, most=3)
    assert found.winner is None and all(not one.fits for one in found.plans) and len(found.plans) == 3


def test_an_impossible_candidate_is_told_and_passed_over(topology, made_engine):
    from neo.errors import InputError
    fake, good = made_engine(), made_engine()
    calls = []

    def compile(config, topology, phase):
        calls.append(1)
        if len(calls) == 2:
            raise InputError("the links say no")
        return good.compile(config, topology, phase)

    engine = type(fake.engine)(compile, good.price, fake.engine.rough)
    found = search.search(CONFIG, topology, engine, most=3)
    assert len(found.plans) == 2 and "the links say no" in found.impossible[0]


def test_without_a_compiler_all_candidates_are_ranked(made_topology, made_engine):
    fake = made_engine().engine
    found = search.search(CONFIG, made_topology("h100:2x2"), type(fake)(None, fake.price, fake.rough))
    assert found.left > 0 and len(found.plans) == search.WORKED_OUT and found.plans[0].memory.source == "estimate"


def test_nearest_plan_that_fits(topology, made_engine):
    """Twice the estimate does not fit as the config is: a smaller micro-batch with the same mesh does."""
    fake = made_engine(beyond=1.5)
    made = plan(CONFIG, topology, fake.engine)
    assert not made.fits
    near = search.nearest_fit(CONFIG, topology, fake.engine, made)
    assert near is not None and near.fits and near.mesh == made.mesh
    assert near.micro_batch < made.micro_batch or near.remat != made.remat
    line = search.refusal(CONFIG, topology, fake.engine, made, near)
    assert "GiB too much" in line and f"--config.train.micro_batch={near.micro_batch}" in line


def test_larger_topologies_are_named_where_nothing_fits(made_topology, made_engine):
    tiny = made_topology(gib=0.2)
    made = plan(load("neo_460m", {"train.micro_batch": 1}), tiny, made_engine().engine)
    assert not made.fits
    assert search.nearest_fit(CONFIG, tiny, made_engine().engine, made) is None


def test_the_best_is_compiled_again_with_all_flags(topology, made_engine):
    """The quick compile of the first two winners said they fit; with all flags they do not."""
    import dataclasses
    quick, slow, fits = made_engine(), made_engine(beyond=1000.0), made_engine()
    calls = []

    def compile(config, topology, phase):
        calls.append(1)
        return (slow if len(calls) < 3 else fits).compile(config, topology, phase)

    final = dataclasses.replace(fits.engine, compile=compile, flags=("--xla_slow=1",))
    found = search.search(CONFIG, topology, quick.engine, most=4, final=final)
    assert len(calls) == 3 and found.winner is found.final
    assert found.final.flags == ("--xla_slow=1",) and found.final.remat == found.plans[2].remat
    never = dataclasses.replace(slow.engine, flags=("--xla_slow=1",))
    assert search.search(CONFIG, topology, quick.engine, most=4, final=never).final is None


def test_the_config_as_it_is_is_among_them_with_any_micro_batch(topology, made_engine):
    fake = made_engine()
    config = load("neo_460m", {"train.micro_batch": 1, "train.remat": "full"})
    found = search.search(config, topology, fake.engine, most=3)
    assert fake.asked[0].micro_batch == 1 and fake.asked[0].config.train.remat == "full"
    assert () in [one.overrides for one in found.plans]
