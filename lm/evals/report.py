"""The table that ends an evaluation: a language model beside gzip and xz on the same bytes, others by their loss."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from lm.data import Corpus
from lm.evals.perplexity import Perplexity, compress, total


def print_evaluation(results: Mapping[str, Perplexity], corpus: Corpus, title: str) -> None:
    """Prints a row for each source. gzip and xz compress its whole validation split as one stream."""
    every = total(results)
    compressed = every.bits_per_byte is not None
    table = Table(title=f"validation, {title}", title_justify="left")
    measures: tuple[str, ...] = ("loss", "perplexity", "bits/byte", "gzip -9", "xz -9")
    if not compressed:
        measures = (f"loss per {every.unit}", "perplexity", f"{every.unit}s")
    table.add_column("source", no_wrap=True)
    for column in measures:
        table.add_column(column, justify="right", no_wrap=True)
    rows = dict(results) | ({"total": every} if len(results) > 1 else {})
    texts = {name: validation_text(corpus, name) for name in results} if compressed else {}
    texts["total"] = b"".join(texts.values())
    for name, r in rows.items():
        cells = [name, f"{r.loss:.4f}", f"{r.perplexity:.2f}"] if r.tokens else [name, "-", "-"]
        if compressed:
            c = compress(texts[name])
            cells += [f"{r.bits_per_byte:.4f}", f"{c.gzip:.4f}", f"{c.xz:.4f}"]
        else:
            cells.append(f"{r.tokens:,}")
        table.add_row(*cells)
    Console(highlight=False).print(table)


def validation_text(corpus: Corpus, source: str) -> bytes:
    """The bytes of a source's validation split, from its tokens: the original ones, but for what a tokenizer that is
    not lossless took away."""
    store, tokenizer = corpus.validation[source], corpus.tokenizer
    documents = (store.document(i) for i in range(store.n_documents))
    return b"".join(tokenizer.decode([t for t in d.tolist() if t != tokenizer.eos_id]).encode() for d in documents)
