"""average: the mean of what was stored, as a checkpoint that everything else takes."""

from __future__ import annotations

import json

import numpy as np
import pytest

from .conftest import save, tiny_config
from .test_to_hf import read_all


def test_weighted_mean(convert, workdir, tmp_path):
    """float32, each parameter; the newest one's tokenizer, step and config; again: nothing to do; and it converts."""
    from neo.train.checkpoint_format import resolve
    ended = convert("average", f"{workdir}@3", f"{workdir}@7", tmp_path / "mean", "--weights=1,3")
    assert ended.code == 0 and "Wrote" in ended.out, ended.err
    one, other, mean = (read_all(path) for path in (f"{workdir}@3", f"{workdir}@7", tmp_path / "mean"))
    for path, array in mean.items():
        assert array.dtype == np.float32
        np.testing.assert_allclose(array, 0.25 * one[path] + 0.75 * other[path], atol=1e-7, err_msg=path)
    found = resolve(str(tmp_path / "mean"))
    assert (found.step, found.tokens) == (7, 700_000_000) and found.config() == resolve(str(workdir)).config()
    assert "finished already" in convert("average", f"{workdir}@3", f"{workdir}@7", tmp_path / "mean", "--weights=1,3").err
    assert convert("average", f"{workdir}@3", f"{workdir}@7", tmp_path / "mean").code == 2
    assert convert("to-hf", tmp_path / "mean", tmp_path / "hf").code == 0
    assert "0.75 of" in (tmp_path / "hf/README.md").read_text()


def test_last_of_a_workdir(convert, workdir, tmp_path):
    assert convert("average", workdir, tmp_path / "a", "--last=2").code == 0
    assert convert("average", f"{workdir}@3", f"{workdir}@7", tmp_path / "b").code == 0
    one, other = read_all(tmp_path / "a"), read_all(tmp_path / "b")
    for path in one:
        np.testing.assert_array_equal(one[path], other[path], path)


@pytest.mark.parametrize("argv, part", [
    (("{run}@3", "{out}"), "two checkpoints or more"),
    (("{run}", "{out}", "--last=5"), "has 2 checkpoints"),
    (("{run}", "{run}@3", "{out}", "--last=2"), "takes one workdir"),
    (("{run}@3", "{run}@7", "{out}", "--weights=1"), "1 numbers for 2"),
    (("{run}@3", "{run}@7", "{out}", "--weights=1,x"), "separated by commas"),
    (("{run}@3", "{run}@7", "{out}", "--weights=1,-1"), "sum"),
    (("{run}@3", "{run}@7", "{out}", "--weights=nan,1"), "finite"),
])
def test_what_cannot_be_averaged(convert, workdir, tmp_path, argv, part):
    ended = convert("average", *(word.format(run=workdir, out=tmp_path / "out") for word in argv))
    assert ended.code == 2 and part in ended.error
    assert not list(tmp_path.iterdir())


def test_other_architecture(convert, workdir, tokenizer, tmp_path):
    run = save(tmp_path / "run", tiny_config(d_ff=64), tokenizer)
    ended = convert("average", workdir, run, tmp_path / "out")
    assert ended.code == 2 and "d_ff" in ended.error and "48" in ended.error and "64" in ended.error
    assert json.loads((run / "config.json").read_text())["model"]["d_ff"] == 64
