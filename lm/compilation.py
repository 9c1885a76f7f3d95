"""The persistent compilation cache: where it is, and whether it was hit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax

CACHE_FOLDER = Path("~/.cache/lm/compilation")


def enable_cache(folder: Path = CACHE_FOLDER) -> None:
    """Keeps every compiled program in `folder`, those that compile quickly included."""
    jax.config.update("jax_compilation_cache_dir", str(folder.expanduser()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    # 0 would let JAX choose a size by the file system.
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


class CacheCounter:
    """Counts hits and misses of the persistent compilation cache while it is entered."""

    def __enter__(self) -> CacheCounter:
        self.hits = self.misses = 0
        self._on = True

        def listen(event: str, **_: Any) -> None:
            if self._on:
                self.hits += event == "/jax/compilation_cache/cache_hits"
                self.misses += event == "/jax/compilation_cache/cache_misses"

        jax.monitoring.register_event_listener(listen)
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
