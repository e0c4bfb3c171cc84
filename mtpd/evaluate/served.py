"""Acceptance of heads as a server has it: prompts go over HTTP, and the server says how its drafts went.

vLLM tells of each answer how many drafts it accepted in each round (`--per-request-spec-decode-metrics detailed`).
Rounds are then counted by mtpd's own rule (`mtpd.decode.counts`), prompt by prompt, whatever else the server does.
Without it there are the server's counters before and after: sums over a suite, of all rounds, the last ones of a text
among them, whose drafts lie behind its end.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mtpd.data.answers.server import Server
from mtpd.data.answers.task import Task
from mtpd.decode.counts import Counts
from mtpd.errors import MtpdError, UserError
from mtpd.evaluate.acceptance import PromptCounts, SuiteCounts
from mtpd.evaluate.engine_counters import WITHOUT_DRAFTS, EngineCounters
from mtpd.evaluate.load import Load
from mtpd.evaluate.suites import Suite
from mtpd.files import fingerprint_json, short
from mtpd.progress import Bar

Asked = Mapping[str, tuple[Suite, Sequence[Task]]]
"""By name, a suite and its prompts."""
SETTLED = 0.1
"""Seconds in which counters that do not change any more have settled."""
LONGEST = 5.0
"""Seconds that counters may take to settle."""


class DraftingServer:
    """A server, and what it says of the drafts of each answer."""

    def __init__(self, url: str, tokenizer: Any, *, key: str, **settings: Any) -> None:
        self.place = f"{key}: {url.rstrip('/').removesuffix('/v1')}"
        self.said: dict[str, Mapping[str, Any]] = {}
        self.server = Server(
            url, tokenizer, temperature=0.0, top_p=1.0, key=key, kept="", on_answer=self._hear, **settings
        )

    def _hear(self, task: Task, answer: Mapping[str, Any]) -> None:
        metrics = answer.get("metrics")
        found = metrics.get("speculative_decoding") if isinstance(metrics, dict) else None
        if isinstance(found, dict):
            self.said[task.key] = found

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

    def version(self) -> str:
        """Name and version of the engine."""
        import json

        try:
            return f"vLLM {json.loads(self.server.page('/version') or '{}')['version']}"
        except (ValueError, KeyError, TypeError):
            return "vLLM"


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
            before = server.counters()
            texts = found.texts.setdefault(name, {})
            began = time.monotonic()
            for task, text in server.server(tasks):
                texts[task.key] = text
                bar.update()
            found.seconds += time.monotonic() - began
            found.counted[name] = server.counters().since(before, place=server.place)
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
            raise UserError(f"{server.place}: {WITHOUT_DRAFTS}")
        depth = len(counted.accepted)
        if all(task.key in server.said and _steps(server.said[task.key]) is not None for task in answered):
            rows = [
                _row(task, texts[task.key], server.said[task.key], depth, None if plain is None else plain.texts[name])
                for task in answered
            ]
            counts[name] = SuiteCounts.of(rows, depth, settings=suite.settings)
            continue
        written = sum(len(texts[task.key]) for task in answered)
        if counted.tokens != written:
            raise MtpdError(
                f"{server.place}: wrote {counted.tokens} tokens, and {written} of them for this measurement: it has "
                "other users; accepted: a server of one's own, or vLLM with --per-request-spec-decode-metrics detailed"
            )
        counts[name] = SuiteCounts(
            prompts=len(answered),
            tokens=written,
            forwards=counted.drafts + len(answered),
            drafted=[counted.drafts] * depth,
            accepted=counted.accepted,
            identical=None if plain is None else sum(texts[key] == plain.texts[name].get(key) for key in texts),
            settings=suite.settings,
        )
    return counts


def load_of(found: Pass, plain: Pass | None) -> Load:
    """Speed and counts of a pass, with and without drafts."""
    counted = list(found.counted.values())
    accepted = [sum(column) for column in zip(*(each.accepted for each in counted), strict=True)]
    return Load(
        concurrency=found.concurrency,
        tokens=found.tokens,
        seconds=found.seconds,
        drafts=sum(each.drafts or 0 for each in counted),
        accepted=accepted,
        plain_tokens=None if plain is None else plain.tokens,
        plain_seconds=None if plain is None else plain.seconds,
    )


def _steps(said: Mapping[str, Any]) -> list[tuple[int, int]] | None:
    """Drafted and accepted of each round; None where the server does not say."""
    drafted, accepted = said.get("per_step_drafted"), said.get("per_step_accepted")
    if not isinstance(drafted, list) or not isinstance(accepted, list) or len(drafted) != len(accepted):
        return None
    return list(zip(drafted, accepted, strict=True))


def _row(
    task: Task, text: list[int], said: Mapping[str, Any], depth: int, plain: Mapping[str, list[int]] | None
) -> PromptCounts:
    steps = _steps(said) or []
    counts = Counts(depth)
    counts.start(len(task.ids))
    # Passes without drafts, if there were any, wrote what the rounds did not.
    written = 1 + sum(accepted + 1 for _, accepted in steps)
    alone = max(0, len(text) - written)
    counts.tokens += alone
    counts.forwards += alone
    known = 1 + alone
    for drafted, accepted in steps:
        if known >= len(text):
            break
        counts.round(accepted, room=len(text) - known, drafted=drafted)
        known += accepted + 1
    return PromptCounts.of(
        counts,
        id=task.prompt.id,
        prompt=short(fingerprint_json(task.ids)),
        text=short(fingerprint_json(text)),
        identical=None if plain is None else text == plain.get(task.key),
    )
