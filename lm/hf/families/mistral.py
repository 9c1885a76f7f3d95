"""Mistral on disk: LLaMA's layout."""

from __future__ import annotations

from typing import Any

from lm.errors import UserError
from lm.hf.families.family import Family
from lm.hf.families.fields import Fields
from lm.hf.families.llama import (
    ROTARY_BUFFERS,
    aliases,
    attention,
    classes,
    common,
    common_fields,
    ends,
    feed_forward,
    norms,
    rename,
)
from lm.hf.families.table import Map
from lm.models import Mistral, Task


def read(f: Fields, task: Task) -> Mistral:
    kv_heads = f.given("num_key_value_heads", default=8)
    return Mistral(
        **common(f, task) | {"n_kv_heads": kv_heads},
        window=f.given("sliding_window", default=4096),
    )


def write(m: Mistral) -> dict[str, Any]:
    refuse_biases(m, attention=False)
    return common_fields(m) | {"sliding_window": m.window}


def refuse_biases(m: Any, *, attention: bool | None) -> None:
    """Refuses to write biases that the family's class does not have. attention: what it has there, None: either."""
    for name, expected in (("attention_bias", attention), ("mlp_bias", False)):
        got = getattr(m, name)
        if expected is not None and got != expected:
            raise UserError(
                f"model.{name}: a {type(m).__name__} of Hugging Face has {expected}, got {got}; it cannot be exported"
            )


def table(m: Mistral) -> list[Map]:
    return ends(m) + attention() + feed_forward(False) + norms()


MISTRAL_FAMILY = Family(
    model_types=("mistral",),
    classes=classes("Mistral"),
    read=read,
    write=write,
    table=table,
    aliases=aliases,
    rename=rename,
    prefix="model.",
    ignore=ROTARY_BUFFERS,
)
