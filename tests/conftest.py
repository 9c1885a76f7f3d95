"""Tests run on 8 virtual CPU devices, in groups that share what they compile; set up before JAX is imported.

A group goes to one worker: by default a file, with its fixtures, and for the models of `tests/hf/made.py` each model.
Groups start in the order of `durations.json`, the longest first, so that no long one is left at the end.
"""

from __future__ import annotations

import collections
import gc
import json
import os
import time
from pathlib import Path

import pytest

from tests.processes import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = xla_flags(8)
os.environ["OMP_NUM_THREADS"] = "1"  # of torch, whose threads would wait for each other on cores that workers share
# What compiles slowly is kept: for other workers, and for the processes that tests start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".pytest_cache" / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

ROOT = Path(__file__).parent.parent
DURATIONS = Path(__file__).parent / "durations.json"  # test file -> seconds of all its cases, by `make durations`
LIMIT_S = 10.0  # of a case without the marker slow, when durations are stored, on a machine that does nothing else
BUSY_LIMIT_S = 40.0  # and in any run: neighbours on the cores, which come and go, are not told from a slow case
IDLE_S = 0.25  # of `sum(range(10**7))` on an idle core of those this was tried on

MAPS = Path("/proc/self/maps")
MANY = 20_000  # of the 65,530 memory maps that Linux gives a process; every compiled program takes some
LOOK_EVERY = 25  # cases: reading the list of maps takes some milliseconds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--store-durations", action="store_true", help="write tests/durations.json")


@pytest.hookimpl(tryfirst=True)  # before xdist, which then sees the groups of files too
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    seconds = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
    for item in items:
        if item.get_closest_marker("xdist_group") is None:
            item.add_marker(pytest.mark.xdist_group(_file(item.nodeid)))
    groups: dict[str, float] = {}
    for item in items:
        groups.setdefault(_group(item), seconds.get(_file(item.nodeid), 0.0))
    items.sort(key=lambda item: (-groups[_group(item)], _group(item)))  # stable: a group keeps the order of its file


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _group(item: pytest.Item) -> str:
    marker = item.get_closest_marker("xdist_group")
    assert marker is not None
    return marker.args[0]


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is imported by now stays: the collector need not look through a million objects of it again and again."""
    if session.config.getoption("loadgroup", False):
        alone = [item.nodeid for item in session.items if not item.nodeid.endswith(f"@{_group(item)}")]
        if alone:  # each case would go to any worker, and what a group shares be made many times: twice the time
            raise pytest.UsageError(f"pytest {pytest.__version__} and xdist do not group cases, as {alone[0]}")
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Fails a case that is too slow for the half it is in. Of the time on the clock and that on the cores the smaller
    counts, in seconds of an idle machine: what others use of this one is no fault of the case."""
    clock, cores = time.perf_counter(), time.process_time()
    result = yield
    seconds = min(time.perf_counter() - clock, time.process_time() - cores)
    limit = LIMIT_S if item.config.getoption("--store-durations") else BUSY_LIMIT_S
    if seconds > limit and item.get_closest_marker("slow") is None and (seconds := seconds / _slowness()) > limit:
        pytest.fail(f"took {seconds:.1f} s, expected at most {limit:.0f}; make it smaller or mark it slow")
    return result


def _slowness() -> float:
    """How many times as long as on an idle core a loop takes now; at least 1."""
    began = time.perf_counter()
    sum(range(10**7))
    return max(1.0, (time.perf_counter() - began) / IDLE_S)


class _Durations:
    """Sums what each file took, in the process that hears of all workers."""

    def __init__(self) -> None:
        self.seconds: collections.Counter[str] = collections.Counter()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[_file(report.nodeid)] += report.duration

    def pytest_sessionfinish(self) -> None:
        known = json.loads(DURATIONS.read_text()) if DURATIONS.exists() else {}
        known = {name: s for name, s in known.items() if (ROOT / name).exists()}
        known |= {name: round(s, 1) for name, s in self.seconds.items()}
        DURATIONS.write_text(json.dumps(dict(sorted(known.items())), indent=0) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--store-durations") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Durations())


_cases = 0


def pytest_runtest_teardown() -> None:
    """Drops compiled programs before there are so many that XLA cannot map another, and crashes."""
    global _cases
    _cases += 1
    if _cases % LOOK_EVERY == 0 and MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        import jax

        jax.clear_caches()
        gc.collect()
