"""The walk through the documents: what it reads out of them, and that nothing printed is left out unsaid.

`python tests/walk.py` runs the commands; here it is only decided what becomes of them.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
import walk
import walk_list
from printed import Printed, UnknownBlock, documents, printed, read

from mtpd.cli import app

ROOT = Path(__file__).parents[1]

PAGE = """\
Install it, then:

    mtpd distill demo    # trains
    DEBUG=1 mtpd eval runs/demo --suite gsm8k,\\
        demo

Text that is no code, with `mtpd report` in it.

    model: demo     # or a hub id
    output: runs/mine

    mtpd distill mine.yaml && mtpd report runs/mine

```sh
$ some-program --of nobody
```

    import mtpd

    model = mtpd.load("runs/demo")

    print(model)

```json
{"a": 1}
```

```text
drawing -> of something
mtpd is not typed here
```

- an item
    that goes on: without a blank line before it
"""


def page(folder: Path, text: str) -> list[Printed]:
    (folder / "page.md").write_text(text)
    return list(read(folder / "page.md", folder))


def test_what_a_page_prints(tmp_path: Path) -> None:
    """Fault: a command that is overlooked, cut at a line's end, or taken out of a drawing."""
    found = page(tmp_path, PAGE)
    assert [(each.line, each.kind, each.text.split("#")[0].strip()) for each in found if each.kind != "python"] == [
        (3, "command", "mtpd distill demo"),
        (4, "command", "DEBUG=1 mtpd eval runs/demo --suite gsm8k, demo"),
        (9, "yaml", "model: demo"),
        (12, "command", "mtpd distill mine.yaml"),
        (12, "command", "mtpd report runs/mine"),
        (15, "command", "$ some-program --of nobody".removeprefix("$ ")),
    ]
    [python] = [each for each in found if each.kind == "python"]
    assert python.text.split("\n") == ["import mtpd", "", 'model = mtpd.load("runs/demo")', "", "print(model)", ""]


@pytest.mark.parametrize("block", ["    recipe -> trunk -> heads", "    npm install mtpd", "```\nloss = a + b\n```"])
def test_a_block_that_is_not_understood_fails(tmp_path: Path, block: str) -> None:
    """Fault: a command of a program that nobody thought of is passed over for good."""
    with pytest.raises(UnknownBlock, match=r"page.md:\d: neither commands nor Python nor YAML"):
        page(tmp_path, f"Words.\n\n{block}\n")


def test_comments_and_docstrings_print_commands(tmp_path: Path) -> None:
    """Fault: the commands in recipes and examples are not run."""
    (tmp_path / "recipe.yaml").write_text("# Heads.\n#\n#   mtpd distill recipe.yaml\n\nmodel: demo\n#   mtpd no\n")
    (tmp_path / "example.py").write_text('"""Does it.\n\n    python example.py\n"""\n\n# mtpd no\n')
    for name, command in (("recipe.yaml", "mtpd distill recipe.yaml"), ("example.py", "python example.py")):
        assert [(each.line, each.text) for each in read(tmp_path / name, tmp_path)] == [(3, command)]


def command(text: str, line: int = 1) -> Printed:
    return Printed("page.md", line, "command", text)


def test_an_entry_that_matches_nothing_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: an exception outlives the command it was made for, and hides another one later."""
    (tmp_path / "page.md").write_text("It ends with exit code 3.")
    monkeypatch.setattr(walk_list, "NOT_RUN", (walk_list.Left("^mtpd gone", "for a reason"),))
    for name in ("CHANGED", "SHORTENED"):
        monkeypatch.setattr(walk_list, name, ())
    monkeypatch.setattr(walk_list, "STAND_INS", {"mine.jsonl": "true", "unused.jsonl": "true"})
    monkeypatch.setattr(walk_list, "ENDINGS", (walk_list.Ending("^mtpd eval", (3, 4)),))
    wrong = walk.mistakes([command("mtpd eval runs/demo data.prompts=mine.jsonl")], tmp_path)
    assert [each.split(": ", 1)[1].split(" matches")[0] for each in wrong[:1]] == ["'^mtpd gone'"]
    assert "unused" in wrong[1]
    assert wrong[2].endswith("may end with 4, which page.md does not say")
    assert len(wrong) == 3


def test_a_change_inside_of_a_word_is_a_mistake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: an option is put into the middle of a list of suites, and a command that is right cannot be read."""
    change = walk_list.Changed("^mtpd eval --suite demo", r"\g<0> --limit 7", "less")
    for name, entries in {"NOT_RUN": (), "CHANGED": (change,), "SHORTENED": (), "STAND_INS": {}, "ENDINGS": ()}.items():
        monkeypatch.setattr(walk_list, name, entries)
    assert walk.mistakes([command("mtpd eval --suite demo")], tmp_path) == []
    (wrong,) = walk.mistakes([command("mtpd eval --suite demo,tools")], tmp_path)
    assert wrong.endswith("ends inside of a word of 'mtpd eval --suite demo,tools'")


def test_what_documents_print_is_run_or_listed() -> None:
    """Fault: a page prints something that the walk does not understand, or a list has an entry too many."""
    found = printed(ROOT)
    assert walk.mistakes(found, ROOT) == []
    steps = walk.plan(found, small=True)
    assert all(step.command or step.why for step in steps)
    run = [step for step in steps if step.command is not None]
    assert {"README.md", "examples/quickstart.py"} <= {step.printed.document for step in run}
    assert any(step.printed.kind == "python" for step in run)


def test_python_that_imports_nothing_goes_on() -> None:
    """Fault: the second piece of Python on a page fails for want of the first."""
    pieces = [Printed("page.md", n, "python", text) for n, text in enumerate(["import json", "json.dumps(1)"], 1)]
    steps = walk.plan(pieces, small=True)
    assert [subprocess.run(["bash", "-c", str(step.command)], check=False).returncode for step in steps] == [0, 0]


def test_exit_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: a command that fails passes; one that ends as its document says fails."""
    monkeypatch.setattr(walk_list, "ENDINGS", (walk_list.Ending("^exit", (3,)),))
    monkeypatch.setattr(walk_list, "STAND_INS", {"mine.txt": "echo mine > mine.txt"})
    found = [Printed("page.md", 1, "yaml", "model: org/large\noutput: runs/mine")]
    going = walk.Walk(tmp_path, found, small=True)
    for folder in (going.here, going.logs):
        folder.mkdir()
    commands = ["exit 3", "exit 4", "echo said; false", "grep -q mine mine.txt", "grep -q 'model: demo' shown.yaml"]
    steps = [walk.Step(command(text, line=2), text) for text in commands]
    assert [going.take(number, step) for number, step in enumerate(steps)] == [True, False, False, True, True]
    said = capsys.readouterr().out
    assert "s, exit code 3\n" in said
    assert "        said\n" in said


def named_in_words() -> list[tuple[str, list[str]]]:
    """Commands of mtpd that stand in lines of text and tables, between backticks."""
    pages = [path for path in documents(ROOT) if path.suffix == ".md"]
    spans = [(page, span) for page in pages for span in re.findall(r"`(mtpd [a-z][^`\n]*)`", page.read_text())]
    return [(f"{page.relative_to(ROOT)}: {span}", span.replace("\\|", "|").split()[1:]) for page, span in spans]


def test_commands_named_in_words_exist() -> None:
    """Fault: a table or a sentence names a command or an option that mtpd does not have."""
    root = typer.main.get_command(app)
    named = named_in_words()
    assert len(named) > 20
    for where, words in named:
        command: Any = root
        rest = iter(words)
        for word in rest:
            found = command.commands.get(word) if hasattr(command, "commands") else None
            if found is None:
                assert not hasattr(command, "commands") or word == "...", f"{where}: no command {word}"
                break
            command = found
        options = {option for parameter in command.params for option in parameter.opts}
        for word in words:
            name = word.strip("[](),;").split("=")[0]
            assert not name.startswith("--") or name in options | {"--debug", "--help"}, f"{where}: no option {name}"
