"""What a model's head predicts. A family builds the part that its published checkpoints have for each task."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lm.errors import UserError

Problem = Literal["single_label", "multi_label", "regression"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Base of the tasks."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Words(Task):
    """Tokens: the next one (decoders), those that are masked (encoders), the other text (encoder-decoders)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordsAndPair(Task):
    """Masked tokens, and whether two sentences belong as they stand: next-sentence or sentence-order prediction."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordsAndReplaced(Task):
    """Masked tokens by a generator, and of each token that it fills in or leaves, whether it is the original."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels(Task):
    """Base of the tasks with a number of labels."""

    n_labels: int

    def __post_init__(self):
        if self.n_labels < 1:
            raise UserError(f"model.task.n_labels: expected at least 1, got {self.n_labels}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceLabels(Labels):
    """A label, several labels, or numbers for a whole sequence."""

    problem: Problem = "single_label"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLabels(Labels):
    """A label for every token (entities, parts of speech)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spans(Task):
    """The first and the last token of an answer."""
