"""The fused loss against the reference: every loss, in value and gradient, and what it takes of memory."""

from __future__ import annotations

import itertools
import weakref
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mtpd import alignment
from mtpd.losses import fused, fused_tile, kinds, reference
from mtpd.losses.fused import LossSettings, LossSums, multi_depth_loss
from mtpd.losses.settings import LOSSES as REGISTERED
from mtpd.trunk import Unembedding

DEPTHS, POSITIONS, SIZE, ROWS, TOKENS = 3, 37, 12, 160, 150
NONE, SOME = (0.0,) * DEPTHS, (0.5, 0.6, 0.7)
LOSSES = {
    "ce": LossSettings((1.0, 0.5, 0.2), NONE),
    "kl": LossSettings(NONE, SOME),
    "mtp_d": LossSettings((0.3, 0.2, 0.1), SOME, loss="mtp_d"),
    "reverse_kl": LossSettings(NONE, SOME, loss="reverse_kl"),
    "jsd": LossSettings(NONE, SOME, loss="jsd"),
    "tv": LossSettings(NONE, SOME, loss="tv"),
    "lk": LossSettings(NONE, SOME, loss="lk"),
    "end_to_end_tv": LossSettings(NONE, SOME, loss="end_to_end_tv"),
}
every_loss = pytest.mark.parametrize("loss", LOSSES)
every_form = pytest.mark.parametrize(
    ("loss", "top_n"),
    # Where Σ min(p, q) counts, a top n is refused.
    [(loss, n) for loss, each in LOSSES.items() for n in ((0,) if each.true_probabilities else (0, 17))],
)
"""Every loss with top n and without."""


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
        positions: int = POSITIONS,
        after: int = 0,
    ) -> None:
        self.after = after
        draw = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype)

        self.students = [normal(positions, SIZE).requires_grad_() for _ in range(DEPTHS)]
        self.trunk = normal(positions, SIZE)
        # The rows past the tokens only pad the matrix; they have the largest logits of all.
        weight = normal(ROWS, SIZE)
        weight[TOKENS:] *= 10.0
        self.head = Unembedding(weight, normal(ROWS) if bias else None, scale, softcap, TOKENS)
        self.columns = torch.randperm(TOKENS, generator=draw)[:100].sort().values if draft else None
        columns = torch.full((ROWS,), -1)
        used = torch.arange(TOKENS) if self.columns is None else self.columns
        columns[used] = torch.arange(len(used))
        ids = torch.randint(TOKENS, (1, positions), generator=draw)
        depths = range(after + 1, after + 1 + DEPTHS)
        self.targets = [columns[alignment.target_tokens(ids, k)][0] for k in depths]
        lengths = (positions - 21, 3, 1, 17) if positions > 21 else (positions,)
        at = torch.cat([torch.arange(n) for n in lengths])[None]
        response = torch.rand(1, positions, generator=draw) < 0.8
        labels = {
            "ragged": torch.where(response, ids, -100),
            "none": torch.full_like(ids, -100),
            "all": ids,
        }[masks]
        self.masks = [alignment.counted(labels, at, k)[0] for k in depths]

    def arguments(self, settings: LossSettings) -> dict[str, Any]:
        """What both implementations take beside the states."""
        draft = {} if self.columns is None else {"main_head": self.head.select(None), "columns_M": self.columns}
        return {
            "unembedding": self.head.select(self.columns),
            "targets_P": self.targets,
            "masks_P": self.masks,
            "settings": settings,
            "after": self.after,
            **draft,
        }

    def reference(self, settings: LossSettings) -> tuple[Tensor, list[Tensor]]:
        """The loss with all logits at once, and its gradients by autograd."""
        loss = reference.multi_depth_loss(self.students, self.trunk, **self.arguments(settings))
        return loss, list(torch.autograd.grad(loss, self.students))

    def fused(self, settings: LossSettings, **options: Any) -> tuple[Tensor, list[Tensor], LossSums]:
        loss, sums = multi_depth_loss(self.students, self.trunk, **self.arguments(settings), **options)
        return loss, list(torch.autograd.grad(loss, self.students)), sums


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of 3 or 5 rows in blocks of 11, by which no number of rows and columns here is divisible."""
    monkeypatch.setattr(fused, "TILE_BYTES", 3 * 4 * TOKENS)
    monkeypatch.setattr(fused, "BLOCK_ROWS", 11)


def variants(loss: str, *, top_n: int) -> list[LossSettings]:
    """Settings of a loss: as they are, at a temperature, and with weights that differ in kind."""
    plain = replace(LOSSES[loss], top_n=top_n)
    found = [plain, replace(plain, teacher_temperature=0.6)]
    if loss == "mtp_d":
        found += [replace(plain, alpha=(0.0, 1.0, 0.0), beta=(1.0, 0.0, 0.5))]
    return found


@every_loss
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("draft", [False, True], ids=["all tokens", "draft"])
def test_depths_after_finished_ones(loss: str, draft: bool) -> None:
    """Fault: depths 5 to 7 that meet the teacher rows of depths 1 to 3, in the pass or in what is taken ahead of it."""
    case, first = (Case(draft=draft, masks="all", after=after) for after in (4, 0))
    expected, expected_gradients = case.reference(LOSSES[loss])
    ours, gradients, sums = case.fused(LOSSES[loss])
    assert ours.item() == pytest.approx(expected.item(), rel=1e-9)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-9, atol=1e-9)
    rows = [sum(max(0, length - depth - 1) for length in (16, 3, 1, 17)) for depth in (5, 6, 7)]
    assert sums.rows.tolist() == rows
    assert ours.item() != pytest.approx(first.fused(LOSSES[loss])[0].item(), rel=1e-3)


@every_form
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("head", [{}, {"softcap": 3.0, "scale": 2.0, "bias": True}], ids=["plain", "softcap"])
@pytest.mark.parametrize("draft", [False, True], ids=["all tokens", "draft"])
def test_fused_is_the_reference(loss: str, top_n: int, draft: bool, head: dict[str, Any]) -> None:
    """Fault: any term of a derivation; a teacher row of another tile; padding rows in the top-N set."""
    tolerances = {torch.float64: 1e-9, torch.float32: 1e-5}
    for (dtype, tolerance), masks in itertools.product(tolerances.items(), ("ragged", "all")):
        case = Case(dtype=dtype, draft=draft, masks=masks, **head)
        for each in variants(loss, top_n=top_n):
            expected, expected_gradients = case.reference(each)
            ours, gradients, _ = case.fused(each)
            assert ours.dtype == dtype
            assert ours.item() == pytest.approx(expected.item(), rel=tolerance), (dtype, masks, each)
            largest = max(gradient.abs().max().item() for gradient in expected_gradients)
            for gradient, wanted in zip(gradients, expected_gradients, strict=True):
                torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance * largest)


@every_form
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(("draft", "softcap"), [(False, None), (True, 3.0)])
def test_gradcheck(loss: str, top_n: int, draft: bool, softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a gradient on which reference and fused loss agree, and which is not that of the value."""
    # The gradient stops at λ, so that differences of the value would see what the gradient must not.
    constant = replace(REGISTERED["lk"], mixture=lambda accepted: torch.tensor(0.4, dtype=torch.float64))
    monkeypatch.setitem(REGISTERED, "lk", constant)
    case = Case(draft=draft, softcap=softcap, positions=7, masks="all")
    given = case.arguments(replace(LOSSES[loss], top_n=top_n))
    assert torch.autograd.gradcheck(
        lambda *students: multi_depth_loss(students, case.trunk, **given)[0], case.students, fast_mode=True
    )


@every_form
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("head", [{"bias": True}, {"softcap": 3.0, "scale": 2.0}], ids=["bias", "softcap"])
def test_a_trained_unembedding(loss: str, top_n: int, head: dict[str, Any]) -> None:
    """Fault: dL/dW without what scales a row, or added up in both passes where a loss takes two."""
    for masks in ("ragged", "all"):
        case, settings = Case(masks=masks, **head), replace(LOSSES[loss], top_n=top_n)
        own = case.head.select(None)
        trained = [each.detach().clone().requires_grad_() for each in (own.weight, own.bias) if each is not None]
        given = case.arguments(settings) | {"unembedding": Unembedding(*trained, *[None] * (2 - len(trained)))}
        given["unembedding"] = replace(given["unembedding"], scale=own.scale, softcap=own.softcap)
        expected = reference.multi_depth_loss(case.students, case.trunk, **given)
        ours, _ = multi_depth_loss(case.students, case.trunk, **given)
        assert ours.item() == pytest.approx(expected.item(), rel=1e-9)
        wanted = torch.autograd.grad(expected, [*case.students, *trained])
        for gradient, each in zip(torch.autograd.grad(ours, [*case.students, *trained]), wanted, strict=True):
            assert each.abs().max() > 0
            torch.testing.assert_close(gradient, each, rtol=1e-9, atol=1e-9)


@every_form
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("draft", [False, True], ids=["all tokens", "draft"])
def test_fused_in_bfloat16(loss: str, top_n: int, draft: bool) -> None:
    """Fault: softmax or sums in half precision, which lose far more than the products' own rounding."""
    case = Case(dtype=torch.bfloat16, draft=draft, softcap=3.0)
    each = replace(LOSSES[loss], top_n=top_n)
    ours, gradients, _ = case.fused(each)
    # The oracle starts from the same rounded products, and all that follows is exact: its states are the products
    # themselves, over all tokens, and its unembedding the identity.
    weight = case.head.weight[:TOKENS]
    products = [(states.detach() @ weight.T).double() for states in (case.trunk, *case.students)]
    exact = Case(draft=draft, softcap=3.0)
    exact.head = Unembedding(torch.eye(TOKENS, dtype=torch.float64), None, 1.0, 3.0)
    exact.trunk, exact.students = products[0], [each.requires_grad_() for each in products[1:]]
    expected, expected_gradients = exact.reference(each)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
    unit = 2.0**-9
    for gradient, dy, mask in zip(gradients, expected_gradients, case.masks, strict=True):
        wanted = dy @ weight.double()
        # Rounded once each: dL/dy, its product with W, and the product with what other depths say. Twice over,
        # for products that another order of summation rounds to the neighbouring number.
        bound = unit * (dy.abs() @ weight.double().abs()) + 2 * unit * wanted.abs()
        assert ((gradient.double() - wanted).abs() <= 2 * bound + 1e-6).all()
        assert not gradient[~mask].any()


@every_loss
def test_sums_are_the_reference_summed(loss: str) -> None:
    """Fault: metrics that are not those of the loss, or that hold a graph."""
    case = Case(masks="all")
    each = LOSSES[loss]
    _, _, sums = case.fused(each)
    alive = torch.ones(POSITIONS, dtype=torch.bool)
    single = {"lk": kinds.lk, "tv": kinds.tv, "end_to_end_tv": kinds.tv, "kl": kinds.forward_kl}
    single |= {"mtp_d": kinds.forward_kl, "reverse_kl": kinds.reverse_kl, "jsd": kinds.jsd}
    for k, (student, target, mask) in enumerate(zip(case.students, case.targets, case.masks, strict=True), start=1):
        at = mask.nonzero().squeeze(1)
        head = case.head.select(None)
        y, z = head(student[at]).detach(), head(case.trunk[at + k])
        assert sums.rows[k - 1] == len(at)
        torch.testing.assert_close(sums.cross_entropy[k - 1], reference.cross_entropy(y, target[at]).sum())
        if any(each.beta):
            torch.testing.assert_close(sums.divergence[k - 1], single[each.loss](y, z).sum())
        agrees = torch.zeros(POSITIONS, dtype=torch.bool)
        agrees[at] = y.argmax(1) == z.argmax(1)
        alive &= agrees
        assert sums.accepted[k - 1] == alive.sum()
    assert not any(value.requires_grad for value in vars(sums).values())


@every_loss
def test_nothing_counts(loss: str) -> None:
    """Fault: NaN from a batch without response tokens, which ends a training run."""
    ours, gradients, sums = Case(masks="none").fused(LOSSES[loss])
    assert ours == 0.0
    assert not any(gradient.any() for gradient in gradients)
    assert not sums.rows.any()


@every_form
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_a_certain_teacher(loss: str, top_n: int, size: float) -> None:
    """Fault: 0 · log 0 where the teacher gives one token all the probability, or the student none to it."""
    for draft in (False, True):
        case = Case(dtype=torch.float32, draft=draft)
        case.trunk *= size
        each = replace(LOSSES[loss], top_n=min(top_n, 1 if draft else top_n))
        ours, gradients, _ = case.fused(each)
        expected, expected_gradients = case.reference(each)
        assert torch.isfinite(ours)
        assert ours.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
        largest = max(gradient.abs().max().item() for gradient in expected_gradients)
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4 * max(1.0, largest))


@pytest.mark.usefixtures("small_tiles")
def test_lambda_is_estimated_as_the_reference_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: other rows in the estimate than every s-th, or other depths in the mean."""
    for module in (fused, kinds):
        monkeypatch.setattr(module, "ESTIMATE_ROWS", 4)
    case = Case(draft=True)
    expected, _ = case.reference(LOSSES["lk"])
    assert case.fused(LOSSES["lk"])[0].item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("loss", [loss for loss in LOSSES if loss != "end_to_end_tv"])
def test_masks_that_do_not_nest(loss: str) -> None:
    """Fault: rows of another position where a depth counts and the one before it does not."""
    case = Case()
    draw = torch.Generator().manual_seed(1)
    room = torch.arange(POSITIONS) < POSITIONS - DEPTHS
    case.masks = [(torch.rand(POSITIONS, generator=draw) < 0.5) & room for _ in range(DEPTHS)]
    expected, expected_gradients = case.reference(LOSSES[loss])
    ours, gradients, _ = case.fused(LOSSES[loss])
    assert ours.item() == pytest.approx(expected.item(), rel=1e-9)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_the_first_of_the_largest() -> None:
    """Fault: the arg-max by blocks forgets the columns after the last whole block, or takes a later tie."""
    draw = torch.Generator().manual_seed(0)
    for columns in (5, 64, 100, 128, 200):
        y = torch.randint(0, 9, (50, columns), generator=draw).float()
        assert torch.equal(fused_tile.argmax(y), y.argmax(1))
        y[:, -1] = 10.0
        assert torch.equal(fused_tile.argmax(y), y.argmax(1))


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made under it that still live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.holders: Counter[int] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)}
        for leaf in tree_iter(output):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                pointer, size = storage.data_ptr(), storage.nbytes()
                # A view of what was there before is not new.
                if not size or (pointer in given and not self.holders[pointer]):
                    continue
                if not self.holders[pointer]:
                    self.live += size
                    self.peak = max(self.peak, self.live)
                self.holders[pointer] += 1
                weakref.finalize(leaf, self._gone, pointer, size)
        return output

    def _gone(self, pointer: int, size: int) -> None:
        self.holders[pointer] -= 1
        if not self.holders[pointer]:
            self.live -= size


@every_form
def test_memory(loss: str, top_n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: logits of all rows at once, 150,000 columns each; logits of all depths at once."""
    vocabulary, size, positions, rows, step = 2000, 8, 600, 20, 5
    logits = positions * vocabulary * 4
    monkeypatch.setattr(fused, "BLOCK_ROWS", rows)
    monkeypatch.setattr(fused, "TILE_BYTES", step * vocabulary * 4)
    students = [torch.randn(positions, size, requires_grad=True) for _ in range(DEPTHS)]
    trunk, head = torch.randn(positions, size), Unembedding(torch.randn(vocabulary, size))
    masks = [torch.arange(positions) < positions - k for k in range(1, DEPTHS + 1)]
    targets = [torch.randint(vocabulary, (positions,)) for _ in masks]
    each = replace(LOSSES[loss], top_n=top_n)
    given = {"targets_P": targets, "masks_P": masks, "settings": each}
    with LiveBytes() as ours:
        multi_depth_loss(students, trunk, head, **given)[0].backward()
    # A block: logits of the teacher and of one depth, and what the teacher's tiles keep; and a dozen tiles.
    block = rows * vocabulary * 4
    kept = 2 + any(each.beta) + (loss in ("reverse_kl", "jsd")) + bool(top_n)
    assert ours.peak <= kept * block + 12 * step * vocabulary * 4 + 12 * DEPTHS * positions * size * 8
    assert ours.peak < logits
    with LiveBytes() as theirs:
        reference.multi_depth_loss(students, trunk, head, **given).backward()
    assert theirs.peak > DEPTHS * logits
