"""Many processes as one, and many cores as many devices: start-up, who writes, and stopping together.

The only module that looks at signals and at the number of cores. With one process, SIGTERM and Ctrl-C set a flag that
the loop polls. With many, JAX's preemption service catches SIGTERM and `StopSignal` answers alike on all of them at
the same step; a Python handler installed after `initialize` would disable it, so none is.
"""

from __future__ import annotations

import collections
import os
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeVar, cast

import jax
import numpy as np

from lm.errors import UserError

T = TypeVar("T")


def initialize(coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None) -> None:
    """Joins the processes of this run. Without arguments JAX detects the cluster (TPU pod, Slurm)."""
    given = (coordinator is not None, num_processes is not None, process_id is not None)
    if any(given) and not all(given):
        raise UserError("--coordinator, --num-processes and --process-id belong together; give all three or none")
    if coordinator is not None and num_processes is not None and process_id is not None:
        _check_group(coordinator, num_processes, process_id)
    # Without a bind address process 0 listens on all interfaces.
    bind = coordinator if process_id == 0 else None
    try:
        jax.distributed.initialize(coordinator, num_processes, process_id, coordinator_bind_address=bind)
    except ValueError as e:  # what it lacks when it has not found a cluster
        if coordinator is not None:
            raise
        raise UserError(
            f"--distributed: expected a TPU pod, Slurm or another cluster that JAX detects, got none ({e}); give "
            "--coordinator HOST:PORT --num-processes N --process-id I, or leave it out on one machine"
        ) from e
    # Else each process would train alone, and all write to one folder.
    if num_processes is not None and jax.process_count() != num_processes:
        raise RuntimeError(f"expected {num_processes} processes, JAX sees {jax.process_count()}")


def _check_group(coordinator: str, num_processes: int, process_id: int) -> None:
    host, _, port = coordinator.rpartition(":")
    if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator: expected HOST:PORT, got {coordinator!r}; name a free port of process 0")
    if num_processes < 1:
        raise UserError(f"--num-processes: expected at least 1, got {num_processes}; give the number that are started")
    if not 0 <= process_id < num_processes:
        raise UserError(
            f"--process-id: expected 0 to {num_processes - 1} of --num-processes {num_processes}, got {process_id}; "
            "each process has a number of its own"
        )


def use_cpu_cores(rows: int, n_devices: int | None = None) -> None:
    """Makes each core of this machine a JAX device, where the CPU is what JAX computes on. Before JAX's first use.

    XLA runs much of a program on one core whatever it has: copies, and what a scan stacks. As devices the cores share
    all of it, as a mesh of accelerators would: 1.14 times the speed of one device with two threads, on a 10M model
    (tools/bench/train_step.py). As many cores are used as divide `rows`, those of a batch that are computed together,
    or `n_devices` where a mesh asks for a number. Devices that XLA_FLAGS or JAX's config ask for are left alone.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    asked_for: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
    if "xla_force_host_platform_device_count" in flags or asked_for > 0:
        return
    # A container may be given fewer than there are.
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    n = n_devices or max(d for d in range(1, cores + 1) if rows % d == 0)
    try:
        jax.config.update("jax_num_cpu_devices", n)
    except RuntimeError:  # a program that calls us has used JAX already: its devices stay
        return
    if n >= cores > 1:  # a thread pool below each device would only get in its way
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()


class Pace:
    """Lets the host run at most `ahead` computations before the devices: `pace(outputs)` after each dispatch.

    Enough for the devices never to wait, and their batches take no more memory than that. Without it XLA's CPU client
    deadlocks: with several devices and more than 32 programs in flight, one device waits in a collective for another
    that cannot begin.
    """

    def __init__(self, ahead: int = 4):  # far below the 32 programs at which XLA's CPU client can deadlock
        self._ahead = ahead
        self._dispatched: collections.deque[Any] = collections.deque()

    def __call__(self, outputs: Any) -> None:
        self._dispatched.append(outputs)
        if len(self._dispatched) > self._ahead:
            jax.block_until_ready(self._dispatched.popleft())


def shutdown() -> None:
    """Leaves together: without it the peers of a finished process die of a lost heartbeat."""
    if jax.distributed.is_initialized():
        jax.distributed.shutdown()


def is_main() -> bool:
    """True on the one process that writes metrics and talks to the terminal."""
    return jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for every process."""
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def any_process(fact: bool) -> bool:
    """Whether it is so on one process at least: they all ask, and all get the same answer."""
    if jax.process_count() == 1:
        return fact
    from jax.experimental import multihost_utils

    return bool(multihost_utils.process_allgather(np.array(fact)).any())


def of_main(numbers: Sequence[int]) -> list[int]:
    """The numbers that the first process has."""
    if jax.process_count() == 1:
        return list(numbers)
    from jax.experimental import multihost_utils

    n = int(multihost_utils.broadcast_one_to_all(np.array(len(numbers))))
    mine = np.array([*numbers, *[0] * n][:n], np.int64)
    return [int(i) for i in multihost_utils.broadcast_one_to_all(mine)]


def together(f: Callable[[], T]) -> T:
    """f(), which raises UserError on all processes where it does on one: else those that go on would wait for it."""
    error, result = None, None
    try:
        result = f()
    except UserError as e:
        error = e
    if any_process(error is not None):
        raise error or UserError("expected all processes to go on, got one that refuses; its log says why")
    return cast(T, result)


class StopSignal:
    """`with StopSignal() as stop`: `stop.requested(step)` turns true at the step where all processes should save."""

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._old: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is not threading.main_thread():
            return self  # called as a library: the signals belong to the caller
        if jax.process_count() == 1:
            for s in (signal.SIGTERM, signal.SIGINT):
                self._old[s] = signal.signal(s, self._handle)
        else:  # Ctrl-C becomes the notice that the preemption service spreads
            self._old[signal.SIGINT] = signal.signal(signal.SIGINT, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        return self

    def __exit__(self, *_: object) -> None:
        for s, handler in self._old.items():
            signal.signal(s, handler)  # type: ignore[arg-type]

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self._flag.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: do not wait for the save
        self._flag.set()

    def requested(self, step: int) -> bool:
        if jax.process_count() == 1:
            return self._flag.is_set()
        from jax.experimental import multihost_utils

        return multihost_utils.reached_preemption_sync_point(step)
