"""Models over a key-value cache: one call reads what is given, others add a token to each row.

`Cached` is what generation asks of a model, decoder or encoder-decoder. Nothing is chosen here: see `engine`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lm.models.base import Model, abstract
from lm.nn.attention import KVCache
from lm.nn.block import AnyBlock, Context, CrossCache
from lm.nn.mask import Mask
from lm.nn.stack import Stacked

BLOCKS = ("layers", "dense_layers")  # of a stack, in the order that `Layer.block` counts them
Array = jax.Array | np.ndarray
NO_SLOT = -1  # the segment of slots that no token attends to


class Given(NamedTuple):
    """What generated tokens follow, for B rows.

    read int32 [B,S], valid bool [B,S]: what the model reads first: a decoder's prompts, the inputs of an encoder.
    prompts int32 [B,P]: what the sequences begin with: of a decoder the prompts again, else the decoder's first tokens.
    source int32 [B,S]: `read` as the rules of a search look at it; ids below 0, here and in `prompts`, are no tokens.
    first int32 [B]: the slot of `prompts` from which the repetition penalty of a search looks at them.
    """

    read: Array
    valid: Array
    prompts: Array
    source: Array
    first: Array


class Cached(Protocol):
    """A model that generates. Its methods are traced by the caller, with the parameters among the arguments.

    Every leaf of a cache has a leading batch axis, so that rows can be repeated and reordered.
    """

    def split(self, params: dict) -> Any:
        """The parameters as the other methods take them."""
        ...

    def prefill(self, params: Any, given: Given, new: int) -> tuple[jax.Array, Any]:
        """Reads what is given -> (logits [B,V] after the prompts, a cache with room for `new` tokens)."""
        ...

    def step(self, params: Any, tokens: jax.Array, index: jax.Array, n: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """tokens int32 [B], the n-th new ones (from 1), for slot `index` -> (logits [B,V] after them, cache)."""
        ...


class Layers:
    """Stands in for `lm.nn.stack.Stack`, with an array of its own for each layer's parameters and cache.

    A loop over tokens that slices stacked weights [L,...] copies all of them for each token: GPT-2 124M takes twice as
    long. params: of each block, those of each of its layers. `cache` has one entry for each layer of the model.
    """

    def __init__(self, model: Model, params: Sequence[Sequence[dict]]):
        self.order, self.compute, self.params = model.order, model.compute, params

    def __call__(
        self,
        blocks: Sequence[AnyBlock],
        x: jax.Array,
        context: Context,
        *,
        key: None = None,
        cache: Sequence[Any],
        record: bool = False,
    ) -> Stacked:
        graphdefs = [nnx.split(block)[0] for block in blocks]
        context = context._replace(compute=self.compute)
        new: list[Any] = []
        for layer, layer_cache in zip(self.order, cache, strict=True):
            module = nnx.merge(graphdefs[layer.block], self.params[layer.block][layer.index])
            x, written, _ = module(x, context, layer, cache=layer_cache)
            new.append(written)
        return Stacked(x, tuple(new), None, None)


class Params(NamedTuple):
    """Parameters for decoding. rest: all but the layers that are cached. blocks: of each block those of each layer."""

    rest: dict
    blocks: list[list[dict]]


class DecoderCache(NamedTuple):
    """P slots hold the prompts, right-aligned, N the new tokens; T = P + N.

    layers: [B,T,G,K] for each. segments int32 [B,T]: `NO_SLOT` where a slot is padding. lengths int32 [B]: of prompts.
    """

    layers: tuple[KVCache, ...]
    segments: jax.Array
    lengths: jax.Array


class CachedDecoder:
    """A decoder-only `model` that computes in `dtype`. Prompts are right-aligned: `valid` is False before each."""

    def __init__(self, model: Model, dtype: DTypeLike):
        self.model, self.dtype, self._graphdef = model, dtype, abstract(model).graphdef

    def split(self, params: dict) -> Params:
        """Unstacks the layers' parameters, into a copy."""
        rest = {name: p for name, p in params.items() if name not in BLOCKS}
        return Params(rest, _unstack([params[name] for name in BLOCKS if name in params]))

    def prefill(self, params: Params, given: Given, new: int) -> tuple[jax.Array, DecoderCache]:
        prompts, valid = given.read, given.valid
        b, p = prompts.shape
        shape = (b, p, *self.model.kv_shape)
        empty = KVCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
        segments = jnp.where(valid, 1, NO_SLOT)
        index = jnp.arange(p)
        positions = jnp.where(valid, jnp.cumsum(valid, axis=1) - 1, 0)  # padding in front moves no position
        module = self._module(params)
        out = module(
            prompts,
            dtype=self.dtype,
            positions=positions,
            mask=Mask(index, index, jnp.ones_like(segments), segments, causal=True, aligned=True),
            cache=(empty,) * len(self.model.order),
            index=jnp.int32(0),
        )
        cache = DecoderCache(
            layers=_with_room(out.cache, new),
            segments=jnp.pad(segments, ((0, 0), (0, new)), constant_values=1),
            lengths=positions[:, -1].astype(jnp.int32) + 1,  # new tokens count on from the last one, as in transformers
        )
        return module.logits(out.hidden[:, -1:])[:, 0], cache

    def step(
        self, params: Params, tokens: jax.Array, index: jax.Array, n: jax.Array, cache: DecoderCache
    ) -> tuple[jax.Array, DecoderCache]:
        b, t = cache.segments.shape
        module = self._module(params)
        out = module(
            tokens[:, None],
            dtype=self.dtype,
            positions=(cache.lengths + n - 1)[:, None],
            mask=Mask(index[None], jnp.arange(t), jnp.ones((b, 1), jnp.int32), cache.segments),
            cache=cache.layers,
            index=index,
        )
        return module.logits(out.hidden)[:, 0], cache._replace(layers=out.cache)

    def _module(self, params: Params) -> Any:
        # Any layer's: `Layers` has the others and does not ask for these.
        first = {name: block[0] for name, block in zip(BLOCKS, params.blocks, strict=False)}
        module = nnx.merge(self._graphdef, {**params.rest, **first})
        module.stack = Layers(self.model, params.blocks)
        return module


class Seq2SeqCache(NamedTuple):
    """What generation keeps. layers: of each, the decoder's own slots and its keys and values of the inputs. valid bool
    [B,S]: the inputs."""

    layers: tuple[CrossCache, ...]
    valid: jax.Array


class CachedSeq2Seq:
    """An encoder-decoder `model` that computes in `dtype`. Its inputs are encoded once; `valid` may be any of them."""

    def __init__(self, model: Model, dtype: DTypeLike):
        self.model, self.dtype, self._graphdef = model, dtype, abstract(model).graphdef

    def split(self, params: dict) -> Params:
        """Unstacks the parameters of the decoder's layers, into a copy."""
        decoder = {name: p for name, p in params["decoder"].items() if name != "layers"}
        return Params({**params, "decoder": decoder}, _unstack([params["decoder"]["layers"]]))

    def prefill(self, params: Params, given: Given, new: int) -> tuple[jax.Array, Seq2SeqCache]:
        inputs, valid, prompts = given.read, given.valid, given.prompts
        b, p = prompts.shape
        module = self._module(params)
        memory = module.encode(inputs, dtype=self.dtype, valid=valid).hidden
        shape = (b, p, *self.model.kv_shape)
        empty = KVCache(jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype))
        graphdef, _ = nnx.split(module.decoder.layers)
        layers = [nnx.merge(graphdef, params.blocks[0][layer.index]) for layer in self.model.order]
        caches = tuple(
            CrossCache(empty, layer.cross.keys_values(memory, compute=self.model.compute)) for layer in layers
        )
        index = jnp.arange(p)
        out = module.decode(
            prompts,
            None,
            module.cross_mask((b, p), inputs, valid),
            dtype=self.dtype,
            mask=Mask(index, index, causal=True, aligned=True),
            cache=caches,
            index=jnp.int32(0),
        )
        grown = tuple(c._replace(own=_with_room(c.own, new)) for c in out.cache)
        return module.logits(out.hidden[:, -1:])[:, 0], Seq2SeqCache(grown, jnp.asarray(valid))

    def step(
        self, params: Params, tokens: jax.Array, index: jax.Array, n: jax.Array, cache: Seq2SeqCache
    ) -> tuple[jax.Array, Seq2SeqCache]:
        b, t = tokens.shape[0], cache.layers[0].own.k.shape[1]
        module = self._module(params)
        out = module.decode(
            tokens[:, None],
            None,
            module.cross_mask((b, 1), cache.valid, cache.valid),
            dtype=self.dtype,
            positions=jnp.broadcast_to(index, (b, 1)),
            mask=Mask(index[None], jnp.arange(t)),
            cache=cache.layers,
            index=index,
        )
        return module.logits(out.hidden)[:, 0], cache._replace(layers=out.cache)

    def _module(self, params: Params) -> Any:
        decoder = {**params.rest["decoder"], "layers": params.blocks[0][0]}
        module = nnx.merge(self._graphdef, {**params.rest, "decoder": decoder})
        module.decoder.stack = Layers(self.model, params.blocks)
        return module


def cached(model: Model, dtype: DTypeLike) -> CachedDecoder | CachedSeq2Seq:
    return (CachedDecoder if model.family == "decoder" else CachedSeq2Seq)(model, dtype)


def _unstack(blocks: list[dict]) -> list[list[dict]]:
    """Parameters stacked on a layers axis -> those of each layer, for each block."""

    def layers(stacked: dict) -> list[dict]:
        leaves, treedef = jax.tree.flatten(stacked)
        return [jax.tree.unflatten(treedef, [x[i] for x in leaves]) for i in range(leaves[0].shape[0])]

    return [layers(b) for b in blocks]


def _with_room(caches: Any, new: int) -> Any:
    return jax.tree.map(lambda c: jnp.pad(c, ((0, 0), (0, new), (0, 0), (0, 0))), caches)
