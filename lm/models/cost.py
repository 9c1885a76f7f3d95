"""The arithmetic of what a model costs: parameters and floating-point operations."""

from __future__ import annotations

import math
from typing import NamedTuple

from lm.models.base import Model
from lm.models.tasks import Words, WordsAndPair, WordsAndReplaced
from lm.nn import param as params


def count(infos: dict) -> int:
    """The number of parameters."""
    return sum(math.prod(i.shape) for i in params.paths(infos).values())


def count_active(model: Model, infos: dict) -> int:
    """The number of parameters that one token passes through: all but the experts it is not sent to."""
    return round(sum(_size(model, i) for i in params.paths(infos).values()))


def _size(model: Model, info: params.ParamInfo) -> float:
    return math.prod(info.shape) * (model.active_experts if "experts" in info.axes and len(info.shape) > 3 else 1.0)


class Row(NamedTuple):
    """What a step computes for one row of text: the places in the layers (of an encoder-decoder, in the decoder), those
    that the head predicts, and those in the encoder of an encoder-decoder."""

    length: int
    predicted: int
    memory: int = 0


class FlopsPerToken(NamedTuple):
    """Floating-point operations of one training step (forward and backward) per token of text."""

    full: float  # attention over the whole square, as PaLM counts
    causal: float  # of causal attention the lower triangle alone; windows are not subtracted


def flops_per_token(model: Model, infos: dict, seq_len: int, row: Row | None = None) -> FlopsPerToken:
    """6 N + 12 L H K S (Chowdhery et al., 2022, appendix B), for rows of `seq_len` tokens of text.

    A parameter counts at each place of `row` (None: `seq_len` of all kinds) that is multiplied with it: layers at every
    place, those of an encoder, and the keys and values that a decoder takes from it, at its places; the head, and a
    table that serves as one, where something is predicted; a pooler and its pair once a row; tables that are only
    looked up never. A shared layer counts at each use, and of experts those that a token is sent to. Attention counts
    in each layer, that of a decoder over its encoder included.
    """
    row = Row(seq_len, seq_len, seq_len) if row is None else row
    flat = params.paths(infos)
    uses = 1.0  # of a layer's parameters; an encoder-decoder shares none
    if model.family != "encoder_decoder":
        uses = len(model.order) / len({(layer.block, layer.index) for layer in model.order})
    full = causal = 0.0
    for path, info in flat.items():
        times = uses if "layers" in info.axes else 1.0
        work = 6.0 * times * _size(model, info) * _places(model, flat, path, info, row)
        full, causal = full + work, causal + work
        side, part = path.partition(".")[0], path.split(".")[-2:]
        if part not in (["attn", "q"], ["cross", "q"]):
            continue
        queries = row.memory if side == "encoder" else row.length
        keys = row.memory if part[0] == "cross" else queries
        n_layers, _, n_heads, head_dim = info.shape
        work = 12.0 * times * n_layers * n_heads * head_dim * queries * keys
        half = model.family != "encoder" and side != "encoder" and part[0] == "attn"
        full, causal = full + work, causal + (work / 2 if half else work)
    return FlopsPerToken(full / seq_len, causal / seq_len)


def _places(model: Model, flat: dict[str, params.ParamInfo], path: str, info: params.ParamInfo, row: Row) -> int:
    """How many places of a row are multiplied with a parameter."""
    side, _, rest = path.partition(".")
    if side == "generator":  # ELECTRA's second encoder, over the same row
        side = rest.partition(".")[0]
    if "position" in info.axes:
        return 0
    if side in ("embed", "target_embed"):
        output = "target_embed.table" if "target_embed.table" in flat else "embed.table"
        has_words = isinstance(model.task, (Words, WordsAndPair, WordsAndReplaced))
        tied = has_words and not flat.keys() & {"head.table", "generator.head.table"}
        return row.predicted if tied and path == output else 0
    if side == "head":
        return row.predicted
    if side in ("pooler", "pair"):
        return 1
    if side == "encoder" or ".cross.k" in path or ".cross.v" in path:
        return row.memory
    return row.length
