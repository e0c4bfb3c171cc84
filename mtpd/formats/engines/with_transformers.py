"""transformers, in this process: `generate(use_mtp=True)` on an exported directory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.generation.candidate_generator import MTPCandidateGenerator
from transformers.modeling_layers import MtpModel

from mtpd.errors import UserError
from mtpd.formats.directory import Checkpoint
from mtpd.formats.engines.result import Round, Served
from mtpd.formats.find_heads import Native, find_heads


def serve(
    folder: Path, prompts: Sequence[Sequence[int]], *, max_new_tokens: int, progress: Callable[[], object]
) -> Served:
    """Greedy texts of `max_new_tokens` tokens, end tokens or not, drafting as deep as the checkpoint has heads.

    Args:
        progress: called after each text.

    Raises:
        UserError: transformers cannot read the directory's heads.
    """
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    depth = getattr(model.config.get_text_config(), "num_mtp_layers", None)
    if not depth:
        raise UserError(f"{folder}: transformers finds no MTP layers in it; accepted: an export --to transformers")
    name_heads(model, find_heads(Checkpoint(folder)))
    texts: list[list[int]] = []
    every: list[list[Round]] = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        rounds: list[Round] = []
        with patch.object(MTPCandidateGenerator, "get_candidates", _recording(rounds, len(prompt))):
            output = GenerationMixin.generate(
                model,
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=max_new_tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                use_mtp=True,
            )
        text = output[0, len(prompt) :].tolist()
        texts.append(text)
        progress()
        every.append(rounds)
    return Served.of_rounds(f"transformers {transformers.__version__}", texts, every, depth)


def name_heads(model: Any, native: Native) -> None:
    """Tells transformers where MTP layers are: it looks for tensors whose names the main model ignores."""
    model._keys_to_ignore_on_load_unexpected = sorted({_pattern(name) for name in native.raw})


def mtp_model(model: Any, folder: Path, native: Native) -> MtpModel:
    """The MTP layers in a directory, beside a model with their config, as `generate(use_mtp=True)` loads them."""
    name_heads(model, native)
    model.config.name_or_path = str(folder)
    return MtpModel.from_pretrained(model).eval()


def _recording(rounds: list[Round], start: int) -> Any:
    """`get_candidates` that keeps what was drafted, and after how many tokens."""
    original = MTPCandidateGenerator.get_candidates

    def get_candidates(self: Any, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        candidates, logits = original(self, input_ids, *args, **kwargs)
        known = input_ids.shape[1]
        if candidates.shape[1] > known:
            rounds.append((known - start, candidates[0, known:].tolist()))
        return candidates, logits

    return get_candidates


def _pattern(name: str) -> str:
    """The layer that a tensor lies in, or the tensor itself, as a regular expression."""
    pieces = name.split(".")
    last = max((place for place, piece in enumerate(pieces) if piece.isdigit()), default=len(pieces) - 1)
    first = next((place for place, piece in enumerate(pieces) if piece.isdigit()), last)
    return r"\.".join(pieces[: first + 1]) + (r"\." if first + 1 < len(pieces) else "")
