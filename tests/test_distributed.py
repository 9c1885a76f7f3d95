"""How far the host may run ahead of its devices."""

import os
import subprocess
import sys

import pytest

from lm.distributed import Pace

# Two devices with one thread each, as `use_cpu_cores` makes them, and more programs than XLA's CPU client can hold.
PROGRAM = """
import jax, jax.numpy as jnp, numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from lm.distributed import Pace

jax.config.update("jax_num_cpu_devices", 2)
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
rows = jax.device_put(np.ones((64, 256), np.float32), NamedSharding(mesh, PartitionSpec("data")))

@jax.jit
def total(w, x):
    for _ in range(20):
        x = jnp.tanh(x @ w)
    return jnp.sum(x)

w, sums, pace = jax.device_put(np.eye(256, dtype=np.float32), NamedSharding(mesh, PartitionSpec())), [], Pace()
for _ in range(150):
    sums.append(total(w, rows))
    pace(sums[-1])
print(len({float(s) for s in sums}))
"""


class Output:
    """Stands for an array of a device: it counts how often it was waited for."""

    def __init__(self):
        self.waited = 0

    def block_until_ready(self):
        self.waited += 1
        return self


def test_all_but_the_last_few_are_waited_for_in_order():
    outputs, pace = [Output() for _ in range(9)], Pace(3)
    for i, output in enumerate(outputs):
        pace({"loss": output})
        assert [o.waited for o in outputs] == [1] * max(0, i - 2) + [0] * (9 - max(0, i - 2))


@pytest.mark.multiprocess
def test_many_programs_with_collectives_end_on_a_cpu_with_several_devices():
    env = os.environ | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "1"), done.stderr[-2000:]
