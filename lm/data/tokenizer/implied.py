"""What the JSON files of a model say of the tokenizer beside them: its class, where its own files name none, and what
ends a text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm.data.tokenizer.huggingface import Beside
from lm.data.tokenizer.specials import parse_json

MODEL_FILES = ("config.json", "generation_config.json")
MODEL_TYPES = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "opt", "codegen", "phi"), "GPT2Tokenizer"),
    **dict.fromkeys(("bart", "roberta", "roberta-prelayernorm", "longformer"), "RobertaTokenizer"),
    **dict.fromkeys(("bert", "distilbert", "electra"), "BertTokenizer"),
    **dict.fromkeys(("t5", "mt5"), "T5Tokenizer"),
    **{"albert": "AlbertTokenizer", "llama": "LlamaTokenizer", "mbart": "MBartTokenizer", "marian": "MarianTokenizer"},
    "xlm-roberta": "XLMRobertaTokenizer",
}
# Of these a tokenizer.json says all: their models have tokenizers of several kinds, and transformers 5 has no class
# for them either.
NO_CLASS = ("llama",)


def implied_class(folder: Path, *, whole: bool) -> str:
    """The class that config.json stands for. whole: there is a tokenizer.json."""
    model = _read(folder, "config.json")
    if name := model.get("tokenizer_class"):
        return name
    kind = model.get("model_type", "")
    return "PreTrainedTokenizerFast" if whole and kind in NO_CLASS else MODEL_TYPES.get(kind, "PreTrainedTokenizerFast")


def beside(folder: Path) -> Beside:
    """What ends a text: the first id of `eos_token_id` in config.json, else in generation_config.json."""
    for file in MODEL_FILES:
        ids = _read(folder, file).get("eos_token_id")
        first = ids[0] if isinstance(ids, list) and ids else ids
        if isinstance(first, int) and first >= 0:
            return Beside(named_only=True, end=first)
    return Beside(named_only=True)


def _read(folder: Path, file: str) -> dict[str, Any]:
    path = folder / file
    return parse_json({file: path.read_bytes()} if path.is_file() else {}, file, str(folder))
