"""What a command is run in: signals before a run has begun, pipes that close, terminals that cannot show a letter, what
the environment says of JAX."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any, NoReturn, TextIO

from lm import errors
from lm.system_errors import system_error


class StoppedError(BaseException):
    """SIGTERM before the first step: nothing was saved that is not on disk. No `Exception`, as nobody may mend it."""


def stop_on_sigterm() -> None:
    """Makes SIGTERM end the process by an exception, so that what was begun is cleared away. The loop has its own
    handler while it runs steps."""

    def stop(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not interrupt the clearing away
        raise StoppedError

    signal.signal(signal.SIGTERM, stop)


def show_any_text() -> None:
    """Lets a terminal that is not UTF-8 show what it cannot as `\\xe9`."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed by whoever started us
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115, for as long as the process lives
    for stream in (sys.stdout, sys.stderr):
        if (reconfigure := getattr(stream, "reconfigure", None)) is not None:
            reconfigure(errors="backslashreplace")


class Outliving:
    """A standard stream for a run that goes on when nobody reads it any more, or its disk is full: what it writes then
    goes nowhere. A run has metrics.jsonl besides."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with self._let_go():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._let_go():
            self._stream.flush()

    @contextlib.contextmanager
    def _let_go(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            _to_nowhere(self._stream)


def leave_pipe() -> None:
    """Sends what is still to be printed nowhere, after the reader of a pipe has gone: else Python complains at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            _to_nowhere(stream)


def _to_nowhere(stream: TextIO) -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def read_standard_input() -> str:
    """All of it. UserError where it is no UTF-8."""
    content = sys.stdin.buffer.read()
    try:
        return content.decode()
    except UnicodeDecodeError as e:
        raise errors.UserError(
            f"standard input: expected UTF-8, got the byte {content[e.start : e.start + 1]!r} at {e.start}; convert "
            "it, as with iconv -t utf-8"
        ) from None


def check_jax() -> None:
    """Raises UserError where the environment has asked for a JAX that cannot run here."""
    import jax

    if jax.config.jax_disable_jit:  # type: ignore[attr-defined]
        raise errors.UserError(
            "JAX_DISABLE_JIT: expected it unset, got JAX without compilation, which shards nothing; unset it"
        )
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as e:
        asked = jax.config.jax_platforms  # type: ignore[attr-defined]
        if not asked:
            raise
        why = str(e).strip().split("\n")[0] or "none"
        raise errors.UserError(
            f"JAX_PLATFORMS={asked}: expected a platform that is here, got {why!r}; unset it, or install JAX for it: "
            "pip install 'jax[cuda12]' or 'jax[tpu]'"
        ) from None


def explain(e: OSError) -> str:
    """One line of a failure of the system that nobody foresaw."""
    if isinstance(e.filename, str | bytes) and (said := system_error(os.fsdecode(e.filename), e)):
        return said
    what = e.strerror or str(e) or type(e).__name__
    return f"expected to be able to go on, got {what} (--traceback: where); mend that, then run it again"


def may_pass(e: OSError) -> bool:
    """Says whether a failure is of the network, which another try may not meet."""
    return isinstance(e, ConnectionError | TimeoutError) or (e.errno is None and e.filename is None)


def is_unread() -> bool:
    """Says whether whoever read the standard output has gone."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except OSError:  # no file of the system's
        return False
    return any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0))
