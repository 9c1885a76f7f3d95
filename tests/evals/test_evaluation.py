"""All evaluators of a run as one."""

from __future__ import annotations

import dataclasses

from lm.evals import evaluation
from lm.evals.evaluation import Evaluation, splits
from lm.evals.perplexity import Perplexity, total


@dataclasses.dataclass(frozen=True)
class Norm:
    value: float

    def record(self):
        return {"norm": self.value}


class Norms:
    @classmethod
    def make(cls, parts, corpus):
        assert (parts, corpus) == ("parts", "corpus")
        return cls()

    def __call__(self, params):
        return {"norms": Norm(params)}


class Splits(Norms):
    def __call__(self, params):
        return {"a": Perplexity(params, 2, 3), "b": Perplexity(1.0, 1, 1)}


def test_what_evaluators_find_stands_side_by_side_and_losses_alone_add_up(monkeypatch):
    monkeypatch.setattr(evaluation, "EVALUATORS", (Norms, Splits))
    found = Evaluation("parts", "corpus")(5.0)
    assert list(found) == ["norms", "a", "b"] and found["norms"].record() == {"norm": 5.0}
    assert list(splits(found)) == ["a", "b"]
    assert total(splits(found)) == Perplexity(6.0, 3, 4)
