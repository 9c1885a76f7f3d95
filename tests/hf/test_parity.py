"""Every family and class against transformers, on the same folder: outputs, losses, gradients, training, generation."""

from __future__ import annotations

import functools

import numpy as np
import pytest

from lm import hf
from tests.hf import compare
from tests.hf.cases import ALIKE, CASES, EACH, GENERATORS, reference

pytestmark = pytest.mark.hf
pytest.importorskip("torch")
pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    @functools.cache
    def load(name: str) -> hf.Model:
        folder = tmp_path_factory.mktemp("hf")
        reference(name).save_pretrained(folder)
        return hf.load(folder)

    return load


def assert_below(differences: dict[str, float], limit: float) -> None:
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] < limit, f"{worst}: differs by {differences[worst]:.2e}"


@pytest.mark.parametrize("name", CASES)
def test_outputs_hidden_states_and_loss_agree(name, loaded):
    assert_below(compare.outputs(name, loaded(name)), CASES[name].atol)


@pytest.mark.parametrize("name", sorted(CASES.keys() - ALIKE))
def test_gradients_agree(name, loaded):
    assert_below(compare.gradients(name, loaded(name)), 1e-3)


@pytest.mark.parametrize("name", EACH)
def test_six_steps_of_adamw_have_the_same_losses(name, loaded):
    ours, theirs = compare.losses_of_adamw(name, loaded(name))
    assert theirs[-1] < theirs[0] - 0.05
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("how", [{}, {"num_beams": 4, "length_penalty": 0.7}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", [name for name in EACH if name in GENERATORS])
def test_generated_sequences_are_equal(name, how, loaded):
    ours, theirs = compare.sequences(name, loaded(name), **how)
    np.testing.assert_array_equal(ours, theirs)
