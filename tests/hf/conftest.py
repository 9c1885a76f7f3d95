"""The model cases, shared by the tests of a worker."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="session")
def cases(tmp_path_factory):
    """See `tests.hf.made.Cases`."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers").LlamaForCausalLM  # noqa: B018, imports what else would count as a case's time
    from tests.hf.made import Cases

    return Cases(tmp_path_factory.mktemp)
