"""The special tokens of a Hugging Face tokenizer, by the files it came with."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken

from lm.errors import UserError

# In transformers' order: a named token that the vocabulary lacks gets the next id.
ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
_FAIRSEQ = {"bos": "<s>", "eos": "</s>", "unk": "<unk>", "sep": "</s>", "pad": "<pad>", "cls": "<s>", "mask": "<mask>"}
_BERT = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "cls": "[CLS]", "mask": "[MASK]"}
# The names a class gives its special tokens where no file does; a class that is not here names none.
CLASS_ROLES: dict[str, dict[str, str]] = {
    "GPT2Tokenizer": dict.fromkeys(("bos", "eos", "unk"), "<|endoftext|>"),
    "RobertaTokenizer": _FAIRSEQ,
    "BartTokenizer": _FAIRSEQ,
    "XLMRobertaTokenizer": _FAIRSEQ,
    "MBartTokenizer": _FAIRSEQ,
    "BertTokenizer": _BERT,
    "DistilBertTokenizer": _BERT,
    "ElectraTokenizer": _BERT,
    "T5Tokenizer": {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
    "AlbertTokenizer": _BERT | {"bos": "[CLS]", "eos": "[SEP]", "unk": "<unk>", "pad": "<pad>"},
    "LlamaTokenizer": {"bos": "<s>", "eos": "</s>", "unk": "<unk>"},
    "Qwen2Tokenizer": dict.fromkeys(("eos", "unk", "pad"), "<|endoftext|>"),
    "MarianTokenizer": {"eos": "</s>", "unk": "<unk>", "pad": "<pad>"},
}
SPACE = "▁"  # U+2581, SentencePiece's spelling of a space


class Specials(NamedTuple):
    """Who is special. named: role or `x_token` key to token. extra: other special tokens. placed: tokens that have an
    id already. implied: those of `named` that the class alone names, and no file."""

    named: dict[str, AddedToken]
    extra: list[AddedToken]
    placed: dict[int, AddedToken]
    implied: frozenset[str] = frozenset()

    def within(self, has: Callable[[str], bool]) -> Specials:
        """Drops what the class alone names and the vocabulary does not have: a token of that name was never trained."""
        absent = {key for key in self.implied if not has(self.named[key].content)}
        return self._replace(named={key: token for key, token in self.named.items() if key not in absent})

    def missing(self, have: set[str]) -> Iterator[AddedToken]:
        for token in (*self.named.values(), *self.extra):
            if token.content not in have:
                have.add(token.content)
                yield token


def parse_json(files: Mapping[str, bytes], file: str, where: str) -> dict[str, Any]:
    """The object in a JSON file, {} where there is none. UserError when it is no JSON."""
    try:
        tree = json.loads(files.get(file, b"{}"))
    except ValueError as e:
        raise UserError(f"{where}/{file}: expected JSON, got something else ({e}); fetch the file again") from None
    if not isinstance(tree, dict):
        raise UserError(f"{where}/{file}: expected a JSON object, got {type(tree).__name__}; fetch the file again")
    return tree


def class_of(config: Mapping[str, Any]) -> str:
    """tokenizer_class without the `Fast` that transformers 5 dropped."""
    return str(config.get("tokenizer_class") or "PreTrainedTokenizerFast").removesuffix("Fast")


def read_specials(files: Mapping[str, bytes], where: str) -> Specials:
    """Reads who is special, as transformers 5: the class, then tokenizer_config.json; and where that has no
    `added_tokens_decoder`, special_tokens_map.json over it and added_tokens.json."""
    config = parse_json(files, "tokenizer_config.json", where)
    told: dict[str, Any] = dict(config)
    listed = config.get("added_tokens_decoder")  # null where a tool wrote none
    if listed is None:
        told |= parse_json(files, "special_tokens_map.json", where)
    if not isinstance(listed, dict | None):
        raise UserError(
            f"{where}: added_tokens_decoder: expected an object, got {listed!r}; mend tokenizer_config.json"
        )
    placed = {i: _added(t, where) for i, t in _by_id((listed or {}).items(), "tokenizer_config.json", where)}
    # Transformers 5's name, then the older one.
    extra = told.get("extra_special_tokens") or told.get("additional_special_tokens") or []
    if isinstance(extra, dict):
        told, extra = told | extra, []
    if not isinstance(extra, list):
        raise UserError(f"{where}: expected a list of additional_special_tokens, got {extra!r}; mend the JSON")
    defaults = {f"{role}_token": token for role, token in CLASS_ROLES.get(class_of(config), {}).items()}
    named = {key: value for key, value in (defaults | told).items() if key.endswith("_token")}
    named = {key: value for key, value in named.items() if isinstance(value, (str, dict))}
    specials = Specials(
        {key: _added(value, where) for key, value in named.items()},
        [_added(t, where) for t in extra],
        placed,
        frozenset(defaults.keys() & named.keys() - told.keys()),
    )
    special = {t.content for t in (*specials.named.values(), *specials.extra)}
    if listed is None:
        added = parse_json(files, "added_tokens.json", where)
        for i, text in _by_id(((i, text) for text, i in added.items()), "added_tokens.json", where):
            placed[i] = AddedToken(text, special=text in special, normalized=text not in special)
    by_content = {t.content: t for t in placed.values()}
    for key, token in specials.named.items():
        specials.named[key] = by_content.get(token.content, token)
        specials.named[key].special = True
    return specials


def _by_id(tokens: Iterable[tuple[Any, Any]], file: str, where: str) -> Iterator[tuple[int, Any]]:
    """(id, token) with ids as numbers, which JSON writes as text where they are keys."""
    for i, token in tokens:
        if not str(i).isdecimal():
            raise UserError(f"{where}/{file}: {token!r}: expected the id of an added token, got {i!r}; mend the JSON")
        yield int(i), token


def _added(token: Any, where: str) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, special=True)
    if not isinstance(token, dict) or not isinstance(token.get("content"), str):
        raise UserError(f"{where}: expected a special token as text or with 'content', got {token!r}; mend the JSON")
    known = {k: token[k] for k in ("lstrip", "rstrip", "single_word", "normalized") if k in token}
    return AddedToken(token["content"], special=token.get("special", True), **known)


def add_specials(tokenizer: tokenizers.Tokenizer, specials: Specials, where: str) -> None:
    """Adds what the vocabulary lacks. UserError when a token gets another id than the files say."""
    have = {t.content for t in tokenizer.get_added_tokens_decoder().values()}
    tokenizer.add_tokens([token for _, token in sorted(specials.placed.items())])
    have |= {token.content for token in specials.placed.values()}
    order = {f"{role}_token": n for n, role in enumerate(ROLES)}
    named = dict(sorted(specials.named.items(), key=lambda item: order.get(item[0], len(order))))
    tokenizer.add_tokens(list(specials._replace(named=named).missing(have)))
    for i, token in specials.placed.items():
        if (got := tokenizer.token_to_id(token.content)) != i:
            raise UserError(
                f"{where}: expected added token {token.content!r} at id {i}, got {got} from the vocabulary; "
                "take all tokenizer files from one version of the model"
            )


def check_ids(vocab: Mapping[str, int], where: str) -> None:
    """Raises UserError unless the ids are 0 to n-1, each once."""
    if len(missing := set(range(len(vocab))) - set(vocab.values())):
        raise UserError(
            f"{where}: expected {len(vocab)} tokens with ids 0 to {len(vocab) - 1}, got none with id {min(missing)}; "
            "the vocabulary and the added tokens do not belong together, or a line is missing"
        )
