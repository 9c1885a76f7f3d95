"""Between runs and Hugging Face folders: a folder becomes a run at step 0, a run becomes a folder.

An imported run keeps what its checkpoint does not hold of the folder (config, generation settings, dtypes, tensors
that no model reads), and is written back as it came. Both ways, what is made has its name when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import config as configs
from lm import run as runs
from lm.checkpoint import Checkpoints, Meta
from lm.checkpoint.imported import ImportRecord
from lm.config import Config, Resolved, Train
from lm.convert import body
from lm.convert.ids import checked_ids
from lm.convert.objective import objective_of, special_ids
from lm.data import Data, SentencePieceTokenizer, Text
from lm.data.tokenizer.huggingface import HFTokenizer
from lm.data.tokenizer.slow import SETTINGS, load_folder
from lm.data.tokenizer.slow import export as export_tokenizer
from lm.errors import UserError
from lm.files import check_folder
from lm.hf import export
from lm.hf.extras import copy_extras
from lm.hf.families import known
from lm.hf.folder import CONFIG, GENERATION_CONFIG, Opened, open_folder, read_json
from lm.hf.tensors.folder import open_tensors
from lm.hf.tensors.write import write_folder, write_tensors
from lm.hf.weights import nested, read_params
from lm.mesh import layout, make_mesh
from lm.models import Model, Transformer
from lm.nn.param import paths
from lm.objectives import CausalLM
from lm.optim import AdamW
from lm.training.setup import Setup
from lm.workdir import Workdir, read_here, versions, write, written_here

# In the folder `imported` of a run, beside the two JSON files of the model.
DTYPES_FILE = "dtypes.json"  # of each tensor, by its name in the folder
UNUSED = "unused"  # a folder of tensors
BESIDE = "beside"  # a folder of files of other libraries
FREE = ("compute", "capacity_factor")  # of a model: how it runs, not what its weights are
VOCABULARIES = tuple(name for name in export.TOKENIZER_FILES if name not in SETTINGS)


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import did. seconds: until the weights were on the devices, without the checkpoint. notes: what the user
    should know of the folder, a line each."""

    model: str
    parameters: int
    n_bytes: int
    seconds: float
    mesh: str
    has_tokenizer: bool
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        rate = self.n_bytes / self.seconds / 1e9
        return (
            f"{self.model} {self.parameters:,} parameters on {self.mesh}, {self.n_bytes / 1e9:.2f} GB read at "
            f"{rate:.2f} GB/s"
        )


def import_hf(
    folder: str | Path,
    workdir: str | Path | Workdir,
    overrides: Sequence[str] = (),
    *,
    ignore_fields: Sequence[str] = (),
) -> Imported:
    """Makes a run of a model folder, at step 0, with its weights on the mesh of all devices here.

    It is evaluated, generated from and exported as any run, and others start from it by `train.init_from=WORKDIR`.
    overrides: of the run's config, which says what the folder cannot: data, objective, mesh. Without a mesh among them
    it is one that fits, as in `lm.restore`. ignore_fields: names of fields of config.json that are accepted though
    nobody here knows them; the run remembers them.
    """
    workdir = Workdir.of(workdir)
    _check_new(workdir)
    with open_folder(folder, ignore_fields) as opened:
        tokenizer = _tokenizer(opened.folder)
        record = ImportRecord(
            architecture=opened.config["architectures"][0],
            untrained=body.untrained(opened),
            ignored_fields=tuple(ignore_fields),
            notes=(*checked_ids(opened, tokenizer), *body.note(opened), *map(_ignored, ignore_fields)),
        )
        resolved = configs.resolved(config_for(opened, tokenizer), overrides)
        _check_model(resolved.config.model, body.headed(opened.model))
        setup = _setup(resolved)
        began = time.perf_counter()
        params = jax.block_until_ready(_params(opened, setup, record.untrained))
        seconds = time.perf_counter() - began
        meta = Meta(
            config=resolved.to_json(),
            tokenizer=b"" if tokenizer is None else tokenizer.to_bytes(),
            examples_seen=0,
            data={},
            versions=versions(),
        )
        with _made_whole(workdir) as target:
            with written_here(target.imported) as kept:  # before the checkpoint, without which a run in a store is none
                _keep(opened, kept)
                record.write(kept)
            with contextlib.closing(Checkpoints(target, resolved.config.checkpoint)) as checkpoints:
                checkpoints.save_params(0, params, meta)
            write(target.config, resolved.to_json())
        n = sum(leaf.size for leaf in jax.tree.leaves(params))
        return Imported(
            model=type(opened.model).__name__,
            parameters=n,
            n_bytes=opened.tensors.n_bytes,
            seconds=seconds,
            mesh=layout(setup.mesh.shape),
            has_tokenizer=tokenizer is not None,
            notes=record.notes,
        )


def _params(opened: Opened, setup: Setup, untrained: tuple[str, ...]) -> dict:
    """The parameters of a run on its devices: those of the folder, and new ones where it has none."""
    shardings = {path: leaf.sharding for path, leaf in paths(setup.abstract_state.params).items()}
    read = read_params(body.read_slots(opened), opened.shapes, opened.read, shardings)
    return nested(paths(read) | body.fresh(setup, untrained))


def _ignored(name: str) -> str:
    return f"{name} of config.json is ignored, as asked: the run computes as if it were not there"


def export_hf(
    workdir: str | Path | Workdir,
    folder: str | Path,
    *,
    step: int | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> str:
    """Writes the weights of a run (their moving average where one is kept) as a folder that transformers loads; returns
    the name of the class. dtype: of the weights; None: of each as it was imported, else float32."""
    if dtype is not None and dtype not in export.DTYPES:
        raise UserError(f"--dtype: expected one of {', '.join(export.DTYPES)}, got {dtype!r}")
    workdir, target = Workdir.of(workdir), Workdir.of(folder)
    if target.is_remote:
        raise UserError(f"{folder}: expected a local folder to write, got an address; export to one and copy it there")
    folder = Path(target.path)
    check_folder(folder)  # before the weights are read
    workdir.reach()
    if not workdir.is_remote and Path(workdir.path).resolve().is_relative_to(Path(folder).resolve()):
        raise UserError(f"{folder}: expected a folder of its own, got one around the run {workdir}; give another")
    run = runs.restore(workdir, step=step)
    kept = _read_kept(workdir) if workdir.is_imported() else _made_here(run.config)
    kept = kept if dtype is None else kept.cast(dtype)
    model = body.body_of(run.config.model, kept.config)

    def extra(target: Path) -> None:
        _write_tokenizer(run.tokenizer, target)
        if workdir.is_imported():
            with read_here(workdir.imported) as own:
                copy_extras(own / BESIDE, target)

    export.write_model(
        folder,
        config=kept.config,
        generation=kept.generation,
        slots=export.layout_of(model, body.shapes_of(model), kept.dtypes),
        flat=paths(run.params),
        dtypes=kept.dtypes,
        unused=kept.unused,
        extra=extra,
        overwrite=overwrite,
    )
    return kept.config["architectures"][0]


def config_for(opened: Opened, tokenizer: Any) -> Config:
    """The config of an imported run. Its data are a place to fill in: what it trains on is said by who trains it."""
    objective, seq_len = objective_of(opened, tokenizer)
    return Config(
        model=body.headed(opened.model),
        data=Data(
            path=f"data/{opened.folder.resolve().name}",
            sources={"text": Text(glob="data/raw/*.txt")},
            tokenizer=str(opened.folder),
            seq_len=seq_len,
            batch_size=8 * jax.device_count(),
        ),
        objective=objective,
        optim=AdamW(lr=1e-5),
        train=Train(steps=1000),
    )


class _Kept(NamedTuple):
    """What a folder has besides the parameters. dtypes: of every tensor that holds one; unused: tensors as they are."""

    config: dict[str, Any]
    generation: dict[str, Any] | None
    dtypes: Mapping[str, np.dtype]
    unused: Mapping[str, np.ndarray]

    def cast(self, dtype: str) -> _Kept:
        # The older name of `dtype`, which would now contradict it.
        config = {name: value for name, value in self.config.items() if name != "torch_dtype"}
        to = np.dtype(jnp.dtype(dtype))
        unused = {name: x.astype(to) for name, x in self.unused.items()}
        return _Kept(config | {"dtype": dtype}, self.generation, dict.fromkeys(self.dtypes, to), unused)


@contextlib.contextmanager
def _made_whole(workdir: Workdir) -> Iterator[Workdir]:
    """Yields a new run to write: a local one has its name when it is complete. One in a store has it at once, but
    without a finished checkpoint it is none; after an error its objects go."""
    if not workdir.is_remote:
        with write_folder(workdir.path) as temporary:
            yield Workdir.of(temporary)
        return
    try:
        yield workdir
    except BaseException:
        workdir.path.rmtree(missing_ok=True)
        raise


def _keep(opened: Opened, folder: Path) -> None:
    (folder / CONFIG).write_text(json.dumps(opened.config, indent=2))
    if opened.generation is not None:
        (folder / GENERATION_CONFIG).write_text(json.dumps(opened.generation, indent=2))
    ours = body.read_slots(opened)
    dtypes = {name: opened.tensors.info(opened.stored[name]).dtype.name for name in ours}
    (folder / DTYPES_FILE).write_text(json.dumps(dtypes, indent=0))
    copy_extras(opened.folder, folder / BESIDE)
    # A pooler too, which no head for words reads.
    if unused := opened.unused() | {name: np.array(opened.read(name)) for name in opened.slots.keys() - ours.keys()}:
        write_tensors(folder / UNUSED, unused.items(), infos={n: (x.shape, x.dtype) for n, x in unused.items()})


def _read_kept(workdir: Workdir) -> _Kept:
    with read_here(workdir.imported) as folder:
        generation = read_json(folder / GENERATION_CONFIG) if (folder / GENERATION_CONFIG).is_file() else None
        dtypes = {name: np.dtype(jnp.dtype(dtype)) for name, dtype in read_json(folder / DTYPES_FILE).items()}
        unused: dict[str, np.ndarray] = {}
        if (folder / UNUSED).is_dir():
            with open_tensors(folder / UNUSED) as tensors:
                unused = {name: tensors.read(name) for name in tensors.names()}
        return _Kept(read_json(folder / CONFIG), generation, dtypes, unused)


def _made_here(config: Config) -> _Kept:
    """Makes a `_Kept` for a model that was trained here, from its config alone."""
    model, objective = config.model, config.objective
    ids = special_ids(objective)
    more: dict[str, Any] = dict(ids)
    if model.max_seq_len is None and (model.family == "decoder" or type(model) is Transformer):
        more["max_position_embeddings"] = objective.longest(config.data.seq_len)
    if isinstance(objective, CausalLM) and model.is_routed:
        more["router_aux_loss_coef"] = objective.router_balance
    float32 = np.dtype(np.float32)
    dtypes = dict.fromkeys(export.layout_of(model, body.shapes_of(model)), float32)
    unused = {name: np.zeros(shape, float32) for name, shape in known.of_model(model)[0].unused(model).items()}
    settings = None if model.family == "encoder" else ids
    return _Kept(export.config_of(model, "float32", more), settings, dtypes, unused)


def _tokenizer(folder: Path) -> HFTokenizer | None:
    """The folder's tokenizer; None where it has no vocabulary."""
    return load_folder(folder) if any((folder / name).is_file() for name in VOCABULARIES) else None


def _write_tokenizer(tokenizer: SentencePieceTokenizer | HFTokenizer | None, folder: Path) -> None:
    if isinstance(tokenizer, SentencePieceTokenizer):
        export_tokenizer(tokenizer, folder)
    elif tokenizer is not None:
        tokenizer.save(folder)


def _setup(resolved: Resolved) -> Setup:
    asked = {path.split(".")[0] for path, origin in resolved.origins.items() if origin == "command line"}
    if not asked & {"mesh", "rules"}:
        return runs.fitting_setup(resolved.config)
    mesh = make_mesh(resolved.config.mesh)
    configs.check_mesh(resolved.config, mesh.size)
    return Setup.make(resolved.config, mesh)


def _check_new(workdir: Workdir) -> None:
    if workdir.has_checkpoints() or workdir.read_config() is not None:
        raise UserError(f"{workdir}: expected a new folder, got one with a run in it; take another, or remove it first")
    if not workdir.is_new():
        got = "one with files in it" if workdir.path.is_dir() else "a file"
        raise UserError(f"{workdir}: expected a new or empty folder, got {got}; take another")


def _check_model(got: Model, expected: Model) -> None:
    """Refuses a model that is not the folder's, but for how it runs."""
    if type(got) is not type(expected):
        raise UserError(f"model: expected the folder's {type(expected).__name__}, got {type(got).__name__}; {_TAKES}")
    for field in dataclasses.fields(expected):
        a, b = getattr(expected, field.name), getattr(got, field.name)
        if a != b and field.name not in FREE and not field.name.endswith("dropout"):
            raise UserError(f"model.{field.name}: expected the folder's {a!r}, got {b!r}; {_TAKES}")


_TAKES = f"an import takes the model as it is; of it only {', '.join(FREE)} and dropout can be set"
