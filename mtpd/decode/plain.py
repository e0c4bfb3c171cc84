"""Text of transformers' own `generate`: what a model writes by itself, and what rivals of this package write."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel


def plain_texts(
    model: PreTrainedModel,
    ids: torch.Tensor,
    *,
    max_new_tokens: int,
    ends: Collection[int] = (),
    mask: torch.Tensor | None = None,
    warped: tuple[float, float] | None = None,
    assistant_model: PreTrainedModel | None = None,
    **drafts: Any,
) -> torch.Tensor:
    """Prompts [B, T] with what transformers' `generate` writes after them.

    Args:
        ends: ids that end a text; none: texts have `max_new_tokens` tokens.
        mask: 0 where a prompt is padded on the left [B, T]; None where all are of one length.
        warped: temperature and top-p; None is greedy.
        assistant_model: a smaller model that drafts.
        drafts: settings of `generate` that say what drafts; without any, nothing does.
    """
    ids_of_ends = sorted(ends)
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=warped is not None,
        temperature=warped[0] if warped else 1.0,
        top_p=warped[1] if warped else 1.0,
        top_k=0,
        eos_token_id=ids_of_ends or None,
        pad_token_id=ids_of_ends[0] if ids_of_ends else 0,
        **drafts,
    )
    further: dict[str, Any] = {} if assistant_model is None else {"assistant_model": assistant_model}
    mask = torch.ones_like(ids) if mask is None else mask
    with plain_generation(model), torch.inference_mode():
        texts: torch.Tensor = model.generate(ids, attention_mask=mask, generation_config=config, **further)
    return texts


@contextmanager
def plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Within it `model.generate` knows no settings but those that it is given.

    Checkpoints bring settings like a repetition penalty; transformers fills them in wherever a call
    leaves them open, and what comes out is then not the model's own distribution.
    """
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
