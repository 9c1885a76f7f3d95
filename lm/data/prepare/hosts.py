"""Several hosts that prepare one corpus in a folder they share, as `lm prepare RECIPE --host I --hosts N` each.

Host 0 finds the raw text, writes the plan, and does what is done once; job k of all belongs to host k % N. They talk by
files alone: whatever is finished gets its name at once, and who needs it looks whether it is there. So any of them may
be killed and started again, in any order. A file is seen with the delay of the shared file system (NFS: a minute).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lm.data.config import Data
from lm.data.made_from import raw_digest, splits
from lm.data.prepare.manifest import PLAN, Plan, difference, in_one, scan_jobs, settings, tokenize_job, with_threads
from lm.data.prepare.pool import Workers
from lm.data.prepare.progress import Progress
from lm.data.prepare.scan import ScanJob
from lm.data.prepare.tokenize import TokenizeJob
from lm.data.tokenizer.open import read_prepared
from lm.errors import UserError
from lm.files import Log

POLL_S, MAX_POLL_S = 0.05, 5.0
FIRST_WORD_S, EVERY_WORD_S = 2.0, 30.0  # when a host that waits says so
PATIENCE_S = 60.0  # how long the plan of other settings may be one that host 0 is about to replace


@dataclass(frozen=True, kw_only=True)
class Team:
    """host: which of `hosts` this one is."""

    host: int = 0
    hosts: int = 1

    def __post_init__(self):
        if not 0 <= self.host < self.hosts:
            raise UserError(
                f"--host {self.host} --hosts {self.hosts}: expected 0 <= host < hosts, got others; give each host a "
                "number of its own"
            )

    def share(self, jobs: Sequence[Any]) -> list[Any]:
        return list(jobs[self.host :: self.hosts])


def is_finished(data: Data) -> bool:
    path = Path(data.path)
    return (path / "tokenizer.model").is_file() and all(
        (path / name / split / "meta.json").is_file() for name in data.sources for split in splits(data)
    )


def remove_work(data: Data) -> None:
    """Of a finished corpus."""
    for name in data.sources:
        shutil.rmtree(Path(data.path, name, "work"), ignore_errors=True)


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


def unfinished(jobs: Sequence[ScanJob] | Sequence[TokenizeJob], what: str) -> Callable[[], str | None]:
    """For `wait`: the jobs that are not done."""
    left = list(jobs)

    def pending():
        left[:] = [job for job in left if not job.done()]
        return f"{len(left)} of {len(jobs)} {what} of other hosts, first: {left[0].out}" if left else None

    return pending


def help_prepare(data: Data, team: Team, workers: Workers, progress: Progress, log: Log) -> None:
    """What a host other than 0 does: its share, until host 0 has written everything. UserError where host 0 works by
    another config."""
    path = Path(data.path)
    while not is_finished(data):
        plan = _wait_for_plan(data, team, log)
        if plan is not None:
            _help_with(data, plan, team, workers, progress, log)
    remove_work(data)
    log(f"{path}: host {team.host} of {team.hosts}: done, all is written")


def _help_with(data: Data, plan: Plan, team: Team, workers: Workers, progress: Progress, log: Log) -> None:
    """Returns when the corpus is finished, or early when host 0 began anew with another plan."""
    path = Path(data.path)
    over = lambda: is_finished(data) or Plan.load(path) != plan
    scans = scan_jobs(data, plan)
    mine = team.share(in_one(scans))
    if not all(job.done() for job in mine) and over():  # in this order: work goes after everything is written
        return
    with progress("reading", sum(j.n_bytes for j in mine)) as tick:
        workers.run(mine, tick)

    labels = {name: plan.labels_path(path, name) for name in plan.shards}
    missing = lambda: next((f"host 0: {p}" for p in labels.values() if not p.is_file()), None)
    if not wait(missing, log, over):
        return
    tokenizer = read_prepared(path / "tokenizer.model")
    shards = team.share([(name, i, scan) for name, jobs in scans.items() for i, scan in enumerate(jobs)])
    todo = []
    for name, i, scan in shards:
        try:
            with np.load(labels[name]) as z:
                todo.append(tokenize_job(data, name, i, scan, z[str(i)], scan.result().digest(), tokenizer))
        except FileNotFoundError:
            if over():
                return
            raise
    if not all(job.done() for job in todo) and over():
        return
    with progress("tokenising", sum(j.n_bytes for j in todo)) as tick:
        workers.run(with_threads(todo, workers.n), tick)
    wait(lambda: f"host 0 to finish {path}", log, over)


def _raw_difference(data: Data, plan: Plan) -> tuple[str, Any, Any] | None:
    """Of the raw files as they are seen here, where they are: names, sizes and times."""
    here = {name: raw_digest(data, name) for name in plan.raw}
    return next((("raw files of " + n, x, plan.raw[n]) for n, x in here.items() if x not in (None, plan.raw[n])), None)


def _wait_for_plan(data: Data, team: Team, log: Log) -> Plan | None:
    """None: the corpus is finished."""
    path, mine = Path(data.path), settings(data, team.hosts)
    found: list[Plan] = []
    differs_since: float | None = None

    def pending():
        nonlocal differs_since
        plan = Plan.load(path)
        if plan is None:
            differs_since = None
            return f"host 0, which finds the raw text: {path / PLAN}"
        differs = difference(mine, plan.settings) or _raw_difference(data, plan)
        if differs is None:
            found.append(plan)
            return None
        differs_since = differs_since or time.monotonic()
        name, expected, got = differs
        what = f"{path / PLAN}: expected {name}={expected!r} as on this host, got {got!r} of host 0"
        if time.monotonic() - differs_since > PATIENCE_S:
            raise UserError(
                f"{what}; give all hosts one recipe, --hosts and raw files, and start host 0 before this one"
            )
        return f"host 0 to begin anew: {what}"

    return found[0] if wait(pending, log, lambda: is_finished(data)) else None
