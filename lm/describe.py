"""What a config is and costs, as text: every value with its origin, parameters, FLOPs, bytes per device."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lm import codec
from lm import config as configs
from lm.checkpoint.imported import ImportRecord
from lm.config import Resolved
from lm.errors import UserError
from lm.mesh import layout
from lm.models import base as models
from lm.models import cost
from lm.training.memory import device_bytes
from lm.workdir import Workdir


def describe(target: str, overrides: Sequence[str] = (), n_devices: int | None = None) -> str:
    """Describes a recipe (path or name) or the folder of a run. `n_devices` defaults to the fewest the mesh fits."""
    if n_devices is not None and n_devices < 1:
        raise UserError(f"--devices: expected at least 1, got {n_devices}")
    resolved = _resolve(target, overrides)
    config = resolved.config
    model = models.abstract(config.model)
    seq_len = config.data.seq_len
    flops = cost.flops_per_token(config.model, model.infos, seq_len, config.objective.row(seq_len))
    n = n_devices or config.mesh.min_devices
    configs.check_mesh(config, n)
    memory = device_bytes(config, n)
    tokens = config.data.batch_size * seq_len
    lines = [*_values(resolved), ""]
    parameters, active = cost.count(model.infos), cost.count_active(config.model, model.infos)
    halved = flops.causal != flops.full
    facts = {
        "parameters": f"{parameters:,}" + (f", {active:,} active for a token" if active != parameters else ""),
        "tokens per step": f"{tokens:,}",
        "tokens in all": f"{tokens * config.train.steps:,}",
        "FLOPs per token": f"{flops.full:.4g}" + (f" (full attention), {flops.causal:.4g} (causal)" if halved else ""),
        "FLOPs in all": f"{flops.full * tokens * config.train.steps:.3g}" + (" (full attention)" if halved else ""),
        "mesh": f"{n} device(s): {layout(config.mesh.sizes(n))}",
        "bytes per device": f"{_gib(memory.total)}, activations not counted",
        "  params": _gib(memory.params),
        "  optimizer": _gib(memory.optimizer),
        "  gradients": _gib(memory.gradients),
    }
    if memory.ema:
        facts["  ema"] = _gib(memory.ema)
    facts |= _imported(target)
    width = max(map(len, facts))
    return "\n".join(lines + [f"{k:<{width}}  {v}" for k, v in facts.items()])


def _resolve(target: str, overrides: Sequence[str]) -> Resolved:
    if os.path.isfile(target):
        return configs.resolve(target, overrides)
    workdir = Workdir.of(target)
    stored = workdir.read_config()
    if stored is not None:
        return configs.overridden(Resolved.from_json(stored, str(workdir.config)), overrides)
    if workdir.is_remote:
        raise UserError(f"{workdir}: expected the folder of a run, got no {workdir.config.name} there")
    return configs.resolve(target, overrides)


def _imported(target: str) -> dict[str, str]:
    """What the import of a model folder remembers; {} of anything else."""
    if os.path.isfile(target):
        return {}
    workdir = Workdir.of(target)
    return ImportRecord.read(workdir.imported).lines() if workdir.is_imported() else {}


def _values(resolved: Resolved) -> list[str]:
    flat = codec.flatten(codec.encode(resolved.config))
    rows = []
    for path, value in flat.items():
        if path.rpartition(".")[2] == codec.TYPE:
            path, value = path.removesuffix(codec.TYPE).rstrip("."), value.rpartition(".")[2]
            if path:
                rows.append((path, value, resolved.origins.get(f"{path}.{codec.TYPE}", "default")))
        else:
            rows.append((path, repr(value), resolved.origins.get(path, "default")))
    widths = [max(len(r[i]) for r in rows) for i in (0, 1)]
    return [f"{p:<{widths[0]}}  {v:<{widths[1]}}  {o}" for p, v, o in rows]


def _gib(n: int) -> str:
    return f"{n / 2**30:.2f} GiB" if n >= 2**30 else f"{n / 2**20:.2f} MiB"
