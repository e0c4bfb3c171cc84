"""Attention over packed rows, inside of documents, in place of one pass with a mask of T x T.

transformers masks what lies in other documents, and PyTorch computes all pairs of tokens of a row nevertheless. Where
rows are long, most of these are of different documents. What is attended to stays the same, to rounding.

NVIDIA GPUs take all documents of a batch in one kernel, flash attention over sequences of different lengths, for
numbers of 16 bits. Elsewhere, and in float32, documents go through PyTorch's scaled dot product one after the other.

Legend: B rows, T positions of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mtpd import alignment
from mtpd.trunk import Trunk

ATTENTION = "mtpd_rows"
"""Name of the attention below among those of transformers."""
SLIDING = "sliding_attention"
CORE = "sdpa"
"""Name of what computes inside of a document: PyTorch's scaled dot product."""
LONG = 1024
"""Shortest row for which this is faster on a processor (docs/results/row_attention.md). GPUs: not measured."""
DEVICES = ("cpu", "cuda")
"""Where long rows are attended to by documents."""
ONE_KERNEL = "cuda"
"""Where all documents of a batch may go through one kernel."""
NUMBERS = (torch.bfloat16, torch.float16)
"""The formats that the kernel computes in."""
LARGEST = 256
"""Numbers of an attention head at most that the kernel takes."""
TAKEN = frozenset({"position_ids", "scaling", "sliding_window", "dropout", "cache_position", "use_cache"})
"""What attention may be given for the kernel to compute it. Anything else that says something is PyTorch's."""


class RowAttention:
    """The attention of modules while they are given packed rows."""

    def __init__(self) -> None:
        self._core: Any = ALL_ATTENTION_FUNCTIONS[CORE]
        self._known: tuple[Tensor, list[list[int]]] | None = None
        self._borders: tuple[list[list[int]], Tensor] | None = None

    @contextmanager
    def attending(self, *modules: nn.Module) -> Iterator[None]:
        """Within it, the attention of these modules is this one. They are given positions, and no cache."""
        configs = configurations(modules)
        AttentionInterface.register(ATTENTION, self.attend)
        try:
            for config in configs:
                config._attn_implementation = ATTENTION
            yield
        finally:
            for config in configs:
                config._attn_implementation = CORE
            self._known = self._borders = None

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attention [B, T, heads, size] of queries, keys and values [B, heads, T, size].

        Its arguments are those of transformers' own functions, of which there is no mask.
        """
        window, rows = _window(module), []
        documents_of_rows = self._lengths(kwargs["position_ids"], kwargs["position_ids"])
        if _one_kernel(query, key, value, kwargs):
            return self._together(
                query, key, value, documents_of_rows, window=window, scale=kwargs.get("scaling")
            ), None
        for row, lengths in enumerate(documents_of_rows):
            queries, keys, values = (each[row : row + 1].split(lengths, dim=2) for each in (query, key, value))
            documents = [
                self._document(module, *document, window=window, kwargs=kwargs)
                for document in zip(queries, keys, values, strict=True)
            ]
            rows.append(torch.cat(documents, dim=1))
        return torch.cat(rows), None

    def _lengths(self, position_ids_BT: Tensor, given: Tensor) -> list[list[int]]:
        """Lengths of the documents of each row, which are found once for what all layers are given."""
        if self._known is None or self._known[0] is not given:
            numbers = alignment.document_ids(position_ids_BT).cpu()
            self._known = given, [row.unique_consecutive(return_counts=True)[1].tolist() for row in numbers]
        return self._known[1]

    def _together(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: list[list[int]],
        *,
        window: int | None,
        scale: float | None,
    ) -> Tensor:
        """Attention [B, T, heads, size] of all documents in one kernel."""
        if self._borders is None or self._borders[0] is not lengths:
            ends = torch.tensor([0, *(length for row in lengths for length in row)]).cumsum(0)
            self._borders = lengths, ends.to(query.device, torch.int32)
        borders, longest = self._borders[1], max(map(max, lengths))
        number = _number(query)
        q, k, v = (each.transpose(1, 2).flatten(0, 1).to(number) for each in (query, key, value))
        # A window of n tokens has the token itself in it; and the next token is in none.
        seen = (-1 if window is None else window - 1, 0)
        found = varlen_attn(q, k, v, borders, borders, longest, longest, scale=scale, window_size=seen, enable_gqa=True)
        assert isinstance(found, Tensor), "no further results were asked for"
        return found.unflatten(0, (query.shape[0], query.shape[2]))

    def _document(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, *, window: int | None, kwargs: dict[str, Any]
    ) -> Tensor:
        """Attention [1, n, heads, size] inside of a document of n tokens, each of which sees the last `window`."""
        length = query.shape[2]
        if window is None or length <= window:
            return self._core(module, query, key, value, None, **kwargs)[0]
        found = []
        for start in range(0, length, window):
            end, first = min(start + window, length), max(0, start - window + 1)
            places = torch.arange(first, end, device=query.device)
            back = places[start - first :, None] - places
            seen = ((back >= 0) & (back < window))[None, None]
            keys, values = key[:, :, first:end], value[:, :, first:end]
            found.append(self._core(module, query[:, :, start:end], keys, values, seen, **kwargs)[0])
        return torch.cat(found, dim=1)


def by_documents(trunk: Trunk, row_length: int) -> RowAttention | None:
    """This attention where it is faster, for rows that this process has whole; None for transformers' own."""
    long = trunk.device.type in DEVICES and row_length >= LONG
    return RowAttention() if long and served(trunk) is None else None


def served(trunk: Trunk) -> str | None:
    """Why the attention of a trunk cannot be replaced, or None if it can."""
    odd = {str(config._attn_implementation) for config in configurations([trunk.decoder])} - {CORE}
    odd |= set(getattr(trunk.config, "layer_types", None) or []) - {"full_attention", SLIDING}
    if odd or getattr(trunk.config, "attention_chunk_size", None):
        return f"which attends by {', '.join(sorted(odd)) or 'chunks'}"
    if len(shapes(trunk)) != trunk.depth:
        return "whose attention does not go through transformers with its positions"
    return None


@torch.no_grad()
def shapes(trunk: Trunk) -> list[tuple[int, int, int, int, str]]:
    """Records each attention in a short pass: heads, those of keys and values, their sizes, and what comes by head."""
    configs = configurations([trunk.decoder])
    inside, seen = ALL_ATTENTION_FUNCTIONS[CORE], []

    def look(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        by_head = ", ".join(
            name
            for name, each in kwargs.items()
            if isinstance(each, Tensor) and name != "position_ids" and query.shape[1] in each.shape
        )
        if kwargs.get("position_ids") is not None:
            seen.append((query.shape[1], key.shape[1], query.shape[-1], value.shape[-1], by_head))
        return inside(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(ATTENTION, look)
    try:
        for config in configs:
            config._attn_implementation = ATTENTION
        trunk.hidden(torch.zeros(1, 5, dtype=torch.long, device=trunk.device))
    finally:
        for config in configs:
            config._attn_implementation = CORE
    return seen


def configurations(modules: Any) -> list[PretrainedConfig]:
    """The configurations in which modules look up how to attend."""
    found = [getattr(part, "config", None) for module in modules for part in module.modules()]
    return list({id(each): each for each in found if isinstance(each, PretrainedConfig)}.values())


def _number(query: Tensor) -> torch.dtype:
    """The format in which attention is computed: that of autocast, which knows nothing of the kernel."""
    kind = query.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else query.dtype


def _one_kernel(query: Tensor, key: Tensor, value: Tensor, given: dict[str, Any]) -> bool:
    """Whether one kernel can compute this attention."""
    if query.device.type != ONE_KERNEL or _number(query) not in NUMBERS:
        return False
    if query.is_cuda and torch.cuda.get_device_capability(query.device) < (8, 0):
        return False
    further = any(each is not None and name not in TAKEN for name, each in given.items())
    size = query.shape[-1]
    return not (further or given.get("dropout")) and size == value.shape[-1] == key.shape[-1] and size <= LARGEST


def _window(module: Any) -> int | None:
    """Gives the window of a layer in tokens, itself included; None for all."""
    kinds = getattr(module.config, "layer_types", None)
    if kinds is not None and kinds[module.layer_idx] != SLIDING:
        return None
    window = getattr(module.config, "sliding_window", None)
    return None if window is None else int(window)
