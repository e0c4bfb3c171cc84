"""mtpd's own drafts along a text that an engine wrote: what the engine's are compared with, one by one.

Drafts depend on the tokens that are known, and not on the rounds that led there. So each round of an engine is made
again by itself: heads run over the known tokens and the engine's drafts, and each draft is compared with what mtpd
drafts after those before it. Acceptance alone does not show a wrong cache: drafts that nobody accepts may be any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtpd.formats.engines.result import Round, Served
from mtpd.heads import Heads
from mtpd.trunk import Trunk

TIE = 1e-4
"""Share of the largest logit by which float32 kernels of two engines may differ: vLLM on a CPU was seen to choose the
other of two tokens that are 6e-5 apart, one draft in 1,100."""


@dataclass(frozen=True)
class Compared:
    """Drafts of an engine beside mtpd's. Lists by depth."""

    drafts: list[int]
    equal: list[int]
    ties: list[int]
    """Of the others, those whose logits agree to rounding (`TIE`)."""

    @property
    def ok(self) -> bool:
        return bool(self.drafts[0]) and all(
            equal + ties == drafts for drafts, equal, ties in zip(self.drafts, self.equal, self.ties, strict=True)
        )


class Replay:
    """The heads along one text.

    Args:
        text: what was written after the prompt.
    """

    @torch.inference_mode()
    def __init__(self, trunk: Trunk, heads: Heads, prompt: Sequence[int], text: Sequence[int]) -> None:
        self.trunk, self.heads = trunk, heads
        self.written = len(prompt)
        self.ids = torch.tensor([[*prompt, *text]], device=trunk.device)
        self.positions = torch.arange(self.ids.shape[1], device=trunk.device)[None]
        self.states = trunk.hidden(self.ids)

    @torch.inference_mode()
    def logits(self, known: int, drafts: Sequence[int]) -> list[Tensor]:
        """Logits [M] of each depth after so many tokens of the text, each given the drafts before it."""
        count = self.written + known
        ids = torch.cat([self.ids[:, :count], self.ids.new_tensor([list(drafts)])], dim=1)
        # The base has not read the newest token, nor the drafts: their states are not there.
        states = self.states.new_zeros(1, ids.shape[1], self.states.shape[2])
        states[:, : count - 1] = self.states[:, : count - 1]
        along = self.heads.along(self.trunk, states, ids, position_ids_BT=torch.arange(ids.shape[1])[None].to(ids))
        at = torch.tensor([count - 2], device=ids.device)
        return [along.logits(depth, at)[0] for depth in range(1, len(drafts) + 1)]

    @torch.inference_mode()
    def accepted(self) -> list[int]:
        """By the number of tokens that are known, from 1 on: how many drafts are the text's own tokens."""
        along = self.heads.along(self.trunk, self.states, self.ids, position_ids_BT=self.positions)
        at = self.positions[0, self.written - 1 : -1]
        rows = self.heads.rows()
        tops = [along.logits(depth, at).argmax(-1) for depth in range(1, self.heads.depth + 1)]
        drafts = [(top if rows is None else rows[top]).tolist() for top in tops]
        text = self.ids[0, self.written :].tolist()
        found = [0]
        for known in range(1, len(text)):
            hits = 0
            while hits < len(drafts) and known + hits < len(text) and drafts[hits][known - 1] == text[known + hits]:
                hits += 1
            found.append(hits)
        return found

    def compare(self, rounds: Sequence[Round]) -> Compared:
        """Compares the drafts of rounds with mtpd's."""
        rows = self.heads.rows()
        columns = None if rows is None else {int(token): column for column, token in enumerate(rows)}
        sums = [[0] * self.heads.depth for _ in range(3)]
        for known, drafts in rounds:
            for place, (draft, logits) in enumerate(zip(drafts, self.logits(known, drafts), strict=True)):
                column = draft if columns is None else columns.get(draft)
                top = int(logits.argmax())
                sums[0][place] += 1
                sums[1][place] += top == column
                if top != column and column is not None:
                    sums[2][place] += float(logits[top] - logits[column]) <= TIE * float(logits.abs().max())
        return Compared(*sums)


def compared(trunk: Trunk, heads: Heads, prompts: Sequence[Sequence[int]], served: Served) -> Compared | None:
    """Compares all drafts that an engine gave; None where it gives counts alone."""
    if served.rounds is None:
        return None
    sums = [[0] * heads.depth for _ in range(3)]
    for prompt, text, rounds in zip(prompts, served.texts, served.rounds, strict=True):
        # The last tokens of a round may lie behind the limit, and are not in the text.
        inside = [(known, drafts[: heads.depth]) for known, drafts in rounds if 0 < known <= len(text)]
        found = Replay(trunk, heads, prompt, text).compare(inside)
        parts = (found.drafts, found.equal, found.ties)
        sums = [[a + b for a, b in zip(*pair, strict=True)] for pair in zip(sums, parts, strict=True)]
    return Compared(*sums)


def own_counts(
    trunk: Trunk,
    heads: Heads,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    *,
    length: int,
    to_the_end: bool,
) -> tuple[list[int], list[int]]:
    """Drafted and accepted by position of mtpd's own rounds along texts.

    Args:
        texts: plain ones of `length` tokens, and as many more as there are heads.
        to_the_end: also counts the rounds whose drafts lie past `length`, as engines do that give counts alone.
    """
    drafted, hits = [0] * heads.depth, [0] * heads.depth
    for prompt, text in zip(prompts, texts, strict=True):
        accepted = Replay(trunk, heads, prompt, text).accepted()
        known = 1
        while known < length:
            if to_the_end or known + heads.depth <= length:
                for place in range(heads.depth):
                    drafted[place] += 1
                    hits[place] += place < accepted[known]
            known += accepted[known] + 1
    return drafted, hits
