"""What a model folder says of generation, whatever its files hold."""

from __future__ import annotations

import pytest

from lm.errors import UserError
from lm.generation.defaults import end_ids, generation_defaults

FIELDS = """eos_token_id bos_token_id pad_token_id forced_bos_token_id forced_eos_token_id suppress_tokens bad_words_ids
max_length max_new_tokens min_length num_beams do_sample sequence_bias exponential_decay_length_penalty
repetition_penalty length_penalty early_stopping temperature stop_strings""".split()
VALUES = (None, "x", "4", [], {}, -1, 0, True, 1.5, [1], {"a": 1}, [["x"]], [None])


@pytest.mark.parametrize("field", FIELDS)
def test_whatever_a_field_holds_it_is_read_or_refused_in_one_line(field):
    for value in VALUES:
        for config, generation in (({}, {field: value}), ({field: value}, None)):
            try:
                generation_defaults(config, generation, prompt_len=3)
            except UserError as e:
                assert "\n" not in str(e) and str(e).startswith("generate")


def test_ends_are_those_of_all_sources_each_once_and_in_order():
    sources = {"eos_token_id": [7, 5]}, None, {}, {"eos_token_id": None}, {"eos_token_id": 5}, {"eos_token_id": 9}
    assert end_ids(*sources) == (7, 5, 9)
    with pytest.raises(UserError, match="generate.eos_token_id: expected an id or a list of ids, got '2'"):
        end_ids({"eos_token_id": "2"})


@pytest.mark.parametrize("ends", [3, [3], [3, 5]])
def test_a_search_ends_at_each_id_of_the_one_file_that_counts(ends):
    expected = tuple(ends) if isinstance(ends, list) else (ends,)
    assert generation_defaults({"eos_token_id": ends}, None, prompt_len=3).eos_token_id == expected
    assert generation_defaults({"eos_token_id": 9}, {"eos_token_id": ends}, prompt_len=3).eos_token_id == expected
    assert generation_defaults({"eos_token_id": ends}, {}, prompt_len=3).eos_token_id == ()  # as transformers
