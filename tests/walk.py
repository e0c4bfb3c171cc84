"""Types every command that the documents print, in order, where mtpd is installed as users have it.

    python tests/walk.py                    # as printed
    python tests/walk.py --size small       # with what takes long cut short
    python tests/walk.py --list             # what runs, what does not, and why
    python tests/walk.py --from 12          # goes on in the folder of the last walk

A wheel is built from this checkout and installed without the checkout on Python's path; its dependencies are those of
the Python that runs this script. Documents are read in `printed.py`, exceptions stand in `walk_list.py`. What a reader
has to bring (prompts, a checkpoint) is put there before the command that names it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import walk_list
from printed import Printed, printed

ROOT = Path(__file__).resolve().parents[1]
SECONDS = {"small": 600, "full": 3 * 3600}
"""After which a command is ended."""
BROUGHT = ("examples",)
"""Folders of the project that a reader of the documents has; recipes come with the wheel."""


@dataclass(frozen=True)
class Step:
    """What becomes of a printed command.

    Args:
        command: what is run; None leaves it out.
        why: why it is left out or changed; "" runs it as printed.
    """

    printed: Printed
    command: str | None
    why: str = ""


def plan(found: Sequence[Printed], *, small: bool) -> list[Step]:
    """Decide about each printed command and piece of Python. A command that was printed before is not run again."""
    steps: list[Step] = []
    seen: dict[str, str] = {}
    for each in found:
        if each.kind == "yaml":
            continue
        steps.append(_step(each, found, seen, small=small))
        seen.setdefault(_bare(each.text), each.place)
    return steps


def _step(each: Printed, found: Sequence[Printed], seen: dict[str, str], *, small: bool) -> Step:
    if each.kind == "python":
        return Step(each, _python(each, found))
    if _bare(each.text) in seen:
        return Step(each, None, f"as {seen[_bare(each.text)]}")
    for left in walk_list.NOT_RUN:
        if re.search(left.pattern, each.text):
            return Step(each, None, left.why)
    command, whys = each.text, []
    for changed in [*walk_list.CHANGED, *(walk_list.SHORTENED if small else ())]:
        if re.search(changed.pattern, command):
            command = re.sub(changed.pattern, changed.by, command, count=1)
            whys.append(changed.why)
    return Step(each, command, "; ".join(whys))


def _bare(command: str) -> str:
    """A command without its comment."""
    return re.sub(r"\s+#.*", "", command)


def _python(each: Printed, found: Sequence[Printed]) -> str:
    """A piece of Python; one that imports nothing goes on where those before it in the document ended."""
    pieces = [each.text]
    if not re.search(r"^(import|from) ", each.text, re.MULTILINE):
        before = [other for other in found if other.document == each.document and other.kind == "python"]
        pieces = [other.text for other in before if other.line <= each.line]
    return "python - <<'END'\n" + "\n".join(pieces) + "\nEND"


def mistakes(found: Sequence[Printed], root: Path) -> list[str]:
    """Entries of the lists that match nothing or a part of a word, and exit codes that no document announces."""
    texts = [*(each.text for each in found), *(changed.by for changed in walk_list.SHORTENED)]
    run = [step.printed for step in plan(found, small=False) if step.command is not None]
    entries = [
        *(
            entry.pattern
            for entry in (*walk_list.NOT_RUN, *walk_list.CHANGED, *walk_list.SHORTENED, *walk_list.ENDINGS)
        ),
        *(rf"(^|[\s=/]){re.escape(name)}\b" for name in walk_list.STAND_INS),
    ]
    wrong = [
        f"walk_list.py: {entry!r} matches no printed command"
        for entry in entries
        if not any(re.search(entry, text) for text in texts)
    ]
    wrong += [
        f"walk_list.py: {changed.pattern!r} ends inside of a word of {text!r}"
        for changed in (*walk_list.CHANGED, *walk_list.SHORTENED)
        for text in texts
        if (match := re.search(changed.pattern, text))
        and re.match(r"\S\S", text[match.end() - 1 :])
        and match.group().split(" ")[-1] != match.expand(changed.by).split(" ")[-1]
    ]
    for ending in walk_list.ENDINGS:
        for name in sorted({each.document for each in run if re.search(ending.pattern, each.text)}):
            text = (root / name).read_text(encoding="utf-8")
            wrong += [
                f"walk_list.py: {ending.pattern!r} may end with {code}, which {name} does not say"
                for code in ending.codes
                if not re.search(rf"exit\b[^.]{{0,120}}\b{code}\b", text)
            ]
    return wrong


class Walk:
    """A folder, an environment with mtpd in it, and what was typed there."""

    def __init__(self, work: Path, found: Sequence[Printed], *, small: bool) -> None:
        self.here, self.environment, self.logs = work / "here", work / "venv", work / "logs"
        self.found = found
        self.small = small
        self.written: set[tuple[str, str]] = set()

    def start(self, *, fresh: bool) -> None:
        """Builds and installs the wheel; a fresh walk has an empty folder."""
        if fresh:
            shutil.rmtree(self.here, ignore_errors=True)
        self.here.mkdir(parents=True, exist_ok=True)
        self.logs.mkdir(exist_ok=True)
        shutil.rmtree(self.environment, ignore_errors=True)
        tools, pip = sysconfig.get_path("scripts"), [sys.executable, "-m", "pip", "-q", "--disable-pip-version-check"]
        wheels = self.environment / "wheel"
        _done([sys.executable, "-m", "venv", "--without-pip", str(self.environment)])
        _done([*pip, "wheel", "--no-deps", "--wheel-dir", str(wheels), str(ROOT)])
        python = self.environment / "bin" / "python"
        _done([*pip, "--python", str(python), "install", "--no-deps", *map(str, wheels.glob("mtpd-*.whl"))])
        # Python does not follow what an editable installation of mtpd left there: that lies in a file of the same kind.
        own = Path(sysconfig.get_path("purelib", vars={"base": str(self.environment)}))
        (own / "tools.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
        for name in ("torchrun", "deepspeed"):
            script = Path(tools, name).read_text().split("\n", 1)[1]
            (python.parent / name).write_text(f"#!{python}\n{script}")
            (python.parent / name).chmod(0o755)
        for name in BROUGHT:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, self.here / name, dirs_exist_ok=True)
        place = self.call("python -c 'import mtpd; print(mtpd.__file__)'", self.logs / "where.log")
        where = (self.logs / "where.log").read_text().strip()
        assert place == 0, where
        assert Path(where).is_relative_to(self.environment), f"mtpd is not the installed wheel: {where}"

    def call(self, command: str, log: Path) -> int | str:
        """Runs a command as a shell does; its exit code, or "timeout"."""
        path = os.pathsep.join([str(self.environment / "bin"), "/usr/local/bin", "/usr/bin", "/bin"])
        kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        limit = SECONDS["small" if self.small else "full"]
        with open(log, "w") as output:
            process = subprocess.Popen(
                ["bash", "-c", command],
                cwd=self.here,
                env=kept | {"PATH": path},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                return process.wait(limit)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    return "timeout"
                raise

    def take(self, number: int, step: Step) -> bool:
        """Runs a step; whether it ended as its document says."""
        assert step.command is not None
        log = self.logs / f"{number:03}.log"
        self.put_there(step)
        begun = time.monotonic()
        code = self.call(step.command, log)
        good = code == 0 or any(
            code in ending.codes for ending in walk_list.ENDINGS if re.search(ending.pattern, step.printed.text)
        )
        print(f" {time.monotonic() - begun:.1f} s{'' if code == 0 else f', exit code {code}'}", flush=True)
        if not good:
            lines = re.split(r"[\r\n]+", log.read_text(errors="replace").strip())
            print("\n".join(f"        {line}" for line in lines[-12:]), flush=True)
        return good

    def put_there(self, step: Step) -> None:
        """What the reader has to have before this command: files of their own, a recipe that the document shows."""
        each, command = step.printed, step.command or ""
        for target in re.findall(r" -o (\S+)", command):
            # Another document's example, or one that is walked again.
            if (each.document, target) not in self.written and not target.startswith("runs"):
                shutil.rmtree(self.here / target, ignore_errors=True)
            self.written.add((each.document, target))
        shown = [other for other in self.found if other.document == each.document and other.kind == "yaml"]
        for name in re.findall(r"\S+\.yaml\b", command):
            above = [other for other in shown if other.line < each.line]
            if above and name not in walk_list.STAND_INS and not (self.here / name).exists():
                text = re.sub(r"(?m)^model:.*", f"model: {walk_list.MODEL}", above[-1].text)
                (self.here / name).write_text(text + "\n")
            if above and (self.here / name).is_file():
                # What a shown recipe names has to be there too.
                command += "\n" + (self.here / name).read_text()
        for name, made in walk_list.STAND_INS.items():
            if re.search(rf"(^|[\s=/]){re.escape(name)}\b", command) and not (self.here / name).exists():
                log = self.logs / "stand-in.log"
                assert self.call(made, log) == 0, f"{made}\n{log.read_text()}"


def _done(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stdout}{done.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--size", choices=("full", "small"), default="full")
    parser.add_argument("--from", dest="first", type=int, default=1, metavar="N", help="begin at this command")
    parser.add_argument("--only", metavar="PATTERN", help="commands in which this regular expression is found")
    parser.add_argument("--list", action="store_true", help="print what would be done")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "walk", help="where (build/walk)")
    given = parser.parse_args()
    small = given.size == "small"
    found = printed(ROOT)
    wrong = mistakes(found, ROOT)
    steps = list(enumerate(plan(found, small=small), start=1))
    if given.list:
        for number, step in steps:
            mark = "-" if step.command is None else "*" if step.why else " "
            print(f"{number:3} {mark} {step.printed.place}  {_title(step)}{f'  [{step.why}]' if step.why else ''}")
    if wrong or given.list:
        print("\n".join(wrong))
        return bool(wrong)
    chosen = [
        (number, step)
        for number, step in steps
        if step.command is not None
        and number >= given.first
        and (given.only is None or re.search(given.only, step.printed.text))
    ]
    walk = Walk(given.folder.resolve(), found, small=small)
    begun = time.monotonic()
    walk.start(fresh=given.first == 1 and given.only is None)
    print(f"mtpd is installed: {time.monotonic() - begun:.1f} s", flush=True)
    failed = []
    for number, step in chosen:
        print(f"{number:3}/{len(steps)} {step.printed.place}  {_title(step)} ...", end="", flush=True)
        if not walk.take(number, step):
            failed.append(f"{number:3} {step.printed.place}  {_title(step)}")
    left = sum(step.command is None for _, step in steps)
    print(f"{len(chosen)} commands, {len(failed)} failed, {left} not run, {time.monotonic() - begun:.0f} s")
    print("\n".join(failed), end="\n" if failed else "")
    return bool(failed)


def _title(step: Step) -> str:
    """What is typed, on one line."""
    if step.printed.kind == "python":
        return f"Python: {step.printed.text.splitlines()[0]} ..."
    return _bare(step.printed.text)


if __name__ == "__main__":
    sys.exit(main())
