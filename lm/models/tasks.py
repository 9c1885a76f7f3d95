"""What a model's head predicts. A family builds the part that its published checkpoints have for each task."""

from __future__ import annotations

import dataclasses
from typing import Literal

from lm.errors import UserError
from lm.renamed import formerly

Problem = Literal["single_label", "multi_label", "regression"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Base of the tasks."""


@formerly("Words")
@dataclasses.dataclass(frozen=True, kw_only=True)
class LanguageModeling(Task):
    """Tokens: the next one (decoders), those that are masked (encoders), the other text (encoder-decoders)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Body(Task):
    """Nothing: hidden states are what is asked for (BertModel, LlamaModel ... of Hugging Face).

    pooler: of the first token, in encoders that have one. encoder_only: of an encoder-decoder without its decoder.
    """

    pooler: bool = False
    encoder_only: bool = False


@formerly("WordsAndPair")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLMAndPair(Task):
    """Masked tokens, and whether two sentences belong as they stand: next-sentence or sentence-order prediction."""


@formerly("WordsAndReplaced")
@dataclasses.dataclass(frozen=True, kw_only=True)
class MaskedLMAndReplaced(Task):
    """Masked tokens by a generator, and of each token that it fills in or leaves, whether it is the original."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Labels(Task):
    """Base of the tasks with a number of labels."""

    n_labels: int

    def __post_init__(self):
        if self.n_labels < 1:
            raise UserError(f"model.task.n_labels: expected at least 1, got {self.n_labels}")


@formerly("SequenceLabels")
@dataclasses.dataclass(frozen=True, kw_only=True)
class SequenceClassification(Labels):
    """A label, several labels, or numbers for a whole sequence."""

    problem: Problem = "single_label"


@formerly("TokenLabels")
@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenClassification(Labels):
    """A label for every token (entities, parts of speech)."""


@formerly("Spans")
@dataclasses.dataclass(frozen=True, kw_only=True)
class QuestionAnswering(Task):
    """The first and the last token of an answer."""
