"""One preparation under way, as its passes hand it on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lm.data.made_from import CorpusSpec
from lm.data.prepare.pool import Job, Workers
from lm.data.prepare.progress import Progress
from lm.errors import UserError
from lm.files import Log


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

    def run(self, what: str, jobs: Sequence[Job]) -> None:
        """Does the jobs that are not done yet. what: as a person is told."""
        with self.progress(what, sum(j.n_bytes for j in jobs)) as tick:
            self.workers.run(jobs, tick)
