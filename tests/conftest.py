"""Fixtures that several files share: trunks of every architecture, and heads that have learned a text by heart."""

from __future__ import annotations

import copy
import functools
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

# Test files import the table of architectures as a module of its own.
sys.path.insert(0, str(Path(__file__).parent))
# Triton reads this when it is imported: without a GPU its interpreter runs kernels.
os.environ["TRITON_INTERPRET"] = str(int(not torch.cuda.is_available()))

import architectures

from mtpd.alignment import IGNORED
from mtpd.data.packing import Sample
from mtpd.decode.planner import Costs
from mtpd.heads import Heads
from mtpd.losses.fused import LossSettings
from mtpd.train.model import DistillModel
from mtpd.trunk import Trunk

torch.set_num_threads(1)

FREE = Costs({1: 1.0, 64: 1.0}, head=0.0)
"""A machine on which drafts cost nothing: everything that may be right is verified."""


@pytest.fixture(autouse=True)
def loggers() -> None:
    """Warnings reach the test, also where an earlier one ran a library that turns off the loggers it finds."""
    for name, logger in logging.root.manager.loggerDict.items():
        if name.split(".")[0] == "mtpd" and isinstance(logger, logging.Logger):
            logger.disabled, logger.propagate = False, True
            logger.setLevel(logging.NOTSET)


@pytest.fixture(autouse=True, scope="session")
def times(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Times of passes that tests measure stay with the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mtpd.decode.costs.CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture
def free_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models draft all that there is, whatever it costs on this machine: what a test sees does not depend on it."""
    monkeypatch.setattr("mtpd.decode.model.machine_costs", lambda *_, **__: FREE)


@pytest.fixture(params=architectures.ARCHITECTURES)
def name(request: pytest.FixtureRequest) -> str:
    """Each architecture in turn."""
    return str(request.param)


@pytest.fixture
def trunk(name: str) -> Trunk:
    """The tiny trunk of each architecture in turn."""
    return architectures.tiny_trunk(name)


@pytest.fixture
def llama() -> Trunk:
    """One trunk, where the architecture does not matter."""
    return architectures.tiny_trunk("llama")


class Learned(NamedTuple):
    """A greedy text of a tiny model, and heads of depth 3 before, amid and after learning it by heart."""

    trunk: Trunk
    sample: Sample
    untrained: Heads
    half: Heads
    perfect: Heads


@functools.cache
def learn(name: str) -> Learned:
    """Trains until every draft along the text is the main head's own choice."""
    trunk = architectures.tiny_trunk(name)
    prompt, text = architectures.greedy_text(name, 5, 48)
    sample = Sample.of("one", prompt, text)
    ids = torch.tensor([sample.ids])
    labels = torch.tensor([[IGNORED] * len(prompt) + text])
    positions = torch.arange(ids.shape[1])[None]
    heads = architectures.random_heads(trunk)
    untrained, half = copy.deepcopy(heads), None
    model = DistillModel(trunk, heads.train(), LossSettings((0.3,) * 3, (0.5,) * 3, top_n=20))
    optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-2)
    for _ in range(300):
        model(ids, labels, positions)["loss"].backward()
        assert model.sums is not None
        share = (model.sums.accepted / model.sums.rows).tolist()
        if half is None and share[0] > 0.5:
            half = copy.deepcopy(heads).eval()
        if min(share) == 1.0:
            break
        optimizer.step()
        optimizer.zero_grad()
    else:
        pytest.fail(f"heads did not learn one sample by heart: accepted {share}")
    assert half is not None
    return Learned(trunk, sample, untrained, half, heads.eval())


@pytest.fixture
def learned() -> Learned:
    """What `learn` gives for the tiny Llama."""
    return learn("llama")


@pytest.fixture(scope="session")
def finished_run_made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory, made once. No test may change it."""
    from mtpd.cli import main

    folder = tmp_path_factory.mktemp("runs") / "tiny"
    words = ["distill", "model=tiny", f"output={folder}", "heads.depth=2", "data.limit=16", "data.max_new_tokens=24"]
    words += ["train.max_steps=8", "train.micro_batch_rows=2", "train.logging_steps=1", "train.learning_rate=3e-3"]
    words += ["evaluation.prompts_limit=14", "evaluation.max_new_tokens=16", "evaluation.decode_prompts=2"]
    words += ["evaluation.steps=4", "evaluation.extra=[builtin-other]"]
    assert main(words) == 0
    return folder


@pytest.fixture
def finished_run(finished_run_made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    shutil.copytree(finished_run_made, tmp_path / "run")
    return tmp_path / "run"
