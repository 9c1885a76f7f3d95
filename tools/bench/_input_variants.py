"""What tools/bench/input.py measures: the parts of our pipeline, and peers on the same tokens.

Every variant is an iterator without end of batches of `batch_size` rows of `seq_len` tokens, in random order, as int32
(nanoGPT: int64, as it has them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from _input_stores import NEWLINE_ID, VOCAB, write_random

from lm.data import Store, Stream
from lm.data.loader.reader import HostReader, identity
from lm.data.loader.tfdata import GROUP, host_batches
from lm.data.store.tokens import tokens_name
from lm.objectives import UL2, Denoising, FillInTheMiddle, MaskedLM, PrefixLM, SpanCorruption, UL2Decoder

MIXTURE = {"a": 0.5, "b": 0.3, "c": 0.2}
SPANS = dict(first_sentinel_id=VOCAB + 299, n_sentinels=300)
MODES = dict(r_id=VOCAB + 300, s_id=VOCAB + 301, x_id=VOCAB + 302)
OBJECTIVES = {
    "masked LM": MaskedLM(mask_id=VOCAB, cls_id=VOCAB + 1, sep_id=VOCAB + 2, vocab_size=VOCAB),
    "masked LM, 3-grams": MaskedLM(mask_id=VOCAB, cls_id=VOCAB + 1, sep_id=VOCAB + 2, vocab_size=VOCAB, span=3),
    "span corruption": SpanCorruption(**SPANS),
    "prefix LM": PrefixLM(),
    "fill in the middle": FillInTheMiddle(prefix_id=VOCAB, suffix_id=VOCAB + 1, middle_id=VOCAB + 2),
    "UL2": UL2(**SPANS, **MODES),
    "UL2, decoder": UL2Decoder(**SPANS, **MODES),
    "denoising": Denoising(mask_id=VOCAB, newline_id=NEWLINE_ID),
}


class Corpus(NamedTuple):
    """The same number of tokens in one source of a file, and in three sources of `n_shards` files each."""

    folder: Path
    one: Store
    three: dict[str, Store]
    batch_size: int
    seq_len: int

    @classmethod
    def write(cls, folder: Path, *, n_tokens: int, n_shards: int, batch_size: int, seq_len: int) -> Corpus:
        one = write_random(folder / "one", n_tokens, 1, seed=0)
        three = {name: write_random(folder / name, n_tokens // 3, n_shards, seed=1) for name in MIXTURE}
        return cls(folder, one, three, batch_size, seq_len)

    @property
    def tokens(self) -> Path:
        return self.one.path / tokens_name(0)

    def rows(self) -> np.ndarray:
        """All of the one source as rows uint16 [n,seq_len], in memory only as far as they are read."""
        tokens = np.memmap(self.tokens, "<u2", mode="r")
        n = len(tokens) // self.seq_len
        return tokens[: n * self.seq_len].reshape(n, self.seq_len)


class Variant(NamedTuple):
    """needs: packages to install. workers: whether it starts processes."""

    name: str
    make: Callable[[Corpus], Iterator[Any]]
    needs: tuple[str, ...] = ()
    workers: bool = False


def variants(n_shards: int) -> list[Variant]:
    mixture = f"3 x {n_shards} shards"
    ours = [
        Variant("lm: rows as numpy, 1 source", lambda c: numpy_rows(c, one(c))),
        Variant(f"lm: rows as numpy, {mixture}", lambda c: numpy_rows(c, three(c))),
        Variant("lm: causal LM, 1 source", lambda c: batches(c, one(c))),
        Variant(f"lm: causal LM, {mixture}", lambda c: batches(c, three(c))),
        Variant("lm: causal LM, best-fit packing", lambda c: batches(c, one(c, packing="best_fit"))),
        Variant("lm: inputs and targets cut on the host", lambda c: batches(c, one(c), shifted)),
        *(
            Variant(f"lm: {name}", lambda c, examples=objective.examples: batches(c, one(c), examples))
            for name, objective in OBJECTIVES.items()
        ),
    ]
    grain = ("grain", "array-record")
    peers = [
        Variant("nanoGPT: memmap sampling", nanogpt),
        Variant("grain: ArrayRecord, 16 threads", grain_array_record, grain),
        Variant("grain: ArrayRecord, 2 processes", grain_array_record_processes, (*grain, "psutil"), workers=True),
        Variant("grain: memmap, a row an element", grain_rows, ("grain",)),
        Variant("grain: memmap, a batch an element", grain_batches, ("grain",)),
        Variant("datasets: Arrow, rows by index", hugging_face, ("datasets",)),
    ]
    return ours + peers


# --- ours -------------------------------------------------------------------------------------------------------------


def one(c: Corpus, **kw: Any) -> Stream:
    return Stream({"one": c.one}, weights=None, seq_len=c.seq_len, seed=0, **kw)


def three(c: Corpus) -> Stream:
    return Stream(c.three, weights=MIXTURE, seq_len=c.seq_len, seed=0)


def reader(c: Corpus, stream: Stream, examples: Callable = identity) -> HostReader:
    return HostReader(stream, np.arange(c.batch_size), batch_size=c.batch_size, start=0, examples=examples)


def numpy_rows(c: Corpus, stream: Stream) -> Iterator[Any]:
    """Without tf.data, as many batches at once as it hands over."""
    read, step = reader(c, stream), 0
    while True:
        yield from read.batches(step, GROUP)
        step += GROUP


def batches(c: Corpus, stream: Stream, examples: Callable = identity) -> Iterator[Any]:
    """What a host does before the transfer to its devices."""
    return host_batches(reader(c, stream, examples), prefetch=2)


def shifted(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """As most peers have them; ours sends the tokens once and cuts them on the device."""
    return {"inputs": batch["tokens"][:, :-1], "targets": batch["tokens"][:, 1:]}


# --- peers ------------------------------------------------------------------------------------------------------------


def nanogpt(c: Corpus) -> Iterator[Any]:
    """get_batch of karpathy/nanoGPT train.py, less torch: int64 inputs and targets by one slice a row."""
    rng, t = np.random.default_rng(0), c.seq_len
    while True:
        data = np.memmap(c.tokens, dtype=np.uint16, mode="r")
        at = rng.integers(0, len(data) - t, c.batch_size)
        x = np.stack([data[i : i + t].astype(np.int64) for i in at])
        y = np.stack([data[i + 1 : i + 1 + t].astype(np.int64) for i in at])
        yield x, y


class Rows:
    """Random access to rows, for grain."""

    def __init__(self, path: Path, seq_len: int):
        self._tokens, self._seq_len = np.asarray(np.memmap(path, "<u2", mode="r")), seq_len

    def __len__(self) -> int:
        return (len(self._tokens) - 1) // self._seq_len

    def __getitem__(self, i: int) -> np.ndarray:
        return self._tokens[i * self._seq_len : (i + 1) * self._seq_len + 1].astype(np.int32)


class Batches:
    """The same by batches of rows that are shuffled once."""

    def __init__(self, rows: np.ndarray, batch_size: int):
        self._rows, self._batch_size = np.asarray(rows), batch_size
        self._order = np.random.default_rng(0).permutation(len(rows))

    def __len__(self) -> int:
        return len(self._rows) // self._batch_size

    def __getitem__(self, i: int) -> np.ndarray:
        return self._rows[self._order[i * self._batch_size : (i + 1) * self._batch_size]].astype(np.int32)


def decode(record: bytes) -> np.ndarray:
    return np.frombuffer(record, "<u2").astype(np.int32)


def grain_rows(c: Corpus) -> Iterator[Any]:
    return _threads(_shuffled(Rows(c.tokens, c.seq_len)).batch(c.batch_size))


def grain_batches(c: Corpus) -> Iterator[Any]:
    return _threads(_shuffled(Batches(c.rows(), c.batch_size)))


def grain_array_record(c: Corpus) -> Iterator[Any]:
    return _threads(_records(c))


def grain_array_record_processes(c: Corpus) -> Iterator[Any]:
    import grain
    from absl import flags

    flags.FLAGS.mark_as_parsed()  # grain reads its flags in the workers, and programs without absl.app have none parsed
    options = grain.MultiprocessingOptions(num_workers=2, per_worker_buffer_size=2)
    return iter(_records(c).to_iter_dataset(_read_options(4)).mp_prefetch(options))


def _records(c: Corpus):
    """A record is a row of uint16."""
    import grain
    from array_record.python.array_record_module import ArrayRecordWriter

    path = c.folder / "rows.array_record"
    if not path.exists():
        writer = ArrayRecordWriter(str(path), "group_size:1")  # as its documentation says for random access
        for row in c.rows():
            writer.write(row.tobytes())
        writer.close()
    return _shuffled(grain.sources.ArrayRecordDataSource(str(path))).map(decode).batch(c.batch_size)


def _shuffled(source):
    import grain

    return grain.MapDataset.source(source).shuffle(seed=0).repeat()


def _threads(dataset) -> Iterator[Any]:
    return iter(dataset.to_iter_dataset(_read_options(16)))


def _read_options(n_threads: int):
    """16 threads is grain's default. Its buffer of 500 elements holds minutes of batches: here as many as threads."""
    import grain

    return grain.ReadOptions(num_threads=n_threads, prefetch_buffer_size=n_threads)


def hugging_face(c: Corpus) -> Iterator[Any]:
    """Rows of int32 in Arrow files on the disk, a list of random indices a batch."""
    import datasets
    import pyarrow as pa

    path = c.folder / "arrow"
    if not path.exists():
        features = datasets.Features({"tokens": datasets.List(datasets.Value("int32"), length=c.seq_len)})
        rows = c.rows()
        flat = pa.array(rows.reshape(-1).astype(np.int32))
        table = pa.table({"tokens": pa.FixedSizeListArray.from_arrays(flat, c.seq_len)})
        datasets.disable_progress_bars()
        datasets.Dataset(datasets.table.InMemoryTable(table)).cast(features).save_to_disk(str(path))
    dataset = datasets.load_from_disk(str(path)).with_format("numpy")
    rng = np.random.default_rng(0)
    while True:
        yield dataset[rng.integers(0, len(dataset), c.batch_size).tolist()]["tokens"]
