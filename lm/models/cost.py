"""The arithmetic of what a model costs: parameters and floating-point operations."""

from __future__ import annotations

import math
from typing import NamedTuple

from lm.models.base import Model
from lm.nn import param as params


def count(infos: dict) -> int:
    """The number of parameters."""
    return sum(math.prod(i.shape) for i in params.paths(infos).values())


def count_active(model: Model, infos: dict) -> int:
    """The number of parameters that one token passes through: all but the experts it is not sent to."""
    return round(sum(_size(model, i) for i in params.paths(infos).values()))


def _size(model: Model, info: params.ParamInfo) -> float:
    # A matrix of experts is [L,E,D,F]; the router, [L,D,E], sees every token.
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

    A parameter counts at each place of `row` (None: `seq_len` of all kinds) where it declares to be used
    (`lm.nn.param.Used`). A shared layer counts at each use, and of experts those that a token is sent to. Attention
    counts in each layer, that of a decoder over its encoder included.
    """
    row = Row(seq_len, seq_len, seq_len) if row is None else row
    places = {"token": row.length, "target": row.predicted, "memory": row.memory, "row": 1, "lookup": 0}
    uses = 1.0  # of a layer's parameters; an encoder-decoder shares none
    if model.family != "encoder_decoder":
        uses = len(model.order) / len({(layer.block, layer.index) for layer in model.order})
    full = causal = 0.0
    for info in params.paths(infos).values():
        times = uses if "layers" in info.axes else 1.0
        work = 6.0 * times * _size(model, info) * places[info.used]  # 2 a parameter forward, 4 backward
        full, causal = full + work, causal + work
        if info.keys is None:
            continue
        n_layers, _, n_heads, head_dim = info.shape
        # q k^T and the product with v: 2 each forward, twice that backward.
        work = 12.0 * times * n_layers * n_heads * head_dim * places[info.used] * places[info.keys]
        # Only a decoder's attention over itself is causal.
        half = model.family != "encoder" and info.used == info.keys == "token"
        full, causal = full + work, causal + (work / 2 if half else work)
    return FlopsPerToken(full / seq_len, causal / seq_len)
