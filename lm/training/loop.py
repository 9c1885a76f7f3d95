"""One training run, top to bottom: corpus, mesh, setup, restore or init, compile, loop."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import fcntl
import json
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import codec, distributed
from lm.checkpoint import IMPORTED, Checkpoints, Meta
from lm.compilation import CacheCounter
from lm.config import CONFIG_FILE, Config, Resolved, check_mesh, check_task
from lm.data import Corpus, Stream, prepare
from lm.data.tf import tensorflow
from lm.errors import UserError
from lm.evals import perplexity
from lm.mesh import layout, make_mesh
from lm.models.base import FlopsPerToken, count, flops_per_token
from lm.training.metrics import Log, Timer, utilisation
from lm.training.setup import Setup


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
        loading = _background(tensorflow)
        corpus = prepare_once(config)
        check_corpus(config, corpus)
        mesh = make_mesh(config.mesh)
        check_mesh(config, mesh.size)
        setup = Setup.make(config, mesh)
        compiling = _background(_compile, setup)
        checkpoints = Checkpoints(workdir, config.checkpoint)
        data = config.data
        stream = Stream.of(data, corpus)
        start = checkpoints.latest()
        meta = None if start is None else checkpoints.meta(start)
        if meta is not None:
            stream.check(meta.data, meta.examples_seen)
        stream.check_epochs(
            step=start or 0,
            examples_seen=meta.examples_seen if meta else 0,
            steps=config.train.steps,
            batch_size=data.batch_size,
        )
        log = Log(workdir, total_steps=config.train.steps, start_step=start or 0, active=distributed.is_main())
        if distributed.is_main():
            (workdir / CONFIG_FILE).write_text(resolved.to_json())
        try:
            state = initial_state(config, setup) if start is None else checkpoints.restore(start, setup.abstract_state)
            step, cache, compile_s = compiling.result()
            loading.result()
            log.print(_opening(config, setup, start, meta, cache, compile_s, time.perf_counter() - began))
            if data.plan != "windows":
                shares = (f"{name} {share:.2%}" for name, share in stream.padding.items())
                log.print(f"{data.plan}: padding {', '.join(shares)}")
            run = Run(resolved, setup, corpus, stream, checkpoints, log)
            return run.loop(step, state, start or 0, meta.examples_seen if meta else 0)
        finally:
            log.close()
            checkpoints.close()


def initial_state(config: Config, setup: Setup) -> dict:
    """Fresh, or with the weights of another run, which keeps nothing of it but them."""
    folder = config.train.init_from
    if folder is None:
        return setup.init()
    if not (Path(folder) / "checkpoints").is_dir():
        raise UserError(f"train.init_from: {folder}: expected the folder of a run, got no checkpoints there")
    state = setup.init()
    del state["params"]  # before there are others: they may fill half of the device
    with contextlib.closing(Checkpoints(folder)) as source:
        step = source.latest()
        if step is None:
            raise UserError(f"train.init_from: {folder}: no finished checkpoint there yet")
        try:
            params = source.restore_params(step, setup.abstract_state["params"], "set model to what it was made with")
        except UserError as e:
            raise UserError(f"train.init_from: {e}") from e
    return state | {"params": params} | ({"ema": jax.tree.map(jnp.copy, params)} if "ema" in state else {})


@dataclasses.dataclass
class Run:
    """The parts of a run in progress."""

    resolved: Resolved
    setup: Setup
    corpus: Corpus
    stream: Stream
    checkpoints: Checkpoints
    log: Log

    def loop(self, train_step: Any, state: dict, step: int, examples_seen: int) -> Result:
        """Steps until `train.steps` or a request to stop. Waits for the device only to log, evaluate and save."""
        from lm.data.loader import make_loader

        config = self.resolved.config
        last, batch_size = config.train.steps, config.data.batch_size
        if step >= last:
            return Result(step, False, self.evaluate(step, state))
        timer, pending = Timer(), []  # (step, first example, metrics still on the device)
        with (
            distributed.StopSignal() as stop,
            make_loader(
                self.stream,
                sharding=self.setup.rows,
                batch_size=batch_size,
                start=examples_seen,
                examples=config.objective.examples_for(self.corpus.tokenizer),
                extra_rows=config.objective.extra_rows,
            ) as batches,
        ):
            for batch in batches:
                state, metrics = train_step(state, batch)
                pending.append((step, examples_seen, metrics))
                step, examples_seen = step + 1, examples_seen + batch_size
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
        self.checkpoints.wait()
        preempted = stopping and step < last
        if preempted:
            self.log.print(f"stopped at step {step}, checkpoint saved; run the same command to go on")
        return Result(step, preempted, None if preempted else evaluation)

    def record(self, pending: list, last: int, timer: Timer) -> None:
        """Logs the mean of an interval; waits for its last step."""
        metrics = self.check_finite(pending)
        seconds = timer.seconds()
        step, n = pending[-1][0] + 1, len(pending)
        config, mesh = self.resolved.config, self.setup.mesh
        tokens_per_s = n * config.data.batch_size * config.data.seq_len / seconds
        mfu = utilisation(self.flops, tokens_per_s, mesh.devices.flat[0].device_kind, mesh.size)
        record: dict[str, Any] = {k: float(np.mean([m[k] for m in metrics])) for k in ("loss", "nll", "grad_norm")}
        record |= {
            "lr": float(metrics[-1]["lr"]),
            "tokens_per_s": tokens_per_s,
            "step_s": seconds / n,
            "mfu": mfu.full,
            "mfu_causal": mfu.causal,
            "examples_seen": pending[-1][1] + config.data.batch_size,
            "time": time.time(),
        }
        self.log.train(step, last, record, (last - step) * seconds / n)

    @property
    def flops(self) -> FlopsPerToken:
        config = self.resolved.config
        seq_len = config.data.seq_len
        return flops_per_token(config.model, self.setup.infos, seq_len, config.objective.row(seq_len))

    def check_finite(self, pending: list) -> list[dict[str, np.ndarray]]:
        """The metrics of the pending steps on the host; stops at the first step that is not finite."""
        metrics = jax.device_get([m for _, _, m in pending])
        for (step, first, _), m in zip(pending, metrics, strict=True):
            if math.isfinite(m["loss"]) and math.isfinite(m["grad_norm"]):
                continue
            n = self.resolved.config.data.batch_size
            report = Path(self.checkpoints.folder).parent / f"nonfinite_step_{step + 1}.json"
            if distributed.is_main():
                where = self.stream.where(np.arange(first, first + n))
                report.write_text(json.dumps([row._asdict() for row in where], indent=1))
            kept = self.checkpoints.latest()
            raise NonFiniteLoss(
                f"step {step + 1}: loss {m['loss']}, grad_norm {m['grad_norm']}; examples {first}..{first + n - 1} "
                f"(documents in {report}); last good checkpoint: {'none' if kept is None else f'step {kept}'}; "
                f"try a lower optim.lr, a longer warm-up, optim.clip_norm, or train.precision=float32"
            )
        return metrics

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
    """Each source's validation split."""
    from lm.data.loader import eval_batches

    config = setup.config
    token_bytes = token_byte_table(corpus, config)
    results = {}
    for name, store in corpus.validation.items():
        batches = eval_batches(
            store,
            seq_len=config.data.seq_len,
            batch_size=config.data.batch_size,
            sharding=setup.rows,
            examples=config.objective.examples_for(corpus.tokenizer),
            extra_rows=config.objective.extra_rows,
            max_batches=config.eval.max_batches or None,
        )
        results[name] = perplexity.evaluate(setup.score, params, batches, token_bytes, config.objective.unit)
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
    """The corpus, tokenised by the first process while the others wait."""
    if distributed.is_main():
        corpus = prepare(config.data)
    distributed.barrier("prepare")
    return corpus if distributed.is_main() else prepare(config.data)


def check_workdir(workdir: Path) -> None:
    """An imported model has no optimizer state to go on from."""
    if (workdir / IMPORTED).is_dir():
        raise UserError(
            f"{workdir}: expected a new folder or a run to resume, got an imported model; take another --workdir and "
            f"start from it with train.init_from={workdir}"
        )


def check_corpus(config: Config, corpus: Corpus) -> None:
    """The tokenizer against the model and the objective."""
    tokenizer, objective = corpus.tokenizer, config.objective
    if tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"model.vocab_size: {config.model.vocab_size} is smaller than the tokenizer's {tokenizer.vocab_size}; "
            f"set at least that"
        )
    for name, expected in (("start_id", tokenizer.eos_id), ("pad_id", tokenizer.pad_id)):
        got = getattr(objective, name)
        if got != expected:
            raise UserError(f"objective.{name}: the tokenizer says {expected}, got {got}; set it to {expected}")


def _background(f: Any, *args: Any) -> concurrent.futures.Future:
    executor = concurrent.futures.ThreadPoolExecutor(1)
    future = executor.submit(f, *args)
    executor.shutdown(wait=False)
    return future


def _compile(setup: Setup) -> tuple[Any, CacheCounter, float]:
    began = time.perf_counter()
    with CacheCounter() as cache:
        compiled = setup.lower().compile()
    return compiled, cache, time.perf_counter() - began


def _opening(config, setup, start, meta, cache, compile_s, seconds) -> str:
    mesh = setup.mesh
    lines = [
        f"{type(config.model).__name__} {count(setup.infos):,} parameters on {mesh.size} x "
        f"{mesh.devices.flat[0].device_kind} ({layout(mesh.shape)}), {jax.process_count()} process(es)",
        f"step compiled in {compile_s:.1f} s (compilation cache {'hit' if cache.hits else 'miss'}); "
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
