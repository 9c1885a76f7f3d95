"""Which checkpoints are kept."""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import Any, Literal

from lm.errors import not_negative, positive


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """What is kept: the latest `keep_last`, every `keep_every` steps for good, and the best `keep_best` by `metric`."""

    every: int = 1000  # steps
    keep_last: int = 2
    keep_every: int = 0
    keep_best: int = 0
    metric: Literal["loss", "perplexity", "bits_per_byte"] = "loss"  # of the evaluation, lower is better
    verify: bool = False  # read each again from the disk after it was saved, in the background

    def __post_init__(self):
        positive("checkpoint", self, "every", "keep_last")
        not_negative("checkpoint", self, "keep_every", "keep_best")


def preservation(policy: Checkpoint) -> Any:
    """The policy as Orbax takes it."""
    from orbax.checkpoint import checkpoint_managers as policies

    keep = [policies.LatestN(policy.keep_last)]
    if policy.keep_every:
        keep.append(policies.EveryNSteps(policy.keep_every))
    if policy.keep_best:
        metric = operator.itemgetter(policy.metric)
        # Without a metric they would all be kept besides.
        best = functools.partial(policies.BestN, get_metric_fn=metric, keep_checkpoints_without_metrics=False)
        keep.append(best(reverse=True, n=policy.keep_best))  # lower is better: Orbax takes the highest by itself
    return policies.AnyPreservationPolicy(keep)


def best(policy: Checkpoint) -> dict[str, Any]:
    """What makes Orbax store the metrics of each step: a run that resumes would else know none of those before."""
    return {"best_fn": operator.itemgetter(policy.metric), "best_mode": "min"} if policy.keep_best else {}
