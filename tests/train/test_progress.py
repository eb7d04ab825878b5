"""What a person sees: plain lines, the live panel, stages that are never silent."""

from __future__ import annotations

import io
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neo.train import progress
from neo.train.progress import Log, Progress, count, duration, sparkline

STEP = {"step": 20, "tokens": 1_640_000, "train/loss": 5.4321, "optim/lr": 3e-3, "optim/grad_norm": 0.5,
        "perf/tokens_per_s": 12345.0, "perf/step_s": 0.33, "perf/mfu": 0.401, "perf/mfu_causal": 0.387}
HELD_OUT = {"step": 20, "tokens": 1_640_000, "eval/loss": 4.5, "eval/bits_per_byte": 2.25}


@pytest.mark.parametrize(("number", "text"), [
    (0, "0"), (7, "7"), (999, "999"), (13.39, "13.4"), (999.4, "999"), (999.6, "1K"), (1000, "1K"), (1640, "1.64K"),
    (999_600, "1M"), (1_640_000, "1.64M"), (16.78e9, "16.8B"), (3.726e12, "3.73T"), (0.25, "0.25")])
def test_count(number, text):
    assert count(number) == text


@given(st.floats(0, 9.99e14))
def test_count_is_short_and_within_a_percent(number):
    text = count(number)
    unit = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}.get(text[-1], 1)
    assert float(text.rstrip("KMBT")) * unit == pytest.approx(number, rel=0.006)
    assert len(text) <= 9


@pytest.mark.parametrize(("seconds", "text"), [
    (0.4, "0 s"), (59.4, "59 s"), (60, "1:00"), (3599.6, "1:00:00"), (3723, "1:02:03")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_sparkline_shows_the_shape():
    assert sparkline([]) == ""
    assert sparkline([1.0]) == "▁"
    assert sparkline([3, 2, 1]) == "█▄▁"
    assert len(sparkline(list(range(1000)))) <= 40


def test_plain_lines(capfd):
    log = Log()
    shown = Progress(log, 100, "plain", "neo x")
    shown.record({**STEP, "step": 10, "tokens": 820_000})
    shown.record(STEP)
    shown.record(HELD_OUT)
    shown.close()
    first, second, third = capfd.readouterr().err.splitlines()
    for part in ("step 10/100", "820K tokens", "loss 5.4321", "lr 3.00e-03", "grad 0.50", "12.3K tok/s",
                 "MFU 40.1 % (38.7 causal)"):
        assert part in first
    assert "left" not in first and "step 20/100" in second and second.endswith(" left")
    assert third.endswith("step 20: held-out loss 4.5000, 2.2500 bits per byte")


def test_off_shows_nothing(capfd):
    shown = Progress(Log(quiet=True), 100, "off", "neo x")
    shown.record(STEP)
    shown.close()
    assert capfd.readouterr() == ("", "")


def test_live_panel_has_everything_and_keeps_log_lines(monkeypatch):
    from rich.console import Console
    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=screen, force_terminal=True, width=100))
    log = Log()
    shown = Progress(log, 100, "live", "neo demo (synthetic data)")
    shown.record({**STEP, "step": 10})
    log("a line beside the panel")
    shown.record(STEP)
    shown.record(HELD_OUT)
    shown.close()
    text = screen.getvalue()
    for part in ("neo demo (synthetic data)", "20 / 100", "1.64M tokens", "5.4321", "3.00e-03", "12.3K tokens/s", "MFU 40.1 %",
                 "held out", "4.5000", "2.2500 bits per byte", "a line beside the panel", "left"):
        assert part in text
    assert log.echo is None


def test_log_keeps_early_lines_and_survives_a_file_that_cannot_be_written(tmp_path, capfd):
    log = Log()
    log("early")
    log.attach(str(tmp_path / "log"))
    log("late")
    log("for the file", file_only=True)
    lines = (tmp_path / "log").read_text().splitlines()
    assert [line.split("] ")[1] for line in lines] == ["early", "late", "for the file"]
    assert "for the file" not in capfd.readouterr().err
    log._file = open("/dev/full", "w")   # noqa: SIM115
    log("still shown")
    log("and again")
    assert "still shown" in (err := capfd.readouterr().err) and "and again" in err


def test_a_long_stage_says_that_it_goes_on(monkeypatch, capfd):
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0.05)
    log = Log()
    with log.stage("compiling"):
        time.sleep(0.3)
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) >= 3 and all("compiling ... " in line for line in lines[:-1])
    assert "compiling: 0." in lines[-1]
    with pytest.raises(KeyError), log.stage("failing"):
        raise KeyError
    assert "failing" not in capfd.readouterr().err
