"""Twins of modules compute what the modules compute."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from architectures import random_tokens, tiny_model
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mtpd import packed_modules
from mtpd.packed_modules import Product, faster, faster_logits, slot_attention
from mtpd.trunk import Trunk, Unembedding


def test_a_twin_computes_the_same(name: str, trunk: Trunk) -> None:
    """Fault: an architecture whose copied modules share state, or lose a part of their configuration."""
    twin = faster(trunk.decoder)
    for shape in ((1, 1), (1, 7), (3, 30)):
        ids = random_tokens(*shape)
        with torch.no_grad():
            expected, found = (module(input_ids=ids).last_hidden_state for module in (trunk.decoder, twin))
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert faster(trunk.decoder) is twin
    replaced = [part for part in twin.modules() if isinstance(part, packed_modules._PackedLinear)]
    assert replaced
    assert not any(isinstance(part, packed_modules._PackedLinear) for part in trunk.decoder.modules())
    assert trunk.config._attn_implementation in ("sdpa", "eager")


def test_a_twin_follows_its_parameters() -> None:
    """Fault: heads that were trained further, or moved to another number format, drafting with packed old weights."""
    model: Any = tiny_model("llama")
    ids = random_tokens(2, 5)
    with torch.no_grad():
        before = faster(model)(input_ids=ids).logits
        model.model.layers[0].mlp.up_proj.weight.mul_(1.5)
        after = faster(model)(input_ids=ids).logits
        assert not torch.allclose(before, after)
        torch.testing.assert_close(after, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        model.to(torch.bfloat16)
        assert faster(model)(input_ids=ids).logits.dtype == torch.bfloat16


def test_nothing_is_packed_where_memory_is_short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: copies of the weights that drive a machine out of memory."""
    monkeypatch.setattr(packed_modules.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    model: Any = tiny_model("llama")
    twin: Any = faster(model)
    assert not any(isinstance(part, packed_modules._PackedLinear) for part in twin.modules())
    ids = random_tokens(2, 5)
    with torch.no_grad():
        assert torch.equal(twin(input_ids=ids).logits, model(input_ids=ids).logits)


def test_other_linear_layers_are_left_alone() -> None:
    """Fault: an adapter or a quantised layer replaced by the plain product of its weight."""

    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    module = nn.Sequential(Doubled(4, 4), nn.Linear(4, 4))
    inputs = torch.randn(3, 4)
    with torch.no_grad():
        torch.testing.assert_close(faster(module)(inputs), module(inputs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("biased", [False, True])
def test_products(dtype: torch.dtype, biased: bool) -> None:
    """Fault: a bias left out, or a layout that is right for one number of rows only."""
    weight = torch.randn(70, 33).to(dtype)
    bias = torch.randn(70).to(dtype) if biased else None
    product = Product(weight, bias)
    for shape in ((1,), (1, 1), (3,), (2, 2), (2, 3), (5, 1, 8), (200,)):
        inputs = torch.randn(*shape, 33).to(dtype)
        expected = nn.functional.linear(inputs, weight, bias)
        close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-1}
        torch.testing.assert_close(product(inputs), expected, **close)


def test_logits_are_made_once_for_each_vocabulary() -> None:
    """Fault: logits of other rows, or of a weight that has changed since."""
    owner = nn.Module()
    weight = torch.randn(20, 8)
    hidden = torch.randn(2, 8)
    unembedding = Unembedding(weight, scale=0.5, softcap=2.0)
    rows = torch.tensor([3, 7, 19])
    for chosen in (None, rows):
        expected = unembedding.select(chosen)(hidden)
        logits = faster_logits(owner, unembedding, chosen)
        torch.testing.assert_close(logits(hidden), expected)
        assert faster_logits(owner, unembedding, chosen) is logits
    weight.mul_(2)
    torch.testing.assert_close(faster_logits(owner, unembedding, rows)(hidden), unembedding.select(rows)(hidden))


@pytest.mark.parametrize("width", [1, 3, 40])
@pytest.mark.parametrize("shared", [1, 2, 6])
def test_attention_with_shared_keys(shared: int, width: int) -> None:
    """Fault: queries folded in another order than their mask, or a scale that is not passed on."""
    rows, heads, length, size = 2, 6, 64, 8
    query = torch.randn(rows, width, heads, size).transpose(1, 2)
    key, value = (torch.randn(rows, shared, length + 9, size)[:, :, :length] for _ in range(2))
    mask = torch.arange(length) <= torch.randint(0, length, (rows, 1, width, 1))
    module: Any = SimpleNamespace(num_key_value_groups=heads // shared, is_causal=True)
    expected, _ = sdpa_attention_forward(module, query, key, value, mask, scaling=0.3)
    for _ in range(2):
        found, _ = slot_attention(module, query, key, value, mask, scaling=0.3)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
