"""Processes that meet: who is missing, twice, of another run or another time is named to all that came."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest

from neo.errors import InputError
from neo.parallel import rendezvous
from neo.parallel.cluster import Place
from neo.parallel.rendezvous import Lines, flatten, meet


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def together(processes, count=None, seconds=20.0, facts=None, clocks=None, counts=None, say=lambda text: None):
    """Let these processes meet, one thread each -> {process: Meeting or the error's text}, in the order given."""
    port, ended = free_port(), []

    def attend(slot, process):
        place = Place(f"localhost:{port}", (counts or {}).get(process, count or len(processes)), process, "flags")
        try:
            met = meet(place, (facts or {}).get(process, {"config": {"a": 1}}), seconds, f"host{slot}",
                       lambda: time.time() + (clocks or {}).get(process, 0.0), say)
        except InputError as error:
            met = str(error)
        ended.append((process, met))
    threads = [threading.Thread(target=attend, args=each) for each in enumerate(processes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(ended) == len(processes), "some still wait"
    return ended


def errors(ended):
    texts = [text for _, text in ended]
    assert all(isinstance(text, str) for text in texts), texts
    return texts


def test_all_meet_and_stay_connected():
    ended = dict(together([0, 1, 2, 3]))
    assert all(met.hosts == ["host0", "host1", "host2", "host3"] for met in ended.values())
    assert set(ended[0].links) == {1, 2, 3} and all(set(ended[i].links) == {0} for i in (1, 2, 3))
    assert ended[0].name(2) == "process 2 of 4 (host2)"
    ended[0].links[3].send(beat=1)
    assert ended[3].links[0].receive() == [{"beat": 1}]
    # The port is free for JAX's service while these connections live.
    port = ended[0].links[1].socket.getsockname()[1]
    with socket.create_server(("", port)):
        ended[2].links[0].send(x="y")
        assert ended[0].links[2].receive() == [{"x": "y"}]
    for met in ended.values():
        for link in met.links.values():
            link.close()


def test_who_is_missing_is_told_to_all_that_came(monkeypatch):
    monkeypatch.setattr(rendezvous, "TOLD_SECONDS", 0.3)
    monkeypatch.setattr(rendezvous, "SEND_SECONDS", 0.4)
    said = []
    texts = errors(together([0, 2], count=4, seconds=1.5, say=said.append))
    assert texts[0] == texts[1]
    assert "processes 1, 3 of 4 did not join within 1.5 s (here: 0 on host0, 2 on host1)" in texts[0]
    assert any("waiting for processes 1, 3 (2 of 4 are here" in line for line in said), said
    assert any("process 0 (localhost:" in line and "waits for others" in line for line in said), said


def test_process_0_is_missing():
    [text] = errors(together([1], count=2, seconds=0.5))
    assert "cannot be reached after 0.5 s" in text and "process 0 is missing" in text


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as taken, pytest.raises(InputError, match="process 0 cannot open port"):
        meet(Place(f"localhost:{taken.getsockname()[1]}", 2, 0, "flags"), {}, 1.0)


def test_another_config_is_named_by_its_fields():
    one = {"config": {"optimizer": {"clip_norm": 1.0}, "phases": [{"tokens": 5}, {"tokens": 6}]}, "jax version": "0.12"}
    other = {"config": {"optimizer": {"clip_norm": 0.5}, "phases": [{"tokens": 5}, {"tokens": 7}]}, "jax version": "0.12"}
    for text in errors(together([0, 1, 2], facts={0: one, 1: one, 2: other})):
        assert text.startswith("process 2 (host2) was started for another run than process 0 (host0): ")
        assert "config.optimizer.clip_norm is 0.5 there and 1.0 on process 0" in text
        assert "config.phases[1].tokens is 7 there and 6 on process 0" in text and "[0]" not in text and "jax" not in text


def test_many_differences_stay_one_line():
    [text, _] = errors(together([0, 1], facts={0: {str(i): i for i in range(9)}, 1: {"long": "x" * 500}}))
    assert "and 7 more fields" in text and len(text) < 500 and "missing" in text


@pytest.mark.parametrize(("seconds", "word"), [(-300.0, "behind"), (90.0, "ahead of")])
def test_clocks_that_differ(seconds, word):
    for text in errors(together([0, 1, 2], clocks={1: seconds})):
        assert f"the clock of process 1 (host1) is {abs(seconds):.0f} s {word} that of process 0 (host0)" in text
    assert not any(isinstance(met, str) for _, met in together([0, 1], clocks={1: seconds / 10}))


def test_a_number_given_twice():
    texts = errors(together([0, 1, 1], count=3, seconds=3.0))
    assert all("two processes say that they are process 1" in text and "host1" in text and "host2" in text for text in texts)


def test_counts_that_differ():
    for text in errors(together([0, 1], counts={1: 3}, seconds=3.0)):
        assert "process 1 (host1" in text and "as one of 3" in text and "as one of 2" in text


def test_strangers_and_those_who_leave_early_do_not_disturb():
    port, ended = free_port(), {}

    def attend(process):
        ended[process] = meet(Place(f"localhost:{port}", 3, process, "flags"), {}, 20.0, f"h{process}")
    host = threading.Thread(target=attend, args=(0,))
    host.start()

    def connect():
        while True:
            try:
                return socket.create_connection(("localhost", port), timeout=5)
            except OSError:
                assert host.is_alive()
    strangers = [connect() for _ in range(3)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")
    strangers[1].sendall(b'[1, 2]\n{"neo": 2, "process": 1}\n')
    early = connect()   # a process 1 that is killed while it waits, and started again
    early.sendall(json.dumps({"neo": 1, "process": 1, "of": 3, "host": "old", "pid": 1, "clock": time.time(),
                              "facts": {}}).encode() + b"\n")
    early.close()
    others = [threading.Thread(target=attend, args=(i,)) for i in (1, 2)]
    for thread in others:
        thread.start()
    for thread in (host, *others):
        thread.join(60)
    assert ended[0].hosts == ["h0", "h1", "h2"], ended
    for stranger in strangers:
        stranger.close()
    for met in ended.values():
        for link in met.links.values():
            link.close()


def test_lines_survive_being_cut_anywhere_and_end_at_nonsense():
    here, there = socket.socketpair()
    lines, text = Lines(here), json.dumps({"a": "ü" * 5}).encode() + b"\n"
    got = []
    for byte in text + text:
        there.sendall(bytes([byte]))
        got += lines.receive()
    assert got == [{"a": "ü" * 5}] * 2 and lines.open
    there.sendall(b"\xff\xfe\n")
    assert lines.receive() == [] and not lines.open
    lines.send(more=1)   # no error
    there.close()
    here.close()


def test_fields_are_named_as_in_overrides():
    assert flatten({"a": {"b": [1, 2], "c": {}}, "d": [{"e": 1}]}) == {"a.b": [1, 2], "a.c": {}, "d[0].e": 1}
