import json
import mmap
import os
import resource

import numpy as np
import pytest

from lm.data import Store
from lm.data.store.tokens import ShardWriter, dtype_for
from lm.errors import UserError
from tests.data.conftest import random_store, write_store

SHARDS = [[[5, 6, 7], [8]], [], [[9, 10]], [[11], [12, 13, 14, 15]]]
FLAT = [1, 5, 6, 7, 1, 8, 1, 9, 10, 1, 11, 1, 12, 13, 14, 15, 1]


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_documents_lie_between_eos_in_one_flat_space(tmp_path, dtype):
    store = write_store(tmp_path, SHARDS, dtype=dtype)
    assert store.read(0, store.n_tokens).tolist() == FLAT
    assert (store.n_tokens, store.n_documents, store.n_bytes) == (len(FLAT), 5, 35)
    documents = [d for shard in SHARDS for d in shard]
    assert [store.document(i).tolist() for i in range(5)] == [d + [1] for d in documents]
    assert [store.document_start(i) for i in range(5)] == [1, 5, 7, 10, 12]
    owner = [0, 0, 0, 0, 0, 1, 1, 2, 2, 2, 3, 3, 4, 4, 4, 4, 4]
    assert [store.document_at(i) for i in range(len(FLAT))] == owner


@pytest.mark.parametrize("length", [1, 4, 9, 17])
def test_windows_equal_slices_across_shards(tmp_path, length):
    store = write_store(tmp_path, SHARDS)
    starts = np.random.default_rng(0).permutation(np.arange(len(FLAT) - length + 1))
    out = np.zeros((len(starts), length), np.int32)
    store.read_windows(starts, out)
    assert out.tolist() == [FLAT[s : s + length] for s in starts]
    rows, some = np.array([3, 1]), np.zeros((5, length), np.int32)
    store.read_windows(starts[:1].repeat(2), some, rows)
    assert some[[1, 3]].tolist() == [FLAT[starts[0] : starts[0] + length]] * 2 and not some[[0, 2, 4]].any()


class Asked:
    """In place of a memory map: what the kernel is told will be read."""

    def __init__(self):
        self.bytes = set()

    def madvise(self, advice, start, length):
        assert advice == mmap.MADV_WILLNEED and start % mmap.PAGESIZE == 0
        self.bytes |= set(range(start, start + length))


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_the_kernel_is_asked_for_the_pages_that_are_read_and_no_others(tmp_path, dtype):
    """Random rows of a corpus that is not in memory cost one wait for all, and bring in nothing else."""
    store = write_store(tmp_path, [[[5] * 9000], [], [[6] * 20_000]], dtype=dtype)
    (size, page), second = (np.dtype(dtype).itemsize, mmap.PAGESIZE), 9002  # the token that opens the second shard
    reads = {
        "windows": lambda n: store.read_windows(np.array([second + 7000, 3, 8000]), np.empty((3, n), np.int32)),
        "pieces": lambda n: store.read_pieces(
            *np.array([[second + 7000, 3, 8000], [n, n, n]]), np.empty(3 * n, np.int32), np.array([0, n, 2 * n])
        ),
        "one": lambda n: [store.read(i, i + n) for i in (second + 7000, 3, 8000)],
    }
    for name, read in reads.items():
        store._maps = [Asked(), Asked()]
        read(600)
        wanted = [{i * size // page for i in (*range(3, 603), *range(8000, 8600))}]
        wanted.append({i * size // page for i in range(7000, 7600)})
        assert [{i // page for i in m.bytes} for m in store._maps] == wanted, name
    store._maps = [Asked(), Asked()]
    store.read(second - 10, second + 10)  # across shards
    assert [{i // page for i in m.bytes} for m in store._maps] == [{(second - 1) * size // page}, {0}]
    assert len(store.read(store.n_tokens, store.n_tokens)) == 0


@pytest.fixture
def few_files():
    """A soft limit of a few more open files than there are."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/dev/fd")) + 40, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_more_shards_than_files_may_be_open(tmp_path, few_files):
    store = write_store(tmp_path, [[[3 + i]] for i in range(60)])  # 120 maps, each of which keeps its file open
    assert store.read(0, store.n_tokens).tolist() == [1, *(t for i in range(60) for t in (3 + i, 1))]


def test_more_shards_than_files_can_be_open_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (50, 50))
    with pytest.raises(UserError, match=r"expected to map its 120 files, got a limit of 50 .* `ulimit -Hn \d+`"):
        write_store(tmp_path, [[[3 + i]] for i in range(60)])


def test_large_vocabularies_take_four_bytes(tmp_path):
    assert (dtype_for(2**16), dtype_for(2**16 + 1)) == ("<u2", "<u4")
    assert write_store(tmp_path, [[[2**17]]], dtype="<u4").read(0, 3).tolist() == [1, 2**17, 1]


def test_files_are_little_endian_and_flat(tmp_path):
    write_store(tmp_path, SHARDS)
    assert np.fromfile(tmp_path / "tokens-00000.bin", "<u2").tolist() == FLAT[:7]
    assert np.fromfile(tmp_path / "docs-00000.u64", "<u8").tolist() == [1, 5, 7]
    assert (tmp_path / "tokens-00001.bin").stat().st_size == 0


def test_fingerprint_follows_the_content(tmp_path):
    a, b = write_store(tmp_path / "a", SHARDS), write_store(tmp_path / "b", SHARDS)
    c = write_store(tmp_path / "c", [[[5, 6, 8], [8]], *SHARDS[1:]])
    assert a.fingerprint == b.fingerprint != c.fingerprint


def test_an_unfinished_shard_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, 0, "<u2") as writer:
        writer.add([5], 1)
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_refuses_missing_cut_and_damaged_files(tmp_path):
    store = random_store(tmp_path, 600)
    store.verify()
    tokens = tmp_path / "tokens-00001.bin"
    content = tokens.read_bytes()
    tokens.write_bytes(content[:-2])
    with pytest.raises(
        ValueError, match=rf"tokens-00001.bin: expected {len(content)} bytes, got {len(content) - 2}; .*--force"
    ):
        Store(tmp_path)
    tokens.unlink()
    with pytest.raises(ValueError, match="tokens-00001.bin: expected .* got nothing there"):
        Store(tmp_path)
    tokens.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ValueError, match="tokens-00001.bin: expected sha256 .* damaged"):
        Store(tmp_path).verify()


def test_refuses_other_versions_and_no_meta(tmp_path):
    with pytest.raises(ValueError, match="expected a prepared store with meta.json, got none; run `lm prepare`"):
        Store(tmp_path)
    random_store(tmp_path, 60)
    meta = json.loads((tmp_path / "meta.json").read_text())
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"version": 0}))
    with pytest.raises(ValueError, match="meta.json: expected store version 1, got 0"):
        Store(tmp_path)
    for bad in ("{", "[]", json.dumps(meta | {"more": 1})):
        (tmp_path / "meta.json").write_text(bad)
        with pytest.raises(ValueError, match="meta.json: expected the meta.json of a store"):
            Store(tmp_path)


def test_refuses_reads_outside(tmp_path):
    store = random_store(tmp_path, 60)
    for start, stop in ((-1, 3), (0, store.n_tokens + 1), (5, 4)):
        with pytest.raises(ValueError, match="expected a range within"):
            store.read(start, stop)
    with pytest.raises(ValueError, match="expected a document below"):
        store.document(store.n_documents)
