"""Shared by the steps of one call: recipe, directory, model and tokenizer."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from mtpd.data import builtin_models
from mtpd.data.models import (
    context_of,
    load_model,
    real_tokens,
    resolve_device,
    resolve_dtype,
    trunk_fingerprint,
)
from mtpd.data.responses import end_tokens
from mtpd.errors import UserError
from mtpd.evaluate.compare import console
from mtpd.formats.importing import native_form
from mtpd.heads import KINDS, configure_heads
from mtpd.parallel import ranks
from mtpd.parallel.partitioned_trunk import is_apart, trunk_apart
from mtpd.parallel.sequence import check_split
from mtpd.recipe import Recipe, parse_recipe
from mtpd.run.directory import RunDirectory
from mtpd.trunk import Trunk

logger = logging.getLogger(__name__)

SHORTEST_ROW = 32
"""Tokens of a row that a recipe accepts."""


@dataclass
class Session:
    """Shared by the steps of one call."""

    recipe: Recipe
    run: RunDirectory
    trunk: Trunk
    tokenizer: Any
    fingerprint: str
    ends: list[int]
    progress: bool
    resume: str = "auto"
    """What training goes on from: `auto` for the newest whole checkpoint, or one of the run by name."""
    responses: dict[str, int] = field(default_factory=dict)
    """How many responses the trunk wrote to the training prompts, and how many of them were cut; empty before."""

    @property
    def console(self) -> Console:
        """Console for tables and lines for people."""
        return console(quiet=not self.progress)


def with_native_depth(recipe: Recipe) -> Recipe:
    """The recipe with kind and depth of the model's own heads, where those are what it starts from and it sets none."""
    heads = recipe.heads
    if heads.init != "native":
        return recipe
    further = KINDS[heads.kind].native
    if further is None:
        accepted = ", ".join(kind.name for kind in KINDS.values() if kind.native is not None)
        raise UserError(f"heads.init: native is not accepted for {heads.kind} heads; accepted: {accepted}")
    if not further and {"kind", "depth"} <= heads.model_fields_set:
        return recipe
    form = native_form(recipe.model)
    if "kind" in heads.model_fields_set and heads.kind != form["kind"]:
        raise UserError(f"heads.kind: {heads.kind} is not what {recipe.model} has; accepted: {form['kind']}")
    values = recipe.model_dump(mode="json")
    if "depth" in heads.model_fields_set:
        del form["depth"]
    values["heads"] |= form
    return parse_recipe(values)


def with_fitting_defaults(recipe: Recipe) -> Recipe:
    """The recipe with other defaults where those there are do not fit the model or the device; what it sets stays.

    Rows are as long as the context, where that is shorter, and responses half of it at most. A GPU with a model in 16
    bits decodes it as it is: in float32 it would be there twice, three times as large.

    Raises:
        UserError: as `load_model`, and for keys that do not go with such defaults.
    """
    data, evaluation = recipe.data, recipe.evaluation
    changed: dict[str, dict[str, Any]] = {"data": {}, "evaluation": {}}
    if "row_length" not in data.model_fields_set:
        context = context_of(recipe.model, trust_remote_code=recipe.trust_remote_code, base=recipe.model_base)
        if context and SHORTEST_ROW <= context < data.row_length:
            changed["data"]["row_length"] = context
            for name, section in (("data", data), ("evaluation", evaluation)):
                if "max_new_tokens" not in section.model_fields_set and section.max_new_tokens > context // 2:
                    changed[name]["max_new_tokens"] = context // 2
            logger.warning("%s has a context of %d tokens: %s", recipe.model, context, _told(changed))
    device = resolve_device(recipe.device)
    small = device.type == "cuda" and resolve_dtype(recipe.dtype, device) != torch.float32
    if small and "dtype" not in evaluation.model_fields_set:
        changed["evaluation"]["dtype"] = "trunk"
    if not any(changed.values()):
        return recipe
    fitted = recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=part) for name, part in changed.items()}
    )
    parse_recipe(fitted.model_dump(mode="json"))
    return fitted


def _told(changed: dict[str, dict[str, Any]]) -> str:
    return ", ".join(f"{name}.{key}={value}" for name, part in changed.items() for key, value in part.items())


@contextmanager
def start(recipe: Recipe, run: RunDirectory, *, progress: bool, resume: str = "auto") -> Iterator[Session]:
    """Loads the model, shares it out over the ranks if the recipe says so, and proves that heads can be built for it.

    Args:
        progress: whether the main rank shows bars and tables.
    """
    if recipe.model == "demo":
        ranks.from_main(lambda: str(builtin_models.demo_directory()))
    device = resolve_device(recipe.device)
    apart = is_apart(recipe)
    dtype = str(resolve_dtype(recipe.dtype, device)).removeprefix("torch.")
    where = "cpu" if apart else None
    trunk, tokenizer = load_trunk(recipe, dtype=dtype, device=where, empty=apart and not ranks.is_main())
    if ranks.is_main() or not apart:
        trunk.check()
        check_split(recipe, trunk, processes=ranks.count())
    check_row_length(recipe, trunk)
    check_heads(recipe, trunk)
    _check_quantised(recipe, trunk, apart=apart)
    if trunk.recurrent and recipe.evaluation.decode_prompts:
        raise UserError(
            f"evaluation.decode_prompts: {recipe.evaluation.decode_prompts} is not accepted for {trunk.name}, whose "
            "linear attention cannot take rejected drafts back in mtpd's decoding; accepted: 0"
        )
    fingerprint = ranks.from_main(lambda: trunk_fingerprint(trunk.model))
    ends, shown = end_tokens(trunk.model, tokenizer), progress and ranks.is_main()
    with trunk_apart(trunk, recipe, device=device, folder=run.offload):
        yield Session(recipe, run, trunk, tokenizer, fingerprint, ends, shown, resume)


def _check_quantised(recipe: Recipe, trunk: Trunk, *, apart: bool) -> None:
    """Raises UserError for what takes a trunk with ordinary weights; all ranks see the same."""
    quantised = trunk.quantised or (apart and hasattr(trunk.model.config, "quantization_config"))
    problems = {
        "trunk.train": (recipe.trunk.train, "frozen"),
        "heads.shared_layers": (recipe.heads.shared_layers, 0),
        "train.deepspeed": (recipe.train.deepspeed if apart else None, None),
    }
    for key, (value, accepted) in problems.items():
        if quantised and value != accepted:
            raise UserError(
                f"{key}: {value} is not accepted for {recipe.model}, whose weights are quantised; accepted: "
                f"{'null, or another stage' if accepted is None else accepted}, or the same model in 16 bits"
            )


def load_trunk(
    recipe: Recipe, name: str | None = None, *, dtype: str | None = None, device: str | None = None, empty: bool = False
) -> tuple[Trunk, Any]:
    """The model of a recipe, or another one in its place, and its tokenizer; what is None is as the recipe says.

    Raises:
        UserError: as `load_model`.
    """
    model, tokenizer = load_model(
        name or recipe.model,
        dtype=dtype or recipe.dtype,
        device=device or recipe.device,
        trust_remote_code=recipe.trust_remote_code,
        base=recipe.model_base if name in (None, recipe.model) else None,
        empty=empty,
    )
    return Trunk(model, tokens=real_tokens(model, tokenizer)), tokenizer


def check_row_length(recipe: Recipe, trunk: Trunk) -> None:
    """Raises UserError if a row is longer than what the model was made for."""
    if recipe.data.row_length > trunk.context:
        raise UserError(
            f"data.row_length: {recipe.data.row_length} is longer than the context of {recipe.model}; "
            f"accepted: at most {trunk.context}"
        )


def check_heads(recipe: Recipe, trunk: Trunk) -> None:
    """Raises UserError if the trunk cannot have the heads of the recipe; those of a checkpoint are what they are."""
    if recipe.heads.init != "native":
        configure_heads(recipe.heads.model_dump(), trunk, vocabulary=0, fingerprint="")
