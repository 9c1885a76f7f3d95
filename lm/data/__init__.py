"""Raw text to batches: sources, tokenizer, token stores, and the stream of rows. Importing this loads no framework;
`lm.data.loader` is the part that needs JAX and tf.data."""

from lm.data.arrow import Arrow, HFDataset, Parquet
from lm.data.corpus import Corpus, Data, open_corpus
from lm.data.dedup import NearDuplicates
from lm.data.exclude import Exclude, ExcludeDocuments, ExcludeExamples
from lm.data.filters import C4, Filter, Gopher, GopherRepetition, Length, Without
from lm.data.overlap import Overlap
from lm.data.prepare import prepare
from lm.data.ramp import Ramp, Stage
from lm.data.schedule import Phase
from lm.data.sources import Docstrings, Jsonl, Source, Stdlib, Text, Tfds
from lm.data.store import Store
from lm.data.stream import Stream
from lm.data.tokenizer import NO_PAD, SentencePiece, SentencePieceTokenizer, Tokenizer

__all__ = [
    "Arrow",
    "C4",
    "Corpus",
    "Data",
    "Docstrings",
    "Exclude",
    "ExcludeDocuments",
    "ExcludeExamples",
    "Filter",
    "Gopher",
    "GopherRepetition",
    "HFDataset",
    "Jsonl",
    "Length",
    "NO_PAD",
    "NearDuplicates",
    "Overlap",
    "Parquet",
    "Phase",
    "Ramp",
    "SentencePiece",
    "SentencePieceTokenizer",
    "Source",
    "Stage",
    "Stdlib",
    "Store",
    "Stream",
    "Text",
    "Tfds",
    "Tokenizer",
    "Without",
    "open_corpus",
    "prepare",
]
