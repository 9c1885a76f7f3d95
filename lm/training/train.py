"""One training run, top to bottom: corpus, mesh, setup, where it starts, restore or init, compile, loop."""

from __future__ import annotations

import time
from pathlib import Path

import jax

from lm import distributed
from lm.config import Resolved, check_mesh, check_task
from lm.data import BatchSchedule, Stream
from lm.data.tf import tensorflow
from lm.mesh import layout, make_mesh
from lm.models.cost import count
from lm.training.loop import Loop, Result
from lm.training.programs import Compiled, Programs, background
from lm.training.setup import Setup
from lm.training.start import Start, check_workdir, open_data
from lm.training.watch import Finite, Spikes, Targets
from lm.workdir import Workdir


def train(resolved: Resolved, workdir: str | Path | Workdir) -> Result:
    """Trains to `train.steps`, from the latest checkpoint in `workdir` if there is one. The same call resumes.

    Raises UserError for a run that cannot go on as asked, with its folder as it was: nothing is written before the
    loop, the corpus apart.
    """
    config, began = resolved.config, time.perf_counter()
    check_task(config)
    folder = Workdir.of(workdir)
    check_workdir(folder)
    with folder.open(lock=distributed.is_main()):
        # Slow to import and needed only when batches are read: loaded while the step compiles.
        loading = background(tensorflow)
        corpus = open_data(config, folder)
        mesh = make_mesh(config.mesh)
        check_mesh(config, mesh.size)
        setup = Setup.make(config, mesh)
        stream = Stream.of(config.data, corpus)
        start = Start.find(folder, setup, stream)
        programs, shape = Programs(setup), BatchSchedule.of(config.data).shape(start.position.examples_seen)
        programs.start(shape)  # in the background, while the state is made or read
        state = start.state(setup)
        compiled = programs[shape]  # raises what compiling raised, before anything is written
        loading.result()
        # In this order: a loss that is not finite is in no spread.
        observers = (Finite(), Spikes(config.train.spike_sigmas), Targets())
        loop = Loop(resolved, setup, corpus, stream, programs, observers)
        return loop.run(state, start, _opening(setup, stream, compiled, time.perf_counter() - began))


def _opening(setup: Setup, stream: Stream, compiled: Compiled, seconds: float) -> str:
    config, mesh = setup.config, setup.mesh
    lines = [
        f"{type(config.model).__name__} {count(setup.infos):,} parameters on {mesh.size} x "
        f"{mesh.devices.flat[0].device_kind} ({layout(mesh.shape)}), {jax.process_count()} process(es)",
        f"step compiled in {compiled.seconds:.1f} s (compilation cache {'hit' if compiled.cache.hits else 'miss'}); "
        f"ready after {seconds:.1f} s",
    ]
    if config.data.packing != "split":
        shares = (f"{name} {share:.2%}" for name, share in stream.padding.items())
        lines.append(f"{config.data.packing}: padding {', '.join(shares)}")
    return "\n".join(lines)
