"""A finished run, opened again to be measured or shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtpd.data.models import load_model, real_tokens, resolve_dtype, trunk_fingerprint
from mtpd.data.responses import end_tokens
from mtpd.errors import UserError
from mtpd.evaluate.contamination import TrainedPrompts, read_trained
from mtpd.files import read_sealed
from mtpd.heads import Heads, load_heads
from mtpd.recipe import Recipe, load_recipe
from mtpd.run.check import check_finished
from mtpd.run.directory import RunDirectory
from mtpd.trunk import Trunk


@dataclass(frozen=True)
class FinishedRun:
    """A run directory with its model loaded."""

    recipe: Recipe
    run: RunDirectory
    trunk: Trunk
    tokenizer: Any
    fingerprint: str
    """Of the trunk in the number format of the run."""
    ends: list[int]

    def heads(self, name: str) -> Heads:
        """Heads of the run by the name of their folder, in the trunk's number format and eval mode.

        Raises:
            UserError: there are none, their tensors do not fit, or they belong to another trunk.
        """
        folder = self.run.path / name
        return load_heads(folder, self.trunk, fingerprint=self.fingerprint).to(self.trunk.dtype).eval()

    def in_dtype(self, dtype: str) -> FinishedRun:
        """The same run with its model in another number format ("trunk" for the one it has)."""
        if dtype == "trunk" or resolve_dtype(dtype, self.trunk.device) == self.trunk.dtype:
            return self
        trunk, tokenizer, _ = _load(self.recipe, trunk_name(self.recipe, self.run), dtype=dtype)
        return FinishedRun(self.recipe, self.run, trunk, tokenizer, self.fingerprint, self.ends)


def open_finished(path: Path, *, heads: str = "heads") -> tuple[Recipe, RunDirectory]:
    """Recipe and files of a run, without loading its model.

    Raises:
        UserError: the directory holds no run, or the run has no such heads.
    """
    run = RunDirectory(path)
    check_finished(path, heads=heads)
    return load_recipe(run.recipe), run


def reopen(path: Path, *, heads: str = "heads") -> FinishedRun:
    """Loads the model of a finished run.

    Raises:
        UserError: as `open_finished` and `mtpd.data.models.load_model`.
    """
    recipe, run = open_finished(path, heads=heads)
    trunk, tokenizer, ends = _load(recipe, trunk_name(recipe, run), dtype=recipe.dtype)
    return FinishedRun(recipe, run, trunk, tokenizer, trunk_fingerprint(trunk.model), ends)


def original_trunk(finished: FinishedRun) -> Trunk:
    """The model as it was before the run: another one only if the run trained more than heads."""
    if trunk_name(finished.recipe, finished.run) == finished.recipe.model:
        return finished.trunk
    return _load(finished.recipe, finished.recipe.model, dtype=finished.recipe.dtype)[0]


def trunk_name(recipe: Recipe, run: RunDirectory) -> str:
    """The model that the heads of a run belong to: its own `trunk/` if the run trained one, else the recipe's."""
    return str(run.trunk) if (run.trunk / "config.json").is_file() else recipe.model


def trained_prompts(run: RunDirectory) -> TrainedPrompts:
    """What the run was trained on, as far as its directory says.

    Raises:
        UserError: the provenance cannot be read.
    """
    try:
        prompts = []
        if run.provenance.is_file():
            prompts = [str(prompt) for prompt in read_sealed(run.provenance, refusal="not a provenance")["prompts"]]
    except (KeyError, TypeError) as error:
        raise UserError(f"{run.provenance}: cannot be read as a provenance: no {error}") from error
    return read_trained(prompts, run.trained_prompts)


def _load(recipe: Recipe, name: str, *, dtype: str) -> tuple[Trunk, Any, list[int]]:
    model, tokenizer = load_model(name, dtype=dtype, device=recipe.device, trust_remote_code=recipe.trust_remote_code)
    return Trunk(model, tokens=real_tokens(model, tokenizer)), tokenizer, end_tokens(model, tokenizer)
