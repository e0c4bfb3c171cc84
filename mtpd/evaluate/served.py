"""Acceptance of heads as a server has it: prompts go over HTTP, and the server says how its drafts went.

vLLM tells of each answer how many drafts it accepted in each round (`--per-request-spec-decode-metrics detailed`).
Rounds are then counted by mtpd's own rule (`mtpd.decode.counts`), prompt by prompt, whatever else the server does.
What other servers tell (`mtpd.evaluate.told`) is of all rounds, the last ones of a text among them, whose drafts lie
behind its end. Without it there are the server's counters before and after: of each prompt while one is asked at a
time, else sums over a suite.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from mtpd.data.answers.server import Server
from mtpd.data.answers.task import Task
from mtpd.errors import MtpdError, UserError
from mtpd.evaluate.acceptance import PromptCounts, SuiteCounts
from mtpd.evaluate.engine_counters import EngineCounters
from mtpd.evaluate.load import Load
from mtpd.evaluate.suites import Suite
from mtpd.evaluate.told import Told, told_by_answer, told_by_counters
from mtpd.files import fingerprint_json, short
from mtpd.progress import Bar

Asked = Mapping[str, tuple[Suite, Sequence[Task]]]
"""By name, a suite and its prompts."""
SETTLED = 0.1
"""Seconds in which counters that do not change any more have settled."""
LONGEST = 5.0
"""Seconds that counters may take to settle."""
OTHERS = (
    "for this measurement: it has other users; accepted: a server of one's own, or vLLM with "
    "--per-request-spec-decode-metrics detailed"
)


class DraftingServer:
    """A server, and what it says of the drafts of each answer."""

    def __init__(self, url: str, tokenizer: Any, *, key: str, **settings: Any) -> None:
        self.place = f"{key}: {url.rstrip('/').removesuffix('/v1')}"
        self.said: dict[str, Told] = {}
        """By prompt, of the newest answer."""
        self.server = Server(
            url, tokenizer, temperature=0.0, top_p=1.0, key=key, kept="", on_answer=self._hear, **settings
        )

    def _hear(self, task: Task, answer: Mapping[str, Any]) -> None:
        if (found := told_by_answer(answer)) is not None:
            self.said[task.key] = found

    def read_after(self, task: Task, before: EngineCounters) -> EngineCounters:
        """The counters after the only request since a reading, unless its answer has told of its drafts itself.

        Raises:
            MtpdError: there were other requests, or the server started again.
        """
        said = self.said.get(task.key)
        if before.drafts is None or (said is not None and said.by_depth):
            return before
        tokens, until = None if said is None else said.tokens, time.monotonic() + LONGEST
        while True:
            now = self.counters() if tokens is None else self._counters()
            counted = now.since(before, place=self.place)
            if tokens in (None, counted.tokens):
                break
            if counted.tokens > (tokens or 0) or time.monotonic() > until:
                raise MtpdError(f"{self.place}: wrote {counted.tokens} tokens, and {tokens} of them {OTHERS}")
            time.sleep(SETTLED)
        self.said[task.key] = told_by_counters(counted)
        return now

    def told(self, counted: EngineCounters, answered: Iterable[str]) -> EngineCounters:
        """Counters with the drafts by depth, where only the answers tell of those.

        Raises:
            UserError: they do not either.
        """
        if counted.accepted or not counted.drafts:
            return counted
        said = [self.said.get(key) for key in answered]
        told = [each for each in said if each is not None and each.by_depth]
        if len(told) < len(said):
            raise UserError(
                f"{self.place}: says how many drafts it verified, and not at which depth it accepted them; accepted: a "
                "server that tells of each answer, such as SGLang where it takes return_spec_tokens_details"
            )
        columns = zip_longest(*(each.accepted for each in told), fillvalue=0)
        return replace(counted, drafts=sum(each.drafts for each in told), accepted=[sum(column) for column in columns])

    def counters(self) -> EngineCounters:
        """The server's counters, once they do not change any more: they are written a moment after an answer."""
        found, until = self._counters(), time.monotonic() + LONGEST
        while True:
            time.sleep(SETTLED)
            before, found = found, self._counters()
            if found == before or time.monotonic() > until:
                return found

    def _counters(self) -> EngineCounters:
        return EngineCounters.read(self.server.page("/metrics"), place=self.place)

    def version(self, engine: str) -> str:
        """Name and version of an engine."""
        import json

        for page, key in (("/version", "version"), ("/props", "build_info"), ("/get_server_info", "version")):
            try:
                found = json.loads(self.server.page(page) or "{}").get(key)
            except (ValueError, AttributeError):
                continue
            if isinstance(found, str):
                return f"{engine} {found}"
        return engine


@dataclass
class Pass:
    """Answers of a server to all prompts, with so many requests at a time."""

    concurrency: int
    seconds: float = 0.0
    texts: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    """By suite and key of a prompt."""
    counted: dict[str, EngineCounters] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Written in all."""
        return sum(len(text) for texts in self.texts.values() for text in texts.values())


def ask(server: DraftingServer, suites: Asked, *, concurrency: int, words: str, progress: bool = True) -> Pass:
    """Asks all prompts, so many at a time.

    Args:
        words: what the progress bar says.

    Raises:
        MtpdError: the server fails, or started again.
        UserError: it has no counters.
    """
    found = Pass(concurrency)
    server.server.at_a_time = concurrency
    total = sum(len(tasks) for _, tasks in suites.values())
    with Bar(total=total, desc=f"{words}, {concurrency} at a time", unit="prompt", disable=not progress) as bar:
        for name, (suite, tasks) in suites.items():
            server.server.max_new_tokens = suite.max_new_tokens
            before = now = server.counters()
            texts = found.texts.setdefault(name, {})
            for part in [[task] for task in tasks] if concurrency == 1 else [tasks]:
                began = time.monotonic()
                for task, text in server.server(part):
                    texts[task.key] = text
                    bar.update()
                found.seconds += time.monotonic() - began
                if concurrency == 1:
                    now = server.read_after(part[0], now)
            found.counted[name] = server.told(server.counters().since(before, place=server.place), texts)
            if not texts:
                raise UserError(f"{server.place}: answered no prompt of suite {name}")
    return found


def suite_counts(server: DraftingServer, found: Pass, suites: Asked, plain: Pass | None) -> dict[str, SuiteCounts]:
    """Counts of each suite: by prompt where the server told of each answer, else its own sums.

    Args:
        plain: the answers of a server without drafts, whose texts are compared.

    Raises:
        UserError: the server drafts nothing.
        MtpdError: other requests are in its counters.
    """
    counts = {}
    for name, (suite, tasks) in suites.items():
        texts, counted = found.texts[name], found.counted[name]
        answered = [task for task in tasks if task.key in texts]
        if not counted.drafts:
            raise UserError(f"{server.place}: {counted.engine.without_drafts}")
        depth = len(counted.accepted)
        said = [server.said.get(task.key) for task in answered]
        if all(each is not None and (each.by_depth or (depth == 1 and each.accepted)) for each in said):
            counts[name] = SuiteCounts.of(
                [
                    _row(task, texts[task.key], each, depth, None if plain is None else plain.texts[name])
                    for task, each in zip(answered, said, strict=True)
                    if each is not None
                ],
                depth,
                settings=suite.settings,
            )
            continue
        # A text that was tokenised here may have other tokens than the server wrote.
        tokens = [None if each is None else each.tokens for each in said]
        known = [len(texts[task.key]) if count is None else count for task, count in zip(answered, tokens, strict=True)]
        written = sum(known)
        if counted.tokens != written:
            raise MtpdError(f"{server.place}: wrote {counted.tokens} tokens, and {written} of them {OTHERS}")
        counts[name] = SuiteCounts(
            prompts=len(answered),
            tokens=written,
            forwards=max(counted.drafts + len(answered), written - sum(counted.accepted)),
            drafted=[counted.drafts] * depth,
            accepted=counted.accepted,
            identical=None if plain is None else sum(texts[key] == plain.texts[name].get(key) for key in texts),
            settings=suite.settings,
        )
    return counts


def load_of(found: Pass, plain: Pass | None) -> Load:
    """Speed and counts of a pass, with and without drafts."""
    counted = list(found.counted.values())
    accepted = [sum(column) for column in zip_longest(*(each.accepted for each in counted), fillvalue=0)]
    return Load(
        concurrency=found.concurrency,
        tokens=found.tokens,
        seconds=found.seconds,
        drafts=sum(each.drafts or 0 for each in counted),
        accepted=accepted,
        plain_tokens=None if plain is None else plain.tokens,
        plain_seconds=None if plain is None else plain.seconds,
    )


def _row(task: Task, text: list[int], said: Told, depth: int, plain: Mapping[str, list[int]] | None) -> PromptCounts:
    counts = said.counts(len(task.ids), len(text), depth)
    known = {
        "id": task.prompt.id,
        "prompt": short(fingerprint_json(task.ids)),
        "text": short(fingerprint_json(text)),
        "identical": None if plain is None else text == plain.get(task.key),
    }
    if said.rounds is not None:
        return PromptCounts.of(counts, **known)
    # Where they were is not known.
    sums = {name: getattr(counts, name) for name in ("tokens", "forwards", "drafted", "accepted")}
    return PromptCounts(**known, **sums)
