"""Layer sharing: heads that read the trunk's last m layers with LoRA adapters (MTPC, arXiv 2511.11346).

    s_t = layers 1..L-m of the trunk             once, for both
    h_t = norm(layers L-m+1..L (s))_t            the main head reads it: verification
    ĥ_t = norm(adapted layers (s))_t             the heads read it in place of h_t: drafts

Around heads of any kind that read one state: these give what they read, and leave the rest to them. Adapters start as
nothing, so that new heads draft as they would without. The layers are the trunk's own; an adapter is all that is added,
trained and saved. To draft, adapters are merged into a copy of the m layers, which costs no more a pass than plain
ones, and has keys and values of its own.

Shape legend: B rows, T positions, N active rows, Q positions of a pass, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from mtpd.errors import UnsupportedModel, UserError
from mtpd.heads.adapters import adapted, without_adapter
from mtpd.heads.base import Along, Batch, Drafter, Heads, Pick, Readout
from mtpd.heads.config import HeadsConfig
from mtpd.losses.settings import LossSettings, LossSums
from mtpd.packed_modules import faster, stamp
from mtpd.slots import SlotCache, Span
from mtpd.trunk import Trunk

RANK = 16


class Bound:
    """The adapted layers of the trunk that heads were used with last. A copy of heads begins without.

    Attributes:
        layers: around the trunk's parameters.
        merged: those of decoding, with the state of the parameters that they were made from.
    """

    def __init__(self) -> None:
        self.trunk: Trunk | None = None
        self.layers: Any = None
        self.merged: tuple[Any, nn.Module] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Bound:
        return Bound()


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
        self._bound = Bound()
        with torch.no_grad():
            first = adapted(trunk.top(config.shared_layers), config.adapter_rank)
        for name, layer in _adapted_layers(first).items():
            _put(self.adapters, f"{name}.lora_A", layer.lora_A)
            _put(self.adapters, f"{name}.lora_B", layer.lora_B)
        # PEFT gives them the number format of the layers that they stand at.
        self.adapters.float()
        self._bound.trunk, self._bound.layers = trunk, first

    @property
    def depth(self) -> int:
        return self.inner.depth

    def train(self, mode: bool = True) -> Self:
        # Optimizers may change parameters in ways that these do not show.
        self._bound.merged = None
        return super().train(mode)

    def rows(self) -> Tensor | None:
        return self.inner.rows()

    def blocks(self) -> Iterable[nn.Module]:
        return self.inner.blocks()

    def piece_bytes(self) -> int:
        return self.inner.piece_bytes()

    def shorten(self, depth: int) -> None:
        self.inner.shorten(depth)
        self.config = self.inner.config

    def adapted(self, trunk: Trunk) -> nn.Module:
        """The trunk's last layers with the adapters, as `Trunk.top` gives them without."""
        if self._bound.trunk is not trunk:
            layers = adapted(trunk.top(self.shared_layers), self.config.adapter_rank)
            for name, layer in _adapted_layers(layers).items():
                layer.lora_A = self.adapters.get_submodule(f"{name}.lora_A")
                layer.lora_B = self.adapters.get_submodule(f"{name}.lora_B")
            self._bound.trunk, self._bound.layers = trunk, layers
        return self._bound.layers

    def states(self, trunk: Trunk, below_BTD: Tensor, *, position_ids_BT: Tensor) -> Tensor:
        """ĥ [B, T, D] of the states that the shared layers begin with."""
        layers = self.adapted(trunk)
        return layers(inputs_embeds=below_BTD, position_ids=position_ids_BT, use_cache=False).last_hidden_state

    def start(self, seed: int) -> None:
        """Gives the adapters their first weights, which add nothing."""
        random = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.adapters.named_parameters():
                if ".lora_B." in name:
                    parameter.zero_()
                else:
                    parameter.copy_(torch.randn(parameter.shape, generator=random) * parameter.shape[1] ** -0.5)

    def above(self, trunk: Trunk, batches: Iterable[Mapping[str, Tensor]]) -> Iterable[dict[str, Tensor]]:
        """Batches of which the states "hidden" are the trunk's own, as heads without shared layers are fitted to."""
        top = trunk.top(self.shared_layers)
        for batch in batches:
            with torch.no_grad():
                states = top(inputs_embeds=batch["hidden"], position_ids=batch["position_ids"], use_cache=False)
            yield {**batch, "hidden": states.last_hidden_state}

    def loss(
        self, trunk: Trunk, batch: Batch, readout: Readout, settings: LossSettings, *, compiled: bool = False
    ) -> tuple[Tensor, LossSums]:
        """That of the inner heads; gradient in them and in the adapters. The teacher is the trunk without these."""
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
        if self._bound.merged is None or self._bound.merged[0] != state:
            with torch.no_grad():
                self._bound.merged = state, without_adapter(layers).requires_grad_(False)
        return SharedLayerDrafter(self._bound.merged[1], inner, trunk, slots=slots, capacity=capacity)


class SharedLayerDrafter:
    """Gives a drafter what it reads: the adapted layers run over the tokens that were accepted since they ran last."""

    def __init__(self, layers: nn.Module, inner: Drafter, trunk: Trunk, *, slots: int, capacity: int) -> None:
        self.inner = inner
        self.layers: Any = faster(layers)
        device, dtype = trunk.device, trunk.dtype
        self.cache = SlotCache(self.layers.config, slots=slots, capacity=capacity, dtype=dtype, device=device)
        # One place more for what belongs to no position.
        self.states = torch.zeros(slots, capacity + 1, trunk.hidden_size, dtype=dtype, device=device)
        # By slot, how many positions are in the cache.
        self.held = [0] * slots

    @property
    def depth(self) -> int:
        return self.inner.depth

    def ids(self, columns: Tensor) -> Tensor:
        return self.inner.ids(columns)

    def begin(self, span: Span, hidden: Tensor, tokens: Tensor, lengths: Sequence[int]) -> None:
        self.read(span, hidden)
        self.cache.begin(span)
        self.inner.begin(span, self._pass(span, hidden, None), tokens, lengths)
        for row, length in enumerate(lengths, start=span.rows.start):
            self.held[row] = length - 1

    def read(self, span: Span, hidden: Tensor) -> None:
        """Takes the states [N, Q, D] that the shared layers begin with; those of rejected drafts give way later."""
        span.write(self.states, hidden)

    def draft(
        self,
        tokens: Tensor,
        newest: Sequence[int],
        depth: int,
        pick: Pick,
        go_on: Callable[[Tensor, Tensor], bool] | None = None,
    ) -> int:
        width = max(1, *(end - self.held[row] for row, end in enumerate(newest)))
        span = Span([end - width for end in newest], width, tokens.device)
        self.inner.read(span, self._pass(span, span.read(self.states), self.cache.go_on(span)))
        self.held[: len(newest)] = newest
        return self.inner.draft(tokens, newest, depth, pick, go_on)

    def copy_row(self, source: int, target: int, length: int) -> None:
        self.inner.copy_row(source, target, length)
        self.cache.copy_row(source, target, length)
        self.states[target, :length] = self.states[source, :length]
        self.held[target] = self.held[source]

    def _pass(self, span: Span, below: Tensor, mask: Tensor | dict[str, Tensor] | None) -> Tensor:
        return self.layers(
            inputs_embeds=below,
            position_ids=span.positions,
            attention_mask=mask,
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state


def configure(settings: Mapping[str, Any], trunk: Trunk) -> dict[str, int]:
    """The part of `HeadsConfig` that says which layers are shared, from the `heads` section of a recipe.

    Raises:
        UserError: layers that the trunk does not have, heads that cannot read them, or a rank without layers.
        UnsupportedModel: the last layers of the model do not run apart from the others.
    """
    layers, rank = settings.get("shared_layers", 0), settings.get("adapter_rank")
    if not layers:
        if rank is not None:
            raise UserError(f"heads.adapter_rank: {rank} does nothing with heads.shared_layers: 0; accepted: null")
        return {}
    if layers > trunk.depth:
        raise UserError(
            f"heads.shared_layers: {layers} is more than the {trunk.depth} layers of {trunk.name}; accepted: 0 to "
            f"{trunk.depth}"
        )
    if settings["kind"] == "chain":
        raise UserError(
            f"heads.shared_layers: {layers} is not accepted with heads.kind: chain, which reads states of its own; "
            "accepted: 0, or another kind"
        )
    if trunk.device.type != "meta":
        _check(trunk, layers)
    return {"shared_layers": layers, "adapter_rank": rank or RANK}


def _check(trunk: Trunk, layers: int) -> None:
    """Proves on a few tokens that the trunk is the same in two parts."""
    ids = torch.arange(1, 13, device=trunk.device).remainder(trunk.tokens or trunk.config.vocab_size).view(1, -1)
    positions = torch.arange(ids.shape[1], device=trunk.device)[None]
    ours, theirs = trunk.states(ids, position_ids=positions, before_last=layers)[0], trunk.hidden(ids)
    error = ((ours - theirs).abs().max() / theirs.abs().max().clamp_min(1e-6)).item()
    if not error <= (1e-4 if trunk.dtype == torch.float32 else 5e-2):
        raise UnsupportedModel(
            f"heads.shared_layers: {layers} is not accepted for {trunk.name}, whose last layers give something else "
            f"when they run apart from the others (relative difference {error:.1e}); accepted: 0"
        )


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
