"""Raw text to batches: sources, tokenizer, token stores, and the stream of rows. Importing this loads no framework;
`lm.data.loader` is the part that needs JAX and tf.data."""

from lm.data.config import Data
from lm.data.corpus import Corpus, open_corpus
from lm.data.documents.filters import C4, Filter, Gopher, GopherRepetition, Length, Without
from lm.data.documents.near_duplicates import NearDuplicates
from lm.data.documents.overlap import Overlap
from lm.data.prepare.passes import prepare
from lm.data.sources.base import Source
from lm.data.sources.columns import Arrow, HFDataset, Parquet
from lm.data.sources.python import Docstrings, Stdlib
from lm.data.sources.text import Jsonl, Text
from lm.data.sources.tfds import Tfds
from lm.data.store.tokens import Store
from lm.data.stream.batches import BatchPhase, BatchSchedule
from lm.data.stream.exclude import Exclude, ExcludeDocuments, ExcludeExamples
from lm.data.stream.mixture import Phase
from lm.data.stream.stream import Stream
from lm.data.tokenizer.base import NO_PAD, Tokenizer
from lm.data.tokenizer.sentencepiece import SentencePiece, SentencePieceTokenizer
from lm.renamed import renamed_names

__all__ = [
    "Arrow",
    "BatchPhase",
    "BatchSchedule",
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
    "SentencePiece",
    "SentencePieceTokenizer",
    "Source",
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

__getattr__ = renamed_names(
    __name__,
    {
        "Ramp": "BatchSchedule",
        "Stage": "BatchPhase",
    },
)
