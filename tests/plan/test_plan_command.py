"""`python -m neo.plan` from its arguments to its files and exit codes, with a made-up compiler."""

from __future__ import annotations

import json

import pytest

from neo.plan import planner
from neo.plan.__main__ import COMMAND, FILES, run


@pytest.fixture
def plan_with(monkeypatch, invoked, tmp_path, made_engine):
    """plan_with(argv, **FakeEngine's) -> Ended: the command in a folder of its own, with a compiler that is not there."""
    monkeypatch.chdir(tmp_path)

    def start(*argv, **behaviour):
        fake = made_engine(**behaviour)
        monkeypatch.setattr(planner, "engine_for", lambda topology, cache, say, flags: fake.engine)
        ended = invoked(COMMAND, run, ["--config=neo_460m", *argv])
        ended.asked = fake.asked
        return ended
    return start


def test_a_plan_is_printed_and_written(plan_with, tmp_path):
    ended = plan_with("--topology=v5p:4x4x4", "--config.train.remat=full")
    assert ended.code == 0, ended.err
    folder = tmp_path / "plans" / "neo_460m-v5p_4x4x4"
    assert sorted(path.name for path in folder.iterdir()) == sorted(FILES)
    assert (folder / "plan.txt").read_text() in ended.out
    assert ended.out.splitlines()[-1] == "next: python -m neo.train --config=neo_460m --config.train.remat=full"
    found = json.loads((folder / "plan.json").read_text())
    assert found["best"]["fits"] and found["plans"][0]["remat"] == "full"
    assert len(ended.asked) == 1


def test_products_are_translated_aloud(plan_with):
    ended = plan_with("--topology=v5p-128")
    assert "128 cores" in ended.err and "64 chips" in ended.err and "64 x v5p" in ended.out
    assert (ended.out.count("v5p:4x4x4")) >= 1


def test_json_alone_on_stdout(plan_with):
    ended = plan_with("--topology=v5e:4x4", "--json")
    found = json.loads(ended.out)
    assert found["best"]["topology"] == "v5e:4x4" and found["best"]["mfu"]["full_overlap"] > 0


def test_search_prints_a_ranking_and_what_to_paste(plan_with):
    ended = plan_with("--topology=v5p:4x4x4", "--search", "--candidates=3")
    assert ended.code == 0 and len(ended.asked) == 3
    paste = next(line for line in ended.out.splitlines() if line.startswith("to paste: "))
    assert "--config.train.micro_batch=" in paste
    assert ended.out.splitlines()[-1].endswith(paste.removeprefix("to paste: "))
    assert [line for line in ended.err.splitlines() if "candidate 3 of 3" in line]


def test_what_does_not_fit_ends_with_3_and_the_nearest_plan(plan_with, tmp_path):
    ended = plan_with("--topology=v5p:4x4x4", "--config.train.micro_batch=16", "--config.train.remat=none", beyond=1.4)
    assert ended.code == 3
    assert "does not fit on v5p:4x4x4 as it is" in ended.error and "the nearest plan that does: --config." in ended.error
    found = json.loads((tmp_path / "plans" / "neo_460m-v5p_4x4x4" / "plan.json").read_text())
    assert [one["fits"] for one in found["plans"]] == [False, True] and found["best"]["fits"]
    assert "next:" not in ended.out


def test_a_search_in_which_nothing_fits_ends_with_3(plan_with):
    ended = plan_with("--topology=v5e:2x2", "--search", "--candidates=2", beyond=1e4)
    assert ended.code == 3 and "nothing that was tried fits" in ended.error


def test_refused_by_the_compiler(plan_with):
    ended = plan_with("--topology=v5p:4x4x4", refuse="scoped vmem limit exceeded")
    assert ended.code == 3 and "scoped vmem limit exceeded" in ended.error


def test_scaling_table(plan_with):
    ended = plan_with("--topology=v5p:4x4x4", "--scaling=16,64,256,100")
    lines = ended.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("weak scaling"))
    assert [line.split()[:2] for line in lines[start + 2:start + 5]] == [
        ["16", "v5p:2x2x4"], ["64", "v5p:4x4x4"], ["256", "v5p:4x8x8"]]
    assert "no slice of so many chips" in lines[start + 5]


@pytest.mark.parametrize(("argv", "part"), [
    (["--topology=v5q:4x4x4"], "v5p"),
    (["--topology=v5p:4x4x4", "--candidates=0"], "--candidates=0"),
    (["--topology=v5p:4x4x4", "--phase=decay"], "fundamental"),
    (["--topology=v5p:4x4x4", "--config.mesh.tensor=3"], "mesh"),
    (["--topology=v5p:4x4x4", "--config.phases.fundamental.global_batch=100"], "not divisible"),
    (["--topology=2*v5p:4x4x4", "--config.mesh.replica=1"], "--config.mesh.replica=2"),
    (["--topology=v5p:4x4x4", "--scaling=16,x"], "--scaling"),
    (["--topology=v5p:4x4x4", "--out=notes"], "no plan of neo"),
])
def test_bad_input(plan_with, tmp_path, argv, part):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    ended = plan_with(*argv)
    assert ended.code == 2 and part in ended.error, ended.err
    assert not (tmp_path / "plans").exists() and (tmp_path / "notes" / "a.txt").read_text() == "mine"


def test_a_plan_is_replaced_by_a_later_one(plan_with, tmp_path):
    for remat in ("full", "minimal"):
        assert plan_with("--topology=v5e:4x4", "--out=here", f"--config.train.remat={remat}").code == 0
    assert json.loads((tmp_path / "here" / "plan.json").read_text())["best"]["remat"] == "minimal"


def test_list_needs_nothing_else(invoked):
    ended = invoked(COMMAND, run, ["--topology=list"])
    assert ended.code == 0 and "v5p" in ended.out and "h100" in ended.out
    assert invoked(COMMAND, run, ["--topology=v5p:4x4x4"]).code == 2


@pytest.fixture
def plan_for_real(monkeypatch, invoked, tmp_path):
    """plan_for_real(argv) -> Ended: with the engine that users get."""
    monkeypatch.chdir(tmp_path)
    return lambda *argv: invoked(COMMAND, run, ["--config=neo_460m", *argv])


def test_gpus_are_worked_out_by_the_roofline(plan_for_real, tmp_path):
    ended = plan_for_real("--topology=h100:8x2", "--scaling=8,16")
    assert ended.code == 0, ended.err
    assert "a roofline, not a compiled program" in ended.out and "an estimate, nothing was compiled" in ended.out
    found = json.loads((tmp_path / "plans" / "neo_460m-h100_8x2" / "plan.json").read_text())["best"]
    assert found["cost"]["scheduled"] is None and found["step_seconds"] == found["cost"]["full_overlap"]
    table = [line.split() for line in ended.out.splitlines() if line.strip().startswith(("8 ", "16 "))]
    assert [row[1] for row in table] == ["h100:8x1", "h100:8x2"]
    # The row of what was planned is the plan.
    assert float(table[1][4].replace(",", "")) == pytest.approx(1e3 * found["step_seconds"], abs=1)
    ended = plan_for_real("--topology=h100:8x2", "--flags=--xla_gpu_x=1")
    assert ended.code == 2 and "--flags" in ended.error


def test_missing_libtpu_says_what_to_install(plan_for_real, monkeypatch):
    from neo.plan import libtpu
    monkeypatch.setattr(libtpu.importlib.util, "find_spec", lambda name: None)
    ended = plan_for_real("--topology=v5e:2x2")
    assert ended.code == 2 and "[plan]" in ended.error


def test_flags():
    from neo.errors import InputError
    from neo.plan.topology import parse
    v5p = parse("v5p:4x4x4")
    every, quick = planner.flags_of(v5p, ""), planner.flags_of(v5p, "quick")
    assert set(quick) < set(every) and not any("vmem" in flag for flag in quick) and all("=" in flag for flag in every)
    assert planner.flags_of(v5p, "none") == () and planner.flags_of(v5p, "--a=1  --b=2") == ("--a=1", "--b=2")
    with pytest.raises(InputError, match="xla_x"):
        planner.flags_of(v5p, "xla_x=1")
