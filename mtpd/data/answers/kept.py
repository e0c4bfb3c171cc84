"""The file of answers: JSON lines that an interrupted or changed run continues.

The first line holds the settings that all answers depend on: trunk, temperature, top-p and seed. Each other one is
an answer: {"id", "prompt_ids", "response_ids"}, with its seal. An answer belongs to its prompt's tokens. Where the
prompt stands, what else was asked, and how many tokens an answer may have do not matter: an answer of fewer tokens
is the beginning of a longer one.

Several ranks write files of their own beside it, `responses.rank-0.jsonl` and so on, of the same form. The main rank
takes them into the one file when all are done, or when the next call finds them, with however many ranks. They are
deleted after that file is durable.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from glob import escape
from pathlib import Path
from typing import Any

from mtpd.data.answers.task import key_of
from mtpd.errors import UserError
from mtpd.files import intact, sealed, write_whole

logger = logging.getLogger(__name__)


def header(settings: Mapping[str, Any]) -> str:
    """The first line."""
    return json.dumps({"settings": dict(settings)}) + "\n"


def line_of(id: str, turn: int, prompt_ids: list[int], response_ids: list[int]) -> str:
    """The line of one answer."""
    line: dict[str, Any] = {"id": id, "prompt_ids": prompt_ids, "response_ids": response_ids}
    if turn > 1:
        line["turn"] = turn
    return json.dumps(sealed(line)) + "\n"


def of_rank(path: Path, rank: int | str) -> Path:
    """The file of one rank; "*" for a pattern of all."""
    return path.with_name(f"{path.stem}.rank-{rank}{path.suffix}")


def collect(path: Path, settings: Mapping[str, Any], *, fresh: bool = False) -> None:
    """Takes what ranks have written into the one file, which is there afterwards.

    Raises:
        UserError: as `read`, of any of the files.
    """
    parts = sorted(path.parent.glob(of_rank(Path(escape(path.name)), "*").name))
    found = [] if fresh else [_lines(part, settings) for part in (path, *parts)]
    # A file without lines may lack the one with the settings as well.
    if fresh or any(found[1:]) or not found[0]:
        lines = {key: line for part in found for key, line in part.items()}
        write_whole(path, header(settings) + "".join(json.dumps(line) + "\n" for line in lines.values()))
    for part in parts:
        part.unlink()


def read(path: Path, settings: Mapping[str, Any]) -> dict[str, list[int]]:
    """Answers by the name of their prompt's tokens. Lines that a kill tore, or that are damaged, are dropped.

    Raises:
        UserError: the file is none of ours, or its settings are other ones.
    """
    return {key: line["response_ids"] for key, line in _lines(path, settings).items()}


def _lines(path: Path, settings: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The lines of a file, without what a kill tore, or what is damaged. The last one of a prompt counts."""
    if not path.exists():
        return {}
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    first, *lines = whole.split(b"\n")[:-1] or [header(settings).strip().encode()]
    try:
        head = json.loads(first)
        found = dict(head["settings"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not a file of responses; move it away, or choose another output directory") from error
    for key in settings:
        if found.get(key) != settings[key]:
            raise UserError(
                f"{path}: it was made with another {key} ({_brief(found.get(key))}, now {_brief(settings[key])}); "
                "delete it to generate anew, or choose another output directory"
            )
    done: dict[str, dict[str, Any]] = {}
    kept: dict[str, bytes] = {}
    for number, line in enumerate(lines, start=2):
        response = _response(line)
        if response is None:
            logger.warning("%s:%d: damaged; that prompt is answered again", path, number)
            continue
        key = key_of(response["prompt_ids"])
        done[key], kept[key] = response, line
    if len(kept) < len(lines) or len(whole) < len(content):
        write_whole(path, b"".join(line + b"\n" for line in (first, *kept.values())))
    return done


def _response(line: bytes) -> dict[str, Any] | None:
    """A line with the tokens of a prompt and its answer, or None if it is damaged."""
    try:
        found: dict[str, Any] = json.loads(line)
        whole = intact(found) and isinstance(found["id"], str)
        return found if whole and are_ids(found["prompt_ids"]) and are_ids(found["response_ids"]) else None
    except (ValueError, KeyError, TypeError):
        return None


def are_ids(value: Any) -> bool:
    """Whether it is a list of numbers that could be tokens."""
    return isinstance(value, list) and all(type(token) is int and 0 <= token < 2**31 for token in value)


def _brief(value: Any) -> str:
    return str(value)[:12]
