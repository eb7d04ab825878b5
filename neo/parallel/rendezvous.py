"""All processes of a run meet before JAX starts: who is missing is named, and all must mean the same run.

Process 0 listens on the coordinator's port, the others connect and introduce themselves with one line of JSON: their
number, host, clock and facts (the resolved config, versions). Process 0 compares and answers all at once. The
connections stay open for `neo.parallel.watch`; the port is closed again, for JAX's own service.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from neo.errors import InputError
from neo.parallel.cluster import Place

CLOCK_SECONDS = 60.0     # ours: the clocks date records and sign requests to object stores, which allow minutes
TOLD_SECONDS = 10.0      # ours: between two lines of whoever waits
RETRY_SECONDS = 0.2      # ours: between two attempts to connect
LINE_BYTES = 4 << 20     # ours: a resolved config is some 10 kB; more than this is not one of ours
SEND_SECONDS = 5.0       # ours: lines are short and fit the kernel's buffers; who cannot take one in this time is gone
NAMED_DIFFERENCES = 3    # ours
NAMED_PROCESSES = 8      # ours


class Lines:
    """Messages over a connected stream socket, one JSON object a line."""

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self.open = True
        self._rest = b""
        connection.settimeout(SEND_SECONDS)

    def fileno(self) -> int:
        """For `select`."""
        return self.socket.fileno()

    def send(self, **message: Any) -> None:
        """Send one message; a connection that cannot take it is closed from now on (`open`)."""
        if self.open:
            try:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
            except OSError:
                self.open = False

    def receive(self) -> list[dict[str, Any]]:
        """The messages that have come, waiting for some if there are none; sets `open` to False at the end of them."""
        try:
            read = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            read = b""
        if not read:
            self.open = False
            return []
        *lines, self._rest = (self._rest + read).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
            if len(self._rest) > LINE_BYTES or not all(isinstance(message, dict) for message in messages):
                raise ValueError
        except ValueError:   # something else speaks here: a port scanner, JAX's service of an older start
            self.open = False
            return []
        return messages

    def close(self) -> None:
        """End the connection; what was sent still arrives."""
        self.open = False
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)
        self.socket.close()


class Meeting:
    """All processes together: their hosts by number, and a connection to each (process 0) or to process 0 (others)."""

    def __init__(self, hosts: list[str], links: dict[int, Lines]):
        self.hosts, self.links = hosts, links

    def name(self, process: int) -> str:
        """`process 2 of 4 (host)`."""
        return f"process {process} of {len(self.hosts)} ({self.hosts[process]})"


def meet(place: Place, facts: Mapping[str, Any], seconds: float, host: str = "", clock: Callable[[], float] = time.time,
         say: Callable[[str], None] | None = None) -> Meeting:
    """Wait until all processes are there and agree.

    Args:
        place: this process among them.
        facts: what must be the same everywhere, JSON; nested dicts are compared and named field by field.
        seconds: how long to wait for the others.
        host: name of this machine in messages; default its host name.
        clock: UTC seconds of this machine.
        say: takes a line about waiting, every 10 s; default stderr.

    Raises InputError on every process that came, naming who is missing, who joined twice, whose facts or clock differ;
    and when the coordinator cannot be opened or reached.
    """
    host = host or socket.gethostname()
    say = say or (lambda text: print(f"neo: {text}", file=sys.stderr, flush=True))
    hello = {"neo": 1, "process": place.process_id, "of": place.num_processes, "host": host, "pid": os.getpid(),
             "facts": facts}
    if place.process_id == 0:
        return _Host(place, json.loads(json.dumps(hello)), clock, say).gather(seconds)
    return _attend(place, hello, seconds, clock, say)


class _Host:
    """Process 0."""

    def __init__(self, place: Place, own: dict[str, Any], clock: Callable[[], float], say: Callable[[str], None]):
        self._place, self._clock, self._say = place, clock, say
        self._hellos: dict[int, dict[str, Any]] = {0: own}
        self._links: dict[int, Lines] = {}
        self._behind: dict[int, float] = {}    # seconds that a clock is behind process 0's
        self._wrong = ""

    def gather(self, seconds: float) -> Meeting:
        _many_files(self._place.num_processes)
        end, told = time.monotonic() + seconds, time.monotonic()
        unnamed: list[Lines] = []
        with _listen(self._place) as server:
            while not self._wrong and len(self._hellos) < self._place.num_processes and time.monotonic() < end:
                watched = [server, *unnamed, *self._links.values()]
                for ready in _readable(watched, min(1.0, max(end - time.monotonic(), 0.0))):
                    if ready is server:
                        with contextlib.suppress(OSError):
                            unnamed.append(Lines(server.accept()[0]))
                    else:
                        self._listen_to(ready, unnamed)
                if time.monotonic() - told > TOLD_SECONDS:
                    told = time.monotonic()
                    self._say(f"waiting for {self._missing()} ({len(self._hellos)} of {self._place.num_processes} are here, "
                              f"{max(end - told, 0):.0f} s left)")
        for one in unnamed:
            one.close()
        error = self._wrong or self._absent(seconds) or self._differences() or self._clocks()
        hosts = [self._hellos[i]["host"] for i in sorted(self._hellos)]
        for link in self._links.values():
            link.send(error=error, hosts=hosts)
        if error:
            for link in self._links.values():
                link.close()
            raise InputError(error)
        return Meeting(hosts, self._links)

    def _listen_to(self, link: Lines, unnamed: list[Lines]) -> None:
        messages = link.receive()
        number = next((i for i, known in self._links.items() if known is link), None)
        if not link.open:
            link.close()
            if number is None:
                unnamed.remove(link)
            else:   # it went away before all were here; it may come back
                del self._links[number], self._hellos[number], self._behind[number]
            return
        for hello in messages if number is None else ():
            if hello.get("neo") != 1 or not isinstance(hello.get("process"), int):
                continue
            unnamed.remove(link)
            self._enter(link, hello)
            return

    def _enter(self, link: Lines, hello: dict[str, Any]) -> None:
        number, where = hello["process"], f"{hello.get('host')}, pid {hello.get('pid')}"
        if hello.get("of") != self._place.num_processes:
            self._wrong = (f"process {number} ({where}) was started as one of {hello.get('of')}, process 0 "
                           f"({self._hellos[0]['host']}) as one of {self._place.num_processes}; give all the same "
                           "--num_processes")
        elif number in self._hellos or not 0 < number < self._place.num_processes:
            other = self._hellos.get(number, self._hellos[0])
            self._wrong = (f"two processes say that they are process {number}: {other['host']}, pid {other['pid']}, and "
                           f"{where}; give each its own --process_id, or end the older start")
            number = -number - 1   # kept to be told, too
        self._behind[number] = self._clock() - float(hello.get("clock", 0.0))
        self._hellos[number], self._links[number] = hello, link

    def _missing(self) -> str:
        return _several([i for i in range(self._place.num_processes) if i not in self._hellos])

    def _absent(self, seconds: float) -> str:
        if len(self._hellos) >= self._place.num_processes:
            return ""
        here = ", ".join(f"{i} on {self._hellos[i]['host']}" for i in sorted(self._hellos)[:NAMED_PROCESSES])
        more = ", ..." if len(self._hellos) > NAMED_PROCESSES else ""
        return (f"{self._missing()} of {self._place.num_processes} did not join within {seconds:g} s "
                f"(here: {here}{more}); check that each was started and can reach {self._place.coordinator} "
                "(--config.train.join_seconds is how long to wait)")

    def _differences(self) -> str:
        own = flatten(self._hellos[0]["facts"])
        for number in sorted(self._hellos):
            there = flatten(self._hellos[number].get("facts"))
            fields = [field for field in {**own, **there} if own.get(field) != there.get(field)]
            if fields:
                told = [f"{field} is {_short(there.get(field))} there and {_short(own.get(field))} on process 0"
                        for field in fields[:NAMED_DIFFERENCES]]
                more = f", and {len(fields) - NAMED_DIFFERENCES} more fields" if len(fields) > NAMED_DIFFERENCES else ""
                return (f"process {number} ({self._hellos[number]['host']}) was started for another run than process 0 "
                        f"({self._hellos[0]['host']}): {', '.join(told)}{more}; start all with the same files, flags and "
                        "versions")
        return ""

    def _clocks(self) -> str:
        for number, behind in sorted(self._behind.items()):
            if abs(behind) > CLOCK_SECONDS:
                return (f"the clock of process {number} ({self._hellos[number]['host']}) is {abs(behind):.0f} s "
                        f"{'behind' if behind > 0 else 'ahead of'} that of process 0 ({self._hellos[0]['host']}), more than "
                        f"{CLOCK_SECONDS:g} s: set the clocks (chrony or systemd-timesyncd) on both")
        return ""


def _attend(place: Place, hello: Mapping[str, Any], seconds: float, clock: Callable[[], float],
            say: Callable[[str], None]) -> Meeting:
    """Any other process: try until process 0 answers."""
    end, told, error = time.monotonic() + seconds, time.monotonic(), ""
    connected = False
    while True:
        try:
            connection = socket.create_connection((place.host, place.port), timeout=SEND_SECONDS)
        except OSError as failed:
            error = str(failed)
        else:
            connected, link = True, Lines(connection)
            link.send(**hello, clock=clock())
            # Process 0 answers within its own waiting time, which began at most as late as its port was opened.
            while link.open and time.monotonic() < end + seconds:
                for message in link.receive():
                    if message.get("error"):
                        link.close()
                        raise InputError(str(message["error"]))
                    if "hosts" in message:
                        return Meeting([str(name) for name in message["hosts"]], {0: link})
                if time.monotonic() - told > TOLD_SECONDS:
                    told = time.monotonic()
                    say(f"process 0 ({place.coordinator}) answers and waits for others")
            link.close()
            error = "process 0 ended" if connected else error
        if time.monotonic() > end:
            raise InputError(f"--coordinator={place.coordinator} cannot be reached after {seconds:g} s ({error}); process 0 "
                             "is missing: check that it runs, and that this machine can open connections to it "
                             "(--config.train.join_seconds is how long to wait)")
        if time.monotonic() - told > TOLD_SECONDS:
            told = time.monotonic()
            say(f"waiting for process 0, the coordinator {place.coordinator} ({error})")
        time.sleep(RETRY_SECONDS)


def _listen(place: Place) -> socket.socket:
    """The coordinator's port, on all addresses of this machine; InputError when it is taken."""
    try:
        if socket.has_dualstack_ipv6():
            try:
                return socket.create_server(("::", place.port), family=socket.AF_INET6, dualstack_ipv6=True,
                                            backlog=place.num_processes)
            except OSError as error:
                if "in use" in str(error):
                    raise
        return socket.create_server(("", place.port), backlog=place.num_processes)
    except (OSError, OverflowError) as error:
        raise InputError(f"--coordinator={place.coordinator}: process 0 cannot open port {place.port} here ({error}); "
                         "give a port that is free, to all processes") from None


def _readable(watched: list[Any], seconds: float) -> list[Any]:
    """Those of `watched` that have something to read. Not select.select, which ends at file number 1024."""
    poll = select.poll()
    for one in watched:
        poll.register(one.fileno(), select.POLLIN)
    by_number = {one.fileno(): one for one in watched}
    return [by_number[number] for number, _ in poll.poll(max(seconds, 0.0) * 1000)]


def _many_files(processes: int) -> None:
    """Process 0 holds a connection to each: raise the usual soft limit of 1024 open files where that is too few."""
    import resource
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = processes + 512   # ours: what training itself may hold open
    if soft != resource.RLIM_INFINITY and soft < needed:
        ceiling = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, ceiling), hard))


def flatten(value: Any, path: str = "") -> dict[str, Any]:
    """{"config": {"a": {"b": 1}}} -> {"config.a.b": 1}; lists of dicts by their index."""
    if isinstance(value, Mapping) and value:
        parts = value.items()
    elif isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        parts = ((f"[{i}]", one) for i, one in enumerate(value))
    else:
        return {path: value}
    flat: dict[str, Any] = {}
    for key, inner in parts:
        flat |= flatten(inner, f"{path}{key}" if str(key).startswith("[") else f"{path}.{key}" if path else str(key))
    return flat


def _several(numbers: list[int]) -> str:
    named = ", ".join(map(str, numbers[:NAMED_PROCESSES]))
    more = f" and {len(numbers) - NAMED_PROCESSES} more" if len(numbers) > NAMED_PROCESSES else ""
    return f"process{'es' if len(numbers) > 1 else ''} {named}{more}"


def _short(value: Any) -> str:
    text = "missing" if value is None else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
