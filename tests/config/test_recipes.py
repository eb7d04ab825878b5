"""Every recipe in configs/: its docstring, its phases, its size."""

from __future__ import annotations

import ast
import re

import pytest

from neo.config import known, load

RECIPES = ("moxin_7b", "mpt_7b", "neo_250m", "neo_2b", "neo_460m", "neo_7b", "neo_980m", "neo_colab", "neo_demo", "yulan_mini")


def test_all_recipes_are_there():
    assert set(RECIPES) <= set(known())


@pytest.mark.parametrize("recipe", known())
def test_docstring_has_command_cost_expectation_and_sources(recipe):
    doc = ast.get_docstring(ast.parse(known()[recipe].read_text()))
    assert doc, "a recipe explains itself"
    assert re.search(rf"python -m neo\.train --config=(configs/)?{recipe}", doc)
    assert re.search(r"\bcost\b", doc, re.IGNORECASE), "what it costs, or that nobody has published it"
    assert re.search(r"\bExpected|\bloss\b|\bresult\b", doc), "what comes out, or that nobody has published it"
    assert re.search(r"Sources?:|is ours", doc), "where the numbers come from"


@pytest.mark.parametrize("recipe", known())
def test_source_marks_are_explained(recipe):
    text = known()[recipe].read_text()
    doc = ast.get_docstring(ast.parse(text))
    used = set(re.findall(r"\[([A-Z][A-Za-z0-9-]*)[^\]]*\]", text))
    explained = set(re.findall(r"\[([A-Z][A-Za-z0-9-]*)\]", doc))
    assert used <= explained


@pytest.mark.parametrize("recipe", known())
def test_recipes_load_and_are_sane(recipe):
    config = load(recipe)
    assert config.name == recipe and config.total_steps > 0
    assert config.init.checkpoint == "" and config.train.steps == 0 and not config.data.synthetic
    for phase in config.phases:
        assert phase.steps * phase.tokens_per_step - phase.tokens < phase.tokens_per_step
        assert 0 < phase.final_lr <= phase.peak_lr < 0.1
        assert phase.start_lr <= phase.peak_lr
        assert phase.warmup_tokens < phase.tokens
        assert sum(phase.mixture.values()) == pytest.approx(1 if phase.mixture_unit == "weight" else phase.tokens, rel=0.01)
    assert re.fullmatch(r"(data/\w+)?", config.data.store)


@pytest.mark.parametrize("recipe", known())
def test_recipes_are_short(recipe):
    lines = known()[recipe].read_text().splitlines()
    assert len(lines) <= 60


def test_mpt_7b_has_its_published_epochs():
    """The last column of the table on the model card; mC4 with its digit put back."""
    config = load("mpt_7b")
    [phase] = config.phases
    epochs = {name: weight * phase.tokens / config.data.source_tokens[name] for name, weight in phase.mixture.items()}
    assert {name: round(value, 2) for name, value in epochs.items()} == {
        "mc4_en": 0.14, "c4_en_semdedup": 2.98, "redpajama_common_crawl": 0.11, "the_stack_selected": 0.22,
        "redpajama_wikipedia_en": 8.21, "the_stack_markdown": 0.33, "s2orc": 0.68, "redpajama_books": 1.15,
        "redpajama_arxiv": 0.68, "redpajama_stackexchange": 0.68}
    over = [name for name, value in epochs.items() if value > config.data.max_epochs]
    assert over == list(config.data.max_epochs_of) == ["redpajama_wikipedia_en"]
    assert sum(phase.mixture.values()) == pytest.approx(1)


def test_yulan_mini_has_the_published_steps_and_rates():
    config = load("yulan_mini")
    assert len(config.phases) == 27 and len(config.sources) == 291
    assert config.total_steps == pytest.approx(262_772, abs=27)   # each phase rounds up to whole steps
    last_stable, at_28k, end = config.phases[24:]
    assert (last_stable.seq_len, last_stable.global_batch) == (4096, 1008)
    for phase in (at_28k, end):
        assert (phase.seq_len, phase.global_batch, phase.rope_base) == (28672, 144, 490000.0)
        assert phase.tokens_per_step == last_stable.tokens_per_step
    # A linear piece begins at the value where the one before ends.
    assert last_stable.final_lr == at_28k.peak_lr and at_28k.final_lr == end.peak_lr
    assert end.final_lr / last_stable.peak_lr == pytest.approx(0.0052, abs=5e-5)
    assert [phase.warmup_tokens for phase in config.phases[:2]] == [10_000_000_000, 0]
