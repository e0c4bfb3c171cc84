"""Multi-token-prediction heads for any Hugging Face causal language model, by self-distillation.

    import mtpd

    run = mtpd.distill(mtpd.load_recipe("demo", ["heads.depth=2"]))
    print(mtpd.Acceptance.load(run / "acceptance.json").total().tau)

    model = mtpd.load("runs/demo")
    model.generate(**model.tokenizer("Hello", return_tensors="pt"), max_new_tokens=64)

Names are imported when they are first used: `import mtpd` alone takes no time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mtpd.evaluate.acceptance import Acceptance
    from mtpd.recipe import Recipe, load_recipe
    from mtpd.run.distill import distill
    from mtpd.run.loading import load

__all__ = ["Acceptance", "Recipe", "__version__", "distill", "load", "load_recipe"]

_HOMES = {
    "Acceptance": "mtpd.evaluate.acceptance",
    "Recipe": "mtpd.recipe",
    "distill": "mtpd.run.distill",
    "load": "mtpd.run.loading",
    "load_recipe": "mtpd.recipe",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("mtpd")
    except PackageNotFoundError:
        return "0 (not installed)"
