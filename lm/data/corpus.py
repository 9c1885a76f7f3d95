"""A prepared corpus, opened: that it is whole, and made with the settings at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lm.data.config import Data
from lm.data.folder import CorpusFolder
from lm.data.made_from import CorpusSpec
from lm.data.store.mirror import mirror
from lm.data.store.splits import SPLITS
from lm.data.store.tokens import META, Store
from lm.data.tokenizer.base import Tokenizer
from lm.data.tokenizer.open import exists, open_tokenizer, prepared_settings, read_prepared
from lm.errors import UserError
from lm.files import Log, is_remote
from lm.system_errors import system_errors


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A prepared corpus. validation: empty with validation_fraction=0. fingerprint: of tokenizer and each store."""

    tokenizer: Tokenizer
    train: dict[str, Store]
    validation: dict[str, Store]
    fingerprint: dict[str, str]

    @classmethod
    def open(cls, spec: CorpusSpec, log: Log = print) -> Corpus:
        """Opens what was made from these settings; see `open_corpus`."""
        if not is_remote(spec.path):
            return cls._read(spec, spec.folder)
        named = [f"{name}/{split}" for name in spec.sources for split in spec.splits]
        copy = mirror(spec.path, named, cache=spec.cache, log=log)
        try:
            return cls._read(spec, CorpusFolder(copy))
        except UserError as e:
            raise UserError(
                f"{e} (where that corpus is made; this is the copy of {spec.path}: copy it there again and delete this "
                "one)"
            ) from None

    @classmethod
    def _read(cls, spec: CorpusSpec, folder: CorpusFolder) -> Corpus:
        if not folder.tokenizer.is_file():
            raise UserError(
                f"{folder.path}: expected a prepared corpus, got no {folder.tokenizer.name} there; run `lm prepare`"
            )
        tokenizer = read_prepared(folder.tokenizer)
        check_tokenizer(spec, tokenizer, folder.tokenizer)
        stores: dict[str, dict[str, Store]] = {split: {} for split in SPLITS}
        for name in spec.sources:
            for split in spec.splits:
                path = folder.store(name, split)
                if not (path / META).is_file():
                    raise UserError(f"{path}: expected a prepared store, got no {META} there; run `lm prepare`")
                stores[split][name] = store = Store(path)
                _check_store(spec, name, store, tokenizer)
        fingerprint = {f"{n}/{split}": s.fingerprint for split, named in stores.items() for n, s in named.items()}
        return cls(tokenizer=tokenizer, fingerprint={"tokenizer": tokenizer.fingerprint} | fingerprint, **stores)


@system_errors()
def open_corpus(data: Data, log: Log = print) -> Corpus:
    """The corpus at `data.path`. UserError when it is unfinished, damaged in size, or made with other settings; and as
    `mirror` for one in an object store. log: is told of copies from there."""
    return Corpus.open(data.corpus, log)


def check_tokenizer(spec: CorpusSpec, tokenizer: Tokenizer, path: Path) -> None:
    """Raises UserError where the tokenizer of a corpus, which lies at `path`, is not the one that the config says."""
    if isinstance(spec.tokenizer, str):
        if exists(spec.tokenizer) and (wanted := open_tokenizer(spec.tokenizer).fingerprint) != tokenizer.fingerprint:
            raise UserError(
                f"{path}: expected tokenizer {spec.tokenizer} ({wanted[:12]}), got {tokenizer.fingerprint[:12]}; "
                "set data.path to another folder or run `lm prepare --force`"
            )
        return
    saved = prepared_settings(path)
    _same(f"{path}: tokenizer", spec.tokenizer_made_from(), saved.get("made_from"))
    if saved.get("fingerprint") != tokenizer.fingerprint:
        raise UserError(
            f"{path}: expected fingerprint {str(saved.get('fingerprint'))[:12]}, got {tokenizer.fingerprint[:12]}; "
            "copy it again or run `lm prepare --force`"
        )


def _check_store(spec: CorpusSpec, name: str, store: Store, tokenizer: Tokenizer) -> None:
    if store.meta.tokenizer != tokenizer.fingerprint:
        raise UserError(
            f"{store.path}: expected tokens of tokenizer {tokenizer.fingerprint[:12]}, got of "
            f"{store.meta.tokenizer[:12]}; delete {store.path.parent} and run `lm prepare`"
        )
    _same(f"{store.path}", spec.made_from(name), store.meta.made_from)


def _same(what: str, expected: dict | None, got: dict | None, at: str = "") -> None:
    for key in [*(expected or {}), *(got or {})]:
        a, b = (expected or {}).get(key), (got or {}).get(key)  # None where an older store lacks the key: not set
        if isinstance(a, dict) and isinstance(b, dict):
            _same(what, a, b, f"{at}{key}.")
        elif a != b:
            raise UserError(
                f"{what}: expected {at}{key}={a!r} as in the config, got one made with {b!r}; set data.path to another "
                "folder or run `lm prepare --force`"
            )
