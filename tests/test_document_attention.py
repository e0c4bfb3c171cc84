"""Attention of packed rows in one kernel, with the kernel's own contract in place of the kernel."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import torch
from test_split_rows import DEPTH, along, apart, packed
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mtpd.parallel import document_attention
from mtpd.parallel.document_attention import LONG, RowAttention, by_documents

CALLS: list[tuple[torch.dtype, tuple[int, int]]] = []


def masked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    borders: Tensor,
    of_keys: Tensor,
    longest: int,
    longest_of_keys: int,
    *,
    scale: float | None,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> Tensor:
    """What `torch.nn.attention.varlen.varlen_attn` says that it computes: sequences one behind the other, by a mask."""
    assert borders.dtype == of_keys.dtype == torch.int32
    assert borders[0] == 0
    assert borders[-1] == len(query)
    assert borders.diff().max() == longest == longest_of_keys
    CALLS.append((query.dtype, window_size))
    at = torch.arange(len(query))
    document = torch.bucketize(at, borders[1:].long(), right=True)
    back = at[:, None] - at
    left, right = window_size
    seen = (document[:, None] == document) & (back >= -right)
    if left >= 0:
        seen &= back <= left
    heads = [each.transpose(0, 1)[None] for each in (query, key, value)]
    found = scaled_dot_product_attention(*heads, attn_mask=seen, scale=scale, enable_gqa=enable_gqa)
    return found[0].transpose(0, 1)


@pytest.fixture
def one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    CALLS.clear()
    monkeypatch.setattr(document_attention, "ONE_KERNEL", "cpu")
    monkeypatch.setattr(document_attention, "NUMBERS", (torch.float32, torch.bfloat16))
    monkeypatch.setattr(document_attention, "varlen_attn", masked)


@pytest.mark.usefixtures("one_kernel")
@pytest.mark.parametrize("name", [name for name in architectures.ARCHITECTURES if name != "gemma2"])
def test_all_documents_in_one_kernel(name: str) -> None:
    """Fault: rows, heads or documents mixed up, a window that is one token off, or the borders of another batch."""
    trunk = architectures.tiny_trunk(name)
    heads = architectures.random_heads(trunk, depth=DEPTH)
    ids, positions = packed()
    weights = torch.randn(*ids.shape, trunk.hidden_size, generator=torch.Generator().manual_seed(5))
    plain = along(trunk, heads, ids, ids, positions, weights)
    fewer = trunk.hidden(ids[1:], position_ids=positions[1:])
    assert not CALLS
    with RowAttention().attending(trunk.decoder, heads):
        assert apart(trunk.hidden(ids[1:], position_ids=positions[1:]), fewer) < 2e-5
        found = along(trunk, heads, ids, ids, positions, weights)
    assert len(CALLS) == 2 * trunk.depth + DEPTH
    assert apart(found[0], plain[0]) < 2e-5
    assert max(apart(ours, theirs) for ours, theirs in zip(found[1], plain[1], strict=True)) < 2e-5
    assert apart(found[2], plain[2]) < 2e-5


@pytest.mark.usefixtures("one_kernel")
def test_the_format_of_autocast() -> None:
    """Fault: float32 queries in a kernel of 16 bits, which autocast does not know."""
    trunk, (ids, positions) = architectures.tiny_trunk("llama"), packed()
    with RowAttention().attending(trunk.decoder), torch.autocast("cpu", torch.bfloat16):
        trunk.hidden(ids, position_ids=positions)
    assert {number for number, _ in CALLS} == {torch.bfloat16}


def on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without values, in place of those of a GPU; there is no autocast for them."""
    monkeypatch.setattr(document_attention, "ONE_KERNEL", "meta")
    monkeypatch.setattr(document_attention, "_number", lambda query: query.dtype)


def given(number: torch.dtype, size: int = 64, of_values: int = 64) -> tuple[Any, ...]:
    module = SimpleNamespace(config=SimpleNamespace(sliding_window=17), layer_idx=0)
    shapes = ((2, 8, 32, size), (2, 4, 32, size), (2, 4, 32, of_values))
    return module, *(torch.empty(*shape, dtype=number, device="meta") for shape in shapes), None


@pytest.mark.parametrize("number", [torch.bfloat16, torch.float16])
def test_the_kernel_takes_what_it_is_given(number: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: an argument that PyTorch's kernel does not know, or results in another order of heads and positions."""
    on_meta(monkeypatch)
    attention = RowAttention()
    monkeypatch.setattr(attention, "_lengths", lambda *_: [[20, 12], [32]])
    found, _ = attention.attend(*given(number), position_ids=torch.empty(2, 32), scaling=0.1, dropout=0.0)
    assert (found.shape, found.dtype, found.device.type) == ((2, 32, 8, 64), number, "meta")


@pytest.mark.parametrize(
    ("number", "sizes", "further"),
    [
        (torch.float32, (64, 64), {}),
        (torch.bfloat16, (320, 320), {}),
        (torch.bfloat16, (64, 48), {}),
        (torch.bfloat16, (64, 64), {"dropout": 0.1}),
        (torch.bfloat16, (64, 64), {"softcap": 30.0}),
        (torch.bfloat16, (64, 64), {"s_aux": torch.ones(8)}),
        (torch.bfloat16, (64, 64), {"is_causal": False}),
    ],
)
def test_what_the_kernel_cannot(
    number: torch.dtype, sizes: tuple[int, int], further: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: a soft cap, sinks or a dropout left out without a word; a format or size that the kernel refuses."""
    on_meta(monkeypatch)
    _, query, key, value, _ = given(number, *sizes)
    assert not document_attention._one_kernel(query, key, value, {"scaling": 0.1, "softcap": None, **further})
    assert document_attention._one_kernel(*given(torch.bfloat16)[1:4], {"scaling": 0.1, "softcap": None})


def test_long_rows_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a mask of T x T on GPUs, which rules out flash attention."""
    monkeypatch.setattr(document_attention, "served", lambda trunk: None)
    trunk: Any = SimpleNamespace(device=torch.device("cuda"))
    assert by_documents(trunk, LONG) is not None
    assert by_documents(trunk, LONG - 1) is None
    assert by_documents(SimpleNamespace(device=torch.device("mps")), LONG) is None  # type: ignore[arg-type]
