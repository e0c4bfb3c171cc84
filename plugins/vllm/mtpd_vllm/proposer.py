"""Drafting with several heads on vLLM's V1 runner: all of vLLM on CPUs, and `VLLM_USE_V2_MODEL_RUNNER=0`.

vLLM's own loop there runs one layer, one row a step, over positions that advance. Here a round is what it is on the
V2 runner: each head runs over all rows of the round, on the states of the head before. It is written for exactness:
it waits for the device in each round.
"""

from __future__ import annotations

import inspect
import sys
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from vllm.config import CUDAGraphMode
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.forward_context import set_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.spec_decode import eagle

from mtpd_vllm import ARCHITECTURE
from mtpd_vllm.drafts_log import KEY, DraftsLog
from mtpd_vllm.lookup import LEAST, Lookup
from mtpd_vllm.window import Window, shifted

KNOWN = (
    "self",
    "num_speculative_tokens",
    "target_token_ids",
    "target_positions",
    "target_hidden_states",
    "next_token_ids",
    "token_indices_to_sample",
    "common_attn_metadata",
    "sampling_metadata",
    "mm_embed_inputs",
    "num_rejected_tokens_gpu",
    "slot_mappings",
)
"""Parameters of `EagleProposer.propose`, the method that is replaced."""
NEEDED = ("build_per_group_and_layer_attn_metadata", "_sample_draft_tokens", "load_model")
STOCK = eagle.EagleProposer


class ChainProposer(STOCK):
    """vLLM's proposer; for heads of mtpd, another way to draft."""

    def __init__(self, vllm_config: Any, device: torch.device, runner: Any = None) -> None:
        super().__init__(vllm_config, device, runner)
        self.ours = ARCHITECTURE in (self.draft_model_config.hf_config.architectures or ())
        self.runner = runner
        self.windows: dict[str, Window] = {}
        self.log: DraftsLog | None = None
        self.least = 0

    def load_model(self, target_model: torch.nn.Module) -> None:
        super().load_model(target_model)
        if not self.ours:
            return
        self.model.check_base()
        # Heads never run past the newest token, and have to see every round to have all keys and values.
        self.runner.effective_drafter_max_model_len = self.max_model_len + self.model.depth
        settings = self.vllm_config.additional_config
        settings = settings if isinstance(settings, dict) else {}
        if settings.get(KEY) and get_tensor_model_parallel_rank() == 0:
            self.log = DraftsLog(settings[KEY])
        self.least = settings.get(LEAST, 0)
        if self.least and self._enable_probabilistic_draft_probs:
            raise ValueError(
                f"mtpd-vllm: {LEAST} is not accepted with draft_sample_method probabilistic, look-up has no "
                "probabilities; accepted: greedy drafts, with which sampled texts keep the base's distribution too"
            )

    def propose(
        self,
        num_speculative_tokens: int,
        target_token_ids: Tensor,
        target_positions: Tensor,
        target_hidden_states: Tensor,
        next_token_ids: Tensor,
        token_indices_to_sample: Tensor | None,
        common_attn_metadata: CommonAttentionMetadata,
        sampling_metadata: Any,
        mm_embed_inputs: Any = None,
        num_rejected_tokens_gpu: Tensor | None = None,
        slot_mappings: Any = None,
    ) -> Tensor:
        """Drafts after each request. [B, drafts]"""
        if not self.ours:
            return super().propose(
                num_speculative_tokens,
                target_token_ids,
                target_positions,
                target_hidden_states,
                next_token_ids,
                token_indices_to_sample,
                common_attn_metadata,
                sampling_metadata,
                mm_embed_inputs,
                num_rejected_tokens_gpu,
                slot_mappings,
            )
        self.num_speculative_tokens = num_speculative_tokens
        self._last_draft_probs = None
        starts = common_attn_metadata.query_start_loc_cpu.tolist()
        last = [end - 1 for end in starts[1:]] if token_indices_to_sample is None else token_indices_to_sample.tolist()
        names = self.runner.input_batch.req_ids[: len(last)]
        tokens, positions, newest = (each.tolist() for each in (target_token_ids, target_positions, next_token_ids))
        self.windows = {name: window for name, window in self.windows.items() if name in self.runner.requests}

        ids: list[int] = []
        states: list[Tensor] = []
        begins: list[int] = []
        ends = [0]
        ahead: list[list[int]] = []
        for row, name in enumerate(names):
            first, place = starts[row], positions[starts[row]]
            rows = slice(first, last[row] + 1)
            known = self._prompt_ahead(row, name, positions[last[row]] + 1)
            window = self._window(name, place)
            read, hidden, begin = window.extend(
                place, tokens[rows], target_hidden_states[rows], known[0] if known else newest[row]
            )
            ids += read
            states.append(hidden)
            begins.append(begin)
            ends.append(len(ids))
            ahead.append(known[1:] if known else window.looked_up())
        drafts = self._draft(ids, torch.cat(states), begins, ends, ahead, common_attn_metadata, sampling_metadata)
        for row, name in enumerate(names):
            window = self.windows[name]
            window.read = drafts[row, : self.model.depth - 1].tolist()
            if self.log is not None and not self.runner.discard_request_mask.np[row]:
                prompt = self.runner.requests[name].prompt_token_ids
                known = len(window.text) - len(prompt)
                self.log.add(name, prompt, known, drafts[row].tolist(), looked_up=len(ahead[row]))
        return drafts[:, :num_speculative_tokens]

    def _prompt_ahead(self, row: int, name: str, place: int) -> list[int]:
        """Tokens from a position on that are known though the base has not read them: the rest of a prompt."""
        if not self.runner.discard_request_mask.np[row]:
            return []
        request = self.runner.requests[name]
        return [request.get_token_id(at) for at in range(place, min(place + self.model.depth, request.num_tokens))]

    def _window(self, name: str, first: int) -> Window:
        """The window of a request whose next computed position is given."""
        window = self.windows.get(name)
        if window is None or len(window.text) != first + 1:
            # New, with keys and values of another request up to here; or begun again.
            request = self.runner.requests[name]
            lookup = Lookup(self.least) if self.least else None
            window = Window(self.model.depth, [request.get_token_id(at) for at in range(first)], lookup=lookup)
            self.windows[name] = window
        return window

    def _draft(
        self,
        ids: list[int],
        hidden: Tensor,
        begins: list[int],
        ends: list[int],
        ahead: list[list[int]],
        batch: CommonAttentionMetadata,
        sampling_metadata: Any,
    ) -> Tensor:
        """Runs the heads, one after the other, over all rows.

        Args:
            ahead: by request, tokens that take the place of the first drafts: the rest of its prompt, or looked up.

        Returns:
            The drafts, or what took their places. [B, K]
        """
        device = self.device
        spans = [range(begin, begin + end - start) for begin, (start, end) in zip(begins, pairwise(ends), strict=True)]
        positions = torch.tensor([place for span in spans for place in span], device=device)
        bounds = torch.tensor(ends, dtype=torch.int32)
        lengths = bounds[1:] - bounds[:-1]
        owner = torch.repeat_interleave(torch.arange(len(begins)), lengths).to(device)
        table = batch.block_table_tensor[: len(begins)]
        blocks = table[owner, positions // self.block_size].long()
        slots = blocks * self.block_size + positions % self.block_size
        reach = torch.tensor(begins, dtype=torch.int32) + lengths
        metadata = CommonAttentionMetadata(
            query_start_loc=bounds.to(device),
            query_start_loc_cpu=bounds,
            seq_lens=reach.to(device),
            seq_lens_cpu_upper_bound=reach,
            num_reqs=len(begins),
            num_actual_tokens=len(ids),
            max_query_len=int(lengths.max()),
            max_seq_len=int(reach.max()),
            block_table_tensor=table,
            slot_mapping=slots,
            causal=True,
        )
        _, layers = self.build_per_group_and_layer_attn_metadata(metadata)
        mapping = dict.fromkeys(self._draft_attn_layer_names, slots)
        read = torch.tensor(ids, dtype=torch.int32, device=device)
        last = (bounds[1:] - 1).to(device).long()
        drafts, chances = [], []
        for place in range(self.model.depth):
            with set_forward_context(
                layers,
                self.vllm_config,
                num_tokens=len(ids),
                cudagraph_runtime_mode=CUDAGraphMode.NONE,
                slot_mapping=mapping,
            ):
                hidden = self.model(input_ids=read, positions=positions, hidden_states=hidden, spec_step_idx=place)
            told = torch.tensor([known[place] if place < len(known) else -1 for known in ahead], device=device)
            if self._enable_probabilistic_draft_probs or (told < 0).any():
                draft, probabilities = self._sample_draft_tokens(hidden[last], sampling_metadata)
                told = torch.where(told < 0, draft, told)
                if probabilities is not None:
                    chances.append(probabilities)
            drafts.append(told)
            read = shifted(read, last, told)
        if chances:
            self._last_draft_probs = torch.stack(chances, dim=1)[:, : self.num_speculative_tokens].contiguous()
        return torch.stack(drafts, dim=1)


def install() -> None:
    """Puts the proposer in the place of vLLM's, where that has the form that is known."""
    if tuple(inspect.signature(STOCK.propose).parameters) != KNOWN or not all(hasattr(STOCK, name) for name in NEEDED):
        return
    eagle.EagleProposer = ChainProposer
    # It may have been imported from there already.
    runner = sys.modules.get("vllm.v1.worker.gpu_model_runner")
    if runner is not None:
        runner.EagleProposer = ChainProposer


def installed() -> bool:
    """Tells whether the V1 runner drafts with this proposer."""
    return eagle.EagleProposer is ChainProposer
