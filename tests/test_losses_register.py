"""A loss is one entry: whatever asks for a loss asks the register."""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from test_losses_fused import Case
from torch import Tensor

from mtpd.cli import main
from mtpd.errors import UserError
from mtpd.losses.settings import LOSSES, Loss, LossSettings, Student, Teacher, register
from mtpd.recipe import load_recipe
from mtpd.recipe.sections import TrainRecipe
from mtpd.train.arguments import loss_settings

PACKAGE = Path(__file__).parents[1] / "mtpd"
HOME = "losses/kinds.py"


def strings(file: Path) -> set[str]:
    """Texts in a file that are values, not documentation."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    notes = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in notes
    }


def test_the_name_of_a_loss_stands_in_one_file() -> None:
    """Fault: a table or a condition elsewhere that a new loss would have to be added to."""
    found = {file.relative_to(PACKAGE).as_posix(): strings(file) for file in PACKAGE.rglob("*.py")}
    for name in LOSSES:
        homes = {file for file, texts in found.items() if name in texts}
        # The settings have a default, and "ce" is also the name of a term that is logged.
        assert homes - {"losses/settings.py"} == {HOME}, name
        assert name == "kl" or homes == {HOME}, name


def squares(student_NM: Tensor, teacher_NM: Tensor, *, teacher_temperature: float) -> Tensor:
    """½ Σ (p - q)²"""
    p, q = student_NM.softmax(1), (teacher_NM / teacher_temperature).softmax(1)
    return 0.5 * (p - q).square().sum(1)


def squares_tile(student: Student, teacher: Teacher, settings: LossSettings, weight: Tensor) -> tuple[Tensor, Tensor]:
    apart = student.p - teacher.q
    mean = (student.p * apart).sum(1)
    return 0.5 * apart.square().sum(1), (apart - mean[:, None]) * student.p


@pytest.fixture
def brier(monkeypatch: pytest.MonkeyPatch) -> Loss:
    """A loss from outside of the package."""
    loss = Loss(
        "brier",
        "half the squared distance of the probabilities",
        reads=frozenset({"teacher_temperature"}),
        reference=squares,
        twin=squares_tile,
    )
    # What `register` adds is taken away again.
    monkeypatch.setitem(LOSSES, loss.name, loss)
    del LOSSES[loss.name]
    return register(loss)


def test_a_loss_from_outside_is_a_loss_like_others(brier: Loss) -> None:
    """Fault: a loss that needs an edit inside of the package: in the recipe, its schema, or the fused loss."""
    recipe = load_recipe(None, ["model=tiny", "train.loss=brier", "heads.depth=3", "train.weights=[1, 0.5, 0.2]"])
    settings = loss_settings(recipe)
    assert (settings.alpha, settings.beta, settings.top_n) == ((0.0, 0.0, 0.0), (1.0, 0.5, 0.2), 0)
    assert "brier" in TrainRecipe.model_json_schema()["properties"]["loss"]["enum"]
    with pytest.raises(UserError, match="train.top_n: 7 does nothing with train.loss: brier"):
        load_recipe(None, ["model=tiny", "train.loss=brier", "train.top_n=7"])
    for change in ({}, {"teacher_temperature": 0.6}):
        given: Any = {"loss": brier.name, **change}
        for draft in (False, True):
            case = Case(draft=draft)
            each = LossSettings(settings.alpha, settings.beta, **given)
            expected, expected_gradients = case.reference(each)
            ours, gradients, sums = case.fused(each)
            assert expected > 0
            assert ours.item() == pytest.approx(expected.item(), rel=1e-9)
            for gradient, wanted in zip(gradients, expected_gradients, strict=True):
                torch.testing.assert_close(gradient, wanted)
            assert (sums.divergence > 0).all()
    with pytest.raises(ValueError, match="brier"):
        register(brier)


@pytest.mark.parametrize("form", ["chain", "circuit"])
def test_a_loss_from_outside_trains(brier: Loss, form: str, tmp_path: Path) -> None:
    """Fault: heads or a trainer that know only the losses that come with the package."""
    run = tmp_path / "run"
    overrides = ["model=tiny", "device=cpu", "train.loss=brier", f"heads.kind={form}", "heads.depth=2"]
    overrides += ["data.limit=16", "data.max_new_tokens=16", "data.row_length=256", "evaluation.prompts_limit=2"]
    overrides += ["evaluation.max_new_tokens=8", "evaluation.decode_prompts=0", "train.max_steps=8"]
    overrides += ["heads.init=random"] if form == "chain" else []
    overrides += ["train.logging_steps=1", "train.learning_rate=1e-3", f"output={run}"]
    assert main(["distill", *overrides]) == 0
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    values = [line["brier_1"] for line in logged if "brier_1" in line]
    assert len(values) == 8
    assert min(values) > 0
    assert sum(values[-3:]) < sum(values[:3])


def test_names_that_are_not_registered_are_refused() -> None:
    """Fault: a misspelt loss that is found out when training begins."""
    with pytest.raises(UserError, match="train.loss: klb is not accepted; accepted: mtp_d, ce, kl, reverse_kl"):
        load_recipe(None, ["model=tiny", "train.loss=klb"])
