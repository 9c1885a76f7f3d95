"""Special ids of a folder: what its JSON files and its tokenizer say of them is compared when it is imported.

Refused is what a model would be fed and has no row for, and what a tokenizer beside it would make. What cannot hurt is
told: see `checked_ids`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lm.data.tokenizer.huggingface import HFTokenizer
from lm.errors import UserError
from lm.hf.folder import CONFIG, GENERATION_CONFIG, Opened

ROLES = ("bos", "eos", "pad")
FED = ("pad_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id")
OF_DECODER = (*FED[1:], "bos_token_id")  # of an encoder-decoder, the last where it names no start
# Never read by a model, but for a start of the decoder that bos names.
NAMED = ("bos_token_id", "eos_token_id")


class Said(NamedTuple):
    """What a file says of a field: its ids, or that it is null or not there."""

    file: str
    ids: tuple[int, ...]


def checked_ids(opened: Opened, tokenizer: HFTokenizer | None) -> tuple[str, ...]:
    """Compares the ids of config.json, generation_config.json and the tokenizer; returns what to tell, a line each.

    UserError for an id that text or the search of a folder puts before the model and that has no row in its embedding.
    """
    files = {CONFIG: opened.config, GENERATION_CONFIG: opened.generation or {}}
    said = {name: _said(opened.folder, files, name) for name in (*FED, *NAMED)}
    if tokenizer is not None:
        _check_tokenizer(opened, tokenizer)
    named = NAMED if tokenizer is not None else ()  # whoever has a tokenizer means to use them
    start = opened.model.family == "encoder_decoder" and not said["decoder_start_token_id"]
    for name in dict.fromkeys((*FED, *named, *(("bos_token_id",) if start else ()))):
        _check_fed(opened, name, said[name], tokenizer)
    return (*_beyond(opened, said), *_disagreements(opened, said, tokenizer))


def _said(folder: Path, files: Mapping[str, Mapping[str, Any]], name: str) -> list[Said]:
    found = []
    for file, fields in files.items():
        value = fields.get(name)
        ids = value if isinstance(value, list) else [] if value is None else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
            raise UserError(f"{folder / file}: {name}: expected an id or a list of ids, got {value!r}; correct it")
        if ids:
            found.append(Said(file, tuple(ids)))
    return found


def _rows(opened: Opened, name: str) -> int:
    target = getattr(opened.model, "target_vocab_size", None)
    return target if target is not None and name in OF_DECODER else opened.model.vocab_size


def _check_tokenizer(opened: Opened, tokenizer: HFTokenizer) -> None:
    rows, n = opened.model.vocab_size, tokenizer.vocab_size
    if n <= rows:
        return
    beyond = {i: f"its {role}_token" for role, i in tokenizer.ids.items() if i is not None and i >= rows}
    first = min(beyond, default=rows)
    raise UserError(
        f"{opened.folder}: tokenizer: expected ids below {rows}, the rows of the embedding, got {first}, "
        f"{beyond.get(first, 'the token')} {tokenizer.pieces([first])[0]!r}; in transformers call "
        f"model.resize_token_embeddings({n}) and save model and tokenizer, or take the token out of its files"
    )


def _check_fed(opened: Opened, name: str, said: list[Said], tokenizer: HFTokenizer | None) -> None:
    rows = _rows(opened, name)
    own = None if tokenizer is None else tokenizer.ids.get(name.removesuffix("_token_id"))
    for file, ids in said:
        if max(ids) >= rows:
            correct = "correct it" if own is None or own >= rows else f"correct it to {own}, that of the tokenizer"
            raise UserError(
                f"{opened.folder / file}: {name}: expected an id below {rows}, the rows of the embedding, got "
                f"{max(ids)}, which has none; {correct}, or resize the embedding in transformers "
                "(model.resize_token_embeddings) and save again"
            )


def _beyond(opened: Opened, said: Mapping[str, list[Said]]) -> Iterator[str]:
    """Tells of ids that no model of this size writes, as toy models have them from the defaults of a larger one."""
    rows = opened.model.vocab_size
    for name in NAMED:
        for file, ids in said[name]:
            if beyond := [i for i in ids if i >= rows]:
                yield (
                    f"{file}: {name} {_listed(beyond)} lies beyond the {rows} rows of the embedding: it is never "
                    "written and is left out"
                )


def _disagreements(opened: Opened, said: Mapping[str, list[Said]], tokenizer: HFTokenizer | None) -> Iterator[str]:
    """Tells of roles of which two sources name different ids, unless one names all of them."""
    for role in ROLES:
        sources = list(said[f"{role}_token_id"])
        if tokenizer is not None and (i := tokenizer.ids[role]) is not None:
            sources.append(Said(f"the tokenizer ({tokenizer.pieces([i])[0]!r})", (i,)))
        every = {i for source in sources for i in source.ids}
        if not sources or any(set(source.ids) == every for source in sources):
            continue
        told = ", ".join(f"{_listed(ids)} in {file}" for file, ids in sources)
        ends = ""
        if role == "eos":
            ends = f"; generation stops at any of {_listed(sorted(every))}"
            ends += f", documents end with {tokenizer.end_id}" if tokenizer is not None else ""
        yield f"{role}_token_id: {told}{ends}"


def _listed(ids: Any) -> str:
    return ", ".join(map(str, ids))
