"""Forward passes under the names and conventions of transformers: masks, positions, shifted labels, pooling, losses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from lm.errors import UserError
from lm.hf.face import losses
from lm.hf.face.inputs import PAIR_LABELS
from lm.hf.families.family import Family
from lm.models import (
    Body,
    LanguageModeling,
    MaskedLMAndPair,
    Model,
    QuestionAnswering,
    SequenceClassification,
    TokenClassification,
)
from lm.nn.mask import Mask
from lm.objectives import seq2seq
from lm.objectives.base import router_loss

Inputs = Mapping[str, jax.Array]


def has_labels(model: Model, config: Mapping[str, Any], inputs: Inputs) -> bool:
    """Says whether there is a loss."""
    if isinstance(model.task, QuestionAnswering):
        return {"start_positions", "end_positions"} <= inputs.keys()
    if isinstance(model.task, MaskedLMAndPair):
        return {"labels", PAIR_LABELS[config["model_type"]][0]} <= inputs.keys()
    return "labels" in inputs


def outputs(
    module: Any, model: Model, family: Family, config: Mapping[str, Any], inputs: Inputs, dtype: DTypeLike
) -> dict[str, Any]:
    """What the class returns, as a dict; traced under jit."""
    run = {"decoder": _decoder, "encoder": _encoder, "encoder_decoder": _encoder_decoder}[model.family]
    return run(module, model, family, config, inputs, dtype)


def _mask(inputs: Inputs, name: str = "attention_mask", ids: str = "input_ids") -> jax.Array:
    return inputs[name] != 0 if name in inputs else jnp.ones_like(inputs[ids], bool)


def _decoder(module, model: Model, family: Family, config, inputs: Inputs, dtype) -> dict[str, Any]:
    ids, mask = inputs["input_ids"], _mask(inputs)
    index = jnp.arange(ids.shape[1])
    # Padding is in a segment that no query is in.
    seen = Mask(index, index, jnp.ones_like(ids), jnp.where(mask, 1, -1), causal=True, aligned=True)
    positions = inputs.get("position_ids")
    positions = family.positions(ids, mask, model) if positions is None else jnp.broadcast_to(positions, ids.shape)
    x = module(ids, dtype=dtype, positions=positions, mask=seen, record=True)
    router = x.router
    if router is not None and "attention_mask" in inputs:
        # In transformers padding goes through the experts too, but does not count for their balance.
        router = module(ids, dtype=dtype, positions=positions, mask=seen, valid=mask).router
    # Of transformers' the last is behind the final norm.
    out: dict[str, Any] = {"hidden_states": (*x.states[:-1], x.hidden)}
    if isinstance(model.task, Body):
        return out | {"last_hidden_state": x.hidden}
    if isinstance(model.task, LanguageModeling):
        out["logits"] = module.logits(x.hidden)
        if "labels" in inputs:
            out["loss"] = losses.next_token(out["logits"], inputs["labels"])
        asked = inputs.get("output_router_logits", config.get("output_router_logits", False))
        if router is not None:
            aux = router_loss(router, 1.0, 0.0)
            out["aux_loss"] = aux
            if "loss" in out:
                weight = config.get("router_aux_loss_coef", 0.001)  # the default of transformers
                out["loss"] = out["loss"] + jnp.where(jnp.asarray(asked), weight * aux, 0.0)
        return out
    logits = module.labels(x.hidden)
    if isinstance(model.task, SequenceClassification):
        return out | _sequence(logits[jnp.arange(len(ids)), _last_token(ids, config)], config, inputs)
    return out | _tokens_or_spans(logits, model, inputs)


def _encoder(module, model: Model, family: Family, config, inputs: Inputs, dtype) -> dict[str, Any]:
    ids, mask = inputs["input_ids"], _mask(inputs)
    positions = inputs.get("position_ids")
    if positions is None:
        positions = family.positions(ids, mask, model)
    else:
        positions = jnp.broadcast_to(family.given_positions(positions, model), ids.shape)
    types = inputs.get("token_type_ids")
    x = module(ids, dtype=dtype, positions=positions, token_types=types, valid=mask, record=True)
    out: dict[str, Any] = {"hidden_states": (*x.states[:-1], x.hidden)}
    match model.task:
        case Body(pooler=pooler):
            out |= {"last_hidden_state": x.hidden}
            out |= {"pooler_output": module.pooled(x.hidden)} if pooler else {}
        case LanguageModeling():
            out["logits"] = module.logits(x.hidden)
            if "labels" in inputs:
                out["loss"] = losses.cross_entropy(out["logits"], inputs["labels"])
        case MaskedLMAndPair():
            label, pair = PAIR_LABELS[config["model_type"]]
            out |= {"prediction_logits": module.logits(x.hidden), pair: module.pair_logits(x.hidden)}
            if has_labels(model, config, inputs):
                words = losses.cross_entropy(out["prediction_logits"], inputs["labels"])
                out["loss"] = words + losses.cross_entropy(out[pair], inputs[label].reshape(-1))
        case SequenceClassification():
            out |= _sequence(module.labels(module.pooled(x.hidden)), config, inputs)
        case _:
            out |= _tokens_or_spans(module.labels(x.hidden), model, inputs)
    return out


def _encoder_decoder(module, model: Model, family: Family, config, inputs: Inputs, dtype) -> dict[str, Any]:
    ids, mask = inputs["input_ids"], _mask(inputs)
    if isinstance(model.task, TokenClassification) or model.task == Body(encoder_only=True):
        x = module.encode(ids, dtype=dtype, valid=mask, record=True)
        states = (*x.states[:-1], x.hidden)
        if isinstance(model.task, Body):
            return {"hidden_states": states, "last_hidden_state": x.hidden}
        return {"hidden_states": states} | _tokens_or_spans(module.labels(x.hidden), model, inputs)
    targets = inputs.get("decoder_input_ids")
    if targets is None:
        words = isinstance(model.task, LanguageModeling) and "labels" in inputs
        if isinstance(model.task, LanguageModeling | Body) and not words and not family.shifts_inputs:
            labels = "" if isinstance(model.task, Body) else ", or labels to shift, got neither"
            raise UserError(f"decoder_input_ids: expected them{labels}; pass what the decoder has read")
        targets = shift_right(inputs["labels"] if words else ids, config, wrap=family.wraps_last)
    own = None
    if "decoder_attention_mask" in inputs:
        own = _mask(inputs, "decoder_attention_mask", "decoder_input_ids")
    x = module(ids, targets, dtype=dtype, valid=mask, target_valid=own, record=True)
    decoded = (*x.states[:-1], x.hidden)
    out: dict[str, Any] = {
        "hidden_states": decoded,
        "decoder_hidden_states": decoded,
        "encoder_hidden_states": (*x.memory_states[:-1], x.memory),
        "encoder_last_hidden_state": x.memory,
    }
    if isinstance(model.task, Body):
        return out | {"last_hidden_state": x.hidden}
    if isinstance(model.task, LanguageModeling):
        out["logits"] = module.logits(x.hidden)
        if "labels" in inputs:
            out["loss"] = losses.cross_entropy(out["logits"], inputs["labels"])
        return out
    if isinstance(model.task, SequenceClassification):  # of the last end token
        ends = ids == config["eos_token_id"]
        last = ids.shape[1] - 1 - jnp.argmax(ends[:, ::-1], axis=1)
        return out | _sequence(module.labels(x.hidden[jnp.arange(len(ids)), last]), config, inputs)
    return out | _tokens_or_spans(module.labels(x.hidden), model, inputs)


def shift_right(ids: jax.Array, config: Mapping[str, Any], *, wrap: bool) -> jax.Array:
    """Decoder inputs for labels [B,T]: one to the right behind the start token, -100 as padding. wrap: the row's last
    token that is not padding comes first instead (mBART's language)."""
    pad = config["pad_token_id"]
    ids = jnp.where(ids == losses.IGNORED, pad, ids)
    if wrap:
        last = jnp.sum(ids != pad, axis=1) - 1
        return jnp.concatenate([jnp.take_along_axis(ids, last[:, None], axis=1), ids[:, :-1]], axis=1)
    return seq2seq.shift_right(ids, config["decoder_start_token_id"])


def _last_token(ids: jax.Array, config: Mapping[str, Any]) -> jax.Array:
    """The place of the last token of each row that is not padding."""
    pad = config.get("pad_token_id")
    if pad is None:
        if ids.shape[0] > 1:
            raise UserError("pad_token_id: expected one in config.json to find where rows end; pass one row at a time")
        return jnp.full(1, ids.shape[1] - 1)
    return jnp.argmax(jnp.arange(ids.shape[1]) * (ids != pad), axis=1)


def _sequence(logits: jax.Array, config: Mapping[str, Any], inputs: Inputs) -> dict[str, Any]:
    out = {"logits": logits}
    if "labels" in inputs:
        out["loss"] = losses.sequence_labels(logits, inputs["labels"], config.get("problem_type"))
    return out


def _tokens_or_spans(logits: jax.Array, model: Model, inputs: Inputs) -> dict[str, Any]:
    if isinstance(model.task, TokenClassification):
        loss = {"loss": losses.cross_entropy(logits, inputs["labels"])} if "labels" in inputs else {}
        return {"logits": logits} | loss
    start, end = logits[..., 0], logits[..., 1]
    out = {"start_logits": start, "end_logits": end}
    if {"start_positions", "end_positions"} <= inputs.keys():
        out["loss"] = losses.spans(start, end, inputs["start_positions"], inputs["end_positions"])
    return out
