"""A frozen causal LM as the heads see it.

The trunk gives four things: hidden states after its final norm, embeddings, the unembedding
with all of its arithmetic (scale, bias, soft-capping), and a factory of *blocks*: one-layer
decoders of the trunk's own class. Because a block is a whole decoder of that class, its
attention masks, rotary variants, sliding windows and key/value caches are the architecture's
own code, and a new architecture needs none of ours.

Shape legend: B batch, T positions, D hidden size, V vocabulary rows, M draft-vocabulary rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from mtpd.errors import UnsupportedModel
from mtpd.quantised import has_quantised, is_quantised, lent, matrix, shapes, weights

GROUPED = "grouped_mm_in_autocast"
"""Name under which transformers has `experts_in_autocast`."""
ATTENDING = ("full_attention", "sliding_attention", "chunked_attention")
"""Kinds of layers that look back at single tokens."""


@dataclass(frozen=True)
class Unembedding:
    """The main head's arithmetic: `softcap * tanh(scale * (h Wᵀ + b) / softcap)`.

    `weight` is [V, D] and frozen; `rows` below restrict it to a draft vocabulary. `vocabulary`
    counts the rows that are real tokens: rows past it only pad the matrix to a round size.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    vocabulary: int | None = None

    def select(self, rows: Tensor | None) -> Unembedding:
        """The same arithmetic over a subset of tokens, or over all that are not padding."""
        if rows is None:
            real = self.vocabulary or self.weight.shape[0]
            return Unembedding(
                self.weight[:real], None if self.bias is None else self.bias[:real], self.scale, self.softcap
            )
        rows = rows.to(self.weight.device)
        bias = None if self.bias is None else self.bias[rows]
        return Unembedding(self.weight[rows].contiguous(), bias, self.scale, self.softcap)

    def finish(self, products: Tensor) -> Tensor:
        """Applies what follows matmul and bias: logit scale, then soft-capping."""
        if self.scale != 1.0:
            products = products * self.scale
        if self.softcap is not None:
            products = torch.tanh(products / self.softcap) * self.softcap
        return products

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., D]."""
        products = nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias)
        return self.finish(products)


class Trunk(nn.Module):
    """A causal LM with its parameters frozen and its modules in eval mode for good.

    Args:
        model: a transformers causal LM with a decoder of identical-class layers.
        tokens: how many vocabulary rows are real tokens (the tokenizer's length), or None for all.

    Raises:
        UnsupportedModel: the architecture lacks what a chain head is built from; the message
            names the architecture and the reason.
    """

    def __init__(self, model: PreTrainedModel, *, tokens: int | None = None) -> None:
        super().__init__()
        self.name = type(model).__name__
        decoder = getattr(model, "get_decoder", lambda: None)()
        for part in ("layers", "norm", "rotary_emb"):
            if not hasattr(decoder, part):
                raise UnsupportedModel(
                    f"{self.name}: cannot build heads for it: its decoder has no `{part}` "
                    "(a decoder-only model with rotary positions is needed)"
                )
        if model.get_output_embeddings() is None:
            raise UnsupportedModel(f"{self.name}: cannot build heads for it: it has no output head to learn from")
        self.model = model
        self.tokens = tokens
        self.quantised = has_quantised(model)
        self._matrix: Tensor | None = None
        model.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Trunk:
        """Stays in eval mode whatever a trainer asks for: the teacher must not change."""
        return super().train(False)

    @property
    def decoder(self) -> Any:
        return self.model.get_decoder()

    @property
    def config(self) -> PretrainedConfig:
        return self.decoder.config

    @property
    def depth(self) -> int:
        """Number of decoder layers."""
        return len(self.decoder.layers)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def context(self) -> int:
        """The longest sequence, in tokens, that the model was made for."""
        return int(getattr(self.config, "max_position_embeddings", 0)) or 2**31

    @property
    def recurrent(self) -> bool:
        """Whether layers carry a state from token to token (linear attention) instead of looking back at them.

        Such a state cannot be told where a document begins, and cannot be taken back after a rejected draft.
        """
        kinds = getattr(self.config, "layer_types", None) or []
        return any(kind not in ATTENDING for kind in kinds)

    @property
    def partitioned(self) -> bool:
        """Whether each process holds a share of every layer: then all have to run the trunk equally often."""
        return any(hasattr(parameter, "ds_id") for parameter in self.decoder.layers.parameters())

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def unembedding(self) -> Unembedding:
        head = self.model.get_output_embeddings()
        config = self.model.config.get_text_config(decoder=True)
        scale = 1.0 / float(getattr(config, "logits_scaling", None) or 1.0)
        scale *= float(getattr(config, "logit_scale", None) or 1.0)
        softcap = getattr(config, "final_logit_softcapping", None)
        weight, bias, rows = self._unembedding_matrix(head), getattr(head, "bias", None), int(config.vocab_size)
        if weight.shape[0] > rows:
            # What lies below are heads for later tokens.
            weight, bias = weight[:rows], None if bias is None else bias[:rows]
        return Unembedding(weight, bias, scale, softcap, self.tokens)

    def _unembedding_matrix(self, head: Any) -> Tensor:
        """The weight of the output head; of a quantised one what it multiplies with, which is kept."""
        if not self.quantised or not is_quantised(head):
            weight: Tensor = head.weight
            return weight
        if self._matrix is None or self._matrix.device != self.device:
            self._matrix = matrix(head, dtype=self.dtype, device=self.device)
        return self._matrix

    @torch.no_grad()
    def hidden(
        self,
        input_ids: Tensor,
        *,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | dict[str, Tensor] | None = None,
        before_last: int = 0,
    ) -> Tensor:
        """Hidden states [B, T, D] after the final norm, or those that the last `before_last` layers begin with.

        Several documents may share a row: `position_ids` that start again at 0 mark the borders
        and attention stays inside them. A mask is [B, T] or, ready made, what `mtpd.slots` gives.
        """
        decoder = self._part(0, self.depth - before_last) if before_last else self.decoder
        return decoder(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=attention_mask,
            use_cache=False,
        ).last_hidden_state

    @torch.no_grad()
    def states(
        self, input_ids: Tensor, *, position_ids: Tensor | None = None, before_last: int = 0
    ) -> tuple[Tensor, Tensor]:
        """Hidden states after the final norm, and those that the last `before_last` layers begin with; one pass."""
        below = self.hidden(input_ids, position_ids=position_ids, before_last=before_last)
        if not before_last:
            return below, below
        top = self.top(before_last)
        return top(inputs_embeds=below, position_ids=position_ids, use_cache=False).last_hidden_state, below

    def top(self, layers: int) -> nn.Module:
        """The last layers and the final norm as a decoder of their own, around the trunk's parameters.

        Called with `inputs_embeds` [B, T, D], what `hidden(before_last=layers)` gives, it gives states after the norm.
        Its layers keep their numbers: a cache for it has as many as one for the trunk.
        """
        part = self._part(self.depth - layers, self.depth)
        # It is given states. Without embeddings a copy of it is small.
        part.__dict__["_modules"]["embed_tokens"] = None
        if hasattr(part, "embedding_multiplier"):
            # What it is given has been through it.
            part.embedding_multiplier = 1.0
        return part

    def _part(self, first: int, end: int) -> Any:
        """Layers `first` to `end` around the same parameters, with what stands before or behind them at either side."""
        part = copy.copy(self.decoder)
        modules = dict(part._modules) | {"layers": nn.ModuleList(self.decoder.layers[first:end])}
        if end < self.depth:
            modules["norm"] = nn.Identity()
        part.__dict__["_modules"] = modules
        part.config = _layers_of(self.config, first, end, depth=self.depth)
        return part

    def embed(self, input_ids: Tensor) -> Tensor:
        """Token embeddings [..., D] as the first decoder layer receives them; gradient where they are trained."""
        embeddings = self.model.get_input_embeddings()(input_ids)
        return embeddings * float(getattr(self.config, "embedding_multiplier", None) or 1.0)

    def block(self, source_layer: int) -> nn.Module:
        """A new one-layer decoder, of the kind of the trunk's layer `source_layer` (0-based), with its final norm.

        Called with `inputs_embeds` [B, T, D] it gives hidden states [B, T, D] after the norm.
        Parameters are newly initialised, trainable and in float32.
        """
        decoder_class: Callable[[PretrainedConfig], nn.Module] = type(self.decoder)
        block: Any = decoder_class(self._block_config(source_layer))
        block.embed_tokens = None
        wanted = shapes(self.decoder.layers[source_layer], block.layers[0])
        built = {name: p.shape for name, p in block.layers[0].named_parameters()}
        if wanted != built:
            odd = sorted(name for name in wanted.keys() | built.keys() if wanted.get(name) != built.get(name))
            raise UnsupportedModel(
                f"{self.name}: cannot build heads for it: a decoder of one layer does not repeat layer "
                f"{source_layer} (differs in {', '.join(odd[:3])})"
            )
        return block.float().requires_grad_(True)

    def copy_layer(self, source_layer: int, block: Any) -> None:
        """Gives a block of `block` the weights of a layer of the trunk; of a quantised one what it multiplies with."""
        layer = block.layers[0]
        layer.load_state_dict(weights(self.decoder.layers[source_layer], layer, dtype=self.dtype, device=self.device))

    def _block_config(self, source_layer: int) -> PretrainedConfig:
        config = _layers_of(self.config, source_layer, source_layer + 1, depth=self.depth)
        if isinstance(getattr(config, "first_k_dense_replace", None), int):
            # Counts the dense layers before those with experts; the block's only layer has the source layer's side.
            config.first_k_dense_replace = max(0, config.first_k_dense_replace - source_layer)
        config.num_hidden_layers = 1
        config.vocab_size = 1
        config.pad_token_id = None
        if hasattr(config, "embedding_multiplier"):
            config.embedding_multiplier = 1.0
        config._attn_implementation = self.config._attn_implementation
        if config._experts_implementation == "grouped_mm":
            config._experts_implementation = GROUPED
        return config

    @torch.no_grad()
    def check(self) -> None:
        """Proves on a few tokens that the pieces above repeat what the model itself computes.

        Raises:
            UnsupportedModel: naming the piece that differs, so that no head is trained on wrong inputs.
        """
        ids = torch.arange(1, 13, device=self.device).remainder(self.tokens or self.config.vocab_size).view(1, -1)
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
                seen[name] = args[0] if args else kwargs["hidden_states"]

            return hook

        layers = self.decoder.layers
        hooks = [
            layers[0].register_forward_pre_hook(keep("first"), with_kwargs=True),
            layers[-1].register_forward_pre_hook(keep("last"), with_kwargs=True),
        ]
        try:
            logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
        hidden = self.hidden(ids)
        block: Any = self.block(self.depth - 1)
        self.copy_layer(self.depth - 1, block)
        block.norm.load_state_dict(self.decoder.norm.state_dict())
        block.to(device=self.device, dtype=self.dtype).eval()
        try:
            with lent(layers[-1], block.layers[0]) as products:
                again = block(inputs_embeds=seen["last"], use_cache=False).last_hidden_state
        except (AttributeError, TypeError, RuntimeError, AssertionError) as odd:
            # Code that comes with a model may want its own way of being called.
            raise UnsupportedModel(
                f"{self.name}: cannot build heads for it: a decoder of one layer does not run outside of the model "
                f"({type(odd).__name__})"
            ) from odd
        pieces = {
            "embeddings": (self.embed(ids), seen["first"]),
            "logits": (self.unembedding(hidden), logits),
            "last layer": (again, hidden),
            **{f"{name} of the last layer": pair for name, pair in products.items()},
        }
        # Quantised layers round in their own way, and what they are given too.
        rounded = {*products, *(["logits"] if self._matrix is not None else [])}
        for piece, (ours, theirs) in pieces.items():
            scale = theirs.float().abs().max().clamp_min(1e-6)
            error = ((ours.float() - theirs.float()).abs().max() / scale).item()
            exact = self.dtype == torch.float32 and piece.split()[0] not in rounded
            if not error <= (1e-4 if exact else 5e-2):
                raise UnsupportedModel(
                    f"{self.name}: cannot build heads for it: its {piece} cannot be repeated outside the model "
                    f"(relative difference {error:.1e})"
                )


def experts_in_autocast(experts: nn.Module, hidden_states: Tensor, *routing: Tensor) -> Tensor:
    """Computes experts with transformers' grouped products, in the format of autocast where that is enabled.

    Autocast does not know these products: they would run in the format of the weights, which is float32 in training.
    """
    kind = hidden_states.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        cast = copy.copy(experts)
        cast.__dict__["_parameters"] = {
            name: None if each is None else each.to(dtype) for name, each in experts._parameters.items()
        }
        experts, hidden_states = cast, hidden_states.to(dtype)
    return grouped_mm_experts_forward(experts, hidden_states, *routing)


ALL_EXPERTS_FUNCTIONS.register(GROUPED, experts_in_autocast)


def _layers_of(config: PretrainedConfig, first: int, end: int, *, depth: int) -> PretrainedConfig:
    """A copy in which settings by layer (layer types, layers without rotary positions, ...) are those of some."""
    part = copy.deepcopy(config)
    for key, value in list(part.to_dict().items()):
        if isinstance(value, list) and len(value) == depth:
            setattr(part, key, value[first:end])
    return part


class Tap:
    """A decoder around the same parameters that keeps what its layer `layer` began with in its last pass.

    Attributes:
        decoder: to be called in place of the given one.
        seen: [B, T, D].
    """

    seen: Tensor

    def __init__(self, decoder: Any, layer: int) -> None:
        layers = list(decoder.layers)
        tapped = copy.copy(layers[layer])
        inside = tapped.forward

        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.seen = hidden_states
            return inside(hidden_states, *args, **kwargs)

        tapped.__dict__["forward"] = forward
        layers[layer] = tapped
        self.decoder = copy.copy(decoder)
        self.decoder.__dict__["_modules"] = dict(decoder._modules) | {"layers": nn.ModuleList(layers)}
