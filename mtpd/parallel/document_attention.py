"""Attention over packed rows, document after document, in place of one pass with a mask of T x T.

transformers masks what lies in other documents, and PyTorch computes all pairs of tokens of a row nevertheless. Where
rows are long, most of these are of different documents. What is attended to stays the same, to rounding.

Legend: B rows, T positions of a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
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
"""Shortest row for which this is faster on a processor (docs/results/row_attention.md). Accelerators: not measured."""


class RowAttention:
    """The attention of modules while they are given packed rows."""

    def __init__(self) -> None:
        self._core: Any = ALL_ATTENTION_FUNCTIONS[CORE]
        self._known: tuple[Tensor, list[list[int]]] | None = None

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
            self._known = None

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Attention [B, T, heads, size] of queries, keys and values [B, heads, T, size].

        Its arguments are those of transformers' own functions, of which there is no mask.
        """
        window, rows = _window(module), []
        for row, lengths in enumerate(self._lengths(kwargs["position_ids"], kwargs["position_ids"])):
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
    long = trunk.device.type == "cpu" and row_length >= LONG
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


def _window(module: Any) -> int | None:
    """Gives the window of a layer in tokens, itself included; None for all."""
    kinds = getattr(module.config, "layer_types", None)
    if kinds is not None and kinds[module.layer_idx] != SLIDING:
        return None
    window = getattr(module.config, "sliding_window", None)
    return None if window is None else int(window)
