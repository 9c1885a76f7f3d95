from __future__ import annotations

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from lm.optim import SGD, Adafactor, AdamW, Constant, Lion, Muon, make_optimizer, state_axes


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def is_names(x):
    """A tuple of axis names; the states' own tuples hold other things."""
    return type(x) is tuple and all(a is None or isinstance(a, str) for a in x)


def axes_of(problem, config):
    """[(path, array, axes)] of the optimizer's state, from abstract parameters."""
    tx, _ = make_optimizer(config, 100, problem.decay, problem.axes)
    state = jax.eval_shape(tx.init, problem.params)
    axes = state_axes(tx, abstract(problem.params), problem.axes)
    assert jax.tree.structure(state) == jax.tree.structure(axes, is_leaf=is_names)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    names = jax.tree.leaves(axes, is_leaf=is_names)
    return [(jax.tree_util.keystr(path), leaf, n) for (path, leaf), n in zip(leaves, names, strict=True)]


def test_every_state_array_has_an_axis_name_for_each_dimension_of_that_size(problem, config):
    sizes = {
        name: n
        for path, p in problem.flat(problem.params).items()
        for name, n in zip(problem.flat(problem.axes)[path], p.shape)
    }
    for path, leaf, names in axes_of(problem, config):
        assert len(names) == leaf.ndim, path
        assert all(name is None or sizes[name] == n for name, n in zip(names, leaf.shape)), path


@pytest.mark.parametrize("kind, moments", [(AdamW, 2), (Lion, 1), (SGD, 1)])
def test_moments_take_the_axes_of_their_parameter(problem, kind, moments):
    found = [str(names) for _, leaf, names in axes_of(problem, kind(lr=1.0)) if leaf.ndim]
    assert sorted(found) == sorted([str(names) for names in problem.flat(problem.axes).values()] * moments)


def test_adafactors_averages_keep_the_axes_that_were_not_averaged(problem):
    found = axes_of(problem, Adafactor(lr=1.0, min_dim_size_to_factor=5))
    at = {path.removeprefix("[0]"): (leaf.shape, names) for path, leaf, names in found}
    assert at[".v_row['layers']['attn']['q']"] == ((3, 7, 1, 1), ("layers", "embed", None, None))
    assert at[".v_col['layers']['attn']['q']"] == ((3, 1, 2, 5), ("layers", None, "heads", "head_dim"))
    assert at[".v_row['layers']['attn']['o']"] == ((3, 2, 5, 1), ("layers", "heads", "head_dim", None))
    assert at[".v_col['layers']['attn']['o']"] == ((3, 1, 1, 7), ("layers", None, None, "embed"))
    assert at[".v_row['layers']['moe']['up']"] == ((3, 2, 7, 1), ("layers", "experts", "embed", None))
    assert at[".v_row['embed']['table']"] == ((13, 1), ("vocab", None))
    assert at[".v['position']['table']"] == ((4, 7), ("position", "embed"))  # fewer rows than 5: not factored
    assert at[".v['layers']['attn']['q_bias']"] == ((3, 2, 5), ("layers", "heads", "head_dim"))
    assert at[".count"] == ((), ())
    assert ".v['layers']['attn']['q']" not in at


def test_muon_keeps_one_moment_for_matrices_in_layers_and_two_for_the_rest(problem):
    found = [names for path, _, names in axes_of(problem, Muon(lr=1.0)) if path.startswith(".inner_states['muon']")]
    muon = [names for path, names in problem.flat(problem.axes).items() if path in problem.muon]
    assert sorted(map(str, found)) == sorted(map(str, [*muon, (), (), (None,)]))  # two counts and the coefficients
    found = [names for path, _, names in axes_of(problem, Muon(lr=1.0)) if path.startswith(".inner_states['adamw']")]
    rest = [names for path, names in problem.flat(problem.axes).items() if path not in problem.muon]
    assert sorted(map(str, found)) == sorted(map(str, [*rest, *rest, (), ()]))


def test_state_axes_allocates_nothing(config):
    """Parameters of 4 TiB."""
    axes = {"layers": {"up": ("layers", "embed", "mlp")}}
    params = {"layers": {"up": jax.ShapeDtypeStruct((1 << 10, 1 << 14, 1 << 16), np.float32)}}
    tx, _ = make_optimizer(config, 10, {"layers": {"up": True}}, axes)
    names = jax.tree.leaves(state_axes(tx, params, axes), is_leaf=is_names)
    kept = [("layers", "embed", None), ("layers", None, "mlp")]
    assert [n for n in names if len(n) == 3] == {"AdamW": 2 * [axes["layers"]["up"]], "Adafactor": kept}.get(
        type(config).__name__, [axes["layers"]["up"]]
    )


@pytest.mark.parametrize("kind", [Adafactor, Muon])
def test_a_state_with_masked_entries_survives_orbax(small_problem, kind, tmp_path):
    _, state = small_problem.run(kind(lr=0.1, schedule=Constant()))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        back = checkpointer.restore(tmp_path / "state", abstract(state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    jax.tree.map(np.testing.assert_array_equal, back, state)
