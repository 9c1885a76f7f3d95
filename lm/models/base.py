"""What every model config offers, and the arithmetic of its cost."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.errors import UserError
from lm.nn import param as params
from lm.nn.stack import Remat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model:
    """Base of the model configs. `scan`, `remat` and `attention_block` change how it runs, not what it computes."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    dropout: float = 0.0
    init_std: float = 0.02
    scan: bool = True
    remat: Remat = "selective"
    attention_block: int = 64  # queries at a time, 0: all at once (see `lm.nn.attention.attend`)

    def __post_init__(self):
        for name in ("vocab_size", "d_model", "n_layers", "n_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name}: expected a positive number, got {getattr(self, name)}")
        if not 0.0 <= self.dropout < 1.0:
            raise UserError(f"model.dropout: expected a rate in [0, 1), got {self.dropout}")
        if self.attention_block < 0:
            raise UserError(f"model.attention_block: expected 0 or a number of queries, got {self.attention_block}")
        if self.d_model % self.n_heads and getattr(self, "head_dim", None) is None:
            raise UserError(f"model.n_heads: {self.n_heads} does not divide model.d_model {self.d_model}")

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with freshly initialised parameters."""
        raise NotImplementedError

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence the parameters allow, None where positions are computed."""
        return None

    @property
    def kv_shape(self) -> tuple[int, int]:
        """(kv heads, head_dim) of a cached token in one layer."""
        raise NotImplementedError


class Abstract(NamedTuple):
    """A model without values: what sharding, planning and checkpoints are derived from."""

    graphdef: nnx.GraphDef
    params: dict  # nested dict of ShapeDtypeStruct
    infos: dict  # nested dict of ParamInfo


def abstract(model: Model) -> Abstract:
    """The parameter tree of `model`; touches no device."""
    graphdef, tree, infos = params.split(nnx.eval_shape(lambda: model.build(nnx.Rngs(0))))
    tree = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), tree)
    return Abstract(graphdef, tree, infos)


def init(model: Model, key: jax.Array) -> dict:
    """Initial float32 parameters as a nested dict."""
    _, tree, _ = params.split(model.build(nnx.Rngs(params=key)))
    return jax.tree.map(jnp.asarray, tree)


def count(infos: dict) -> int:
    """The number of parameters."""
    return sum(math.prod(i.shape) for i in params.paths(infos).values())


class FlopsPerToken(NamedTuple):
    """Floating-point operations of one training step (forward and backward) per token."""

    full: float  # attention over the whole [S,S] square, as PaLM counts
    causal: float  # the lower triangle alone


def flops_per_token(model: Model, infos: dict, seq_len: int) -> FlopsPerToken:
    """6 N + 12 L H K S (Chowdhery et al., 2022, appendix B) and its causal half of the attention term.

    N counts the parameters that are multiplied: tables that are only looked up (positions, an untied input
    embedding) do no work; a tied one is counted once, as the output head.
    """
    flat = params.paths(infos)
    looked_up = {p for p, i in flat.items() if "position" in i.axes}
    if "head.table" in flat:
        looked_up.add("embed.table")
    n = sum(math.prod(i.shape) for p, i in flat.items() if p not in looked_up)
    attention = 12 * model.n_layers * model.n_heads * model.kv_shape[1] * seq_len
    return FlopsPerToken(6.0 * n + attention, 6.0 * n + attention / 2)
