"""What the benchmarks of data share: CPU time of a process and its workers, medians with their spread, the machine."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sysconfig
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

POLL_S, BUSY = 0.01, 0.1  # work goes on in the background while it takes this share of a core


class Spread(NamedTuple):
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 1) -> str:
        return f"{self.median:.{digits}f} ({self.low:.{digits}f}..{self.high:.{digits}f})"


class Time(NamedTuple):
    wall: float
    cpu: float


class Clock:
    """Seconds that work takes in this process, all its threads, and `workers` (psutil.Process), which are running.

    Waits until nothing goes on in the background, before and after: so that what one variant reads ahead is counted as
    its own. CPU seconds are of all that; wall seconds too, to within POLL_S.
    """

    def __init__(self, workers: Iterable[Any] = ()):
        self._workers = list(workers)

    def cpu_s(self) -> float:
        times = [w.cpu_times() for w in self._workers]
        return time.process_time() + sum(t.user + t.system for t in times)

    def time(self, work: Callable[[], Any]) -> Time:
        self._quiet()
        cpu, wall = self.cpu_s(), time.perf_counter()
        work()
        return Time(self._quiet() - wall, self.cpu_s() - cpu)

    def _quiet(self) -> float:
        """Waits; returns when the work was over."""
        over, before, still = time.perf_counter(), self.cpu_s(), 0
        while still < 5:  # workers' CPU time is counted in steps of 10 ms
            time.sleep(POLL_S)
            now, cpu = time.perf_counter(), self.cpu_s()
            if cpu - before > BUSY * POLL_S:
                over, still = now, 0
            else:
                still += 1
            before = cpu
        return over


def missing(packages: Iterable[str]) -> list[str]:
    """Those that are not installed."""
    return [p for p in packages if _version(p) is None]


def machine(packages: Iterable[str]) -> dict[str, Any]:
    """Of the report: the processor, how busy it is, and versions (None: not installed)."""
    return {
        "machine": platform.machine(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": {p: _version(p) for p in packages},
    }


def describe(found: dict[str, Any]) -> str:
    versions = ", ".join(f"{p} {v}" for p, v in found["versions"].items() if v)
    return (
        f"{found['cpu']} ({found['machine']}), {found['cores']} cores, load {found['load']:.1f} at the start\n"
        f"Python {found['python']}, {versions}"
    )


def python_sources(n_bytes: int) -> list[str]:
    """Some n_bytes of text that every machine has, a file a document."""
    texts: list[str] = []
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        texts.append(path.read_text(encoding="utf-8", errors="replace"))
        n_bytes -= len(texts[-1])
        if n_bytes < 0:
            break
    return texts


def write_json(path: str | None, content: dict[str, Any]) -> None:
    if path is not None:
        Path(path).write_text(json.dumps(content, indent=1) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
