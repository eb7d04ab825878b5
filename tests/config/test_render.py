"""Configs as text: what --print_config shows reads back; diffs; the reference."""

from __future__ import annotations

import dataclasses

import pytest

from neo.config import known, load
from neo.config.render import as_python, changes, field_lines, identity_diff, reference
from neo.config.schema import GROUPS


@pytest.mark.parametrize("recipe", known())
def test_printed_config_reads_back(recipe, tmp_path):
    config = load(recipe, {"train.steps": 3})
    file = tmp_path / "printed.py"
    file.write_text(as_python(config, ["train.steps"], ["some facts", "about it"]))
    assert load(file) == config
    marked = [line for line in file.read_text().splitlines() if "from the command line" in line]
    assert len(marked) == 1 and "c.train.steps = 3" in marked[0]


def test_printed_config_marks_changed_phases(tiny):
    overrides = {"phases.long.tokens": "1e6", "phases.long.mixture.a": "2", "data.store": 'a"b\\c'}
    text = as_python(load(tiny, overrides), overrides)
    marked = [line for line in text.splitlines() if "from the command line" in line]
    assert len(marked) == 2
    assert any("mixture.a, tokens" in line for line in marked)


def test_printed_config_has_scaled_phases_and_says_so(tiny, tmp_path):
    config = load(tiny, {"train.scale_tokens": 0.5})
    text = as_python(config, ["train.scale_tokens"])
    assert "tokens=1024" in text and "c.train.scale_tokens = 1.0   # from the command line, and applied" in text
    (tmp_path / "printed.py").write_text(text)
    assert load(tmp_path / "printed.py") == config


def test_printed_config_of_awkward_values_reads_back(tiny, tmp_path):
    config = load(tiny, {"data.store": "a'b\"c\\d", "eval.sample_prompts": ["a\nb", "'''", ""], "init.std": 1e-300})
    file = tmp_path / "printed.py"
    file.write_text(as_python(config))
    assert load(file) == config


def test_identity_diff_names_old_and_new(tiny):
    old = load(tiny)
    new = load(tiny, {"model.num_layers": 3, "optimizer.b1": 0.5, "train.micro_batch": 1, "log.every_steps": 7})
    assert identity_diff(old, new, 1) == ["config.model.num_layers: 2 -> 3", "config.optimizer.b1: 0.9 -> 0.5"]
    assert changes(old, new) == ["config.log.every_steps: 1 -> 7", "config.model.num_layers: 2 -> 3",
                                 "config.optimizer.b1: 0.9 -> 0.5", "config.train.micro_batch: 0 -> 1"]
    assert identity_diff(old, old, 2) == changes(old, old) == []


def test_phases_that_have_not_begun_may_change(tiny):
    old, new = load(tiny), load(tiny, {"phases.long.tokens": 999, "phases.long.mixture.b": 0.1})
    assert identity_diff(old, new, 1) == []
    begun = identity_diff(old, new, 2)
    assert [line.split(":")[0] for line in begun] == ["config.phases[1].mixture", "config.phases[1].tokens"]


def test_reference_is_fresh(root):
    assert (root / "docs" / "config_reference.md").read_text().strip() == reference().strip(), \
        "run `python -m neo.config > docs/config_reference.md`"


def test_reference_and_help_have_every_field():
    fields = {row[0] for row in field_lines()}
    wanted = {f"{'phases.<name>' if group == 'phases' else group}.{field.name}"
              for group, kind in GROUPS.items() for field in dataclasses.fields(kind)}
    assert fields == wanted | {"name"}
    text = reference()
    assert all(f"`{field}`" in text for field in wanted)
    assert all(doc.strip() for *_, doc in field_lines())
