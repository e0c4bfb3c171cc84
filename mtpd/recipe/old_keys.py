"""Keys that recipes had before: what they are called now, or what to do without them.

A recipe that still has one is refused with one line that says so. The `recipe.yaml` of a run is a whole recipe, written
by mtpd: there, a renamed key is read as the new one, and a dropped one that has its default says nothing. One that has
another value is left out with a warning where the heads are there, which have what it decided.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path
from typing import Any

from mtpd.recipe.text import place_of

logger = logging.getLogger(__name__)

RENAMED = {
    "data.store": (None, "data.hidden_states"),
    "train.max_grad_norm": (1.0, "train.arguments.max_grad_norm"),
    "train.rows_per_step": (8, "train.micro_batch_rows"),
    "train.save_total_limit": (2, "train.arguments.save_total_limit"),
    "train.weight_decay": (0.0, "train.arguments.weight_decay"),
}
"""Old keys with their defaults and their new names."""

DROPPED: dict[str, tuple[Any, str]] = {
    "evaluation.decode_depth": (None, "each round drafts as much as pays; mtpd bench --against chain measures chains"),
    "evaluation.steps_prompts": (28, "half of the measured prompts, at most 28, choose among checkpoints"),
    "extend.stages": ([], "each stage doubles the heads, up to extend.to"),
    "heads.adapter_rank": (None, "the rank is 16"),
    "heads.adapters": (0, "extend.form: adapters gives new depths adapters"),
    "heads.circuit.greedy": ("conditionals", "greedy drafts are conditionals"),
    "heads.block": ("linear", "the block of parallel heads is heads.parallel.block"),
    "train.alpha": (0.3, "mtp_d has the one of its paper; train.weights weighs depths, ce and kl are alone"),
    "train.jsd_mix": (0.5, "jsd mixes both sides equally"),
    "train.lk_eta": (3.0, "lk has the constant of its paper, 3"),
    "train.student_temperature": (1.0, "train.teacher_temperature alone softens or sharpens"),
    "trunk.check_steps": (50, "the perplexity is measured every 50 steps"),
    "trunk.loss_weight": (1.0, "the main head's cross-entropy has weight 1; a lower trunk.learning_rate protects it"),
}
"""Old keys with their defaults, and what holds without them."""

REFUSALS = {
    **{old: f"{old} is now {new}" for old, (_, new) in RENAMED.items()},
    **{old: f"{old} is no longer a key: {instead}; leave it out" for old, (_, instead) in DROPPED.items()},
}
"""What a recipe is told that has an old key."""

OF_A_RUN = ("provenance.json", "responses.jsonl", "held-out.jsonl", "hidden-states", "heads", "model", "metrics.jsonl")
"""Files and folders, one of which lies beside the recipe.yaml of a run."""


def is_of_run(file: Path) -> bool:
    """Tells whether a recipe file is the one that mtpd wrote into a run directory."""
    return file.name == "recipe.yaml" and any((file.parent / name).exists() for name in OF_A_RUN)


def rename_old_keys(values: dict[str, Any], known: Collection[str], file: Path) -> None:
    """Renames and drops old keys in the recipe of a run, in place; what it cannot drop stays, to be refused.

    Args:
        known: keys that the recipe may have; one of pretraining still has some of these.
        file: the recipe.
    """
    finished = (file.parent / "heads" / "model.safetensors").is_file()
    for old, (default, new) in {**RENAMED, **DROPPED}.items():
        section, _, name = old.rpartition(".")
        holds = _section(values, section)
        if old in known or name not in holds:
            continue
        value = holds[name]
        if old in DROPPED and value != default:
            if not finished:
                continue
            logger.warning("%s: %s: %s is left out, it is no longer a key: %s", file, old, value, new)
        del holds[name]
        if old in RENAMED and value != default:
            place, name = place_of(values, new, str(file))
            # A word is not a directory for data.hidden_states.
            place[name] = f"./{value}" if old == "data.store" and "/" not in value else value


def _section(values: Any, section: str) -> dict[str, Any]:
    for name in section.split("."):
        values = values.get(name) if isinstance(values, dict) else None
    return values if isinstance(values, dict) else {}
