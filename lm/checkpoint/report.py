"""What `lm checkpoints` says of a run; needs no Orbax and no device."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from etils import epath

from lm.checkpoint import integrity
from lm.errors import UserError
from lm.files import is_remote
from lm.workdir import Workdir


def listing(workdir: str | Path | Workdir) -> str:
    """A table of the checkpoints of a run: step, items, bytes, state; below it folders that are none."""
    folder, steps = _steps(workdir)
    rows = [("step", "items", "bytes", "state"), *(_row(folder / str(step)) for step in steps)]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [f"{a:>{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}" for a, b, c, d in rows]
    others = sorted(p.name for p in folder.iterdir() if p.name not in map(str, steps))
    return "\n".join(lines + [f"no checkpoint of this run: {folder / name}" for name in others])


def verify(workdir: str | Path | Workdir, step: int | None = None) -> Iterator[str]:
    """Yields a line for each checkpoint, or for one, when it was read. Raises UserError at the end where some are
    damaged."""
    folder, steps = _steps(workdir)
    if step is not None and step not in steps:
        raise UserError(f"{workdir}: no checkpoint of step {step}; there are {', '.join(map(str, steps))}")
    damaged = []
    for n in steps if step is None else [step]:
        began = time.perf_counter()
        found = integrity.damage(folder / str(n))
        seconds = time.perf_counter() - began
        if found is not None and not (folder / str(n)).is_dir():
            continue  # a live run has let go of it meanwhile
        if found is not None:
            damaged.append(n)
            yield f"step {n}: damaged: {found}"
        else:
            yield f"step {n}: {_state(integrity.look(folder / str(n)), read=True)} ({seconds:.1f} s)"
    if damaged:
        raise UserError(
            f"{workdir}: expected whole checkpoints, got damage in step {', '.join(map(str, damaged))}; training goes "
            "on from the newest whole one, and --step names one to the other commands"
        )


def _steps(workdir: str | Path | Workdir) -> tuple[epath.Path, list[int]]:
    run = Workdir.of(workdir)
    steps = integrity.steps(run.checkpoints) if run.has_checkpoints() else []
    if not steps:
        raise UserError(f"{run}: no finished checkpoint here; expected the --workdir of a training run")
    return run.checkpoints, steps


def _row(folder: epath.Path) -> tuple[str, str, str, str]:
    found = integrity.damage(folder, depth="quick")
    try:
        step = integrity.look(folder)
    except OSError:
        return folder.name, "?", "?", f"damaged: {found}"
    state = _state(step, read=False) if found is None else f"damaged: {found}"
    return folder.name, " ".join(step.items), f"{step.n_bytes:,}", state


def _state(step: integrity.Step, *, read: bool) -> str:
    if step.sealed:
        return "whole" if read else "whole by names and sizes"
    more = "; the store keeps checksums" if is_remote(step.folder) else ", saved without checksums"
    return f"whole by names and sizes{more}"
