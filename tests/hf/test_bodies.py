"""Classes without a head: hidden states and pooler are those of transformers, and the folder comes back as it was."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from lm import hf
from lm.errors import UserError
from tests.halves import slow_but
from tests.hf.cases import CASES, rows

pytestmark = pytest.mark.hf
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.numpy")

# Class -> the case whose config it has. What is stored under a prefix, and what is tied, differs from family to family.
BODIES = {
    "GPT2Model": "gpt2",
    "GPTNeoModel": "gpt_neo",
    "GPTNeoXModel": "gpt_neox",
    "OPTModel": "opt post-norm",
    "LlamaModel": "llama3",
    "MistralModel": "mistral",
    "Qwen2Model": "qwen2",
    "Qwen3Model": "qwen3 biased",
    "GemmaModel": "gemma",
    "Gemma2Model": "gemma2",
    "Gemma3TextModel": "gemma3",
    "MixtralModel": "mixtral",
    "Qwen3MoeModel": "qwen3_moe",
    "BertModel": "bert",
    "RobertaModel": "roberta",
    "AlbertModel": "albert groups",
    "T5Model": "t5",
    "T5EncoderModel": "t5 gated",
    "BartModel": "bart",
    "MBartModel": "mbart",
    "MarianModel": "transformer",
}
FEW = ("GPT2Model", "OPTModel", "LlamaModel", "BertModel", "AlbertModel", "T5EncoderModel", "BartModel")


class Made(NamedTuple):
    model: object
    folder: Path


def make(name: str, folder: Path, **options) -> Made:
    """A torch model of the class with random weights, none of them special, and its folder."""
    config = getattr(transformers, CASES[BODIES[name]].config)(**CASES[BODIES[name]].fields)
    config._experts_implementation = "eager"
    torch.manual_seed(0)
    kind = getattr(transformers, name)
    model = kind._from_config(config, attn_implementation="eager", dtype=torch.float32, **options).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in model.parameters():
            if x.requires_grad:
                x.add_(torch.randn(x.shape, generator=generator) * 0.15)
    model.save_pretrained(folder)
    return Made(model, folder)


def loads_quietly(name: str, path: Path, caplog):
    transformers.utils.logging.enable_propagation()
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = getattr(transformers, name).from_pretrained(
            path, attn_implementation="eager", output_loading_info=True
        )
    assert not any(info.values()), info
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")], caplog.text
    return model.eval()


def batch_of(name: str, made: Made) -> dict[str, np.ndarray]:
    batch = rows(BODIES[name])
    if name in ("BertModel", "AlbertModel"):
        batch["token_type_ids"] = (np.arange(batch["input_ids"].shape[1]) > 5) * np.ones_like(batch["input_ids"])
    if made.model.config.is_encoder_decoder and name != "T5EncoderModel":
        batch["decoder_input_ids"] = np.random.default_rng(5).integers(4, 70, (3, 7))
    return batch


def assert_same_states(name: str, made: Made, model: hf.HFModel) -> None:
    batch = batch_of(name, made)
    with torch.no_grad():
        theirs = made.model(**{k: torch.from_numpy(v) for k, v in batch.items()}, output_hidden_states=True)
    ours = model(**batch)
    real = batch["attention_mask"].astype(bool)
    compared = 0
    for key, value in theirs.items():
        if key in ("past_key_values", "router_logits") or value is None:
            continue
        pairs = zip(ours[key], value, strict=True) if isinstance(value, tuple) else [(ours[key], value)]
        for a, b in pairs:
            at = real if b.ndim == 3 and b.shape[:2] == real.shape else ...
            np.testing.assert_allclose(a[at], b.numpy()[at], rtol=0, atol=CASES[BODIES[name]].atol, err_msg=key)
            compared += 1
    assert compared > 3


@pytest.mark.parametrize("name", slow_but(FEW, BODIES))
def test_states_are_those_of_transformers_and_the_folder_comes_back(name, tmp_path, caplog):
    made = make(name, tmp_path / "source")
    model = hf.load(made.folder)
    assert_same_states(name, made, model)
    hf.save(model, tmp_path / "out")
    assert_same_folder(made.folder, tmp_path / "out")
    loads_quietly(name, tmp_path / "out", caplog)
    stored = safetensors.load_file(made.folder / "model.safetensors").keys()
    assert {*model.state_dict(), *model.unused} == stored and not model.state_dict().keys() & model.unused.keys()


def assert_same_folder(before: Path, after: Path) -> None:
    one, other = (json.loads((path / "config.json").read_text()) for path in (before, after))
    assert one == other
    one, other = (safetensors.load_file(path / "model.safetensors") for path in (before, after))
    assert one.keys() == other.keys()
    for key, x in one.items():
        np.testing.assert_array_equal(x, other[key], err_msg=key)


@pytest.mark.parametrize("name", ["BertModel", "RobertaModel", "AlbertModel"])
def test_a_body_without_a_pooler_has_no_pooled_output(name, tmp_path):
    made = make(name, tmp_path / "source", add_pooling_layer=False)
    model = hf.load(made.folder)
    assert "pooler_output" not in model(**batch_of(name, made))
    assert_same_states(name, made, model)


def test_names_that_begin_as_those_of_the_model_with_a_head_are_read_too(tmp_path):
    made = make("BertModel", tmp_path / "source")
    before = hf.load(made.folder).state_dict()
    tensors = safetensors.load_file(made.folder / "model.safetensors")
    longer = {f"bert.{name}": x for name, x in tensors.items()}
    safetensors.save_file(longer, made.folder / "model.safetensors", metadata={"format": "pt"})
    after = hf.load(made.folder).state_dict()
    assert after.keys() == before.keys()
    for name, x in after.items():
        np.testing.assert_array_equal(x, before[name])


@pytest.mark.parametrize(
    "name, call, message",
    [
        ("LlamaModel", lambda m: m.generate(input_ids=np.ones((1, 3), int)), "LlamaModel does not generate text"),
        ("LlamaModel", lambda m: m.grad(input_ids=np.ones((1, 3), int)), "expected labels"),
        ("BertModel", lambda m: m(input_ids=np.ones((1, 3), int), labels=np.ones((1, 3), int)), "BertModel takes"),
        ("T5EncoderModel", lambda m: m(input_ids=np.ones((1, 3), int), decoder_input_ids=np.ones((1, 2), int)),
         "T5EncoderModel takes attention_mask, input_ids"),
        ("T5Model", lambda m: m(input_ids=np.ones((1, 3), int)), "decoder_input_ids: expected them"),
    ],
)  # fmt: skip
def test_what_needs_a_head_is_refused_in_one_line(name, call, message, tmp_path):
    model = hf.load(make(name, tmp_path / "source").folder)
    with pytest.raises(UserError, match=message) as e:
        call(model)
    assert "\n" not in str(e.value)


def test_a_body_that_lacks_a_tensor_is_refused(tmp_path):
    made = make("LlamaModel", tmp_path / "source")
    tensors = safetensors.load_file(made.folder / "model.safetensors")
    tensors.pop("norm.weight")
    safetensors.save_file(tensors, made.folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"norm.weight: missing, expected \[24\]"):
        hf.load(made.folder)


def test_heads_that_a_class_without_one_holds_are_carried_along(tmp_path):
    """Checkpoints of pre-training whose config.json names the body: transformers reads no head of them either."""
    made = make("BertModel", tmp_path / "source")
    tensors = safetensors.load_file(made.folder / "model.safetensors")
    tensors |= {"cls.predictions.bias": np.ones(97, np.float32), "cls.seq_relationship.bias": np.ones(2, np.float32)}
    safetensors.save_file(tensors, made.folder / "model.safetensors", metadata={"format": "pt"})
    model = hf.load(made.folder)
    assert_same_states("BertModel", made, model)
    hf.save(model, tmp_path / "out")
    assert_same_folder(made.folder, tmp_path / "out")
