"""What every model config offers, and a model without values."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from lm.errors import UserError, positive
from lm.models.tasks import LanguageModeling, Task
from lm.nn import param as params
from lm.nn.block import Layer
from lm.nn.compute import Compute
from lm.nn.stack import Stack
from lm.renamed import Renaming

Architecture = Literal["decoder", "encoder", "encoder_decoder"]


class Output(NamedTuple):
    """What a model's call returns.

    hidden [B,S,D]: what the head reads. cache: with the new keys and values. router: statistics of the layers that have
    one, [N,...] (see `lm.nn.moe.Router`). states: if recorded, what entered the first layer and what left each,
    [L+1,B,S,D], before any final norm. memory [B,T,D] and memory_states: the same of the encoder of an encoder-decoder.
    """

    hidden: jax.Array
    cache: Any = None
    router: Any = None
    states: jax.Array | None = None
    memory: jax.Array | None = None
    memory_states: jax.Array | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Model(metaclass=Renaming):
    """Base of the model configs. `compute` is how it runs; all else is what it is.

    dropout: of embeddings and of what each part adds; attention_dropout: of the attention weights (None: the same).
    pad_id: a token whose embedding learns nothing from being looked up, as in many published models.
    """

    family: ClassVar[Architecture] = "decoder"
    renamed: ClassVar[Mapping[str, str]] = {  # stored runs and recipes of older versions have these here
        "scan": "compute.scan",
        "remat": "compute.remat",
        "attention_block": "compute.query_block",
    }

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    dropout: float = 0.0
    attention_dropout: float | None = None
    init_std: float = 0.02  # GPT-2's and BERT's
    pad_id: int | None = None
    task: Task = LanguageModeling()
    compute: Compute = Compute()

    def __post_init__(self):
        positive("model", self, "vocab_size", "d_model", "n_layers", "n_heads")
        for name in ("dropout", "attention_dropout"):
            if not 0.0 <= (getattr(self, name) or 0.0) < 1.0:
                raise UserError(f"model.{name}: expected a rate in [0, 1), got {getattr(self, name)}")
        # Heads with a width of their own may be wider together than the model.
        if self.d_model % self.n_heads and getattr(self, "head_dim", None) is None:
            raise UserError(f"model.n_heads: {self.n_heads} does not divide model.d_model {self.d_model}")

    def build(self, rngs: nnx.Rngs) -> Any:
        """The module, with freshly initialised parameters."""
        raise NotImplementedError

    @property
    def max_seq_len(self) -> int | None:
        """The longest sequence the parameters allow, None where positions are computed."""
        return None

    @property
    def kv_shape(self) -> tuple[int, int]:
        """(kv heads, head_dim) of a cached token in one layer."""
        return self.n_heads, self.d_model // self.n_heads

    @property
    def order(self) -> tuple[Layer, ...]:
        """The layers as they are run (of an encoder-decoder, those of the decoder)."""
        return Stack(self.n_layers).order

    @property
    def is_routed(self) -> bool:
        """Whether tokens pass through some experts of many."""
        return False

    @property
    def active_experts(self) -> float:
        """The share of a routed layer's experts that a token passes through."""
        return 1.0

    @property
    def weights_dropout(self) -> float:
        """The dropout of attention weights."""
        return self.dropout if self.attention_dropout is None else self.attention_dropout


def windowed_layers(n_layers: int, window: int | None, windowed: tuple[bool, ...]) -> tuple[Layer, ...]:
    """`n_layers` layers, of which those where the pattern `windowed`, repeated over them, is True see `window` keys."""
    return tuple(Layer(index=i, window=window if windowed[i % len(windowed)] else None) for i in range(n_layers))


def check_pattern(windowed: tuple[bool, ...]) -> None:
    """Refuses a pattern of no layer."""
    if not windowed:
        raise UserError("model.windowed: expected a pattern of at least one layer, got (); (False,) for no windows")


class Abstract(NamedTuple):
    """A model without values: what sharding, planning and checkpoints are derived from."""

    graphdef: nnx.GraphDef
    params: dict  # nested dict of ShapeDtypeStruct
    infos: dict  # nested dict of ParamInfo


def abstract(model: Model) -> Abstract:
    """The parameter tree of `model`; touches no device. What is returned is shared among callers: do not change it."""
    try:
        hash(model)
    except TypeError:  # a class of the user's with a list or dict among its fields
        return _abstract.__wrapped__(model)
    return _abstract(model)


@functools.lru_cache(maxsize=64)  # tracing takes 0.1 to 1 s, and a start asks for the same model in several places
def _abstract(model: Model) -> Abstract:
    graphdef, tree, infos = params.split(nnx.eval_shape(lambda: model.build(nnx.Rngs(0))))  # any seed: nothing is drawn
    tree = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, p.dtype), tree)
    return Abstract(graphdef, tree, infos)


def init(model: Model, key: jax.Array) -> dict:
    """Initial float32 parameters as a nested dict."""
    _, tree, _ = params.split(model.build(nnx.Rngs(params=key)))
    return jax.tree.map(jnp.asarray, tree)
