"""Runs: train, eval, generate, describe."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from lm import errors
from lm.cli.command import CHECKPOINT, OVERRIDES, RECIPE, RUN, WORKDIR, argument, command
from lm.cli.surroundings import Outliving, check_jax, read_standard_input, stop_on_sigterm

if TYPE_CHECKING:
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


@command(
    "train",
    "train a recipe; the same command resumes",
    RECIPE,
    OVERRIDES,
    argument("--workdir", required=True, help=f"{RUN}: checkpoints, metrics, config"),
    argument("--distributed", action="store_true", help="one of many processes, found by JAX (TPU pod, Slurm)"),
    argument("--coordinator", metavar="HOST:PORT", help="address of process 0, with the next two"),
    argument("--num-processes", type=int),
    argument("--process-id", type=int),
)
def _train(args: argparse.Namespace) -> int:
    stop_on_sigterm()
    sys.stdout, sys.stderr = Outliving(sys.stdout), Outliving(sys.stderr)  # type: ignore[assignment]
    from lm import compilation, config, distributed

    resolved = config.resolve(args.recipe, args.overrides)
    if args.distributed or args.coordinator or args.num_processes is not None or args.process_id is not None:
        distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    else:
        # Before anything makes JAX look for devices.
        distributed.use_cpu_cores(*config.rows_and_devices(resolved.config))
    check_jax()
    compilation.enable_cache()
    from lm.training.train import train

    result = train(resolved, args.workdir)
    distributed.shutdown()
    return errors.EXIT_PREEMPTED if result.preempted else errors.EXIT_FINISHED


@command(
    "eval",
    "loss and perplexity of a run on its validation data, and bits per byte of a decoder",
    WORKDIR,
    OVERRIDES,
    CHECKPOINT,
)
def _eval(args: argparse.Namespace) -> int:
    from lm import compilation, config, distributed, run
    from lm.data import open_corpus
    from lm.evals import report
    from lm.evals.evaluation import Evaluation, splits
    from lm.workdir import Workdir

    workdir = Workdir.of(args.workdir)
    if (stored := workdir.read_config()) is not None:
        resolved = config.Resolved.from_json(stored, str(workdir.config))
        distributed.use_cpu_cores(*config.rows_and_devices(resolved.config))
    check_jax()
    compilation.enable_cache()
    restored = run.restore(args.workdir, step=args.step, overrides=args.overrides)
    restored.check_trained("eval")
    config.check_task(restored.config)
    corpus = open_corpus(restored.config.data)
    if restored.tokenizer is None or corpus.tokenizer.fingerprint != restored.tokenizer.fingerprint:
        raise errors.UserError(
            f"{restored.config.data.path}: made with another tokenizer than the run {args.workdir}; "
            f"prepare its data again, or name the right folder with data.path=..."
        )
    results = Evaluation(restored.setup, corpus)(restored.params)
    losses = splits(results)
    report.print_evaluation(losses, corpus, f"{args.workdir} at step {restored.step}")
    for name, measure in results.items():
        if name not in losses:
            print(f"{name}: {measure}")
    return errors.EXIT_FINISHED


@command(
    "generate",
    "continue prompts with a run's model, or give its encoder texts to read",
    WORKDIR,
    argument("prompts", nargs="*", help="one or more, after -- where one begins with -; none: standard input"),
    CHECKPOINT,
    argument("--max-new-tokens", type=int, default=128),
    argument("--temperature", type=float, help=f"0: greedy (default: {SAMPLING['temperature']})"),
    argument("--top-k", type=int, help="0: off"),
    argument("--top-p", type=float, help=f"1: off (default: {SAMPLING['top_p']})"),
    argument("--min-p", type=float, help="0: off"),
    argument("--repetition-penalty", type=float, help="1: off"),
    argument("--seed", type=int, help="another one draws another text"),
    argument("--stop", action="append", default=[], help="end before this text; may be given again"),
    argument("--beams", type=int, help="draw nothing: the likeliest text that so many beams find"),
    argument("--length-penalty", type=float, help="of --beams: above 0 for longer texts, below for shorter ones"),
)
def _generate(args: argparse.Namespace) -> int:
    from lm import compilation, run

    how = _how(args)
    check_jax()
    compilation.enable_cache()
    generator = run.restore(args.workdir, step=args.step).generator()
    prompts = args.prompts or [read_standard_input()]
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

    stop = tuple(args.stop)
    settings = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
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


@command(
    "describe",
    "the resolved config, its size and its cost, without running it",
    argument("target", help=f"a recipe, or the {RUN}"),
    OVERRIDES,
    argument("--devices", type=int, help="devices to lay it out on (default: the fewest that fit the mesh)"),
)
def _describe(args: argparse.Namespace) -> int:
    from lm import describe

    print(describe.describe(args.target, args.overrides, args.devices))
    return errors.EXIT_FINISHED
