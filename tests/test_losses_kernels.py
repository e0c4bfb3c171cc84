"""The Triton kernels of the loss against the reference: on a GPU where there is one, else by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from test_losses_fused import LOSSES, NONE, SOME, Case, every_form, every_loss

from mtpd.losses import fused, fused_kernels, kinds, on_gpu, reference
from mtpd.losses.fused import LossSettings, multi_depth_loss
from mtpd.losses.settings import LOSSES as REGISTERED
from mtpd.trunk import Unembedding

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WORKS = on_gpu.triton_works
FEW = 9
"""Positions: the interpreter takes milliseconds for each row."""


@pytest.fixture(autouse=True)
def runs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Kernels on whatever device there is, 128 columns at a time; the names of those that ran."""
    names: list[str] = []
    inside = fused_kernels.launch

    def launch(kernel: Any, *args: Any, **numbers: Any) -> None:
        names.append(kernel.__name__)
        inside(kernel, *args, **numbers)

    monkeypatch.setattr(on_gpu, "KERNEL_DEVICES", frozenset({DEVICE}))
    monkeypatch.setattr(on_gpu, "triton_works", lambda: True)
    monkeypatch.setattr(fused, "BLOCK_ROWS", 11)
    monkeypatch.setattr(fused, "GPU_BLOCK_ROWS", 11)
    monkeypatch.setattr(fused_kernels, "COLUMNS", 128)
    monkeypatch.setattr(fused_kernels, "launch", launch)
    return names


def on_device(case: Case) -> Case:
    case.students = [each.detach().to(DEVICE).requires_grad_() for each in case.students]
    case.trunk = case.trunk.to(DEVICE)
    bias = None if case.head.bias is None else case.head.bias.to(DEVICE)
    case.head = replace(case.head, weight=case.head.weight.to(DEVICE), bias=bias)
    case.columns = None if case.columns is None else case.columns.to(DEVICE)
    case.targets, case.masks = ([each.to(DEVICE) for each in some] for some in (case.targets, case.masks))
    return case


def compare(case: Case, settings: LossSettings, tolerance: float = 1e-5) -> None:
    expected, expected_gradients = case.reference(settings)
    ours, gradients, _ = case.fused(settings)
    assert ours.item() == pytest.approx(expected.item(), rel=tolerance)
    largest = max(gradient.abs().max().item() for gradient in expected_gradients)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=tolerance, atol=tolerance * largest)


@every_form
@pytest.mark.parametrize("draft", [False, True], ids=["all tokens", "draft"])
def test_kernels_are_the_reference(loss: str, top_n: int, draft: bool, runs: list[str]) -> None:
    """Fault: any term of a kernel; a column behind the last whole block; a weight, temperature or cap left out."""
    settings = replace(LOSSES[loss], top_n=top_n)
    plain = on_device(Case(dtype=torch.float32, draft=draft, positions=FEW))
    capped = on_device(Case(dtype=torch.float32, draft=draft, positions=FEW, softcap=3.0, scale=2.0, bias=True))
    compare(plain, settings)
    compare(capped, replace(settings, teacher_temperature=0.6))
    if loss == "mtp_d":
        compare(plain, replace(settings, alpha=(0.0, 1.0, 0.0), beta=(1.0, 0.0, 0.5)))
    assert set(runs) == {"teacher_rows", "student_rows"}


def test_rows_that_count_at_some_depths(runs: list[str]) -> None:
    """Fault: a student row beside the teacher row of another one, where masks have holes or blocks end."""
    compare(on_device(Case(dtype=torch.float32)), LOSSES["kl"])


@every_form
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_kernels_are_the_sweeps(
    loss: str, top_n: int, dtype: torch.dtype, runs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fault: logits of 16 bits read as others; a top n in another order than theirs; other choices among ties."""
    for draft in (False, True):
        case = on_device(Case(dtype=dtype, draft=draft, softcap=3.0, positions=FEW))
        settings = replace(LOSSES[loss], top_n=top_n)
        ours, gradients, sums = case.fused(settings)
        assert runs
        with monkeypatch.context() as without:
            without.setattr(on_gpu, "KERNEL_DEVICES", frozenset())
            expected, expected_gradients, expected_sums = case.fused(settings)
        assert ours.item() == pytest.approx(expected.item(), rel=1e-5)
        assert torch.equal(sums.accepted, expected_sums.accepted)
        for gradient, wanted in zip(gradients, expected_gradients, strict=True):
            largest = wanted.abs().max().item()
            # Gradients of logits that are rounded to the neighbouring number.
            torch.testing.assert_close(gradient, wanted, rtol=2e-2, atol=1e-2 * largest)


@every_loss
def test_a_trained_unembedding(loss: str) -> None:
    """Fault: kernels whose gradient in the unembedding is not scaled by row, or is overwritten before it is read."""
    case, settings = on_device(Case(dtype=torch.float32, bias=True, positions=FEW)), LOSSES[loss]
    own = case.head.select(None)
    assert own.bias is not None
    trained = [own.weight.clone().requires_grad_(), own.bias.clone().requires_grad_()]
    given = case.arguments(settings) | {"unembedding": Unembedding(*trained)}
    sources = [*case.students, *trained]
    wanted = torch.autograd.grad(reference.multi_depth_loss(case.students, case.trunk, **given), sources)
    found = torch.autograd.grad(multi_depth_loss(case.students, case.trunk, **given)[0], sources)
    for gradient, each in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, each, rtol=1e-5, atol=1e-5 * each.abs().max().item())


@pytest.mark.parametrize("columns", [1, 2, 127, 128, 129, 257])
def test_odd_sizes(columns: int, runs: list[str]) -> None:
    """Fault: a row that is one block exactly, or one column more; a top n of one column or of all."""
    draw = torch.Generator().manual_seed(0)
    students = [torch.randn(4, 4, generator=draw).to(DEVICE).requires_grad_() for _ in range(2)]
    trunk, weight = torch.randn(4, 4, generator=draw).to(DEVICE), torch.randn(columns, 4, generator=draw).to(DEVICE)
    given: dict[str, Any] = {
        "targets_P": [torch.randint(columns, (4,), generator=draw).to(DEVICE) for _ in range(2)],
        "masks_P": [(torch.arange(4) < 4 - k).to(DEVICE) for k in (1, 2)],
    }
    for loss, numbers in {"mtp_d": {0, 1, columns - 1, columns}, "jsd": {0, columns // 2}}.items():
        for top_n in numbers:
            settings = LossSettings((0.3, 0.1) if loss == "mtp_d" else (0.0, 0.0), (1.0, 0.5), loss=loss, top_n=top_n)
            results = []
            for compute in (multi_depth_loss, reference.multi_depth_loss):
                found: Any = compute(students, trunk, Unembedding(weight), settings=settings, **given)
                value = found[0] if isinstance(found, tuple) else found
                results.append([value, *torch.autograd.grad(value, students)])
            for ours, wanted in zip(*results, strict=True):
                torch.testing.assert_close(ours, wanted, rtol=1e-5, atol=1e-5)
    assert runs


@every_form
@pytest.mark.parametrize("size", [100.0, 1e4])
def test_a_certain_teacher(loss: str, top_n: int, size: float) -> None:
    """Fault: 0 · log 0 where the teacher gives one token all the probability, or the student none to it."""
    case = on_device(Case(dtype=torch.float32, positions=FEW))
    case.trunk *= size
    settings = replace(LOSSES[loss], top_n=top_n)
    ours, gradients, _ = case.fused(settings)
    expected, expected_gradients = case.reference(settings)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-6)
    largest = max(gradient.abs().max().item() for gradient in expected_gradients)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4 * max(1.0, largest))


def test_ties_at_the_cap_and_at_zero(runs: list[str]) -> None:
    """Fault: a threshold among products where the reference has one among logits: at a cap many of them are equal."""
    eye = torch.eye(6, device=DEVICE)
    teacher = torch.tensor([[900.0, 300.0, 600.0, 0.0, -0.0, -5.0]] * 2, device=DEVICE)
    student = torch.tensor([[1.0, 2.0, -1.0, 0.5, 0.2, 3.0]] * 2, device=DEVICE, requires_grad=True)
    for top_n in (1, 2, 4):
        given: dict[str, Any] = {
            "targets_P": [torch.zeros(2, dtype=torch.long, device=DEVICE)],
            "masks_P": [torch.tensor([True, False], device=DEVICE)],
            "settings": LossSettings((0.0,), (1.0,), top_n=top_n),
        }
        head = Unembedding(eye, softcap=2.0)
        ours, _ = multi_depth_loss([student], teacher, head, **given)
        assert ours.item() == pytest.approx(
            reference.multi_depth_loss([student], teacher, head, **given).item(), rel=1e-5
        )
    assert runs


def test_what_the_kernels_do_not_serve(runs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault: a loss from outside computed by the kernel of the entry that it was made from; float64 cut to float32."""

    def twice(*given: Any) -> Any:
        value, gradient = kinds.forward_kl_tile(*given)
        return 2 * value, 2 * gradient

    other = replace(
        kinds.KL, name="twice", reference=lambda *given, **named: 2 * kinds.forward_kl(*given, **named), twin=twice
    )
    monkeypatch.setitem(REGISTERED, "twice", other)
    compare(on_device(Case(dtype=torch.float32)), LossSettings(NONE, SOME, loss="twice"))
    compare(on_device(Case(dtype=torch.float64)), LossSettings(NONE, SOME), tolerance=1e-9)
    assert not runs
    assert {entry.twin for entry in REGISTERED.values()} - {twice} == set(fused_kernels.DIVERGENCES)


COMPILED = """
import itertools, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mtpd.losses import fused_kernels, triton_rows

NUMBERS = dict.fromkeys(("tokens", "width", "top_n"), "i32") | dict.fromkeys(("columns", "targets", "choice"), "*i64")
NUMBERS |= dict.fromkeys(("scale", "softcap", "temperature", "label_weight", "teacher_share"), "fp32")

def compiled(kernel, logits, **constants):
    kinds = NUMBERS | {"products": logits, "teachers": logits} | dict.fromkeys(constants, "constexpr")
    types = {name: kinds.get(name, "*fp32") for name in kernel.arg_names}
    constants = {name: value for name, value in constants.items() if name in types}
    source = ASTSource(kernel, types, constants)
    options = {"num_warps": fused_kernels.WARPS, "enable_fp_fusion": True}
    return "cubin" in triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm

for at, terms in enumerate(fused_kernels.DIVERGENCES.values()):
    top_n = "TOTAL" not in terms and bool(terms)
    every = {name: name in terms for name in fused_kernels.TERMS} | {
        "CAPPED": top_n, "DRAFT": not top_n, "TOP_N": top_n, "COMPARED": bool(terms), "DIVERGES": bool(terms),
        "LABELS": True, "GRADIENT": True, "BLOCK": fused_kernels.COLUMNS,
    }
    logits, bits = (("*bf16", 16), ("*fp16", 16), ("*fp32", 32))[at % 3]
    assert compiled(triton_rows.teacher_rows, logits, BITS=bits, **every)
    assert compiled(triton_rows.student_rows, logits, **every)
"""


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Fault: code that the interpreter runs and the compiler refuses: types of branches, constants, conversions."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda patch: patch.setattr("importlib.util.find_spec", lambda name: None), "Triton is not installed; pip"),
        (lambda patch: patch.setattr("shutil.which", lambda name: None), "Triton finds no C compiler; install gcc"),
        (lambda patch: patch.setattr("torch.cuda.is_available", lambda: False), "Triton finds no GPU"),
    ],
)
def test_without_what_triton_needs(
    change: Any, said: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Fault: a run that ends in an error of Triton's, or that is slow without a word."""
    with monkeypatch.context() as there:
        there.setattr("shutil.which", lambda name: f"/usr/bin/{name}")
        there.setattr("torch.cuda.is_available", lambda: True)
        assert WORKS.__wrapped__()
        change(there)
        assert not WORKS.__wrapped__()
    assert said in caplog.text
