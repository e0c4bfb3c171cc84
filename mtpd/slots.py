"""Room for rows that are decoded together: each row has a slot of its own in buffers of fixed size.

Row r of every buffer belongs to the text in slot r, and its position t to the t-th token of that text.
Nothing is ever removed: a row that goes back to an earlier position writes over what lies behind it, and
attention sees no position past the one that asks. Dropping rejected drafts thus costs nothing, and rows
may be of different lengths.

Shape legend: S slots, N active rows (slots 0..N-1), Q positions of a pass, C capacity in positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from mtpd.errors import UnsupportedModel

ROUND = 64
"""Attention reads positions up to a multiple of this many: enough room for fast kernels, little that is empty."""

Tensors = tuple[Tensor, ...]


def on_device(values: Any, device: torch.device) -> Tensor:
    """Copies lists of numbers to a device, without waiting for what it has still to do."""
    return torch.tensor(values).to(device, non_blocking=True)


def rounded(number: int, least: int, most: int) -> int:
    """A size that graphs are captured for: `least` and its doubles, from `most` on multiples of that."""
    if number > most:
        return -(-number // most) * most
    size = least
    while size < number:
        size *= 2
    return size


class Graphs(Protocol):
    """What replays passes, see `mtpd.decode.graphs`."""

    def run(self, key: Hashable, function: Callable[[], Tensors]) -> Tensors:
        """What a function gives. Calls with the same key launch the same kernels over the same addresses."""


@dataclass(frozen=True)
class Bounded:
    """Positions of the newest tokens that the device alone knows; the host knows that no span ends behind `limit`."""

    on_device: Tensor
    """[N], in a buffer that stays where it is; rows without a text may be among them."""
    limit: int
    graphs: Graphs
    """Replay the passes from there on."""

    def span(self, width: int, offset: int = 0) -> Span:
        """As `Newest.span`."""
        return Span.within(self.on_device + offset if offset else self.on_device, width, self.limit, before=offset < 0)


class Newest(list[int]):
    """Position of the newest token of each row, on the host and on the device: one copy for all spans of a round.

    Args:
        copied: the positions on the device, where they are there already.
        bounded: the same positions for passes that are graphs; None where none are.
    """

    def __init__(
        self,
        positions: Sequence[int],
        device: torch.device,
        copied: Tensor | None = None,
        bounded: Bounded | None = None,
    ) -> None:
        super().__init__(positions)
        self.on_device = on_device(self, device) if copied is None else copied
        self.bounded = bounded

    @classmethod
    def of(cls, positions: Sequence[int], device: torch.device) -> Newest:
        """The positions as they are, or copied to the device."""
        return positions if isinstance(positions, Newest) else cls(positions, device)

    def span(self, width: int, offset: int = 0) -> Span:
        """So many positions of each row, from the newest one moved by `offset` on."""
        first = self.on_device + offset if offset else self.on_device
        return Span([end + offset for end in self], width, first.device, first=first)

    @property
    def rows(self) -> int:
        """Of a pass: those of graphs may be more than there are texts."""
        return len(self) if self.bounded is None else len(self.bounded.on_device)

    def width(self, needed: int, least: int = 8) -> int:
        """The width of a pass that needs so many positions of each row: that, or the next one of graphs."""
        return needed if self.bounded is None else rounded(needed, least, 8)

    def run(self, name: Hashable, function: Callable[[Newest | Bounded], Tensors]) -> Tensors:
        """Runs a pass of the device; as a graph, where there are such.

        Args:
            name: differs where another kernel is launched, or a number of the host is another one.
            function: reads and writes buffers that stay where they are. What it knows of the positions it has from its
                argument. It gives tensors [N, ...].
        """
        bounded = self.bounded
        if bounded is None:
            return function(self)
        found = bounded.graphs.run((name, self.rows, bounded.limit), lambda: function(bounded))
        return tuple(each[: len(self)] for each in found)


class Span:
    """Positions that a pass reads and writes: `width` of them in each of N rows, from `starts` on.

    A text may be shorter than the span. What is then written for positions before 0 goes to the last
    place of each buffer, which belongs to no text.

    Args:
        first: `starts` on the device, where they are there already.
    """

    def __init__(
        self,
        starts: Sequence[int],
        width: int,
        device: torch.device,
        *,
        first_row: int = 0,
        first: Tensor | None = None,
    ) -> None:
        self.width = width
        self.rows = slice(first_row, first_row + len(starts))
        self.end = max(starts) + width
        lowest = min(starts)
        first = on_device(starts, device) if first is None else first
        self._lay(first, same=lowest if 0 <= lowest == max(starts) else None, before=lowest < 0)

    @classmethod
    def within(cls, first: Tensor, width: int, end: int, *, before: bool) -> Span:
        """A span whose starts [N] the device alone knows.

        Args:
            end: none of it lies there or behind.
            before: whether positions may be below 0.
        """
        span = cls.__new__(cls)
        span.width, span.rows, span.end = width, slice(0, len(first)), end
        span._lay(first, same=None, before=before)
        return span

    def _lay(self, first: Tensor, *, same: int | None, before: bool) -> None:
        self._before, self._same = before, same
        width = self.width
        self._places = first[:, None] + torch.arange(width, device=first.device) if width > 1 else first[:, None]

    @property
    def positions(self) -> Tensor:
        """[N, Q], as rotary embeddings and masks need them: none below 0."""
        return self._places.clamp_min(0) if self._before else self._places

    def place(self, capacity: int, steps: int = 0) -> tuple[slice | Tensor, slice | Tensor]:
        """Rows and places in a buffer of this capacity, moved by `steps`: slices where all rows have the same ones."""
        if self._same is not None:
            return self.rows, slice(self._same + steps, self._same + steps + self.width)
        places = self._places + steps if steps else self._places
        columns = torch.arange(self.rows.start, self.rows.stop, device=places.device)[:, None]
        return columns, places.where(self._places >= 0, capacity - 1) if self._before else places

    def read(self, buffer: Tensor, steps: int = 0) -> Tensor:
        """[N, Q, ...] of a buffer [S, C, ...], at the positions moved by `steps`."""
        return buffer[self.place(buffer.shape[1], steps)]

    def write(self, buffer: Tensor, values: Tensor, steps: int = 0) -> None:
        """Puts values [N, Q, ...] into a buffer [S, C, ...]."""
        buffer[self.place(buffer.shape[1], steps)] = values


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [S, heads, C, size] each."""

    is_croppable = False

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        # Zeros, not whatever lies in memory: masked positions count nothing, but nothing times NaN is NaN.
        slots, capacity = self.cache.slots, self.cache.capacity
        self.keys = key_states.new_zeros((slots, key_states.shape[1], capacity, key_states.shape[-1]))
        self.values = value_states.new_zeros((slots, value_states.shape[1], capacity, value_states.shape[-1]))
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        active, limit = self.cache.span.rows, self.cache.limit
        rows, places = self.cache.place
        if isinstance(places, slice):
            self.keys[rows, :, places] = key_states
            self.values[rows, :, places] = value_states
        else:
            self.keys[rows, :, places] = key_states.transpose(1, 2)
            self.values[rows, :, places] = value_states.transpose(1, 2)
        if limit is None:
            return key_states, value_states
        return self.keys[active, :, :limit], self.values[active, :, :limit]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        # Asked only where texts begin, see `SlotCache.begin`: other passes bring their masks.
        return query_length, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.cache.capacity

    def copy_row(self, source: int, target: int, length: int) -> None:
        if self.keys is not None and self.values is not None:
            self.keys[target, :, :length] = self.keys[source, :, :length]
            self.values[target, :, :length] = self.values[source, :, :length]


class SlotCache(Cache):
    """Keys and values of rows that are at different positions, in buffers that never grow.

    Before each pass `begin` or `go_on` says where it reads and writes.

    Args:
        config: of the decoder whose cache this is.
        slots: rows at most.
        capacity: positions of each.
        dtype: of the decoder.
    """

    def __init__(
        self, config: PretrainedConfig, *, slots: int, capacity: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.config = config
        self.dtype = dtype
        self.slots = slots
        # One place more, for what belongs to no position.
        self.capacity = capacity + 1
        self.places = torch.arange(self.capacity, device=device)
        self.span: Span
        self.place: tuple[slice | Tensor, slice | Tensor]
        self.limit: int | None = None
        super().__init__(layers=[SlotLayer(self) for _ in range(int(config.num_hidden_layers))])

    def begin(self, span: Span) -> None:
        """The next pass starts texts at position 0: it attends to nothing but itself, and needs no mask."""
        self.span, self.limit, self.place = span, None, span.place(self.capacity)

    def go_on(
        self, span: Span, *, positions: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor | dict[str, Tensor]:
        """The next pass continues texts.

        Args:
            positions: [N, Q], where they are not those of the span's places: alternatives for one position lie
                in places of their own.
            seen: [N, Q, Q], then: which places of the span each of them sees.

        Returns:
            Its attention mask: [N, 1, Q, L], or one for each kind of layer where there are several.
        """
        self.span, self.place = span, span.place(self.capacity)
        self.limit = min(-(-span.end // ROUND) * ROUND, self.capacity)
        own = span.positions
        positions = own if positions is None else positions
        return attention_masks(self.config, positions, self.places[: self.limit], own=own, seen=seen, dtype=self.dtype)

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Makes the first `length` positions of one slot those of another."""
        for layer in self.layers:
            layer.copy_row(source, target, length)

    def move(self, rows: Tensor, sources: Tensor, targets: Tensor) -> None:
        """In these rows, puts what lies in one place into another; all three of one shape, or of ones that fit."""
        for layer in self.layers:
            for held in (layer.keys, layer.values):
                held[rows, :, targets] = held[rows, :, sources]


def attention_masks(
    config: PretrainedConfig,
    positions_NQ: Tensor,
    places_L: Tensor,
    *,
    own: Tensor,
    seen: Tensor | None,
    dtype: torch.dtype,
) -> Tensor | dict[str, Tensor]:
    """Makes masks of what each position may attend to, in the form in which decoders of transformers take them.

    Without `seen` all places up to its own; with it those before the span, and of the span those that `seen`
    [N, Q, Q] says. `own` [N, Q] are the span's places.

    The forms are those of `transformers.masking_utils.create_masks_for_generate`.

    Raises:
        UnsupportedModel: the model has layers that attend in another way.
    """
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if kinds is None:
        kinds = ["full_attention" if window is None else "sliding_attention"]
        if getattr(config, "attention_chunk_size", None) is not None:
            kinds = ["chunked_attention"]
    masks: dict[str, Tensor] = {}
    held = places_L.expand(len(own), -1)
    if seen is None:
        causal = own[:, :, None] >= places_L
    else:
        causal = (held < own[:, :1])[:, None].repeat(1, own.shape[1], 1)
        causal.scatter_(2, own[:, None].expand_as(seen), seen)
        # The position of what lies in each place.
        held = held.scatter(1, own, positions_NQ)
    causal = causal[:, None]
    for kind in dict.fromkeys(kinds):
        mask = causal
        if kind == "sliding_attention" and window is not None:
            mask = causal & (positions_NQ[:, None, :, None] - held[:, None, None] < window)
        elif kind != "full_attention":
            raise UnsupportedModel(f"{config.model_type}: layers of {kind} cannot be decoded with heads yet")
        if config._attn_implementation == "eager":
            # The plain implementation adds its mask.
            mask = torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)
        masks[kind] = mask
    return masks if len(masks) > 1 else next(iter(masks.values()))
