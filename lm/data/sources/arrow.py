"""pyarrow, where something needs it."""

from __future__ import annotations

import importlib
from typing import Any

from lm.errors import UserError


def pyarrow(module: str = "pyarrow") -> Any:
    """The module. UserError when it is not installed: it is an extra, since most corpora need none of its 120 MB."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(
            "pyarrow: expected it for .zst, Parquet and Arrow files, got no such package; pip install "
            "'lm-pretraining[arrow]'"
        ) from None
