from __future__ import annotations

import pytest

from lm.optim.matrices import as_matrix, n_stacked


@pytest.mark.parametrize(
    "axes, stack, matrix",
    [
        (("layers", "embed", "heads", "head_dim"), 1, ((1,), (2, 3))),
        (("layers", "embed", "kv_heads", "head_dim"), 1, ((1,), (2, 3))),
        (("layers", "heads", "head_dim", "embed"), 1, ((1, 2), (3,))),
        (("layers", "mlp", "embed"), 1, ((1,), (2,))),
        (("layers", "experts", "embed", "mlp"), 2, ((2,), (3,))),
        (("layers", "embed", "experts"), 1, ((1,), (2,))),
        (("embed", "heads", "head_dim"), 0, ((0,), (1, 2))),  # shared layers (ALBERT)
        (("vocab", "embed"), 0, ((0,), (1,))),
        (("layers", "embed", None), 1, ((1,), (2,))),
        (("layers", "heads", "head_dim"), 1, None),
        (("layers", "head_dim"), 1, None),  # a norm over head_dim
        (("layers", "experts", "mlp"), 2, None),
        (("norm",), 0, None),
        (("layers",), 1, None),
        ((), 0, None),
    ],
)
def test_axes_say_what_is_a_matrix(axes, stack, matrix):
    assert n_stacked(axes) == stack
    assert as_matrix(axes, "w") == matrix


def test_two_input_or_output_dimensions_without_a_rule_are_refused():
    with pytest.raises(
        ValueError,
        match=r"^layers\.conv: expected at most one .* got \('width',\), \('embed',\), \('mlp',\); use AdamW",
    ):
        as_matrix(("layers", "width", "embed", "mlp"), "layers.conv")
