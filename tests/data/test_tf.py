"""TensorFlow comes whole, whichever thread asks first."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_a_corpus_may_be_made_while_a_thread_loads_tensorflow():
    code = """
import importlib, threading
from lm.data.tf import tensorflow
found = []
asked = [lambda: tensorflow(), lambda: importlib.import_module("lm.data.sources.python_corpus").tfds.core, tensorflow]
threads = [threading.Thread(target=lambda f=f: found.append(f())) for f in asked]
for t in threads: t.start()
for t in threads: t.join()
assert len(found) == 3
print(int(tensorflow().constant(3)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
