"""The steps of a run, and what happens between them: logs, evaluations, checkpoints."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
from collections.abc import Generator, Sequence
from typing import Any

import jax
import numpy as np

from lm import distributed
from lm.checkpoint import Checkpoints, Meta
from lm.config import Resolved, changes
from lm.data import BatchSchedule, Corpus, Stream
from lm.data.stream.batches import BatchShape
from lm.evals.evaluate import Measure
from lm.evals.evaluation import Evaluation, splits
from lm.evals.perplexity import total
from lm.models.cost import FlopsPerToken, flops_per_token
from lm.training.log import Log
from lm.training.metrics import Clock, utilisation
from lm.training.programs import Programs
from lm.training.setup import Setup
from lm.training.start import Start
from lm.training.state import Position, State
from lm.training.watch import Done, Observer, Watch
from lm.workdir import versions, write


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. `evaluation` is that of its last step, None when it was preempted."""

    step: int
    preempted: bool
    evaluation: dict[str, Measure] | None


class Loop:
    """The parts of a run in progress. `run` may be called again, also with the state of another start of the same
    folder: what is compiled stays, and so do the observers.

    clock: what the run is at. opening: lines that open the log.
    """

    def __init__(
        self,
        resolved: Resolved,
        setup: Setup,
        corpus: Corpus,
        stream: Stream,
        programs: Programs,
        observers: Sequence[Observer],
    ):
        self.resolved, self.setup, self.corpus, self.stream = resolved, setup, corpus, stream
        self.programs, self.observers, self.clock = programs, observers, Clock()
        self.ramp = BatchSchedule.of(resolved.config.data)
        self.measure = Evaluation(setup, corpus)

    def run(self, state: State, start: Start, opening: str = "") -> Result:
        """Trains from `start`, whose state is given up, to `train.steps` or a request to stop.

        All that a run writes it writes from here on: its config over that of an earlier start, and its log, without the
        records that it makes again.
        """
        config, main, at = self.resolved.config, distributed.is_main(), start.position
        distributed.barrier("start")  # no process refuses any more
        aside = start.set_aside() if main else []
        distributed.barrier("set aside")  # before others list the steps
        if main:
            write(start.folder.config, self.resolved.to_json())
        self.log = Log(start.folder, total_steps=config.train.steps, start_step=at.step, active=main)
        with (
            contextlib.closing(self.log),
            contextlib.closing(Checkpoints(start.folder, config.checkpoint, self.log.print)) as self.checkpoints,
        ):
            self.watch = Watch(self.observers, self.stream, config.data.exclude, self.checkpoints, self.log)
            self.log.print("\n".join(filter(None, [opening, *aside, *self.changes(start)])))
            return self.steps(state, at)

    def changes(self, start: Start) -> list[str]:
        """Says where the run goes on, and which settings are others than there."""
        if start.meta is None:
            return []
        step, seen = start.position
        return [
            f"resuming at step {step}, {seen:,} examples seen",
            *(f"changed since: {c}" for c in changes(start.meta.config, self.resolved.config)),
        ]

    def steps(self, state: State, at: Position) -> Result:
        """Runs the steps. The host waits for the devices to log, evaluate and save, and is else a few steps ahead."""
        config, clock = self.resolved.config, self.clock
        last = config.train.steps
        if at.step >= last:
            self.log.print(f"nothing to train: step {at.step} of train.steps={last} is done")
            return Result(at.step, False, self.evaluate(at.step, state))
        pace, begun, done = distributed.Pace(), list[Done](), list[Done]()  # done: looked at, and not yet logged
        end = self.ramp.after(at.examples_seen, last - at.step)
        clock.restart()
        with (
            distributed.StopSignal() as stop,
            contextlib.closing(self.batches(at.examples_seen, end)) as batches,
        ):
            while True:
                with clock.phase("data"):
                    shape, batch = next(batches)
                with clock.phase("step"):
                    state, metrics = self.programs[shape].step(state, batch)
                    begun.append(Done(at, shape, metrics))
                    pace(metrics)  # the metrics, as the next step consumes the state
                at = at.after(shape)
                # Every process asks at every step, so that all agree on one.
                ending, stopping = at.step == last, stop.requested(at.step)
                # The first step shows at once that a run runs.
                log = at.step == 1 or at.step % config.train.log_every == 0 or ending or stopping
                evaluate = ending or (config.train.eval_every and at.step % config.train.eval_every == 0)
                save = ending or stopping or at.step % config.checkpoint.every == 0
                if log or evaluate or save:  # never save what is broken
                    with clock.phase("log"):
                        done += self.watch.look(begun)
                        begun = []
                if log:
                    self.record(done, last)
                    done = []
                    clock.restart()
                evaluation = None
                if evaluate and not (stopping and not ending):  # a preemption leaves time to save alone
                    with clock.phase("eval"):
                        evaluation = self.evaluate(at.step, state)
                if save:
                    with clock.phase("save"):
                        self.save(at, state, evaluation)
                if ending or stopping:
                    break
            with clock.phase("save"):  # here, since outside a SIGTERM ends the process, the checkpoint unfinished
                self.checkpoints.wait()
        preempted = stopping and not ending
        if preempted:
            self.log.print(f"stopped at step {at.step}, checkpoint saved; run the same command to go on")
        return Result(at.step, preempted, None if preempted else evaluation)

    def batches(self, examples_seen: int, end: int) -> Generator[tuple[BatchShape, dict[str, jax.Array]], None, None]:
        """Yields batches from example `examples_seen` to `end`, one phase of the ramp after another, with their
        shapes."""
        from lm.data.loader.loader import make_loader

        objective, first = self.resolved.config.objective, True
        while examples_seen < end:
            shape, phase_end = self.ramp.shape(examples_seen), self.ramp.end(examples_seen) or end
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
                rows_per_example=shape.rows_per_example,
            ) as loader:
                for batch in loader:
                    yield shape, batch
                    if coming is not None:  # the step that was just begun is compiled: the next one has time
                        self.programs.start(coming)
                    examples_seen += shape.examples
                    if examples_seen >= min(phase_end, end):
                        break

    def record(self, done: list[Done], last: int) -> None:
        """Logs the mean of an interval. step_s, data_s: seconds of a step, and of them those that the host waited for
        its batch."""
        seconds, at, n = self.clock.training(), done[-1].step, len(done)
        mesh = self.setup.mesh
        tokens_per_s = sum(d.shape.tokens for d in done) / seconds
        mfu = utilisation(self.flops(done), tokens_per_s, mesh.devices.flat[0].device_kind, mesh.size)
        record: dict[str, Any] = {k: float(np.mean([d.metrics[k] for d in done])) for k in ("loss", "nll", "grad_norm")}
        record |= {
            "lr": float(done[-1].metrics["lr"]),
            "tokens_per_s": tokens_per_s,
            "step_s": seconds / n,
            "data_s": self.clock.spent("data") / n,
            "mfu": mfu.full,
            "mfu_causal": mfu.causal,
            "examples_seen": done[-1].stop,
            "time": time.time(),
        }
        self.log.train(at, last, record, (last - at) * seconds / n)

    def flops(self, done: list[Done]) -> FlopsPerToken:
        """The mean FLOPs over the tokens of these steps."""
        config = self.resolved.config
        tokens = collections.Counter[int]()
        for d in done:
            tokens[d.shape.seq_len] += d.shape.tokens
        each = {n: flops_per_token(config.model, self.setup.infos, n, config.objective.row(n)) for n in tokens}
        return FlopsPerToken(*(sum(each[n][i] * tokens[n] for n in tokens) / tokens.total() for i in range(2)))

    def evaluate(self, step: int, state: State) -> dict[str, Measure]:
        """Evaluates after `step` steps and logs what is found."""
        results = self.measure(state.evaluated)
        every = results | {"total": total(splits(results))}
        lines = [f"eval step {step}  {name}: {r}" for name, r in every.items() if name != "total" or len(results) > 1]
        self.log.evaluation(step, {name: r.record() for name, r in every.items()}, "\n".join(lines))
        return results

    def save(self, at: Position, state: State, evaluation: dict[str, Measure] | None) -> None:
        """Saves a checkpoint, which is written in the background."""
        meta = Meta(
            config=self.resolved.to_json(),
            tokenizer=self.corpus.tokenizer.to_bytes(),
            examples_seen=at.examples_seen,
            data=self.stream.fingerprint,
            versions=versions(),
        )
        found = total(splits(evaluation or {}))
        self.log.flush()
        # Without a metric it does not compete for keep_best.
        self.checkpoints.save(at.step, state, meta, found.record() if found.tokens else None)
