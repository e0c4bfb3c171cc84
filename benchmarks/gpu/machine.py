"""Whether this machine has all that mtpd uses on a GPU, and what it reaches by itself."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator

import torch
from lab import machine
from measure import bandwidth, product_rate

from benchmarks.gpu.outcome import Options, Outcome, gigabytes
from mtpd.evaluate.versions import library_versions
from mtpd.losses.on_gpu import triton_works


def work(options: Options) -> Iterator[tuple[str, Callable[[], Outcome]]]:
    yield "device", lambda: device(options)
    yield "compiler of kernels", lambda: compiler(options)
    yield "reach", lambda: reach(options)


def device(options: Options) -> Outcome:
    figures = {"torch": torch.__version__, "cuda": torch.version.cuda, "host": machine(), **library_versions()}
    if not options.device.startswith("cuda"):
        return Outcome("device", True, f"{machine()}, torch {torch.__version__}", figures)
    about = torch.cuda.get_device_properties(options.device)
    figures |= {"gpu": about.name, "memory": about.total_memory, "capability": f"{about.major}.{about.minor}"}
    figures |= {"gpus": torch.cuda.device_count(), "free": torch.cuda.mem_get_info(options.device)[0]}
    if shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
        figures["driver"] = said[0] if said else None
    exact = torch.cuda.is_bf16_supported(including_emulation=False)
    said_of = "" if exact else "; computes no bfloat16: set dtype=float16"
    return Outcome(
        "device",
        True,
        f"{about.name}, {gigabytes(about.total_memory)}, torch {torch.__version__}, CUDA {torch.version.cuda}{said_of}",
        figures,
    )


def compiler(options: Options) -> Outcome:
    if not options.device.startswith("cuda"):
        return Outcome("compiler of kernels", None, "no GPU")
    works = triton_works()
    said = "Triton and a C compiler are here" if works else "without Triton or a C compiler the loss runs in sweeps"
    return Outcome("compiler of kernels", works, said)


def reach(options: Options) -> Outcome:
    """The rate of one large product, and of a copy."""
    size = 256 if options.tiny else 8192
    rate = product_rate(size, size, size, options.dtype, device=options.device)
    speed = bandwidth(megabytes=8 if options.tiny else 2048, device=options.device)
    figures = {"flops": rate, "bytes": speed}
    return Outcome("reach", True, f"products {rate / 1e12:.3g} TFLOP/s, copies {speed / 1e12:.3g} TB/s", figures)
