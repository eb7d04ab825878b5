"""Every recipe in configs/: its docstring, its phases, its size."""

from __future__ import annotations

import ast
import re

import pytest

from neo.config import known, load

RECIPES = ("moxin_7b", "neo_250m", "neo_2b", "neo_460m", "neo_7b", "neo_980m", "neo_colab", "neo_demo")


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
        assert sum(phase.mixture.values()) == pytest.approx(1, abs=0.01)
    assert re.fullmatch(r"(data/\w+)?", config.data.store)


@pytest.mark.parametrize("recipe", known())
def test_recipes_are_short(recipe):
    lines = known()[recipe].read_text().splitlines()
    assert len(lines) <= 60
