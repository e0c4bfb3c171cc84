"""The examples run as a user runs them, and the Python API is light to import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import mtpd

ROOT = Path(__file__).parents[1]


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )


def test_quickstart(tmp_path: Path) -> None:
    """Fault: the example uses a name that the API no longer has."""
    done = run(str(ROOT / "examples" / "quickstart.py"), "tiny", str(tmp_path / "run"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"^acceptance\S*\.json: tau=1\.\d\d .* CAR_1=0\.\d\d CAR_2=", done.stdout, re.MULTILINE)) == 2
    assert (tmp_path / "run" / "heads" / "model.safetensors").is_file()


def test_importing_mtpd_imports_nothing_heavy() -> None:
    """Fault: `import mtpd` takes seconds."""
    done = run("-c", "import mtpd, sys; print({'torch', 'transformers', 'pydantic'} & set(sys.modules))")
    assert done.stdout == "set()\n", done.stderr


@pytest.mark.parametrize("name", mtpd.__all__)
def test_each_exported_name_exists(name: str) -> None:
    """Fault: a name is promised in `__all__` and its home has moved."""
    assert getattr(mtpd, name) is not None
    assert name in dir(mtpd)


def test_an_unknown_name_is_refused() -> None:
    """Fault: the lazy import turns a slip into something else than an AttributeError."""
    with pytest.raises(AttributeError, match="has no attribute 'distil'"):
        mtpd.distil  # noqa: B018
