"""Signals become a wish to stop; only a second Ctrl-C that is another one leaves at once."""

from __future__ import annotations

import os
import signal

import pytest

from neo.train import loop


@pytest.fixture
def at(monkeypatch):
    """Set the time, in seconds."""
    now = [0.0]
    monkeypatch.setattr(loop.time, "monotonic", lambda: now[0])
    return lambda seconds: now.__setitem__(0, seconds)


def test_the_same_ctrl_c_may_come_twice(at):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with loop.StopSignals() as signals:
        assert signals.name == ""
        os.kill(os.getpid(), signal.SIGINT)
        at(0.5)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.name == "SIGINT"
        at(1.5)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_sigterm_may_come_as_often_as_it_likes(at):
    with loop.StopSignals() as signals:
        for seconds in range(3):
            at(2.0 * seconds)
            os.kill(os.getpid(), signal.SIGTERM)
    assert signals.name == "SIGTERM"
