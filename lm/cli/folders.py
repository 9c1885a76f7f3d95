"""Model folders: import-hf and export-hf."""

from __future__ import annotations

import argparse

from lm import errors
from lm.cli.command import CHECKPOINT, OVERRIDES, RUN, WORKDIR, argument, command
from lm.cli.surroundings import check_jax


@command(
    "import-hf",
    "make a run of a Hugging Face model folder",
    argument("folder", help="a folder with config.json and safetensors or pytorch_model.bin"),
    argument("workdir", help=f"{RUN}, to make"),
    OVERRIDES,
    argument(
        "--ignore-field",
        action="append",
        default=[],
        metavar="NAME",
        help="accept this field of config.json, which nobody here knows; may be given again",
    ),
)
def _import_hf(args: argparse.Namespace) -> int:
    from lm import compilation, convert

    check_jax()
    compilation.enable_cache()
    imported = convert.import_hf(args.folder, args.workdir, args.overrides, ignore_fields=args.ignore_field)
    print(imported)
    for note in imported.notes:
        print(f"note: {note}")
    settings = ["train.init_from", "data.tokenizer"] if imported.has_tokenizer else ["train.init_from"]
    go_on = " ".join(["lm train RECIPE --workdir NEW", *(f"{name}={args.workdir}" for name in settings)])
    print(f"in {args.workdir}; go on from it with: {go_on}")
    return errors.EXIT_FINISHED


@command(
    "export-hf",
    "write a run as a folder that transformers loads",
    WORKDIR,
    argument("folder", help="folder to make"),
    CHECKPOINT,
    argument("--dtype", help="float32, bfloat16 or float16 (default: as imported, else float32)"),
    argument("--overwrite", action="store_true", help="replace the folder if it is there"),
)
def _export_hf(args: argparse.Namespace) -> int:
    from lm import compilation, convert

    check_jax()
    compilation.enable_cache()
    name = convert.export_hf(args.workdir, args.folder, step=args.step, dtype=args.dtype, overwrite=args.overwrite)
    print(f"{args.folder}: {name}.from_pretrained({args.folder!r}) loads it")
    return errors.EXIT_FINISHED
