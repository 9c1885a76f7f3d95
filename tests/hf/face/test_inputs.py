"""What a model of a folder is called with: conventions of transformers at the edges, and what is refused by name."""

from __future__ import annotations

import functools
import json
import shutil

import numpy as np
import pytest

from lm import hf
from lm.errors import UserError
from tests.hf.cases import EOS, PAD, reference, rows

pytestmark = pytest.mark.hf
torch = pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def folder(cases):
    return cases.folder


@pytest.fixture(scope="module")
def loaded(cases):
    return cases.loaded


def theirs(name: str, call, **batch):
    with torch.no_grad():
        return call(reference(name))(**{k: torch.from_numpy(np.array(v)) for k, v in batch.items()})


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_padding_goes_through_the_experts_and_does_not_count_for_their_balance(name, loaded):
    ids = np.random.default_rng(3).integers(4, 70, (2, 9))
    mask = np.ones_like(ids)
    mask[0, 6:] = 0  # on the right, where it sees the text
    expected = theirs(name, lambda m: m, input_ids=ids, attention_mask=mask)
    ours = loaded(name)(input_ids=ids, attention_mask=mask)
    np.testing.assert_allclose(ours["logits"], expected.logits.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(ours["aux_loss"], expected.aux_loss.numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "mistral"])
def test_prompts_padded_on_the_right_or_within_go_on_as_in_transformers(name, loaded):
    ids = np.random.default_rng(3).integers(4, 70, (3, 8))
    mask = np.ones_like(ids)
    mask[0, 6:], mask[1, 3:5], mask[2, 3:] = 0, 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    expected = theirs(name, lambda m: functools.partial(m.generate, max_new_tokens=6, do_sample=False), **batch)
    np.testing.assert_array_equal(loaded(name).generate(**batch, max_new_tokens=6), expected.numpy())


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_without_a_mask_padding_is_seen_in_decoders_alone(name, loaded):
    ids = rows(name)["input_ids"][[0, 2]]
    assert (ids == reference(name).config.pad_token_id).any()
    options = {"max_new_tokens": 6, "num_beams": 2}
    expected = theirs(name, lambda m: functools.partial(m.generate, do_sample=False, **options), input_ids=ids)
    np.testing.assert_array_equal(loaded(name).generate(input_ids=ids, **options), expected.numpy())


def test_a_start_token_is_put_before_decoder_inputs_only_where_no_row_has_it(loaded):
    ids, start = rows("bart")["input_ids"], reference("bart").config.decoder_start_token_id
    for first in ([9, 9, 9], [9, start, 9], [start, start, start]):
        given = np.stack([np.array(first), np.array([11, 12, 13])], axis=1)
        batch = {"input_ids": ids, "decoder_input_ids": given}
        expected = theirs("bart", lambda m: functools.partial(m.generate, max_new_tokens=3, do_sample=False), **batch)
        np.testing.assert_array_equal(loaded("bart").generate(**batch, max_new_tokens=3), expected.numpy())


def test_the_padding_token_is_that_of_generation_config_alone(folder, tmp_path):
    path = shutil.copytree(folder("llama"), tmp_path / "model")
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": EOS, "max_new_tokens": 4}))
    ids = rows("llama")["input_ids"]
    assert (ids == PAD).any()
    model = hf.load(path)
    everything = model.generate(input_ids=ids, attention_mask=np.ones_like(ids))
    np.testing.assert_array_equal(model.generate(input_ids=ids), everything)


def test_options_may_be_numbers_of_numpy(loaded):
    ids = rows("llama")["input_ids"][:1]
    expected = loaded("llama").generate(input_ids=ids, max_new_tokens=3, eos_token_id=[EOS, 5])
    options = {"max_new_tokens": np.int64(3), "eos_token_id": np.array([EOS, 5])}
    np.testing.assert_array_equal(loaded("llama").generate(input_ids=ids, **options), expected)


X = np.ones((2, 5), int)


@pytest.mark.parametrize(
    "name, inputs, message",
    [
        ("llama", {"input_ids": X[0]}, r"input_ids: expected integers \[batch, length\], got int64 \[5\]"),
        ("llama", {"input_ids": X[:, :0]}, r"input_ids: expected integers \[batch, length\], got int64 \[2, 0\]"),
        ("llama", {"input_ids": X * 97}, "input_ids: expected ids from 0 to 96, got 97 to 97"),
        ("llama", {"attention_mask": X[:, :4]}, r"attention_mask: expected \[2, 5\], got \[2, 4\]"),
        ("llama", {"labels": X[:, :4]}, r"labels: expected \[2, 5\], got \[2, 4\]"),
        ("llama", {"labels": X * -7}, r"labels: expected ids from 0 to 96 \(or -100 for none\), got -7 to -7"),
        (
            "llama",
            {"position_ids": X[[0, 0, 0]]},
            r"position_ids: expected \[2, 5\] or \[1, 5\] or \[5\], got \[3, 5\]",
        ),
        ("gpt2", {"input_ids": np.ones((1, 33), int)}, "input_ids: expected at most 32 tokens in a row, .* got 33"),
        ("gpt2", {"position_ids": X * 32}, "position_ids: expected 0 to 31, got 32 to 32"),
        ("roberta", {"position_ids": X * 32}, "position_ids: expected 0 to 31, got 32 to 32"),
        ("bert", {"token_type_ids": X * 2}, "token_type_ids: expected ids from 0 to 1, got 2 to 2"),
        ("bert", {"next_sentence_label": [0, 2]}, "next_sentence_label: expected ids from 0 to 1"),
        ("bert sequence labels", {"labels": [0, 3]}, "labels: expected ids from 0 to 2"),
        ("bart", {"labels": np.ones((2, 33), int)}, "labels: expected at most 32 tokens in a row, .* got 33"),
        ("bart", {"decoder_attention_mask": X}, "decoder_attention_mask: expected decoder_input_ids with it, got none"),
        ("bart", {"decoder_input_ids": X[:1]}, "decoder_input_ids: expected 2 rows as input_ids, got 1"),
    ],
)
def test_an_argument_that_would_give_a_wrong_result_is_refused(name, inputs, message, loaded):
    with pytest.raises(UserError, match=message):
        loaded(name)(**({"input_ids": X} | inputs))


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(UserError, match="dtype: expected one of float32, bfloat16, float16, got 'float99'"):
        hf.load(folder("llama"), dtype="float99")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": "24"}, "hidden_size: expected an integer, got '24'"),
        ({"hidden_size": 24.0}, "hidden_size: expected an integer, got 24.0"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps: expected a number, got '1e-6'"),
        ({"hidden_act": ["silu"]}, r"hidden_act: expected a name, got \['silu'\]"),
        ({"rope_parameters": 5}, "rope_parameters: expected an object, got 5"),
        ({"attention_bias": "no"}, "attention_bias: expected true or false, got 'no'"),
    ],
)
def test_a_field_of_another_type_is_refused(change, message, folder, tmp_path):
    path = shutil.copytree(folder("llama"), tmp_path / "model")
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=rf"config.json: {message}"):
        hf.load(path)


def test_the_names_of_labels_say_how_many_there_are(folder, tmp_path):
    """As in transformers, whatever num_labels says; and BART has three where neither is there."""
    for name, change in (("bert sequence labels", {"num_labels": 5}), ("bart sequence labels", {"id2label": None})):
        path = shutil.copytree(folder(name), tmp_path / name)
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(config | change))
        assert hf.load(path).model.task.n_labels == 3
