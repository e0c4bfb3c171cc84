"""The reference against arithmetic by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mtpd.losses import kinds, reference
from mtpd.losses.settings import ESTIMATE_ROWS, LossSettings
from mtpd.trunk import Unembedding


def two_rows() -> tuple[Tensor, Tensor]:
    """Logits with p = 1/6 2/6 3/6, and 1/3 each; q = .6 .3 .1, and .1 .1 .8."""
    student = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]).log()
    return student, torch.tensor([[6.0, 3.0, 1.0], [1.0, 1.0, 8.0]]).log()


def close(ours: Tensor, *expected: float) -> None:
    torch.testing.assert_close(ours, torch.tensor(expected))


def test_kl_and_labels_by_hand() -> None:
    """Fault: KL in the other direction, a set that is not renormalised, a missing temperature."""
    student, teacher = two_rows()
    target = torch.tensor([2, 0])

    close(reference.cross_entropy(student, target), math.log(2), math.log(3))
    close(reference.cross_entropy(student, torch.tensor([-1, 0])), 0.0, math.log(3))
    kl_first = 0.6 * math.log(0.6 * 6) + 0.3 * math.log(0.3 * 3) + 0.1 * math.log(0.1 * 2)
    kl_second = 0.2 * math.log(0.3) + 0.8 * math.log(2.4)
    close(kinds.forward_kl(student, teacher), kl_first, kl_second)
    close(kinds.forward_kl(student, teacher, n=3), kl_first, kl_second)
    # The teacher's two best, renormalised: q~ = 2/3 1/3 and p~ = 1/3 2/3. In row two 1 and 2 tie: all three stay.
    assert kinds.top_n(teacher, 2).tolist() == [[True, True, False], [True, True, True]]
    close(kinds.forward_kl(student, teacher, n=2), 2 / 3 * math.log(2) - 1 / 3 * math.log(2), kl_second)
    # The teacher's one best against itself.
    close(kinds.forward_kl(student[:1], teacher[:1], n=1), 0.0)
    # Temperature 1/2 squares the teacher's odds: 36 : 9 : 1. The student's stay.
    q = [36 / 46, 9 / 46, 1 / 46]
    sharp = sum(a * math.log(a / b) for a, b in zip(q, (1 / 6, 2 / 6, 3 / 6), strict=True))
    close(kinds.forward_kl(student[:1], teacher[:1], teacher_temperature=0.5), sharp)
    # Logits that are the states, and teacher rows one position on.
    total = reference.multi_depth_loss(
        [student],
        torch.cat([torch.zeros(1, 3), teacher]),
        Unembedding(torch.eye(3)),
        targets_P=[target],
        masks_P=[torch.ones(2, dtype=torch.bool)],
        settings=LossSettings((0.3,), (0.5,), loss="mtp_d"),
    )
    assert total.item() == pytest.approx(0.3 * math.log(2) + 0.5 * kl_first + 0.3 * math.log(3) + 0.5 * kl_second)
    close(kinds.acceptance(student, teacher), 1 / 6 + 0.3 + 0.1, 0.1 + 0.1 + 1 / 3)


def test_reverse_kl_and_jsd_by_hand() -> None:
    """Fault: teacher and student exchanged, or a mixture of them that is not half and half."""
    student, teacher = two_rows()
    p, q = (1 / 6, 2 / 6, 3 / 6), (0.6, 0.3, 0.1)
    reverse = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    close(kinds.reverse_kl(student, teacher)[:1], reverse)
    m = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    of_teacher = sum(b * math.log(b / c) for b, c in zip(q, m, strict=True))
    of_student = sum(a * math.log(a / c) for a, c in zip(p, m, strict=True))
    close(kinds.jsd(student, teacher)[:1], (of_teacher + of_student) / 2)
    # The teacher's two best: q~ = 2/3 1/3 and p~ = 1/3 2/3.
    close(kinds.reverse_kl(student, teacher, n=2)[:1], 1 / 3 * math.log(2))


def test_losses_of_acceptance_by_hand() -> None:
    """Fault: a TV of the renormalised teacher; λ that grows with acceptance; a product over the wrong depths."""
    student, teacher = two_rows()
    accepted = (1 / 6 + 0.3 + 0.1, 0.1 + 0.1 + 1 / 3)
    close(kinds.tv(student, teacher), *(1 - a for a in accepted))
    # Columns 0 and 2 of a teacher over three tokens: its probabilities stay .6 and .1, the student's are 1/4 3/4.
    draft = torch.tensor([[1.0, 3.0]]).log()
    columns = torch.tensor([0, 2])
    close(kinds.acceptance(draft, teacher[:1], columns_M=columns), 0.25 + 0.1)
    weight = math.exp(-3 * sum(accepted) / 2)
    kl = kinds.forward_kl(student, teacher)
    close(
        kinds.lk(student, teacher),
        *(weight * d + (1 - weight) * (1 - a) for d, a in zip(kl.tolist(), accepted, strict=True)),
    )
    kl_draft = 6 / 7 * math.log(6 / 7 * 4) + 1 / 7 * math.log(1 / 7 * 4 / 3)
    weight = math.exp(-3 * 0.35)
    expected = weight * kl_draft + (1 - weight) * 0.65
    close(kinds.lk(draft, teacher[:1], columns_M=columns), expected)
    chances = torch.tensor([[0.5, 0.5], [0.4, 1.0], [0.3, 1.0]])
    counted = torch.tensor([[True, True], [True, False], [True, False]])
    thirds = (1 / 3,) * 3
    first = 1 - (0.5 + 0.2 + 0.06) / 3
    close(kinds.end_to_end_tv(chances, counted, thirds), first, 0.5 / 3)


def test_lambda_is_of_few_rows_and_holds_no_graph() -> None:
    """Fault: a gradient through λ, which pays for less acceptance; an estimate whose cost grows with the batch."""
    accepted = torch.zeros(10 * ESTIMATE_ROWS - 3, requires_grad=True)
    ours = kinds.lk_weight(accepted + torch.arange(len(accepted)).remainder(10))
    assert not ours.requires_grad
    assert ours == 1.0, "every tenth row, from the first on"
    assert kinds.lk_weight(torch.tensor([0.2, 0.4])).item() == pytest.approx(math.exp(-0.9))


def test_settings_that_mean_nothing_are_refused() -> None:
    """Fault: a top n that is left out silently, where Σ min(p, q) over all columns is what counts."""
    for loss in ("tv", "lk", "end_to_end_tv"):
        with pytest.raises(AssertionError):
            LossSettings((0.0,), (1.0,), loss=loss, top_n=5)
    with pytest.raises(AssertionError):
        LossSettings((0.1,), (1.0,), loss="end_to_end_tv")
    with pytest.raises(AssertionError):
        LossSettings((0.1,), (1.0, 1.0))
