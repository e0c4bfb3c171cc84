"""A module that computes the same faster, for the few rows a pass that decoding has.

`faster` gives a twin of a module: the same parameters and code, but

- on a CPU, linear layers whose weights are packed for oneDNN. The library that PyTorch calls otherwise reads
  the weights several times as soon as there are a few rows. The packed copies take as much memory as the
  weights; they are made only if a quarter of what is free holds them, and live as long as the module.
- attention that reads keys and values as they lie in the slots, once for all queries that share them,
  where the module attends by PyTorch's scaled dot product.

The module itself is not touched.
"""

from __future__ import annotations

import copy
import threading
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import psutil  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mtpd.quantised import is_quantised
from mtpd.trunk import Unembedding

ATTENTION = "mtpd_slots"
"""Name of the attention below among those of transformers."""

MOST_ROWS = 160
"""Products of more rows than this are left to PyTorch, which is as fast there."""

FEW_ROWS = 3
"""In float32, so do products of no more rows than this: MKL's kernels for a few rows read the weights once."""

Module = TypeVar("Module", bound=nn.Module)

_twins: WeakKeyDictionary[nn.Module, tuple[Any, nn.Module]] = WeakKeyDictionary()
_logits: WeakKeyDictionary[nn.Module, tuple[Any, Logits]] = WeakKeyDictionary()
_lock = threading.Lock()


def faster(module: Module) -> Module:
    """The twin of a module. It is made once, and again when parameters of the module have changed."""
    with _lock:
        state = _state(module)
        held = _twins.get(module)
        if held is None or held[0] != state:
            copies = sum(part.get_parameter("weight").nbytes for part in module.modules() if _packs(part))
            held = state, _twin(module, {}, pack=_fits(copies))
            _twins[module] = held
        twin: Any = held[1]
        return twin


def forget(module: nn.Module) -> None:
    """Drops the twins of a module and of its parts.

    Fused optimizers change parameters without a sign that `faster` could see.
    """
    with _lock:
        for part in module.modules():
            _twins.pop(part, None)


def faster_logits(owner: nn.Module, unembedding: Unembedding, rows: Tensor | None = None) -> Logits:
    """An unembedding, or the part of it that `rows` select; made once for each owner."""
    with _lock:
        state = [stamp(tensor) for tensor in (unembedding.weight, rows) if tensor is not None]
        held = _logits.get(owner)
        if held is None or held[0] != state:
            part = unembedding if rows is None else unembedding.select(rows)
            held = _logits[owner] = state, Logits(part)
        return held[1]


class Logits:
    """The arithmetic of an unembedding with a faster product."""

    def __init__(self, unembedding: Unembedding) -> None:
        self.unembedding = unembedding
        self.product = Product(unembedding.weight, unembedding.bias, pack=_fits(unembedding.weight.nbytes))

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        return self.unembedding.finish(self.product(hidden.to(self.unembedding.weight.dtype)))


class Product:
    """x Wᵀ + b, as fast as it goes here.

    Args:
        weight: [out, in]; it must not change afterwards.
        bias: [out], or None.
        pack: False keeps to the weight as it is.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, pack: bool = True) -> None:
        self.weight, self.bias = weight, bias
        self.packed: Any = None
        if pack and packable(weight):
            with torch.no_grad():
                self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 8)

    def __call__(self, inputs: Tensor) -> Tensor:
        """[..., out] of [..., in]."""
        size = inputs.shape[-1]
        rows = inputs.numel() // size
        few = rows <= FEW_ROWS and inputs.dtype == torch.float32
        if self.packed is None or rows > MOST_ROWS or few:
            return nn.functional.linear(inputs, self.weight, self.bias)
        flat = inputs.reshape(rows, size)
        product = torch.ops.mkldnn._linear_pointwise(flat, self.packed, self.bias, "none", [], "")
        return product.view(*inputs.shape[:-1], product.shape[-1])


def packable(weight: Tensor) -> bool:
    """Whether oneDNN multiplies with it packed."""
    if weight.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if weight.dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return weight.dtype == torch.float32


def _fits(copies: int) -> bool:
    """Whether copies of this many bytes leave enough memory for everything else."""
    return 4 * copies <= psutil.virtual_memory().available


def _packs(module: nn.Module) -> bool:
    # Not subclasses: adapters and quantised layers compute something else.
    return type(module) is nn.Linear and not is_quantised(module) and packable(module.weight)


class _PackedLinear(nn.Linear):
    product: Product

    def forward(self, input: Tensor) -> Tensor:
        return self.product(input)


def _state(module: nn.Module) -> Any:
    """Changes when parameters do."""
    return [stamp(parameter) for parameter in module.parameters()]


def stamp(tensor: Tensor) -> tuple[int, int, torch.dtype, int]:
    """Changes when the tensor does."""
    return tensor.data_ptr(), tensor.numel(), tensor.dtype, 0 if tensor.is_inference() else tensor._version


def _twin(module: nn.Module, configs: dict[int, PretrainedConfig], *, pack: bool) -> nn.Module:
    """A copy of the tree of modules around the same parameters."""
    twin = copy.copy(module)
    for name, value in list(twin.__dict__.items()):
        if isinstance(value, PretrainedConfig):
            twin.__dict__[name] = configs.setdefault(id(value), _config(value))
    if pack and _packs(module):
        twin.__class__ = _PackedLinear
        weight: Any = module.weight
        twin.product = Product(weight, module.bias)  # type: ignore[assignment, arg-type]
    twin.__dict__["_modules"] = {
        name: child if child is None else _twin(child, configs, pack=pack) for name, child in module._modules.items()
    }
    return twin


def _config(config: PretrainedConfig) -> PretrainedConfig:
    if config._attn_implementation != "sdpa":
        return config
    config = copy.copy(config)
    config._attn_implementation = ATTENTION
    return config


def slot_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a few queries [N, H, Q, size] to many keys [N, H / G, L, size].

    The G query heads that share keys and values become G times as many queries of one head, so that
    nothing has to be repeated. What it does not know goes to transformers' own function.
    """
    heads, width = query.shape[1:3]
    shared = key.shape[1]
    groups = heads // shared
    known = attention_mask is not None and attention_mask.dtype == torch.bool and attention_mask.shape[1] == 1
    unknown = ("softcap", "s_aux", "position_bias", "cache")
    if not known or groups == 1 or width > 32 or dropout or any(kwargs.get(name) is not None for name in unknown):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    folded = query.reshape(-1, shared, groups * width, query.shape[-1])
    attended = nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=_folded_mask(attention_mask, groups, query.dtype), scale=scaling
    )
    return attended.view(-1, heads, width, value.shape[-1]).transpose(1, 2).contiguous(), None


def _folded_mask(mask: Any, groups: int, dtype: torch.dtype) -> Tensor:
    """Folds a mask [N, 1, Q, L] into what is added to scores [N, 1, G * Q, L]; once a pass, not in every layer."""
    held: tuple[int, Tensor] | None = getattr(mask, "_folded", None)
    if held is None or held[0] != groups:
        rows, _, width, length = mask.shape
        added = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)
        folded = added[:, :, None].expand(rows, 1, groups, width, length).reshape(rows, 1, groups * width, length)
        mask._folded = held = groups, folded
    return held[1]


AttentionInterface.register(ATTENTION, slot_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
