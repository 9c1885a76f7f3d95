"""config.json of a Hugging Face folder, in the spelling of transformers 5 and in older ones; every field accounted for.

A field is taken, known to say nothing about the numbers, or refused: a default in its place would be a wrong model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.errors import UserError, did_you_mean
from lm.nn.rope import DynamicScaling, LinearScaling, Llama3Scaling, Rope, Scaling, YarnScaling

REQUIRED: Any = object()  # None may be a default

# Say how a model is run, trained or generated from, not what it computes. Task and ids are read elsewhere.
COMMON = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path _num_labels add_cross_attention architectures
    attn_implementation auto_map bad_words_ids begin_suppress_tokens bos_token_id chunk_size_feed_forward
    cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample dtype early_stopping
    encoder_no_repeat_ngram_size eos_token_id exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id gradient_checkpointing id2label initializer_factor is_decoder is_encoder_decoder label2id
    language length_penalty max_length max_new_tokens min_length model_type no_repeat_ngram_size normalize_before
    normalize_embedding num_beam_groups num_beams num_labels num_return_sequences output_attentions
    output_hidden_states output_past output_scores pad_token_id prefix pretraining_tp problem_type pruned_heads
    remove_invalid_values repetition_penalty return_dict return_dict_in_generate sep_token_id suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache vocab_size_or_config_json_file
    """.split()
)

ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "silu": "silu",
    "swish": "silu",
    "tanh": "tanh",
}
ACTIVATION_NAMES = {"relu": "relu", "gelu": "gelu", "gelu_tanh": "gelu_new", "silu": "silu", "tanh": "tanh"}

TYPES: dict[type, tuple[type | tuple[type, ...], str]] = {
    int: (int, "an integer"),
    float: ((int, float), "a number"),
    bool: ((bool, int), "true or false"),
    str: (str, "a name"),
    list: (list, "a list"),
    dict: (dict, "an object"),
}


class Fields:
    """The fields of one config.json; `where` begins every error. stored: the tensors beside it, by name."""

    def __init__(self, config: Mapping[str, Any], where: str, stored: Mapping[str, np.ndarray]):
        self.config, self.where, self.stored = dict(config), where, stored
        self._taken: set[str] = set()

    def take(self, *names: str, default: Any = REQUIRED) -> Any:
        """The first of `names` that is there and not null, else `default`. All of them count as taken.

        It must be of the default's type; an integer where there is none.
        """
        self._taken |= set(names)
        for name in names:
            if self.config.get(name) is not None:
                self._check_type(name, int if default is REQUIRED else type(default))
                return self.config[name]
        if default is REQUIRED:
            raise UserError(
                f"{self.where}: expected the field {names[0]!r}, got none{did_you_mean(names[0], self.config)}; "
                "take the config.json that belongs to the weights"
            )
        return default

    def _check_type(self, name: str, kind: type) -> None:
        value = self.config[name]
        if kind in TYPES and not isinstance(value, TYPES[kind][0]):
            raise UserError(f"{self.where}: {name}: expected {TYPES[kind][1]}, got {value!r}")

    def given(self, name: str, *, default: Any) -> Any:
        """The field as it is there, null too, else `default`: of fields where null is a value."""
        self._taken.add(name)
        if self.config.get(name) is not None:
            self._check_type(name, type(default))
        return self.config.get(name, default)

    def windowed(self, n_layers: int, *, default: Sequence[bool]) -> tuple[bool, ...]:
        """Says which layers look back over a window only, by `layer_types`: the shortest pattern that repeats to it.

        default: of all layers, where the field is not there.
        """
        kinds = self.take("layer_types", default=None)
        known = {"sliding_attention": True, "full_attention": False}
        if kinds is not None and (len(kinds) != n_layers or not set(kinds) <= set(known)):
            raise UserError(
                f"{self.where}: layer_types: expected {' or '.join(known)} for each of {n_layers} layers, got {kinds}; "
                "other kinds of layers are not supported"
            )
        layers = tuple(default) if kinds is None else tuple(known[kind] for kind in kinds)
        periods = (n for n in range(1, n_layers) if all(layers[i] == layers[i % n] for i in range(n_layers)))
        return layers[: next(periods, n_layers)]

    def ignore(self, *names: str) -> None:
        """Takes fields that say nothing about what this family computes."""
        self._taken |= set(names)

    def expect(self, name: str, *values: Any, why: str) -> None:
        """Refuses a field that is there with another value than one of `values`; `why` says what is not supported."""
        self._taken.add(name)
        if name in self.config and self.config[name] not in values:
            expected = " or ".join(map(repr, values))
            raise UserError(f"{self.where}: {name}: expected {expected}, got {self.config[name]!r}; {why}")

    def tied(self, head: str, embed: str, *, default: bool) -> bool:
        """Says whether the head is the embedding: as tie_word_embeddings does, but that a head which is stored and
        differs is a head of its own, whatever the config says (T5 1.1 as transformers 5 writes it)."""
        tied = bool(self.take("tie_word_embeddings", default=default))
        if tied and head in self.stored and embed in self.stored:
            a, b = self.stored[head], self.stored[embed]
            return a.shape == b.shape and bool(np.array_equal(a, b))
        return tied

    def activation(self, *names: str, default: Any = REQUIRED) -> Any:
        """Our name of an activation."""
        theirs = self.take(*names, default=default)
        if theirs not in ACTIVATIONS:
            raise UserError(
                f"{self.where}: {names[0]}: expected one of {', '.join(sorted(ACTIVATIONS))}, got {theirs!r}; "
                "this activation is not supported"
            )
        return ACTIVATIONS[theirs]

    def rope(self, *, theta: float = 10_000.0, fraction: float = 1.0, key: str | None = None) -> Rope:
        """Rotary positions: `rope_parameters` of transformers 5 (`key`: the part of one layer type), or the older
        rope_theta, rope_scaling, partial_rotary_factor, rotary_pct and rotary_emb_base. theta, fraction: the family's
        defaults."""
        rope = self.take("rope_parameters", default={})
        rope = rope.get(key, rope) if key is not None else rope
        old = self.take("rope_scaling", default={})
        return self.rope_of(
            dict(rope or old),
            theta=self.take("rope_theta", "rotary_emb_base", default=theta),
            fraction=self.take("partial_rotary_factor", "rotary_pct", default=fraction),
        )

    def rope_of(self, rope: dict[str, Any], *, theta: float, fraction: float) -> Rope:
        """Reads rotary positions from one dict of parameters."""
        theta = float(rope.pop("rope_theta", theta))
        fraction = float(rope.pop("partial_rotary_factor", fraction))
        kind, old_kind = rope.pop("rope_type", None), rope.pop("type", None)
        kind = kind or old_kind or "default"
        kind = "linear" if kind == "default" and "factor" in rope else kind
        scaling = None if kind == "default" else self._scaling(kind, rope)
        rope.pop("original_max_position_embeddings", None)
        if rope:
            name = sorted(rope)[0]
            raise UserError(f"{self.where}: rope_parameters.{name}: rope type {kind!r} has no such field")
        return Rope(theta=theta, fraction=fraction, scaling=scaling)

    def _scaling(self, kind: str, rope: dict[str, Any]) -> Scaling:
        longest = self.config.get("max_position_embeddings")
        original = rope.get("original_max_position_embeddings") or longest

        def number(name: str, default: Any = REQUIRED) -> float:
            value = rope.pop(name, None)
            if value is None and default is REQUIRED:
                raise UserError(f"{self.where}: rope_parameters.{name}: expected a number for rope type {kind!r}")
            return default if value is None else value

        if kind == "linear":
            return LinearScaling(factor=float(number("factor")))
        if kind == "dynamic":
            return DynamicScaling(factor=float(number("factor")), max_positions=int(original or 0))
        if kind == "llama3":
            return Llama3Scaling(
                factor=float(number("factor")),
                low_freq_factor=float(number("low_freq_factor")),
                high_freq_factor=float(number("high_freq_factor")),
                original_max_positions=int(original or 0),
            )
        if kind == "yarn":
            optional = {n: number(n, None) for n in ("attention_factor", "mscale", "mscale_all_dim")}
            return YarnScaling(
                factor=float(number("factor")),
                original_max_positions=int(original or 0),
                beta_fast=float(number("beta_fast", 32.0)),
                beta_slow=float(number("beta_slow", 1.0)),
                truncate=bool(rope.pop("truncate", True)),
                **{n: None if v is None else float(v) for n, v in optional.items()},
            )
        known = ("default", "linear", "dynamic", "llama3", "yarn")
        raise UserError(
            f"{self.where}: rope_type: expected one of {', '.join(known)}, got {kind!r}{did_you_mean(kind, known)}"
        )

    def done(self) -> None:
        """Refuses what was not taken: a field that may change the numbers."""
        if self.config.get("quantization_config") is not None:
            raise UserError(
                f"{self.where}: quantization_config: quantized weights are not supported; take the full ones"
            )
        unknown = sorted(self.config.keys() - self._taken - COMMON)
        if unknown:
            guess = did_you_mean(unknown[0], self._taken)
            more = f" (and {', '.join(unknown[1:4])})" if unknown[1:] else ""
            raise UserError(
                f"{self.where}: unknown field {unknown[0]!r} = {self.config[unknown[0]]!r}{more}{guess}; a "
                f"{self.config.get('model_type')} with it may compute something else, so it is refused"
            )


def rope_parameters(rope: Rope) -> dict[str, Any]:
    """The inverse of `Fields.rope`, in the spelling of transformers 5."""
    out: dict[str, Any] = {"rope_type": "default", "rope_theta": rope.theta}
    if rope.fraction != 1.0:
        out["partial_rotary_factor"] = rope.fraction
    s = rope.scaling
    if isinstance(s, LinearScaling):
        out |= {"rope_type": "linear", "factor": s.factor}
    elif isinstance(s, DynamicScaling):
        out |= {"rope_type": "dynamic", "factor": s.factor}
    elif isinstance(s, Llama3Scaling):
        out |= {
            "rope_type": "llama3",
            "factor": s.factor,
            "low_freq_factor": s.low_freq_factor,
            "high_freq_factor": s.high_freq_factor,
            "original_max_position_embeddings": s.original_max_positions,
        }
    elif isinstance(s, YarnScaling):
        out |= {
            "rope_type": "yarn",
            "factor": s.factor,
            "original_max_position_embeddings": s.original_max_positions,
            "beta_fast": s.beta_fast,
            "beta_slow": s.beta_slow,
            "truncate": s.truncate,
        }
        optional = {"attention_factor": s.attention_factor, "mscale": s.mscale, "mscale_all_dim": s.mscale_all_dim}
        out |= {name: value for name, value in optional.items() if value is not None}
    else:
        assert s is None, s
    return out


def max_positions(rope: Rope) -> dict[str, int]:
    """max_position_embeddings, where the scaling depends on it."""
    return {"max_position_embeddings": rope.scaling.max_positions} if isinstance(rope.scaling, DynamicScaling) else {}
