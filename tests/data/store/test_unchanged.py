"""A run stops, and does not go on with other text, when a store changes under it."""

from __future__ import annotations

import os
import shutil

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lm.data import Stream
from lm.data.loader.loader import make_loader
from lm.data.loader.reader import HostReader, identity
from lm.data.loader.tfdata import GROUP
from lm.data.store import unchanged
from lm.data.store.unchanged import Watch
from lm.errors import UserError
from tests.data.conftest import random_store

T, B = 13, 6


@pytest.fixture
def live(tmp_path):
    """A stream of two stores, and the folder of the second."""
    stores = {name: random_store(tmp_path / name, 900, seed=i) for i, name in enumerate("ab")}
    return Stream(stores, weights=None, seq_len=T, seed=1), tmp_path / "b"


def replaced(path):
    copy = path.with_name("copy")
    shutil.copy2(path, copy)  # the same bytes and time
    os.replace(copy, path)


def rewritten(path):
    with open(path, "r+b") as f:
        f.write(b"\x05\x00")


def truncated(path):
    os.truncate(path, path.stat().st_size // 2)


def deleted(path):
    path.unlink()


def folder_gone(path):
    shutil.rmtree(path.parent)


CHANGES = [replaced, rewritten, truncated, deleted, folder_gone]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["tokens-00001.bin", "docs-00002.u64"])
def test_each_change_of_each_file_stops_a_live_reader(live, monkeypatch, change, name):
    stream, folder = live
    reader = HostReader(stream, np.arange(B), batch_size=B, start=0, examples=identity)
    reader(0)
    was = os.stat(folder / name)
    change(folder / name)
    reader(1)  # within the time between two checks
    monkeypatch.setattr(unchanged, "CHECK_EVERY_S", 0.0)
    reader = HostReader(stream, np.arange(B), batch_size=B, start=0, examples=identity)
    with pytest.raises(UserError) as e:
        reader(0)
    file = "tokens-00000.bin" if change is folder_gone else name
    message = str(e.value)
    assert message.startswith(f"{folder / file}: expected the file that was opened (")
    assert "; put the old corpus back to go on from the last checkpoint, or start a new run" in message
    if change in (deleted, folder_gone):
        assert "got nothing there" in message
    else:
        now = os.stat(folder / name)
        assert f"{was.st_size} bytes" in message and f"inode {was.st_ino}), got {now.st_size} bytes" in message


def test_the_loader_raises_what_the_check_says(live, monkeypatch):
    """Not TensorFlow's error: the command line exits with the code of a user's mistake."""
    monkeypatch.setattr(unchanged, "CHECK_EVERY_S", 0.0)
    stream, folder = live
    sharding = NamedSharding(Mesh(np.array(jax.devices()[:1]), "x"), PartitionSpec("x"))
    with make_loader(stream, sharding=sharding, batch_size=B, prefetch=1) as loader:
        next(loader)
        replaced(folder / "tokens-00000.bin")
        with pytest.raises(UserError, match=r"b/tokens-00000.bin: expected the file that was opened"):
            for _ in range(5 * GROUP):  # those that were read ahead
                next(loader)
    with pytest.raises(UserError, match="b/tokens-00000.bin: expected the file that was opened"):
        make_loader(stream, sharding=sharding, batch_size=B)  # before the first batch


def test_a_store_that_is_read_and_copied_from_is_unchanged(live, tmp_path):
    stream, folder = live
    for store in stream.stores:
        store.verify()
        store.document(3)
    shutil.copytree(folder, tmp_path / "copy")
    for store in stream.stores:
        store.check_unchanged()


def test_a_batch_costs_no_look_at_the_disk_but_once_in_ten_seconds(live, monkeypatch):
    stream, _ = live
    looks, now, real = [], [100.0], os.stat
    n_files = sum(2 * len(s.meta.shards) for s in stream.stores)
    monkeypatch.setattr(unchanged.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(unchanged.os, "stat", lambda path, **kw: (looks.append(path), real(path, **kw))[1])
    reader = HostReader(stream, np.arange(B), batch_size=B, start=0, examples=identity)
    for seconds, expected in ((100.0, 1), (109.9, 1), (110.0, 2), (119.9, 2), (1e4, 3)):
        now[0] = seconds
        for step in range(50):
            reader(step)
        assert len(looks) == expected * n_files


def test_what_raised_once_raises_again():
    """Several threads read: the second may come after the first has failed."""

    def check():
        raise UserError("changed")

    watch = Watch([check])
    for _ in range(3):
        with pytest.raises(UserError):
            watch()
