"""Greedy decoding of GPT-2 124M in float32: prompt 32 + 32 new tokens, batch 1 and 8, against `transformers`.

Both run as long-lived workers that take turns, with random weights. The peer needs a Python with torch and
transformers; without `--peer-python`, this system alone is timed. Spinning OpenMP threads make the peer far slower on a
busy machine: compare on an idle one, or by `cpu` with --threads 1.

    python tools/bench/decode.py --peer-python /path/to/venv/bin/python
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

VOCAB = 50257


def serve_ours(args: argparse.Namespace):
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import jax
    import numpy as np

    from lm.generation import Generator, Sampling
    from lm.models import GPT2
    from lm.models.base import init

    class Ids:
        vocab_size = VOCAB

    model = GPT2()
    # The last id, the start token, gets a table row of zeros, so that no random draw of weights ends a row early.
    params = init(model, jax.random.key(0))
    params["embed"]["table"] = params["embed"]["table"].at[VOCAB - 1].set(0.0)
    generator = Generator(model, params, Ids(), start_id=VOCAB - 1, pad_id=VOCAB - 1)
    prompts = np.random.default_rng(0).integers(0, VOCAB - 1, (64, args.prompt - 1))  # the start token is the first
    device = jax.devices()[0]
    versions = {"jax": jax.__version__, "device": f"{device.platform} {device.device_kind}"}

    def generate(batch: int) -> None:
        rows = generator.tokens(prompts[:batch].tolist(), Sampling(max_new_tokens=args.new, temperature=0.0))
        assert all(len(r) == args.new for r in rows)

    return versions, generate


def serve_peer(args: argparse.Namespace):
    import torch
    import transformers

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config()).eval()
    prompts = torch.randint(0, VOCAB - 1, (64, args.prompt))
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": args.threads}

    def generate(batch: int) -> None:
        ids = prompts[:batch]
        with torch.inference_mode():
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=args.new,
                max_new_tokens=args.new,
                do_sample=False,
                pad_token_id=VOCAB - 1,
            )
        assert out.shape[1] == args.prompt + args.new

    return versions, generate


class Worker:
    """A process that times one call for each line `batch` it reads."""

    def __init__(self, python: str, role: str, args: argparse.Namespace):
        command = [python, __file__, "--role", role, "--prompt", str(args.prompt), "--new", str(args.new)]
        command += ["--threads", str(args.threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self._read()

    def time(self, batch: int) -> dict:
        self.process.stdin.write(f"{batch}\n")
        self.process.stdin.flush()
        return self._read()

    def _read(self) -> dict:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.process.args[0]}: the worker ended; its error is above")
        return json.loads(line)


def serve(role: str, args: argparse.Namespace) -> None:
    versions, generate = {"ours": serve_ours, "peer": serve_peer}[role](args)
    print(json.dumps(versions), flush=True)
    for line in sys.stdin:
        wall, cpu = time.perf_counter(), time.process_time()
        generate(int(line))
        print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", help="a Python that imports torch and transformers")
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2, help="of the peer; JAX takes all cores")
    parser.add_argument("--role", choices=["ours", "peer"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        return serve(args.role, args)
    workers = {"ours": Worker(sys.executable, "ours", args)}
    if args.peer_python:
        workers["peer"] = Worker(args.peer_python, "peer", args)
    for name, worker in workers.items():
        print(f"{name}: {worker.versions}")
    print(
        f"GPT-2 124M float32, greedy, prompt {args.prompt} + {args.new} new, warm-up 1, median (least) of {args.turns}"
    )
    for batch in args.batch:
        times: dict[str, list[dict]] = {name: [] for name in workers}
        for _ in range(1 + args.turns):
            for name, worker in workers.items():
                times[name].append(worker.time(batch))
        wall = {}
        for name, runs in times.items():
            wall[name] = [r["wall"] for r in runs[1:]]
            median, cpu = statistics.median(wall[name]), statistics.median(r["cpu"] for r in runs[1:])
            print(
                f"batch {batch} {name}: {median:.3f} ({min(wall[name]):.3f}) s, {1e3 * median / args.new:.1f} ms/step, "
                f"{batch * args.new / median:.0f} tokens/s, cpu {cpu:.2f} s, "
                f"first call {runs[0]['wall']:.1f} s"
            )
        if "peer" in wall:
            median = statistics.median(wall["peer"]) / statistics.median(wall["ours"])
            least = min(wall["peer"]) / min(wall["ours"])
            print(f"batch {batch}: {median:.2f}x the peer's speed by medians, {least:.2f}x by least times")


if __name__ == "__main__":
    main()
