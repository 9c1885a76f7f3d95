"""Filters of documents: each a pure function of one text. A new one is one subclass of `Filter`.

They are heuristics for web pages in English unless they say otherwise; none is on by default. `C4` cleans lines, the
others keep a text as it is or leave it out; every document left out is counted under the rule that did it.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

import numpy as np

from lm.data.documents.ngrams import ngram_hashes, splitmix64
from lm.errors import UserError


class Verdict(NamedTuple):
    """What a filter says. text: what is kept of the document. reason: the rule that leaves it out, None where it
    stays."""

    text: str
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class Filter:
    """Base of all filters. rewrites: whether it may change the text of a document that it keeps."""

    rewrites: ClassVar[bool] = False

    def apply(self, text: str) -> Verdict:
        raise NotImplementedError

    def files(self) -> tuple[str, ...]:
        """Names the files that it reads: the corpus depends on their content."""
        return ()


@dataclass(frozen=True, kw_only=True)
class Length(Filter):
    """Leaves out documents of fewer than `min_chars` or more than `max_chars` characters."""

    min_chars: int = 0
    max_chars: int | None = None

    def __post_init__(self):
        if not 0 <= self.min_chars <= (self.min_chars if self.max_chars is None else self.max_chars):
            raise UserError(f"Length: expected 0 <= min_chars <= max_chars, got {self.min_chars} and {self.max_chars}")

    def apply(self, text: str) -> Verdict:
        if len(text) < self.min_chars:
            return Verdict(text, "length.short")
        return Verdict(text, "length.long" if self.max_chars is not None and len(text) > self.max_chars else None)


@dataclass(frozen=True, kw_only=True)
class Without(Filter):
    """Leaves out the documents that hold any of `texts`; NUL, which no text has, by default."""

    texts: tuple[str, ...] = ("\0",)

    def __post_init__(self):
        if not self.texts or "" in self.texts:
            raise UserError(f"Without.texts: expected some characters each, got {self.texts!r}; every text holds ''")

    def apply(self, text: str) -> Verdict:
        return Verdict(text, "without" if any(t in text for t in self.texts) else None)


@dataclass(frozen=True, kw_only=True)
class C4(Filter):
    """Raffel et al. 2020 (arXiv:1910.10683), section 2.2. Keeps the lines that end in a terminal mark, have
    `min_words_per_line` words, name no Javascript and are no policy notice; citation marks go. Leaves out documents
    with "lorem ipsum", a curly bracket, a word of `bad_words` (path of a file, one a line), or then fewer than
    `min_sentences` sentences.

    As the paper's code does, an ellipsis is no terminal mark. Its language test and its removal of repeated
    three-sentence spans are no part of this, and sentences are counted by their marks, where it uses NLTK.
    """

    rewrites: ClassVar[bool] = True

    terminal: tuple[str, ...] = (".", "?", "!", '"', "”", "。", "？", "！", "؟", "।")  # the paper has the first four
    min_words_per_line: int = 5
    min_sentences: int = 3
    bad_words: str | None = None

    def files(self) -> tuple[str, ...]:
        return () if self.bad_words is None else (self.bad_words,)

    def apply(self, text: str) -> Verdict:
        lower = text.lower()
        if "lorem ipsum" in lower:
            return Verdict("", "c4.lorem_ipsum")
        if "{" in text:
            return Verdict("", "c4.curly_bracket")
        if self.bad_words is not None and _bad_words(self.bad_words).search(lower):
            return Verdict("", "c4.bad_word")
        kept = [line for line in map(self._clean, text.splitlines()) if line is not None]
        if sum(max(1, len(SENTENCE_END.findall(line))) for line in kept) < self.min_sentences:
            return Verdict("", "c4.sentences")
        return Verdict("\n".join(kept))

    def _clean(self, line: str) -> str | None:
        line = CITATION.sub("", line.strip()).rstrip()
        lower = line.lower()
        if not line.endswith(self.terminal) or line.endswith("...") or len(line.split()) < self.min_words_per_line:
            return None
        return None if any(notice in lower for notice in NOTICES) else line


CITATION = re.compile(r"\[(?:\d+|edit|citation needed)\]")  # Wikipedia's marks, as in the C4 code
SENTENCE_END = re.compile(r"[.?!؟।]+[\"'”’)\]]*(?=\s|$)|[。？！]+")
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]")  # Thai to Han
NOTICES = (  # javascript and the C4 code's phrases of policies
    "javascript",
    "terms of use",
    "privacy policy",
    "cookie policy",
    "uses cookies",
    "use of cookies",
    "use cookies",
)


@functools.lru_cache(maxsize=4)
def _bad_words(path: str) -> re.Pattern[str]:
    """Compiles a match of the listed words and phrases: as whole words, and in scripts without spaces anywhere."""
    if not Path(path).is_file():
        raise UserError(f"C4.bad_words: expected a file with a word a line, got nothing at {path}; fetch or drop it")
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # a byte order mark is no part of the first word
    except UnicodeDecodeError as e:
        raise UserError(f"C4.bad_words: expected UTF-8, got {e} in {path}; convert it") from None
    listed = sorted({w.strip().lower() for w in text.splitlines()} - {""})
    if not listed:
        raise UserError(f"C4.bad_words: expected a word a line, got none in {path}; fetch or drop it")
    spaced = [re.escape(w) for w in listed if not UNSPACED.search(w)]
    other = [re.escape(w) for w in listed if UNSPACED.search(w)]
    # `\b` would not do: a listed word may begin or end with a mark.
    return re.compile("|".join(([rf"(?<!\w)(?:{'|'.join(spaced)})(?!\w)"] if spaced else []) + other))


STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")


@dataclass(frozen=True, kw_only=True)
class Gopher(Filter):
    """Quality rules of Rae et al. 2021 (arXiv:2112.11446), A1.1. Words are what spaces part.

    max_symbols: hashes, and ellipses, to a word. max_bullets, max_ellipses: share of lines that begin with a bullet,
    that end in an ellipsis. min_alphabetic: share of words with a letter of any script. min_stop_words: how many of
    `stop_words` have to occur; English as in the paper, so give others, or 0, for another language.
    """

    min_words: int = 50
    max_words: int = 100_000
    min_word_length: float = 3.0
    max_word_length: float = 10.0
    max_symbols: float = 0.1
    max_bullets: float = 0.9
    max_ellipses: float = 0.3
    min_alphabetic: float = 0.8
    min_stop_words: int = 2
    stop_words: tuple[str, ...] = STOP_WORDS

    def apply(self, text: str) -> Verdict:
        return Verdict(text, self._reason(text))

    def _reason(self, text: str) -> str | None:
        words = text.split()
        n = len(words)
        if not max(1, self.min_words) <= n <= self.max_words:  # at least 1: shares are of the words
            return "gopher.words"
        if not self.min_word_length <= sum(map(len, words)) / n <= self.max_word_length:
            return "gopher.word_length"
        if text.count("#") / n > self.max_symbols or (text.count("...") + text.count("…")) / n > self.max_symbols:
            return "gopher.symbols"
        lines = [line for line in map(str.strip, text.splitlines()) if line]
        if sum(line.startswith(BULLETS) for line in lines) / len(lines) > self.max_bullets:
            return "gopher.bullets"
        if sum(line.endswith(("...", "…")) for line in lines) / len(lines) > self.max_ellipses:
            return "gopher.ellipses"
        if sum(any(map(str.isalpha, word)) for word in words) / n < self.min_alphabetic:
            return "gopher.alphabetic"
        if len(set(self.stop_words).intersection(word.lower().strip(EDGES) for word in words)) < self.min_stop_words:
            return "gopher.stop_words"
        return None


BULLETS = ("•", "●", "○", "■", "□", "▪", "▫", "‣", "⁃", "*", "-", "–")
EDGES = ".,;:!?\"'()[]“”‘’"


@dataclass(frozen=True, kw_only=True)
class GopherRepetition(Filter):
    """Repetition rules of Rae et al. 2021 (arXiv:2112.11446), table A1; the same in any language that parts words.

    lines, paragraphs: share that repeats an earlier one, in number and in characters. top: for n = 2, 3, 4, the share
    of characters in the n-gram of words that occurs most often (of several the longest), where it repeats. repeated:
    for n = 5 to 10, the share in n-grams that occur more than once, each character counted once.
    """

    lines: float = 0.30
    line_chars: float = 0.20
    paragraphs: float = 0.30
    paragraph_chars: float = 0.20
    top: tuple[float, ...] = (0.20, 0.18, 0.16)
    repeated: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.10)

    def apply(self, text: str) -> Verdict:
        return Verdict(text, self._reason(text))

    def _reason(self, text: str) -> str | None:
        for pieces, most, most_chars, rule in (
            ([p for p in text.split("\n") if p.strip()], self.lines, self.line_chars, "lines"),
            ([p for p in re.split(r"\n{2,}", text) if p.strip()], self.paragraphs, self.paragraph_chars, "paragraphs"),
        ):
            again = [piece for piece, n in Counter(pieces).items() for _ in range(n - 1)]
            if len(again) > most * len(pieces) or sum(map(len, again)) > most_chars * sum(map(len, pieces)):
                return f"gopher_repetition.{rule}"
        known: dict[str, int] = {}
        words = text.split()
        ids = np.fromiter((known.setdefault(w, len(known)) for w in words), np.uint64, len(words))
        ends = np.cumsum([0, *map(len, words)])  # in characters, spaces left out
        for n, most in enumerate((*self.top, *self.repeated), 2):
            top = n < 2 + len(self.top)
            if (_top_chars if top else _repeated_chars)(splitmix64(ids), ends, n) > most * ends[-1]:
                return f"gopher_repetition.{'top' if top else 'repeated'}_{n}gram"
        return None


def _top_chars(ids: np.ndarray, ends: np.ndarray, n: int) -> int:
    """Counts the characters in all occurrences of the most frequent n-gram; 0 where none repeats."""
    counts, lengths = _occurrences(ids, n), ends[n:] - ends[:-n]
    most = int(counts.max(initial=0))
    return most * int(lengths[counts == most].max()) if most > 1 else 0


def _repeated_chars(ids: np.ndarray, ends: np.ndarray, n: int) -> int:
    """Counts the characters in n-grams that occur more than once, overlaps counted once."""
    at = np.flatnonzero(_occurrences(ids, n) > 1)
    steps = np.bincount(at, minlength=len(ends)) - np.bincount(at + n, minlength=len(ends))
    return int(np.diff(ends)[np.cumsum(steps)[:-1] > 0].sum())


def _occurrences(ids: np.ndarray, n: int) -> np.ndarray:
    """Counts how often the n-gram that begins at each word occurs."""
    _, which, counts = np.unique(ngram_hashes(ids, n), return_inverse=True, return_counts=True)
    return counts[which]
