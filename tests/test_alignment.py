"""The one place that shifts: against a table by hand, and against its own meaning."""

from __future__ import annotations

import torch
from conftest import Learned
from torch import Tensor

from mtpd import alignment
from mtpd.alignment import IGNORED
from mtpd.evaluate.offline import measure_offline

X = IGNORED


def rows(depth: int, ids: Tensor, labels: Tensor, positions: Tensor) -> list[tuple[int, int, int, int, int]]:
    """(row, t, token read last, token predicted, teacher row) wherever a head has loss."""
    read, target = alignment.tokens_read(ids, depth), alignment.target_tokens(ids, depth)
    found = []
    for row, t in alignment.counted(labels, positions, depth).nonzero().tolist():
        teacher = int(alignment.teacher_row(torch.tensor(t), depth))
        found.append((row, t, int(read[row, t]), int(target[row, t]), teacher))
    return found


def test_the_table_by_hand() -> None:
    """Fault: labels off by one, shifted twice or not at all; the first response token lost."""
    # The example of the module's docstring: p q | a b c.
    p, q, a, b, c = 1, 2, 3, 4, 5
    ids = torch.tensor([[p, q, a, b, c]])
    labels = torch.tensor([[X, X, a, b, c]])
    positions = torch.arange(5)[None]
    assert rows(1, ids, labels, positions) == [(0, 1, a, b, 2), (0, 2, b, c, 3)]
    assert rows(2, ids, labels, positions) == [(0, 1, b, c, 3)]
    assert rows(3, ids, labels, positions) == []
    # The main head itself (depth 0) learns every response token, the first one from the last of the prompt.
    assert rows(0, ids, labels, positions) == [(0, 1, q, a, 1), (0, 2, a, b, 2), (0, 3, b, c, 3)]


def test_packed_rows_and_padding() -> None:
    """Fault: a shift across the border of two documents, or into padding on either side."""
    #                    | document     | document    | padding
    ids = torch.tensor([[1, 11, 12, 13, 2, 21, 22, 23, 0, 0]])
    labels = torch.tensor([[X, 11, 12, 13, X, 21, 22, 23, X, X]])
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 0, 1]])
    assert alignment.document_ids(positions).tolist() == [[0, 0, 0, 0, 1, 1, 1, 1, 2, 2]]
    first = [(0, 0, 11, 12, 1), (0, 1, 12, 13, 2), (0, 4, 21, 22, 5), (0, 5, 22, 23, 6)]
    assert rows(1, ids, labels, positions) == first
    assert rows(2, ids, labels, positions) == [(0, 0, 12, 13, 2), (0, 4, 22, 23, 6)]
    # Responses without a prompt before them: nothing separates the labels of two documents but their border.
    labels = torch.where(ids > 0, ids, X)
    assert rows(2, ids, labels, positions) == [(0, 0, 12, 13, 2), (0, 4, 22, 23, 6)]
    # Left padding, as a document of its own.
    shifted = [torch.cat([part[:, 8:], part[:, :8]], 1) for part in (ids, labels, positions)]
    assert rows(1, *shifted) == [(row, t + 2, read, target, teacher + 2) for row, t, read, target, teacher in first]
    # Padding whose positions count on, or stay at one value, as tokenizers pad.
    for filler in ([4, 5], [1, 1], [0, 0]):
        padded = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, *filler]])
        labels = torch.tensor([[X, 11, 12, 13, X, 21, 22, 23, X, X]])
        assert rows(1, ids, labels, padded) == first


def test_response_masks_of_several_turns() -> None:
    """Fault: drafts counted where the text is the user's."""
    # user user | answer answer answer | user | answer answer
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]])
    labels = torch.tensor([[X, X, 3, 4, 5, X, 7, 8]])
    positions = torch.arange(8)[None]
    assert rows(1, ids, labels, positions) == [(0, 1, 3, 4, 2), (0, 2, 4, 5, 3), (0, 5, 7, 8, 6)]
    assert rows(2, ids, labels, positions) == [(0, 1, 4, 5, 3)]


def test_a_head_and_its_teacher_row_predict_the_same_token() -> None:
    """Fault: teacher rows and labels shifted by different amounts."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(100, (8, 40), generator=generator)
    labels = torch.where(torch.rand(8, 40, generator=generator) < 0.8, ids, X)
    lengths = torch.randint(1, 12, (8, 40), generator=generator)
    positions = torch.stack([torch.cat([torch.arange(int(n)) for n in row])[:40] for row in lengths])
    main_head_predicts = alignment.shift(ids, 1, fill=0)
    documents = alignment.document_ids(positions)
    for depth in range(1, 6):
        b, t = alignment.counted(labels, positions, depth).nonzero(as_tuple=True)
        assert len(b) > 0
        teacher = alignment.teacher_row(t, depth)
        assert torch.equal(alignment.target_tokens(ids, depth)[b, t], main_head_predicts[b, teacher])
        # The head has read up to where the teacher row stands, and both are of one document.
        assert torch.equal(alignment.tokens_read(ids, depth)[b, t], ids[b, teacher])
        assert torch.equal(documents[b, t], documents[b, teacher + 1])
        assert (labels[b, teacher + 1] == ids[b, teacher + 1]).all()


def test_shifts_longer_than_the_row() -> None:
    """Fault: rows shorter than the depth wrap around or crash."""
    values = torch.arange(3)[None]
    assert alignment.shift(values, 0, fill=9).tolist() == [[0, 1, 2]]
    assert alignment.shift(values, 2, fill=9).tolist() == [[2, 9, 9]]
    assert alignment.shift(values, 3, fill=9).tolist() == alignment.shift(values, 7, fill=9).tolist() == [[9, 9, 9]]
    assert not alignment.counted(values, values, 5).any()


def test_shifted_target_control(learned: Learned) -> None:
    """Fault: an alignment under which heads look good whatever they are compared with."""
    trunk, sample, heads = learned.trunk, learned.sample, learned.perfect
    measured = {
        shift: measure_offline(trunk, heads, [sample], target_shift=shift, progress=False)["prompts"].car[0]
        for shift in (-1, 0, 1)
    }
    assert measured[0] == 1.0
    assert measured[1] < 0.4
    assert measured[-1] < 0.4
