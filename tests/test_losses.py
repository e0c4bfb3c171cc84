"""The reference against arithmetic by hand, the fused loss against the reference, and golden values."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mtpd import alignment
from mtpd.losses import fused, reference
from mtpd.losses.fused import LossSettings, multi_depth_loss
from mtpd.trunk import Unembedding

DEPTHS, POSITIONS, SIZE, ROWS, TOKENS = 3, 37, 12, 64, 57
PLAIN = LossSettings((0.3, 0.2, 0.1), (0.5, 0.6, 0.7))


class Case:
    """States, unembedding, targets and masks of a loss, drawn from a seed."""

    def __init__(
        self,
        *,
        dtype: torch.dtype = torch.float64,
        draft: bool = False,
        softcap: float | None = None,
        scale: float = 1.0,
        bias: bool = False,
        masks: str = "ragged",
    ) -> None:
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

        self.students = [normal(POSITIONS, SIZE).requires_grad_() for _ in range(DEPTHS)]
        self.trunk = normal(POSITIONS, SIZE)
        # The rows past the tokens only pad the matrix; they have the largest logits of all.
        weight = normal(ROWS, SIZE)
        weight[TOKENS:] *= 10.0
        head = Unembedding(weight, normal(ROWS) if bias else None, scale, softcap, TOKENS)
        vocabulary = torch.randperm(TOKENS, generator=draw)[:40].sort().values if draft else None
        self.unembedding = head.select(vocabulary)
        columns = torch.full((ROWS,), -1)
        used = torch.arange(TOKENS) if vocabulary is None else vocabulary
        columns[used] = torch.arange(len(used))
        ids = torch.randint(TOKENS, (1, POSITIONS), generator=draw)
        self.targets = [columns[alignment.target_tokens(ids, k)][0] for k in range(1, DEPTHS + 1)]
        positions = torch.cat([torch.arange(n) for n in (17, 3, 1, POSITIONS - 21)])[None]
        response = torch.rand(1, POSITIONS, generator=draw) < 0.8
        labels = {
            "ragged": torch.where(response, ids, -100),
            "none": torch.full_like(ids, -100),
            "all": ids,
        }[masks]
        self.masks = [alignment.counted(labels, positions, k)[0] for k in range(1, DEPTHS + 1)]

    def logits(self, states: Tensor) -> Tensor:
        return self.unembedding(states).to(torch.promote_types(states.dtype, torch.float32))

    def reference(self, settings: LossSettings) -> tuple[Tensor, list[Tensor]]:
        """The loss with all logits at once, and its gradients by autograd."""
        rows = []
        for k in range(1, DEPTHS + 1):
            at = self.masks[k - 1].nonzero().squeeze(1)
            values = reference.mtp_d(
                self.logits(self.students[k - 1][at]),
                self.logits(self.trunk[alignment.teacher_row(at, k)]),
                self.targets[k - 1][at],
                alpha=settings.alpha[k - 1],
                beta=settings.beta[k - 1],
                n=settings.top_n,
                teacher_temperature=settings.teacher_temperature,
            )
            rows.append(values)
        loss = torch.cat(rows).sum()
        return loss, list(torch.autograd.grad(loss, self.students))

    def fused(self, settings: LossSettings) -> tuple[Tensor, list[Tensor], fused.LossSums]:
        loss, sums = multi_depth_loss(
            self.students,
            self.trunk,
            self.unembedding,
            targets_P=self.targets,
            masks_P=self.masks,
            settings=settings,
        )
        return loss, list(torch.autograd.grad(loss, self.students)), sums


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 5 rows, by which the number of rows is not divisible."""
    monkeypatch.setattr(fused, "TILE_BYTES", 5 * 4 * TOKENS)


def test_reference_by_hand() -> None:
    """Fault: KL in the other direction, a set that is not renormalised, a missing temperature."""
    student = torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]).log()  # p = 1/6 2/6 3/6, and 1/3 each
    teacher = torch.tensor([[6.0, 3.0, 1.0], [1.0, 1.0, 8.0]]).log()  # q = .6 .3 .1, and .1 .1 .8
    student[1] = 0.0
    target = torch.tensor([2, 0])

    def close(ours: Tensor, *expected: float) -> None:
        torch.testing.assert_close(ours, torch.tensor(expected))

    close(reference.cross_entropy(student, target), math.log(2), math.log(3))
    close(reference.cross_entropy(student, torch.tensor([-1, 0])), 0.0, math.log(3))
    kl_first = 0.6 * math.log(0.6 * 6) + 0.3 * math.log(0.3 * 3) + 0.1 * math.log(0.1 * 2)
    kl_second = 0.2 * math.log(0.3) + 0.8 * math.log(2.4)
    close(reference.forward_kl(student, teacher), kl_first, kl_second)
    close(reference.forward_kl(student, teacher, n=3), kl_first, kl_second)
    # The teacher's two best, renormalised: q~ = 2/3 1/3 and p~ = 1/3 2/3. In row two 1 and 2 tie: all three stay.
    assert reference.top_n(teacher, 2).tolist() == [[True, True, False], [True, True, True]]
    close(reference.forward_kl(student, teacher, n=2), 2 / 3 * math.log(2) - 1 / 3 * math.log(2), kl_second)
    # The teacher's one best against itself.
    close(reference.forward_kl(student[:1], teacher[:1], n=1), 0.0)
    # Temperature 1/2 squares the teacher's odds: 36 : 9 : 1. The student's stay.
    q = [36 / 46, 9 / 46, 1 / 46]
    sharp = sum(a * math.log(a / b) for a, b in zip(q, (1 / 6, 2 / 6, 3 / 6), strict=True))
    close(reference.forward_kl(student[:1], teacher[:1], teacher_temperature=0.5), sharp)
    close(
        reference.mtp_d(student, teacher, target, alpha=0.3, beta=0.5),
        0.3 * math.log(2) + 0.5 * kl_first,
        0.3 * math.log(3) + 0.5 * kl_second,
    )
    close(reference.acceptance(student, teacher), 1 / 6 + 0.3 + 0.1, 0.1 + 0.1 + 1 / 3)


HEADS: list[dict[str, Any]] = [
    {},
    {"softcap": 2.0},
    {"scale": 0.25},
    {"bias": True},
    {"softcap": 3.0, "scale": 2.0, "bias": True},
]


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("top_n", [0, 7])
@pytest.mark.parametrize("draft", [False, True])
@pytest.mark.parametrize("head", HEADS, ids=str)
def test_fused_is_the_reference(top_n: int, draft: bool, head: dict[str, Any]) -> None:
    """Fault: any term of the derivation; a teacher row of another tile; padding rows in the top-N set."""
    settings = [
        replace(PLAIN, top_n=top_n),
        replace(PLAIN, top_n=top_n, teacher_temperature=0.6),
        replace(PLAIN, top_n=top_n, alpha=(0.0,) * DEPTHS),
        replace(PLAIN, top_n=top_n, beta=(0.0,) * DEPTHS),
        replace(PLAIN, top_n=top_n, alpha=(0.0, 1.0, 0.0), beta=(1.0, 0.0, 0.0)),
    ]
    tolerances = {torch.float64: 1e-9, torch.float32: 1e-5}
    for (dtype, tolerance), masks, each in itertools.product(tolerances.items(), ("ragged", "all"), settings):
        case = Case(dtype=dtype, draft=draft, masks=masks, **head)
        expected, expected_gradients = case.reference(each)
        ours, gradients, _ = case.fused(each)
        assert ours.dtype == dtype
        assert ours.item() == pytest.approx(expected.item(), rel=tolerance), (dtype, masks, each)
        largest = max(gradient.abs().max().item() for gradient in expected_gradients)
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance * largest)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("top_n", [0, 7])
def test_fused_in_bfloat16(top_n: int) -> None:
    """Fault: softmax or sums in half precision, which lose far more than the products' own rounding."""
    case = Case(dtype=torch.bfloat16, softcap=3.0)
    settings = replace(PLAIN, top_n=top_n)
    expected, expected_gradients = case.reference(settings)
    ours, gradients, _ = case.fused(settings)
    assert ours.dtype == torch.float32
    # Both start from the same rounded logits, and all that follows is float32.
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4)
    for gradient, wanted, mask in zip(gradients, expected_gradients, case.masks, strict=True):
        # bfloat16 rounds by 2^-9: here dL/dy and its product with W, in autograd also the steps of soft-capping.
        assert (gradient.float() - wanted.float()).norm() < 4 * 2**-9 * wanted.float().norm()
        assert not gradient[~mask].any()


def test_sums_are_the_reference_summed() -> None:
    """Fault: metrics that are not those of the loss, or that hold a graph."""
    case = Case(masks="all")
    settings = replace(PLAIN, top_n=9)
    _, _, sums = case.fused(settings)
    alive = torch.ones(POSITIONS, dtype=torch.bool)
    for k, (student, target, mask) in enumerate(zip(case.students, case.targets, case.masks, strict=True), start=1):
        at = mask.nonzero().squeeze(1)
        y, z = case.logits(student[at]), case.logits(case.trunk[at + k])
        assert sums.rows[k - 1] == len(at)
        torch.testing.assert_close(sums.cross_entropy[k - 1], reference.cross_entropy(y, target[at]).sum().detach())
        torch.testing.assert_close(sums.divergence[k - 1], reference.forward_kl(y, z, n=9).sum().detach())
        agrees = torch.zeros(POSITIONS, dtype=torch.bool)
        agrees[at] = y.argmax(1) == z.argmax(1)
        alive &= agrees
        assert sums.accepted[k - 1] == alive.sum()
    assert not any(value.requires_grad for value in vars(sums).values())


def test_nothing_counts() -> None:
    """Fault: NaN from a batch without response tokens, which ends a training run."""
    loss, gradients, sums = Case(masks="none").fused(PLAIN)
    assert loss == 0.0
    assert not any(gradient.any() for gradient in gradients)
    assert not sums.rows.any()


@pytest.mark.parametrize("top_n", [0, 1, 7])
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_a_certain_teacher(top_n: int, size: float) -> None:
    """Fault: 0 · log 0 where the teacher gives one token all the probability, or the student none to it."""
    case = Case(dtype=torch.float32)
    case.trunk *= size
    settings = replace(PLAIN, top_n=top_n)
    ours, gradients, _ = case.fused(settings)
    expected, expected_gradients = case.reference(settings)
    assert torch.isfinite(ours)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Notes how many elements the largest tensor has that is made under it."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        made = [leaf.numel() for leaf in tree_iter(output) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *made])
        return output


@pytest.mark.parametrize("settings", [PLAIN, replace(PLAIN, top_n=9)])
def test_no_tensor_is_larger_than_a_tile(monkeypatch: pytest.MonkeyPatch, settings: LossSettings) -> None:
    """Fault: logits of all rows at once, 150,000 columns each."""
    vocabulary, size, positions, tile = 500, 8, 300, 16
    monkeypatch.setattr(fused, "TILE_BYTES", tile * 4 * vocabulary)
    students = [torch.randn(positions, size, requires_grad=True) for _ in range(DEPTHS)]
    trunk, weight = torch.randn(positions, size), torch.randn(vocabulary, size)
    masks = [torch.arange(positions) < positions - k for k in range(1, DEPTHS + 1)]
    targets = [torch.randint(vocabulary, (positions,)) for _ in masks]
    with LargestTensor() as largest:
        loss, _ = multi_depth_loss(
            students, trunk, Unembedding(weight), targets_P=targets, masks_P=masks, settings=settings
        )
        loss.backward()
    assert largest.elements <= tile * vocabulary
    with LargestTensor() as largest:
        linear(trunk, weight)
    assert largest.elements == positions * vocabulary
