"""Makes a tokenizer of the `tokenizers` library read a document as text alone, whatever special tokens it spells.

The library finds special tokens in a text: `encode_special_tokens` stops its own search, but a unigram model has the
specials of its vocabulary, and the pieces of its bytes, as pieces like all others. Those are cut where they are spelt.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence

import tokenizers
from tokenizers import Regex, models, pre_tokenizers

BYTES = [f"<0x{b:02X}>" for b in range(256)]


def read_as_text(tokenizer: tokenizers.Tokenizer, specials: Iterable[str]) -> None:
    """Changes `tokenizer` so that text which spells one of `specials`, or a byte piece, gets the ids of its characters.

    One that is a single character cannot be cut: see `spelt`.
    """
    tokenizer.encode_special_tokens = True
    if found := spelt(tokenizer, [*specials, *BYTES]):
        cut = pre_tokenizers.Split(Regex(_between(found)), "merged_with_previous")
        # After the others: a word that is cut must not get a second space in front.
        steps = [cut] if tokenizer.pre_tokenizer is None else [tokenizer.pre_tokenizer, cut]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)


def spelt(tokenizer: tokenizers.Tokenizer, tokens: Iterable[str]) -> list[str]:
    """Those of `tokens` whose ids come out of a text that spells them. A model cannot make others of any text: a
    neighbour only takes characters away."""
    vocab = tokenizer.get_vocab(with_added_tokens=False)
    own = [token for token in tokens if token in vocab]
    # At the start of a text, within a word, and on a line of its own.
    texts = [[token, f"a{token}", f"\n{token}"] for token in own]
    return [token for token, made in zip(own, texts, strict=True) if vocab[token] in _ids(tokenizer, made)]


def _ids(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> set[int]:
    return {i for text in texts for i in tokenizer.encode(text, add_special_tokens=False).ids}


def _between(tokens: Iterable[str]) -> str:
    """A regular expression for the first character of each token, where the rest of it follows."""
    rests: dict[str, list[str]] = {}
    for token in tokens:
        if len(token) > 1:
            rests.setdefault(token[0], []).append(re.escape(token[1:]))
    return "|".join(f"{re.escape(first)}(?={'|'.join(rest)})" for first, rest in rests.items()) or "(?!)"


def use_one_thread() -> None:
    """Keeps the library to one thread, in a process that encodes one text at a time. Its first batch starts a thread
    for each CPU that the process may use, which such batches leave idle: with a process for each CPU that is the square
    of their number."""
    if not hasattr(os, "sched_setaffinity"):  # not on macOS and Windows
        return
    cpus = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cpus)})
    try:
        tokenizers.Tokenizer(models.BPE()).encode_batch_fast([""])
    finally:
        os.sched_setaffinity(0, cpus)
