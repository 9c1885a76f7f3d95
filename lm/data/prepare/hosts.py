"""Several hosts that prepare one corpus in a folder they share, as `lm prepare RECIPE --host I --hosts N` each.

Host 0 finds the raw text, writes the manifest, and does what is done once; job k of all belongs to host k % N. They
talk by files alone: whatever is finished gets its name at once, and who needs it looks whether it is there. So any of
them may be killed and started again, in any order. A file is seen with the delay of the shared file system (NFS: a
minute).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from lm.data.prepare import raw_files
from lm.data.prepare.manifest import Manifest, difference, flatten, scan_jobs, settings, tokenize_job, with_threads
from lm.data.prepare.preparation import Preparation, wait
from lm.data.prepare.state import is_finished, remove_work
from lm.data.tokenizer.open import read_prepared
from lm.errors import UserError

PATIENCE_S = 60.0  # how long the manifest of other settings may be one that host 0 is about to replace


def help_prepare(p: Preparation) -> None:
    """Does what a host other than 0 does: its share, until host 0 has written everything. UserError where host 0 works
    by another config."""
    while not is_finished(p.spec):
        manifest = _wait_for_manifest(p)
        if manifest is not None:
            _help_with(p, manifest)
    remove_work(p.spec)  # whoever is last removes what another has still written
    p.log(f"{p.spec.path}: host {p.team.host} of {p.team.hosts}: done, all is written")


def _help_with(p: Preparation, manifest: Manifest) -> None:
    """Returns when the corpus is finished, or early when host 0 began anew with another manifest."""
    folder = p.spec.folder
    over = lambda: is_finished(p.spec) or Manifest.load(folder.path) != manifest
    scans = scan_jobs(p.spec, manifest)
    mine = p.team.share(flatten(scans))
    if not all(job.done() for job in mine) and over():  # in this order: work goes after everything is written
        return
    p.work("reading", mine)

    labels = {name: manifest.labels_path(folder.path, name) for name in manifest.shards}
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
    p.work("tokenising", with_threads(todo, p.workers.n))
    wait(lambda: f"host 0 to finish {folder.path}", p.log, over)


def _raw_difference(p: Preparation, manifest: Manifest) -> tuple[str, Any, Any] | None:
    """Compares the raw files that are seen here with the manifest, as `difference` does."""
    here = {name: raw_files.digest_here(p.spec, name, raw, p.log) for name, raw in manifest.raw.items()}
    return next(
        (("raw files of " + n, x, manifest.raw[n]) for n, x in here.items() if x not in (None, manifest.raw[n])), None
    )


def _wait_for_manifest(p: Preparation) -> Manifest | None:
    """The manifest of host 0, once it is that of this host's config; None: the corpus is finished."""
    folder, mine = p.spec.folder, settings(p.spec, p.team.hosts)
    found: list[Manifest] = []
    differs_since: float | None = None

    def pending():
        nonlocal differs_since
        manifest = Manifest.load(folder.path)
        if manifest is None:
            differs_since = None
            return f"host 0, which finds the raw text: {folder.manifest}"
        differs = difference(mine, manifest.settings) or _raw_difference(p, manifest)
        if differs is None:
            found.append(manifest)
            return None
        differs_since = differs_since or time.monotonic()
        name, expected, got = differs
        what = f"{folder.manifest}: expected {name}={expected!r} as on this host, got {got!r} of host 0"
        if time.monotonic() - differs_since > PATIENCE_S:
            raise UserError(
                f"{what}; give all hosts one recipe, --hosts and raw files, and start host 0 before this one"
            )
        return f"host 0 to begin anew: {what}"

    return found[0] if wait(pending, p.log, lambda: is_finished(p.spec)) else None
