"""What reaches the terminal of what mtpd and the libraries say."""

from __future__ import annotations

import logging
import time
import warnings
from pathlib import Path

import pytest
from transformers.utils import logging as transformers_logging

from mtpd import progress
from mtpd.cli.terminal import quiet_libraries


def talk() -> None:
    warnings.warn("from torch", stacklevel=2)
    transformers_logging.get_logger("transformers.models").warning("from transformers")
    logging.getLogger("DeepSpeed").warning("from deepspeed")
    logging.getLogger("mtpd.data").warning("3 prompts\nare left out")
    logging.getLogger("DeepSpeed").error("deepspeed broke")


@pytest.fixture
def deepspeed(tmp_path: Path) -> Path:
    """The file that deepspeed's logger writes to, and nowhere else: its own handler may hold a closed stream."""
    logger, handler = logging.getLogger("DeepSpeed"), logging.FileHandler(tmp_path / "log")
    before, logger.handlers = logger.handlers, [handler]
    yield tmp_path / "log"
    logger.handlers = before


def test_own_warnings_are_one_line_and_those_of_libraries_are_hidden(
    deepspeed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fault: a user reads about accelerators and weights amid the progress bars, or misses an error."""
    with quiet_libraries(debug=False):
        talk()
    assert capsys.readouterr().err == "mtpd: warning: 3 prompts are left out\n"
    assert deepspeed.read_text() == "deepspeed broke\n"


def test_debug_hides_nothing(deepspeed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fault: --debug leaves out what explains an error."""
    with quiet_libraries(debug=True), pytest.warns(UserWarning, match="from torch"):
        talk()
    assert "mtpd: warning: 3 prompts are left out\n" in capsys.readouterr().err
    assert deepspeed.read_text() == "from deepspeed\ndeepspeed broke\n"


def test_settings_are_put_back() -> None:
    """Fault: a program that calls the command loses its own log settings."""
    before = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    handlers = list(logging.getLogger("mtpd").handlers)
    with pytest.raises(KeyError), quiet_libraries(debug=False):
        raise KeyError
    assert (transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()) == before
    assert logging.getLogger("mtpd").handlers == handlers


def test_a_log_has_no_bar_of_what_is_short(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: carriage returns and bars in the log of a step of a moment, or none in that of a long one."""
    for delay in (5.0, 0.1):
        monkeypatch.setattr(progress, "DELAY", delay)
        with quiet_libraries(debug=False), progress.Bar(total=2, desc="first") as bar:
            bar.set_description("second")
            logging.getLogger("mtpd.data").warning("a warning")
            bar.update()
            time.sleep(0.2)
            bar.set_description("third")
            bar.update()
        shown = capsys.readouterr().err
        assert shown.count("mtpd: warning: a warning\n") == 1
        assert ("third: 100%" in shown) == (delay == 0.1)
        assert ("\r" in shown) == (delay == 0.1)
        assert "second" not in shown
