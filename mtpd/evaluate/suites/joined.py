"""Long prompts: documents joined up to a length, with a question on one of them at the end.

Acceptance can fall where a context grows longer than what heads were trained on, and behind the length that the model
itself was trained on it can fall to nothing. Prompts of several lengths from the same documents show where.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

from mtpd.data.prompts import Prompt, render
from mtpd.errors import UserError
from mtpd.evaluate.suites import Question, Suite

logger = logging.getLogger(__name__)

ASKED = (
    "Which of the texts above has the following line, and what stands directly behind it?\n\n{line}",
    "What is text {number} above about? Name its most important parts in a few sentences.",
    "Quote what follows in text {number} above after this line, and then explain it.\n\n{line}",
)
"""Questions that any document can be asked, in turns."""
LINE = 24
"""Characters of a line that is quoted, at least."""
HEADING = 8
"""About so many tokens stand above each text."""
ATTEMPTS = 8


def join(tokenizer: Any, name: str, suite: Suite, documents: Sequence[Question], *, context: int) -> list[Question]:
    """Prompts of the lengths that fit into a model's context, each with its response.

    The family of each is its length. Prompts of one length are the same whichever others fit.

    Args:
        documents: of `mtpd.evaluate.suites.questions`.
        context: tokens that the model reads at most.

    Raises:
        UserError: no length fits, or the documents are too few for the shortest one.
    """
    fitting = [length for length in suite.contexts if suite.max_new_tokens < length <= context]
    if not fitting:
        raise UserError(
            f"suite {name}: no length of {', '.join(map(str, suite.contexts))} tokens fits into the model's context of "
            f"{context} with a response of {suite.max_new_tokens}"
        )
    if len(fitting) < len(suite.contexts):
        left = [str(length) for length in suite.contexts if length not in fitting]
        logger.warning("suite %s: %s tokens do not fit into the model's context of %d", name, ", ".join(left), context)
    texts = [question.prompt.text.strip() for question in documents]

    @cache
    def tokens(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    found = []
    for length in fitting:
        label = f"{length // 1024}k" if length % 1024 == 0 else str(length)
        most = length - suite.max_new_tokens
        for number in range(max(1, suite.limit // len(suite.contexts))):
            asked, above, prompt = ASKED[number % len(ASKED)], 0, None
            # The template, the question and the line that it quotes take tokens too: as many are left out.
            for _ in range(ATTEMPTS):
                words = _words(texts, tokens, most - above, asked, random.Random(f"{suite.seed} {length} {number}"))
                message = {"role": "user", "content": words}
                template = dict(suite.chat_template_kwargs)
                prompt = Prompt(f"{label}-{number}", [message], family=name, template=template)
                taken = len(render(tokenizer, prompt))
                if taken <= most:
                    break
                above += taken - most + HEADING
            if prompt is None or not 0.7 * most <= taken <= most:
                raise UserError(
                    f"suite {name}: its documents do not fill {length} tokens; accepted: more of them, or shorter "
                    "contexts"
                )
            found.append(Question(prompt, family=label))
    return found


def _words(texts: Sequence[str], tokens: Callable[[str], int], room: int, asked: str, generator: random.Random) -> str:
    """A user's message with texts of about so many tokens, and a question on one of them."""
    chosen: list[str] = []
    for text in generator.sample(texts, len(texts)):
        cost = tokens(text) + HEADING
        last = cost > room
        if last:
            text = _cut(text, max(0.0, (room - HEADING) / cost), tokens, room - HEADING)
        if text:
            chosen.append(text)
            room -= tokens(text) + HEADING
        if last or room < 2 * HEADING:
            break
    lines = [
        (number, line.strip())
        for number, text in enumerate(chosen, start=1)
        for line in text.splitlines()[:-1]
        if LINE <= len(line.strip()) <= 4 * LINE
    ]
    number, line = generator.choice(lines) if lines else (1, " ".join(chosen[0].split()[:8]) if chosen else "")
    numbered = [f"Text {place}:\n\n{text}" for place, text in enumerate(chosen, start=1)]
    return "\n\n".join([*numbered, asked.format(number=number, line=line)])


def _cut(text: str, share: float, tokens: Callable[[str], int], room: int) -> str:
    """The beginning of a text that has at most so many tokens, up to the end of a line where one is near."""
    text = text[: int(share * len(text))]
    while text and tokens(text) > room:
        text = text[: int(0.9 * len(text))]
    line, newline, rest = text.rpartition("\n")
    return line if newline and len(rest) < len(text) // 10 else text
