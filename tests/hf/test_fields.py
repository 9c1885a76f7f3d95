"""Fields of config.json: what says nothing is taken, what could change the numbers is refused until it is accepted by
name, and what is of another kind than it should be is one line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from lm import hf
from lm.errors import UserError
from lm.hf.folder import open_folder
from tests.halves import slow_but
from tests.hf.cases import CASES, EACH

pytestmark = pytest.mark.hf
pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

FEW = ("gpt2", "opt", "llama", "gemma3", "mixtral", "bert", "t5", "bart")
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
HARMLESS = {
    "SmolLM2": {"is_llama_config": True, "rope_interleaved": False, "transformers.js_config": {"dtype": "q4"}},
    "Unsloth": {"unsloth_fixed": True, "unsloth_version": "2025.1"},
    "transformers": {"_attn_implementation_internal": None, "_experts_implementation": "eager", "_commit_hash": "a"},
    "a conversion": {"max_sequence_length": 2048, "use_flash_attn": True, "unk_token_id": 0, "name_or_path": "x"},
    "FARM": {"name": "Bert", "language": "english"},
    "Dolly": {"custom_pipelines": {"text-generation": {"impl": "instruct_pipeline.X"}}},
    "distilbart": {"save_step": 58, "replacing_rate": 0, "student_encoder_layers": None, "student_decoder_layers": 3},
    "nulls": {"mup_factor": None, "some_config": None},
    "a search": {"min_new_tokens": 3, "guidance_scale": 1.5, "renormalize_logits": True},
}


@pytest.fixture(scope="module")
def folder(cases):
    return cases.folder


def changed(source: Path, target: Path, **fields) -> Path:
    """A folder whose config.json says more, or other things: `a.b` is a field within an object."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    for name, value in fields.items():
        *parents, last = [name] if name in ("transformers.js_config",) else name.split(".")
        at = config
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = value
    (target / "config.json").write_text(json.dumps(config))
    return target


def model_of(path: Path, **options):
    with open_folder(path, **options) as opened:
        return opened.model


@pytest.mark.parametrize("who", HARMLESS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_fields_that_tools_write_and_no_model_reads_are_taken(who, name, folder, tmp_path):
    path = changed(folder(name), tmp_path / "folder", **HARMLESS[who])
    assert model_of(path) == model_of(folder(name))


def test_what_the_tensors_tell_need_not_be_asked_of_the_config(folder, tmp_path):
    path = changed(folder("mistral"), tmp_path / "mistral", attention_bias=False, mlp_bias=False)
    assert model_of(path) == model_of(folder("mistral"))
    path = changed(folder("bert"), tmp_path / "bert", embedding_size=24)
    assert model_of(path) == model_of(folder("bert"))
    path = changed(folder("bert"), tmp_path / "narrow", embedding_size=12)
    with pytest.raises(UserError, match="embedding_size: expected 24 or None, got 12"):
        model_of(path)


@pytest.mark.parametrize("spelling", ["rope_parameters", "rope_scaling"])
def test_yarn_that_was_trained_with_is_the_same_yarn(spelling, folder, tmp_path):
    paths = [tmp_path / "plain", tmp_path / "marked"]
    for path, more in zip(paths, ({}, {"finetuned": True, "attention_factor": None})):
        changed(folder("llama"), path, **{"rope_parameters": None} | {spelling: YARN | more})
    assert model_of(paths[0]) == model_of(paths[1])


LINEAR = {"type": "linear", "factor": 2.0}
UNKNOWN = {
    "attention_twist": ("llama", {"attention_twist": 3}),
    "embedding_multiplier": ("llama", {"embedding_multiplier": 12.0}),
    "rope_parameters.twist": ("llama", {"rope_parameters.twist": 2}),
    "rope_scaling.twist": ("llama", {"rope_parameters": None, "rope_scaling": LINEAR | {"twist": 2}}),
    "rope_parameters.full_attention.twist": ("gemma3", {"rope_parameters.full_attention.twist": 2}),
    "rope_parameters.sliding_attention.twist": ("gemma3", {"rope_parameters.sliding_attention.twist": 2}),
    "qk_layernorm": ("bert", {"qk_layernorm": False}),
    "n_experts": ("gpt2", {"n_experts": 4}),
    "moe": ("t5", {"moe": {"experts": 2}}),
}  # fmt: skip


@pytest.mark.parametrize("field", UNKNOWN)
def test_a_field_that_nobody_knows_is_refused_until_it_is_accepted_by_its_name(field, folder, tmp_path):
    name, fields = UNKNOWN[field]
    path = changed(folder(name), tmp_path / "folder", **fields)
    with pytest.raises(UserError, match=f"unknown field '{field}' = .* --ignore-field {field} ") as e:
        model_of(path)
    assert "\n" not in str(e.value)
    accepted = model_of(path, ignore_fields=[field])
    assert type(accepted) is type(model_of(folder(name)))
    if name != "llama" or "rope" not in field:
        assert accepted == model_of(folder(name))
    assert hf.load(path, ignore_fields=[field]).config == json.loads((path / "config.json").read_text())


def test_several_unknown_fields_are_named_at_once_and_accepted_one_by_one(folder, tmp_path):
    path = changed(folder("llama"), tmp_path / "folder", twist_a=1, twist_b="x")
    with pytest.raises(UserError, match="twist_a.*--ignore-field twist_a --ignore-field twist_b"):
        model_of(path)
    with pytest.raises(UserError, match="unknown field 'twist_b' = 'x'"):
        model_of(path, ignore_fields=["twist_a"])
    assert model_of(path, ignore_fields=["twist_a", "twist_b"]) == model_of(folder("llama"))


@pytest.mark.parametrize(
    "ignored, message",
    [
        ("hidden_size", "--ignore-field hidden_size: expected a field that would be refused, got one that is read"),
        ("rms_norm_eps", "got one that is read"),
        ("twista", "got none of that name; did you mean 'twist'"),
    ],
)
def test_only_a_field_that_would_be_refused_can_be_ignored(ignored, message, folder, tmp_path):
    path = changed(folder("llama"), tmp_path / "folder", twist=1)
    with pytest.raises(UserError, match=message):
        model_of(path, ignore_fields=["twist", ignored])


def test_a_field_that_says_that_something_else_is_computed_cannot_be_ignored(folder, tmp_path):
    path = changed(folder("llama"), tmp_path / "folder", rope_interleaved=True)
    with pytest.raises(UserError, match="rope_interleaved: expected False or None, got True"):
        model_of(path)
    with pytest.raises(UserError, match="rope_interleaved"):
        model_of(path, ignore_fields=["rope_interleaved"])


@pytest.mark.parametrize("name", slow_but(FEW, EACH))
def test_every_field_that_transformers_writes_of_a_family_is_known(name, folder, tmp_path):
    """All fields of its config class, at their defaults: a folder of any version names some of them."""
    config = getattr(transformers, CASES[name].config)()
    path = tmp_path / "folder"
    shutil.copytree(folder(name), path)
    own = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(json.loads(config.to_json_string(use_diff=False)) | own))
    assert model_of(path) == model_of(folder(name))


# --- of another kind --------------------------------------------------------------------------------------------------

ORIGINAL = "rope_parameters.original_max_position_embeddings"
STRINGS = {
    "rope_parameters.factor": ("llama linear", {"rope_parameters.factor": "4.0"}),
    "rope_parameters.low_freq_factor": ("llama3", {"rope_parameters.low_freq_factor": "x"}),
    ORIGINAL: ("llama3", {ORIGINAL: "16"}),
    "rope_parameters.beta_fast": ("llama yarn", {"rope_parameters.beta_fast": [4]}),
    "rope_parameters.truncate": ("llama yarn", {"rope_parameters.truncate": "false"}),
    "rope_parameters.rope_theta": ("llama", {"rope_parameters.rope_theta": "1e4"}),
    "rope_scaling.factor": ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": "x2"}}),
    "rope_theta": ("llama", {"rope_theta": "10000"}),
    "num_key_value_heads": ("llama", {"num_key_value_heads": "2"}),
    "head_dim": ("llama", {"head_dim": "10"}),
    "hidden_size": ("llama", {"hidden_size": True}),
    "pad_token_id": ("llama", {"pad_token_id": "0"}),
    "layer_types": ("gemma3", {"layer_types": "full_attention"}),
    "n_inner": ("gpt2", {"n_inner": "41"}),
    "classifier_dropout": ("bert", {"classifier_dropout": "0.1"}),
    "layer_norm_eps": ("bert", {"layer_norm_eps": "1e-12"}),
    "final_logit_softcapping": ("gemma2", {"final_logit_softcapping": "30"}),
    "rope_parameters": ("llama", {"rope_parameters": [1]}),
    "rope_scaling": ("llama", {"rope_parameters": None, "rope_scaling": "linear"}),
    "id2label": ("bert sequence labels", {"id2label": 3}),
}  # fmt: skip


@pytest.mark.parametrize("field", STRINGS)
def test_a_value_of_another_kind_is_refused_with_its_name(field, folder, tmp_path):
    name, fields = STRINGS[field]
    path = changed(folder(name), tmp_path / "folder", **fields)
    with pytest.raises(UserError, match=f"config.json: {field}: expected ") as e:
        hf.load(path)
    assert "\n" not in str(e.value)


NULLS = ["rope_scaling", "rope_parameters", "id2label", "label2id", "task_specific_params", "quantization_config"]


@pytest.mark.parametrize("field", NULLS)
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_a_null_object_is_one_that_is_not_there(field, name, folder, tmp_path):
    null, absent = tmp_path / "null", tmp_path / "absent"
    changed(folder(name), null, **{field: None})
    shutil.copytree(folder(name), absent)
    config = json.loads((absent / "config.json").read_text())
    config.pop(field, None)
    (absent / "config.json").write_text(json.dumps(config))
    assert model_of(null) == model_of(absent)


def test_a_null_in_place_of_names_leaves_the_number_of_labels(folder, tmp_path):
    name = "bert sequence labels"
    path = changed(folder(name), tmp_path / "null", id2label=None, label2id=None, num_labels=3)
    assert model_of(path) == model_of(folder(name))


MARK = "\ufeff"


@pytest.mark.parametrize("file", ["config.json", "generation_config.json", "model.safetensors.index.json"])
def test_a_byte_order_mark_is_no_part_of_a_file(file, folder, tmp_path):
    path = tmp_path / "folder"
    shutil.copytree(folder("llama"), path)
    if file.endswith("index.json"):
        (path / "model.safetensors").rename(path / "model-1.safetensors")
        from safetensors import safe_open

        with safe_open(path / "model-1.safetensors", "numpy") as tensors:
            weight_map = dict.fromkeys(tensors.keys(), "model-1.safetensors")
        (path / file).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    plain = hf.load(path)
    (path / file).write_text(MARK + (path / file).read_text(), encoding="utf-8")
    marked = hf.load(path)
    assert (marked.config, marked.generation_config) == (plain.config, plain.generation_config)
    assert marked.state_dict().keys() == plain.state_dict().keys()
    hf.save(marked, tmp_path / "out")
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


VALUES = (None, "x", "4", [], {}, -1, 0, True, 1.5, [1], {"a": 1}, [["x"]], float("nan"), float("inf"))
OF_EVERY_KIND = ("gpt_neo", "qwen3_moe", "t5")


@pytest.mark.parametrize("name", slow_but(["gpt_neo"], OF_EVERY_KIND))
def test_whatever_a_field_holds_a_folder_is_read_or_refused_in_one_line(name, folder, tmp_path):
    shutil.copytree(folder(name), tmp_path / "folder")
    path, refused = tmp_path / "folder" / "config.json", 0
    config = json.loads(path.read_text())
    rope = config.get("rope_parameters") or {}
    changes = [{field: value} for field in config for value in VALUES]
    changes += [{"rope_parameters": rope | {field: value}} for field in rope for value in VALUES]
    for change in changes:
        path.write_text(json.dumps(config | change))
        try:
            model_of(tmp_path / "folder")
        except UserError as e:
            assert "\n" not in str(e)
            refused += 1
    assert refused > 20
