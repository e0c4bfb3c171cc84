"""Suites: the prompts that acceptance is measured on. One small YAML file each, in this folder or in a user's.

    title: GSM8K, word problems
    source: openai/gsm8k          # a datasets id, a .jsonl file (beside the YAML file, or a path), or builtin-held-out
    subsets: [main]               # configurations of the datasets id
    split: test
    prompt: "{{ question }}"      # a Jinja template over the fields of a row; left out: rows as mtpd reads prompts
    answer: "{{ answer }}"        # the reference
    language: en                  # of the rows, a Jinja template too
    match: number                 # how an answer is compared with it
    limit: 80                     # prompts, drawn by the seed
    seed: 0
    max_new_tokens: 256           # of the response
    modes: {short: {effort: low}} # gsm8k[short] is the suite with these arguments of the chat template
    contexts: [1024, 4096]        # rows are documents, joined to prompts of so many tokens; see `joined.py`

In a folder given as `--suite-dir`, NAME.yaml is the suite NAME, and so is NAME.jsonl with rows as mtpd reads
prompts (`turns` or `prompt`, and optionally `reference`). Such a file also takes the place of the source of the
suite of that name that comes with mtpd, or of the one that names it under `file`.
"""

from __future__ import annotations

import difflib
import json
import logging
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from jinja2 import TemplateError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from mtpd.data import sources, stdlib
from mtpd.data.prompts import DistinctIds, Prompt
from mtpd.data.rendering import render_all
from mtpd.data.rows.left_out import LeftOut, Unusable
from mtpd.data.rows.row_format import RowFormat, fill
from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance, Settings
from mtpd.files import escapes
from mtpd.recipe.text import explain, read_mapping

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
MODES: dict[str, dict[str, Any]] = {
    "thinking": {"enable_thinking": True, "thinking": True},
    "direct": {"enable_thinking": False, "thinking": False},
}
"""Modes of every suite, with the two names that chat templates have for it; others read neither."""


class Suite(BaseModel):
    """One suite, as its YAML file describes it."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    title: str = Field(min_length=1)
    """What people call it."""
    source: str = Field(min_length=1, examples=["openai/gsm8k", "rows.jsonl", "builtin-held-out"])
    """A datasets id, a .jsonl file, or builtin-held-out."""
    subsets: list[str] = []
    """Configurations of the datasets id, one after the other; none for its only one."""
    split: str = "test"
    """Split of the datasets id."""
    file: str | None = None
    """Name of the suite's file in a folder of suites, where it is not NAME.jsonl."""
    id: str | None = None
    """Jinja template of a row's id; null: its number, or the field id where rows are read as mtpd reads prompts."""
    prompt: str | None = None
    """Jinja template of the user's message; null: rows as mtpd reads prompts."""
    answer: str | None = None
    """Jinja template of the reference; null: the field reference."""
    language: str | None = None
    """Jinja template of the language that a row is in, such as `{{ language }}` or `de`; null: not said."""
    match: Literal["number"] | None = None
    """How an answer is compared with the reference. number: the last number in it; null: not at all."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the model's chat template, over those of the run; those that a row has go before them."""
    modes: dict[str, dict[str, Any]] = {}
    """Arguments of the chat template by mode, over those of the suite: NAME[MODE] is the suite with them. Every suite
    has the modes thinking and direct."""
    contexts: list[int] = []
    """Tokens of prompt and response. Rows are then documents, which are joined up to each of these lengths."""
    limit: int = Field(default=80, ge=1)
    """Prompts at most, drawn by the seed."""
    seed: int = Field(default=0, ge=0)
    """Seed of the draw."""
    max_new_tokens: int = Field(default=256, ge=1)
    """Tokens of a response at most."""

    @property
    def settings(self) -> Settings:
        """Settings that two measurements must share to be compared."""
        source = Path(self.source).name if sources.at_hand(self.source) else self.source
        # Only where there are any: files of earlier versions know no such key.
        arguments = {"chat_template_kwargs": json.dumps(self.chat_template_kwargs, sort_keys=True)}
        return {
            **(arguments if self.chat_template_kwargs else {}),
            **({"contexts": ", ".join(map(str, self.contexts))} if self.contexts else {}),
            "source": source,
            "subsets": ", ".join(self.subsets) or None,
            "split": None if sources.at_hand(self.source) else self.split,
            "prompt": self.prompt,
            "limit": self.limit,
            "seed": self.seed,
            "max_new_tokens": self.max_new_tokens,
        }


@dataclass(frozen=True)
class Question:
    """A prompt of a suite, and the reference answer if it has one."""

    prompt: Prompt
    answer: str | None = None
    family: str = ""
    """What the row says that it is of; the family of the prompt is the suite."""
    language: str | None = None


def suite_names(folder: Path | None = None) -> list[str]:
    """Names of the suites that come with mtpd, and of those in a folder."""
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    if folder is not None:
        names |= {path.stem for pattern in ("*.yaml", "*.jsonl") for path in folder.glob(pattern)}
    return sorted(names)


def check_names(names: Sequence[str] | None, folder: Path | None, *, against: Path | None = None) -> None:
    """Refuses suites that there are not, before anything is loaded.

    Args:
        names: None stands for those of the baseline.
        against: an acceptance file that is the baseline.

    Raises:
        UserError: naming the suite and what is accepted.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"--suite-dir: {folder}: no such folder")
    if names is not None and not names:
        raise UserError("--suite: names no suite; accepted: names with commas between them, such as gsm8k,humaneval")
    known = suite_names(folder)
    for name in names or ():
        if list(names or ()).count(name) > 1:
            raise UserError(f"--suite: {name} is named twice")
        name, mode = in_brackets(name)
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UserError(f"suite {name}: unknown; {hint}accepted: {', '.join(known)}")
        if mode is not None:
            _mode(_find(name, folder), name, mode)
    if against is None:
        return
    measured = list(Acceptance.load(against).suites)
    unknown = [name for name in measured if in_brackets(name)[0] not in known]
    if names is None and unknown:
        raise UserError(
            f"--against: {against}: was measured on {', '.join(unknown)}, which are no suites here; accepted: a file "
            "of mtpd eval, with --suite-dir if its suites are in a folder"
        )
    if names is not None and set(names) != set(measured):
        raise UserError(
            f"--suite: {', '.join(names)} differs from what {against} was measured on ({', '.join(measured)}); leave "
            "--suite out to measure those"
        )


def load_suite(
    name: str,
    folder: Path | None = None,
    *,
    limit: int | None = None,
    max_new_tokens: int | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    untrusted: bool = False,
) -> Suite:
    """The suite of that name.

    Args:
        folder: where suites are looked for first (`--suite-dir`).
        limit, max_new_tokens: in place of the suite's own.
        chat_template_kwargs: arguments of the chat template where the suite says nothing else: those of the run.
        untrusted: whether the folder is somebody else's; paths in it must not lead out of it.

    Raises:
        UserError: there is no such suite or folder, or its file lacks something.
    """
    if folder is not None and not folder.is_dir():
        raise UserError(f"--suite-dir: {folder}: no such folder")
    name, mode = in_brackets(name)
    if untrusted and folder is not None:
        _refuse_escape(name, folder)
    suite = _find(name, folder)
    arguments = {**(chat_template_kwargs or {}), **suite.chat_template_kwargs, **_mode(suite, name, mode)}
    changes = {"limit": limit, "max_new_tokens": max_new_tokens, "chat_template_kwargs": arguments}
    return suite.model_copy(update={key: value for key, value in changes.items() if value is not None})


def in_brackets(name: str) -> tuple[str, str | None]:
    """Splits math500[thinking] into the name of the suite and the mode; None where there is none."""
    name, bracket, mode = name.partition("[")
    return name, mode.removesuffix("]") if bracket else None


def _mode(suite: Suite, name: str, mode: str | None) -> Mapping[str, Any]:
    """Arguments of the chat template that a mode stands for."""
    known = {**MODES, **suite.modes}
    if mode is not None and mode not in known:
        raise UserError(f"suite {name}[{mode}]: unknown mode; accepted: {', '.join(known)}")
    return {} if mode is None else known[mode]


def _refuse_escape(name: str, folder: Path) -> None:
    """Raises UserError if a suite of a folder, or what its file names, lies outside of it."""
    accepted = f"accepted: names, and paths inside {folder} without links that lead out of it"
    for file in (f"{name}.yaml", f"{name}.jsonl"):
        if escapes(file, folder):
            raise UserError(f"suite {name}: {file} is not accepted in a folder that is not trusted; {accepted}")
    own = folder / f"{name}.yaml"
    if own.is_file():
        suite = _read(own)
        # `_read` has resolved a source beside the file.
        source = suite.source if not (folder / Path(suite.source).name).is_file() else Path(suite.source).name
        for key, value in (("source", source), ("file", suite.file)):
            if value is not None and escapes(value, folder):
                raise UserError(
                    f"suite {name}: {key}: {value} is not accepted in a folder that is not trusted; {accepted}"
                )


def _find(name: str, folder: Path | None) -> Suite:
    own = FOLDER / f"{name}.yaml"
    if folder is not None:
        if (folder / f"{name}.yaml").is_file():
            return _read(folder / f"{name}.yaml")
        known = _read(own) if own.is_file() else Suite(title=name, source=name)
        for file in (f"{name}.jsonl", known.file):
            if file is not None and (folder / file).is_file():
                # Its rows say themselves what they are; the templates are for the rows of the other source.
                update: dict[str, Any] = {
                    "source": str(folder / file),
                    "subsets": [],
                    "id": None,
                    "prompt": None,
                    "answer": None,
                }
                return known.model_copy(update=update)
    if not own.is_file():
        raise UserError(f"suite {name}: unknown; accepted: {', '.join(suite_names(folder))}")
    return _read(own)


def _read(path: Path) -> Suite:
    values = read_mapping(path, what="suite", example="mtpd/evaluate/suites/gsm8k.yaml")
    try:
        suite = Suite.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, Suite.model_json_schema(), source=str(path), what="suite")) from None
    beside = path.parent / suite.source
    return suite.model_copy(update={"source": str(beside)}) if beside.is_file() else suite


def questions(name: str, suite: Suite) -> list[Question]:
    """The prompts of a suite, drawn by its seed, in the order of the source. Their family is the suite's name.

    Of a suite with `contexts` these are all documents; `mtpd.evaluate.suites.joined` makes prompts of them.

    Raises:
        UserError: the source is missing or empty, a field that a template reads is missing.
    """
    found: list[Question] = []
    ids, left_out, number = DistinctIds(), LeftOut(), -1
    for number, (place, row) in enumerate(_rows(name, suite)):
        try:
            question = _question(name, suite, number, place, row)
        except Unusable as error:
            left_out.add(error)
            continue
        found.append(replace(question, prompt=ids.number(question.prompt)))
    if ids.repeated:
        logger.warning("suite %s: %s", name, ids.words())
    left_out.check(number + 1, source=f"suite {name}: {suite.source}")
    if suite.contexts:
        # Documents, of which prompts are made when there is a tokenizer.
        return found
    if len(found) > suite.limit:
        chosen = sorted(random.Random(suite.seed).sample(range(len(found)), suite.limit))
        found = [found[index] for index in chosen]
    return found


def usable(tokenizer: Any, name: str, asked: Sequence[Question]) -> list[Question]:
    """The questions that the model's chat template takes; the others are counted in a warning.

    Raises:
        UserError: none is left, or too many are refused.
    """
    left_out = LeftOut()
    kept = {prompt.id for prompt, _ in render_all(tokenizer, [question.prompt for question in asked], left_out)}
    left_out.check(len(asked), source=f"suite {name}")
    return [question for question in asked if question.prompt.id in kept]


def _rows(name: str, suite: Suite) -> Iterator[tuple[str, Any]]:
    if suite.contexts and suite.source in (stdlib.SOURCE, stdlib.HELD_OUT):
        yield from ((path, {"text": text}) for path, text in stdlib.documents(suite.source))
        return
    subsets: Sequence[str | None] = suite.subsets or [None]
    for subset in subsets:
        try:
            yield from sources.read(suite.source, split=suite.split, subset=subset)
        except UserError as error:
            raise UserError(f"suite {name}: {str(error).removeprefix('data.prompts: ')}") from error


def _question(name: str, suite: Suite, number: int, place: str, row: Any) -> Question:
    default_id = f"{name}-{number}"
    if isinstance(row, Unusable):
        raise row
    form = RowFormat(chat_template_kwargs=suite.chat_template_kwargs)
    if suite.prompt is not None:
        said = _fill(suite.prompt, row, name, "prompt", place)
        prompt = form.read({"prompt": said}, place=place, default_id=default_id)
    else:
        prompt = form.read(row, place=place, default_id=default_id)
    if not prompt.text.strip():
        raise Unusable("empty", f"{place}: it has no text")
    own_id = _fill(suite.id, row, name, "id", place) if suite.id is not None else prompt.id
    answer = row.get("reference") if suite.answer is None else _fill(suite.answer, row, name, "answer", place)
    language = None if suite.language is None else _fill(suite.language, row, name, "language", place)
    # Of a conversation the first round is measured.
    asked = replace(prompt, id=own_id, response=None, family=name, later=())
    return Question(asked, answer if isinstance(answer, str) else None, prompt.family, language)


def _fill(template: str, row: Mapping[str, Any], name: str, key: str, place: str) -> str:
    try:
        return fill(template, row)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
        fields = ", ".join(sorted(map(str, row))) if isinstance(row, Mapping) else type(row).__name__
        raise Unusable(
            f"refused by the template of {key}", f"suite {name}: {key}: {error} ({place}); its rows have {fields}"
        ) from error
