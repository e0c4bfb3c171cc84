"""How many files a reader needs to see one step of training."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import transformers
from torch.optim.optimizer import register_optimizer_step_pre_hook

from mtpd import __main__ as process

PACKAGE = Path(__file__).parents[1] / "mtpd"
MOST = 22


def test_files_from_the_command_to_the_optimizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a step that can only be understood with ever more files open.

    Counted are the files of the package that have a frame on the stack when a training step begins, and those that are
    entered from there to the optimizer's step: forward, loss and backward. What has returned before, such as reading
    the recipe or making responses, is not on the way.
    """
    files: set[str] = set()
    inner = transformers.Trainer.training_step

    def note(frame: FrameType) -> None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            files.add(file.relative_to(PACKAGE).as_posix())

    def training_step(self: Any, *args: Any, **options: Any) -> Any:
        if not files:
            frame: FrameType | None = sys._getframe()
            while frame is not None:
                note(frame)
                frame = frame.f_back
            sys.setprofile(lambda frame, event, _: note(frame) if event == "call" else None)
        return inner(self, *args, **options)

    monkeypatch.setattr(transformers.Trainer, "training_step", training_step)
    small = ["data.limit=6", "data.max_new_tokens=8", "evaluation.prompts_limit=1", "evaluation.max_new_tokens=6"]
    words = [
        "distill",
        "smoke",
        *small,
        "evaluation.decode_prompts=0",
        "train.max_steps=1",
        f"output={tmp_path / 'run'}",
    ]
    monkeypatch.setattr(sys, "argv", ["mtpd", *words])
    monkeypatch.setattr(process, "take_signals", lambda: None)
    hook = register_optimizer_step_pre_hook(lambda *_: sys.setprofile(None))
    try:
        assert process.start() == 0
    finally:
        sys.setprofile(None)
        hook.remove()
    assert {"__main__.py", "cli/distill.py", "run/distill.py", "train/trainer.py", "losses/fused_tile.py"} <= files
    assert len(files) <= MOST, sorted(files)
