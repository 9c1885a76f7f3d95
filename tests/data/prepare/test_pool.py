"""The worker processes and threads of `prepare`."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.data import Jsonl
from lm.data.documents.reading import Reading
from lm.data.prepare import tokenize
from lm.data.prepare.manifest import with_threads
from lm.data.prepare.pool import Workers, in_order
from lm.data.prepare.scan import ScanJob
from lm.data.prepare.tokenize import TokenizeJob
from lm.data.store import splits
from lm.data.store.splits import in_validation
from tests.data.conftest import sample_texts


@given(st.lists(st.integers(), max_size=20), st.integers(1, 4))
def test_in_order_is_map_with_its_arguments(items, threads):
    assert list(in_order(lambda x: x * 3, items, threads)) == [(x, x * 3) for x in items]


@pytest.mark.parametrize("threads", [1, 3])
def test_in_order_runs_no_further_ahead_than_its_threads_and_one(threads):
    taken, running, most, lock = [], [0], [0], threading.Lock()

    def items():
        for i in range(30):
            taken.append(i)
            yield i

    def call(i):
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        with lock:
            running[0] -= 1
        return i

    for done, _ in enumerate(in_order(call, items(), threads)):
        assert len(taken) <= done + 1 + (threads if threads > 1 else 0)
    assert most[0] <= threads


@pytest.mark.parametrize("threads", [1, 2])
def test_in_order_raises_what_the_function_or_the_items_raise(threads):
    def items():
        yield from (4, 2, 0, 1)
        raise KeyError("items")

    with pytest.raises(ZeroDivisionError):
        list(in_order(lambda x: 8 // x, (4, 2, 0, 1), threads))
    with pytest.raises(KeyError, match="items"):
        list(in_order(lambda x: x, items(), threads))


def tokenise(folder, tokenizer_path, threads):
    source = Jsonl(glob=f"{folder.parent}/a.jsonl")
    reading = Reading(source=source, parts=tuple(source.parts(folder)), invalid_utf8="error")
    scan = ScanJob(reading=reading, sample_bytes=0, validation_fraction=0.2, out=folder / "scan.npz")
    folder.mkdir()
    scan.run()
    labels = np.where(in_validation(scan.result().hashes, 0.2), splits.VALIDATION, splits.TRAIN).astype(np.uint8)
    labels[::7] = splits.DROP
    job = TokenizeJob(
        **dict(
            reading=reading, scan=scan.out, labels=labels, tokenizer=Path(tokenizer_path), dtype="<u2", folder=folder
        ),
        **dict(shard=0, out=folder / "shard.json", key="key", threads=threads),
    )
    job.run()
    return {p.name: p.read_bytes() for split in ("train", "validation") for p in (folder / split).iterdir()}, job


def test_threads_that_encode_do_not_change_a_byte(tmp_path, tokenizer_path, monkeypatch):
    texts = sample_texts(90)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    monkeypatch.setattr(tokenize, "ENCODE_CHARS", 1500)
    one, job = tokenise(tmp_path / "one", tokenizer_path, 1)
    many, _ = tokenise(tmp_path / "many", tokenizer_path, 3)
    assert one == many and len(one["tokens-00000.bin"]) > 1000
    assert [j.threads for n in (1, 2, 3, 9) for j in with_threads([job] * n, 7)[:1]] == [7, 3, 2, 1]


class Square:
    """A job of `Workers`, whose result is a file."""

    n_bytes = 5

    def __init__(self, folder, x):
        self.folder, self.x = folder, x

    def done(self):
        return (self.folder / str(self.x)).is_file()

    def run(self):
        if self.x == 13:
            raise ValueError("no thirteen")
        (self.folder / str(self.x)).write_text(f"{os.getpid()}")


def test_processes_stay_from_one_run_to_the_next_and_what_is_done_is_skipped(tmp_path):
    ticks = []
    with Workers(2) as workers:
        workers.run([Square(tmp_path, x) for x in range(6)], ticks.append)
        workers.run([Square(tmp_path, x) for x in range(12)], ticks.append)
        with pytest.raises(ValueError, match="no thirteen"):
            workers.run([Square(tmp_path, x) for x in range(10, 20)], ticks.append)
    assert ticks[:8] == [0, 5, 5, 5, 5, 5, 5, 30] and sum(ticks[7:14]) == 60
    pids = {(tmp_path / str(x)).read_text() for x in range(12)}
    assert len(pids) <= 2 and str(os.getpid()) not in pids
    with Workers(4) as workers:  # one job is done here
        workers.run([Square(tmp_path, 50)], ticks.append)
    assert (tmp_path / "50").read_text() == str(os.getpid())
