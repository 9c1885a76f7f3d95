"""The error a user can mend, and the exit codes a launcher acts on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_FINISHED = 0
EXIT_FAILED = 1  # anything unexpected: a bug, an unknown exception
EXIT_USER = 2  # wrong config, data, checkpoint or disk: restarting cannot help
EXIT_INFRASTRUCTURE = 75  # a peer was lost or a watchdog fired: restart
EXIT_PREEMPTED = 85  # asked to stop, checkpoint saved: restart to go on


class UserError(ValueError):
    """A mistake of the user's: one line with the thing, what was expected, what came, and the way out.

    The command line prints it without a traceback and exits with EXIT_USER.
    """

    def __init__(self, message: str):
        super().__init__(message.replace("\n", "\\n"))  # a key or a file name may hold one


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known name, else the list of them."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""
