"""What a model folder says of generation: the search that `transformers.generate` 5.23 would do, and a first token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm.errors import UserError, did_you_mean
from lm.generation.processors import Search

# Of transformers' names: those that only a draw looks at, and those that ask for another algorithm. Each with the
# values under which it does nothing; None is always one.
_SAMPLING: dict[str, tuple[object, ...]] = {
    "temperature": (1.0,),
    "top_k": (0, 50),
    "top_p": (1.0,),
    "min_p": (),
    "top_h": (),
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
}
_OTHER: dict[str, tuple[object, ...]] = {
    "num_beam_groups": (1,),
    "diversity_penalty": (0.0,),
    "penalty_alpha": (0.0,),
    "dola_layers": (),
    "constraints": (),
    "force_words_ids": (),
    "guidance_scale": (1,),
    "prompt_lookup_num_tokens": (),
    "assistant_early_exit": (),
    "use_mtp": (False,),
    "stop_strings": (),
    "max_time": (),
    "watermarking_config": (),
    "token_healing": (False,),
}
# The names under which old configs have the number of positions.
_POSITIONS = {"n_positions": {"codegen", "ctrl", "gpt2", "gpt_bigcode", "gptj", "openai-gpt"}, "max_seq_len": {"dbrx"}}


def generation_defaults(
    config: dict[str, Any], generation_config: dict[str, Any] | None, *, prompt_len: int, **kwargs: Any
) -> Search:
    """Reads config.json and generation_config.json of a model, and arguments of `generate`: what `generate` would do.

    The arguments come first, then generation_config.json, and only where there is none the old fields of config.json
    and of its text part; then the defaults of `transformers`, among them 20 new tokens, as far as the positions go.
    max_length and min_length count prompt_len, that of the decoder; max_new_tokens and min_new_tokens win over them.

    UserError for an unknown argument, for do_sample=True, and for what a search cannot do.
    """
    try:
        return _search(config, generation_config, prompt_len, kwargs)
    except UserError:
        raise
    except (TypeError, ValueError, LookupError) as e:  # of a list or an object with other things in it
        raise UserError(
            f"generate: expected the settings of a search, got one of another kind ({e}); mend generation_config.json"
        ) from e


def _search(
    config: dict[str, Any], generation_config: dict[str, Any] | None, prompt_len: int, kwargs: Mapping[str, Any]
) -> Search:
    names = set(Search.__dataclass_fields__) | {"max_length", "do_sample", *_SAMPLING, *_OTHER}
    for name, value in kwargs.items():
        if name not in names:
            raise UserError(f"generate.{name}: expected an argument of a search, got none{did_you_mean(name, names)}")
        if name in _SAMPLING and value is not None and value not in _SAMPLING[name]:
            raise UserError(f"generate.{name}: expected nothing in a search, got {value!r}; use lm.generation.Sampling")
    given = {**(_legacy(config) if generation_config is None else generation_config), **kwargs}
    given = {name: value for name, value in given.items() if name in names and value is not None}
    if given.pop("do_sample", False):
        raise UserError(
            "generate.do_sample: expected False in a search, got True; pass do_sample=False, or use "
            "lm.generation.Sampling, which draws"
        )
    for name, neutral in _OTHER.items():
        if name in given and given[name] not in neutral:
            raise UserError(f"generate.{name}: expected none in a search, got {given[name]!r}; pass {name}=None")
    given = {name: value for name, value in given.items() if name not in {*_SAMPLING, *_OTHER}}

    max_length = given.pop("max_length", None)
    if "max_new_tokens" not in given:
        if max_length is None:
            max_length = min(20 + prompt_len, _positions(config))
        if max_length <= prompt_len:
            raise UserError(f"generate.max_length: expected more than the prompt's {prompt_len}, got {max_length}")
        given["max_new_tokens"] = max_length - prompt_len
    if "min_new_tokens" in given:
        given["min_length"] = 0
    given["eos_token_id"] = _ids("eos_token_id", given.get("eos_token_id"))
    # Without an end token no row is shorter than another, and nothing is padded.
    given.setdefault("pad_token_id", next(iter(given["eos_token_id"]), 0))
    return Search(**{name: _frozen(value) for name, value in given.items()})


def end_ids(*sources: Mapping[str, Any] | None) -> tuple[int, ...]:
    """Reads every end token that the files of a model name, in their order. `generate` of transformers knows those of
    one file alone; what another calls an end is an end to who reads the text."""
    named = (i for source in sources for i in _ids("eos_token_id", (source or {}).get("eos_token_id")))
    return tuple(dict.fromkeys(named))


def decoder_start(config: Mapping[str, Any], generation_config: Mapping[str, Any] | None) -> int | None:
    """Reads the first token of an encoder-decoder's decoder from the same files; None where they name none."""
    sources = (config if generation_config is None else generation_config, config)
    named = (source.get(name) for source in sources for name in ("decoder_start_token_id", "bos_token_id"))
    return next((i for i in named if i is not None), None)


def _ids(name: str, value: Any) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise UserError(f"generate.{name}: expected an id or a list of ids, got {value!r}")
    return ids


def _legacy(config: dict[str, Any]) -> dict[str, Any]:
    given = {name: value for name, value in config.items() if value is not None}
    text: dict[str, Any] = next(
        (config[name] for name in ("decoder", "generator", "text_config") if config.get(name)), {}
    )
    given = {**text, **given}
    if given.get("force_bos_token_to_be_generated"):
        given["forced_bos_token_id"] = given.get("bos_token_id")
    return given


def _positions(config: dict[str, Any]) -> float:
    for name, kinds in _POSITIONS.items():
        if config.get("model_type") in kinds and name in config:
            return config[name]
    return config.get("max_position_embeddings") or float("inf")


def _frozen(value: Any) -> Any:
    value = list(value.items()) if isinstance(value, dict) else value
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
