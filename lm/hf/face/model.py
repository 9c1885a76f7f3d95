"""A checking face: the models that training uses, called with the argument and output names of transformers.

Numpy in and out. Hidden states are always returned, losses where labels are given. On accelerators the products are
made in full float32, so that differences are those of the models and not of the hardware.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike, DTypeLike

from lm.errors import UserError
from lm.generation.cached import Given, cached
from lm.generation.defaults import decoder_start, generation_defaults
from lm.generation.engine import Engine
from lm.generation.search import searching
from lm.hf.face import forward
from lm.hf.face.inputs import read_inputs
from lm.hf.families.family import Family
from lm.hf.families.table import Slot
from lm.hf.folder import Opened, open_folder
from lm.hf.weights import read_params, write_items
from lm.models import LanguageModeling
from lm.models import Model as ModelConfig
from lm.models.base import abstract
from lm.nn.param import paths

DTYPES = ("float32", "bfloat16", "float16")
BUFFERS = ("final_logits_bias",)  # stored, but nothing that torch would train


class HFModel:
    """A model of a folder. `load` makes it; calling it is the forward pass of the class that config.json names."""

    def __init__(self, opened: Opened, params: dict, dtype: DTypeLike):
        self.config: dict[str, Any] = opened.config
        self.generation_config: dict[str, Any] | None = opened.generation
        self.folder: Path = opened.folder
        self.family: Family = opened.family
        self.model: ModelConfig = opened.model
        self.params = params
        self.dtype = jnp.dtype(dtype)
        self.slots: dict[str, Slot] = opened.slots
        self.shapes = opened.shapes
        self.stored_dtypes = {name: opened.tensors.info(opened.stored[name]).dtype for name in opened.slots}
        self.unused = opened.unused()
        self._graphdef = abstract(self.model).graphdef
        self._forward = jax.jit(self.outputs)
        self._with_gradient = jax.jit(jax.value_and_grad(self._loss_and_outputs, has_aux=True))
        self._engine = Engine(cached(self.model, self.dtype))

    def __call__(self, **inputs: ArrayLike | None) -> dict[str, Any]:
        """The outputs by their names in transformers; hidden states as tuples of [B,S,D]."""
        with jax.default_matmul_precision("highest"):
            out = self._forward(self.params, self._inputs(inputs))
        return jax.tree.map(np.asarray, out)

    def grad(self, **inputs: ArrayLike | None) -> dict[str, np.ndarray]:
        """Gradient of the loss by tensor name; needs labels. A tied tensor has one, under its stored name."""
        return self.outputs_and_grad(**inputs)[1]

    def outputs_and_grad(self, **inputs: ArrayLike | None) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """What the call returns and `grad`, by one program."""
        arrays = self._inputs(inputs)
        if not forward.has_labels(self.model, self.config, arrays):
            raise UserError("grad: expected labels (or start_positions and end_positions), got none")
        with jax.default_matmul_precision("highest"):
            (_, out), grads = self._with_gradient(self.params, arrays)
        named = self._named(grads, {name: np.dtype(np.float32) for name in self.slots})
        return jax.tree.map(np.asarray, out), {name: g for name, g in named.items() if name not in BUFFERS}

    def generate(
        self,
        input_ids: ArrayLike,
        attention_mask: ArrayLike | None = None,
        decoder_input_ids: ArrayLike | None = None,
        return_dict_in_generate: bool = False,
        **options: Any,
    ) -> Any:
        """Greedy or beam search as `transformers.generate` -> ids [B * num_return_sequences, length].

        With `return_dict_in_generate` a dict of `sequences` and `sequences_scores`. The options not given come from
        generation_config.json, or from config.json where there is none.
        """
        if self.model.family == "encoder" or not isinstance(self.model.task, LanguageModeling):
            raise UserError(f"generate: {self.config['architectures'][0]} does not generate text")
        options = {name: v for name, v in options.items() if name not in ("use_cache", "output_scores")}
        plain = lambda v: v.tolist() if hasattr(v, "tolist") else v  # of numpy and torch
        options = {name: plain(v) for name, v in options.items()}
        start_id = options.pop("decoder_start_token_id", None)
        arrays = self._inputs({"input_ids": input_ids, "attention_mask": attention_mask})
        ids = arrays["input_ids"]
        prompts = ids if self.model.family == "decoder" else self._decoder_prompts(ids, decoder_input_ids, start_id)
        config = {**self.config, "decoder_start_token_id": None}
        s = generation_defaults(config, self.generation_config, prompt_len=prompts.shape[1], **options)
        mask = self._prompt_mask(arrays, options, s.eos_token_id)
        longest = self.model.max_seq_len
        used = prompts.shape[1] if self.model.family == "encoder_decoder" else int(mask.sum(axis=1).max())
        if longest is not None and used + s.max_new_tokens - 1 > longest:  # the last token is not read
            raise UserError(
                f"generate.max_new_tokens: expected at most {longest - used + 1} after a prompt of {used}, got "
                f"{s.max_new_tokens}; the model has {longest} positions"
            )
        first = jnp.argmax(mask, axis=1) if self.model.family == "decoder" else jnp.zeros(len(ids), jnp.int32)
        given, strategy = Given(ids, mask, prompts, ids, first), searching(s)
        with jax.default_matmul_precision("highest"):
            params = self._engine.split(self.params)  # anew each time: `load_state_dict` may have replaced them
            state = self._engine.start(params, given, None, strategy=strategy, new=s.max_new_tokens)
            state = self._engine.advance(params, state, s.max_new_tokens)
        found = strategy.found(state.choice)
        sequences = found.trim(prompts.shape[1])
        if not return_dict_in_generate:
            return sequences
        return {"sequences": sequences, "sequences_scores": found.scores}

    def state_dict(self) -> dict[str, np.ndarray]:
        """Every stored tensor by name, float32."""
        return self._named(self.params, {name: np.dtype(np.float32) for name in self.slots})

    def load_state_dict(self, tensors: Mapping[str, ArrayLike]) -> None:
        """Replaces all weights by tensors of the same names and shapes."""
        missing, extra = sorted(self.slots.keys() - tensors.keys()), sorted(tensors.keys() - self.slots.keys())
        if missing or extra:
            raise UserError(f"load_state_dict: expected the names of state_dict(), missing {missing}, unknown {extra}")
        read = lambda name: np.asarray(tensors[name])
        for name, slot in self.slots.items():
            if read(name).shape != slot.shape:
                raise UserError(f"load_state_dict: {name}: expected {list(slot.shape)}, got {list(read(name).shape)}")
        self.params = read_params(self.slots, self.shapes, read, one_device(self.shapes))

    def _named(self, params: dict, dtypes: Mapping[str, np.dtype]) -> dict[str, np.ndarray]:
        return dict(write_items(self.slots, paths(params), dtypes))

    def _inputs(self, inputs: Mapping[str, ArrayLike | None]) -> dict[str, jax.Array]:
        return read_inputs(self.model, self.family, self.config, inputs)

    def _prompt_mask(
        self, arrays: Mapping[str, jax.Array], options: Mapping[str, Any], ends: Sequence[int]
    ) -> jax.Array:
        """The mask as given, else all but padding: in transformers of decoders only, and not where it also ends
        texts."""
        ids = arrays["input_ids"]
        if "attention_mask" in arrays:
            return arrays["attention_mask"] != 0
        special = self.config if self.generation_config is None else self.generation_config
        pad = options.get("pad_token_id", special.get("pad_token_id"))
        if self.model.family != "decoder" or pad is None or pad in ends:
            return jnp.ones_like(ids, bool)
        return ids != pad

    def _decoder_prompts(self, ids: jax.Array, given: ArrayLike | None, start_id: Any) -> jax.Array:
        start = decoder_start(self.config, self.generation_config) if start_id is None else start_id
        if start is None:
            raise UserError("generate.decoder_start_token_id: expected an id, got none in config.json; pass it")
        first = jnp.full((ids.shape[0], 1), start, jnp.int32)
        if given is None:
            return first
        prompts = self._inputs({"input_ids": ids, "decoder_input_ids": given})["decoder_input_ids"]
        return jnp.concatenate([first, prompts], axis=1) if bool((prompts[:, 0] != start).all()) else prompts

    def outputs(self, params: dict, inputs: dict[str, jax.Array]) -> dict[str, Any]:
        """The outputs as traced by `jax`: for gradients and steps of training."""
        module = nnx.merge(self._graphdef, params)
        return forward.outputs(module, self.model, self.family, self.config, inputs, self.dtype)

    def _loss_and_outputs(self, params: dict, inputs: dict[str, jax.Array]) -> tuple[jax.Array, dict[str, Any]]:
        out = self.outputs(params, inputs)
        return out["loss"], out


def load(folder: str | Path, dtype: str = "float32", *, ignore_fields: Collection[str] = ()) -> HFModel:
    """The model in a folder as transformers writes it and the hub holds it, on one device. dtype: of the compute.
    ignore_fields: names of fields of config.json that are accepted though nobody here knows them."""
    if dtype not in DTYPES:
        raise UserError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    with open_folder(folder, ignore_fields) as opened:
        params = read_params(opened.slots, opened.shapes, opened.read, one_device(opened.shapes))
        return HFModel(opened, params, dtype)


def one_device(shapes: Mapping[str, Any]) -> dict[str, NamedSharding]:
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), ("x",))
    return dict.fromkeys(shapes, NamedSharding(mesh, PartitionSpec()))
