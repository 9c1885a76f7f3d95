"""What a person sees of a run: progress, metrics.jsonl, TensorBoard."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tensorboardX import SummaryWriter

from lm.files import write_atomic
from lm.training.uploads import Uploads
from lm.workdir import Workdir, write


class Log:
    """Writes a record to metrics.jsonl, TensorBoard and the terminal. On other processes than the first it is silent.

    The files are touched by the first record, which drops those after the step that the run resumes from, so that they
    read as one run: a run that is refused, or that dies before, leaves them as they were. How they are kept in a store
    says `lm.training.uploads`.
    """

    def __init__(self, workdir: Workdir | str | Path, *, total_steps: int, start_step: int, active: bool = True):
        self.active = active
        self.console = Console(stderr=False, highlight=False, soft_wrap=True, quiet=not active)
        self._workdir, self._start_step = Workdir.of(workdir), start_step
        self._records: _Records | None = None
        self._progress: Progress | None = None
        if not active:
            return
        if self.console.is_terminal:
            self._progress = Progress(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(bar_width=24),
                TextColumn("{task.description}"),
                TextColumn("eta"),
                TimeRemainingColumn(),
                console=self.console,
            )
            self._task = self._progress.add_task("", total=total_steps, completed=start_step)
            self._progress.start()

    def train(self, step: int, total_steps: int, record: dict[str, Any], eta_s: float) -> None:
        """Writes the record of a log interval."""
        if not self.active:
            return
        self._write(step, "train", record)
        mfu = "n/a" if record["mfu"] is None else f"{100 * record['mfu']:.1f}%/{100 * record['mfu_causal']:.1f}%"
        text = (
            f"loss {record['loss']:.4f}  {_si(record['tokens_per_s'])} tok/s  mfu {mfu}  lr {record['lr']:.2e}  "
            f"grad {record['grad_norm']:.2f}"
        )
        if self._progress is not None:
            self._progress.update(self._task, completed=step, description=text)
        else:
            self.console.print(f"step {step}/{total_steps}  {text}  eta {duration(eta_s)}")

    def evaluation(self, step: int, record: dict[str, Any], text: str) -> None:
        """Writes the result of an evaluation."""
        if self.active:
            self._write(step, "eval", record)
            self.flush()
            self.print(text)

    def print(self, text: str) -> None:
        self.console.print(text, markup=False)

    def flush(self) -> None:
        """Returns when all records are where the run is kept. Before a checkpoint is saved, so that those up to it,
        which a resumed run does not write again, are there when it is."""
        if self._records is not None:
            self._records.flush()

    def close(self) -> None:
        if not self.active:
            return
        self.active = False
        if self._progress is not None:
            self._progress.stop()
        if self._records is not None:
            self._records.close()

    def _write(self, step: int, kind: str, record: dict[str, Any]) -> None:
        if self._records is None:
            self._records = _Records(self._workdir, self._start_step, (kind, step), self.print)
        self._records.write(step, kind, record)


class _Records:
    """metrics.jsonl and the files of TensorBoard, without the records after `start_step`: written in the run's folder,
    or beside it on this machine and uploaded."""

    def __init__(self, workdir: Workdir, start_step: int, first: tuple[str, int], log: Callable[[str], None]):
        """first: kind and step of the record that comes first, which takes the place of one of an earlier start."""
        self._uploads = Uploads(workdir, log) if workdir.is_remote else None
        here = workdir if self._uploads is None else self._uploads.here
        if self._uploads is not None and workdir.metrics.exists():
            workdir.metrics.copy(here.metrics)  # an object cannot be appended to: its records go on in a file here
        if here.metrics.exists():
            kept, damaged = _kept(here.metrics.read_bytes(), start_step, first)
            if damaged:  # before they are dropped
                aside = workdir.metrics.with_name("metrics.damaged.txt")
                before = aside.read_bytes() if aside.exists() else b""
                write(aside, before + b"".join(damaged))
                log(f"{workdir.metrics}: {len(damaged)} line(s) that are no records are set aside in {aside.name}")
            write_atomic(Path(here.metrics), b"".join(kept))  # killed here, the old file stays
        self._file = open(here.metrics, "a", encoding="utf-8")
        # TensorBoard then hides what a killed run wrote after the step.
        self._tensorboard = SummaryWriter(str(here.tensorboard), purge_step=start_step + 1 if start_step else None)

    def write(self, step: int, kind: str, record: dict[str, Any]) -> None:
        self._file.write(json.dumps({"kind": kind, "step": step} | record) + "\n")
        self._file.flush()  # a killed process keeps its last record
        for name, value in _scalars(record).items():
            self._tensorboard.add_scalar(f"{kind}/{name}", value, step)
        self._tensorboard.flush()

    def flush(self) -> None:
        if self._uploads is not None:
            self._uploads.flush()

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()
        if self._uploads is not None:
            self._uploads.close()


def _scalars(record: dict[str, Any], at: str = "") -> dict[str, float]:
    out: dict[str, float] = {}
    for k, v in record.items():
        if isinstance(v, dict):
            out |= _scalars(v, f"{at}{k}/")
        elif isinstance(v, (int, float)):
            out[f"{at}{k}"] = float(v)
    return out


def _kept(content: bytes, step: int, again: tuple[str, int]) -> tuple[list[bytes], list[bytes]]:
    """Returns the lines of the records up to `step`, without the one that is written again; and those that are no
    records."""
    kept, damaged = list[bytes](), list[bytes]()
    lines = content.splitlines(keepends=True)
    for line in lines:
        try:
            record = json.loads(line)
            if record["step"] <= step and (record.get("kind"), record["step"]) != again:
                kept.append(line.rstrip(b"\r\n") + b"\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            if line is not lines[-1] or line.endswith(b"\n"):  # else the half line of a killed run
                damaged.append(line)
    return kept, damaged


def duration(seconds: float) -> str:
    """`3:07` or `2:05:09`."""
    s = round(seconds)
    return f"{s // 3600}:{s // 60 % 60:02}:{s % 60:02}" if s >= 3600 else f"{s // 60}:{s % 60:02}"


def _si(x: float) -> str:
    for unit, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if x >= scale:
            return f"{x / scale:.3g}{unit}"
    return f"{x:.3g}"
