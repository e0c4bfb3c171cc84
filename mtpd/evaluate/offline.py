"""Acceptance without decoding: teacher-forced over texts, in batches.

Heads read the true tokens, and a draft of depth k at position t counts as accepted when its first k
tokens are what the main head chooses. Only the places where decoding would draft are counted: the
walk goes from the end of the prompt, and each round moves on by the tokens it accepted and one more.
On greedy text of the trunk itself these are the places, drafts and counts of real decoding.

Legend: P positions that are looked at, K depths, M columns of the draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mtpd import alignment
from mtpd.data.packing import Sample
from mtpd.decode import Counts
from mtpd.evaluate.acceptance import SuiteCounts
from mtpd.heads import Heads
from mtpd.trunk import Trunk

TILE = 512
"""Positions whose logits are held at a time."""


@torch.inference_mode()
def measure_offline(
    trunk: Trunk,
    heads: Heads,
    samples: Sequence[Sample],
    *,
    end_tokens: Collection[int] = (),
    batch: int = 16,
    target_shift: int = 0,
    progress: bool = True,
) -> dict[str, SuiteCounts]:
    """Counts for each family of samples (one prompt and one response each).

    Args:
        samples: prompts with responses, best the trunk's own greedy ones.
        end_tokens: ids that end a text.
        batch: samples a forward pass.
        target_shift: 0 compares with the right teacher rows. Another number compares with rows moved by
            it: a control that must collapse, or the alignment is wrong.
        progress: shows a bar.
    """
    suites: dict[str, SuiteCounts] = {}
    for start in tqdm(range(0, len(samples), batch), desc="acceptance, offline", disable=not progress):
        members = samples[start : start + batch]
        width = max(len(sample.ids) for sample in members)
        input_ids = torch.zeros(len(members), width, dtype=torch.long)
        # Padding on the right is behind every token that counts, so causal attention never sees it.
        for row, sample in enumerate(members):
            input_ids[row, : len(sample.ids)] = torch.tensor(sample.ids)
        input_ids = input_ids.to(trunk.device)
        positions = torch.arange(width, device=trunk.device).expand_as(input_ids)
        hidden = trunk.hidden(input_ids, position_ids=positions)
        states = heads(trunk, hidden, input_ids, position_ids_BT=positions)
        for row, sample in enumerate(members):
            first, last = len(sample.prompt_ids), len(sample.ids)
            suite = suites.setdefault(sample.family or "prompts", _empty(heads.depth))
            if last <= first:
                continue
            compared = _compare(trunk, heads, hidden[row], [state[row] for state in states], first, last)
            suite.add(_walk(sample.ids, first, last, compared, end_tokens, target_shift))
            assert suite.expected is not None
            assert suite.expected_rows is not None
            suite.expected = [a + b for a, b in zip(suite.expected, compared.expected, strict=True)]
            suite.expected_rows = [a + b for a, b in zip(suite.expected_rows, compared.rows, strict=True)]
    return suites


def _empty(depth: int) -> SuiteCounts:
    suite = SuiteCounts.empty(depth)
    suite.expected, suite.expected_rows = [0.0] * depth, [0] * depth
    return suite


@dataclass
class _Compared:
    """One text: what the main head chooses after each position, and the heads' drafts at the same positions."""

    chosen: list[int]
    drafted: list[list[int]]
    """By depth, then by position; -2 where decoding never drafts."""
    expected: list[float]
    """By depth, Σ_x min(p, q) summed over the positions where decoding could draft."""
    rows: list[int]


def _compare(
    trunk: Trunk, heads: Heads, hidden_PD: Tensor, states_PD: list[Tensor], first: int, last: int
) -> _Compared:
    """Compares all depths with the main head, computing each of its rows once.

    Args:
        first, last: position of the first response token, and the length of the text.
    """
    subset = heads.rows()
    main, draft = trunk.unembedding, trunk.unembedding.select(subset)
    real = trunk.tokens or main.weight.shape[0]
    depth, length = len(states_PD), hidden_PD.shape[0]
    chosen = torch.full((length,), -1, dtype=torch.long, device=hidden_PD.device)
    drafted = torch.full((depth, length), -2, dtype=torch.long, device=hidden_PD.device)
    expected, counts = [0.0] * depth, [0] * depth
    for rows in torch.arange(first - 1, last, device=hidden_PD.device).split(TILE):
        z = main(hidden_PD[rows]).float()
        chosen[rows] = z.argmax(-1)
        p = z[:, :real].softmax(-1)
        p = p if subset is None else p[:, subset]
        for k in range(1, depth + 1):
            # Rows that are the teacher of a draft: the draft's place is in the response, and so is its target.
            kept = (rows - k >= first - 1) & (rows < last - 1)
            t = rows[kept] - k
            y = draft(states_PD[k - 1][t]).float()
            choice = y.argmax(-1)
            drafted[k - 1, t] = choice if subset is None else subset[choice]
            expected[k - 1] += torch.minimum(p[kept], y.softmax(-1)).sum().item()
            counts[k - 1] += len(t)
    return _Compared(chosen.tolist(), drafted.tolist(), expected, counts)


def _walk(
    ids: list[int],
    first: int,
    last: int,
    compared: _Compared,
    end_tokens: Collection[int],
    target_shift: int,
) -> Counts:
    """The rounds of decoding this text: `first` is the position of its first response token, `last` its length."""
    counts = Counts(depth=len(compared.drafted))
    counts.start()
    drafted, chosen = compared.drafted, compared.chosen
    # The text ends with its first end token, whatever follows.
    last = next((place + 1 for place in range(first, last) if ids[place] in end_tokens), last)
    newest = first
    while newest < last - 1:
        t = newest - 1
        accepted = 0
        room = last - 1 - newest
        while accepted < min(counts.depth, room):
            k = accepted + 1
            row = alignment.teacher_row(t, k) + target_shift
            if row >= len(chosen) or drafted[k - 1][t] != chosen[row]:
                break
            accepted += 1
        # The token after the accepted ones is the main head's own, which this text has as well.
        newest += counts.round(accepted, room=room)
    return counts
