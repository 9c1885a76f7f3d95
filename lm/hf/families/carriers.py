"""Fields of config.json that say nothing about what a model computes, each with who writes it.

A field that is in none of these lists is refused unless its family reads it, or it is null.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

# Of every config of transformers: how a model is run, trained or generated from. Task and ids are read elsewhere.
COMMON = frozenset(
    """
    _name_or_path _num_labels add_cross_attention architectures auto_map bad_words_ids begin_suppress_tokens
    bos_token_id chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id diversity_penalty do_sample
    dtype early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty eos_token_id
    exponential_decay_length_penalty finetuning_task forced_bos_token_id forced_eos_token_id gradient_checkpointing
    id2label initializer_factor is_decoder is_encoder_decoder label2id language length_penalty max_length max_new_tokens
    min_length min_new_tokens model_type no_repeat_ngram_size normalize_before normalize_embedding num_beam_groups
    num_beams num_labels num_return_sequences output_attentions output_hidden_states output_past output_scores
    pad_token_id prefix pretraining_tp problem_type pruned_heads remove_invalid_values renormalize_logits
    repetition_penalty return_dict return_dict_in_generate sep_token_id sequence_bias suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torch_dtype
    torchscript transformers_version typical_p use_bfloat16 use_cache vocab_size_or_config_json_file
    """.split()
)

CARRIERS = COMMON | frozenset(
    # Which kernel attends or runs the experts: transformers from 4.36 on, and who patches it.
    """
    _attn_implementation _attn_implementation_autoset _attn_implementation_internal attn_implementation
    _experts_implementation _experts_implementation_internal experts_implementation _flash_attn_2_enabled
    flash_attention use_flash_attention use_flash_attention_2 use_flash_attn
    """.split()
    # Where a config came from, by the library that loads it; the composition of a config; TensorFlow's and XLA's.
    + "_commit_hash _from_model_config name_or_path is_composition use_return_dict use_xla xla_device".split()
    # Ids that a tokenizer has, and the length that it cuts texts to: LLaMA's first conversions, LLaVA.
    + "cls_token_id mask_token_id unk_token_id".split()
    + "max_sequence_length model_max_length tokenizer_model_max_length tokenizer_padding_side".split()
    # nanotron's conversion (SmolLM2): that the layout is LLaMA's, which model_type says.
    + ["is_llama_config"]
    # transformers.js, ONNX in browsers: dtypes and cache of its exports.
    + ["transformers.js_config"]
    # sentence-transformers' CrossEncoder: what it applies to the logits of a classifier after the model.
    + ["sentence_transformers", "sbert_ce_default_activation_function"]
    # Pipelines with code of their own (Dolly); FARM's names of the model; distillations of BART and its conversion.
    + "custom_pipelines name replacing_rate save_step student_decoder_layers student_encoder_layers".split()
    # Whether there are biases, in classes that do not ask: the tensors tell, and each is accounted for.
    + ["attention_bias", "mlp_bias"]
    # Settings of `generate` of which a search here has none, from before generation_config.json (transformers < 4.26).
    + "cache_implementation epsilon_cutoff eta_cutoff forced_decoder_ids guidance_scale max_time penalty_alpha".split()
)

# Whose every field is of its own: Unsloth marks what it mended and with which version (unsloth_fixed, ...).
PREFIXES = ("unsloth_",)

# Fields of others, with the values that say what every model here does.
INERT: Mapping[str, tuple[Any, ...]] = {
    "rope_interleaved": (False,),  # nanotron: halves are rotated, as here
    "do_blenderbot_90_layernorm": (False,),  # the conversion of BlenderBot, in configs of BART
}

# Within rope_parameters or rope_scaling: YaRN's authors say that their model was trained on with it.
ROPE_CARRIERS = frozenset({"finetuned"})


def unknown(config: Mapping[str, Any], taken: Iterable[str]) -> list[str]:
    """The fields that may change what is computed, sorted. A null says no more than a field that is not there: of
    those where it does, the family takes the name."""
    names = config.keys() - set(taken) - CARRIERS
    return sorted(name for name in names if config[name] is not None and not name.startswith(PREFIXES))
