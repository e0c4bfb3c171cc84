"""Checks before anything is loaded: wrong paths and names are said within a second."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from mtpd.data.find_model import check_model
from mtpd.data.rows.left_out import Unusable
from mtpd.data.rows.row_format import RowFormat
from mtpd.data.sources import check_source, read
from mtpd.errors import UserError
from mtpd.finished_run import HEADS_FILE, RECIPE
from mtpd.finished_run import check_finished as check_finished
from mtpd.recipe import DEEPSPEED_PRESETS, PretrainRecipe, Recipe, load_recipe, parse_recipe
from mtpd.recipe.sections import DataRecipe
from mtpd.recipe.trackers import check_trackers

DEVICES = ("auto", "cpu", "cuda", "mps", "xpu", "hpu", "npu", "mlu", "musa", "sdaa", "xla")
"""Kinds of devices that PyTorch has names for; whether one is there is seen when it is used."""
LOOKED_AT = 10
"""Rows of a file of which one has to be usable."""
STAGE = "stage.json"
"""In a stage of an extension."""


def check_recipe(recipe: Recipe, *, weights: bool = True) -> None:
    """Looks at everything that a recipe names on this machine.

    Args:
        weights: whether the model has to have weights; a plan needs its configuration alone.

    Raises:
        UserError: naming the key, its value and what is accepted.
    """
    check_model(recipe.model, base=recipe.model_base, weights=weights)
    _check_device(recipe.device)
    data = recipe.data
    if data.responses_file is not None and not Path(data.responses_file).expanduser().is_file():
        raise UserError(
            f"data.responses: {data.responses_file}: no such file; accepted: trunk, given, the address of a server, or "
            "a .jsonl file of responses"
        )
    form = row_format(data)
    _check_prompts(data.prompts, form, key="data.prompts", split=data.split)
    if data.held_out is not None:
        _check_prompts(data.held_out, form, key="data.held_out")
    for number, text in enumerate(data.given):
        _check_prompts(text.prompts, RowFormat(), key=f"data.given.{number}.prompts")
    for number, source in enumerate(recipe.evaluation.extra):
        _check_prompts(source, RowFormat(), key=f"evaluation.extra.{number}")
    if recipe.heads.source is not None:
        source_folder(recipe.heads.source)
    if isinstance(recipe.heads.vocabulary, str) and not Path(recipe.heads.vocabulary).is_file():
        raise UserError(
            f"heads.vocabulary: {recipe.heads.vocabulary}: no such file; accepted: a number of tokens, or a file that "
            "mtpd data vocab wrote"
        )
    deepspeed = recipe.train.deepspeed
    if deepspeed is not None and deepspeed not in DEEPSPEED_PRESETS and not Path(deepspeed).is_file():
        raise UserError(
            f"train.deepspeed: {deepspeed}: no such file; accepted: {', '.join(DEEPSPEED_PRESETS)}, or a JSON of "
            "DeepSpeed's"
        )
    check_trackers(recipe.train.report_to)
    check_folder(recipe.output, key="output")
    if data.store is not None:
        check_folder(Path(data.store), key="data.hidden_states")


def source_folder(source: str) -> Path:
    """The directory of the heads that `heads.source` names: itself, or that of a run.

    Raises:
        UserError: there are none.
    """
    for folder in (Path(source), Path(source) / "heads"):
        if (folder / HEADS_FILE).is_file():
            return folder
    raise UserError(f"heads.source: {source}: holds no heads; accepted: a run, or a directory of heads")


def row_format(data: DataRecipe, *, columns: bool = True) -> RowFormat:
    """How a recipe says that rows are read.

    Args:
        columns: False for sources of known columns, or for further ones.
    """
    named: dict[str, Any] = {"columns": data.columns, "template": data.template} if columns else {}
    escape = data.special_tokens_in_text == "escape"
    return RowFormat(**named, chat_template_kwargs=data.chat_template_kwargs, escape=escape)


def _check_device(name: str) -> None:
    if name.partition(":")[0] not in DEVICES:
        raise UserError(f"device: {name} is not accepted; accepted: {', '.join(DEVICES)}")


def _check_prompts(source: str, form: RowFormat, *, key: str, split: str = "train") -> None:
    """`check_source`, and the first rows of a file: most files that are wrong are wrong in all rows."""
    check_source(source, key=key)
    if Path(source).expanduser().is_file():
        refused: Unusable | None = None
        for place, row in islice(read(source, split=split, subset=None), LOOKED_AT):
            try:
                form.read(row, place=f"{key}: {place}", default_id="")
                return
            except Unusable as error:
                refused = refused or error
        raise refused or UserError(f"{key}: {source} holds no prompts")


def check_pretrain_recipe(recipe: PretrainRecipe) -> None:
    """`check_recipe`, for `mtpd pretrain`."""
    _check_device(recipe.device)
    if isinstance(recipe.model, str):
        check_model(recipe.model, weights=True)
    accepted = "accepted: stdlib, stdlib-held-out, a .jsonl file of `text` rows, or a datasets id"
    for key, source in (("data.texts", recipe.data.texts), ("data.held_out", recipe.data.held_out)):
        check_source(source, key=key, accepted=accepted)
    if recipe.heads.source is not None:
        source_folder(recipe.heads.source)
    tokenizer = recipe.tokenizer or "bytes"
    if (tokenizer.startswith((".", "/", "~")) or tokenizer.count("/") > 1) and not Path(
        tokenizer
    ).expanduser().is_dir():
        raise UserError(f"tokenizer: {tokenizer}: no such directory; accepted: bytes, bpe:N, a directory, or a hub id")
    check_folder(recipe.output, key="output")


def extended_recipe(path: Path, given: Mapping[str, Any]) -> Recipe:
    """The recipe of a finished run, with what a call of `mtpd extend` says about stages.

    Args:
        given: keys of the recipe's `extend` section, in place of what the run's recipe says.

    Raises:
        UserError: no finished run, a stage of one, or stages that there cannot be.
    """
    check_finished(path)
    if (path / STAGE).is_file():
        raise UserError(f"{path}: is a stage of an extension; give the run directory that it is in")
    recipe = load_recipe(path / RECIPE)
    section = {**recipe.extend.model_dump(), **given}
    if section["to"] is None and not section["auto"]:
        raise UserError(f"--to: is missing; accepted: a number of heads above {recipe.heads.depth}, or --auto")
    return parse_recipe({**recipe.model_dump(mode="json"), "extend": section}, source="mtpd extend")


def check_folder(path: Path, *, key: str) -> None:
    """Raises UserError unless a directory is there or can be made, and can be written to."""
    nearest = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not nearest.is_dir():
        what = "is a file" if nearest == path else f"cannot be made, {nearest} is a file"
        raise UserError(f"{key}: {path} {what}; accepted: a directory, new or of an earlier call")
    try:
        # Permissions do not tell of read-only disks, nor tell root anything.
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise UserError(
            f"{key}: {path} cannot be written ({nearest}: {error.strerror}); choose another place, or make room there"
        ) from error


def check_file(path: Path | None, *, key: str) -> None:
    """Raises UserError if a file that is to be written at the end of all work cannot be."""
    if path is None:
        return
    if path.is_dir():
        raise UserError(f"{key}: {path} is a directory; accepted: a file, such as {path / 'result'}")
    check_folder(path.parent, key=key)
    if path.exists() and not os.access(path, os.W_OK):
        raise UserError(f"{key}: {path} cannot be written (it is read-only); choose another file")


def acceptance_file(path: Path, *, name: str = "acceptance.json") -> Path:
    """The acceptance file that is meant by a path: the file itself, or the one of that name in a run directory.

    Raises:
        UserError: there is no such file, or the run has none yet.
    """
    if path.is_dir():
        if not (path / name).is_file():
            if not (path / RECIPE).is_file():
                raise UserError(f"{path}: holds no run and no {name}; accepted: an acceptance file, or a run directory")
            first = "finish it with mtpd distill" if name == "acceptance.json" else f"measure it with mtpd eval {path}"
            raise UserError(f"{path}: the run has no {name} yet; {first}")
        return path / name
    if not path.exists():
        raise UserError(f"{path}: no such file; accepted: an acceptance file, or the directory of a run")
    return path
