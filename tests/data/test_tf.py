"""TensorFlow comes whole, whichever thread asks first."""

import subprocess
import sys


def test_threads_that_ask_at_once_get_the_same_whole_module():
    code = """
import threading
from lm.data.tf import tensorflow
found = []
threads = [threading.Thread(target=lambda: found.append(tensorflow())) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
assert len(found) == 4 and all(f is found[0] for f in found)
print(int(found[0].constant(3)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "3\n"), done.stderr
