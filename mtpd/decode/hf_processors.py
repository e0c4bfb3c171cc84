"""Tokens chosen as transformers' `generate` chooses them, by its logits processors.

A processor may depend on the text before the token, and may keep a state of its own. So each row's
processors are called once for each token that is written, in order, with the text before it: as plain
decoding would call them.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, StoppingCriteriaList

from mtpd.decode.choice import children
from mtpd.decode.drafts import Drafts
from mtpd.decode.sampling import Warper, inverse_cdf, uniform_draws
from mtpd.decode.text import Text

INDEPENDENT = frozenset(
    f"{name}LogitsWarper" for name in ("Temperature", "TopK", "TopP", "TopH", "MinP", "Typical", "Epsilon", "Eta")
)
"""Processors of transformers that look at nothing but the logits: they may be called for all rows at once."""


def independent(processors: LogitsProcessorList) -> list[Warper] | None:
    """The processors as functions of logits alone, or None if one of them may read the text."""

    def warper(processor: Any) -> Warper:
        return lambda scores: processor(None, scores)

    if any(type(each).__module__ != "transformers.generation.logits_process" for each in processors):
        return None
    if any(type(each).__name__ not in INDEPENDENT for each in processors):
        return None
    return [warper(each) for each in processors]


def of_row(processors: LogitsProcessorList, row: int) -> LogitsProcessorList:
    """The processors of one row of a batch: those of transformers that tell rows apart are told which it is."""

    def mine(processor: Any) -> Any:
        lengths = getattr(processor, "prompt_ignore_length", None)
        allowed = getattr(processor, "_prefix_allowed_tokens_fn", None)
        if isinstance(lengths, Tensor):
            processor = copy.copy(processor)
            processor.prompt_ignore_length = lengths[row : row + 1]
        elif allowed is not None:
            processor = copy.copy(processor)
            processor._prefix_allowed_tokens_fn = lambda _, ids: allowed(row, ids)
        return processor

    return LogitsProcessorList(mine(each) for each in processors)


class Processed:
    """Greedy or random choice from processed logits; drafts are the heads' most likely tokens.

    Args:
        processors: called for each row and token.
        criteria: asked after each token of a row whether its text ends; those for the length and end tokens
            are left to the engine.
        sample: draws instead of taking the best.
        ends: ids that end a text.
        keep_scores: keeps what each token was chosen from, in `Text.scores`.
        keep_logits: keeps it as it was before the processors, in `Text.logits`.
    """

    def __init__(
        self,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        *,
        sample: bool,
        ends: Collection[int],
        keep_scores: bool = False,
        keep_logits: bool = False,
    ) -> None:
        self.processors = processors
        self.of_row: dict[int, LogitsProcessorList] = {}
        self.criteria = criteria
        self.sample = sample
        self.ends = frozenset(ends)
        self.keep_scores = keep_scores
        self.keep_logits = keep_logits

    branches = True

    def draft(self, logits: Tensor, texts: Sequence[Text], number: int) -> Tensor:
        """As `mtpd.decode.choice.Choice.draft`."""
        return logits.argmax(-1)

    def choose(self, logits: Tensor, texts: Sequence[Text], drafts: Drafts | None) -> list[list[int]]:
        """As `mtpd.decode.choice.Choice.choose`; a text that a criterion ends is marked so."""
        nodes: list[dict[tuple[int, int], int]] = [{} for _ in texts]
        deepest = 0
        if drafts is not None:
            nodes = [children(*row) for row in drafts.rows()]
            deepest = drafts.depth
        rows = [self._row(logits[row], text, nodes[row], deepest) for row, text in enumerate(texts)]
        if drafts is not None:
            drafts.paths = [path for _, path in rows]
        return [new for new, _ in rows]

    def _row(
        self, logits: Tensor, text: Text, nodes: dict[tuple[int, int], int], deepest: int
    ) -> tuple[list[int], list[int]]:
        """New tokens of one row, and the columns of the drafts among them.

        Args:
            logits: [Q, V].
            nodes: as `mtpd.decode.choice.children` gives them.
            deepest: of their depths.
        """
        known = [*text.request.padding, *text.request.prompt, *text.tokens]
        ids = torch.tensor([known], device=logits.device)
        draws = uniform_draws([text], 1 + deepest, device=logits.device)[0] if self.sample else None
        if text.number not in self.of_row:
            self.of_row[text.number] = of_row(self.processors, text.number)
        processors = self.of_row[text.number]
        new: list[int] = []
        path: list[int] = []
        column = 0
        while True:
            raw = logits[column : column + 1].float()
            scores = processors(ids, raw.clone())
            at = len(new)
            chosen = scores.argmax(-1) if draws is None else inverse_cdf(scores.softmax(-1), draws[at : at + 1])
            token = int(chosen)
            new.append(token)
            if self.keep_scores:
                text.scores.append(scores[0])
            if self.keep_logits:
                text.logits.append(raw[0])
            ids = torch.cat([ids, chosen[:, None]], dim=1)
            if token in self.ends or len(new) >= text.room:
                return new, path
            if self.criteria and bool(self.criteria(ids, scores).all()):
                text.ended = True
                return new, path
            following = nodes.get((column, token))
            if following is None:
                return new, path
            column = following
            path.append(column)
