"""Training steps against transformers on the same cores: forward, backward, clipping, AdamW, in float32.

    python tools/bench/train_step.py [--size 124m|10m] [--rounds 10] [--peer-python PATH] [--variant "a.b=v ..."]...

Long-lived workers take turns, one step each, and every round reverses their order, so that whatever else the machine
does falls on both alike. All start from the same weights and see the same batches; the largest difference of their
losses is printed. A ratio is the median over rounds of (peer's seconds / ours). The peer is GPT2LMHeadModel with sdpa
attention and torch's AdamW, the faster of fused and foreach. Needs the [hf] extra, here or in --peer-python.
`--variant` adds a worker of ours with other config values, or `devices=1` for one device with two threads in place of
one device a core; the first worker of ours has the defaults.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
import time

import numpy as np

SIZES = {
    "124m": dict(vocab=50257, d=768, layers=12, heads=12, seq=512, batch=4),
    "10m": dict(vocab=65, d=384, layers=6, heads=6, seq=256, batch=12),
}
THREADS = 2
LR, BETAS, EPS, DECAY, CLIP = 3e-4, (0.9, 0.95), 1e-8, 0.1, 1.0


def weights(size: dict) -> dict[str, np.ndarray]:
    """Random GPT-2 weights under transformers' names, [in, out] as it stores them."""
    rng, d, n = np.random.default_rng(0), size["d"], size["layers"]

    def normal(*shape: int) -> np.ndarray:
        return (0.02 * rng.standard_normal(shape)).astype(np.float32)

    w = {"wte.weight": normal(size["vocab"], d), "wpe.weight": normal(size["seq"], d)}
    for i in range(n):
        w |= {f"h.{i}.attn.c_attn.weight": normal(d, 3 * d), f"h.{i}.attn.c_proj.weight": normal(d, d)}
        w |= {f"h.{i}.mlp.c_fc.weight": normal(d, 4 * d), f"h.{i}.mlp.c_proj.weight": normal(4 * d, d)}
    return w


def batches(size: dict):
    rng = np.random.default_rng(1)
    while True:
        yield rng.integers(0, size["vocab"], (size["batch"], size["seq"]), dtype=np.int32)


def torch_worker(size: dict, kind: str):
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(THREADS)
    config = GPT2Config(
        vocab_size=size["vocab"], n_positions=size["seq"], n_embd=size["d"], n_layer=size["layers"],
        n_head=size["heads"], resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, attn_implementation="sdpa",
        use_cache=False, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = GPT2LMHeadModel(config).train()
    with torch.no_grad():
        named = dict(model.transformer.named_parameters())
        for name, value in weights(size).items():
            named[name].copy_(torch.from_numpy(value))
    params = list(model.parameters())
    optimizer = torch.optim.AdamW(params, lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, **{kind: True})

    def step(tokens: np.ndarray) -> float:
        x = torch.from_numpy(tokens).long()
        loss = model(input_ids=x, labels=x).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, CLIP)
        optimizer.step()
        return loss.item()

    return step, f"torch {torch.__version__}"


def jax_worker(size: dict, overrides: str):
    import jax

    from lm import distributed
    from lm.config import Config, Train, resolved
    from lm.data import Data, Text
    from lm.mesh import Mesh, make_mesh
    from lm.models import GPT2
    from lm.objectives import CausalLM
    from lm.optim import AdamW, Constant
    from lm.training.setup import Setup

    d, h, n = size["d"], size["heads"], size["layers"]
    config = Config(
        model=GPT2(vocab_size=size["vocab"], d_model=d, n_layers=n, n_heads=h, max_positions=size["seq"]),
        data=Data(
            path="unused", sources={"x": Text(glob="unused")}, tokenizer="unused", seq_len=size["seq"],
            batch_size=size["batch"],
        ),
        # As the peer: no document boundaries, and the last token of a row has no target.
        objective=CausalLM(start_id=-2, pad_id=-1, document_mask=False, chunks=4 if size["vocab"] > 1000 else 1),
        optim=AdamW(lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY, clip_norm=CLIP, schedule=Constant()),
        train=Train(steps=10_000),
        mesh=Mesh(data=-1, fsdp=1),
    )  # fmt: skip
    words = overrides.split()
    devices = next((int(w.removeprefix("devices=")) for w in words if w.startswith("devices=")), None)
    distributed.use_cpu_cores(size["batch"], devices)
    config = resolved(config, [w for w in words if not w.startswith("devices=")]).config
    setup = Setup.make(config, make_mesh(config.mesh))
    state = setup.init()
    w = weights(size)

    def stack(name: str, *shape: int) -> np.ndarray:
        return np.stack([w[f"h.{i}.{name}.weight"].reshape(shape) for i in range(n)])

    qkv = stack("attn.c_attn", d, 3, h, d // h)
    new = {
        "embed": {"table": w["wte.weight"]},
        "positions": {"table": w["wpe.weight"]},
        "layers": {
            "attn": {"q": qkv[:, :, 0], "k": qkv[:, :, 1], "v": qkv[:, :, 2], "o": stack("attn.c_proj", h, d // h, d)},
            "mlp": {"up": stack("mlp.c_fc", d, 4 * d), "down": stack("mlp.c_proj", 4 * d, d)},
        },
    }
    shardings = jax.tree.map(lambda a: a.sharding, setup.abstract_state.params)
    state = state._replace(params=jax.device_put(_merged(state.params, new), shardings))

    def step(tokens: np.ndarray) -> float:
        nonlocal state
        rows = np.concatenate([tokens, np.full((len(tokens), 1), -1, np.int32)], axis=1)
        state, metrics = setup.step(state, jax.device_put({"tokens": rows}, setup.batch_shardings))
        return float(metrics["loss"])

    return step, f"jax {jax.__version__}"


def _merged(old: dict, new: dict) -> dict:
    return {k: _merged(v, new[k]) if isinstance(v, dict) and k in new else new.get(k, v) for k, v in old.items()}


def serve(size: dict, kind: str, options: str) -> None:
    """A worker: one step for each line on standard input; prints seconds, CPU seconds and loss."""
    step, version = (jax_worker if kind == "jax" else torch_worker)(size, options)
    stream = batches(size)
    print(version, flush=True)
    for _ in sys.stdin:
        tokens = next(stream)
        cpu, wall = time.process_time(), time.perf_counter()
        loss = step(tokens)
        print(time.perf_counter() - wall, time.process_time() - cpu, loss, flush=True)


class Worker:
    def __init__(self, python: str, size: str, kind: str, options: str):
        self.name = f"{kind} {options}".strip()
        env = os.environ | {"JAX_PLATFORMS": "cpu", "OMP_NUM_THREADS": str(THREADS), "HF_HUB_OFFLINE": "1"}
        args = [python, __file__, "--size", size, "--serve", kind, "--variant", options]
        self._process = subprocess.Popen(args, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self._line()

    def _line(self) -> str:
        line = self._process.stdout.readline() if self._process.stdout else ""
        if not line:
            raise SystemExit(f"worker {self.name!r} ended with {self._process.wait()}")
        return line.strip()

    def step(self) -> tuple[float, float, float]:
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        wall, cpu, loss = map(float, self._line().split())
        return wall, cpu, loss

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="10m")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--variant", action="append", default=[])
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    args = parser.parse_args()
    size = SIZES[args.size]
    if args.serve:
        serve(size, args.serve, args.variant[0])
        return
    workers = [Worker(args.peer_python, args.size, "torch", kind) for kind in ("fused", "foreach")]
    workers += [Worker(sys.executable, args.size, "jax", v) for v in ["", *args.variant]]
    versions = ", ".join(sorted({w.version for w in workers}))
    print(f"{args.size}: {size}, float32, {THREADS} threads, {platform.machine()}, {versions}")
    for _ in range(2):  # warm-up: compilation, allocation
        losses = [[w.step()[2] for w in workers]]
    rounds = []
    for i in range(args.rounds):
        order = range(len(workers)) if i % 2 else reversed(range(len(workers)))
        rounds.append({j: workers[j].step() for j in order})
        losses.append([rounds[-1][j][2] for j in range(len(workers))])
    for w in workers:
        w.close()
    tokens = size["batch"] * size["seq"]
    median = {j: statistics.median(r[j][0] for r in rounds) for j in range(len(workers))}
    peer = min((0, 1), key=median.__getitem__)
    print(f"warm-up 2, median of {args.rounds}; ratio to {workers[peer].name}; largest difference of losses")
    for j, w in enumerate(workers):
        ratio = statistics.median(r[peer][0] / r[j][0] for r in rounds)
        cpu = statistics.median(r[peer][1] / r[j][1] for r in rounds)
        apart = max(abs(row[j] - row[0]) for row in losses)
        print(f"{w.name:60} {tokens / median[j]:8.0f} tokens/s  x{ratio:.3f} (CPU x{cpu:.3f})  {apart:.1e}")


if __name__ == "__main__":
    main()
