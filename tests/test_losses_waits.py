"""What a GPU would have to do for the loss, without one: tensors without values, which no host can wait for."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_losses_fused import LOSSES, Case, every_form
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from mtpd.losses import fused, on_gpu
from mtpd.losses.settings import LossSettings
from mtpd.trunk import Unembedding

WITHOUT_LAUNCH = {
    "empty",
    "new_empty",
    "detach",
    "expand",
    "select",
    "slice",
    "split",
    "t",
    "transpose",
    "unbind",
    "view",
}
WITHOUT_LAUNCH |= {"_unsafe_view", "alias", "permute", "unsqueeze", "squeeze", "as_strided"}


class Work(TorchDispatchMode):
    """Counts what is launched, and refuses copies between the host and a device."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        leaves = [leaf for leaf in (*tree_iter((args, kwargs)), *tree_iter(output)) if isinstance(leaf, Tensor)]
        assert len({leaf.device.type for leaf in leaves}) <= 1, f"{name} waits for a copy"
        if name not in WITHOUT_LAUNCH:
            self.launches[name] += 1
        return output


class Copies(TorchFunctionMode):
    """Refuses tensors of a device that are made of Python's numbers."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        made = func in (torch.tensor, torch.as_tensor, Tensor.new_tensor)
        assert not (made and output.device.type != "cpu"), "numbers of the host are copied"
        return output


def launches(settings: LossSettings, *, blocks: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Counter[str]:
    """Runs all passes of a loss on tensors without values; what a value would decide raises an error."""
    case = Case(dtype=torch.float32, masks="all", **options)
    real = fused._Walk(
        case.trunk, (case.head, case.head, case.head), case.targets, case.masks, settings, 0, None, False
    )
    rows, kept, on_host = real._order()
    monkeypatch.setattr(fused, "GPU_BLOCK_ROWS", -(-len(rows) // blocks))
    trained = options.get("bias", False)

    def there(tensor: Tensor) -> Tensor:
        return tensor.detach().to("meta")

    head = Unembedding(there(case.head.weight), there(case.head.bias) if trained else None, 2.0, 3.0)
    of_draft = Unembedding(head.weight[:100], None if head.bias is None else head.bias[:100], 2.0, 3.0)
    given = [there(each) for each in case.targets], [there(each) for each in case.masks]
    columns = there(torch.arange(100))
    walk = fused._Walk(there(case.trunk), (of_draft, of_draft, head), *given, settings, 0, columns, False)
    order = there(rows), there(kept), on_host
    monkeypatch.setattr(walk, "_order", lambda: order)
    if trained:
        walk.of_weight, walk.of_bias = torch.zeros_like(of_draft.weight), torch.zeros(100, device="meta")
    students = [there(each) for each in case.students]
    with Work() as work, Copies():
        walk.run(students, needs_grad=True)
    return work.launches


@pytest.fixture
def without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_gpu, "triton_works", lambda: False)


@every_form
@pytest.mark.parametrize("bias", [False, True], ids=["frozen", "trained"])
@pytest.mark.usefixtures("without_triton")
def test_no_pass_waits(loss: str, top_n: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a number that the host reads, or copies to the device, between two blocks."""
    settings = replace(LOSSES[loss], top_n=top_n)
    assert launches(settings, blocks=2, monkeypatch=monkeypatch, bias=bias)


@every_form
def test_launches_of_a_block(loss: str, top_n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: operators between the kernels whose launches take longer than their work."""
    pytest.importorskip("triton")
    from mtpd.losses import fused_kernels

    ran: list[str] = []
    monkeypatch.setattr(on_gpu, "triton_works", lambda: True)
    monkeypatch.setattr(on_gpu, "KERNEL_DEVICES", frozenset({"meta"}))
    monkeypatch.setattr(fused_kernels, "launch", lambda kernel, *args, **numbers: ran.append(kernel.__name__))
    settings = replace(LOSSES[loss], top_n=top_n)
    counted = []
    for blocks in (1, 3):
        ran.clear()
        counted.append(launches(settings, blocks=blocks, monkeypatch=monkeypatch).total() + len(ran))
    assert Counter(ran) == {"teacher_rows": 3, "student_rows": 3 * 3}
    # A block: two products and a kernel for each of three depths, one of each for the teacher, and what gathers
    # rows and puts them back.
    assert (counted[1] - counted[0]) / 2 <= 40


@pytest.mark.parametrize(
    "waiting",
    [
        lambda there: there.sum().item(),
        lambda there: there[there > 0],
        lambda there: there.nonzero(),
        lambda there: there.cpu(),
        lambda there: there + torch.tensor([1.0]),
        lambda there: there + torch.tensor(1.0, device="meta"),
        lambda there: there.new_tensor([1.0]),
    ],
)
def test_what_waits_is_seen(waiting: Any) -> None:
    """Fault: a check that cannot fail."""
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)), Work(), Copies():
        waiting(torch.empty(3, device="meta"))


def test_what_computes_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """Fault: nobody can say which of three ways computed a loss; or a line for each step."""
    on_gpu.say.cache_clear()
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            Case().fused(LOSSES["kl"])
    assert [record.message.rsplit(" by ")[1] for record in caplog.records] == ["PyTorch's operators"]


def test_blocks_by_device() -> None:
    """Fault: a block that reads the unembedding for few rows on a GPU, or that takes what no plan says."""
    columns, gpu = 151_936, {"device": "cuda"}
    assert fused.block_size(columns, columns, 2)[0] == 256
    rows, size = fused.block_size(columns, columns, 2, swept=False, **gpu)
    assert (rows, size) == (2048, 2048 * 4 * columns)
    rows, size = fused.block_size(columns, columns, 2, swept=True, **gpu)
    assert 600 < rows < 700
    assert size <= fused.GPU_BLOCK_BYTES


def test_sums_are_exact_on_a_gpu() -> None:
    """Fault: dL/dh, a sum over the whole vocabulary, added up in 16 bits; a setting of the user's that is lost."""
    products = torch.backends.cuda.matmul
    before = products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction
    with on_gpu.exact_sums(torch.device("cuda")):
        assert not products.allow_bf16_reduced_precision_reduction
        assert not products.allow_fp16_reduced_precision_reduction
    assert before == (products.allow_bf16_reduced_precision_reduction, products.allow_fp16_reduced_precision_reduction)
