"""Acceptance without decoding: teacher-forced over texts, in batches.

Heads read the true tokens, and a draft of depth k at position t counts as accepted when its first k
tokens are what the main head chooses. Only the places where decoding would draft are counted: the
walk goes from the end of the prompt, and each round moves on by the tokens it accepted and one more.
On greedy text of the trunk itself these are the places, drafts and counts of real decoding.

Legend: P positions that are looked at, K depths, M columns of the draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch

from mtpd import alignment
from mtpd.data.packing import Sample
from mtpd.decode.counts import Counts
from mtpd.evaluate.acceptance import Control, PromptCounts, SuiteCounts
from mtpd.files import fingerprint_json, short
from mtpd.heads import Heads
from mtpd.progress import Bar
from mtpd.trunk import Trunk

TILE_BYTES = 24 * 2**20
"""Size of one float32 tile of logits; a handful of them live at a time, whatever the length and the vocabulary."""
BATCH_TOKENS = 2048
"""Tokens in a forward pass of the trunk at most, padding included; one text may have more."""
CONTROL_SHIFT = 1
"""By how many positions the targets of the control are moved."""


@dataclass(frozen=True)
class Measured:
    """One text that was walked over."""

    sample: Sample
    counts: PromptCounts
    control: Counts
    """The same drafts against targets moved by `CONTROL_SHIFT`."""
    rounds: list[tuple[int, int]]
    """Of each round: how many response tokens there were before it, and how many drafts it accepted."""


def measure_offline(
    trunk: Trunk,
    heads: Heads,
    samples: Sequence[Sample],
    *,
    end_tokens: Collection[int] = (),
    batch: int = 64,
    target_shift: int = 0,
    progress: bool = True,
) -> dict[str, SuiteCounts]:
    """Counts for each family of samples (one prompt and one response each).

    Args:
        samples: prompts with responses, best the trunk's own greedy ones.
        end_tokens: ids that end a text.
        batch: samples a forward pass at most.
        target_shift: 0 compares with the right teacher rows. Another number compares with rows moved by
            it: a control that must collapse, or the alignment is wrong.
        progress: shows a bar.
    """
    families: dict[str, list[Measured]] = {sample.family or "prompts": [] for sample in samples}
    texts = walk_offline(
        trunk, heads, samples, end_tokens=end_tokens, batch=batch, target_shift=target_shift, progress=progress
    )
    for measured in texts:
        families[measured.sample.family or "prompts"].append(measured)
    suites = {}
    for family, members in families.items():
        suites[family] = SuiteCounts.of([member.counts for member in members], heads.depth)
        suites[family].control = Control(
            drafted=[sum(member.control.drafted[k] for member in members) for k in range(heads.depth)],
            accepted=[sum(member.control.accepted[k] for member in members) for k in range(heads.depth)],
        )
    return suites


def walk_offline(
    trunk: Trunk,
    heads: Heads,
    samples: Sequence[Sample],
    *,
    end_tokens: Collection[int] = (),
    batch: int = 64,
    target_shift: int = 0,
    progress: bool = True,
) -> Iterator[Measured]:
    """Each sample that has a response, measured, in the order given. Arguments as for `measure_offline`."""
    measured: dict[int, Measured] = {}
    spans = [(len(sample.prompt_ids), len(sample.ids)) for sample in samples]
    with Bar(total=len(samples), desc="acceptance, offline", unit="prompt", disable=not progress) as bar:
        for members in text_batches(spans, batch):
            compared = _compare(trunk, heads, [samples[member].ids for member in members], [spans[m] for m in members])
            for member, each in zip(members, compared, strict=True):
                measured[member] = _measured(samples[member], *spans[member], each, end_tokens, target_shift)
            bar.update(len(members))
        bar.update(len(samples) - bar.n)
    yield from (measured[index] for index in sorted(measured))


def text_batches(spans: Sequence[tuple[int, int]], batch: int) -> Iterator[list[int]]:
    """Indices of texts with a response, those of like length together: little padding is computed."""
    members: list[int] = []
    widest = 0
    for index in sorted(range(len(spans)), key=lambda index: (-spans[index][1], index)):
        first, last = spans[index]
        if last <= first:
            continue
        if members and (len(members) == batch or (len(members) + 1) * widest > BATCH_TOKENS):
            yield members
            members = []
        widest = widest if members else last
        members.append(index)
    if members:
        yield members


def _measured(
    sample: Sample, first: int, last: int, compared: _Compared, end_tokens: Collection[int], target_shift: int
) -> Measured:
    # The text ends with its first end token, whatever follows.
    last = next((place + 1 for place in range(first, last) if sample.ids[place] in end_tokens), last)
    depth = len(compared.drafted)
    counts, rounds = _walk(first, last, compared, target_shift)
    control, _ = _walk(first, last, compared, target_shift + CONTROL_SHIFT)
    row = PromptCounts.of(
        counts,
        id=sample.id,
        prompt=short(fingerprint_json(sample.ids[:first])),
        text=short(fingerprint_json(sample.ids[first:last])),
        # Never above its bound by the rounding of float32.
        expected=[min(compared.expected[k], float(compared.rows[k])) for k in range(depth)],
        expected_rows=compared.rows,
    )
    return Measured(sample, row, control, rounds)


@dataclass
class _Compared:
    """One text: what the main head chooses after each position, and the heads' drafts at the same positions."""

    chosen: list[int]
    drafted: list[list[int]]
    """By depth, then by position; -2 where decoding never drafts."""
    expected: list[float]
    """By depth, Σ_x min(p, q) summed over the positions where decoding could draft."""
    rows: list[int]


@torch.inference_mode()
def _compare(
    trunk: Trunk, heads: Heads, texts: Sequence[list[int]], spans: Sequence[tuple[int, int]]
) -> list[_Compared]:
    """Compares all depths with the main head in a batch of texts, computing each of its rows once.

    Args:
        texts: token ids of each text.
        spans: position of the first response token, and the length of the text.
    """
    device, width = trunk.device, max(map(len, texts))
    ids_BT = torch.zeros(len(texts), width, dtype=torch.long)
    # Padding on the right is behind every token that counts, so causal attention never sees it.
    for row, ids in enumerate(texts):
        ids_BT[row, : len(ids)] = torch.tensor(ids)
    ids_BT = ids_BT.to(device)
    positions_BT = torch.arange(width, device=device).expand_as(ids_BT)
    hidden_BTD, read_BTD = trunk.states(ids_BT, position_ids=positions_BT, before_last=heads.shared_layers)
    along = heads.along(trunk, read_BTD, ids_BT, position_ids_BT=positions_BT)
    hidden_PD = hidden_BTD.flatten(0, 1)

    subset = heads.rows()
    main = trunk.unembedding
    real = trunk.tokens or main.weight.shape[0]
    depth, count = along.depth, len(hidden_PD)
    chosen_P = torch.full((count,), -1, dtype=torch.long, device=device)
    drafted_KP = torch.full((depth, count), -2, dtype=torch.long, device=device)
    expected_KB = torch.zeros(depth, len(texts), dtype=torch.float64, device=device)
    rows_KB = torch.zeros(depth, len(texts), dtype=torch.long, device=device)

    first_B, last_B = torch.tensor(spans, device=device).T
    text_P = torch.arange(len(texts), device=device).repeat_interleave(width)
    place_P = positions_BT.flatten()
    used = (place_P >= first_B[text_P] - 1) & (place_P < last_B[text_P])
    for rows in used.nonzero().squeeze(1).split(max(1, TILE_BYTES // (4 * main.weight.shape[0]))):
        z = main(hidden_PD[rows]).float()
        chosen_P[rows] = z.argmax(-1)
        p = z[:, :real].softmax(-1)
        p = p if subset is None else p[:, subset]
        text, place = text_P[rows], place_P[rows]
        for k in range(1, depth + 1):
            # Rows that are the teacher of a draft: the draft's place is in the response, and so is its target.
            kept = (place - k >= first_B[text] - 1) & (place < last_B[text] - 1)
            at = rows[kept] - k
            y = along.logits(k, at).float()
            choice = y.argmax(-1)
            drafted_KP[k - 1, at] = choice if subset is None else subset[choice]
            overlap = torch.minimum(p[kept], y.softmax(-1)).sum(-1).double()
            expected_KB[k - 1].index_add_(0, text[kept], overlap)
            rows_KB[k - 1].index_add_(0, text[kept], torch.ones_like(at))
    chosen = chosen_P.view(len(texts), width).tolist()
    drafted = drafted_KP.view(depth, len(texts), width).transpose(0, 1).tolist()
    return [_Compared(*each) for each in zip(chosen, drafted, expected_KB.T.tolist(), rows_KB.T.tolist(), strict=True)]


def _walk(first: int, last: int, compared: _Compared, target_shift: int) -> tuple[Counts, list[tuple[int, int]]]:
    """The rounds of decoding a text: `first` is the position of its first response token, `last` its length."""
    counts = Counts(depth=len(compared.drafted))
    counts.start(first)
    rounds: list[tuple[int, int]] = []
    drafted, chosen = compared.drafted, compared.chosen
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
        rounds.append((newest + 1 - first, accepted))
        # The token after the accepted ones is the main head's own, which this text has as well.
        newest += counts.round(accepted, room=room)
    return counts, rounds
