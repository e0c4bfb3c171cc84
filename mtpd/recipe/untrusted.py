"""Recipes of somebody else: what they may not say.

A recipe names models, files to read, a folder to write, and arguments of libraries. One that is not trusted may name
hub ids, what is built in, and paths inside the working directory, links resolved. Code that comes with a model,
trackers, and arguments of the trainer other than plain numbers of the optimisation are refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mtpd.errors import UserError
from mtpd.files import escapes
from mtpd.recipe.rules import DEEPSPEED_PRESETS

PATHS = (
    "model",
    "model_base",
    "output",
    "tokenizer",
    "heads.source",
    "heads.vocabulary",
    "data.prompts",
    "data.held_out",
    "data.hidden_states",
    "data.responses",
    "data.texts",
    "data.given.*.prompts",
    "evaluation.extra.*",
)
"""Keys whose text may be a path."""

PLAIN_ARGUMENTS = (
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "dataloader_drop_last",
    "full_determinism",
    "logging_first_step",
    "max_grad_norm",
    "save_total_limit",
    "torch_empty_cache_steps",
    "weight_decay",
)
"""Arguments of transformers.TrainingArguments that change numbers alone."""


def refuse_untrusted(values: Mapping[str, Any], *, source: str) -> None:
    """Checks what a recipe file says, before it is merged with what the user says.

    Raises:
        UserError: naming the key, its value and what is accepted.
    """
    for key, value in _leaves(values):
        if key == "trust_remote_code" and value is not False:
            raise _refused(key, value, "false", source)
        if key.startswith("train.report_to"):
            raise _refused(key, value, "[]", source)
        if key == "train.deepspeed" and value is not None and value not in DEEPSPEED_PRESETS:
            raise _refused(key, value, "the name of a preset", source)
        if key.startswith("train.arguments."):
            name = key.removeprefix("train.arguments.")
            if name not in PLAIN_ARGUMENTS or not isinstance(value, bool | int | float):
                raise _refused(key, value, f"numbers for {', '.join(PLAIN_ARGUMENTS)}", source)
        if key == "data.responses" and str(value).startswith("http"):
            raise _refused(key, value, "trunk, given, or a file in this folder", source)
        path = isinstance(value, str) and any(_matches(key, pattern) for pattern in PATHS)
        if path and escapes(value, Path.cwd()):
            raise _refused(key, value, "a name, or a path in this folder without links that lead out of it", source)


def refuse_code(recipe: Any, *, source: str) -> None:
    """Raises UserError if a recipe, such as that of a run of somebody else, runs code that comes with its model."""
    if recipe.trust_remote_code:
        raise _refused("trust_remote_code", "true", "false", source)


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys with their values; items of lists have their number as key."""
    items = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        yield prefix, value
        return
    for key, part in items:
        yield from _leaves(part, f"{prefix}.{key}".removeprefix("."))


def _matches(key: str, pattern: str) -> bool:
    parts, wanted = key.split("."), pattern.split(".")
    return len(parts) == len(wanted) and all(w in ("*", p) for p, w in zip(parts, wanted, strict=True))


def _refused(key: str, value: Any, accepted: str, source: str) -> UserError:
    return UserError(f"{key}: {value} is not accepted in a recipe that is not trusted ({source}); accepted: {accepted}")
