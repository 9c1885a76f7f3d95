"""What `data.tokenizer` may name: one of our .model files, a tokenizer of Hugging Face, or the run of a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm.checkpoint.meta import latest_meta
from lm.data.folder import TOKENIZER_SETTINGS
from lm.data.tokenizer.base import Tokenizer
from lm.data.tokenizer.huggingface import FORMAT, open_files
from lm.data.tokenizer.implied import beside
from lm.data.tokenizer.sentencepiece import SentencePieceTokenizer
from lm.data.tokenizer.slow import SETTINGS, from_bytes, load_folder
from lm.errors import UserError
from lm.workdir import Workdir


def open_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`, which reads documents as text alone.

    path: a .model file of `SentencePiece`, a tokenizer.model of a prepared corpus, a tokenizer.json, to which the
        tokenizer_config.json beside it belongs, a folder of Hugging Face, or the folder of a run, also a remote one.
    UserError where there is none, where it is broken, and where no token of it can end a document.
    """
    run = Workdir.of(path, "data.tokenizer")
    is_file = not run.is_remote and run.path.is_file()
    tokenizer = _of_files(run) if is_file or not run.has_checkpoints() else _of_run(run)
    check_documents(tokenizer)
    return tokenizer


def exists(path: str | Path) -> bool:
    """Says whether something is at `path`, which may be on another machine than the one that prepares."""
    return Workdir.of(path, "data.tokenizer").path.exists()


def read_prepared(path: Path) -> Tokenizer:
    """Reads the tokenizer.model of a prepared corpus."""
    return from_bytes(path.read_bytes(), str(path), literal=True)


def prepared_settings(path: Path) -> dict[str, Any]:
    """What the tokenizer.model of a prepared corpus was made from, and its fingerprint, by the tokenizer.json beside
    it: {} where there is none, as with one that was made elsewhere."""
    settings = path.with_name(TOKENIZER_SETTINGS)
    try:
        saved = json.loads(settings.read_bytes()) if settings.is_file() else {}
        if not isinstance(saved, dict):
            raise ValueError(f"a {type(saved).__name__}")
    except ValueError as e:
        raise UserError(
            f"{settings}: expected the settings of a tokenizer as JSON, got {e}; copy it again or run "
            "`lm prepare --force`"
        ) from None
    return saved


def check_documents(tokenizer: Tokenizer) -> None:
    """Raises UserError for a tokenizer that cannot end a document, or whose tokens have no size in bytes."""
    assert tokenizer.eos_id != tokenizer.pad_id
    tokenizer.token_bytes()


def _of_files(at: Workdir) -> Tokenizer:
    if at.is_remote:
        raise UserError(
            f"data.tokenizer: {at}: expected the folder of a run in a store, got no checkpoints there; copy a "
            "tokenizer to this machine"
        )
    path = Path(at.path)
    if path.is_dir():
        return load_folder(path, literal=True)
    if not path.is_file():
        raise UserError(
            f"{path}: expected a .model file, a tokenizer.json, the folder of a model of Hugging Face or of a run, got "
            "nothing there; set data.tokenizer to one, or to SentencePiece(...), which trains one"
        )
    data = path.read_bytes()
    if path.suffix != ".json" and data[:1] != b"{":  # a SentencePiece model opens with a protobuf tag
        return SentencePieceTokenizer(data, name=str(path))
    if data.startswith(b'{"format": "%s"' % FORMAT.encode()):
        return from_bytes(data, str(path), literal=True)
    settings = {name: path.with_name(name).read_bytes() for name in SETTINGS if path.with_name(name).is_file()}
    return open_files({"tokenizer.json": data, **settings}, str(path.parent), literal=True, beside=beside(path.parent))


def _of_run(run: Workdir) -> Tokenizer:
    meta = latest_meta(run)
    if meta is None:
        raise UserError(f"{run}: expected a run with a tokenizer, got no finished checkpoint there yet")
    if not meta.tokenizer:
        raise UserError(
            f"{run}: expected a run with a tokenizer, got the import of a folder without one; set data.tokenizer to a "
            "folder that has one, and see that it is the model's"
        )
    return from_bytes(meta.tokenizer, str(run), literal=True)
