"""The error a user can mend, checks that raise it, and the exit codes a launcher acts on."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

EXIT_FINISHED = 0
EXIT_FAILED = 1  # anything unexpected: a bug, an unknown exception
EXIT_USER = 2  # wrong config, data, checkpoint or disk: restarting cannot help
EXIT_INFRASTRUCTURE = 75  # a peer was lost or a watchdog fired: restart
EXIT_PREEMPTED = 85  # asked to stop, checkpoint saved or nothing to save yet: restart to go on
EXIT_PIPE = 141  # whoever read the output has gone: what a shell says of a program that SIGPIPE ended


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


def not_negative(section: str, node: Any, *names: str) -> None:
    """Refuses fields below 0."""
    for name in names:
        if getattr(node, name) < 0:
            raise UserError(f"{section}.{name}: expected 0 or more, got {getattr(node, name)}")


def positive(section: str, node: Any, *names: str) -> None:
    """Refuses fields that are neither None nor at least 1."""
    for name in names:
        value = getattr(node, name)
        if value is not None and value < 1:
            raise UserError(f"{section}.{name}: expected at least 1, got {value}")
