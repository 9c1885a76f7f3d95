"""What a person at a terminal sees: exit codes, one line for a mistake, arguments in any order."""

import contextlib
import dataclasses
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from lm import cli
from lm.cli import surroundings
from lm.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "train": ("recipe", "--workdir", "--distributed", "--coordinator", "--num-processes", "--process-id"),
    "eval": ("workdir", "--step"),
    "generate": (
        "workdir",
        "prompts",
        "--max-new-tokens",
        "--temperature",
        "--top-k",
        "--top-p",
        "--min-p",
        "--stop",
        "--beams",
    ),
    "prepare": ("recipe", "--force"),
    "describe": ("target", "--devices"),
}

DATA_COMMANDS = {
    "preview": ("recipe", "a.b=value", "--step", "--rows"),
    "where": ("workdir", "--step", "--rows"),
    "stats": ("target", "a.b=value"),
    "verify": ("target", "a.b=value"),
}


@pytest.fixture
def lm(capsys):
    """Runs a command in this process: (exit code, stdout, stderr). Not for `train`, which leaves by os._exit."""

    def run(*argv: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as e:
            cli.main(argv)
        out, err = capsys.readouterr()
        return e.value.code, out, err

    return run


def python(*args: str, **kwargs) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args], capture_output=True, text=True, timeout=120, **{"cwd": ROOT} | kwargs
    )


def assert_one_line(err: str, *parts: str) -> None:
    assert err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    for part in parts:
        assert part in err


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "parts"),
    [
        (["describe", "quikstart"], ["lm describe: error: quikstart: no recipe", "did you mean 'quickstart'?"]),
        (["describe", "quickstart", "train.step=3"], ["lm describe: error: train.step: ", "did you mean 'steps'?"]),
        (["describe", "quickstart", "3"], ["lm describe: error: '3': expected path=value"]),
        (["describe", "quickstart", "--devices", "0"], ["--devices: expected at least 1, got 0"]),
        (["prepare", "no/such/recipe.py"], ["lm prepare: error: no/such/recipe.py: no such recipe file"]),
        (["prepare", "quickstart", "data.seq_len=0"], ["lm prepare: error: data.seq_len: ", "got 0"]),
        (
            ["describe", "quickstart", "--devices", "two"],
            ["lm describe: error: ", "--devices: invalid int value: 'two'"],
        ),
        (
            ["describe", "quickstart", "--device", "2", "--fast"],
            ["lm describe: error: ", "--fast", "see lm describe --help"],
        ),
        (["describe"], ["lm describe: error: ", "target"]),
        (
            ["generate", "no/run", "x", "--beams", "0"],
            ["lm generate: error: generate.beams: expected at least 1, got 0"],
        ),
        (["generate", "no/run", "--beams", "4", "--top-k", "5"], ["--top-k: expected none with --beams", "got 5"]),
        (["generate", "no/run", "--length-penalty", "2"], ["--length-penalty: expected none without --beams"]),
        (["train", "quickstart"], ["lm train: error: ", "--workdir"]),
        (["trian", "quickstart"], ["lm: error: ", "'trian'", "see lm --help"]),
        ([], ["lm: error: ", "COMMAND", "see lm --help"]),
        (["data"], ["lm data: error: ", "COMMAND", "see lm data --help"]),
        (["data", "prevew", "quickstart"], ["lm data: error: ", "'prevew'"]),
        (["data", "preview", "quickstart"], ["lm data preview: error: ", "--step"]),
        (["data", "preview", "quikstart", "--step", "0"], ["lm data preview: error: quikstart: no recipe"]),
        (["data", "preview", "quickstart", "--step", "0", "data.path=none"], ["none: expected a prepared corpus"]),
        (["data", "where", "no/run", "--step", "3"], ["lm data where: error: no/run: ", "--workdir", "config.json"]),
        (["data", "where", "no/run", "--step=-3"], ["lm data where: error: --step: expected 0 to 2147483648, got -3"]),
        (["data", "stats", "tests"], ["lm data stats: error: tests: expected the folder of a prepared corpus"]),
        (["data", "verify", "tests", "data.seed=3"], ["tests: expected no overrides with a folder, got 'data.seed=3'"]),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(lm, argv, parts):
    code, out, err = lm(*argv)
    assert (code, out) == (2, "")
    assert_one_line(err, *parts)


def test_traceback_is_shown_where_asked(lm):
    code, _, err = lm("describe", "quickstart", "--traceback", "train.steps=0")
    assert code == 2
    assert err.startswith("lm describe: error: train.steps: ")
    assert "Traceback" in err


def test_train_refuses_a_mistake_before_it_makes_a_folder(tmp_path):
    done = python("-m", "lm", "train", "quickstart", "--workdir", str(tmp_path / "run"), "data.batch_size=0")
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_line(done.stderr, "lm train: error: data.batch_size: ", "got 0")
    assert not (tmp_path / "run").exists()


def test_eval_and_generate_refuse_a_folder_without_a_run(tmp_path):
    code = f"""
import contextlib, io, json
from lm import cli
from lm.cli import surroundings
from lm.errors import UserError
seen = []
folder = {str(tmp_path)!r}
for argv in ["eval", folder], ["generate", folder, "Once"], ["generate", folder, "--top-p", "7", "Once"]:
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err):
            cli.main(argv)
    except SystemExit as e:
        seen.append((e.code, err.getvalue()))
print(json.dumps(seen))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    evaluated, generated, sampled = json.loads(done.stdout)
    assert evaluated[0] == generated[0] == sampled[0] == 2
    assert_one_line(evaluated[1], f"lm eval: error: {tmp_path}: ", "--workdir")
    assert_one_line(generated[1], f"lm generate: error: {tmp_path}: ", "--workdir")
    assert_one_line(sampled[1], "lm generate: error: ", "top_p", "7")


def test_a_bug_is_a_traceback_and_exit_code_1(lm, monkeypatch):
    def broken(args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(cli, "COMMANDS", [command._replace(run=broken) for command in cli.COMMANDS])
    code, _, err = lm("describe", "quickstart")
    assert code == 1
    assert "Traceback" in err
    assert "ZeroDivisionError: a bug" in err


# --- surroundings -----------------------------------------------------------------------------------------------------


def test_sigterm_before_the_first_step_exits_85_and_leaves_nothing(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import pathlib, time\npathlib.Path('begun').touch()\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "lm", "train", str(recipe), "--workdir", "run"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 85
    assert_one_line(err, "lm train: stopped outside of the steps: nothing new to save; run it again")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "parts"),
    [
        ({"JAX_PLATFORMS": "cuda"}, ["JAX_PLATFORMS=cuda: expected a platform that is here", "unset it, or install"]),
        ({"JAX_PLATFORMS": "abacus"}, ["JAX_PLATFORMS=abacus: expected a platform that is here", "abacus"]),
        ({"JAX_DISABLE_JIT": "1"}, ["JAX_DISABLE_JIT: expected it unset", "unset it"]),
    ],
)
@pytest.mark.slow
def test_a_jax_that_cannot_run_here_is_named(variables, parts):
    for command in (["eval", "tests/stored/run"], ["train", "quickstart", "--workdir", "/nowhere/run"]):
        done = python("-m", "lm", *command, env=os.environ | variables)
        assert done.returncode == 2
        assert_one_line("\n".join(x for x in done.stderr.splitlines() if "is called" not in x) + "\n", *parts)


def test_a_reader_that_goes_ends_a_command_without_a_word():
    command = [sys.executable, "-c", "from lm.cli import main; main(['describe', 'quickstart'])"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        err = process.stderr.read()
        assert (process.wait(timeout=60), err) == (141, b"")


def test_a_run_outlives_the_reader_of_its_output():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w", buffering=1) as stream:
        outliving = surroundings.Outliving(stream)
        for _ in range(2):
            assert outliving.write("step 1\n") == 7
            outliving.flush()
        assert os.readlink(f"/proc/self/fd/{writer}") == os.devnull
        assert not outliving.isatty()


def test_a_terminal_that_cannot_show_a_letter_shows_its_number(tmp_path):
    recipe = tmp_path / "caf\xe9.py"
    recipe.write_text("config = 3")
    done = python("-m", "lm", "describe", str(recipe), env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == 2
    assert_one_line(done.stderr, "caf\\xe9.py: expected `config = Config(...)`, got int")
    code = "from lm.cli import surroundings; surroundings.show_any_text(); print('caf\xe9')"
    done = python("-c", code, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout) == (0, "caf\\xe9\n")


def test_standard_input_that_is_no_text_is_named(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"ab\xffc")))
    with pytest.raises(UserError, match=r"standard input: expected UTF-8, got the byte b'\\xff' at 2"):
        surroundings.read_standard_input()


def test_a_failure_of_the_system_is_one_line(lm, monkeypatch):
    def broken(args):
        open("/nowhere/at/all", "rb").close()

    monkeypatch.setattr(cli, "COMMANDS", [command._replace(run=broken) for command in cli.COMMANDS])
    code, _, err = lm("describe", "quickstart")
    assert code == 2
    assert_one_line(err, "lm describe: error: /nowhere/at/all: expected the file that was found there", "run again")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionResetError(104, "Connection reset by peer"), 75),
        (TimeoutError("no answer\nfor a minute"), 75),
        (BrokenPipeError(32, "Broken pipe"), 75),  # not of the standard output
        (OSError("the store said 503"), 75),
        (OSError(28, "No space left on device", "/data/x"), 2),
    ],
)
def test_a_failure_of_the_network_may_be_tried_again(lm, monkeypatch, error, expected):
    def broken(args):
        raise error

    monkeypatch.setattr(cli, "COMMANDS", [command._replace(run=broken) for command in cli.COMMANDS])
    code, _, err = lm("describe", "quickstart")
    assert code == expected
    assert_one_line(err, "lm describe: error: ")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("config = (", "{}:1: SyntaxError"),
        ("x = 1\n\nraise ValueError('no\\nway')", "{}:3: ValueError: no way"),
        ("from lm.models import GPT2\nGPT2(\n  vocab_size=0,\n)", "{}:2: "),
        ("import sys\nsys.exit(3)", "{}: expected `config = Config(...)`, got an exit with 3"),
        ("import nothing_of_that_name", "{}:1: ModuleNotFoundError"),
    ],
)
@pytest.mark.parametrize("name", ["{}", "./{}", "../{parent}/{}"])
def test_a_mistake_in_a_recipe_is_named_with_its_line(lm, tmp_path, monkeypatch, text, line, name):
    (tmp_path / "decoder.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    name = name.format("decoder.py", parent=tmp_path.name)
    code, _, err = lm("describe", name)
    assert code == 2
    assert_one_line(err, "lm describe: error: " + line.format(str(Path(name))))


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv",
    [
        ["quickstart", "train.steps=77", "optim.lr=0.5", "--devices", "2"],
        ["--devices", "2", "quickstart", "train.steps=77", "optim.lr=0.5"],
        ["quickstart", "train.steps=77", "--devices", "2", "optim.lr=0.5"],
        ["quickstart", "--devices=2", "train.steps=77", "optim.lr=0.5"],
    ],
)
def test_overrides_may_stand_before_between_and_after_options(lm, argv):
    code, out, err = lm("describe", *argv)
    assert (code, err) == (0, "")
    rows = [line.split() for line in out.splitlines()]
    assert ["train.steps", "77", "command", "line"] in rows
    assert ["optim.lr", "0.5", "command", "line"] in rows
    assert ["mesh", "2", "device(s):", "data=2"] in rows


def test_a_prompt_that_begins_with_a_dash_goes_after_two():
    args = cli._parse(["generate", "run", "--seed", "3", "--", "-x", "--seed"])
    assert (args.workdir, args.prompts, args.seed) == ("run", ["-x", "--seed"], 3)
    assert cli._parse(["generate", "run", "- one of a list", "-5"]).prompts == ["- one of a list", "-5"]


def test_an_option_that_is_none_says_where_texts_go(lm):
    code, _, err = lm("generate", "run", "-x")
    assert code == 2
    assert_one_line(err, "lm generate: error: unrecognized arguments: -x; a text that begins with - goes after --")


def test_the_last_of_two_overrides_counts(lm):
    _, out, _ = lm("describe", "quickstart", "train.seed=3", "train.seed=5")
    assert ["train.seed", "5", "command", "line"] in [line.split() for line in out.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_names_its_arguments(lm, command):
    code, out, err = lm(command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: lm {command}")
    for argument in COMMANDS[command]:
        assert argument in out


def test_help_lists_the_commands(lm):
    code, out, _ = lm("--help")
    assert code == 0
    for command in COMMANDS:
        assert f"\n    {command} " in out


@pytest.mark.parametrize("command", DATA_COMMANDS)
def test_help_of_a_data_command_names_its_arguments(lm, command):
    code, out, err = lm("data", command, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"usage: lm data {command}")
    for argument in DATA_COMMANDS[command]:
        assert argument in out
    assert f"\n    {command} " in lm("data", "--help")[1]


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """A recipe of a prepared corpus of two sources: (its file, its folder)."""
    from lm import config
    from lm.data import prepare

    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("left", "right"):
        for i in range(40):
            words = " ".join(f"{name}{n}" for n in rng.integers(0, 50, 20))
            (folder / f"{name}-{i}.txt").write_text(f"{i} {words}\n")
    recipe = folder / "small.py"
    recipe.write_text(f"""
from lm.config import Config, Train
from lm.data import Data, SentencePiece, Text
from lm.models import GPT2
from lm.objectives import CausalLM
from lm.optim import AdamW
config = Config(
    model=GPT2(vocab_size=320, d_model=8, n_layers=1, n_heads=2, max_positions=32),
    data=Data(
        path={str(folder / "corpus")!r},
        sources={{n: Text(glob=f"{folder}/{{n}}-*.txt") for n in ("left", "right")}},
        tokenizer=SentencePiece(kind="bpe", vocab_size=320),
        weights={{"left": 2.0, "right": 1.0}},
        seq_len=31,
        batch_size=6,
        validation_fraction=0.2,
        workers=1,
    ),
    objective=CausalLM(),
    optim=AdamW(lr=0.1),
    train=Train(steps=50),
)
""")
    prepare(config.load(str(recipe)).data, progress=False, log=lambda line: None)
    return str(recipe), folder / "corpus"


@pytest.fixture
def run_folder(corpus, tmp_path):
    """A run's folder as `train` leaves it, less the weights, and a way to add a checkpoint."""
    from lm import config
    from lm.checkpoint import Checkpoints, Meta
    from lm.data import Stream, open_corpus

    def save(step: int | None, examples_seen: int, *overrides: str) -> str:
        resolved = config.resolve(corpus[0], overrides)
        (tmp_path / "config.json").write_text(resolved.to_json())
        if step is not None:
            data = resolved.config.data
            meta = Meta(resolved.to_json(), b"", examples_seen, Stream.of(data, open_corpus(data)).fingerprint, {})
            with contextlib.closing(Checkpoints(tmp_path, resolved.config.checkpoint)) as checkpoints:
                checkpoints.save_params(step, {"w": np.zeros(3, np.float32)}, meta)
                checkpoints.wait()
        return str(tmp_path)

    return save


def test_preview_and_where_speak_of_the_same_rows(lm, corpus, run_folder):
    _, preview, err = lm("data", "preview", corpus[0], "data.seed=5", "--step", "4", "--rows", "3")
    assert err == ""
    origins = re.findall(r"^--- (row .*)$", preview, re.M)
    assert len(origins) == 3
    code, where, err = lm("data", "where", run_folder(None, 0, "data.seed=5"), "--step", "4", "--rows", "3")
    assert (code, err) == (0, "")
    assert where.splitlines()[:-1] == [preview.splitlines()[0], *origins]
    assert "ExcludeExamples(ranges=((24,30),))" in where.splitlines()[-1]
    assert "ids 24 to 29; rows 0 to 2" in where


def test_preview_shows_the_text_of_the_objective_given(lm, corpus):
    masked = "MaskedLM(mask_id=320, cls_id=321, sep_id=322, vocab_size=320)"
    model = "Bert(vocab_size=324, d_model=8, n_layers=1, n_heads=2, max_positions=32)"
    _, plain, _ = lm("data", "preview", corpus[0], "--step", "0")
    assert len(re.findall(r"\b(left|right)\d+\b", plain)) > 4
    code, out, err = lm("data", "preview", corpus[0], "--step", "0", f"objective={masked}", f"model={model}")
    assert (code, err) == (0, "")
    assert out.count("  | <cls>") == 4
    assert "<mask:" in out


def first_id(out: str) -> int:
    return int(re.search(r"ids (\d+) to", out)[1])


def test_where_goes_by_the_examples_that_checkpoints_have_seen(lm, run_folder):
    run_folder(4, 24)
    run_folder(10, 24 + 6 * 9, "data.batch_size=9")
    workdir = run_folder(None, 0, "data.batch_size=9")
    assert [first_id(lm("data", "where", workdir, "--step", str(s))[1]) for s in (4, 6, 10, 12)] == [24, 42, 78, 96]
    assert lm("data", "where", workdir, "--step", "4")[1].count("\nrow ") == 9
    assert first_id(lm("data", "where", workdir, "--step", "3")[1]) == 18
    assert lm("data", "where", workdir, "--step", "3")[1].count("\nrow ") == 6


def test_where_refuses_to_guess_when_the_batch_size_changed(lm, run_folder):
    run_folder(4, 24)
    workdir = run_folder(10, 24 + 2 * 6 + 4 * 9, "data.batch_size=9")
    for step in ("4", "7"):  # it begins at 24 after step 4, and nothing says with 6 examples or 9
        code, out, err = lm("data", "where", workdir, "--step", step)
        assert (code, out) == (2, "")
        assert_one_line(err, "expected 54 examples from step 4 to 10, got 48", "ask for --step 10 or later")


def test_where_does_not_guess_the_size_of_the_first_batch(lm, run_folder):
    workdir = run_folder(10, 4 * 6 + 6 * 9, "data.batch_size=9")  # and the checkpoint of step 4 is gone
    code, out, err = lm("data", "where", workdir, "--step", "0")
    assert (code, out) == (2, "")
    assert_one_line(err, "expected 90 examples from step 0 to 10, got 78", "ask for --step 10 or later")


def test_where_refuses_a_corpus_that_the_run_did_not_read(lm, run_folder):
    from lm import config

    workdir = run_folder(4, 24)
    stored = Path(workdir) / "config.json"
    resolved = config.Resolved.from_json(stored.read_text(), "")
    other = dataclasses.replace(resolved.config, data=dataclasses.replace(resolved.config.data, seed=11))
    stored.write_text(config.Resolved(other, resolved.origins).to_json())
    code, out, err = lm("data", "where", workdir, "--step", "5")
    assert (code, out) == (2, "")
    assert_one_line(err, "lm data where: error: data.seed: expected 0 as when the checkpoint was written, got 11")


def test_stats_and_verify_say_the_same_of_a_folder_and_its_recipe(lm, corpus):
    recipe, folder = corpus
    for command in ("stats", "verify"):
        code, of_folder, err = lm("data", command, str(folder))
        assert (code, err) == (0, "")
        assert re.findall(r"^(\w+/\w+): ", of_folder, re.M) == [
            "left/train",
            "left/validation",
            "right/train",
            "right/validation",
        ]
        assert lm("data", command, recipe)[1] == of_folder
    n = sum(int(x) for x in re.findall(r": (\d+) documents, ", lm("data", "stats", recipe)[1]))
    assert n == 80


def test_verify_of_a_damaged_shard_is_one_line_and_exit_code_2(lm, corpus):
    path = corpus[1] / "right" / "train" / "tokens-00000.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-2] + bytes([whole[-2] ^ 1, whole[-1]]))
    try:
        code, out, err = lm("data", "verify", str(corpus[1]))
    finally:
        path.write_bytes(whole)
    assert code == 2
    assert out.startswith("left/train: ")
    assert_one_line(err, f"lm data verify: error: {path}: expected sha256 ")


# --- start-up ---------------------------------------------------------------------------------------------------------


def test_python_m_lm_is_the_command():
    done = python("-m", "lm", "describe", "quickstart")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("model ")
    assert "bytes per device" in done.stdout


def test_the_command_line_itself_loads_no_framework():
    done = python("-c", "import sys, lm.cli; print([m for m in ('jax', 'tensorflow', 'flax') if m in sys.modules])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
