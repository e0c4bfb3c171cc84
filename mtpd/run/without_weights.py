"""A model without its weights: what prompts for another program, such as a server, need of it."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedModel

from mtpd.data import builtin_models
from mtpd.data.find_model import find_adapter, locate
from mtpd.data.models import load_model
from mtpd.data.responses import end_tokens
from mtpd.errors import UserError
from mtpd.recipe import Recipe


def without_weights(recipe: Recipe, name: str | None = None) -> tuple[PreTrainedModel, Any, list[int]]:
    """The model of a recipe on the meta device, its tokenizer, and the tokens that end a text.

    Args:
        name: another model than the recipe's, such as the one that a run left.

    Raises:
        UserError: it cannot be found, or has no tokenizer.
    """
    name = name or recipe.model
    model, tokenizer = load_model(
        name,
        dtype=recipe.dtype,
        device="cpu",
        trust_remote_code=recipe.trust_remote_code,
        base=recipe.model_base,
        config_only=True,
    )
    if tokenizer is None:
        raise UserError(f"model: {name} has no tokenizer here; accepted: a model that has one")
    model.generation_config = _generation_config(recipe, name) or model.generation_config
    return model, tokenizer, end_tokens(model, tokenizer)


def _generation_config(recipe: Recipe, name: str) -> GenerationConfig | None:
    """The checkpoint's generation settings, which name the tokens that end a text."""
    adapter = find_adapter(name, recipe.model_base, weights=False)
    name = name if adapter is None else adapter.base
    if name == "tiny":
        return None
    name = str(builtin_models.demo_directory()) if name == "demo" else name
    place, _, options = locate(name, weights=False)
    try:
        return GenerationConfig.from_pretrained(place, **options)
    except OSError:
        return None
