"""The run directory: what is in it, and whether it belongs to this recipe."""

from __future__ import annotations

import json
import logging
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.versions import library_versions, machine
from mtpd.files import fingerprint_file, is_empty, read_sealed, sealed, sweep, write_whole, writing
from mtpd.finished_run import IMPORTED, RECIPE
from mtpd.heads import WEIGHTS
from mtpd.parallel import ranks
from mtpd.recipe import Recipe, dump, load_recipe
from mtpd.run.check import STAGE
from mtpd.train.checkpoints import named_checkpoint

logger = logging.getLogger(__name__)

LATER = ("heads.", "train.", "evaluation.", "data.")
"""Keys that decide nothing before there are heads: answers are kept by what they depend on."""
DECIDING = ("data.temperature", "data.top_p")
"""Those of them that all answers depend on."""
AFTERWARDS = ("extend.", "train.deepspeed")
"""Keys that decide nothing about the run itself: each stage of an extension has a directory of its own, and a run can
go on sharded in another way."""


class RunDirectory:
    """Names of the files of a run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.recipe = path / RECIPE
        self.provenance = path / "provenance.json"
        self.responses = path / "responses.jsonl"
        self.held_out = path / "held-out.jsonl"
        self.hidden_states = path / "hidden-states"
        self.trained_prompts = path / "trained-prompts.safetensors"
        self.metrics = path / "metrics.jsonl"
        self.heads_before = path / "heads-before"
        self.heads = path / "heads"
        self.heads_trained = path / "heads-trained"
        self.acceptance_before = path / "acceptance-before.json"
        self.acceptance = path / "acceptance.json"
        self.acceptance_trained = path / "acceptance-trained.json"
        self.decoded_before = path / "acceptance-decoded-before.json"
        self.decoded = path / "acceptance-decoded.json"
        self.plot = path / "car.svg"
        self.evaluation = path / "evaluation.json"
        self.evaluation_decoded = path / "evaluation-decoded.json"
        self.evaluation_served = path / "evaluation-served.json"
        self.samples = path / "samples.json"
        self.trunk = path / "trunk"
        self.report = path / "report.html"
        self.perplexity = path / "perplexity.json"
        self.held_out_after = path / "held-out-after.jsonl"
        self.depths = path / "depths.json"
        self.offload = path / "offload"
        self.stage = path / STAGE
        self.extended = path / "extended"

    def evaluation_with(self, model: str | None, *, mode: str) -> Path:
        """Where `mtpd eval` writes what it measured, by default: a file for each model that the heads were under."""
        path = self.evaluation if mode == "offline" else self.evaluation_decoded
        if model is None:
            return path
        return path.with_name(f"{path.stem}-{re.sub(r'[^A-Za-z0-9._-]+', '-', Path(model).name)}.json")


def open_run(recipe: Recipe, *, fresh: bool, resume: str = "auto") -> RunDirectory:
    """The run directory of a recipe: new, or the one that an earlier call left.

    Args:
        fresh: deletes what an earlier run left. Only a directory that holds a run is ever deleted.
        resume: `auto`, or a checkpoint that has to be there.

    Raises:
        UserError: the directory belongs to another recipe, or holds something else, or no such checkpoint.
    """
    run = RunDirectory(recipe.output)
    holds_run = run.recipe.is_file()
    if run.path.is_file() or (not holds_run and not is_empty(run.path)):
        raise UserError(f"output: {run.path} exists and is no run directory; choose another output")
    if run.stage.is_file():
        raise UserError(
            f"output: {run.path} is a stage of an extension; mtpd extend on the run it is in goes on with it"
        )
    if (run.path / IMPORTED).is_file():
        raise UserError(f"output: {run.path} holds imported heads; choose another output, such as {run.path}-distilled")
    # A recipe alone is what a mistake in it leaves (no such model, say): the mended one takes its place.
    begun = holds_run and any(path != run.recipe for path in run.path.iterdir())
    if begun and fresh:
        shutil.rmtree(run.path)
        begun = False
    changed = False
    if begun:
        differing = _differences(load_recipe(run.recipe), recipe)
        changed = any(key.startswith(AFTERWARDS) for key in differing)
        differing = [key for key in differing if not key.startswith(AFTERWARDS)]
        if not run.heads_before.exists():
            later = [key for key in differing if key.startswith(LATER) and key not in DECIDING]
            changed = changed or bool(later)
            differing = [key for key in differing if key not in later]
            if not differing and any(key.startswith("data.") for key in later):
                # Of other rows; quick to compute again beside the answers.
                shutil.rmtree(run.hidden_states, ignore_errors=True)
        if differing:
            raise UserError(
                f"output: {run.path} holds a run of another recipe (differs in {', '.join(differing[:4])}); "
                "choose another output, or start over with --fresh"
            )
    if resume != "auto":
        named_checkpoint(run.path, resume)
        if (run.heads / WEIGHTS).is_file():
            raise UserError(
                f"--resume: {resume} is not accepted, the run has its trained heads; accepted: auto (or delete "
                f"{run.heads} to train again from a checkpoint)"
            )
        # From a training that went another way.
        shutil.rmtree(run.heads_trained, ignore_errors=True)
    with writing(run.path):
        run.path.mkdir(parents=True, exist_ok=True)
        sweep(run.path)
    if not begun or changed:
        write_whole(run.recipe, dump(recipe))
    return run


def open_together(recipe: Recipe, *, fresh: bool, resume: str = "auto") -> RunDirectory:
    """The run directory, opened (and with `fresh` emptied) by the main rank.

    Raises:
        UserError: as `open_run`, and for a recipe that gives all ranks the same device.
    """
    if ranks.count() > 1 and ":" in recipe.device:
        raise UserError(
            f"device: {recipe.device} is one device, and there are {ranks.count()} processes, of which each takes its "
            f"own; accepted: auto, {recipe.device.partition(':')[0]}"
        )
    run = RunDirectory(Path(ranks.from_main(lambda: str(open_run(recipe, fresh=fresh, resume=resume).path))))
    ranks.wait_for(run.recipe)
    return run


def is_finished(run: RunDirectory) -> bool:
    """Whether a run has come to its end before: heads, their measurements, and the provenance that is written last.

    Raises:
        UserError: the provenance or an acceptance file is damaged.
    """
    if not run.provenance.is_file() or not (run.heads / WEIGHTS).is_file():
        return False
    ended = "files" in read_sealed(run.provenance, refusal="not a provenance")
    return ended and measured(run.acceptance, run.heads)


def _differences(old: Recipe, new: Recipe) -> list[str]:
    before, after = _flat(old.model_dump(mode="json")), _flat(new.model_dump(mode="json"))
    # Where it lies is not what it is: a moved run directory is still the same run.
    return sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key) and key != "output")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {prefix: value}
    return {
        name: leaf for key, part in value.items() for name, leaf in _flat(part, f"{prefix}.{key}".strip(".")).items()
    }


def measured(path: Path, folder: Path) -> bool:
    """Whether there is an acceptance file, of the heads that are in the folder now.

    Raises:
        UserError: the file is damaged.
    """
    if not path.is_file():
        return False
    weights = folder / WEIGHTS
    found = Acceptance.load(path).heads
    # Heads that were deleted since have nothing to be measured again with.
    return not weights.is_file() or found == fingerprint_file(weights)


def write_provenance(
    run: RunDirectory,
    *,
    trunk: str,
    rows: str,
    prompts: Sequence[str],
    left_out: Mapping[str, Any],
    responses: Mapping[str, Any],
) -> None:
    """Writes the origin of the heads: versions, machine, commit, command, and fingerprints of trunk, data and prompts.

    Args:
        trunk: fingerprint of the trunk.
        rows: fingerprint of the packed rows that were trained on.
        prompts: fingerprints of the prompts trained on, to find suites that meet them.
        responses: how many responses the trunk wrote to them, and how many were cut; empty where it wrote none.
        left_out: rows that could not be used, by reason.
    """
    found: dict[str, Any] = {}
    if run.provenance.is_file():
        try:
            found = read_sealed(run.provenance, refusal="not a provenance")
        except UserError as error:
            logger.warning("%s; written anew", error)
    # A later call on a run that has its heads does not train again, wherever it is made.
    done = found if (run.heads / WEIGHTS).is_file() else {}
    content = {
        "schema": 1,
        "started": found.get("started", _now()),
        "finished": done.get("finished"),
        "machine": done.get("machine", machine()),
        "command": sys.argv,
        "git_commit": _git_commit(),
        "versions": library_versions(),
        "trunk": trunk,
        "rows": rows,
        "prompts": sorted(prompts),
        "responses": dict(responses),
        "left_out": dict(left_out),
    }
    write_whole(run.provenance, json.dumps(sealed(content), indent=2) + "\n")


def finish_provenance(run: RunDirectory, gain: Mapping[str, Any] | None) -> None:
    """Adds when the run was finished, which heads it kept, and the SHA-256 of its files that have no seal of their own.

    Args:
        gain: what training changed; None where there is no start to compare with.
    """
    content = read_sealed(run.provenance, refusal="not a provenance")
    files = {path.name: fingerprint_file(path) for path in (run.recipe, run.metrics) if path.is_file()}
    note_training(run, gain, finished=content.get("finished") or _now(), files=files)


def note_training(stage: RunDirectory, gain: Mapping[str, Any] | None, **further: Any) -> None:
    """Says in the provenance of a run, or of a stage, which is that of its run, which heads it kept.

    Args:
        gain: what training changed; None where nothing was trained.
        further: keys to set.
    """
    if not stage.provenance.is_file():
        return
    content = read_sealed(stage.provenance, refusal="not a provenance") | further
    content.pop("training", None)
    content |= {} if gain is None else {"training": dict(gain)}
    write_whole(stage.provenance, json.dumps(sealed(content), indent=2) + "\n")


def warn_of_changes(run: RunDirectory) -> None:
    """Warns of files that are not those that the run finished with.

    Raises:
        UserError: the provenance cannot be read.
    """
    # A stage of an extension has the provenance of the run that it is in, and a recipe of its own.
    if not run.provenance.is_file() or run.stage.is_file():
        return
    for name, digest in read_sealed(run.provenance, refusal="not a provenance").get("files", {}).items():
        if fingerprint_file(run.path / name) != digest if (run.path / name).is_file() else True:
            logger.warning(
                "%s: is missing, damaged or was edited: its SHA-256 is not the one in %s",
                run.path / name,
                run.provenance.name,
            )


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _git_commit() -> str | None:
    """Commit of the source tree that runs, or None for an installed package."""
    here = Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False
        )
    except OSError:
        return None
    return found.stdout.strip() or None
