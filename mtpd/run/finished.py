"""A finished run with its model loaded: to be measured, extended or decoded with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mtpd.data.models import resolve_dtype, trunk_fingerprint
from mtpd.data.responses import end_tokens
from mtpd.errors import UserError
from mtpd.evaluate.contamination import TrainedPrompts, read_trained
from mtpd.files import read_sealed
from mtpd.finished_run import FinishedRun, open_finished
from mtpd.heads import Heads, load_heads
from mtpd.run.directory import RunDirectory
from mtpd.run.session import load_trunk
from mtpd.trunk import Trunk


@dataclass(frozen=True)
class LoadedRun(FinishedRun):
    """A run with its model loaded."""

    trunk: Trunk
    tokenizer: Any
    fingerprint: str
    """Of the trunk in the number format of the run."""
    ends: list[int]
    other: str | None = None
    """A model in place of the run's own, which its heads are used with."""

    @property
    def model(self) -> str:
        return self.other or super().model

    def heads(self, name: str) -> Heads:
        """Heads of the run by the name of their folder, in the trunk's number format and eval mode.

        Raises:
            UserError: there are none, their tensors do not fit, or they belong to another trunk than the run's own.
        """
        fingerprint = self.fingerprint if self.other is None else None
        return load_heads(self.path / name, self.trunk, fingerprint=fingerprint, dtype=self.trunk.dtype)

    def in_dtype(self, dtype: str) -> LoadedRun:
        """The same run with its model in another number format ("trunk" for the one it has)."""
        if dtype == "trunk" or resolve_dtype(dtype, self.trunk.device) == self.trunk.dtype:
            return self
        trunk, tokenizer = load_trunk(self.recipe, self.model, dtype=dtype, device=str(self.trunk.device))
        return replace(self, trunk=trunk, tokenizer=tokenizer)


def reopen(
    path: Path,
    *,
    heads: str = "heads",
    device: str | None = None,
    untrusted: bool = False,
    model: str | None = None,
) -> LoadedRun:
    """Loads the model of a finished run.

    Args:
        device: None is the one of the recipe.
        model: another model that the heads are used with, such as a fine-tuned one; None is the run's own.
        untrusted: as for `open_finished`.

    Raises:
        UserError: as `open_finished` and `mtpd.data.models.load_model`.
    """
    opened = open_finished(path, heads=heads, untrusted=untrusted)
    trunk, tokenizer = load_trunk(opened.recipe, model or opened.model, device=device)
    ends = end_tokens(trunk.model, tokenizer)
    return LoadedRun(path, opened.recipe, trunk, tokenizer, trunk_fingerprint(trunk.model), ends, model)


def trained_prompts(run: RunDirectory) -> TrainedPrompts:
    """Reads what the run was trained on, as far as its directory says.

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
