"""Chain heads around vLLM's own decoder layers (DeepSeek-V3 form, arXiv 2412.19437, section 2.2).

Head k reads, at position t, the embedding of token t+k and the state of head k-1 (of the base for k = 1), and gives a
state for the base's output head and for the next head. Both runners call it by depth, with `spec_step_idx`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.llama import LlamaDecoderLayer
from vllm.model_executor.models.mistral import MistralDecoderLayer
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer
from vllm.model_executor.models.utils import get_draft_quant_config, maybe_prefix

from mtpd_vllm import proposer
from mtpd_vllm.checks import refused_base, refused_setting

SHARDS = {
    "self_attn.q_proj.": ("self_attn.qkv_proj.", "q"),
    "self_attn.k_proj.": ("self_attn.qkv_proj.", "k"),
    "self_attn.v_proj.": ("self_attn.qkv_proj.", "v"),
    "mlp.gate_proj.": ("mlp.gate_up_proj.", 0),
    "mlp.up_proj.": ("mlp.gate_up_proj.", 1),
}
"""Matrices that vLLM keeps together, by their names in the file."""
OWN = {"enorm": "enorm", "hnorm": "hnorm", "eh_proj": "eh_proj", "shared_head.norm": "norm"}
"""What a head has beside its layer, by the names in the file."""
TOLERANCE = 0.02
"""Share of its size by which the embedding of the base may differ from the one that the heads learned with: rounding
to another number format is below."""


class _Unquantised:
    """A decoder layer that is not quantised as the base is, but as the heads are: not at all."""

    def get_quant_config(self, vllm_config: VllmConfig) -> Any:
        return get_draft_quant_config(vllm_config)


class LlamaBlock(_Unquantised, LlamaDecoderLayer):
    """A layer of Llama."""


class MistralBlock(_Unquantised, MistralDecoderLayer):
    """A layer of Mistral."""


def block(vllm_config: VllmConfig, config: Any, prefix: str) -> nn.Module:
    """Makes a decoder layer of the base's family."""
    if config.base_model_type in ("llama", "mistral"):
        kind = LlamaBlock if config.base_model_type == "llama" else MistralBlock
        return kind(vllm_config=vllm_config, prefix=prefix, config=config)
    layers = {"qwen2": Qwen2DecoderLayer, "qwen3": Qwen3DecoderLayer}
    if config.base_model_type not in layers:
        accepted = ", ".join(["llama", "mistral", *layers])
        raise ValueError(f"mtpd-vllm: base_model_type {config.base_model_type} is not known; accepted: {accepted}")
    return layers[config.base_model_type](
        config,
        cache_config=vllm_config.cache_config,
        quant_config=get_draft_quant_config(vllm_config),
        prefix=prefix,
    )


class ChainHead(nn.Module):
    """One head: two norms, the projection of [embedding ; hidden], a decoder layer, and a norm."""

    def __init__(self, vllm_config: VllmConfig, config: Any, prefix: str) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm = RMSNorm(size, eps=eps)
        self.hnorm = RMSNorm(size, eps=eps)
        self.eh_proj = ReplicatedLinear(2 * size, size, bias=False, return_bias=False, prefix=f"{prefix}.eh_proj")
        self.block = block(vllm_config, config, prefix)
        self.norm = RMSNorm(size, eps=eps)

    def forward(self, embeds: Tensor, hidden: Tensor, positions: Tensor) -> Tensor:
        mixed = self.eh_proj(torch.cat([self.enorm(embeds), self.hnorm(hidden)], dim=-1))
        hidden, residual = self.block(positions=positions, hidden_states=mixed, residual=None)
        return self.norm(hidden, residual)[0]

    def share(self, first: ChainHead) -> None:
        """Takes the parameters of another head; keys and values stay its own."""
        for ours, theirs, apart in (
            (self, first, "block"),
            (self.block, first.block, "self_attn"),
            (self.block.self_attn, first.block.self_attn, "attn"),
        ):
            for name, module in theirs.named_children():
                if name != apart:
                    setattr(ours, name, module)


class Chain(nn.Module):
    """The heads, as many as tokens are drafted. vLLM adds the base's embedding as `embed_tokens`."""

    def __init__(self, vllm_config: VllmConfig, config: Any, depth: int, prefix: str) -> None:
        super().__init__()
        layers = config.num_hidden_layers
        # vLLM finds keys and values by the layer's number.
        self.chain = nn.ModuleList(
            ChainHead(vllm_config, config, maybe_prefix(prefix, f"layers.{layers + place}")) for place in range(depth)
        )
        for place in range(depth):
            first = config.block_of.index(config.block_of[place])
            if first < place:
                self.chain[place].share(self.chain[first])


class MtpdChainMTP(nn.Module):
    """The draft model.

    Raises:
        ValueError: settings or a base that it is not for.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        speculative = vllm_config.speculative_config
        self.config = config = speculative.draft_model_config.hf_config
        refusal = refused_setting(
            vllm_config, config.num_nextn_predict_layers, drafter=proposer.installed()
        ) or refused_base(vllm_config.model_config.hf_text_config, config)
        if refusal:
            raise ValueError(refusal)
        self.depth = speculative.num_speculative_tokens
        self.model = Chain(vllm_config, config, self.depth, maybe_prefix(prefix, "model"))
        self.own_rows = config.draft_vocab_size > 0
        columns = config.draft_vocab_size or config.vocab_size
        if self.own_rows:
            # What tells vLLM to leave the output head as it is; the name alone would do.
            self.has_own_lm_head = True
            self.lm_head = ParallelLMHead(columns, config.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
            self.register_buffer("draft_ids", torch.zeros(columns, dtype=torch.long), persistent=False)
        self.logits_processor = LogitsProcessor(columns)
        self.sample: tuple[Tensor, Tensor] | None = None

    def embed_input_ids(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Gives the base's embedding of tokens."""
        return self.model.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        hidden_states: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        spec_step_idx: int = 0,
    ) -> Tensor:
        """Computes the states of a depth, counted from 0, from tokens and the states of the depth before."""
        # On the V2 runner the first call is the one that measures memory.
        self.check_base()
        if inputs_embeds is None:
            inputs_embeds = self.model.embed_tokens(input_ids)
        return self.model.chain[spec_step_idx](inputs_embeds, hidden_states, positions)

    def compute_logits(self, hidden_states: Tensor, spec_step_idx: int = 0) -> Tensor | None:
        """Computes logits over all tokens; those that are not drafted have -inf."""
        logits = self.logits_processor(self.lm_head, hidden_states)
        if logits is None or not self.own_rows:
            return logits
        every = logits.new_full((len(logits), self.config.vocab_size), float("-inf"))
        every[:, self.draft_ids] = logits
        return every

    def get_top_tokens(self, hidden_states: Tensor, spec_step_idx: int = 0) -> Tensor:
        """Gives the likeliest token of each row, without logits of all ranks in one place."""
        top = self.logits_processor.get_top_tokens(self.lm_head, hidden_states)
        return self.draft_ids[top] if self.own_rows else top

    def check_base(self) -> None:
        """Compares the base's embedding with a few rows of the one that the heads were trained with, once.

        Raises:
            ValueError: it is another.
        """
        if self.sample is None:
            return
        (ids, rows), self.sample = self.sample, None
        device = self.model.chain[0].enorm.weight.device
        found = self.model.embed_tokens(ids.to(device)).float().cpu()
        away = float((found - rows.float()).norm() / rows.float().norm())
        if not away <= TOLERANCE:
            raise ValueError(
                f"mtpd-vllm: these heads are for another base: its embedding is {away:.0%} away from the one served; "
                "accepted: the base that README.md in their directory names, or the same quantised"
            )

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Loads what an export holds.

        Raises:
            ValueError: naming a tensor that is missing or not known.
        """
        params = dict(self.named_parameters())
        # A parameter that is made of several matrices is whole when all are there.
        parts = {name: 3 if ".qkv_proj." in name else 2 if ".gate_up_proj." in name else 1 for name in params}
        sample: dict[str, Tensor] = {}
        for name, tensor in weights:
            if name.startswith("base_sample."):
                sample[name.removeprefix("base_sample.")] = tensor.cpu().clone()
            elif name == "draft_ids" and self.own_rows:
                self.draft_ids.copy_(tensor)
            elif (target := self._target(name)) is not None:
                ours, shard = target
                if ours not in params:
                    raise ValueError(f"mtpd-vllm: {name} is not known in heads for {self.config.base_model_type}")
                load = getattr(params[ours], "weight_loader", default_weight_loader)
                load(params[ours], tensor, *([] if shard is None else [shard]))
                parts[ours] -= 1
        missing = sorted(name for name, left in parts.items() if left > 0)
        if missing:
            raise ValueError(f"mtpd-vllm: {missing[0]} is missing in the heads' directory, or a part of it")
        if sample:
            self.sample = sample["ids"], sample["rows"]
        return set(params)

    def _target(self, name: str) -> tuple[str, Any] | None:
        """Finds the parameter and the part of it that a tensor of the file is; None for heads that do not draft."""
        found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(\w+)", name)
        if found is None:
            return name, None
        place = int(found[1]) - self.config.num_hidden_layers
        blocks = self.config.block_of
        if place >= self.depth or blocks.index(blocks[place]) < place:
            return None
        module, kind = found[2], found[3]
        if module in OWN:
            return f"model.chain.{place}.{OWN[module]}.{kind}", None
        ours, shard = SHARDS.get(f"{module}.", (f"{module}.", None))
        return f"model.chain.{place}.block.{ours}{kind}", shard
