"""A small process beside each training process: it knows at once when another one ends, and says why.

JAX's runtime ends survivors of a lost process from C++, with a page of text and a signal, or leaves them hanging in a
collective. So each process forks before JAX starts: the child trains, the parent (`Guard`) keeps the connections of the
meeting (`neo.parallel.rendezvous`), passes signals on, and when any process of the run ends early ends its child, with
one line that names the first cause. Guards also carry the agreement after which step all stop (`Channel`, `Stopping`):
no collective, no step is slowed.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from neo.errors import InputError, NeoError, RestartSafe, StoppedForPerson
from neo.parallel.rendezvous import Lines, Meeting, _readable

INTERRUPTED = 130         # exit code after Ctrl-C
BEATS = 4                 # heartbeats within the time after which silence means loss: ours
POLL_SECONDS = 0.5        # ours: the longest a guard sleeps
SETTLE_SECONDS = 2.0      # ours: a failure here may come from a loss elsewhere, of which word is still on its way
GRACE_SECONDS = 5.0       # ours: for a child to end by itself, with its own message, once another process has failed
SAME_SECONDS = 30.0       # ours: the same after an error with a name, which is often everyone's (NaN): here it may take longer
CLOSING_SECONDS = 60.0    # ours: for the interpreter and JAX to close once all have done their work
SECOND_SECONDS = 10.0     # ours: from a second Ctrl-C to SIGKILL, for a child that hangs outside Python
GONE = -1                 # in place of the last step: the guard has ended
PR_SET_PDEATHSIG = 1      # linux/prctl.h
AGAIN = "; start the same command again, it goes on from the last checkpoint"
TOLD = frozenset({0, 2, 3, 75, INTERRUPTED})   # exit codes of a child that has said itself why it ended


@dataclasses.dataclass(frozen=True)
class Ending:
    """How a process ended: its number, its exit code as DESIGN's users see it, and why in words ("" = it has said so)."""

    process: int
    code: int
    text: str

    def leave(self) -> NoReturn:
        """Raise what ends a command with this code: a NeoError, KeyboardInterrupt, or SystemExit where all is said."""
        if not self.text:
            raise SystemExit(self.code)
        kinds: dict[int, type[BaseException]] = {2: InputError, 3: StoppedForPerson, INTERRUPTED: KeyboardInterrupt}
        restart = self.code not in (InputError.exit_code, StoppedForPerson.exit_code)
        raise kinds.get(self.code, RestartSafe)(self.text + AGAIN * restart)


class Stopping:
    """Process 0's part of the agreement: which step is the last, given how far each process had got.

    A process that is told `stopping` answers with the steps it has begun (`at`) and begins no more until it is told
    `stop_after`: the greatest of them. So all can finish what any has begun, and none begins more.
    """

    def __init__(self, processes: int):
        self._processes = processes
        self._at: dict[int, int] = {}
        self.wanted: dict[str, Any] | None = None

    def receive(self, process: int, message: dict[str, Any]) -> list[dict[str, Any]]:
        """Take a message of a process; returns the messages to send to all."""
        if "want" in message and self.wanted is None:
            self.wanted = {"name": message["want"], "process": process}
            return [{"stopping": self.wanted}]
        if "at" in message:
            before = len(self._at)
            self._at[process] = int(message["at"])
            if before < len(self._at) == self._processes:
                return [{"stop_after": max(self._at.values())}]
        return []


class Channel:
    """The child's end: asks to stop, holds back steps while all agree, and tells how this process ends."""

    def __init__(self, lines: Lines, meeting: Meeting, process: int):
        self._lines, self._meeting, self._process = lines, meeting, process
        self._changed = threading.Condition()
        self._begun = 0
        self._stopping: dict[str, Any] | None = None
        self._limit: int | None = None
        self._asked = self._stopped = False
        self._go = threading.Event()
        threading.Thread(target=self._listen, name="neo-guard", daemon=True).start()

    def _listen(self) -> None:
        # A thread, because the main one may be waiting for a step that the others cannot finish before it has answered.
        while self._lines.open:
            for message in self._lines.receive():
                with self._changed:
                    if "stopping" in message:
                        self._stopping = message["stopping"]
                        self._lines.send(at=self._begun)
                    if "stop_after" in message:
                        self._limit = message["stop_after"]
                    self._changed.notify_all()
                if "go" in message:
                    self._go.set()
        with self._changed:
            self._limit = GONE if self._limit is None else self._limit
            self._changed.notify_all()
        self._go.set()

    def begin(self, step: int) -> str:
        """Call before the step with this number (from 1) is begun. Returns the signal to stop for, with where it came from,
        if the step before was to be the last one, else "". Waits while the processes agree on that."""
        with self._changed:
            reason = self._reason(step - 1)
            if not reason:
                self._begun = max(self._begun, step)
        return reason

    def stop(self, step: int, wanted: str) -> str:
        """After a step is begun: the same if this one is the last.

        `wanted` is the name of a signal that this process got, or "".
        """
        if wanted and not self._asked:
            self._asked = True
            self._lines.send(want=wanted)
        with self._changed:
            return self._reason(step)

    def _reason(self, step: int) -> str:
        # Others may be behind and wait for this answer, or ahead: then it has to go on to where they are.
        self._changed.wait_for(lambda: self._stopping is None or self._limit is not None)
        if self._limit == GONE:
            raise RestartSafe("the process that watched over this one is gone; start the same command again")
        if self._stopping is None or self._limit is None or step < self._limit:
            return ""
        self._stopped = True
        name, process = self._stopping["name"], self._stopping["process"]
        return name if process == self._process else f"{name} on {self._meeting.name(process)}"

    @contextlib.contextmanager
    def failures(self) -> Iterator[None]:
        """Tell the guard of a failure inside; what comes after is still to be told."""
        try:
            yield
        except BaseException as error:
            self.__exit__(type(error), error, None)
            raise

    def __enter__(self) -> Channel:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, _: Any) -> None:
        """Tell the guard how this process ends. Something unforeseen is first held against losses elsewhere."""
        if error is None or isinstance(error, NeoError | KeyboardInterrupt):
            code = 0 if error is None else getattr(error, "exit_code", INTERRUPTED)
            together = code == 0 or self._stopped
            self._lines.send(ended=code, text="" if error is None else str(error) or "interrupted", together=together)
            # Others may still write (a checkpoint, process 0 its result), for longer than JAX waits for a process to leave.
            if together:
                self._go.wait()
        else:
            first = str(error).strip().splitlines() or [""]
            self._lines.send(ended=1, text=f"{type(error).__name__}: {first[0][:200]}")
            # What a lost process does to this one looks like a bug here: the guard knows better, and ends this process.
            self._go.wait(2 * SETTLE_SECONDS + GRACE_SECONDS)


class Guard:
    """The parent of one training process.

    Args:
        process: the number of this process.
        meeting: the connections to the other guards; process 0 has one to each, the others one to process 0.
        child: process id of the training process.
        channel: the connection to it.
        heartbeat_seconds: another process that has not been heard of for so long is lost.
    """

    def __init__(self, process: int, meeting: Meeting, child: int, channel: Lines, heartbeat_seconds: float):
        self._process, self._meeting, self._child, self._channel = process, meeting, child, channel
        self._patience = heartbeat_seconds
        self._turn = time.monotonic()                             # when the loop last came round
        self._heard = dict.fromkeys(meeting.links, self._turn)
        self._beaten = 0.0
        self._stopping = Stopping(len(meeting.hosts)) if process == 0 else None
        self._done: set[int] = set()                               # processes whose work has ended, as process 0 hears of it
        self._done_at = 0.0                                       # when it had for all
        self._known: set[int] = set()                             # other processes whose end is known
        self._cause: Ending | None = None                         # the first bad end elsewhere
        self._cause_at = 0.0
        self._own: Ending | None = None                           # what the child has said about its end
        self._together = False                                    # it ends as all others do, and waits for them
        self._own_at = 0.0
        self._told = False                                        # whether the others know how this process ends
        self._status: int | None = None                           # the child's exit status, or minus a signal
        self._status_at = 0.0
        self._signals: list[int] = []                             # those passed on to the child
        self._kill_at = float("inf")

    def run(self) -> Ending:
        """Watch until the child has ended; returns how this process is to end."""
        before = self._catch_signals()
        try:
            while True:
                watched = [link for link in (*self._meeting.links.values(), self._channel) if link.open]
                for ready in _readable(watched, min(POLL_SECONDS, self._patience / BEATS)):
                    self._receive(ready)
                self._keep_in_touch()
                self._reap()
                ending = self._judge()
                if ending is not None:
                    self._tell(ending)
                    return ending
        finally:
            self._close()
            for number, handler in before.items():
                signal.signal(number, handler)

    # What comes in.

    def _receive(self, ready: Lines) -> None:
        messages = ready.receive()
        if ready is self._channel:
            for message in messages:
                self._from_child(message)
            return
        peer = next(i for i, link in self._meeting.links.items() if link is ready)
        self._heard[peer] = time.monotonic()
        for message in messages:
            self._from_peer(peer, message)

    def _from_child(self, message: dict[str, Any]) -> None:
        if "ended" in message:
            self._own, self._own_at = Ending(self._process, int(message["ended"]), str(message["text"])), time.monotonic()
            self._together = bool(message.get("together"))
            if self._together:
                self._count(self._process)
        elif self._stopping is not None:
            self._agree(self._process, message)
        else:
            self._meeting.links[0].send(**message)

    def _from_peer(self, peer: int, message: dict[str, Any]) -> None:
        if "done" in message:
            self._count(peer)
        elif "ended" in message:
            self._known.add(peer)
            if message["ended"] and not self._done_at:
                self._blame(Ending(int(message["process"]), int(message["ended"]), str(message["text"])))
        elif self._stopping is not None:
            self._agree(peer, message)
        elif "go" in message:
            self._let_go()
        elif "beat" not in message:
            self._channel.send(**message)

    def _count(self, process: int) -> None:
        """A process has done its work; when all have, they may leave."""
        if self._process:
            self._meeting.links[0].send(done=1)
            return
        self._done.add(process)
        if len(self._done) == len(self._meeting.hosts):
            for link in self._meeting.links.values():
                link.send(go=1)
            self._let_go()

    def _let_go(self) -> None:
        self._done_at = time.monotonic()
        self._channel.send(go=1)

    def _agree(self, process: int, message: dict[str, Any]) -> None:
        assert self._stopping is not None
        for answer in self._stopping.receive(process, message):
            self._channel.send(**answer)
            for link in self._meeting.links.values():
                link.send(**answer)

    def _keep_in_touch(self) -> None:
        now, late = time.monotonic(), time.monotonic() - self._turn
        self._turn = now
        if now - self._beaten >= self._patience / BEATS:
            self._beaten = now
            for link in self._meeting.links.values():
                link.send(beat=1)
        for peer, link in self._meeting.links.items():
            # Held up itself (a suspended machine), this guard must not blame the others for what it did not hear.
            if late > self._patience / 2:
                self._heard[peer] = now
            if not link.open:
                self._lost(peer, "ended without a word: it was killed, or its machine restarts")
            elif now - self._heard[peer] > self._patience:
                self._lost(peer, f"has not been heard of for {self._patience:g} s: its machine hangs or cannot be reached")

    def _lost(self, peer: int, how: str) -> None:
        if peer not in self._known:
            self._known.add(peer)
            self._blame(Ending(peer, RestartSafe.exit_code, f"{self._meeting.name(peer)} {how}"))

    def _blame(self, ending: Ending) -> None:
        """The first cause counts; process 0 tells all others."""
        if self._cause is None and not self._told:
            self._cause, self._cause_at = ending, time.monotonic()
            if self._process == 0:
                self._spread(ending)

    def _spread(self, ending: Ending) -> None:
        for peer, link in self._meeting.links.items():
            if peer != ending.process:
                link.send(ended=ending.code, process=ending.process, text=ending.text)

    # What is done about it.

    def _reap(self) -> None:
        if self._status is None:
            found, status = os.waitpid(self._child, os.WNOHANG)
            if found:
                self._status, self._status_at = os.waitstatus_to_exitcode(status), time.monotonic()
                self._channel.socket.setblocking(False)   # a process of its own may still hold the other end
                while self._channel.open:                 # its last words
                    self._receive(self._channel)

    def _judge(self) -> Ending | None:
        """How this process ends, once its child is gone; ends the child when it is time."""
        now = time.monotonic()
        if self._status is not None:
            return self._after(now)
        own, late = self._own, False
        if self._together:
            if self._done_at:
                late = now - self._done_at > CLOSING_SECONDS
            elif self._cause is not None:
                self._channel.send(go=1)   # what it waits for will not come; its own work is done
                late = now - max(self._cause_at, self._own_at) > GRACE_SECONDS
        elif own is not None and own.code != 1:
            self._tell(own)
            late = now - self._own_at > GRACE_SECONDS   # JAX's shutdown waits for processes that may never come
        elif self._cause is not None:
            # A bug here, or the echo of that cause? The echo, as far as anybody can tell.
            patience = SAME_SECONDS if self._cause.code in (2, 3) else GRACE_SECONDS
            late = now - self._cause_at > (0.0 if own is not None else patience)
        elif own is not None and now - self._own_at > 2 * SETTLE_SECONDS:   # a crash elsewhere is told after one
            self._tell(own)
            self._channel.send(go=1)   # to print its traceback
        if late or now > self._kill_at:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, signal.SIGKILL)
        return None

    def _after(self, now: float) -> Ending | None:
        own, cause, status, me = self._own, self._cause, self._status, self._process
        if own is not None and (own.code != 1 or self._told):
            return Ending(me, own.code, "")
        if status in TOLD and status:   # refused before it could tell
            return Ending(me, status, "")
        name = self._meeting.name(me)
        if cause is not None:
            code = cause.code if cause.code in (2, 3, INTERRUPTED) else RestartSafe.exit_code
            return Ending(me, code, f"{cause.text}; {name} was ended too")
        if status >= 0:
            return Ending(me, status, "")
        if -status in self._signals or self._kill_at < now:
            interrupted = signal.SIGINT in self._signals
            return Ending(me, INTERRUPTED if interrupted else RestartSafe.exit_code,
                          f"stopped by {'SIGINT' if interrupted else _signal(-status)} outside training, nothing saved")
        if status != -signal.SIGKILL and now - self._status_at < SETTLE_SECONDS:
            return None   # C++ may have ended it because of a loss of which word is still on its way
        hint = " (short memory? the kernel's log tells)" if status == -signal.SIGKILL else ""
        return Ending(me, RestartSafe.exit_code, f"{name} was killed by {_signal(-status)}{hint}")

    def _tell(self, ending: Ending) -> None:
        """Let the others know, once, unless they know a cause already."""
        if self._told or (self._cause is not None and ending.code):
            return
        self._told = True
        who = self._meeting.name(self._process)
        text = ending.text or (self._own.text if self._own is not None else f"ended with exit code {ending.code}")
        self._spread(dataclasses.replace(ending, text=text if who in text else f"{who}: {text}"))

    def _catch_signals(self) -> dict[int, Any]:
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {number: signal.signal(number, self._pass_on) for number in (signal.SIGTERM, signal.SIGINT)}

    def _pass_on(self, number: int, _: Any) -> None:
        self._signals.append(number)
        if self._signals.count(signal.SIGINT) == 2:
            self._kill_at = time.monotonic() + SECOND_SECONDS
        if self._status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._child, number)

    def _close(self) -> None:
        """End the connections so that the last word arrives: input left unread would make the kernel cut them off."""
        links = list(self._meeting.links.values())
        for link in links:
            with contextlib.suppress(OSError):
                link.socket.shutdown(socket.SHUT_WR)
        end = time.monotonic() + 1.0
        while (left := [link for link in links if link.open]) and time.monotonic() < end:
            for ready in _readable(left, 0.1):
                ready.receive()
        for link in (*links, self._channel):
            link.close()


def split(process: int, meeting: Meeting, heartbeat_seconds: float,
          fork: Callable[[], int] = os.fork) -> Channel:
    """Go on in a child that this process watches over. Returns in the child; the parent leaves with the child's code, or
    raises what ended the run.

    Must run before JAX or anything else has started threads.
    """
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    here, there = socket.socketpair()
    parent = os.getpid()
    child = fork()
    if child:
        there.close()
        Guard(process, meeting, child, Lines(here), heartbeat_seconds).run().leave()
    here.close()
    for link in meeting.links.values():
        link.socket.close()
    # Its own group: a terminal sends Ctrl-C to all of a group, and the parent passes it on.
    with contextlib.suppress(OSError):
        os.setpgid(0, 0)
    _die_with(parent)
    return Channel(Lines(there), meeting, process)


def _die_with(parent: int) -> None:
    """Let the kernel kill this process when its parent is gone (Linux; elsewhere the channel's end is the sign)."""
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(75)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
