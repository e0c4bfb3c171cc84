"""The model of a pretraining run, new or a checkpoint, and its heads with their first weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from mtpd.data.models import load_model, real_tokens, trunk_fingerprint
from mtpd.errors import UserError
from mtpd.heads import Heads, build_heads, configure_heads, load_heads, start_heads
from mtpd.heads.config import read_config
from mtpd.pretrain.no_heads import NoHeads
from mtpd.pretrain.tokenizer import load_tokenizer, tokenizer_of
from mtpd.recipe import PretrainRecipe
from mtpd.trunk import Trunk


def model_of(recipe: PretrainRecipe, texts: Iterable[str], *, device: torch.device) -> tuple[Trunk, Any]:
    """Makes or loads the model in float32, and gives its tokenizer with it.

    Raises:
        UserError: no such model or tokenizer, or the two do not fit.
    """
    if isinstance(recipe.model, str):
        model, tokenizer = load_model(recipe.model, dtype="float32", device=str(device))
        if recipe.tokenizer is not None:
            tokenizer = load_tokenizer(recipe.tokenizer)
            rows = model.get_output_embeddings().weight.shape[0]
            if len(tokenizer) > rows:
                raise UserError(
                    f"tokenizer: {recipe.tokenizer} has {len(tokenizer)} tokens, and {recipe.model} has rows for "
                    f"{rows}; accepted: null for the checkpoint's own"
                )
        tokens = real_tokens(model, tokenizer)
    else:
        tokenizer = tokenizer_of(recipe, texts)
        torch.manual_seed(recipe.seed)
        model = new_model(recipe.model, tokenizer, row_length=recipe.data.row_length).to(device)
        tokens = len(tokenizer)
    trunk = Trunk(model, tokens=tokens)
    if trunk.quantised:
        raise UserError(
            f"model: {recipe.model} has quantised weights, which are not trained; accepted: the same model in 16 bits"
        )
    trunk.check()
    return trunk, tokenizer


def new_model(config: dict[str, Any], tokenizer: Any, *, row_length: int) -> Any:
    """Makes a model with random weights, and with the vocabulary and special tokens of the tokenizer.

    Raises:
        UserError: a configuration that transformers refuses, or one with fewer rows than tokens.
    """
    settings = dict(config)
    kind = settings.pop("model_type", None)
    if not isinstance(kind, str):
        raise UserError("model.model_type: is missing; accepted: an architecture of transformers, such as llama")
    settings.setdefault("vocab_size", len(tokenizer))
    settings.setdefault("max_position_embeddings", 4 * row_length)
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    try:
        made = AutoConfig.for_model(kind, **{**special, **settings})
    except Exception as error:
        raise UserError(f"model: {str(error).splitlines()[0]}; accepted: a configuration of transformers") from error
    if made.vocab_size < len(tokenizer):
        raise UserError(
            f"model.vocab_size: {made.vocab_size} is less than the tokenizer has; accepted: at least {len(tokenizer)}"
        )
    try:
        return AutoModelForCausalLM.from_config(made, dtype=torch.float32)
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"model: {str(error).splitlines()[0]}; accepted: a configuration of transformers") from error


def heads_of(recipe: PretrainRecipe, trunk: Trunk, batches: Callable[[], Iterable[dict[str, Any]]]) -> Heads:
    """Makes the heads, with their first weights in float32.

    Args:
        batches: gives rows with the trunk's states, for starts that are fitted.

    Raises:
        UserError: heads that this model cannot have.
    """
    if not recipe.heads.depth:
        return NoHeads(trunk)
    section = recipe.heads.whole()
    new = not isinstance(recipe.model, str)
    config = configure_heads(section.model_dump(), trunk, vocabulary=0, fingerprint="")
    start: str | None = section.init
    if start is None and new:
        # There is nothing in a new model yet to fit to.
        start = "random" if config.source_layers else "identity"
    heads = build_heads(trunk, config)
    source = None
    if section.source is not None:
        # The trunk is here in float32, whatever its checkpoint is in.
        formats = (torch.float32, torch.bfloat16, torch.float16)
        known = {trunk_fingerprint(trunk.model, dtype) for dtype in formats}
        of_heads = read_config(section.source).trunk
        source = load_heads(section.source, trunk, fingerprint=of_heads if of_heads in known else min(known))
    start_heads(heads, trunk, start, batches, seed=recipe.seed, source=source)
    return heads
