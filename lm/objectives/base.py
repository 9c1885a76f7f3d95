"""What the step, the pipeline and the planner ask of an objective."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from lm.models import Architecture, LanguageModeling, Task
from lm.models.cost import Row
from lm.nn.moe import Router, balance_loss, z_loss
from lm.objectives.cross_entropy import row_nll
from lm.objectives.words import Spelling


class Loss(NamedTuple):
    """Sums over a batch, all scalars: divided once, after microbatches and hosts have been added."""

    total: jax.Array  # what is minimised
    nll: jax.Array  # negative log-likelihood alone, nats
    weight: jax.Array  # number of targets


class Score(NamedTuple):
    """Sums over each row [B] of an evaluation batch; who asks reduces them."""

    nll: jax.Array  # nats
    weight: jax.Array  # number of targets
    n_bytes: jax.Array  # bytes of original text that the targets stand for


TokenKind = Literal["tokenizer", "no_text", "any"]


class SpecialToken(NamedTuple):
    """A field of an objective that names a token, or the first of several. name: of the field. ids: rising. kind: one
    that the tokenizer says ("tokenizer"), one that no text may make ("no_text"), or any of the model's vocabulary.
    numbered: what a person reads for several tokens, with their number from the highest id down."""

    name: str
    ids: range
    kind: TokenKind
    numbered: str = ""

    def labels(self) -> dict[int, str]:
        """Id -> what a person reads for it."""
        if self.numbered:
            return {i: f"{self.numbered}_{n}" for n, i in enumerate(reversed(self.ids))}
        return {self.ids[0]: self.name.removesuffix("_id")}


class Predictions(NamedTuple):
    """What an objective asks of a model's head: the places of a batch, with what is to be found there."""

    hidden: jax.Array  # [B,P,D]
    targets: jax.Array  # [B,P] int
    weights: jax.Array  # [B,P] float32: what each counts

    def score(self, model: Any, n_bytes: jax.Array, chunks: int) -> Score:
        """The sums of each row. n_bytes [B,P]: those that each target stands for."""
        head, params = model.head_fn()
        nll = row_nll(head, params, self.hidden, self.targets, self.weights, chunks)
        return Score(nll, jnp.sum(self.weights, axis=-1), jnp.sum(n_bytes, axis=-1))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Base of the objectives. `model` below is a module of the family the objective is for.

    start_id, pad_id: the tokenizer's ids for the start of a document and for padding. Where it has none for padding,
    a decoder takes -1 (`lm.data.NO_PAD`): a place that is no target may look up any row of the embedding.
    """

    family: ClassVar[Architecture] = "decoder"
    token_kinds: ClassVar[Mapping[str, TokenKind]] = {"start_id": "tokenizer", "pad_id": "tokenizer"}

    def special_tokens(self) -> tuple[SpecialToken, ...]:
        """Every field that ends in `_id`: of the kind that `token_kinds` says, and where that is silent, of the
        strictest. So a field that is added and forgotten there is checked too."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name.endswith("_id")}
        return tuple(SpecialToken(n, range(i, i + 1), self.token_kinds.get(n, "no_text")) for n, i in fields.items())

    @property
    def decoder_start_id(self) -> int:
        """What a decoder over an encoder reads first."""
        return self.start_id

    @property
    def tasks(self) -> tuple[type[Task], ...]:
        """What a model's head may predict."""
        return (LanguageModeling,)

    start_id: int = 1
    pad_id: int = 0

    @property
    def unit(self) -> str:
        """What the loss is per. Only of each token from those before it is the sum a length in bits of the text."""
        return {"decoder": "token", "encoder": "masked token", "encoder_decoder": "target"}[self.family]

    def row(self, seq_len: int) -> Row:
        """What a model computes for a row, by the shapes of `features`."""
        shapes = {k: f.shape for k, f in self.features(1, seq_len).items()}
        if self.family == "encoder_decoder":
            n_targets = shapes["targets"][1]
            return Row(n_targets, n_targets, shapes["inputs"][1])
        # The head of an encoder runs at the masked places alone.
        return Row(seq_len, shapes["positions"][1] if self.family == "encoder" else seq_len)

    def longest(self, seq_len: int) -> int:
        """The longest sequence that the model sees, where data.seq_len is `seq_len`."""
        return seq_len

    def check(self, seq_len: int) -> None:
        """Refuses a sequence length that the objective cannot work with."""

    def features(self, batch_size: int, seq_len: int) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays of a global batch; the first axis of each is the batch."""
        raise NotImplementedError

    @property
    def extra_rows(self) -> int:
        """How many rows from elsewhere in the corpus `examples` needs for each of its own, 0 or 1: "other" [n,T+1]."""
        return 0

    def examples(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Rows of tokens as read from the store -> the arrays of `features`, on the host."""
        raise NotImplementedError

    def examples_for(self, tokenizer: Spelling) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        """`examples` with what it has to know of the tokenizer's pieces, which no config can hold."""
        return self.examples

    def loss(self, model: Any, batch: dict[str, jax.Array], *, dtype: DTypeLike, key: jax.Array | None) -> Loss:
        """The training loss, summed; `key` drives dropout."""
        raise NotImplementedError

    def score(self, model: Any, batch: dict[str, jax.Array], token_bytes: jax.Array, *, dtype: DTypeLike) -> Score:
        """The evaluation sums of each row; token_bytes [V] int32 gives the bytes each token stands for."""
        raise NotImplementedError


def router_loss(router: Router | None, balance: float, z: float) -> jax.Array:
    """balance * load balance + z * router z-loss, over all routed layers at once; 0 for a model without experts."""
    if router is None:
        return jnp.zeros((), jnp.float32)
    total = Router(*(jnp.sum(x, axis=0) for x in router))  # layers are balanced as one, as in transformers
    return balance * balance_loss(total.counts, total.probs, total.n, total.counts.shape[-1]) + z * z_loss(
        total.z, total.n
    )
