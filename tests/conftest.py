"""Tests run on 8 virtual CPU devices, and share what they compile; set up before JAX is imported."""

import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
_FLAG = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if _FLAG not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAG}".strip()
# The same programs are compiled again and again: by workers, by tests, by the processes that tests start.
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(__file__).parent.parent / ".pytest_cache" / "compiled")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"

MAPS = Path("/proc/self/maps")
MANY = 20_000  # of the 65,530 memory maps that Linux gives a process; every compiled program takes some


def pytest_runtest_teardown() -> None:
    """Drops compiled programs before there are so many that XLA cannot map another, and crashes."""
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MANY:
        import gc

        import jax

        jax.clear_caches()
        gc.collect()
