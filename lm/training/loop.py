"""The steps of a run, and what happens between them: logs, evaluations, checkpoints."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Generator
from typing import Any

import jax
import numpy as np

from lm import distributed
from lm.checkpoint import Checkpoints, Meta
from lm.config import Resolved
from lm.data import Corpus, Ramp, Stream
from lm.data.stream.batches import Shape
from lm.evals import evaluate as evals
from lm.evals import perplexity
from lm.models.cost import FlopsPerToken, flops_per_token
from lm.training.log import Log
from lm.training.metrics import Timer, utilisation
from lm.training.programs import Steps
from lm.training.setup import Setup
from lm.training.watch import Done, LossWatch, Spikes
from lm.workdir import versions


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. `evaluation` is that of its last step, None when it was preempted."""

    step: int
    preempted: bool
    evaluation: dict[str, perplexity.Perplexity] | None


@dataclasses.dataclass
class Run:
    """The parts of a run in progress."""

    resolved: Resolved
    setup: Setup
    corpus: Corpus
    stream: Stream
    ramp: Ramp
    steps: Steps
    checkpoints: Checkpoints
    log: Log

    def __post_init__(self):
        config = self.resolved.config
        self.watch = LossWatch(
            self.stream, config.data.exclude, self.checkpoints, self.log, Spikes(config.train.spike_sigmas)
        )

    def batches(self, examples_seen: int, end: int) -> Generator[tuple[Shape, dict[str, jax.Array]], None, None]:
        """Of one stage of the ramp after another, up to example `end`."""
        from lm.data.loader.loader import make_loader

        objective, first = self.resolved.config.objective, True
        while examples_seen < end:
            shape, stage_end = self.ramp.shape(examples_seen), self.ramp.end(examples_seen) or end
            if not first or shape.seq_len != self.resolved.config.data.seq_len:
                self.log.print(f"from example {examples_seen:,}: batches of {shape.rows} x {shape.seq_len}")
            coming, first = self.ramp.following(examples_seen), False
            with make_loader(
                self.stream,
                sharding=self.setup.rows,
                batch_size=shape.examples,
                start=examples_seen,
                examples=objective.examples_for(self.corpus.tokenizer),
                extra_rows=objective.extra_rows,
                pieces=shape.pieces,
            ) as loader:
                for batch in loader:
                    yield shape, batch
                    if coming is not None:  # the step that was just begun is compiled: the next one has time
                        self.steps.begin(coming)
                    examples_seen += shape.examples
                    if examples_seen >= min(stage_end, end):
                        break

    def loop(self, state: dict, step: int, examples_seen: int) -> Result:
        """Steps until `train.steps` or a request to stop. The host waits for the devices to log, evaluate and save, and
        is else a few steps ahead."""
        config = self.resolved.config
        last = config.train.steps
        if step >= last:
            self.log.print(f"nothing to train: step {step} of train.steps={last} is done")
            return Result(step, False, self.evaluate(step, state))
        timer, pace, pending = Timer(), distributed.Pace(), list[Done]()
        end = self.ramp.after(examples_seen, last - step)
        with (
            distributed.StopSignal() as stop,
            contextlib.closing(self.batches(examples_seen, end)) as batches,
        ):
            for shape, batch in batches:
                state, metrics = self.steps[shape].step(state, batch)
                pending.append(Done(step, examples_seen, shape, metrics))
                pace(metrics)
                step, examples_seen = step + 1, examples_seen + shape.examples
                stopping = stop.requested(step)
                if step == 1 or step % config.train.log_every == 0 or step == last or stopping:
                    self.record(pending, last, timer)
                    pending = []
                    timer.restart()
                evaluate = step == last or (config.train.eval_every and step % config.train.eval_every == 0)
                save = step == last or stopping or step % config.checkpoint.every == 0
                evaluation = None
                with timer.paused():
                    if (evaluate or save) and pending:
                        self.watch.check_finite(pending)  # never save what is broken
                    if evaluate and not (stopping and step < last):
                        evaluation = self.evaluate(step, state)
                    if save:
                        self.save(step, state, examples_seen, evaluation)
                if step == last or stopping:
                    break
            self.checkpoints.wait()  # here, since a SIGTERM outside ends the process, its checkpoint half written
        preempted = stopping and step < last
        if preempted:
            self.log.print(f"stopped at step {step}, checkpoint saved; run the same command to go on")
        return Result(step, preempted, None if preempted else evaluation)

    def record(self, pending: list[Done], last: int, timer: Timer) -> None:
        """Logs the mean of an interval; waits for its last step."""
        metrics = self.watch.check_finite(pending)
        self.watch.check_spikes(pending, metrics)
        self.watch.check_targets(pending, metrics)
        seconds = timer.seconds()
        step, n = pending[-1].step + 1, len(pending)
        mesh = self.setup.mesh
        tokens_per_s = sum(done.shape.tokens for done in pending) / seconds
        mfu = utilisation(self.flops(pending), tokens_per_s, mesh.devices.flat[0].device_kind, mesh.size)
        record: dict[str, Any] = {k: float(np.mean([m[k] for m in metrics])) for k in ("loss", "nll", "grad_norm")}
        record |= {
            "lr": float(metrics[-1]["lr"]),
            "tokens_per_s": tokens_per_s,
            "step_s": seconds / n,
            "mfu": mfu.full,
            "mfu_causal": mfu.causal,
            "examples_seen": pending[-1].stop,
            "time": time.time(),
        }
        self.log.train(step, last, record, (last - step) * seconds / n)

    def flops(self, pending: list[Done]) -> FlopsPerToken:
        """The mean over the tokens of these steps."""
        config = self.resolved.config
        tokens = collections.Counter[int]()
        for done in pending:
            tokens[done.shape.seq_len] += done.shape.tokens
        each = {n: flops_per_token(config.model, self.setup.infos, n, config.objective.row(n)) for n in tokens}
        return FlopsPerToken(*(sum(each[n][i] * tokens[n] for n in tokens) / tokens.total() for i in range(2)))

    def evaluate(self, step: int, state: dict) -> dict[str, perplexity.Perplexity]:
        params = state.get("ema", state["params"])
        results = evaluate(self.setup, params, self.corpus)
        report = {name: r.record() for name, r in results.items()} | {"total": perplexity.total(results).record()}
        lines = [f"eval step {step}  {name}: {evals.describe(r)}" for name, r in results.items()]
        if len(results) > 1:
            lines.append(f"eval step {step}  total: {evals.describe(perplexity.total(results))}")
        self.log.evaluation(step, report, "\n".join(lines))
        return results

    def save(self, step: int, state: dict, examples_seen: int, evaluation: dict | None) -> None:
        meta = Meta(
            config=self.resolved.to_json(),
            tokenizer=self.corpus.tokenizer.to_bytes(),
            examples_seen=examples_seen,
            data=self.stream.fingerprint,
            versions=versions(),
        )
        found = perplexity.total(evaluation or {})
        self.log.flush()
        self.checkpoints.save(step, state, meta, found.record() if found.tokens else None)


def evaluate(setup: Setup, params: dict, corpus: Corpus) -> dict[str, perplexity.Perplexity]:
    """Each source's validation split, with the parts of a run."""
    config = setup.config
    return evals.evaluate(
        setup.score,
        params,
        corpus,
        config.objective,
        seq_len=config.data.seq_len,
        batch_size=config.data.batch_size,
        vocab_size=config.model.vocab_size,
        max_batches=config.eval.max_batches,
        sharding=setup.rows,
    )
