"""RoBERTa on disk."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from lm.hf.families.bert import (
    base_sizes,
    common,
    common_fields,
    embeddings,
    layers,
    linear,
    modern,
    word_aliases,
    word_head,
    word_unused,
)
from lm.hf.families.family import Family
from lm.hf.families.fields import Fields
from lm.hf.families.table import Map
from lm.models import (
    Body,
    LanguageModeling,
    QuestionAnswering,
    Roberta,
    SequenceClassification,
    Task,
    TokenClassification,
)

EMBED, DECODER, BIAS = "roberta.embeddings.word_embeddings.weight", "lm_head.decoder", "lm_head.bias"


def read(f: Fields, task: Task) -> Roberta:
    return Roberta(
        **common(f, task, pad_id=1),
        **base_sizes(f),
        vocab_size=f.take("vocab_size", default=50265),
        tied=f.tied(f"{DECODER}.weight", EMBED, default=True),
    )


def write(m: Roberta) -> dict[str, Any]:
    return common_fields(m) | {"classifier_dropout": m.classifier_dropout}


def table(m: Roberta) -> list[Map]:
    rows = embeddings("roberta.embeddings.") + layers("roberta.encoder.layer.{}.")
    if m.task == Body(pooler=True):
        rows += linear("pooler.dense", "roberta.pooler.dense")
    match m.task:
        case LanguageModeling():
            rows += word_head(m, "lm_head.dense", "lm_head.layer_norm", DECODER, BIAS)
        case SequenceClassification():
            rows += linear("labeler.dense", "classifier.dense") + linear("labeler.out", "classifier.out_proj")
        case TokenClassification():
            rows += linear("labeler.out", "classifier")
        case QuestionAnswering():
            rows += linear("labeler.out", "qa_outputs")
    return rows


def by_ids(ids: jax.Array, mask: jax.Array, model: Roberta) -> jax.Array:
    """Counts the tokens that are no padding by their id, whatever the mask says; -1 for those that are."""
    real = (ids != model.pad_id).astype(jnp.int32)
    return jnp.cumsum(real, axis=1) * real - 1


ROBERTA_FAMILY = Family(
    model_types=("roberta",),
    classes={
        "RobertaModel": "Model",
        "RobertaForMaskedLM": "ForMaskedLM",
        "RobertaForSequenceClassification": "ForSequenceClassification",
        "RobertaForTokenClassification": "ForTokenClassification",
        "RobertaForQuestionAnswering": "ForQuestionAnswering",
    },
    read=read,
    write=write,
    table=table,
    aliases=lambda m: word_aliases(m, EMBED, DECODER, BIAS),
    rename=lambda name: modern(name, "roberta"),
    ignore=(r"roberta\.embeddings\.position_ids",),
    unused=lambda m: word_unused(m, BIAS),
    # The published files have a pooler that no class of a task reads.
    spare=lambda m: () if m.task == Body(pooler=True) else ("roberta.pooler.dense.weight", "roberta.pooler.dense.bias"),
    prefix="roberta.",
    positions=by_ids,
    given_positions=lambda positions, m: positions - m.first_position,  # theirs are rows of the table
)
