"""Several hosts that prepare one corpus in a folder they share, as `lm prepare RECIPE --host I --hosts N` each.

Host 0 finds the raw text, writes the plan, and does what is done once; job k of all belongs to host k % N. They talk by
files alone: whatever is finished gets its name at once, and who needs it looks whether it is there. So any of them may
be killed and started again, in any order. A file is seen with the delay of the shared file system (NFS: a minute).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from lm.data.made_from import CorpusSpec
from lm.data.prepare.manifest import Plan, difference, in_one, scan_jobs, settings, tokenize_job, with_threads
from lm.data.prepare.preparation import Preparation
from lm.data.prepare.scan import ScanJob
from lm.data.prepare.tokenize import TokenizeJob
from lm.data.store.tokens import META
from lm.data.tokenizer.open import read_prepared
from lm.errors import UserError
from lm.files import Log

POLL_S, MAX_POLL_S = 0.05, 5.0
FIRST_WORD_S, EVERY_WORD_S = 2.0, 30.0  # when a host that waits says so
PATIENCE_S = 60.0  # how long the plan of other settings may be one that host 0 is about to replace


def missing_sources(spec: CorpusSpec) -> list[str]:
    """The sources that have not all of their stores."""
    stores = {name: [spec.folder.store(name, split) for split in spec.splits] for name in spec.sources}
    return [name for name, paths in stores.items() if not all((path / META).is_file() for path in paths)]


def is_finished(spec: CorpusSpec) -> bool:
    """Whether all is written that `prepare` writes."""
    return spec.folder.tokenizer.is_file() and not missing_sources(spec)


def remove_work(spec: CorpusSpec) -> None:
    """Removes what only an unfinished corpus needs."""
    for name in spec.sources:
        shutil.rmtree(spec.folder.work(name), ignore_errors=True)


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
    """Says which of the jobs are not done, for `wait`."""
    left = list(jobs)

    def pending():
        left[:] = [job for job in left if not job.done()]
        return f"{len(left)} of {len(jobs)} {what} of other hosts, first: {left[0].out}" if left else None

    return pending


def help_prepare(p: Preparation) -> None:
    """Does what a host other than 0 does: its share, until host 0 has written everything. UserError where host 0 works
    by another config."""
    while not is_finished(p.spec):
        plan = _wait_for_plan(p)
        if plan is not None:
            _help_with(p, plan)
    remove_work(p.spec)
    p.log(f"{p.spec.path}: host {p.team.host} of {p.team.hosts}: done, all is written")


def _help_with(p: Preparation, plan: Plan) -> None:
    """Returns when the corpus is finished, or early when host 0 began anew with another plan."""
    folder = p.spec.folder
    over = lambda: is_finished(p.spec) or Plan.load(folder.path) != plan
    scans = scan_jobs(p.spec, plan)
    mine = p.team.share(in_one(scans))
    if not all(job.done() for job in mine) and over():  # in this order: work goes after everything is written
        return
    p.run("reading", mine)

    labels = {name: plan.labels_path(folder.path, name) for name in plan.shards}
    missing = lambda: next((f"host 0: {path}" for path in labels.values() if not path.is_file()), None)
    if not wait(missing, p.log, over):
        return
    tokenizer = read_prepared(folder.tokenizer)
    shards = p.team.share([(name, i, scan) for name, jobs in scans.items() for i, scan in enumerate(jobs)])
    todo = []
    for name, i, scan in shards:
        try:
            with np.load(labels[name]) as z:
                todo.append(tokenize_job(folder, name, i, scan, z[str(i)], scan.result().digest(), tokenizer))
        except FileNotFoundError:
            if over():
                return
            raise
    if not all(job.done() for job in todo) and over():
        return
    p.run("tokenising", with_threads(todo, p.workers.n))
    wait(lambda: f"host 0 to finish {folder.path}", p.log, over)


def _raw_difference(spec: CorpusSpec, plan: Plan) -> tuple[str, Any, Any] | None:
    """As `difference`, of the raw files as they are seen here, where they are: names, sizes and times."""
    here = {name: spec.raw_digest(name) for name in plan.raw}
    return next((("raw files of " + n, x, plan.raw[n]) for n, x in here.items() if x not in (None, plan.raw[n])), None)


def _wait_for_plan(p: Preparation) -> Plan | None:
    """The plan of host 0, once it is that of this host's config; None: the corpus is finished."""
    folder, mine = p.spec.folder, settings(p.spec, p.team.hosts)
    found: list[Plan] = []
    differs_since: float | None = None

    def pending():
        nonlocal differs_since
        plan = Plan.load(folder.path)
        if plan is None:
            differs_since = None
            return f"host 0, which finds the raw text: {folder.plan}"
        differs = difference(mine, plan.settings) or _raw_difference(p.spec, plan)
        if differs is None:
            found.append(plan)
            return None
        differs_since = differs_since or time.monotonic()
        name, expected, got = differs
        what = f"{folder.plan}: expected {name}={expected!r} as on this host, got {got!r} of host 0"
        if time.monotonic() - differs_since > PATIENCE_S:
            raise UserError(
                f"{what}; give all hosts one recipe, --hosts and raw files, and start host 0 before this one"
            )
        return f"host 0 to begin anew: {what}"

    return found[0] if wait(pending, p.log, lambda: is_finished(p.spec)) else None
