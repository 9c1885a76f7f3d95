"""Small random models of transformers, one for each thing that can go wrong, and the inputs they are compared on.

No weight is special: biases are not zero, scales not one, layers differ. Sizes are odd and differ from each other.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

V = 97
PAD, BOS, EOS = 0, 1, 2


@dataclasses.dataclass(frozen=True)
class Case:
    """`cls` and `config`: names in transformers; `fields` of the config. atol: of logits and hidden states."""

    name: str
    cls: str
    config: str
    fields: dict[str, Any]
    atol: float = 1e-4

    @property
    def family(self) -> str:
        return self.config.removesuffix("Config")


def _decoder(config: str, cls: str, base: dict[str, Any]):
    def case(name: str, cls: str = cls, atol: float = 1e-4, **fields: Any) -> Case:
        ids = {"vocab_size": V, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
        return Case(name, cls, config, ids | base | fields, atol)

    return case


gpt2 = _decoder("GPT2Config", "GPT2LMHeadModel", {"n_positions": 32, "n_embd": 24, "n_layer": 3, "n_head": 4})
gpt_neo = _decoder(
    "GPTNeoConfig",
    "GPTNeoForCausalLM",
    {
        "max_position_embeddings": 32,
        "hidden_size": 24,
        "num_layers": 4,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 4,
        "intermediate_size": 41,
    },
)
gpt_neox = _decoder(
    "GPTNeoXConfig",
    "GPTNeoXForCausalLM",
    {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 41,
        "max_position_embeddings": 32,
    },
)
opt = _decoder(
    "OPTConfig",
    "OPTForCausalLM",
    {
        "hidden_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "ffn_dim": 41,
        "max_position_embeddings": 32,
        "word_embed_proj_dim": 24,
    },
)
LLAMA = {
    "hidden_size": 24,
    "intermediate_size": 41,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 10,
    "max_position_embeddings": 32,
}
llama = _decoder("LlamaConfig", "LlamaForCausalLM", LLAMA)
mistral = _decoder("MistralConfig", "MistralForCausalLM", LLAMA | {"sliding_window": 4})
qwen2 = _decoder("Qwen2Config", "Qwen2ForCausalLM", {k: v for k, v in LLAMA.items() if k != "head_dim"})
qwen3 = _decoder("Qwen3Config", "Qwen3ForCausalLM", LLAMA)
GEMMA = LLAMA | {"num_hidden_layers": 4}
gemma = _decoder("GemmaConfig", "GemmaForCausalLM", GEMMA | {"num_key_value_heads": 1})
GEMMA2 = GEMMA | {"query_pre_attn_scalar": 20, "sliding_window": 4}
gemma2 = _decoder("Gemma2Config", "Gemma2ForCausalLM", GEMMA2)
gemma3 = _decoder("Gemma3TextConfig", "Gemma3ForCausalLM", GEMMA2 | {"num_hidden_layers": 7})
mixtral = _decoder("MixtralConfig", "MixtralForCausalLM", LLAMA | {"num_local_experts": 4, "num_experts_per_tok": 2})
qwen3_moe = _decoder(
    "Qwen3MoeConfig",
    "Qwen3MoeForCausalLM",
    LLAMA | {"moe_intermediate_size": 23, "num_experts": 4, "num_experts_per_tok": 2},
)

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "beta_fast": 4.0}
YARN |= {"original_max_position_embeddings": 64}


def rope(**parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0} | parameters}


DECODERS = [
    gpt2("gpt2"),
    gpt2("gpt2 variant", n_inner=41, activation_function="gelu", layer_norm_epsilon=0.01, tie_word_embeddings=False,
         scale_attn_by_inverse_layer_idx=True),
    gpt2("gpt2 unscaled", scale_attn_weights=False),
    gpt2("gpt2 sequence labels", "GPT2ForSequenceClassification", num_labels=3),
    gpt2("gpt2 token labels", "GPT2ForTokenClassification", num_labels=5),
    gpt2("gpt2 spans", "GPT2ForQuestionAnswering"),
    gpt_neo("gpt_neo"),
    gpt_neo("gpt_neo sequence labels", "GPTNeoForSequenceClassification", num_labels=3),
    gpt_neo("gpt_neo token labels", "GPTNeoForTokenClassification", num_labels=3),
    gpt_neo("gpt_neo spans", "GPTNeoForQuestionAnswering"),
    gpt_neox("gpt_neox"),
    gpt_neox("gpt_neox sequential", use_parallel_residual=False, hidden_act="gelu_fast", tie_word_embeddings=True,
             **rope(partial_rotary_factor=0.5, rope_theta=500.0)),
    gpt_neox("gpt_neox without bias", attention_bias=False),
    gpt_neox("gpt_neox sequence labels", "GPTNeoXForSequenceClassification", num_labels=3),
    gpt_neox("gpt_neox token labels", "GPTNeoXForTokenClassification", num_labels=3),
    gpt_neox("gpt_neox spans", "GPTNeoXForQuestionAnswering"),
    opt("opt"),
    opt("opt post-norm", do_layer_norm_before=False, word_embed_proj_dim=14),
    opt("opt without bias", enable_bias=False),
    opt("opt sequence labels", "OPTForSequenceClassification", num_labels=3),
    opt("opt spans", "OPTForQuestionAnswering"),
    llama("llama"),
    llama("llama3", rms_norm_eps=1e-3, rope_parameters=LLAMA3),
    llama("llama linear", num_key_value_heads=1, head_dim=12, attention_bias=True, mlp_bias=True,
          tie_word_embeddings=True, **rope(rope_type="linear", factor=4.0)),
    llama("llama dynamic", max_position_embeddings=6, **rope(rope_type="dynamic", factor=2.0)),
    llama("llama yarn", head_dim=16, rope_parameters=YARN),
    llama("llama sequence labels", "LlamaForSequenceClassification", num_labels=4),
    llama("llama token labels", "LlamaForTokenClassification", num_labels=4),
    llama("llama spans", "LlamaForQuestionAnswering"),
    mistral("mistral"),
    mistral("mistral full", sliding_window=None),
    mistral("mistral sequence labels", "MistralForSequenceClassification", num_labels=4),
    qwen2("qwen2", tie_word_embeddings=True),
    qwen2("qwen2 windows", use_sliding_window=True, sliding_window=4, max_window_layers=1),
    qwen3("qwen3"),
    qwen3("qwen3 biased", attention_bias=True, tie_word_embeddings=True),
    gemma("gemma"),
    gemma("gemma token labels", "GemmaForTokenClassification", num_labels=3),
    gemma2("gemma2", attn_logit_softcapping=3.0, final_logit_softcapping=4.0),
    gemma3("gemma3", rope_parameters={
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }, layer_types=["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]),
    mixtral("mixtral", router_aux_loss_coef=0.05, output_router_logits=True),
    mixtral("mixtral one expert, window", num_experts_per_tok=1, num_local_experts=3, sliding_window=4),
    mixtral("mixtral sequence labels", "MixtralForSequenceClassification", num_labels=3),
    qwen3_moe("qwen3_moe", norm_topk_prob=False, mlp_only_layers=[1], router_aux_loss_coef=0.05,
              output_router_logits=True),
    qwen3_moe("qwen3_moe sparse step", norm_topk_prob=True, decoder_sparse_step=2, num_hidden_layers=4),
]  # fmt: skip


BERT = {
    "vocab_size": V,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 41,
    "max_position_embeddings": 32,
}


def bert(name: str, cls: str, **fields: Any) -> Case:
    return Case(name, f"BertFor{cls}", "BertConfig", BERT | fields)


def roberta(name: str, cls: str, **fields: Any) -> Case:
    ids = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
    return Case(name, f"RobertaFor{cls}", "RobertaConfig", BERT | ids | fields)


def albert(name: str, cls: str, **fields: Any) -> Case:
    return Case(name, f"AlbertFor{cls}", "AlbertConfig", BERT | {"embedding_size": 14} | fields)


ENCODERS = [
    bert("bert", "PreTraining"),
    bert("bert masked lm", "MaskedLM", hidden_act="gelu_new", layer_norm_eps=0.01),
    bert("bert untied", "MaskedLM", tie_word_embeddings=False, hidden_act="relu", type_vocab_size=3),
    bert("bert sequence labels", "SequenceClassification", num_labels=3),
    bert("bert regression", "SequenceClassification", num_labels=1),
    bert("bert multi label", "SequenceClassification", num_labels=3, problem_type="multi_label_classification"),
    bert("bert token labels", "TokenClassification", num_labels=5),
    bert("bert spans", "QuestionAnswering"),
    roberta("roberta", "MaskedLM", layer_norm_eps=1e-5),
    roberta("roberta sequence labels", "SequenceClassification", num_labels=3),
    roberta("roberta token labels", "TokenClassification", num_labels=3),
    roberta("roberta spans", "QuestionAnswering"),
    albert("albert", "PreTraining", hidden_act="gelu_new"),
    albert("albert groups", "MaskedLM", num_hidden_layers=4, num_hidden_groups=2, inner_group_num=2, hidden_act="gelu"),
    albert("albert sequence labels", "SequenceClassification", num_labels=3),
    albert("albert token labels", "TokenClassification", num_labels=3),
    albert("albert spans", "QuestionAnswering"),
]

BART = {
    "vocab_size": V,
    "d_model": 24,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 3,
    "encoder_ffn_dim": 41,
    "decoder_ffn_dim": 37,
    "max_position_embeddings": 32,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": 2,
}


def bart(name: str, cls: str, **fields: Any) -> Case:
    return Case(name, f"BartFor{cls}", "BartConfig", BART | fields)


def mbart(name: str, cls: str, **fields: Any) -> Case:
    return Case(name, f"MBartFor{cls}", "MBartConfig", BART | fields)


def marian(name: str, **fields: Any) -> Case:
    ids = {"pad_token_id": V - 1, "eos_token_id": 0, "forced_eos_token_id": 0, "decoder_start_token_id": V - 1}
    base = BART | {"scale_embedding": True, "activation_function": "swish", "decoder_vocab_size": V} | ids
    return Case(name, "MarianMTModel", "MarianConfig", base | fields)


def t5(name: str, cls: str = "ForConditionalGeneration", atol: float = 1e-4, **fields: Any) -> Case:
    base = {
        "vocab_size": V,
        "d_model": 24,
        "d_kv": 10,
        "d_ff": 41,
        "num_layers": 2,
        "num_decoder_layers": 3,
        "num_heads": 3,
        "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    return Case(name, f"T5{cls}", "T5Config", base | fields, atol)


ENCODER_DECODERS = [
    t5("t5"),
    t5("t5 gated", feed_forward_proj="gated-gelu", tie_word_embeddings=False, atol=1e-3),
    t5("t5 sequence labels", "ForSequenceClassification", num_labels=3),
    t5("t5 token labels", "ForTokenClassification", num_labels=3),
    t5("t5 spans", "ForQuestionAnswering"),
    bart("bart", "ConditionalGeneration"),
    bart("bart scaled", "ConditionalGeneration", scale_embedding=True, activation_function="gelu_new"),
    bart("bart sequence labels", "SequenceClassification", num_labels=3),
    bart("bart spans", "QuestionAnswering"),
    mbart("mbart", "ConditionalGeneration", scale_embedding=True, activation_function="relu"),
    mbart("mbart sequence labels", "SequenceClassification", num_labels=3),
    mbart("mbart spans", "QuestionAnswering"),
    marian("marian"),
    marian("transformer", activation_function="relu", share_encoder_decoder_embeddings=False, tie_word_embeddings=False,
           decoder_vocab_size=79, decoder_start_token_id=78, pad_token_id=78),
]  # fmt: skip

CASES = {case.name: case for case in (*DECODERS, *ENCODERS, *ENCODER_DECODERS)}
TEXT = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration", "MTModel")  # classes that generate
GENERATORS = {name: case for name, case in CASES.items() if case.cls.endswith(TEXT)}


# One of each family, for what takes long to compile.
EACH = (
    *("gpt2", "gpt_neo", "gpt_neox", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3"),
    *("mixtral", "qwen3_moe", "bert", "roberta", "albert", "t5", "t5 gated", "bart", "mbart", "marian", "transformer"),
)
# Their gradients differ from those of another case by a constant or by a head that is tested with another family.
ALIKE = {
    *("gpt2 unscaled", "gpt_neo sequence labels", "gpt_neo token labels", "gpt_neo spans", "gpt_neox sequence labels"),
    *("gpt_neox token labels", "gpt_neox spans", "opt sequence labels", "opt spans", "llama token labels"),
    *("llama spans", "mistral full", "mistral sequence labels", "gemma token labels", "mixtral sequence labels"),
    *("bert token labels", "roberta token labels", "roberta spans", "albert token labels", "albert spans"),
    *("mbart sequence labels", "mbart spans", "bart spans"),
}


@functools.cache
def reference(name: str):
    """The torch model of a case, in evaluation mode, with eager attention and random weights."""
    import torch
    import transformers

    case = CASES[name]
    config = getattr(transformers, case.config)(**case.fields)
    torch.manual_seed(0)
    cls = getattr(transformers, case.cls)
    config._experts_implementation = "eager"  # the grouped kernel wants sizes that are multiples of 16
    model = cls._from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(1)
    weights = [p for p in model.parameters() if p.requires_grad]  # not the sinusoids of Marian
    with torch.no_grad():
        for tensor in [*weights, *(b for n, b in model.named_buffers() if n == "final_logits_bias")]:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.15)
    return model


def rows(name: str, length: int = 11) -> dict[str, np.ndarray]:
    """input_ids and attention_mask [3, length]: a whole row, one padded on the right, one on the left."""
    config = reference(name).config
    rng = np.random.default_rng(len(name))
    ids = rng.integers(4, min(V, 70), (3, length))
    mask = np.ones_like(ids)
    mask[1, length - 3 :] = 0
    mask[2, :4] = 0
    pad = config.pad_token_id
    return {"input_ids": np.where(mask, ids, 0 if pad is None else pad), "attention_mask": mask}


def inputs(name: str) -> dict[str, np.ndarray]:
    """All that the forward pass and the loss of a case take."""
    case, config = CASES[name], reference(name).config
    rng = np.random.default_rng(7)
    batch = rows(name)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    labelled = mask.astype(bool) & (np.cumsum(mask, axis=1) > 1)  # the first token of a row is predicted from padding
    if case.family in ("Bert", "Albert"):
        batch["token_type_ids"] = (np.arange(ids.shape[1]) > 5) * np.ones_like(ids)
    if case.cls.endswith("ForSequenceClassification"):
        if config.num_labels == 1:
            batch["labels"] = rng.normal(size=3).astype(np.float32)
        elif config.problem_type == "multi_label_classification":
            batch["labels"] = rng.integers(0, 2, (3, config.num_labels)).astype(np.float32)
        else:
            batch["labels"] = rng.integers(0, config.num_labels, 3)
        if case in ENCODER_DECODERS:  # pooled at the end token, of which every row has as many
            ids[0, -1] = ids[1, 7] = ids[2, -1] = config.eos_token_id
    elif case.cls.endswith("ForTokenClassification"):
        batch["labels"] = np.where(labelled, rng.integers(0, config.num_labels, ids.shape), -100)
    elif case.cls.endswith("ForQuestionAnswering"):
        batch |= {"start_positions": np.array([1, 3, 5]), "end_positions": np.array([4, 3, 50])}
        if case in DECODERS:  # a span is chosen among all places, those of padding before the text too
            mask[2] = 1
    elif case in ENCODER_DECODERS:
        size = getattr(config, "decoder_vocab_size", None) or V
        labels = rng.integers(4, size - 2, (3, 7))
        labels[1, 5:] = -100
        batch["labels"] = labels
    else:
        chosen = rng.random(ids.shape) < 0.4 if case in ENCODERS else True
        batch["labels"] = np.where(labelled & chosen, rng.integers(4, V, ids.shape) if case in ENCODERS else ids, -100)
        if case.cls == "BertForPreTraining":
            batch["next_sentence_label"] = np.array([0, 1, 1])
        if case.cls == "AlbertForPreTraining":
            batch["sentence_order_label"] = np.array([0, 1, 1])
    return batch


def real(name: str, batch: dict[str, np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    """Which places of an output of this shape are compared: not those of padding."""
    mask = batch["attention_mask"].astype(bool)
    return mask if tuple(shape[:2]) == mask.shape else np.ones(shape[:1], bool)
