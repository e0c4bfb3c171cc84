"""Layer sharing: heads that read the trunk's last m layers with LoRA adapters (MTPC, arXiv 2511.11346).

    s_t = layers 1..L-m of the trunk             once, for both
    h_t = norm(layers L-m+1..L (s))_t            the main head reads it: verification
    ĥ_t = norm(adapted layers (s))_t             the heads read it in place of h_t: drafts

They wrap heads of any kind that read one state: they give these the state, and leave the rest to them. Adapters start
as nothing, so that new heads draft as they would without. The layers are the trunk's own; an adapter is all that is
added, trained and saved. To draft, adapters are merged into a copy of the m layers, which costs no more a forward than
plain ones, and has keys and values of its own.

Shape legend: B rows, T positions, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from mtpd.heads.adapters import adapted, without_adapter
from mtpd.heads.base import Along, Batch, Heads, Readout
from mtpd.heads.config import HeadsConfig
from mtpd.heads.drafting import Drafter
from mtpd.heads.shared_layers.drafting import SharedLayerDrafter
from mtpd.losses.settings import LossSettings, LossSums
from mtpd.packed_modules import stamp
from mtpd.trunk import Trunk


class AdaptedLayers:
    """The adapted layers of the trunk that heads were used with last. A copy of heads begins without.

    Attributes:
        layers: around the trunk's parameters.
        merged: those of decoding, with the state of the parameters that they were made from.
    """

    def __init__(self) -> None:
        self.trunk: Trunk | None = None
        self.layers: Any = None
        self.merged: tuple[Any, nn.Module] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> AdaptedLayers:
        return AdaptedLayers()


class SharedLayerHeads(Heads):
    """Heads behind adapted layers.

    Args:
        inner: the heads themselves, of the same config.
    """

    def __init__(self, trunk: Trunk, config: HeadsConfig, inner: Heads) -> None:
        super().__init__(config)
        self.inner = inner
        self.independent = inner.independent
        # One tensor: what is written into either is in both, and it is saved with the inner heads.
        self.register_buffer("vocabulary", inner.get_buffer("vocabulary"), persistent=False)
        self.adapters = nn.Module()
        self._used = AdaptedLayers()
        with torch.no_grad():
            first = adapted(trunk.top(config.shared_layers), config.adapter_rank)
        for name, layer in _adapted_layers(first).items():
            _put(self.adapters, f"{name}.lora_A", layer.lora_A)
            _put(self.adapters, f"{name}.lora_B", layer.lora_B)
        # PEFT gives them the dtype of the layers that they stand at.
        self.adapters.float()
        self._used.trunk, self._used.layers = trunk, first

    @property
    def depth(self) -> int:
        return self.inner.depth

    def train(self, mode: bool = True) -> Self:
        # Optimizers may change parameters in ways that these do not show.
        self._used.merged = None
        return super().train(mode)

    def rows(self) -> Tensor | None:
        return self.inner.rows()

    def blocks(self) -> Iterable[nn.Module]:
        return self.inner.blocks()

    def chunk_bytes(self) -> int:
        return self.inner.chunk_bytes()

    def shorten(self, depth: int) -> None:
        self.inner.shorten(depth)
        self.config = self.inner.config

    def adapted(self, trunk: Trunk) -> nn.Module:
        """Gives the trunk's last layers with the adapters, as `Trunk.top` gives them without."""
        if self._used.trunk is not trunk:
            layers = adapted(trunk.top(self.shared_layers), self.config.adapter_rank)
            for name, layer in _adapted_layers(layers).items():
                layer.lora_A = self.adapters.get_submodule(f"{name}.lora_A")
                layer.lora_B = self.adapters.get_submodule(f"{name}.lora_B")
            self._used.trunk, self._used.layers = trunk, layers
        return self._used.layers

    def states(self, trunk: Trunk, below_BTD: Tensor, *, position_ids_BT: Tensor) -> Tensor:
        """Computes ĥ [B, T, D] from the states that the shared layers begin with."""
        layers = self.adapted(trunk)
        return layers(inputs_embeds=below_BTD, position_ids=position_ids_BT, use_cache=False).last_hidden_state

    def loss(
        self, trunk: Trunk, batch: Batch, readout: Readout, settings: LossSettings, *, compiled: bool = False
    ) -> tuple[Tensor, LossSums]:
        """Sums the loss of the inner heads, with gradient in adapters too; the teacher is the trunk without them."""
        position_ids = batch.position_ids
        with torch.no_grad():
            top = trunk.top(self.shared_layers)
            plain = top(inputs_embeds=batch.hidden, position_ids=position_ids, use_cache=False).last_hidden_state
        states = self.states(trunk, batch.hidden, position_ids_BT=position_ids)
        batch = replace(batch, hidden=states, teacher=plain)
        return self.inner.loss(trunk, batch, readout, settings, compiled=compiled)

    def along(self, trunk: Trunk, hidden_BTD: Tensor, input_ids_BT: Tensor, *, position_ids_BT: Tensor) -> Along:
        states = self.states(trunk, hidden_BTD, position_ids_BT=position_ids_BT)
        return self.inner.along(trunk, states, input_ids_BT, position_ids_BT=position_ids_BT)

    def drafter(self, trunk: Trunk, *, slots: int, capacity: int) -> Drafter:
        inner = self.inner.drafter(trunk, slots=slots, capacity=capacity)
        layers = self.adapted(trunk)
        state = [stamp(parameter) for parameter in layers.parameters()]
        if self._used.merged is None or self._used.merged[0] != state:
            with torch.no_grad():
                self._used.merged = state, without_adapter(layers).requires_grad_(False)
        return SharedLayerDrafter(self._used.merged[1], inner, trunk, slots=slots, capacity=capacity)


def _adapted_layers(module: nn.Module) -> dict[str, Any]:
    from peft.tuners.lora import LoraLayer  # takes seconds to import

    return {name: layer for name, layer in module.named_modules() if isinstance(layer, LoraLayer)}


def _put(root: nn.Module, name: str, module: nn.Module) -> None:
    """Registers a module under a dotted name."""
    *path, last = name.split(".")
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.add_module(last, module)
