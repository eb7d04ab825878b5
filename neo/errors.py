"""The ways a neo command can end, one class per exit code.

Every command ends with one of these codes (docs/troubleshooting.md lists the messages):

    0    done
    1    a bug in neo: a traceback, and where the log is
    2    `InputError`: bad input or environment; nothing was changed
    3    `StoppedForPerson`: somebody must look (NaN, full disk, a plan that does not fit)
    75   `RestartSafe`: the state is saved, start the same command again
    130  Ctrl-C, saved
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class NeoError(Exception):
    """Base of the errors a user can act on. The text is one clear line: what, where, what would be right."""

    exit_code = 1


class InputError(NeoError):
    """The input or the environment is wrong. Nothing was written or allocated."""

    exit_code = 2


class StoppedForPerson(NeoError):
    """The run stopped and a restart would only stop again; the last good checkpoint is kept."""

    exit_code = 3


class RestartSafe(NeoError):
    """The run was stopped from outside with its state saved; the same command continues it."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `" (did you mean 'x'?)"` for the closest of `known`, or the empty string."""
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean {found[0]!r}?)" if found else ""
