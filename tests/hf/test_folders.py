"""Folders in and out: bit-equal tensors, configs in both spellings, every format, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import numpy as np
import pytest

from lm import hf
from lm.errors import UserError
from lm.hf import export
from lm.hf.folder import open_folder
from lm.nn.param import paths
from tests.hf.cases import CASES, inputs, reference
from tests.hf.made import model_cases

pytestmark = pytest.mark.hf
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
safetensors = pytest.importorskip("safetensors.numpy")


@pytest.fixture(scope="module")
def folder(cases):
    """name -> the folder that transformers writes of a case; not to be changed."""
    return cases.folder


def copied(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


def their_logits(model, name: str) -> np.ndarray:
    batch = {k: torch.from_numpy(np.array(v)) for k, v in inputs(name).items()}
    with torch.no_grad():
        out = model.eval()(**batch)
    return next(v for k, v in out.items() if "logits" in k).numpy()


def spelt_out(model):
    """With the defaults that depend on other fields filled in."""
    sizes = {"n_kv_heads": model.kv_shape[0], "head_dim": model.kv_shape[1]} if hasattr(model, "n_kv_heads") else {}
    return dataclasses.replace(model, **sizes)


def loads_quietly(name: str, path: Path, caplog):
    cls = getattr(transformers, CASES[name].cls)
    transformers.utils.logging.enable_propagation()
    caplog.clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, info = cls.from_pretrained(path, attn_implementation="eager", output_loading_info=True)
    model.config._experts_implementation = "eager"
    assert not any(info.values()), info
    assert not [r for r in caplog.records if r.levelname in ("WARNING", "ERROR")], caplog.text
    return model


@model_cases(*CASES)
def test_a_folder_comes_back_bit_equal_and_loads_without_a_warning(name, folder, cases, tmp_path, caplog):
    hf.save(cases.loaded(name), tmp_path / "out")
    before = safetensors.load_file(folder(name) / "model.safetensors")
    after = safetensors.load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    for key, x in before.items():
        assert x.dtype == after[key].dtype
        np.testing.assert_array_equal(after[key], x, err_msg=key)
    model = loads_quietly(name, tmp_path / "out", caplog)
    np.testing.assert_allclose(their_logits(model, name), their_logits(reference(name), name), rtol=0, atol=1e-6)


@model_cases(*CASES)
def test_a_config_written_from_the_model_alone_gives_the_same_logits(name, cases, tmp_path, caplog):
    """As a model that was trained here is exported: nothing of the old config.json is used but the special ids."""
    model = cases.loaded(name)
    names = ("pad_token_id", "bos_token_id", "eos_token_id", "decoder_start_token_id")
    ids = {k: model.config[k] for k in names if k in model.config}
    if model.model.family == "decoder" and model.model.max_seq_len is None:
        ids["max_position_embeddings"] = model.config.get("max_position_embeddings", 32)
    slots = export.layout_of(model.model, model.shapes)
    export.write_model(
        tmp_path / "out",
        config=export.config_of(model.model, "float32", ids),
        generation=None,
        slots=slots,
        flat=paths(model.params),
        dtypes=dict.fromkeys(slots, np.dtype(np.float32)),
        unused=model.unused,
        extra=lambda target: None,
    )
    again = loads_quietly(name, tmp_path / "out", caplog)
    np.testing.assert_allclose(their_logits(again, name), their_logits(reference(name), name), rtol=0, atol=1e-5)
    with open_folder(tmp_path / "out") as opened:
        assert spelt_out(opened.model) == spelt_out(model.model)


OLD = {
    "gpt_neox": {"rotary_pct": 0.25, "rotary_emb_base": 10000},
    "llama3": {
        "rope_theta": 500.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama linear": {"rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama dynamic": {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
    "llama": {"rope_theta": 10000.0, "rope_scaling": None},
    "qwen2": {"rope_theta": 10000.0},
    "gemma3": {
        "rope_theta": 1e6,
        "rope_local_base_freq": 1e4,
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
        "sliding_window_pattern": 6,
        "layer_types": None,
    },
    "t5 gated": {"tie_word_embeddings": False, "scale_decoder_outputs": None},
}


@pytest.mark.parametrize("name", OLD)
def test_the_older_spelling_of_a_config_is_the_same_model(name, folder, tmp_path):
    old = copied(folder(name), tmp_path / "old")
    config = json.loads((old / "config.json").read_text())
    for key in ("rope_parameters", *(k for k, v in OLD[name].items() if v is None)):
        config.pop(key, None)
    config |= {k: v for k, v in OLD[name].items() if v is not None} | {"torch_dtype": config.pop("dtype")}
    (old / "config.json").write_text(json.dumps(config))
    with open_folder(folder(name)) as new, open_folder(old) as older:
        assert older.model == new.model


@pytest.mark.parametrize("form", ["bfloat16", "float16", "sharded", "bin", "bin sharded"])
def test_every_format_of_weights_is_read_as_transformers_reads_it(form, tmp_path):
    name = "t5 gated"
    model = type(reference(name))(reference(name).config)
    model.load_state_dict(reference(name).state_dict())
    if "float" in form:
        model = model.to(getattr(torch, form))
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB" if form == "sharded" else "5GB")
    if form.startswith("bin"):
        (tmp_path / "a" / "model.safetensors").unlink()
        tensors = {k: v.clone() for k, v in model.state_dict().items()}
        if form == "bin":
            torch.save(tensors, tmp_path / "a" / "pytorch_model.bin")
        else:
            halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
            weight_map = {}
            for i, half in enumerate(halves):
                torch.save(half, tmp_path / "a" / f"pytorch_model-{i}.bin")
                weight_map |= dict.fromkeys(half, f"pytorch_model-{i}.bin")
            index = {"metadata": {}, "weight_map": weight_map}
            (tmp_path / "a" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    ours = hf.load(tmp_path / "a")
    assert form != "sharded" or len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    theirs = {k: v.float().numpy() for k, v in model.state_dict().items()}
    for key, x in ours.state_dict().items():
        np.testing.assert_array_equal(x, theirs[key], err_msg=key)


def change_config(path: Path, **fields) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({k: v for k, v in (config | fields).items() if v is not None}))


def change_tensors(path: Path, f) -> None:
    tensors = safetensors.load_file(path / "model.safetensors")
    f(tensors)
    safetensors.save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


BAD = {
    "unknown architecture": (lambda p: change_config(p, model_type="gpt5"), "model_type: expected one of .*got 'gpt5'"),
    "unknown class": (lambda p: change_config(p, architectures=["LlamaForDreams"]), "architectures: .*LlamaForDreams"),
    "unknown field": (lambda p: change_config(p, attention_twist=3), "unknown field 'attention_twist' = 3.*refused"),
    "misspelt field": (lambda p: change_config(p, rms_norm_epz=1e-3), "rms_norm_epz.*did you mean 'rms_norm_eps'"),
    "missing field": (lambda p: change_config(p, hidden_size=None), "expected the field 'hidden_size'"),
    "unknown activation": (lambda p: change_config(p, hidden_act="mish"), "hidden_act: expected one of .*'mish'"),
    "unknown rope": (
        lambda p: change_config(p, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}),
        "rope_type: expected one of .*'longrope'",
    ),
    "quantized": (lambda p: change_config(p, quantization_config={"bits": 4}), "quantization_config"),
    "more layers": (
        lambda p: change_config(p, num_hidden_layers=4),
        r"model.layers.3.input_layernorm.weight: missing, expected \[24\].*likely cause",
    ),
    "fewer layers": (
        lambda p: change_config(p, num_hidden_layers=2),
        r"model.layers.2.*not a tensor of this model.*config.json names fewer layers",
    ),
    "another size": (
        lambda p: change_config(p, intermediate_size=40),
        r"mlp.down_proj.weight: expected \[24, 40\], got \[24, 41\]",
    ),
    "missing tensor": (
        lambda p: change_tensors(p, lambda t: t.pop("model.norm.weight")),
        r"model.norm.weight: missing, expected \[24\]",
    ),
    "extra tensor": (
        lambda p: change_tensors(p, lambda t: t.update({"model.extra": np.zeros(3, np.float32)})),
        r"model.extra: not a tensor of this model, got \[3\]",
    ),
    "wrong shape": (
        lambda p: change_tensors(p, lambda t: t.update({"model.norm.weight": np.zeros(25, np.float32)})),
        r"model.norm.weight: expected \[24\], got \[25\]",
    ),
    "no config": (lambda p: (p / "config.json").unlink(), "config.json: no such file"),
    "broken config": (lambda p: (p / "config.json").write_text("{"), "config.json: expected JSON"),
    "truncated": (
        lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:-100]),
        "model.safetensors: .*truncated",
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "config.json"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_folder_that_does_not_fit_is_refused_with_the_name_of_what_does_not(what, folder, tmp_path):
    path = copied(folder("llama"), tmp_path / "bad")
    spoil, message = BAD[what]
    spoil(path)
    with pytest.raises(UserError, match=message) as e:
        hf.load(path)
    assert "\n" not in str(e.value)


def test_a_pickle_that_wants_to_run_code_is_refused_and_runs_nothing(folder, tmp_path):
    import os
    import pickle

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/owned",)

    path = copied(folder("llama"), tmp_path / "bad")
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(pickle.dumps({"x": Evil()}))
    with pytest.raises(UserError, match="pytorch_model.bin"):
        hf.load(path)
    torch.save({"x": Evil()}, path / "pytorch_model.bin")
    with pytest.raises(UserError, match="wants to run code .*system"):
        hf.load(path)
    assert not (tmp_path / "owned").exists()


def test_an_error_while_writing_leaves_nothing_behind(folder, tmp_path, monkeypatch):
    model = hf.load(folder("llama"))

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "copy_tokenizer", full)
    with pytest.raises((UserError, OSError), match="space"):
        hf.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="out"):
        hf.save(model, tmp_path / "out")
    assert [p.name for p in tmp_path.rglob("*")] == ["out", "mine"]


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(input_ids=[[1, 97]]), "input_ids: expected ids from 0 to 96, got 1 to 97"),
        (dict(input_ids=[1, 2]), r"input_ids: expected integers \[batch, length\]"),
        (dict(inputs_ids=[[1]]), "inputs_ids: .*did you mean 'input_ids'"),
        (dict(attention_mask=[[1]]), "input_ids: expected"),
    ],
)
def test_a_wrong_argument_is_named(call, message, cases):
    with pytest.raises(UserError, match=message):
        cases.loaded("llama")(**{k: np.array(v) for k, v in call.items()})


def test_weights_can_be_taken_out_and_put_in_by_name(folder):
    model = hf.load(folder("llama"))
    before = model.state_dict()
    model.load_state_dict({name: 2 * x for name, x in before.items()})
    for name, x in model.state_dict().items():
        np.testing.assert_array_equal(x, 2 * before[name])
    with pytest.raises(UserError, match="missing .'model.norm.weight'., unknown .'norm'."):
        model.load_state_dict({("norm" if n == "model.norm.weight" else n): x for n, x in before.items()})
    with pytest.raises(UserError, match=r"model.norm.weight: expected \[24\], got \[25\]"):
        model.load_state_dict(before | {"model.norm.weight": np.zeros(25)})
