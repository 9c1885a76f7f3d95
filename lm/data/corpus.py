"""A prepared corpus, opened: that it is whole, and made with the settings at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lm.data.made_from import Settings, made_from, splits, tokenizer_made_from
from lm.data.sources.files import is_remote
from lm.data.store.mirror import stage_corpus
from lm.data.store.splits import SPLITS
from lm.data.store.tokens import Store
from lm.data.tokenizer.base import Tokenizer
from lm.data.tokenizer.open import open_tokenizer, prepared_settings, read_prepared, there
from lm.errors import UserError
from lm.files import Log


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A prepared corpus. validation: empty with validation_fraction=0. fingerprint: of tokenizer and each store."""

    tokenizer: Tokenizer
    train: dict[str, Store]
    validation: dict[str, Store]
    fingerprint: dict[str, str]


def open_corpus(data: Settings, log: Log = print) -> Corpus:
    """The corpus at `data.path`. UserError when it is unfinished, damaged in size, or made with other settings; and as
    `stage_corpus` for one in an object store. log: of what is copied from there."""
    if not is_remote(data.path):
        return _open(data, Path(data.path))
    named = [f"{name}/{split}" for name in data.sources for split in splits(data)]
    copy = stage_corpus(data.path, named, cache=data.cache, log=log)
    try:
        return _open(data, copy)
    except UserError as e:
        raise UserError(
            f"{e} (where that corpus is made; this is the copy of {data.path}: copy it there again and delete this one)"
        ) from None


def _open(data: Settings, path: Path) -> Corpus:
    if not (path / "tokenizer.model").is_file():
        raise UserError(f"{path}: expected a prepared corpus, got no tokenizer.model there; run `lm prepare`")
    tokenizer = read_prepared(path / "tokenizer.model")
    check_tokenizer(data, tokenizer, path)
    stores: dict[str, dict[str, Store]] = {split: {} for split in SPLITS}
    for name in data.sources:
        for split in splits(data):
            folder = path / name / split
            if not (folder / "meta.json").is_file():
                raise UserError(f"{folder}: expected a prepared store, got no meta.json there; run `lm prepare`")
            stores[split][name] = store = Store(folder)
            _check_store(data, name, store, tokenizer)
    fingerprint = {f"{n}/{split}": s.fingerprint for split, named in stores.items() for n, s in named.items()}
    return Corpus(tokenizer=tokenizer, fingerprint={"tokenizer": tokenizer.fingerprint} | fingerprint, **stores)


def check_tokenizer(data: Settings, tokenizer: Tokenizer, folder: Path) -> None:
    """UserError where the tokenizer of the corpus in `folder` is not the one that `data` says."""
    path = folder / "tokenizer.model"
    if isinstance(data.tokenizer, str):
        if there(data.tokenizer) and (wanted := open_tokenizer(data.tokenizer).fingerprint) != tokenizer.fingerprint:
            raise UserError(
                f"{path}: expected tokenizer {data.tokenizer} ({wanted[:12]}), got {tokenizer.fingerprint[:12]}; "
                "set data.path to another folder or run `lm prepare --force`"
            )
        return
    saved = prepared_settings(path)
    _same(f"{path}: tokenizer", tokenizer_made_from(data), saved.get("made_from"))
    if saved.get("fingerprint") != tokenizer.fingerprint:
        raise UserError(
            f"{path}: expected fingerprint {str(saved.get('fingerprint'))[:12]}, got {tokenizer.fingerprint[:12]}; "
            "copy it again or run `lm prepare --force`"
        )


def _check_store(data: Settings, name: str, store: Store, tokenizer: Tokenizer) -> None:
    if store.meta.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{store.path}: expected tokens of tokenizer {tokenizer.fingerprint[:12]}, got of "
            f"{store.meta.tokenizer[:12]}; delete {store.path.parent} and run `lm prepare`"
        )
    _same(f"{store.path}", made_from(data, name), store.meta.made_from)


def _same(what: str, expected: dict | None, got: dict | None, at: str = "") -> None:
    for key in [*(expected or {}), *(got or {})]:
        a, b = (expected or {}).get(key), (got or {}).get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            _same(what, a, b, f"{at}{key}.")
        elif a != b:
            raise UserError(
                f"{what}: expected {at}{key}={a!r} as in the config, got one made with {b!r}; set data.path to another "
                "folder or run `lm prepare --force`"
            )
