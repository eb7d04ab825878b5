"""A small process pool that notices a killed worker and leaves no orphans.

The pools of the standard library do one or the other: `multiprocessing.Pool` waits for ever when a worker is killed
(out of memory), and the workers of `concurrent.futures` outlive a killed parent. Processes are spawned, not forked: the
parent may have threads.
"""

from __future__ import annotations

import collections
import multiprocessing
import multiprocessing.connection
import signal
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from neo.errors import NeoError, RestartSafe


class Workers:
    """Up to `limit` processes that share work; use as a context manager. They start when first needed.

    `state` is sent once to each process. With a limit of 1 all work is done in this process, unless `own_process`.
    Functions, tasks and results must be picklable, functions importable.
    """

    def __init__(self, limit: int, state: Any = None, *, own_process: bool = False):
        self.limit, self.state = max(limit, 1), state
        self._here = self.limit == 1 and not own_process
        self._context = multiprocessing.get_context("spawn")
        self._processes: dict[multiprocessing.connection.Connection, Any] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: Any) -> None:
        for connection, process in self._processes.items():
            connection.close()  # an idle worker ends by itself
            if error[0] is not None:
                process.terminate()
        for process in self._processes.values():
            process.join()
        self._processes.clear()

    def map(self, function: Callable[[Any, Any], Any], tasks: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (task number, function(state, task)) in the order in which they are done.

        A NeoError or OSError in a worker is raised here as it is, other errors as RuntimeError with the traceback;
        a killed worker raises RestartSafe. After an error the pool must be left.
        """
        if self._here:
            for number, task in enumerate(tasks):
                yield number, function(self.state, task)
            return
        waiting = collections.deque(enumerate(tasks))
        while len(self._processes) < min(self.limit, len(tasks)):
            self._start()
        busy = []
        for connection in self._processes:
            if waiting:
                connection.send((function, *waiting.popleft()))
                busy.append(connection)
        while busy:
            for connection in multiprocessing.connection.wait(busy):
                number, result = self._answer(connection)
                if waiting:
                    connection.send((function, *waiting.popleft()))
                else:
                    busy.remove(connection)
                yield number, result

    def _start(self) -> None:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=_work, args=(theirs, self.state), daemon=True)
        process.start()
        theirs.close()  # so that the end of the worker is seen as the end of the pipe
        self._processes[ours] = process

    def _answer(self, connection: multiprocessing.connection.Connection) -> tuple[int, Any]:
        try:
            number, result, error, text = connection.recv()
        except (EOFError, ConnectionError):
            process = self._processes[connection]
            process.join()
            raise RestartSafe(f"a worker process ended unexpectedly (exit code {process.exitcode}; -9 usually means "
                              "out of memory); finished work is kept: run the same command again, perhaps with fewer "
                              "--workers") from None
        if error is not None:
            error.add_note(text)
            raise error
        if text:
            raise RuntimeError(f"a worker failed:\n{text}")
        return number, result


def _work(connection: multiprocessing.connection.Connection, state: Any) -> None:
    """Loop of one worker: until the parent closes the pipe, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends the workers
    while True:
        try:
            function, number, task = connection.recv()
        except (EOFError, OSError):
            return
        try:
            answer = (number, function(state, task), None, "")
        except NeoError as error:
            answer = (number, None, type(error)(str(error)), traceback.format_exc())
        except OSError as error:  # a full disk must keep its number and file name
            answer = (number, None, OSError(error.errno, error.strerror, error.filename), traceback.format_exc())
        except Exception:
            answer = (number, None, None, traceback.format_exc())
        try:
            connection.send(answer)
        except OSError:
            return
