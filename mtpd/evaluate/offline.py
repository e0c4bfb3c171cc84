"""Acceptance without decoding: teacher-forced over texts, in batches.

Heads read the true tokens, and a draft of depth k at position t counts as accepted when its first k
tokens are what the main head chooses. Only the places where decoding would draft are counted: the
walk goes from the end of the prompt, and each round moves on by the tokens it accepted and one more.
On greedy text of the trunk itself these are the places, drafts and counts of real decoding.

Legend: P positions that are looked at, K depths, M columns of the draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from tqdm.auto import tqdm

from mtpd import alignment
from mtpd.data.packing import Sample
from mtpd.decode import Counts
from mtpd.evaluate.acceptance import SuiteCounts
from mtpd.heads import Heads
from mtpd.trunk import Trunk, Unembedding

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
            chosen = _choices(trunk.unembedding, hidden[row])
            drafted = torch.stack([_drafts(trunk, heads, state[row]) for state in states])
            suite.add(_walk(sample.ids, first, last, drafted, chosen, end_tokens, target_shift))
            _add_expected(suite, trunk, heads, hidden[row], [state[row] for state in states], first, last)
    return suites


def _empty(depth: int) -> SuiteCounts:
    suite = SuiteCounts.empty(depth)
    suite.expected, suite.expected_rows = [0.0] * depth, [0] * depth
    return suite


def _choices(unembedding: Unembedding, hidden_PD: Tensor) -> Tensor:
    """What the main head chooses after each position. [P]"""
    return torch.cat([unembedding(tile).argmax(-1) for tile in hidden_PD.split(TILE)])


def _drafts(trunk: Trunk, heads: Heads, state_PD: Tensor) -> Tensor:
    """What a head drafts at each position, as token ids. [P]"""
    rows = heads.rows()
    choice = _choices(trunk.unembedding.select(rows), state_PD)
    return choice if rows is None else rows[choice]


def _walk(
    ids: list[int],
    first: int,
    last: int,
    drafted_KP: Tensor,
    chosen_P: Tensor,
    end_tokens: Collection[int],
    target_shift: int,
) -> Counts:
    """The rounds of decoding this text: `first` is the position of its first response token, `last` its length."""
    counts = Counts(depth=drafted_KP.shape[0])
    counts.start()
    drafted, chosen = drafted_KP.tolist(), chosen_P.tolist()
    # The text ends with its first end token, whatever follows.
    last = next((place + 1 for place in range(first, last) if ids[place] in end_tokens), last)
    newest = first
    while newest < last - 1:
        t = newest - 1
        accepted = 0
        room = last - 1 - newest
        while accepted < min(counts.depth, room):
            k = accepted + 1
            row = alignment.teacher_row(torch.tensor(t), k).item() + target_shift
            if row >= len(chosen) or drafted[k - 1][t] != chosen[int(row)]:
                break
            accepted += 1
        # The token after the accepted ones is the main head's own, which this text has as well.
        newest += counts.round(accepted, room=room)
    return counts


def _add_expected(
    suite: SuiteCounts, trunk: Trunk, heads: Heads, hidden_PD: Tensor, states_PD: list[Tensor], first: int, last: int
) -> None:
    """Adds Σ_x min(p, q) of every position where decoding could draft, one depth after the other."""
    rows = heads.rows()
    main, draft = trunk.unembedding.select(None), trunk.unembedding.select(rows)
    assert suite.expected is not None
    assert suite.expected_rows is not None
    for k, state in enumerate(states_PD, start=1):
        # None where the response is shorter than the draft.
        positions = torch.arange(first - 1, max(first - 1, last - 1 - k), device=hidden_PD.device)
        for tile in positions.split(TILE):
            p = main(hidden_PD[alignment.teacher_row(tile, k)]).float().softmax(-1)
            q = draft(state[tile]).float().softmax(-1)
            if rows is not None:
                p = p[:, rows]
            suite.expected[k - 1] += torch.minimum(p, q).sum().item()
            suite.expected_rows[k - 1] += len(tile)
