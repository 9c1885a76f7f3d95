"""RoBERTa (Liu et al., 2019): BERT without the sentence pair; positions are counted from behind the padding id."""

from __future__ import annotations

import dataclasses
from typing import Any

from flax import nnx

from lm.errors import UserError
from lm.models.bert import Bert
from lm.models.tasks import MaskedLMAndPair, SequenceClassification
from lm.nn.activation import ACTIVATIONS, Activation
from lm.nn.heads import DenseHead
from lm.nn.position import LearnedPositions


@dataclasses.dataclass(frozen=True, kw_only=True)
class Roberta(Bert):
    """The base model of the paper by default.

    max_positions: rows of the position table. The first token reads row pad_id + 1, and published checkpoints have
    padding read row pad_id, so a text has at most max_positions - pad_id - 1 tokens.
    pad_id: that of the tokenizer, the objective's `pad_id`; published checkpoints have 1.
    """

    vocab_size: int = 50265
    max_positions: int = 514
    n_types: int = 1
    norm_eps: float = 1e-5
    pad_id: int = 1

    def __post_init__(self):
        super().__post_init__()
        if self.pad_id is None or self.pad_id < 0:
            raise UserError(f"model.pad_id: expected 0 or more, as positions count from it, got {self.pad_id}")
        if self.max_positions <= self.first_position:
            raise UserError(
                f"model.max_positions: expected more than the {self.first_position} rows up to model.pad_id "
                f"{self.pad_id}, got {self.max_positions}; raise it"
            )
        if isinstance(self.task, MaskedLMAndPair):
            raise UserError(
                "model.task: expected LanguageModeling, SequenceClassification, TokenClassification "
                "or QuestionAnswering for Roberta, got MaskedLMAndPair; take "
                "Bert, which has a sentence pair"
            )

    @property
    def max_seq_len(self) -> int:
        return self.max_positions - self.first_position

    @property
    def first_position(self) -> int:
        """The row of the position table that the first token of a text reads."""
        return self.pad_id + 1

    def positions(self, rngs: nnx.Rngs) -> LearnedPositions:
        rows = {"offset": self.first_position, "pad_row": self.pad_id}
        return LearnedPositions(self.max_seq_len, self.d_embed, rngs=rngs, init=self.init, **rows)

    @property
    def word_activation(self) -> Activation:
        return ACTIVATIONS["gelu"]  # as published, whatever that of the layers

    def heads(self, rngs: nnx.Rngs) -> dict[str, Any]:
        if not isinstance(self.task, SequenceClassification):
            return super().heads(rngs)
        n, dropout = self.task.n_labels, self.label_dropout
        return {"labeler": DenseHead(self.d_model, n, rngs=rngs, init=self.init, dropout=dropout)}
