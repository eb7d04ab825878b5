"""config.train.profile_steps: a trace of these steps and no others is in the workdir, and stops nothing."""

from __future__ import annotations

import errno

import jax
import pytest

from neo.config import load
from neo.errors import InputError
from neo.train import profile
from neo.train.workdir import Run

TRACES = "profile/plugins/profile"   # what TensorBoard's profiler looks for below its --logdir


def traces(workdir):
    folder = workdir / TRACES
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def traced(workdir, name):
    """All events of a trace."""
    (file,) = (workdir / TRACES / name).glob("*.xplane.pb")
    return [event for plane in jax.profiler.ProfileData.from_file(str(file)).planes for line in plane.lines
            for event in line.events]


def steps_dispatched(workdir, name):
    """How often the jitted step was called while the trace ran, counted in the trace itself."""
    calls = sorted((event.start_ns, event.end_ns) for event in traced(workdir, name)
                   if event.name.startswith("PjitFunction(jit(step))"))
    count, until = 0, 0.0
    for start, end in calls:   # one call may be two events, one inside the other
        count, until = count + (start >= until), max(until, end)
    return count


def test_the_steps_asked_for_are_in_the_trace(command, tmp_path):
    ended = command(tmp_path / "run", train__profile_steps="3,5", train__steps=7)
    assert ended.code == 0, ended.err
    assert traces(tmp_path / "run") == ["steps_3_5"]
    assert list((tmp_path / "run" / TRACES / "steps_3_5").glob("*.trace.json.gz"))
    assert steps_dispatched(tmp_path / "run", "steps_3_5") == 3
    # What profilers cut the time into steps by.
    numbers = [dict(event.stats).get("step_num") for event in traced(tmp_path / "run", "steps_3_5") if event.name == "train"]
    assert sorted(numbers) == [3, 4, 5]
    assert f"tensorboard --logdir={tmp_path / 'run' / 'profile'}" in ended.err
    (event,) = [event for event in Run(tmp_path / "run").events() if event["event"] == "profile"]
    assert (event["first"], event["step"]) == (3, 5)


def test_a_stop_ends_the_trace_and_a_resume_traces_the_rest(command, tmp_path):
    for steps in (4, 10, 12):
        assert command(tmp_path / "run", train__profile_steps="3,8", train__steps=steps).code == 0
    # The first step of the second start, 5, warms up; the third start begins behind the range.
    assert traces(tmp_path / "run") == ["steps_3_4", "steps_6_8"]


def test_no_trace_unless_asked_for(command, tmp_path):
    assert command(tmp_path / "run", train__steps=2).code == 0
    assert not (tmp_path / "run" / "profile").exists()


def test_a_full_disk_loses_the_trace_and_nothing_else(command, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(profile, "_copy", full)
    ended = command(tmp_path / "run", train__profile_steps="2,3", train__steps=4)
    assert ended.code == 0
    assert "the trace of steps 2 to 3 was not written: [Errno 28] No space left on device" in ended.err


def test_a_process_that_is_traced_already_is_left_alone(command, tmp_path):
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    jax.profiler.start_trace(str(tmp_path / "other"), profiler_options=options)
    try:
        ended = command(tmp_path / "run", train__profile_steps="2,3", train__steps=4)
    finally:
        jax.profiler.stop_trace()
    assert ended.code == 0
    assert "profile: not traced: " in ended.err
    assert traces(tmp_path / "run") == []


@pytest.mark.parametrize("given", ["5", "1,3", "7,3", "3,4,5"])
def test_other_values_are_refused(tiny, given):
    with pytest.raises(InputError, match=f"config.train.profile_steps={given}: the first and the last step .* 10,12"):
        load(tiny, {"train.profile_steps": given})
