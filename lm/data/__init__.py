"""Raw text to batches: sources, tokenizer, token stores, and the stream of rows. Importing this loads no framework;
`lm.data.loader` is the part that needs JAX and tf.data."""

from lm.data.prepare import Corpus, Data, open_corpus, prepare
from lm.data.sources import Docstrings, Jsonl, Source, Stdlib, Text, Tfds
from lm.data.store import Store
from lm.data.stream import Stream
from lm.data.tokenizer import SentencePiece, Tokenizer

__all__ = [
    "Corpus",
    "Data",
    "Docstrings",
    "Jsonl",
    "SentencePiece",
    "Source",
    "Stdlib",
    "Store",
    "Stream",
    "Text",
    "Tfds",
    "Tokenizer",
    "open_corpus",
    "prepare",
]
