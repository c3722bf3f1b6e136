"""The program itself: help, completion, messages, exit codes, signals; no torch where none is needed."""

import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time

import pytest

from sdseg_cli import __version__, cli, console
from sdseg_cli.core.errors import DataError, Interrupted, RecipeError

HEAVY = ("torch", "diffusers", "datasets", "accelerate", "timm", "monai", "pydantic", "numpy")
ALL_COMMANDS = [
    *(name for name in cli.COMMANDS if name != "prepare"),
    "prepare",
    "prepare kseg",
    "prepare cvc",
    "prepare refuge",
    "prepare btcv",
    "prepare sts3d",
    "prepare nnunet",
    "prepare folder",
    "prepare phantom",
    "runs show",
    "runs compare",
    "recipes list",
    "recipes show",
    "recipes copy",
    "recipes check",
]


def sdseg(*args: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "sdseg_cli", *args],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "COLUMNS": "80", "TERM": "dumb", **environment},
    )


def leave(capsys, monkeypatch, problem: BaseException | type[BaseException]) -> tuple[int, str]:
    """Run main with an app that ends with ``problem``; its exit code and what it said."""

    def broken(**_):
        raise problem

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(SystemExit) as end:
        cli.main([])
    return int(end.value.code or 0), capsys.readouterr().err


# Help and completion


def test_help_answers_within_a_second_and_imports_nothing_heavy():
    code = (
        "import sys\nfrom sdseg_cli.cli import main\n"
        "try: main(['--help'])\n"
        f"finally: sys.stderr.write(repr([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
        seconds.append(time.perf_counter() - start)
        assert finished.returncode == 0
        assert finished.stderr == "[]"
    assert min(seconds) < 1.0
    for name, summary in cli.COMMANDS.items():
        assert name in finished.stdout
        assert summary.split()[0] in finished.stdout


def test_the_root_help_ends_with_worked_examples_and_names_the_recipes():
    text = sdseg("--help").stdout
    examples = text[text.index("Examples") :]
    for name in ("demo", "prepare", "train", "predict", "evaluate", "stability"):
        assert f"sdseg {name}" in examples
    from sdseg_cli.core.recipe import shipped_recipes

    for name in shipped_recipes():
        assert name in examples


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_every_commands_help_ends_with_worked_examples_and_needs_no_torch(command):
    code = (
        "import sys\nfrom sdseg_cli.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: sys.stderr.write(repr([n for n in ('torch', 'diffusers', 'datasets') if n in sys.modules]))"
    )
    finished = subprocess.run(
        [sys.executable, "-c", code, *command.split(), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "COLUMNS": "80"},
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == "[]"
    assert "…" not in finished.stdout  # an option whose name is cut short cannot be typed
    examples = finished.stdout[finished.stdout.rindex("Examples") :].splitlines()[1:]
    assert any(line.strip().startswith(f"sdseg {command.split()[0]}") for line in examples)
    assert "--install-completion" not in finished.stdout


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_exists(name):
    assert importlib.util.find_spec(f"sdseg_cli.commands.{name}") is not None


def test_the_text_of_an_option_has_room_on_eighty_columns():
    finished = subprocess.run(
        [sys.executable, "-m", "sdseg_cli", "predict", "--help"],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "80"},
    )
    text = " ".join(finished.stdout.replace("│", " ").split())
    assert "Opposite: --all-components." in text
    assert "One of same, nifti, nrrd, mha, dicom-seg." in text
    assert "0..1" in text
    assert len(finished.stdout.splitlines()) < 110
    # What is shortened for reading is parsed as ever.
    assert sdseg("predict", "nowhere", "--out", "x", "--all-components", "--threshold", "2").returncode == 2


def test_the_version_is_printed():
    assert sdseg("--version").stdout == f"sdseg {__version__}\n"


def test_without_arguments_the_help_is_shown():
    finished = sdseg()
    assert "Usage: sdseg" in finished.stdout + finished.stderr
    assert finished.returncode == 2


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("sdseg pr", ["prepare", "predict"]),
        ("sdseg prepare ph", ["phantom"]),
        ("sdseg train --rec", ["--recipe"]),
        ("sdseg train --recipe kseg", ["kseg", "kseg-fast"]),
        ("sdseg train --set train.ema", ["train.ema_decay=", "train.ema_scope="]),
    ],
)
def test_the_shell_completes_commands_options_recipes_and_keys(typed, expected):
    words = typed.split()
    finished = sdseg(_SDSEG_COMPLETE="complete_bash", COMP_WORDS=typed, COMP_CWORD=str(len(words) - 1))
    assert finished.stdout.split() == expected


def test_the_completion_script_can_be_shown():
    finished = sdseg("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert "_SDSEG_COMPLETE=complete_bash" in finished.stdout


# Mistakes on the command line


@pytest.mark.faults
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "Did you mean 'train'?"),
        (["train", "--recpie", "kseg"], "--recipe"),
        (["train", "--recipe", "ksge"], "recipe 'ksge' does not exist. Did you mean kseg?"),
        (["train", "--recipe", "kseg-fast", "--set", "train.stesp=5"], "Did you mean train.steps?"),
        (["predict", "nowhere", "--out", "nowhere-either"], "error: "),
    ],
)
def test_a_mistake_on_the_command_line_ends_with_2_and_says_what_was_meant(tmp_path, args, message):
    finished = subprocess.run(
        [sys.executable, "-m", "sdseg_cli", *args], capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    assert finished.returncode == 2, finished.stderr
    assert message in finished.stderr
    assert "Traceback" not in finished.stderr
    assert finished.stdout == ""
    assert list(tmp_path.iterdir()) == []


# Errors become messages


@pytest.mark.faults
@pytest.mark.parametrize(
    ("problem", "code", "message"),
    [
        (DataError("case 'a': broken"), 1, "error: case 'a': broken\n"),
        (RecipeError("recipe 'a' cannot be used"), 2, "error: recipe 'a' cannot be used\n"),
        (Interrupted("stopped, state is saved", signal.SIGINT), 130, "stopped, state is saved\n"),
        (Interrupted("stopped, state is saved", signal.SIGTERM), 143, "stopped, state is saved\n"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C.\n"),
        (MemoryError(), 1, "error: out of memory. Use a smaller --batch-size"),
        (
            OSError(errno.ENOSPC, "No space left on device", "masks/a.png"),
            1,
            "error: the disk is full at masks/a.png",
        ),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "a.png"), 1, "error: the disk is full at a.png"),
        (RuntimeError("write failed: No space left on device"), 1, "error: the disk is full: write failed"),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs"),
            1,
            "error: runs: Permission denied. Check",
        ),
        (BrokenPipeError(), 1, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_a_user_can_mend_is_told_without_a_traceback(capsys, monkeypatch, problem, code, message):
    left, said = leave(capsys, monkeypatch, problem)
    assert left == code
    assert said.startswith(message)
    assert said.count("\n") == bool(message)


def test_a_fault_of_the_program_keeps_its_traceback(monkeypatch):
    def broken(**_):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main([])


@pytest.mark.faults(28)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_runs_the_clean_up_and_ends_with_its_code(number, code):
    program = (
        "import sys, time\nfrom sdseg_cli import cli\n"
        "def slow(**_):\n"
        "    try:\n"
        "        sys.stdout.write('ready\\n'); sys.stdout.flush(); time.sleep(60)\n"
        "    finally:\n"
        "        sys.stdout.write('cleaned\\n')\n"
        "cli.app = slow\ncli.main([])\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == code
    assert out == "cleaned\n"
    assert "Traceback" not in err


# The console


def test_json_on_stdout_is_plain_and_strict(capsys):
    console.show_json({"dice": 0.9, "hd95": float("inf"), "lpips": float("nan")})
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"dice": 0.9, "hd95": "inf", "lpips": None}
    assert captured.err == ""


def test_messages_go_to_stderr_unbroken_and_with_brackets_kept(capsys):
    console.say("saved " + "x" * 100 + " [bold]not markup[/bold]")
    console.warn("look")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "saved " + "x" * 100 + " [bold]not markup[/bold]\nwarning: look\n"


def test_only_the_main_process_speaks_but_every_one_may_fail(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    console.say("hello")
    console.warn("hello")
    console.show_json({})
    console.show_table(["a"], [["b"]])
    assert list(console.progress([1, 2], 2, "working")) == [1, 2]
    with console.training_progress(10) as line:
        line.update(1, loss=1.0)
    console.fail("no memory")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "error (process 1): no memory\n"


def test_a_table_fits_80_columns_and_draws_what_is_missing_as_a_dash(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    columns = ["class", "Dice", "IoU", "precision", "recall", "HD95 [px]", "ASSD [px]"]
    console.show_table(columns, [["polyp", 0.91234, None, float("nan"), 1, 12.5, "1.2"]], title="test")
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "0.9123" in text
    assert text.count(" - ") == 2


def test_names_in_a_table_stay_in_one_piece_on_a_narrow_screen(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(console.results, "_width", None)  # kept where COLUMNS was set at the first import
    name = "kseg-fast-20260131-120000"
    console.show_table(["run", *"abcde"], [[name, *["two words"] * 5], ["b", *["two words"] * 5]])
    assert name in capsys.readouterr().out
    console.show_table(["run", "a"], [["x" * 100, "y"]])
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 60


def test_progress_in_a_pipe_is_a_line_at_the_end(capsys):
    assert list(console.progress(iter("abc"), 3, "preparing", unit="cases")) == ["a", "b", "c"]
    assert capsys.readouterr().err == "preparing: 3/3 cases\n"


def test_the_time_left_of_a_training_ends_with_its_time_limit(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    for limit, expected in ((None, "1:30:00"), (7200.0, "1:30:00"), (900.0, "0:05:00"), (300.0, "0:00:00")):
        now[0] = 100.0
        with console.training_progress(1000, seconds=limit) as line:
            now[0] += 600  # a tenth of the steps
            line.update(100, dice=0.5)
        assert capsys.readouterr().err == f"step 100/1,000  Dice 0.500  {expected} left\n"


def test_training_progress_in_a_pipe_tells_each_validation_and_the_end(capsys):
    with console.training_progress(1000, start=500) as line:
        line.update(501, loss=0.5, samples_per_second=95.04, memory_gib=3.21)
        line.update(600, dice=0.8123)
        line.update(1000, loss=0.25)
    first, last = capsys.readouterr().err.splitlines()
    assert first.startswith("step 600/1,000  loss 0.5000  95 img/s  3.2 GiB  Dice 0.812")
    assert first.endswith("left")
    assert last == "step 1,000/1,000  loss 0.2500  95 img/s  3.2 GiB  Dice 0.812"
