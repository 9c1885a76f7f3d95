"""What a person at a terminal sees: exit codes, one line for a mistake, arguments in any order."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lm import cli

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = {
    "train": ("recipe", "--workdir", "--distributed", "--coordinator", "--num-processes", "--process-id"),
    "eval": ("workdir", "--step"),
    "generate": ("workdir", "prompts", "--max-new-tokens", "--temperature", "--top-k", "--top-p", "--min-p", "--stop"),
    "prepare": ("recipe", "--force"),
    "describe": ("target", "--devices"),
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
        (["train", "quickstart"], ["lm train: error: ", "--workdir"]),
        (["trian", "quickstart"], ["lm: error: ", "'trian'", "see lm --help"]),
        ([], ["lm: error: ", "COMMAND", "see lm --help"]),
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

    monkeypatch.setattr(cli, "_describe", broken)
    code, _, err = lm("describe", "quickstart")
    assert code == 1
    assert "Traceback" in err
    assert "ZeroDivisionError: a bug" in err


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


# --- start-up ---------------------------------------------------------------------------------------------------------


def test_python_m_lm_is_the_command():
    done = python("-m", "lm", "describe", "quickstart")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("model ")
    assert "bytes per device" in done.stdout


def test_the_command_line_itself_loads_no_framework():
    done = python("-c", "import sys, lm.cli; print([m for m in ('jax', 'tensorflow', 'flax') if m in sys.modules])")
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
