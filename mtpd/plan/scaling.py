"""Memory of one rank in training, by how the run is sharded: one formula for plans, tables and documents.

N ranks; the trunk has P parameters of b bytes, of which L are in its layers; the heads have H parameters, which are
trained in float32. A rank holds, in bytes:

    sharding        trunk               heads           gradients   Adam's moments    on the host
    none            P b                 4 H             4 H         8 H               -
    zero1           P b                 4 H + 4 H / N   4 H         8 H / N           -
    zero2           P b                 4 H + 4 H / N   4 H / N     8 H / N           -
    zero3           (P - L + L / N) b   8 H / N         4 H / N     8 H / N           -
    zero3-cpu       (P - L) b           8 H / N         4 H / N     8 H / N           L b / N
    zero3-nvme      (P - L) b           8 H / N         4 H / N     8 H / N           -

DeepSpeed keeps a second copy of the weights that it updates, its master copy: 4 H / N. Beside it there are buckets in
which gradients are reduced, at stage 3 the layers that are whole for a moment, and what does not depend on sharding:
the heads in the trunk's number format, activations, the states of a batch, and the tile of the loss. At stage 3
embedding and unembedding stay whole: each step reads all of both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mtpd.parallel.deepspeed_config import LIVE_LAYERS, bucket_elements

Sharding = Literal["none", "zero1", "zero2", "zero3", "zero3-cpu", "zero3-nvme"]
SHARDINGS: tuple[Sharding, ...] = ("none", "zero1", "zero2", "zero3", "zero3-cpu", "zero3-nvme")
"""From the one that is tried first to the one that needs least memory; "none" is train.deepspeed: null."""
FLOAT32 = 4
SPARE = 0.9
"""Share of a device's memory that a plan fills: allocators and libraries need the rest."""


@dataclass(frozen=True)
class Load:
    """The load of a rank in training, however it is sharded. Parameters are counted, not bytes."""

    trunk: int
    """Parameters of the trunk, its output head included."""
    layers: int
    """Of them, in its layers."""
    largest_layer: int
    heads: int
    """Parameters that are trained."""
    largest_head: int
    hidden: int
    item: int
    """Bytes of a number of the trunk."""
    beside: Mapping[str, int]
    """Bytes by purpose of what does not depend on sharding."""
    parts: int = 1
    """Ranks that share each row."""


def memory(load: Load, sharding: Sharding, ranks: int) -> dict[str, int]:
    """Bytes of the device by purpose, in training, of one of so many ranks."""
    stage = stage_of(sharding)
    offloaded = sharding in ("zero3-cpu", "zero3-nvme")
    whole = load.trunk * load.item
    heads = FLOAT32 * load.heads
    found = {"trunk": whole, "heads": heads, "gradients": heads, "optimizer": 2 * heads}
    if stage >= 1:
        found |= {"master copy": share(heads, ranks), "optimizer": share(2 * heads, ranks)}
        found["buckets"] = 2 * FLOAT32 * bucket_elements(load.largest_head, hidden_size=load.hidden)
    if stage >= 2:
        found["gradients"] = share(heads, ranks)
    if stage == 3:
        outside = (load.trunk - load.layers) * load.item
        found["trunk"] = outside + (0 if offloaded else share(load.layers * load.item, ranks))
        found["trunk's layers, whole for a moment"] = min(LIVE_LAYERS * load.largest_layer, load.layers) * load.item
        found["heads"] = share(heads, ranks)
        found["heads, whole for a moment"] = FLOAT32 * min(LIVE_LAYERS * load.largest_head, load.heads)
    return found | dict(load.beside)


def host_memory(load: Load, sharding: Sharding, ranks: int) -> int:
    """Bytes of the trunk that a rank keeps in the memory of its machine."""
    return share(load.layers * load.item, ranks) if sharding == "zero3-cpu" else 0


@dataclass(frozen=True)
class Fit:
    """Whether a way to shard fits into a device."""

    sharding: Sharding
    memory: dict[str, int]
    """Bytes by purpose."""
    fits: bool

    @property
    def total(self) -> int:
        return sum(self.memory.values())


def fits(load: Load, ranks: int, device_memory: float) -> list[Fit]:
    """All ways to shard over so many ranks, from the first to be tried to the last.

    Args:
        device_memory: bytes of each device, of which a share stays free.
    """
    # With one rank the first stages shard nothing, and only offloading makes room.
    possible = SHARDINGS if ranks > 1 else ("none", "zero3-cpu", "zero3-nvme")
    found = [(each, memory(load, each, ranks)) for each in possible]
    return [Fit(each, parts, sum(parts.values()) <= SPARE * device_memory) for each, parts in found]


def stage_of(sharding: Sharding) -> int:
    return 0 if sharding == "none" else int(sharding[4])


def share(count: int, ranks: int) -> int:
    return -(-count // ranks)
