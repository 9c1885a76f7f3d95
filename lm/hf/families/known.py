"""All families that can be read and written, by model_type and by model config."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm import models
from lm.errors import UserError, did_you_mean
from lm.hf.families.albert import ALBERT_FAMILY
from lm.hf.families.bart import BART_FAMILY, MBART_FAMILY
from lm.hf.families.bert import BERT_FAMILY
from lm.hf.families.family import TASKS, Family
from lm.hf.families.gemma import GEMMA2_FAMILY, GEMMA3_FAMILY, GEMMA_FAMILY
from lm.hf.families.gpt2 import GPT2_FAMILY
from lm.hf.families.gpt_neo import GPT_NEO_FAMILY
from lm.hf.families.gpt_neox import GPT_NEOX_FAMILY
from lm.hf.families.llama import LLAMA_FAMILY
from lm.hf.families.marian import MARIAN_FAMILY
from lm.hf.families.mistral import MISTRAL_FAMILY
from lm.hf.families.moe import MIXTRAL_FAMILY, QWEN3_MOE_FAMILY
from lm.hf.families.opt import OPT_FAMILY
from lm.hf.families.qwen import QWEN2_FAMILY, QWEN3_FAMILY
from lm.hf.families.roberta import ROBERTA_FAMILY
from lm.hf.families.t5 import T5_FAMILY

FAMILIES: dict[type[models.Model], Family] = {
    models.GPT2: GPT2_FAMILY,
    models.GPTNeo: GPT_NEO_FAMILY,
    models.GPTNeoX: GPT_NEOX_FAMILY,
    models.OPT: OPT_FAMILY,
    models.Llama: LLAMA_FAMILY,
    models.Mistral: MISTRAL_FAMILY,
    models.Qwen2: QWEN2_FAMILY,
    models.Qwen3: QWEN3_FAMILY,
    models.Gemma: GEMMA_FAMILY,
    models.Gemma2: GEMMA2_FAMILY,
    models.Gemma3: GEMMA3_FAMILY,
    models.Mixtral: MIXTRAL_FAMILY,
    models.Qwen3Moe: QWEN3_MOE_FAMILY,
    models.Bert: BERT_FAMILY,
    models.Roberta: ROBERTA_FAMILY,
    models.Albert: ALBERT_FAMILY,
    models.Transformer: MARIAN_FAMILY,
    models.T5: T5_FAMILY,
    models.Bart: BART_FAMILY,
    models.MBart: MBART_FAMILY,
}


def of_config(config: Mapping[str, Any], where: str) -> tuple[Family, str]:
    """(family, the end of the class name that says the task) of a config.json."""
    by_type = {t: family for family in FAMILIES.values() for t in family.model_types}
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in by_type:
        known = ", ".join(sorted(by_type))
        guess = did_you_mean(str(kind), by_type)
        raise UserError(f"{where}: model_type: expected one of {known}, got {kind!r}{guess}; others are not supported")
    family = by_type[kind]
    match config.get("architectures"):
        case [str(name)] if name in family.classes:
            return family, family.classes[name]
        case list(names):
            got = ", ".join(map(str, names)) or "none"
        case other:
            got = "none" if other is None else repr(other)
    known, guess = ", ".join(family.classes), did_you_mean(got, family.classes)
    raise UserError(f"{where}: architectures: expected one of {known} for model_type {kind!r}, got {got}{guess}")


def of_model(model: models.Model) -> tuple[Family, str]:
    """(family, class name) that a model config is written as."""
    family = FAMILIES.get(type(model))
    if family is None:
        known = ", ".join(kind.__name__ for kind in FAMILIES)
        raise UserError(f"model: expected one of {known} to export, got {type(model).__name__}")
    for name, ending in family.classes.items():
        if TASKS[ending] is type(model.task):
            return family, name
    raise UserError(f"model.task: transformers has no {type(model).__name__} for {type(model.task).__name__}")
