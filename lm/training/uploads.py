"""Files that grow, kept in a store whose objects cannot be appended to.

They are written in a folder of this machine, and each becomes one object, which is replaced whole: a reader never sees
half a file, and an object that was there stays until the new one is complete. Every `EVERY_S` seconds, in the
background, what has grown is uploaded. So a killed process loses at most the records since the last upload; what a
resumed run does not write again, the records up to its checkpoint, is uploaded before that checkpoint is.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from lm.workdir import Workdir

EVERY_S = 5.0  # a store takes about one write a second of an object, and refuses faster ones
# An upload is followed by a pause of this many times what it took. Whole files are sent again and again: without it a
# run of a million records would do little else on a slow network.
PAUSE = 20.0


class Uploads:
    """The files below `here`, a folder of this machine with the names of a run's, as objects of `workdir`.

    They may only grow. log: is told of an upload that failed; it is tried again.
    """

    def __init__(self, workdir: Workdir, log: Callable[[str], None]):
        self._workdir, self._log = workdir, log
        self._folder = tempfile.TemporaryDirectory(prefix="lm-run-")
        self.here = Workdir.of(self._folder.name)
        self._sizes: dict[Path, int] = {}  # of the objects, by path below `here`
        self._lock = threading.Lock()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="uploads")
        self._thread.start()

    def flush(self) -> None:
        """Returns when the store has what the files held at the call. Raises what the client does."""
        with self._lock:
            root = Path(self.here.path)
            # Files that are still written have a dot in front.
            for path in sorted(p for p in root.rglob("[!.]*") if p.is_file()):
                name = path.relative_to(root)
                if (size := path.stat().st_size) == self._sizes.get(name):
                    continue
                # What has come since is the next upload's.
                (self._workdir.path / name).write_bytes(path.read_bytes()[:size])
                self._sizes[name] = size

    def close(self) -> None:
        """Uploads the rest and removes the local files."""
        self._closing.set()
        self._thread.join()
        self.flush()
        self._folder.cleanup()

    def _run(self) -> None:
        pause = EVERY_S
        while not self._closing.wait(pause):
            began = time.monotonic()
            try:
                self.flush()
            except Exception as e:  # that of a flush which the run waits for ends it
                self._log(f"{self._workdir}: metrics not uploaded, trying again: {str(e).strip().splitlines()[:1]}")
            pause = max(EVERY_S, PAUSE * (time.monotonic() - began))
