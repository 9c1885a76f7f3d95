"""Every family and class against transformers, on the same folder: outputs, losses, gradients, training, generation."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from tests.hf import compare
from tests.hf.cases import ALIKE, CASES, EACH, GENERATORS, inputs
from tests.hf.made import model_cases

pytestmark = pytest.mark.hf
pytest.importorskip("torch")
pytest.importorskip("transformers")


# One of each kind of block, of positions, of heads and of towers; the others of a family differ in fields.
FEW = ("gpt2", "gpt_neox", "opt", "llama", "gemma2", "mixtral", "bert", "albert", "t5", "bart", "marian")


def assert_below(differences: dict[str, float], limit: float) -> None:
    worst = max(differences, key=differences.__getitem__)
    assert differences[worst] < limit, f"{worst}: differs by {differences[worst]:.2e}"


@model_cases(*CASES, fast=FEW)
def test_outputs_hidden_states_and_loss_agree(name, cases):
    assert_below(cases.differences(name).outputs, CASES[name].atol)


@model_cases(*sorted(CASES.keys() - ALIKE), fast=FEW)
def test_gradients_agree(name, cases):
    assert_below(cases.differences(name).gradients, 1e-3)


@model_cases("llama", "bert", "t5", "mixtral")  # one of each kind of forward pass
def test_the_call_gives_what_comes_beside_the_gradients(name, cases):
    batch = inputs(name)
    alone, beside = cases.loaded(name)(**batch), cases.loaded(name).outputs_and_grad(**batch)[0]
    assert jax.tree.structure(alone) == jax.tree.structure(beside)
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(beside), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@model_cases(*EACH, fast=FEW)
def test_six_steps_of_adamw_have_the_same_losses(name, cases):
    ours, theirs = compare.losses_of_adamw(name, cases.loaded(name))
    assert theirs[-1] < theirs[0] - 0.05
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-3)


@pytest.mark.parametrize("how", [{}, {"num_beams": 4, "length_penalty": 0.7}], ids=["greedy", "beams"])
@model_cases(*(name for name in EACH if name in GENERATORS), fast=("llama", "t5"))
def test_generated_sequences_are_equal(name, how, cases):
    ours, theirs = compare.sequences(name, cases.loaded(name), **how)
    np.testing.assert_array_equal(ours, theirs)
