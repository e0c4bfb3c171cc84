"""What documents print to be typed: commands, Python and YAML, read out of their code blocks.

Blocks are fenced or indented by four spaces. Their paragraphs are told apart by what they are: commands begin with the
name of a program, Python with an import, YAML reads as a mapping. What is none of these (a drawing, a formula, output)
is fenced as `text`, and a change to a file as `diff`, so that no command is left out because nobody knew it.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

PROGRAMS = re.compile(
    "(bash|cat|cd|conda|cp|curl|deepspeed|docker|export|git|hf|ls|make|mkdir|mtpd|mv|pip|pipx|pytest|python3?|rm|sglang|"
    "sh|source|srun|ssh|torchrun|uv|vllm)"
)
SHELL = ("bash", "console", "sh", "shell")

Kind = Literal["command", "python", "yaml"]
Line = tuple[int, str]


@dataclass(frozen=True)
class Printed:
    """One command, or one piece of Python or YAML.

    Args:
        document: path of the document, relative to the project.
        line: where it begins, from 1.
    """

    document: str
    line: int
    kind: Kind
    text: str

    @property
    def place(self) -> str:
        return f"{self.document}:{self.line}"


class UnknownBlock(Exception):
    """A code block of which it is not known what it is."""


def documents(root: Path) -> list[Path]:
    """List all that print commands, in the order of reading."""
    return [
        root / "README.md",
        *sorted((root / "docs").rglob("*.md")),
        *sorted((root / "examples").glob("*.py")),
        *sorted((root / "examples").rglob("*.sh")),
        *sorted((root / "recipes").glob("*.yaml")),
    ]


def printed(root: Path) -> list[Printed]:
    """Read all documents.

    Raises:
        UnknownBlock: a block is neither commands nor Python, YAML, JSON or fenced as text.
    """
    return [each for path in documents(root) for each in read(path, root)]


def read(path: Path, root: Path) -> Iterator[Printed]:
    """Read one document: Markdown, the docstring of a Python file, or the comment on top of another."""
    text = path.read_text(encoding="utf-8")
    name = path.relative_to(root).as_posix()
    lines = list(enumerate(text.splitlines(), start=1))
    if path.suffix == ".py":
        lines = _docstring(text)
    elif path.suffix != ".md":
        lines = _comment(lines)
    for info, block in _blocks(lines):
        yield from _paragraphs(name, info, block)


def _docstring(text: str) -> list[Line]:
    """Lines of a module's docstring."""
    first = ast.parse(text).body[0]
    return list(enumerate(text.splitlines(), start=1))[first.lineno - 1 : first.end_lineno]


def _comment(lines: Sequence[Line]) -> list[Line]:
    """Lines of the comment on top of a file; what stands indented in it is code."""
    found: list[Line] = []
    for number, line in lines:
        if not line.startswith("#"):
            break
        if not line.startswith("#!"):
            inner = line[1:].removeprefix(" ")
            found.append((number, f"  {inner}" if inner.startswith("  ") else inner))
    return found


def _blocks(lines: Sequence[Line]) -> Iterator[tuple[str, list[Line]]]:
    """Code blocks, each with the word behind its fence ("" where it is indented), without their indentation."""
    block: list[Line] = []
    fence: str | None = None
    info = ""
    indented = False
    blank = True
    for number, line in [*lines, (0, "end")]:
        if indented and line.strip() and not line.startswith("    "):
            yield "", _unindented(block)
            block, indented = [], False
        opened = re.match(r"\s{0,3}(```+|~~~+)\s*(\w*)", line)
        if fence is not None:
            if line.strip() == fence:
                yield info, _unindented(block)
                block, fence = [], None
            else:
                block.append((number, line))
        elif opened:
            fence, info = opened[1], opened[2]
        elif indented or (blank and line.startswith("    ")):
            block.append((number, line))
            indented = True
        blank = not line.strip()


def _unindented(block: Sequence[Line]) -> list[Line]:
    width = min((len(line) - len(line.lstrip()) for _, line in block if line.strip()), default=0)
    return [(number, line[width:].rstrip()) for number, line in block]


def _paragraphs(document: str, info: str, block: Sequence[Line]) -> Iterator[Printed]:
    """The paragraphs of a block by kind; those of Python are one."""
    if info in ("text", "diff"):
        return
    python: list[Line] = []
    for paragraph in _split(block):
        text = "\n".join(line for _, line in paragraph)
        kind = _kind(info, text, after_python=bool(python))
        if kind == "python":
            python += [*paragraph, (0, "")]
        elif kind == "yaml":
            yield Printed(document, paragraph[0][0], "yaml", text)
        elif kind == "command":
            yield from _commands(document, paragraph)
        elif kind is None:
            raise UnknownBlock(
                f"{document}:{paragraph[0][0]}: neither commands nor Python nor YAML: {paragraph[0][1][:60]!r}; "
                "fence it as ```text if nobody is to type it, or name its program in PROGRAMS"
            )
    if python:
        yield Printed(document, python[0][0], "python", "\n".join(line for _, line in python))


def _split(block: Sequence[Line]) -> Iterator[list[Line]]:
    paragraph: list[Line] = []
    for number, line in [*block, (0, "")]:
        if line:
            paragraph.append((number, line))
        elif paragraph:
            yield paragraph
            paragraph = []


def _kind(info: str, text: str, *, after_python: bool) -> Kind | Literal["json"] | None:
    words = text.removeprefix("$ ").split()
    if info in SHELL:
        return "command"
    if info in ("python", "py") or re.match(r"(import|from) \w", text) or (after_python and _parses(ast.parse, text)):
        return "python"
    # Variables may stand before the program.
    program = next((word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word)), "")
    if PROGRAMS.fullmatch(program):
        return "command"
    if info == "json" or _parses(json.loads, text) is not None:
        return "json"
    return "yaml" if isinstance(_parses(yaml.safe_load, text), dict) else None


def _parses(parse: Any, text: str) -> Any:
    try:
        return parse(text)
    except (SyntaxError, ValueError, yaml.YAMLError):
        return None


def _commands(document: str, paragraph: Sequence[Line]) -> Iterator[Printed]:
    """Commands of a paragraph: one a line or between `&&`; lines that end in a backslash go on."""
    start, text = 0, ""
    for number, line in paragraph:
        start = start or number
        text += line if text else line.removeprefix("$ ")
        if text.endswith("\\"):
            text = text[:-1].rstrip() + " "
            continue
        # Inside of a command, more spaces only indent the lines that go on.
        for command in re.sub(r" {2,}(?!#)", " ", text).split(" && "):
            if not command.startswith("#"):
                yield Printed(document, start, "command", command)
        start, text = 0, ""
