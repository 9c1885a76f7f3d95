"""Import of a model folder: bytes a second and peak memory, against a plain read of the same bytes from the same disk.

A synthetic LLaMA in bfloat16 is written to a temporary folder without torch. In turns, with the page cache emptied of
its files before each: a fresh process reads the bytes into one buffer, another imports the folder through `lm.convert`
(weights onto the devices, and the checkpoint, are timed apart). Peak memory is that of the process less what it held
before the first weight; the bound is 3 times the largest stored tensor and, where devices share the host's memory, the
float32 parameters.

    python tools/bench/import_hf.py [--params 1.0e9] [--turns 3] [--folder ON_THE_DISK_TO_MEASURE]
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHARD_BYTES = 500_000_000


def write_llama(folder: Path, n_params: float) -> tuple[int, int]:
    """A folder of about `n_params` weights: (how many, bytes of the largest tensor). Depth follows from the number."""
    import ml_dtypes
    import numpy as np

    from lm.hf import export
    from lm.hf.tensors.write import write_tensors
    from lm.models import Llama
    from lm.models.base import abstract
    from lm.nn.param import paths

    d, ff, vocab = 2048, 5632, 32_000
    n_layers = max(1, round((n_params - 2 * vocab * d) / (4 * d * d + 3 * d * ff)))
    model = Llama(vocab_size=vocab, d_model=d, n_layers=n_layers, n_heads=32, d_ff=ff)
    shapes = {path: tuple(leaf.shape) for path, leaf in paths(abstract(model).params).items()}
    slots = export.layout_of(model, shapes)
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    rng = np.random.default_rng(0)

    def items():
        for name, slot in slots.items():
            yield name, (0.02 * rng.standard_normal(slot.shape, np.float32)).astype(bfloat16)

    infos = {name: (slot.shape, bfloat16) for name, slot in slots.items()}
    write_tensors(folder, items(), infos=infos, max_shard_bytes=SHARD_BYTES)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048}
    (folder / "config.json").write_text(json.dumps(export.config_of(model, "bfloat16", ids)))
    sizes = [math.prod(slot.shape) for slot in slots.values()]
    return sum(sizes), 2 * max(sizes)


def forget(folder: Path) -> None:
    """Takes the files out of the page cache."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_plainly(folder: Path) -> dict[str, float]:
    buffer = bytearray(1 << 24)
    began = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return {"seconds": time.perf_counter() - began}


def import_folder(folder: Path, workdir: Path) -> dict[str, float | str]:
    """With the peak before the first weight, with the weights on the devices, and of all of it."""
    import jax

    from lm import compilation, convert
    from lm.checkpoint import Checkpoints
    from lm.convert import folders
    from lm.hf import weights

    compilation.enable_cache()
    device = jax.devices()[0]
    peaks: dict[str, float] = {}
    read_params, save_params = weights.read_params, Checkpoints.save_params

    def read(*args):
        peaks["before"], peaks["cpu"] = peak_bytes(), -time.process_time()
        params = jax.block_until_ready(read_params(*args))
        peaks["read"], peaks["cpu"] = peak_bytes(), peaks["cpu"] + time.process_time()
        return params

    def save(self, *args):
        peaks["save"] = time.perf_counter()
        save_params(self, *args)

    folders.read_params, Checkpoints.save_params = read, save
    done = convert.import_hf(folder, workdir)
    save_s = time.perf_counter() - peaks.pop("save")
    kind = f"{jax.device_count()} x {device.platform} {device.device_kind}, jax {jax.__version__}"
    return {"seconds": done.seconds, "save_s": save_s, "all": peak_bytes(), "kind": kind, **peaks}


def worker(role: str, folder: Path, workdir: Path) -> dict:
    """One measurement in a process of its own."""
    command = [sys.executable, __file__, "--role", role, "--folder", str(folder), "--workdir", str(workdir)]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--params", type=float, default=1.0e9)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to write (default: the temporary folder)")
    parser.add_argument("--role", choices=["read", "import"], help=argparse.SUPPRESS)
    parser.add_argument("--workdir", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        done = read_plainly(args.folder) if args.role == "read" else import_folder(args.folder, args.workdir)
        print(json.dumps(done))
        return
    sys.path.insert(0, str(ROOT))
    scratch = Path(tempfile.mkdtemp(prefix="lm-import-", dir=args.folder))
    try:
        n, largest = write_llama(scratch / "model", args.params)
        runs: dict[str, list[dict]] = {"read": [], "import": []}
        for _ in range(1 + args.turns):
            for role, done in runs.items():
                forget(scratch / "model")
                done.append(worker(role, scratch / "model", scratch / "run"))
                shutil.rmtree(scratch / "run", ignore_errors=True)
    finally:
        shutil.rmtree(scratch)
    report(n, largest, {role: done[1:] for role, done in runs.items()})  # the first fills the compilation cache


def report(n: int, largest: int, runs: dict[str, list[dict]]) -> None:
    def median(role: str, what: str) -> float:
        return statistics.median(run[what] for run in runs[role])

    first = runs["import"][0]
    print(f"{first['kind']}, python {platform.python_version()}, {platform.machine()}, {os.cpu_count()} cores")
    print(f"LLaMA of {n:,} parameters, bfloat16, cold files, warm-up 1, median of {len(runs['import'])}")
    read, imported = 2 * n / median("read", "seconds") / 1e9, 2 * n / median("import", "seconds") / 1e9
    print(f"plain read {read:.2f} GB/s, import {imported:.2f} GB/s of stored bytes ({imported / read:.2f}x)")
    print(f"import {median('import', 'seconds'):.2f} s ({median('import', 'cpu'):.2f} s of CPU), "
          f"then checkpoint {median('import', 'save_s'):.2f} s")  # fmt: skip
    result = 4 * n if " cpu " in first["kind"] else 0
    bound = 3 * largest + result
    peak, whole = (max(run[name] - run["before"] for run in runs["import"]) for name in ("read", "all"))
    print(f"peak memory until the weights are on the devices {peak / 1e9:.2f} GB, bound {bound / 1e9:.2f} GB "
          f"(3 x {largest / 1e6:.0f} MB + {result / 1e9:.2f} GB): {'within' if peak <= bound else 'OVER'}; "
          f"with Orbax's write of the checkpoint {whole / 1e9:.2f} GB")  # fmt: skip


if __name__ == "__main__":
    main()
