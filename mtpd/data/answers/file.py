"""Answers that another program wrote into a file of JSON lines.

A line is {"id", "response_ids"} with the tokens, or {"id", "text"}, which is tokenised here and may
then have other tokens than the model wrote. `prompt_ids`, if there, have to be those of the prompt. `mtpd data prompts`
writes the prompts with their ids; the `responses.jsonl` of a run is read as well.
"""

from __future__ import annotations

import json
import logging
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from mtpd.data.answers.kept import are_ids
from mtpd.data.answers.task import Answered, Task, key_of, until_end
from mtpd.errors import UserError
from mtpd.files import intact

logger = logging.getLogger(__name__)

ACCEPTED = "lines with id and response_ids (or text), and prompt_ids if you have them"


class FileAnswers:
    """Answers from a file.

    Args:
        ends: ids that end an answer; a text is taken to end with the first of them, unless its `finish_reason` is
            `length`.
        tokens: how many tokens the model has.

    Raises:
        UserError: a line that cannot be read, by its number.
    """

    def __init__(
        self, path: Path, tokenizer: PreTrainedTokenizerBase, *, ends: Sequence[int], tokens: int, key: str
    ) -> None:
        self.path, self.key = path, key
        self.by_prompt: dict[str, array[int]] = {}
        self.by_id: dict[str, array[int]] = {}
        self.other_prompt: dict[str, str] = {}
        """Ids with the place of a line that brings the tokens of its prompt."""
        self.texts = 0
        self._tokenizer, self._ends, self._tokens = tokenizer, list(ends), tokens
        with open(path, encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    self._take(line, f"{key}: {path}:{number}", first=number == 1)
        if self.texts:
            logger.warning(
                "%s: %d responses are text: tokenised here, they may have other tokens than the model wrote (%s)",
                path,
                self.texts,
                "response_ids would be exact",
            )

    def __call__(self, tasks: Sequence[Task]) -> Iterator[Answered]:
        """Tasks that the file answers.

        Raises:
            UserError: an answer to a prompt with other tokens.
        """
        for task in tasks:
            response = self.by_prompt.get(task.key)
            if response is None and task.turn == 1:
                response = self.by_id.get(task.prompt.id)
                if response is None and (place := self.other_prompt.get(task.prompt.id)) is not None:
                    raise UserError(
                        f"{place}: its prompt_ids are not those of the prompt {task.prompt.id} here; accepted: those "
                        "of `mtpd data prompts` with this recipe"
                    )
            if response is not None:
                yield task, until_end(response, frozenset(self._ends))

    def _take(self, line: str, place: str, *, first: bool) -> None:
        try:
            found: Any = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place}: no JSON; accepted: {ACCEPTED}") from error
        if first and isinstance(found, dict) and "settings" in found:
            return  # what a run writes above its responses
        if not isinstance(found, dict) or not isinstance(found.get("id"), str) or not intact(found):
            raise UserError(f"{place}: has no id, or is damaged; accepted: {ACCEPTED}")
        response = array("i", self._response(found, place))
        if "prompt_ids" in found:
            if not are_ids(found["prompt_ids"]):
                raise UserError(f"{place}: prompt_ids is no list of token ids")
            self.by_prompt[key_of(found["prompt_ids"])] = response
            if found.get("turn", 1) == 1:
                self.other_prompt[found["id"]] = place
        elif found["id"] in self.by_id:
            raise UserError(f"{place}: {found['id']} was answered in an earlier line; accepted: one line for each id")
        else:
            self.by_id[found["id"]] = response

    def _response(self, found: dict[str, Any], place: str) -> list[int]:
        if "response_ids" in found:
            ids = found["response_ids"]
            if not are_ids(ids) or not ids or max(ids) >= self._tokens:
                raise UserError(
                    f"{place}: response_ids is no list of token ids of this model; accepted: 0 to {self._tokens - 1}"
                )
            return list(ids)
        if isinstance(found.get("text"), str):
            self.texts += 1
            return ids_of_text(self._tokenizer, found["text"], self._ends, ended=found.get("finish_reason") != "length")
        raise UserError(f"{place}: has neither response_ids nor text; accepted: {ACCEPTED}")


def ids_of_text(tokenizer: PreTrainedTokenizerBase, text: str, ends: Sequence[int], *, ended: bool) -> list[int]:
    """Tokens of the text of an answer, with the token that ends it."""
    ids = until_end(list(tokenizer(text, add_special_tokens=False)["input_ids"]), frozenset(ends))
    return [*ids, ends[0]] if ended and ends and ids[-1:] != [ends[0]] and not set(ids[-1:]) & set(ends) else ids
