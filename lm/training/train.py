"""One training run, top to bottom: corpus, mesh, setup, restore or init, compile, loop."""

from __future__ import annotations

import time
from pathlib import Path

import jax

from lm import distributed
from lm.checkpoint import Checkpoints
from lm.config import Resolved, changes, check_mesh, check_task
from lm.data import Ramp, Stream
from lm.data.tf import tensorflow
from lm.mesh import layout, make_mesh
from lm.models.cost import count
from lm.training.log import Log
from lm.training.loop import Result, Run
from lm.training.programs import Compiled, Steps, background
from lm.training.setup import Setup
from lm.training.start import (
    check_named_tokenizer,
    check_same_ids,
    check_tokenizer,
    check_workdir,
    initial_state,
    prepare_once,
    tokenizer_of_weights,
)
from lm.workdir import CONFIG_FILE, lock


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
        lines += [f"changed since: {change}" for change in changes(meta.config, config)]
    return "\n".join(lines)
