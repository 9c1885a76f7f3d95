"""Evaluators: `EVALUATORS` are those of every run and of `lm eval`, in the order in which they are called."""

from __future__ import annotations

from typing import Any

from lm.data import Corpus
from lm.evals.evaluate import Evaluator, Measure, Parts, Validation
from lm.evals.perplexity import Perplexity

EVALUATORS: tuple[type[Evaluator], ...] = (Validation,)


class Evaluation:
    """All evaluators of a run."""

    def __init__(self, parts: Parts, corpus: Corpus):
        self._evaluators = [kind.make(parts, corpus) for kind in EVALUATORS]

    def __call__(self, params: Any) -> dict[str, Measure]:
        """What each finds, by name."""
        found: dict[str, Measure] = {}
        for evaluator in self._evaluators:
            found |= evaluator(params)
        return found


def splits(found: dict[str, Measure]) -> dict[str, Perplexity]:
    """The losses of validation splits among what was found, which add up (`total`)."""
    return {name: measure for name, measure in found.items() if isinstance(measure, Perplexity)}
