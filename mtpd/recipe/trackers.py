"""The trackers that `train.report_to` can name, and whether they are installed."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

from mtpd.errors import UserError

TRACKERS = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub", "mlflow"),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": ("kubeflow",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard",),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}
"""Names that transformers knows, with the packages that they need."""


def check_trackers(report_to: Sequence[str]) -> None:
    """Refuses trackers that would end the training before its first step.

    Raises:
        UserError: a tracker is not installed here, or transformers knows none of that name.
    """
    for name in report_to:
        if name in ("all", "none"):
            continue
        if name not in TRACKERS:
            raise UserError(f"train.report_to: {name} is unknown; accepted: {', '.join(TRACKERS)}")
        missing = [package for package in TRACKERS[name] if not _installed(package)]
        if missing:
            raise UserError(
                f"train.report_to: {name} is not installed here; pip install {' '.join(missing)}, or leave it out "
                "(metrics.jsonl is written anyhow)"
            )


def _installed(package: str) -> bool:
    also = {"tensorboard": "tensorboardX", "neptune": "neptune-client", "mlflow": "mlflow-skinny"}
    return find_spec(package) is not None or (package in also and find_spec(also[package]) is not None)
