"""TensorFlow, imported late, quietly, and without taking the accelerators from JAX."""

from __future__ import annotations

import functools
import logging
import os
import threading
from typing import Any

_one_at_a_time = threading.Lock()


def tensorflow() -> Any:
    """The `tensorflow` module. Takes seconds the first time: call it in the background where that matters, and before
    what imports it by itself. Two threads that import it at once, each a part, get modules that are half made."""
    with _one_at_a_time:
        return _tensorflow()


@functools.cache
def _tensorflow() -> Any:
    # Read once, when the module is loaded. oneDNN serves kernels that a data pipeline never runs, and says so loudly.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    logging.getLogger("absl").setLevel(logging.ERROR)  # TFDS warns of every local builder
    import tensorflow as tf

    for kind in ("GPU", "TPU"):
        tf.config.set_visible_devices([], kind)
    return tf
