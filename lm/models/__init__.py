"""Model families: one file each, a config and the function that composes its parts from `lm.nn`."""

from lm.models.albert import Albert
from lm.models.bart import Bart, MBart
from lm.models.base import Architecture, Model, Output
from lm.models.bert import Bert
from lm.models.electra import Electra, GeneratorSize
from lm.models.gemma import Gemma, Gemma2, Gemma3
from lm.models.gpt2 import GPT2
from lm.models.gpt_neo import GPTNeo
from lm.models.gpt_neox import GPTNeoX
from lm.models.llama import Llama
from lm.models.mistral import Mistral
from lm.models.mixtral import Mixtral
from lm.models.opt import OPT
from lm.models.qwen import Qwen2, Qwen3, Qwen3Moe
from lm.models.roberta import Roberta
from lm.models.t5 import T5
from lm.models.tasks import (
    Body,
    LanguageModeling,
    MaskedLMAndPair,
    MaskedLMAndReplaced,
    QuestionAnswering,
    SequenceClassification,
    Task,
    TokenClassification,
)
from lm.models.transformer import Transformer
from lm.nn.compute import Compute
from lm.renamed import renamed_names

__all__ = [
    "GPT2",
    "OPT",
    "T5",
    "Albert",
    "Architecture",
    "Bart",
    "Bert",
    "Body",
    "Compute",
    "Electra",
    "GPTNeo",
    "GPTNeoX",
    "Gemma",
    "Gemma2",
    "Gemma3",
    "GeneratorSize",
    "LanguageModeling",
    "Llama",
    "MBart",
    "MaskedLMAndPair",
    "MaskedLMAndReplaced",
    "Mistral",
    "Mixtral",
    "Model",
    "Output",
    "QuestionAnswering",
    "Qwen2",
    "Qwen3",
    "Qwen3Moe",
    "Roberta",
    "SequenceClassification",
    "Task",
    "TokenClassification",
    "Transformer",
]

__getattr__ = renamed_names(
    __name__,
    {
        "Family": "Architecture",
        "SequenceLabels": "SequenceClassification",
        "Spans": "QuestionAnswering",
        "TokenLabels": "TokenClassification",
        "Words": "LanguageModeling",
        "WordsAndPair": "MaskedLMAndPair",
        "WordsAndReplaced": "MaskedLMAndReplaced",
    },
)
