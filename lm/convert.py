"""Between runs and Hugging Face folders: a folder becomes a run at step 0, a run becomes a folder.

An imported run keeps the folder's config, tokenizer and generation settings beside its checkpoint, and is written back
with them as long as its model is the one that they describe.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import config as configs
from lm import run as runs
from lm.checkpoint import Checkpoints, Meta
from lm.config import CONFIG_FILE, Config, Train
from lm.data import Data, Text
from lm.errors import UserError
from lm.hf import export, families
from lm.hf.family import TASKS
from lm.hf.fields import Fields
from lm.hf.folder import CONFIG, GENERATION_CONFIG, Opened, open_folder, read_json, read_model, read_task
from lm.hf.tensors import open_tensors, write_tensors
from lm.hf.weights import read_params
from lm.models import T5, Bart, MBart, Model, Transformer
from lm.nn.param import paths
from lm.objectives import CausalLM, Denoising, MaskedLM, Objective, Seq2Seq, SpanCorruption
from lm.optim import AdamW
from lm.training.loop import versions
from lm.training.setup import Setup

FOLDER = "hf"  # in the folder of an imported run
UNUSED = "unused"  # a folder of tensors within it


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import did: parameters, bytes read, seconds until they were on the devices."""

    model: str
    parameters: int
    n_bytes: int
    seconds: float

    def __str__(self) -> str:
        rate = self.n_bytes / self.seconds / 1e9
        return f"{self.model} {self.parameters:,} parameters, {self.n_bytes / 1e9:.2f} GB read at {rate:.2f} GB/s"


def import_hf(folder: str | Path, workdir: str | Path, overrides: Sequence[str] = ()) -> Imported:
    """Makes a run of a model folder, at step 0, with its weights on the mesh of all devices here.

    It is evaluated, generated from and exported as any run, and others start from it by `train.init_from=WORKDIR`.
    overrides: of the run's config, which says what the folder cannot: data, objective, mesh.
    """
    workdir = Path(workdir)
    if (workdir / CONFIG_FILE).exists() or (workdir / "checkpoints").exists():
        raise UserError(f"{workdir}: there is a run here already; take a new folder or remove it")
    with open_folder(folder) as opened:
        tokenizer = _tokenizer(opened.folder)
        resolved = configs.resolved(config_for(opened, tokenizer), overrides)
        if _sizes(resolved.config.model) != _sizes(opened.model):
            raise UserError("model: an import takes the model of the folder; override only model.scan, remat and the like")
        mesh = runs.fitting_mesh(resolved.config)
        setup = Setup.make(resolved.config, mesh)
        shardings = {path: leaf.sharding for path, leaf in paths(setup.abstract_state["params"]).items()}
        began = time.perf_counter()
        params = jax.block_until_ready(read_params(opened.slots, opened.shapes, opened.read, shardings))
        seconds = time.perf_counter() - began
        meta = Meta(
            config=resolved.to_json(),
            tokenizer=b"" if tokenizer is None else tokenizer.to_bytes(),
            examples_seen=0,
            data={},
            versions=versions(),
        )
        _keep(opened, workdir / FOLDER)
        checkpoints = Checkpoints(workdir, resolved.config.checkpoint)
        checkpoints.save_params(0, params, meta)
        checkpoints.close()
        (workdir / CONFIG_FILE).write_text(resolved.to_json())
        n = sum(leaf.size for leaf in jax.tree.leaves(params))
        return Imported(type(opened.model).__name__, n, opened.tensors.n_bytes, seconds)


def export_hf(
    workdir: str | Path, folder: str | Path, *, step: int | None = None, dtype: str | None = None, overwrite: bool = False
) -> str:
    """Writes the weights of a run (their moving average where one is kept) as a folder that transformers loads; returns
    the name of the class. dtype: of the weights; None: that of the folder it was imported from, else float32."""
    run = runs.restore(workdir, step=step)
    model, origin = run.config.model, Path(run.config.train.init_from or workdir)
    kept = next((d for d in (Path(workdir) / FOLDER, origin / FOLDER) if d.is_dir()), Path(workdir) / FOLDER)
    config, generation, unused = _kept(kept, model)
    if config is None:
        config, generation, unused = *_configs(run, dtype or "float32"), {}
    dtype = dtype or config.get("dtype") or config.get("torch_dtype") or "float32"
    if dtype not in export.DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(export.DTYPES)}, got {dtype!r}")
    config = {**{k: v for k, v in config.items() if k != "torch_dtype"}, "dtype": dtype}
    flat = paths(run.params)
    slots = export.layout_of(model, {path: tuple(leaf.shape) for path, leaf in flat.items()})
    export.write_model(
        folder,
        config=config,
        generation=generation,
        slots=slots,
        flat=flat,
        dtypes=dict.fromkeys(slots, np.dtype(jnp.dtype(dtype))),
        unused={name: x.astype(jnp.dtype(dtype)) for name, x in unused.items()},
        extra=lambda target: _write_tokenizer(run.tokenizer, target),
        overwrite=overwrite,
    )
    return config["architectures"][0]


def config_for(opened: Opened, tokenizer: Any) -> Config:
    """The config of an imported run: its model and special ids; the data are named when it is trained."""
    model = opened.model
    seq_len = min(model.max_seq_len or 1024, 1024)
    where = str(opened.folder)
    name = opened.folder.resolve().name or "imported"
    return Config(
        model=model,
        data=Data(
            path=f"data/{name}",
            sources={"text": Text(glob="data/raw/*.txt")},
            tokenizer=where,
            seq_len=seq_len,
            batch_size=8 * jax.device_count(),
        ),
        objective=objective_for(opened, tokenizer),
        optim=AdamW(lr=1e-5),
        train=Train(steps=1000),
    )


def objective_for(opened: Opened, tokenizer: Any) -> Objective:
    """The family's own objective with the ids of the folder."""
    model = opened.model
    ids = {} if tokenizer is None else tokenizer.ids

    def token(role: str, default: int) -> int:
        generation = opened.generation or {}
        for value in (ids.get(role), opened.config.get(f"{role}_token_id"), generation.get(f"{role}_token_id")):
            value = value[0] if isinstance(value, list) else value
            if value is not None and 0 <= value < model.vocab_size:
                return value
        return default

    last = model.vocab_size - 1
    end = token("eos", token("sep", 0))
    pad = token("pad", end)
    if model.family == "decoder":
        coefficient = float(opened.config.get("router_aux_loss_coef") or 0.01)
        return CausalLM(start_id=token("bos", end), pad_id=pad, router_balance=coefficient)
    if model.family == "encoder":
        cls, sep, mask = token("cls", token("bos", 0)), token("sep", end), token("mask", last)
        return MaskedLM(
            start_id=sep, pad_id=pad, cls_id=cls, sep_id=sep, mask_id=mask, vocab_size=model.vocab_size
        )
    if isinstance(model, T5):
        return SpanCorruption(start_id=end, pad_id=pad, first_sentinel_id=last, n_sentinels=min(100, last - max(end, pad) - 1))
    if isinstance(model, Bart | MBart):
        return Denoising(start_id=end, pad_id=pad, mask_id=token("mask", last))
    assert isinstance(model, Transformer), model
    start = token("decoder_start", pad)
    return Seq2Seq(start_id=end, pad_id=pad, decoder_start_id=start, max_source=128, max_target=128)


def _tokenizer(folder: Path) -> Any:
    """The folder's tokenizer; None where no file of one is there."""
    from lm.data.tokenizers import load_folder

    return load_folder(folder) if any((folder / name).is_file() for name in export.TOKENIZER_FILES) else None


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    from lm.data import Tokenizer
    from lm.data.tokenizers import export as export_tokenizer

    if isinstance(tokenizer, Tokenizer):
        export_tokenizer(tokenizer, folder)
    elif tokenizer is not None:
        tokenizer.save(folder)


def _keep(opened: Opened, folder: Path) -> None:
    """What a run's own files do not hold of a model folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(opened.config, indent=2))
    if opened.generation is not None:
        (folder / GENERATION_CONFIG).write_text(json.dumps(opened.generation, indent=2))
    if unused := opened.unused():
        write_tensors(folder / UNUSED, unused.items(), infos={n: (x.shape, x.dtype) for n, x in unused.items()})


def _kept(folder: Path, model: Model) -> tuple[Any, Any, Mapping[str, np.ndarray]]:
    """(config.json, generation_config.json, unused tensors) of an import that still describe `model`, else Nones."""
    if not (folder / CONFIG).is_file():
        return None, None, {}
    config = read_json(folder / CONFIG)
    family, ending = families.of_config(config, str(folder / CONFIG))
    fields = Fields(config, str(folder / CONFIG), {})
    described = read_model(family, fields, read_task(config, TASKS[ending], str(folder / CONFIG)))
    if _sizes(dataclasses.replace(described, **_tied(model))) != _sizes(model):
        return None, None, {}
    generation = read_json(folder / GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else None
    if not (folder / UNUSED).is_dir():
        return config, generation, {}
    with open_tensors(folder / UNUSED) as tensors:
        return config, generation, {name: np.array(tensors.read(name)) for name in tensors.names()}


def _tied(model: Model) -> dict[str, Any]:
    """What is read off the tensors and not off the config."""
    return {"tied": model.tied} if hasattr(model, "tied") else {}


def _sizes(model: Model) -> Model:
    """The model without what says only how it runs."""
    return dataclasses.replace(model, scan=True, remat="none", attention_block=0, dropout=0.0, attention_dropout=None)


def _configs(run: runs.Run, dtype: str) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """config.json and generation_config.json of a model that was trained here."""
    config = run.config
    objective, tokenizer = config.objective, run.tokenizer
    ids: dict[str, Any] = {"pad_token_id": objective.pad_id, "eos_token_id": tokenizer.eos_id if tokenizer else objective.start_id}
    if config.model.family == "encoder_decoder":
        ids["decoder_start_token_id"] = objective.decoder_start_id
    elif config.model.family == "decoder":
        ids["bos_token_id"] = objective.start_id
    more: dict[str, Any] = dict(ids)
    if config.model.max_seq_len is None and config.model.family == "decoder":
        more["max_position_embeddings"] = config.data.seq_len
    if isinstance(objective, CausalLM) and config.model.active_experts < 1:
        more |= {"router_aux_loss_coef": objective.router_balance}
    return export.config_of(config.model, dtype, more), None if config.model.family == "encoder" else ids
