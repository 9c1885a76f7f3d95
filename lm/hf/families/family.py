"""What the checking face and the command line know of a family: its classes, its config both ways, its table."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm.hf.families.fields import Fields
from lm.hf.families.table import Alias, Map
from lm.models import (
    Body,
    LanguageModeling,
    MaskedLMAndPair,
    Model,
    QuestionAnswering,
    SequenceClassification,
    Task,
    TokenClassification,
)

# The end of a class name says what it predicts.
TASKS: dict[str, type[Task]] = {
    "LMHeadModel": LanguageModeling,
    "ForCausalLM": LanguageModeling,
    "ForMaskedLM": LanguageModeling,
    "ForConditionalGeneration": LanguageModeling,
    "MTModel": LanguageModeling,
    "ForPreTraining": MaskedLMAndPair,
    "ForSequenceClassification": SequenceClassification,
    "ForTokenClassification": TokenClassification,
    "ForQuestionAnswering": QuestionAnswering,
    "Model": Body,
    "EncoderModel": Body,
}


def by_index(ids: jax.Array, mask: jax.Array, model: Model) -> jax.Array:
    """Counts 0, 1, 2 ..., whatever is padding."""
    return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)


def by_mask(ids: jax.Array, mask: jax.Array, model: Model) -> jax.Array:
    """Counts the tokens that the mask lets through; -1 before the first (OPT)."""
    return jnp.cumsum(mask, axis=1) * mask - 1


@dataclasses.dataclass(frozen=True)
class Family:
    """One model_type, or several that differ in name only.

    classes: class name in `architectures` -> the end of it that says the task (a key of `TASKS`).
    read: (fields of config.json, task) -> the model config; what it does not take from the fields is refused.
    write: the model config -> the fields of config.json in the spelling of transformers 5 that are the family's own.
    table, aliases: of a model config. rename: an older spelling of a tensor name -> today's. ignore: names of stored
        tensors that are computed anew (buffers), as regular expressions that match in full, after `rename`.
    other_tables: layouts that are read besides `table`, which alone is written.
    positions: of tokens for which none are given, from ids int [B,S], mask bool [B,S] and the model; given_positions:
        from `position_ids` and the model, where ours count from another place. shifts_inputs: without labels, the
        decoder reads the encoder's ids, shifted; wraps_last: behind the last of them instead of a start token.
    unused: tensors that the class stores and never reads (name -> shape): carried along as they are.
    prefix: of the names of tensors, which the class without a head leaves out (BertModel).
    spare: tensors that published files have besides those of the class that their config.json names, as parts of the
        model that was pre-trained: left out.
    """

    model_types: tuple[str, ...]
    classes: Mapping[str, str]
    read: Callable[[Fields, Task], Model]
    write: Callable[[Any], dict[str, Any]]
    table: Callable[[Any], list[Map]]
    other_tables: Sequence[Callable[[Any], list[Map]]] = ()
    aliases: Callable[[Any], Sequence[Alias]] = lambda model: ()
    rename: Callable[[str], str] = lambda name: name
    ignore: tuple[str, ...] = ()
    unused: Callable[[Any], Mapping[str, tuple[int, ...]]] = lambda model: {}
    spare: Callable[[Any], Collection[str]] = lambda model: ()
    positions: Callable[[jax.Array, jax.Array, Any], jax.Array] = by_index
    given_positions: Callable[[jax.Array, Any], jax.Array] = lambda positions, model: positions
    shifts_inputs: bool = False
    wraps_last: bool = False
    prefix: str = ""
