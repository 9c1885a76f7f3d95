"""The `lm` command. The only place that parses arguments, prints errors without a traceback, and sets exit codes."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn

from lm import errors

if TYPE_CHECKING:
    from lm.data import Store
    from lm.generation import BeamSearch, Sampling

# What `generate` draws with where nothing else is said.
SAMPLING: dict[str, Any] = {
    "temperature": 0.8,
    "top_k": 0,
    "top_p": 0.95,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "seed": 0,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command and exits."""
    args = _parse(list(sys.argv[1:] if argv is None else argv))
    code = _run(args)
    sys.stdout.flush()
    sys.stderr.flush()
    if args.command == "train" and code != errors.EXIT_FINISHED:
        os._exit(code)  # no exit handlers: in a group of processes they wait for peers that may be gone
    sys.exit(code)


def _run(args: argparse.Namespace) -> int:
    try:
        return args.run_command(args)
    except errors.UserError as e:
        print(f"lm {args.command}: error: {e}", file=sys.stderr)
        if args.traceback:
            traceback.print_exc()
        return errors.EXIT_USER
    except KeyboardInterrupt:
        print(f"lm {args.command}: interrupted", file=sys.stderr)
        return 130
    except Exception:
        traceback.print_exc()
        return errors.EXIT_FAILED


# --- commands ---------------------------------------------------------------------------------------------------------
# Each imports what it needs when it runs: `describe` and `generate` start without TensorFlow.


def _train(args: argparse.Namespace) -> int:
    from lm import compilation, config, distributed

    resolved = config.resolve(args.recipe, args.overrides)
    if args.distributed or args.coordinator or args.num_processes is not None or args.process_id is not None:
        distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    else:
        distributed.use_cpu_cores(*config.rows_and_devices(resolved.config))
    compilation.enable_cache()
    from lm.training.train import train

    result = train(resolved, args.workdir)
    distributed.shutdown()
    return errors.EXIT_PREEMPTED if result.preempted else errors.EXIT_FINISHED


def _eval(args: argparse.Namespace) -> int:
    from lm import compilation, config, distributed, run
    from lm.data import open_corpus
    from lm.evals import report
    from lm.evals.evaluate import Validation
    from lm.workdir import Workdir

    workdir = Workdir.of(args.workdir)
    if (stored := workdir.read_config()) is not None:
        resolved = config.Resolved.from_json(stored, str(workdir.config))
        distributed.use_cpu_cores(*config.rows_and_devices(resolved.config))
    compilation.enable_cache()
    restored = run.restore(args.workdir, step=args.step, overrides=args.overrides)
    config.check_task(restored.config)
    corpus = open_corpus(restored.config.data)
    if restored.tokenizer is None or corpus.tokenizer.fingerprint != restored.tokenizer.fingerprint:
        raise errors.UserError(
            f"{restored.config.data.path}: made with another tokenizer than the run {args.workdir}; "
            f"prepare its data again, or name the right folder with data.path=..."
        )
    results = Validation.make(restored.setup, corpus)(restored.params)
    report.print_evaluation(results, corpus, f"{args.workdir} at step {restored.step}")
    return errors.EXIT_FINISHED


def _generate(args: argparse.Namespace) -> int:
    from lm import compilation, run

    how = _how(args)
    compilation.enable_cache()
    generator = run.restore(args.workdir, step=args.step).generator()
    prompts = args.prompts or [sys.stdin.read()]
    shown = ["" if generator.reads else prompt for prompt in prompts]  # what the text goes on from
    if len(prompts) == 1:
        print(shown[0], end="", flush=True)
        began, n = time.perf_counter(), 0
        for piece in generator.stream(prompts[0], how):
            print(piece, end="", flush=True)
            n += len(piece)
        print()
        print(f"({n} characters in {time.perf_counter() - began:.1f} s)", file=sys.stderr)
    else:
        for prompt, text in zip(shown, generator(prompts, how), strict=True):
            print(f"{prompt}{text}\n{'-' * 40}")
    return errors.EXIT_FINISHED


def _how(args: argparse.Namespace) -> Sampling | BeamSearch:
    from lm.generation import BeamSearch, Sampling

    stop, settings = (
        tuple(args.stop),
        {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None},
    )
    if args.beams is None:
        if args.length_penalty is not None:
            raise errors.UserError("--length-penalty: expected none without --beams, which it ranks; give --beams too")
        return Sampling(max_new_tokens=args.max_new_tokens, stop=stop, **SAMPLING | settings)
    penalty = settings.pop("repetition_penalty", None)
    if settings:
        name, value = next(iter(settings.items()))
        raise errors.UserError(
            f"--{name.replace('_', '-')}: expected none with --beams, which draws nothing, got {value}; leave one out"
        )
    return BeamSearch(
        max_new_tokens=args.max_new_tokens,
        beams=args.beams,
        length_penalty=args.length_penalty,
        repetition_penalty=penalty,
        stop=stop,
    )


def _prepare(args: argparse.Namespace) -> int:
    from lm import config
    from lm.data import prepare

    if (args.host is None) != (args.hosts is None):
        raise errors.UserError(
            "--host I --hosts N: expected both or none, got one; each host needs a number of its own"
        )
    data = config.resolve(args.recipe, args.overrides).config.data
    prepare(data, force=args.force, host=args.host or 0, hosts=1 if args.hosts is None else args.hosts)
    return errors.EXIT_FINISHED


def _data_preview(args: argparse.Namespace) -> int:
    from lm import config
    from lm.data import Ramp, Stream, open_corpus
    from lm.data.inspect.preview import preview

    resolved = config.resolve(args.recipe, args.overrides).config
    data, corpus = resolved.data, open_corpus(resolved.data)
    stream = Stream.of(data, corpus)
    ramp = Ramp.of(data)
    print(preview(stream, corpus.tokenizer, resolved.objective, step=args.step, ramp=ramp, rows=args.rows))
    return errors.EXIT_FINISHED


def _data_where(args: argparse.Namespace) -> int:
    from lm import run
    from lm.data import Ramp, Stream, open_corpus
    from lm.data.inspect import provenance

    at = run.position(args.workdir, args.step)
    data = at.config.data
    stream = Stream.of(data, open_corpus(data))
    for meta in at.metas:
        stream.check(meta.data, meta.examples_seen)
    first, shape = at.examples_seen, Ramp.of(data).shape(at.examples_seen)
    print(provenance.where(stream, step=args.step, first=first, shape=shape, rows=args.rows, exclude=data.exclude))
    return errors.EXIT_FINISHED


def _data_stats(args: argparse.Namespace) -> int:
    from lm.data.inspect import histogram, stats

    stores = _stores(args)
    if args.png:
        histogram.write_png(stores, args.png)
    print(stats.stats(stores))
    return errors.EXIT_FINISHED


def _data_verify(args: argparse.Namespace) -> int:
    from lm.data.inspect import stats

    for line in stats.verify(_stores(args)):
        print(line, flush=True)
    return errors.EXIT_FINISHED


def _stores(args: argparse.Namespace) -> dict[str, Store]:
    """Of a folder as they are; of a recipe those it names, which must be made with its settings."""
    from lm.data import open_corpus
    from lm.data.inspect import stats
    from lm.data.sources.files import is_remote

    if os.path.isdir(args.target) or is_remote(args.target):
        if args.overrides:
            raise errors.UserError(
                f"{args.target}: expected no overrides with a folder, got {args.overrides[0]!r}; name a recipe for them"
            )
        return stats.find_stores(args.target)
    from lm import config

    return stats.stores_of(open_corpus(config.resolve(args.target, args.overrides).config.data))


def _import_hf(args: argparse.Namespace) -> int:
    from lm import compilation, convert

    compilation.enable_cache()
    imported = convert.import_hf(args.folder, args.workdir, args.overrides)
    print(imported)
    settings = ["train.init_from", "data.tokenizer"] if imported.has_tokenizer else ["train.init_from"]
    go_on = " ".join(["lm train RECIPE --workdir NEW", *(f"{name}={args.workdir}" for name in settings)])
    print(f"in {args.workdir}; go on from it with: {go_on}")
    return errors.EXIT_FINISHED


def _export_hf(args: argparse.Namespace) -> int:
    from lm import compilation, convert

    compilation.enable_cache()
    name = convert.export_hf(args.workdir, args.folder, step=args.step, dtype=args.dtype, overwrite=args.overwrite)
    print(f"{args.folder}: {name}.from_pretrained({args.folder!r}) loads it")
    return errors.EXIT_FINISHED


def _describe(args: argparse.Namespace) -> int:
    from lm import describe

    print(describe.describe(args.target, args.overrides, args.devices))
    return errors.EXIT_FINISHED


# --- arguments --------------------------------------------------------------------------------------------------------


def _parse(argv: list[str]) -> argparse.Namespace:
    parser, commands = _parsers()
    for n in (1, 2):  # words of a command's name
        if (name := " ".join(argv[:n])) in commands:  # intermixed: overrides may stand before, between, after options
            return commands[name].parse_intermixed_args(argv[n:])
    return parser.parse_args(argv)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(errors.EXIT_USER, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    parser = _Parser(prog="lm", description="Pretrain, evaluate and sample Transformer language models in JAX.")
    groups = {"": parser.add_subparsers(dest="command", required=True, metavar="COMMAND")}
    commands: dict[str, argparse.ArgumentParser] = {}

    def command(
        name: str, run: Callable[[argparse.Namespace], int], help: str, of: str = ""
    ) -> argparse.ArgumentParser:
        choice, name = name, f"{of} {name}".strip()
        p = commands[name] = groups[of].add_parser(choice, help=help, description=help)
        p.add_argument("--traceback", action="store_true", help="show where an error came from")
        p.set_defaults(run_command=run, command=name)
        return p

    recipe = "a recipe: path of a .py file, or its name in configs/"
    run_folder = "folder of the run, or its gs:// address"
    override = "config values, as optim.lr=1e-3 or optim=Lion(lr=1e-4)"

    p = command("train", _train, "train a recipe; the same command resumes")
    p.add_argument("recipe", help=recipe)
    p.add_argument("overrides", nargs="*", metavar="a.b=value", help=override)
    p.add_argument("--workdir", required=True, help=f"{run_folder}: checkpoints, metrics, config")
    p.add_argument("--distributed", action="store_true", help="one of many processes, found by JAX (TPU pod, Slurm)")
    p.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0, with the next two")
    p.add_argument("--num-processes", type=int)
    p.add_argument("--process-id", type=int)

    p = command("eval", _eval, "loss and perplexity of a run on its validation data, and bits per byte of a decoder")
    p.add_argument("workdir", help=run_folder)
    p.add_argument("overrides", nargs="*", metavar="a.b=value", help=override)
    p.add_argument("--step", type=int, help="checkpoint to use (default: the latest)")

    p = command("generate", _generate, "continue prompts with a run's model, or give its encoder texts to read")
    p.add_argument("workdir", help=run_folder)
    p.add_argument("prompts", nargs="*", help="one or more; none: standard input")
    p.add_argument("--step", type=int, help="checkpoint to use (default: the latest)")
    p.add_argument("--max-new-tokens", type=int, default=128)
    p.add_argument("--temperature", type=float, help=f"0: greedy (default: {SAMPLING['temperature']})")
    p.add_argument("--top-k", type=int, help="0: off")
    p.add_argument("--top-p", type=float, help=f"1: off (default: {SAMPLING['top_p']})")
    p.add_argument("--min-p", type=float, help="0: off")
    p.add_argument("--repetition-penalty", type=float, help="1: off")
    p.add_argument("--seed", type=int, help="another one draws another text")
    p.add_argument("--stop", action="append", default=[], help="end before this text; may be given again")
    p.add_argument("--beams", type=int, help="draw nothing: the likeliest text that so many beams find")
    p.add_argument("--length-penalty", type=float, help="of --beams: above 0 for longer texts, below for shorter ones")

    p = command("prepare", _prepare, "train the tokenizer and tokenise the corpus of a recipe")
    p.add_argument("recipe", help=recipe)
    p.add_argument("overrides", nargs="*", metavar="a.b=value", help=override)
    p.add_argument("--force", action="store_true", help="throw away what is there and begin anew")
    p.add_argument("--host", type=int, metavar="I", help="number of this host, from 0, of several that share data.path")
    p.add_argument("--hosts", type=int, metavar="N", help="how many they are; start the command on each")

    looks = "look at data: the rows of a step, where they are from, documents and tokens, damaged files"
    group = groups[""].add_parser("data", help=looks, description=looks)
    groups["data"] = group.add_subparsers(dest="command", required=True, metavar="COMMAND")
    step = "how many steps come before the batch; logs call it the next step"

    p = command("preview", _data_preview, "rows of a step as the objective makes them, as text", of="data")
    p.add_argument("recipe", help=recipe)
    p.add_argument("overrides", nargs="*", metavar="a.b=value", help=override)
    p.add_argument("--step", type=int, required=True, help=step)
    p.add_argument("--rows", type=int, default=4, help="how many of the batch (default: %(default)s)")

    p = command("where", _data_where, "source, epoch, window, documents and tokens of the rows of a run", of="data")
    p.add_argument("workdir", help=run_folder)
    p.add_argument("--step", type=int, required=True, help=step)
    p.add_argument("--rows", type=int, help="how many of the batch (default: all)")

    target = "folder of a prepared corpus, of one source or split in it, url of a corpus, or a recipe"
    for name, run, help in (
        ("stats", _data_stats, "documents, tokens, bytes per token and lengths of a corpus"),
        ("verify", _data_verify, "read every shard of a corpus and compare its checksum"),
    ):
        p = command(name, run, help, of="data")
        p.add_argument("target", help=target)
        p.add_argument("overrides", nargs="*", metavar="a.b=value", help=f"of a recipe: {override}")
    png = "also draw the lengths: documents, and their share of the tokens"
    commands["data stats"].add_argument("--png", metavar="FILE", help=png)

    p = command("import-hf", _import_hf, "make a run of a Hugging Face model folder")
    p.add_argument("folder", help="a folder with config.json and safetensors or pytorch_model.bin")
    p.add_argument("workdir", help=f"{run_folder}, to make")
    p.add_argument("overrides", nargs="*", metavar="a.b=value", help=override)

    p = command("export-hf", _export_hf, "write a run as a folder that transformers loads")
    p.add_argument("workdir", help=run_folder)
    p.add_argument("folder", help="folder to make")
    p.add_argument("--step", type=int, help="checkpoint to use (default: the latest)")
    p.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as imported, else float32)")
    p.add_argument("--overwrite", action="store_true", help="replace the folder if it is there")

    p = command("describe", _describe, "the resolved config, its size and its cost, without running it")
    p.add_argument("target", help=f"a recipe, or the {run_folder}")
    p.add_argument("overrides", nargs="*", metavar="a.b=value", help=override)
    p.add_argument("--devices", type=int, help="devices to lay it out on (default: the fewest that fit the mesh)")
    return parser, commands
