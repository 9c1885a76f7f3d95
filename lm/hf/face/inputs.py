"""What the class of a folder is called with: the names, shapes and ranges, checked before anything is traced.

A gather on a device takes the nearest row for an index that is out of range, which would be a wrong result in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from lm.errors import UserError, did_you_mean
from lm.hf.face.losses import IGNORED
from lm.hf.families.family import Family
from lm.models import Body, LanguageModeling, MaskedLMAndPair, Model, QuestionAnswering, SequenceClassification

# The label of a sentence pair, and the logits for it, by class.
PAIR_LABELS = {
    "bert": ("next_sentence_label", "seq_relationship_logits"),
    "albert": ("sentence_order_label", "sop_logits"),
}


def arguments(model: Model, config: Mapping[str, Any]) -> set[str]:
    """What the class can be called with."""
    names = {"input_ids", "attention_mask"}
    if isinstance(model.task, QuestionAnswering):
        names |= {"start_positions", "end_positions"}
    elif not isinstance(model.task, Body):
        names.add("labels")
    if isinstance(model.task, MaskedLMAndPair):
        names.add(PAIR_LABELS[config["model_type"]][0])
    match model.family:
        case "decoder":
            return names | {"position_ids"} | ({"output_router_logits"} if model.is_routed else set())
        case "encoder":
            return names | {"position_ids", "token_type_ids"}
        case _:
            alone = model.task == Body(encoder_only=True)
            return names if alone else names | {"decoder_input_ids", "decoder_attention_mask"}


def read_inputs(
    model: Model, family: Family, config: Mapping[str, Any], inputs: Mapping[str, ArrayLike | None]
) -> dict[str, jax.Array]:
    """The arguments that are given, integers as int32. UserError for what transformers refuses or fails on."""
    known = arguments(model, config)
    arrays = {name: np.asarray(value) for name, value in inputs.items() if value is not None}
    for name in arrays:
        if name not in known:
            kind = config["architectures"][0]
            raise UserError(f"{name}: {kind} takes {', '.join(sorted(known))}{did_you_mean(name, known)}")
    if "input_ids" not in arrays:
        raise UserError("input_ids: expected integers [batch, length], got none")
    _check_ids(model, arrays)
    _check_labels(model, config, arrays)
    _check_positions(model, family, arrays)
    return {n: jnp.asarray(x.astype(np.int32) if np.issubdtype(x.dtype, np.integer) else x) for n, x in arrays.items()}


def target_size(model: Model) -> int:
    """The number of words that there are to predict."""
    target = getattr(model, "target_vocab_size", None)
    return model.vocab_size if target is None else target


def _check_ids(model: Model, arrays: Mapping[str, np.ndarray]) -> None:
    sizes = {"input_ids": model.vocab_size, "decoder_input_ids": target_size(model)}
    for name, size in sizes.items():
        x = arrays.get(name)
        if x is None:
            continue
        if x.ndim != 2 or not x.size or not np.issubdtype(x.dtype, np.integer):
            raise UserError(f"{name}: expected integers [batch, length], got {x.dtype} {list(x.shape)}")
        _in_range(name, x, size)
    ids = arrays["input_ids"]
    decoder = arrays.get("decoder_input_ids")
    if decoder is not None and len(decoder) != len(ids):
        raise UserError(f"decoder_input_ids: expected {len(ids)} rows as input_ids, got {len(decoder)}")
    for name in ("attention_mask", "token_type_ids"):
        _has_shape(name, arrays, ids.shape)
    if "token_type_ids" in arrays:
        _in_range("token_type_ids", arrays["token_type_ids"], getattr(model, "n_types", 1))
    if "decoder_attention_mask" in arrays:
        if decoder is None:
            raise UserError("decoder_attention_mask: expected decoder_input_ids with it, got none")
        _has_shape("decoder_attention_mask", arrays, decoder.shape)


def _check_labels(model: Model, config: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    ids, decoder = arrays["input_ids"], arrays.get("decoder_input_ids")
    rows = (len(ids),)
    if isinstance(model.task, MaskedLMAndPair):
        name = PAIR_LABELS[config["model_type"]][0]
        _has_shape(name, arrays, rows, (*rows, 1))
        _in_range(name, arrays.get(name), 2, ignored=True)
    for name in ("start_positions", "end_positions"):
        _has_shape(name, arrays, rows, (*rows, 1))
    labels = arrays.get("labels")
    if labels is None:
        return
    if isinstance(model.task, SequenceClassification):
        n = model.task.n_labels
        if model.task.problem == "single_label" and np.issubdtype(labels.dtype, np.integer):
            _has_shape("labels", arrays, rows, (*rows, 1))
            _in_range("labels", labels, n, ignored=True)
        else:
            _has_shape("labels", arrays, *([rows, (*rows, 1)] if n == 1 else [(*rows, n)]))
        return
    if model.family != "encoder_decoder" or not isinstance(model.task, LanguageModeling):
        _has_shape("labels", arrays, ids.shape)
    elif decoder is not None:
        _has_shape("labels", arrays, decoder.shape)
    elif labels.ndim != 2 or len(labels) != len(ids):
        raise UserError(f"labels: expected [{len(ids)}, length], got {list(labels.shape)}")
    words = isinstance(model.task, (LanguageModeling, MaskedLMAndPair))
    _in_range("labels", labels, target_size(model) if words else getattr(model.task, "n_labels", 1), ignored=True)


def _check_positions(model: Model, family: Family, arrays: Mapping[str, np.ndarray]) -> None:
    """Checks positions against the model's table: those that are computed have no end."""
    ids, longest = arrays["input_ids"], model.max_seq_len
    given = arrays.get("position_ids")
    if given is not None:
        _has_shape("position_ids", arrays, ids.shape, (1, ids.shape[1]), ids.shape[1:])
        if not np.issubdtype(given.dtype, np.integer):
            raise UserError(f"position_ids: expected integers, got {given.dtype}")
    if longest is None:
        return
    if given is None:
        mask = jnp.asarray(arrays.get("attention_mask", np.ones_like(ids)) != 0)
        _fits("input_ids", int(jnp.max(family.positions(jnp.asarray(ids), mask, model))) + 1, longest)
    else:
        ours = np.asarray(family.given_positions(jnp.asarray(given), model))
        last = longest - 1 + int((given - ours).flat[0])
        if given.min() < 0 or given.max() > last:
            raise UserError(f"position_ids: expected 0 to {last}, got {given.min()} to {given.max()}")
    if model.family == "encoder_decoder":
        for name in ("decoder_input_ids", "labels"):
            if name in arrays and arrays[name].ndim == 2:
                _fits(name, arrays[name].shape[1], longest)


def _fits(name: str, used: int, longest: int) -> None:
    if used > longest:
        raise UserError(f"{name}: expected at most {longest} tokens in a row, the model's positions, got {used}")


def _has_shape(name: str, arrays: Mapping[str, np.ndarray], *shapes: tuple[int, ...]) -> None:
    if name in arrays and arrays[name].shape not in shapes:
        raise UserError(f"{name}: expected {' or '.join(str(list(s)) for s in shapes)}, got {list(arrays[name].shape)}")


def _in_range(name: str, x: np.ndarray | None, size: int, *, ignored: bool = False) -> None:
    """Refuses all but integers from 0 to size - 1; `ignored`: that for what is not labelled is taken too."""
    if x is None or not x.size:
        return
    if not np.issubdtype(x.dtype, np.integer):
        raise UserError(f"{name}: expected integers, got {x.dtype}")
    used = x[x != IGNORED] if ignored else x
    if used.size and not 0 <= used.min() <= used.max() < size:
        more = f" (or {IGNORED} for none)" if ignored else ""
        raise UserError(f"{name}: expected ids from 0 to {size - 1}{more}, got {used.min()} to {used.max()}")
