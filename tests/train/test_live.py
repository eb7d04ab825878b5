"""The loss curve below a notebook's cell: drawn while a run goes on, and once more when it ends, however it ends."""

from __future__ import annotations

import io
import json
import sys
import threading

import pytest
from PIL import Image

from neo.errors import InputError
from neo.train.live import live_plot
from neo.train.plot import draw_loss, loss_image

PATIENCE = 60.0   # seconds to wait for a thread that looks every hundredth of one


class Shown(list):
    """What a notebook would show; `wait(n)` until there are n pictures."""

    def __init__(self):
        super().__init__()
        self._more = threading.Condition()

    def __call__(self, image):
        with self._more:
            self.append(image)
            self._more.notify_all()

    def wait(self, number):
        with self._more:
            assert self._more.wait_for(lambda: len(self) >= number, PATIENCE), f"{len(self)} pictures"


@pytest.fixture
def write(tmp_path):
    """write(step, loss): one more record of a run in tmp_path."""
    (tmp_path / "metrics").mkdir()
    file = tmp_path / "metrics" / "0.jsonl"
    file.write_text(json.dumps({"start": "2026", "first_step": 0}) + "\n")

    def add(step, loss, **more):
        with file.open("a") as lines:
            lines.write(json.dumps({"step": step, "tokens": step * 1000, "train/loss": loss, **more}) + "\n")
    return add


def test_it_is_drawn_when_there_is_something_new_and_at_the_end(tmp_path, write):
    shown = Shown()
    with live_plot(tmp_path, seconds=0.01, show=shown):
        write(1, 5.0)
        shown.wait(1)
        write(2, 4.0, **{"optim/lr": 1e-3, "perf/tokens_per_s": 123.0})
        shown.wait(2)
    assert len(shown) == 2   # nothing new since
    with live_plot(tmp_path, seconds=PATIENCE, show=shown):
        write(3, 3.5)
    assert len(shown) == 3   # by the last look
    assert all(Image.open(io.BytesIO(image)).size == (960, 540) for image in shown)
    assert len(set(shown)) == 3


def test_a_run_that_fails_is_drawn_too_and_its_error_stays(tmp_path, write):
    shown = Shown()
    with pytest.raises(InputError, match="of the run"), live_plot(tmp_path, seconds=PATIENCE, show=shown):
        write(1, 5.0)
        raise InputError("of the run")
    assert len(shown) == 1
    assert not [thread for thread in threading.enumerate() if thread.name == "neo-live-plot"]


def test_a_run_that_never_began_shows_nothing(tmp_path):
    shown = Shown()
    with live_plot(tmp_path / "none", seconds=0.01, show=shown):
        pass
    assert shown == []


def test_drawing_leaves_a_notebooks_backend_alone(tmp_path, write):
    write(1, 5.0)
    before = "matplotlib.pyplot" in sys.modules
    image = loss_image([{"tokens": 1, "eval/loss": 2.0}], "x")
    assert image is not None and loss_image([{"tokens": 1}], "x") is None
    assert draw_loss(tmp_path).read_bytes().startswith(b"\x89PNG")
    assert ("matplotlib.pyplot" in sys.modules) == before


def test_outside_of_a_notebook_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython", None)
    with pytest.raises((InputError, ImportError), match="IPython"), live_plot(tmp_path):
        pass
    with pytest.raises(InputError, match="seconds=0: more than 0"), live_plot(tmp_path, seconds=0, show=print):
        pass
