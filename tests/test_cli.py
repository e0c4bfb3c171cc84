"""The command line: exit codes, one-line errors, and commands that start fast."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import tomllib
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import typer
import yaml
from typer.testing import CliRunner

from mtpd import interrupts
from mtpd.cli import app, main
from mtpd.cli.options import split_arguments
from mtpd.errors import MtpdError, UserError
from mtpd.interrupts import Terminated
from mtpd.recipe import Recipe, load_recipe

ROOT = Path(__file__).parents[1]
DEMO = str(ROOT / "recipes" / "demo.yaml")


def mtpd(*words: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """The real command in a process of its own."""
    command = [sys.executable, str(ROOT / "cli.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        command, capture_output=True, text=True, timeout=timeout, check=False, env=environment, cwd=ROOT
    )


def replace_distill(monkeypatch: pytest.MonkeyPatch, run: Callable[..., object]) -> None:
    """Puts a function in the place of the distillation, to see what the command line makes of its errors."""
    module = types.ModuleType("mtpd.run.distill")
    module.distill = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mtpd.run.distill", module)


def replace_module(monkeypatch: pytest.MonkeyPatch, name: str, **functions: Callable[..., object]) -> None:
    """Puts functions in the place of a module that would bring in torch."""
    module = types.ModuleType(name)
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, name, module)


def raising(error: BaseException) -> Callable[..., object]:
    def run(*args: object, **kwargs: object) -> Path:
        raise error

    return run


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["-h"],
        *([name, "--help"] for name in ("distill", "eval", "compare", "report")),
        ["recipe", "show", "-h"],
    ],
)
def test_help_needs_no_torch(words: list[str]) -> None:
    """Fault: an import at the top of some file makes `mtpd --help` take seconds."""
    code = f"""
        import sys
        from mtpd.cli import main
        code = main({words!r})
        heavy = {{"torch", "transformers", "datasets", "trl"}} & set(sys.modules)
        sys.exit(f"imported {{heavy}}" if heavy else code)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    assert "Usage: mtpd" in done.stdout


def commands(command: Any, words: str = "mtpd") -> Iterator[tuple[str, Any]]:
    yield words, command
    for name, each in getattr(command, "commands", {}).items():
        yield from commands(each, f"{words} {name}")


def test_every_help_has_an_example_and_a_sentence_for_each_option() -> None:
    """Fault: a newcomer reads the name of a command or an option, and nothing else."""
    found = dict(commands(typer.main.get_command(app)))
    assert len(found) > 20
    assert [words for words, each in found.items() if f"\n    {words}" not in each.help] == []
    assert [
        (words, parameter.name)
        for words, each in found.items()
        for parameter in each.params
        if not getattr(parameter, "help", "")
    ] == []


def test_recipe_commands_need_no_torch() -> None:
    """Fault: checking a recipe loads the training stack."""
    code = (
        f"import sys; from mtpd.cli import main; main(['recipe', 'check', {DEMO!r}]); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=ROOT).returncode == 0


@pytest.mark.parametrize("words", [["distill", "--help"], ["recipe", "show", "--help"], ["recipe", "check", "--help"]])
def test_help_shows_examples_that_parse(words: list[str]) -> None:
    """Fault: the help shows a command with a key that no longer exists."""
    output = CliRunner().invoke(app, words, terminal_width=200).stdout
    examples = re.findall(r"^ +(mtpd .*\S) *$", output, flags=re.MULTILINE)
    assert examples
    for example in examples:
        skipped = 3 if words[0] == "recipe" else 2
        positional = example.partition(" -")[0].split()[skipped:]
        load_recipe(*split_arguments(positional))


def test_an_installed_package_has_its_recipes(tmp_path: Path) -> None:
    """Fault: the wheel lacks recipes, presets or the plugin, so that `mtpd distill demo` works in a checkout alone."""
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    for package in wheel["packages"]:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    for source, target in wheel["force-include"].items():
        shutil.copytree(ROOT / source, tmp_path / target)
    code = """
        import sys
        from mtpd.cli import main
        from mtpd.formats.engines.plugin import plugin_folder
        from mtpd.recipe.shipped import shipped_folder
        assert (plugin_folder() / "mtpd_vllm" / "model.py").is_file()
        print(shipped_folder(), (shipped_folder() / "deepspeed" / "zero2.json").is_file())
        sys.exit(main(["recipe", "copy", "demo"]) or main(["recipe", "check", "demo.yaml"]) or main(["recipe", "ls"]))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"{tmp_path / 'mtpd' / 'recipe' / 'shipped'} True\nwritten: demo.yaml\nOK: demo.yaml")
    assert (tmp_path / "demo.yaml").read_text() == Path(DEMO).read_text()
    assert "\nsmoke " in done.stdout


def test_a_copied_recipe_overwrites_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: `mtpd recipe copy` a second time throws away what was edited."""
    monkeypatch.chdir(tmp_path)
    Path("demo.yaml").write_text("model: mine\n")
    assert main(["recipe", "copy", "demo"]) == 2
    assert "demo.yaml: exists, and is not overwritten" in capsys.readouterr().err
    assert Path("demo.yaml").read_text() == "model: mine\n"
    assert main(["recipe", "copy", "demoo"]) == 2
    assert "is none of mtpd's; accepted: bytes-code" in capsys.readouterr().err


def test_version() -> None:
    """Fault: the version printed is none."""
    done = CliRunner().invoke(app, ["--version"])
    assert done.exit_code == 0
    assert done.stdout.startswith("mtpd ")


def test_recipe_show_prints_the_resolved_recipe() -> None:
    """Fault: what is shown is not what `distill` would use."""
    done = mtpd("recipe", "show", DEMO, "heads.depth=2", "train.learning_rate=3e-4")
    assert done.returncode == 0, done.stderr
    expected = load_recipe(DEMO, ["heads.depth=2", "train.learning_rate=3e-4"])
    assert yaml.safe_load(done.stdout) == expected.model_dump(mode="json")


def test_recipe_check_says_ok_or_exits_with_2() -> None:
    """Fault: a script that checks recipes cannot tell good from bad."""
    assert re.fullmatch(r"OK: .*demo\.yaml .*\n", mtpd("recipe", "check", DEMO).stdout)
    done = mtpd("recipe", "check", DEMO, "heads.dept=2")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "mtpd: error: heads.dept: unknown recipe key; did you mean heads.depth? (command line)\n"


def test_recipe_schema_is_json() -> None:
    """Fault: an editor cannot use the schema."""
    schema = json.loads(mtpd("recipe", "schema").stdout)
    assert schema["required"] == ["model"]
    assert schema["$defs"]["HeadsRecipe"]["properties"]["depth"]["maximum"] == 16


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nope"], "No such option: --nope; see mtpd --help"),
        (["fly"], "No such command 'fly'; see mtpd --help"),
        (["distill", "--zzz"], "No such option: --zzz; see mtpd distill --help"),
        (["distill"], "model: is missing"),
        (["distill", "--heads.depth", "3"], "keys of a recipe have no dashes before them: heads.depth=3"),
        (["distill", "--learning-rate=1e-4"], "no dashes before them: train.learning_rate=1e-4"),
        (["pretrain", "bytes-code", "--steps", "9"], "no dashes before them: train.max_steps=9"),
        (["distill", "nope.yaml"], "recipe file nope.yaml: no such file"),
        (["distill", DEMO, "extra.yaml"], "argument 'extra.yaml': is not accepted; accepted: one recipe file or name"),
        (["distill", "model=demo", "heads.depth=99"], "heads.depth: 99 is not accepted"),
        (["distill", "model=demo", "--dry-run", "seed=x"], "seed: x is not accepted"),
    ],
)
def test_mistakes_of_the_user_exit_with_2_in_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a mistake ends in a traceback, in a box of several lines, or with the exit code of a failure."""
    assert main(words) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert output.err.startswith("mtpd: error: ")
    assert output.err.count("\n") == 1
    assert output.out == ""


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("data.prompts: x.jsonl\nis empty"), 2, "mtpd: error: data.prompts: x.jsonl is empty\n"),
        (MtpdError("the trunk changed"), 1, "mtpd: error: the trunk changed\n"),
        (
            RuntimeError("shape\n  mismatch"),
            1,
            "mtpd: error: RuntimeError: shape mismatch (run with --debug for the traceback)\n",
        ),
        (
            EOFError("Ran out of input"),
            1,
            "mtpd: error: EOFError: Ran out of input (run with --debug for the traceback)\n",
        ),
        (
            OSError(28, "No space left on device", "/data/run/model.safetensors"),
            1,
            "mtpd: error: no space left on the disk of /data/run/model.safetensors (FREE); free some and run the same "
            "command again\n",
        ),
        (
            RuntimeError("[enforce fail] PytorchStreamWriter failed writing file data/0: file write failed"),
            1,
            "mtpd: error: no space left on the disk of runs/x (FREE); free some and run the same command again\n",
        ),
        (BrokenPipeError(32, "Broken pipe"), 1, "mtpd: error: BrokenPipeError: [Errno 32] Broken pipe (run with"),
        (FileNotFoundError(2, "No such file", "a.jsonl"), 1, "mtpd: error: FileNotFoundError: [Errno 2] No such file"),
    ],
)
def test_errors_of_a_run_are_one_line(
    error: Exception, code: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a failure shows a traceback, hides its cause, or exits like a success or like a user's mistake."""
    replace_distill(monkeypatch, raising(error))
    assert main(["distill", "model=demo", "output=runs/x"]) == code
    output = re.sub(r"\([\d,.]+ MB free\)", "(FREE)", capsys.readouterr().err)
    assert output.startswith(line)
    assert output.count("\n") == 1


@pytest.mark.parametrize("words", [["--debug", "distill", "model=demo"], ["distill", "model=demo", "--debug"]])
def test_debug_shows_the_traceback(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: --debug is accepted in one place only, or shows no more than the line."""
    replace_distill(monkeypatch, raising(UserError("data.prompts: nothing in it")))
    assert main(words) == 2
    output = capsys.readouterr().err
    assert "Traceback (most recent call last)" in output
    assert output.endswith("mtpd: error: data.prompts: nothing in it\n")


def test_a_disk_that_is_really_full(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: the operating system's own error carries no path, and the message names none."""
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")

    def run(recipe: Recipe, *, fresh: bool, resume: str) -> Path:
        with full.open("w") as file:
            file.write("x")
        raise AssertionError("it was not full")

    replace_distill(monkeypatch, run)
    assert main(["distill", "model=demo", "output=runs/x"]) == 1
    assert re.search(r"no space left on the disk of runs/x \([\d,.]+ MB free\); free some", capsys.readouterr().err)


def test_an_end_says_what_the_command_keeps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Fault: a command that keeps nothing promises to resume, or says what the one before it kept."""
    replace_distill(monkeypatch, raising(KeyboardInterrupt()))
    assert main(["distill", "model=demo"]) == 130
    assert capsys.readouterr().err == "mtpd: interrupted; the same command resumes where this one stopped\n"
    replace_module(monkeypatch, "mtpd.plan.plan", plan=raising(KeyboardInterrupt()))
    replace_module(monkeypatch, "mtpd.evaluate.compare", compare_files=raising(Terminated()), Asked=MagicMock())
    assert main(["distill", "model=demo", "--dry-run"]) == 130
    assert capsys.readouterr().err == "mtpd: interrupted\n"
    for name in ("a", "b"):
        (tmp_path / name).write_text("{}")
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 143
    assert capsys.readouterr().err == "mtpd: terminated\n"


def test_signals_that_come_while_a_command_ends(tmp_path: Path) -> None:
    """Fault: a second Ctrl-C, after the checkpoint is kept, is a traceback: amid closing, or as Python shuts down."""
    script = tmp_path / "wait.py"
    script.write_text(
        textwrap.dedent("""
            import atexit, signal, sys, time, types
            signal.signal(signal.SIGINT, signal.default_int_handler)
            from mtpd.interrupts import end, postponed

            def shut():
                print("shutting", flush=True)
                time.sleep(0.5)
                print("shut", flush=True)

            def distill(recipe, *, fresh, resume):
                try:
                    with postponed() as asked:
                        print("running", flush=True)
                        while not asked.signal:
                            time.sleep(0.01)
                        print("kept", flush=True)
                        end(asked.signal)
                finally:
                    print("closing", flush=True)
                    time.sleep(0.5)
                    print("closed", flush=True)

            atexit.register(shut)
            module = types.ModuleType("mtpd.run.distill")
            module.distill = distill
            sys.modules["mtpd.run.distill"] = module
            sys.argv = ["mtpd", "distill", "model=tiny", f"output={sys.argv[1]}"]
            from mtpd.__main__ import start
            sys.exit(start())
        """)
    )
    with subprocess.Popen(
        [sys.executable, str(script), str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        said = []
        while line := process.stdout.readline():
            said.append(line.strip())
            if line.strip() in ("running", "closing", "shutting"):
                process.send_signal(signal.SIGINT)
                process.send_signal(signal.SIGTERM if line.strip() != "running" else 0)
        _, errors = process.communicate(timeout=30)
    assert said == ["running", "kept", "closing", "closed", "shutting", "shut"]
    assert process.returncode == 130
    assert errors == "mtpd: interrupted; the same command resumes where this one stopped\n"


def test_an_end_that_hangs_can_be_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: signals are ignored for good once one has come, and only SIGKILL helps."""
    exits: list[int] = []
    monkeypatch.setattr("os._exit", exits.append)
    monkeypatch.setattr(interrupts, "PATIENCE", 0.05)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interrupts.terminable():
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            assert exits == []
            time.sleep(0.1)
            signal.raise_signal(signal.SIGINT)
            assert exits == [130]
    finally:
        signal.signal(signal.SIGINT, handler)


@pytest.mark.parametrize(("option", "how"), [([], "the same command"), (["--fresh"], "without --fresh")])
def test_interrupt_exits_with_130(
    option: list[str], how: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: Ctrl-C shows a traceback, or leaves open how to go on."""
    replace_distill(monkeypatch, raising(KeyboardInterrupt()))
    assert main(["distill", "model=demo", *option]) == 130
    output = capsys.readouterr().err
    assert output.startswith("mtpd: interrupted; ")
    assert how in output
    assert output.count("\n") == 1


def test_a_real_interrupt_of_the_process(tmp_path: Path) -> None:
    """Fault: the signal of Ctrl-C reaches the process in a place that `main` does not cover."""
    script = tmp_path / "wait.py"
    script.write_text(
        textwrap.dedent("""
            import signal, sys, time, types
            # Tests that run in the background of a shell inherit that the signal is ignored.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            module = types.ModuleType("mtpd.run.distill")
            def distill(recipe, *, fresh, resume):
                print("running", flush=True)
                time.sleep(60)
            module.distill = distill
            sys.modules["mtpd.run.distill"] = module
            from mtpd.cli import main
            sys.exit(main(["distill", "model=demo"]))
        """)
    )
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 130
    assert errors == "mtpd: interrupted; the same command resumes where this one stopped\n"


def test_distill_passes_recipe_and_fresh_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Fault: --fresh, --resume or an override never reaches the run."""
    calls: list[tuple[Recipe, bool, str]] = []

    def run(recipe: Recipe, *, fresh: bool, resume: str) -> Path:
        calls.append((recipe, fresh, resume))
        return recipe.output

    replace_distill(monkeypatch, run)
    assert main(["distill", DEMO, "heads.depth=2", "--fresh"]) == 0
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "complete.json").touch()
    words = ["model=tiny", f"output={tmp_path}"]
    assert main(["distill", *words, "--resume", "checkpoint-2"]) == 0
    assert calls == [
        (load_recipe(DEMO, ["heads.depth=2"]), True, "auto"),
        (load_recipe(None, words), False, "checkpoint-2"),
    ]
    assert "done: runs/demo" in capsys.readouterr().out


def test_a_recipe_file_with_an_equals_sign_in_its_name(tmp_path: Path) -> None:
    """Fault: the path of an existing file is taken for an override."""
    path = tmp_path / "lr=1.yaml"
    path.write_text("model: demo\n")
    assert main(["recipe", "check", str(path)]) == 0


def test_the_launcher_accepts_what_deepspeed_adds() -> None:
    """Fault: `deepspeed cli.py ...` fails on the --local_rank that it puts before our arguments."""
    done = mtpd("--local_rank=0", "recipe", "check", DEMO)
    assert done.returncode == 0, done.stderr
