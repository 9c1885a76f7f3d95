"""One preparation under way, as its passes hand it on."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lm.data.made_from import CorpusSpec
from lm.data.prepare.pool import Job, Workers
from lm.data.prepare.progress import Progress
from lm.errors import UserError
from lm.files import Log

POLL_S, MAX_POLL_S = 0.05, 5.0  # small corpora do not wait long, large ones do not load the shared file system
FIRST_WORD_S, EVERY_WORD_S = 2.0, 30.0  # when a host that waits says so


@dataclass(frozen=True, kw_only=True)
class Team:
    """The hosts that prepare one corpus. host: which of `hosts` this one is."""

    host: int = 0
    hosts: int = 1

    def __post_init__(self):
        if not 0 <= self.host < self.hosts:
            raise UserError(
                f"--host {self.host} --hosts {self.hosts}: expected 0 <= host < hosts, got others; give each host a "
                "number of its own"
            )

    def share(self, jobs: Sequence[Any]) -> list[Any]:
        """The jobs that are this host's."""
        return list(jobs[self.host :: self.hosts])


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """What is made and where (spec), by which of several hosts (team), in which processes (workers), and how people
    hear of it (progress, log)."""

    spec: CorpusSpec
    team: Team
    workers: Workers
    progress: Progress
    log: Log

    def run(self, what: str, mine: Sequence[Job], jobs: Sequence[Job], things: str) -> None:
        """Does this host's jobs, then waits until those of all hosts are done. things: one is made by each job."""
        self.work(what, mine)
        wait(unfinished(jobs, things), self.log)

    def work(self, what: str, jobs: Sequence[Job]) -> None:
        """Does those of the jobs that are not done yet. what: as a person is told."""
        with self.progress(what, sum(j.n_bytes for j in jobs)) as tick:
            self.workers.run(jobs, tick)


def wait(pending: Callable[[], str | None], log: Log, over: Callable[[], bool] = lambda: False) -> bool:
    """Looks until nothing is pending: True; or until it is over, which makes waiting useless: False."""
    began, said, pause = time.monotonic(), 0, POLL_S
    while (what := pending()) is not None:
        if over():
            return False
        if time.monotonic() - began > FIRST_WORD_S + said * EVERY_WORD_S:
            log(f"waiting for {what}")
            said += 1
        time.sleep(pause)
        pause = min(1.5 * pause, MAX_POLL_S)
    return True


def unfinished(jobs: Sequence[Job], what: str) -> Callable[[], str | None]:
    """Says which of the jobs are not done, for `wait`."""
    left = list(jobs)

    def pending():
        left[:] = [job for job in left if not job.done()]
        return f"{len(left)} of {len(jobs)} {what} of other hosts, first: {left[0].out}" if left else None

    return pending
