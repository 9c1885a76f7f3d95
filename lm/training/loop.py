"""One training run, top to bottom: corpus, mesh, setup, restore or init, compile, loop."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import codec, distributed
from lm.checkpoint import IMPORTED, Checkpoints, Meta
from lm.config import CONFIG_FILE, Config, Resolved, check_mesh, check_task, ids_of_no_text
from lm.data import NO_PAD, Corpus, Ramp, Stream, Tokenizer, prepare
from lm.data.files import is_remote
from lm.data.inspect import passing_over
from lm.data.open_tokenizer import open_tokenizer, there
from lm.data.ramp import Shape
from lm.data.tf import tensorflow
from lm.data.tokenizers import from_bytes
from lm.errors import UserError
from lm.evals import perplexity
from lm.mesh import layout, make_mesh
from lm.models.base import FlopsPerToken, count, flops_per_token
from lm.training.compiled import Compiled, Steps, background
from lm.training.metrics import Log, Timer, utilisation
from lm.training.setup import Setup
from lm.training.watch import Spikes, write_provenance

EMPTY_STEPS = 16  # in a row without a target, after which a run stops


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended. `evaluation` is that of its last step, None when it was preempted."""

    step: int
    preempted: bool
    evaluation: dict[str, perplexity.Perplexity] | None


class NonFiniteLoss(UserError):
    """The loss or the gradient became NaN or infinite."""


def train(resolved: Resolved, workdir: str | Path) -> Result:
    """Trains to `train.steps`, from the latest checkpoint in `workdir` if there is one. The same call resumes."""
    config, workdir, began = resolved.config, Path(workdir), time.perf_counter()
    check_task(config)
    check_workdir(workdir)
    with lock(workdir):
        # Slow to import and needed only when batches are read: loaded while the step compiles.
        loading = background(tensorflow)
        of_weights = tokenizer_of_weights(config, workdir)
        check_named_tokenizer(config)
        corpus = prepare_once(config)
        check_tokenizer(config, corpus.tokenizer)
        check_same_ids(config, of_weights, corpus.tokenizer)
        mesh = make_mesh(config.mesh)
        check_mesh(config, mesh.size)
        setup = Setup.make(config, mesh)
        steps, ramp = Steps(setup), Ramp.of(config.data)
        checkpoints = Checkpoints(workdir, config.checkpoint)
        data = config.data
        stream = Stream.of(data, corpus)
        start = checkpoints.latest()
        meta = None if start is None else checkpoints.meta(start)
        examples_seen = meta.examples_seen if meta else 0
        steps.begin(ramp.shape(examples_seen))
        if meta is not None:
            stream.check(meta.data, meta.examples_seen)
        stream.check_epochs(step=start or 0, examples_seen=examples_seen, steps=config.train.steps, ramp=ramp)
        log = Log(workdir, total_steps=config.train.steps, start_step=start or 0, active=distributed.is_main())
        if distributed.is_main():
            (workdir / CONFIG_FILE).write_text(resolved.to_json())
        try:
            state = initial_state(config, setup) if start is None else checkpoints.restore(start, setup.abstract_state)
            compiled = steps[ramp.shape(examples_seen)]
            loading.result()
            log.print(_opening(config, setup, start, meta, compiled, time.perf_counter() - began))
            if data.plan != "windows":
                shares = (f"{name} {share:.2%}" for name, share in stream.padding.items())
                log.print(f"{data.plan}: padding {', '.join(shares)}")
            run = Run(resolved, setup, corpus, stream, ramp, steps, checkpoints, log)
            return run.loop(state, start or 0, examples_seen)
        finally:
            log.close()
            checkpoints.close()


def initial_state(config: Config, setup: Setup) -> dict:
    """Fresh, or with the weights of another run, which keeps nothing of it but them."""
    folder = config.train.init_from
    if folder is None:
        return setup.init()
    state = setup.init()
    del state["params"]  # before there are others: they may fill half of the device
    with contextlib.closing(Checkpoints(folder)) as source:
        step = source.latest()
        assert step is not None  # `tokenizer_of_weights` saw it
        try:
            params = source.restore_params(step, setup.abstract_state["params"], "set model to what it was made with")
        except UserError as e:
            raise UserError(f"train.init_from: {e}") from e
    return state | {"params": params} | ({"ema": jax.tree.map(jnp.copy, params)} if "ema" in state else {})


class Done(NamedTuple):
    """A step whose metrics may still be on the device. step: how many came before it; first: its first example."""

    step: int
    first: int
    shape: Shape
    metrics: dict[str, Any]

    @property
    def stop(self) -> int:
        return self.first + self.shape.examples


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
        self.spikes = Spikes(self.resolved.config.train.spike_sigmas)
        self.empty = 0  # steps in a row without a target

    def batches(self, examples_seen: int, end: int) -> Generator[tuple[Shape, dict[str, jax.Array]], None, None]:
        """Of one stage of the ramp after another, up to example `end`."""
        from lm.data.loader import make_loader

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
                        self.check_finite(pending)  # never save what is broken
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
        metrics = self.check_finite(pending)
        self.check_spikes(pending, metrics)
        self.check_targets(pending, metrics)
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

    def check_finite(self, pending: list[Done]) -> list[dict[str, np.ndarray]]:
        """The metrics of the pending steps on the host; stops at the first step that is not finite."""
        metrics = jax.device_get([done.metrics for done in pending])
        for done, m in zip(pending, metrics, strict=True):
            if math.isfinite(m["loss"]) and math.isfinite(m["grad_norm"]):
                continue
            report = self.report("nonfinite", done, m)
            kept = self.checkpoints.latest()
            raise NonFiniteLoss(
                f"step {done.step + 1}: loss {m['loss']}, grad_norm {m['grad_norm']}; examples {done.first}.."
                f"{done.stop - 1} (documents in {report}, which says how to pass them over); last good checkpoint: "
                f"{'none' if kept is None else f'step {kept}'}; "
                f"try a lower optim.lr, a longer warm-up, optim.clip_norm, or train.precision=float32"
            )
        return metrics

    def check_spikes(self, pending: list[Done], metrics: list[dict[str, np.ndarray]]) -> None:
        """Reports where a loss leaves those before it."""
        for done, m in zip(pending, metrics, strict=True):
            if spike := self.spikes(float(m["loss"])):
                report = self.report("spike", done, m, median=spike.median, sigmas=spike.sigmas)
                self.log.print(
                    f"step {done.step + 1}: loss {spike.loss:.4f} is {spike.sigmas:.0f} standard deviations above the "
                    f"median {spike.median:.4f} of the steps before it; its documents, and how to train without them, "
                    f"are in {report}"
                )

    def check_targets(self, pending: list[Done], metrics: list[dict[str, np.ndarray]]) -> None:
        """Stops a run that learns nothing: an objective may leave out whole batches, but not one after another."""
        for done, m in zip(pending, metrics, strict=True):
            self.empty = 0 if m["tokens"] else self.empty + 1
            if self.empty >= EMPTY_STEPS:
                raise UserError(
                    f"step {done.step + 1}: expected something to predict, got no target in {self.empty} steps; "
                    "`lm data preview` shows what the objective makes of the data: set an objective that fits it, or "
                    "its limits"
                )

    def report(self, kind: str, done: Done, metrics: dict[str, np.ndarray], **more: float) -> Path:
        """Writes the documents of a batch to the run's folder."""
        path = Path(self.checkpoints.folder).parent / f"{kind}_step_{done.step + 1}.json"
        if distributed.is_main():
            passed = passing_over(self.stream, self.resolved.config.data.exclude, done.first, done.stop)
            read = {name: float(metrics[name]) for name in ("loss", "grad_norm", "lr")}
            what: dict[str, Any] = {
                "step": done.step + 1,
                **{name: x if math.isfinite(x) else str(x) for name, x in read.items()},  # JSON has no NaN
                **more,
                "go_back_to_step": max((s for s in self.checkpoints.steps() if s <= done.step), default=0),
                "by_removing": "the later folders of checkpoints/",
                "pass_over_with": passed.strip('"'),  # JSON puts it in the quotes that a shell needs
            }
            write_provenance(path, self.stream, done.first, done.stop, **what)
        return path

    def evaluate(self, step: int, state: dict) -> dict[str, perplexity.Perplexity]:
        params = state.get("ema", state["params"])
        results = evaluate(self.setup, params, self.corpus)
        report = {name: r.record() for name, r in results.items()} | {"total": perplexity.total(results).record()}
        lines = [f"eval step {step}  {name}: {describe(r)}" for name, r in results.items()]
        if len(results) > 1:
            lines.append(f"eval step {step}  total: {describe(perplexity.total(results))}")
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
        self.checkpoints.save(step, state, meta, found.record() if found.tokens else None)


def evaluate(setup: Setup, params: dict, corpus: Corpus) -> dict[str, perplexity.Perplexity]:
    """Each source's validation split. UserError where its files are not those that were opened."""
    from lm.data.loader import eval_batches

    config = setup.config
    token_bytes = token_byte_table(corpus, config)
    results = {}
    for name, store in corpus.validation.items():
        store.check_unchanged()
        batches = eval_batches(
            store,
            seq_len=config.data.seq_len,
            batch_size=config.data.batch_size,
            sharding=setup.rows,
            examples=config.objective.examples_for(corpus.tokenizer),
            extra_rows=config.objective.extra_rows,
            max_batches=config.eval.max_batches or None,
            pad_id=config.objective.pad_id,
        )
        results[name] = perplexity.evaluate(setup.score, params, batches, token_bytes, config.objective.unit)
        store.check_unchanged()  # or the numbers are of another text
    return results


def token_byte_table(corpus: Corpus, config: Config) -> np.ndarray:
    """[V] int32 over the model's vocabulary, which may be padded beyond the tokenizer's."""
    table = np.zeros(config.model.vocab_size, np.int32)
    known = corpus.tokenizer.token_bytes()
    table[: len(known)] = known
    return table


def describe(r: perplexity.Perplexity) -> str:
    if not r.tokens:
        return f"nothing to predict (0 {r.unit}s)"
    bits = "" if r.bits_per_byte is None else f"  bits/byte {r.bits_per_byte:.4f}"
    per = "" if r.unit == "token" else f" per {r.unit}"
    return f"loss {r.loss:.4f}{per}  perplexity {r.perplexity:.2f}{bits}  ({r.tokens:,} {r.unit}s)"


# --- before the loop --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Refuses a folder that a live run is using. The lock goes with the process, however it ends."""
    workdir.mkdir(parents=True, exist_ok=True)
    if not distributed.is_main():
        yield
        return
    with (workdir / "run.lock").open("a+") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            f.seek(0)
            pid = f.read().strip() or "unknown"
            raise UserError(
                f"{workdir}: in use by a live run (process {pid}); wait for it, stop it, or take another --workdir"
            ) from None
        f.seek(0)
        f.truncate()
        f.write(f"{os.getpid()}\n")
        f.flush()
        yield


def prepare_once(config: Config) -> Corpus:
    """The corpus, tokenised by the first process while the others wait; or copied from afar by every host."""
    first = distributed.is_main() or is_remote(config.data.path)
    if first:
        corpus = prepare(config.data)
    distributed.barrier("prepare")
    return corpus if first else prepare(config.data)


def check_workdir(workdir: Path) -> None:
    """An imported model has no optimizer state to go on from."""
    if (workdir / IMPORTED).is_dir():
        raise UserError(
            f"{workdir}: expected a new folder or a run to resume, got an imported model; take another --workdir and "
            f"start from it with train.init_from={workdir}"
        )


def tokenizer_of_weights(config: Config, workdir: Path) -> Tokenizer | None:
    """That of the weights a new run begins with; None where it begins with none, goes on and needs them no more, or
    they came without. UserError where the weights are not there, before a corpus is made."""
    folder = config.train.init_from
    if folder is None or _has_checkpoint(workdir):
        return None
    if not (Path(folder) / "checkpoints").is_dir():
        raise UserError(
            f"train.init_from: {folder}: expected the folder of a run, got no checkpoints there; name a --workdir that "
            "was trained, or one of `lm import-hf`"
        )
    with contextlib.closing(Checkpoints(folder)) as source:
        step = source.latest()
        if step is None:
            raise UserError(f"train.init_from: {folder}: no finished checkpoint there yet")
        stored = source.meta(step).tokenizer
    return from_bytes(stored, f"{folder}: tokenizer", literal=True) if stored else None


def check_same_ids(config: Config, of_weights: Tokenizer | None, tokenizer: Tokenizer) -> None:
    """Ids of another tokenizer would stand for other text than the weights learnt, and fit them all the same."""
    if of_weights is not None and tokenizer.fingerprint != of_weights.fingerprint:
        folder = config.train.init_from
        raise UserError(
            f"train.init_from: {folder}: expected a corpus of its tokenizer {of_weights.fingerprint[:12]}, got one of "
            f"{tokenizer.fingerprint[:12]} in {config.data.path}; set data.tokenizer={folder} and data.path to a new "
            "folder"
        )


def _has_checkpoint(workdir: Path) -> bool:
    if not (workdir / "checkpoints").is_dir():
        return False
    with contextlib.closing(Checkpoints(workdir)) as checkpoints:
        return checkpoints.latest() is not None


def check_named_tokenizer(config: Config) -> None:
    """The tokenizer that the config names, before a corpus is made with it."""
    name = config.data.tokenizer
    if isinstance(name, str) and there(name):
        check_tokenizer(config, open_tokenizer(name))


def check_tokenizer(config: Config, tokenizer: Tokenizer) -> None:
    """The tokenizer against the model and the objective."""
    objective = config.objective
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            f"set at least that"
        )
    for name, expected in (("start_id", tokenizer.eos_id), ("pad_id", tokenizer.pad_id)):
        got = getattr(objective, name)
        if got != expected:
            none = name == "pad_id" and expected == NO_PAD
            why = f"{expected}, as it has no padding" if none else f"{expected}"
            or_else = ", or name a pad_token in its tokenizer_config.json" if none else ""
            raise UserError(f"objective.{name}: the tokenizer says {why}, got {got}; set it to {expected}{or_else}")
    size = tokenizer.token_bytes()
    for name, value in ids_of_no_text(objective):
        if 0 <= value < len(size) and size[value]:
            raise UserError(
                f"objective.{name}: expected an id that the tokenizer never makes of text, got {value}, which is "
                f"{tokenizer.pieces([value])[0]!r}; take one of its special tokens, make one of them special in its "
                f"tokenizer_config.json, or take an id from {len(size)} on"
            )


def _opening(config, setup, start, meta, compiled: Compiled, seconds) -> str:
    mesh = setup.mesh
    lines = [
        f"{type(config.model).__name__} {count(setup.infos):,} parameters on {mesh.size} x "
        f"{mesh.devices.flat[0].device_kind} ({layout(mesh.shape)}), {jax.process_count()} process(es)",
        f"step compiled in {compiled.seconds:.1f} s (compilation cache {'hit' if compiled.cache.hits else 'miss'}); "
        f"ready after {seconds:.1f} s",
    ]
    if meta is not None:
        lines.append(f"resuming at step {start}, {meta.examples_seen:,} examples seen")
        before, now = codec.flatten(json.loads(meta.config)["config"]), codec.flatten(codec.encode(config))
        changed = [f"{p}: {before.get(p)!r} -> {now.get(p)!r}" for p in now if before.get(p) != now.get(p)]
        lines += [f"changed since: {c}" for c in changed]
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """The versions of what numbers depend on, our own first."""
    from importlib.metadata import PackageNotFoundError, version

    found = {}
    for package in ("lm-pretraining", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy"):
        with contextlib.suppress(PackageNotFoundError):  # a checkout on the path is not a distribution
            found[package] = version(package)
    return found
