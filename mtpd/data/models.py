"""Models by name: a hub id, a local directory, a `.gguf` file, or the built-in `demo` and `tiny`."""

from __future__ import annotations

from typing import Any, Literal, overload

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mtpd.data import builtin_models
from mtpd.data.find_model import locate
from mtpd.data.sources import hub_access
from mtpd.errors import MtpdError, UserError
from mtpd.files import fingerprint_json

WITHOUT_NETWORK = (
    "without network these work: a local directory, a .gguf file, `tiny`, "
    "and `demo` where PyPI can be reached or it is cached"
)
SAMPLED = 1024
"""Elements of each tensor that a fingerprint reads."""


@overload
def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    config_only: Literal[False] = False,
    empty: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]: ...
@overload
def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    config_only: Literal[True],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]: ...
def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    config_only: bool = False,
    empty: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Loads a causal LM, in eval mode, and its tokenizer.

    Attention is PyTorch's scaled dot product wherever the architecture allows it (transformers' default).

    Args:
        name: hub id, local directory, .gguf file, "demo" (SmolLM2-135M-Instruct) or "tiny" (random weights).
        dtype: "auto", "float32", "bfloat16" or "float16"; auto is bfloat16 where the device has it.
        device: "auto" or a torch device.
        trust_remote_code: whether code that comes with the model may run.
        config_only: builds the model on the meta device, without weights; the tokenizer is then
            None where there is none (a config alone is enough to plan a run).
        empty: leaves the weights as the memory was; another process has them.

    Raises:
        UserError: the model is missing, cannot be read, is no causal LM, lacks weights, needs remote
            code, or does not fit its tokenizer.
    """
    where = resolve_device(device)
    number = resolve_dtype(dtype, where)
    if name == "tiny":
        model, tokenizer = builtin_models.tiny()
        if config_only:
            return _on_meta(model.config, number, trust_remote_code), tokenizer
        return model.to(device=where, dtype=number).eval(), tokenizer
    if name == "demo":
        if config_only and not builtin_models.demo_cached():
            return _on_meta(builtin_models.demo_config(), number, trust_remote_code), None
        name, shown = str(builtin_models.demo_directory()), "demo"
    else:
        shown = name

    place, local, options = locate(name, weights=not config_only and not empty)
    options["trust_remote_code"] = trust_remote_code
    with hub_access(needed=not local) as reachable:
        try:
            if config_only:
                config = AutoConfig.from_pretrained(place, **options)
                model = _on_meta(config, number, trust_remote_code)
            elif empty:
                model = _without_weights(place, options, number, where)
            else:
                model = _with_weights(place, options, shown, number, where)
            tokenizer = _tokenizer(place, options, shown, needed=not config_only)
        except MtpdError:
            raise
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise MtpdError(f"model {shown}: not enough memory on {where} for its weights") from error
        except Exception as error:
            raise _explain(error, shown, local=local, reachable=reachable) from error
    check_vocabulary(model, tokenizer, name=shown)
    return model.eval(), tokenizer


def resolve_device(device: str) -> torch.device:
    """A torch device that exists here; "auto" is the accelerator if there is one.

    Raises:
        UserError: there is no such device.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return accelerator or torch.device("cpu")
    try:
        where = torch.device(device)
        torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device: {device} is not usable here; accepted are auto, cpu, and what PyTorch sees"
        ) from error
    return where


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """The number format: "auto" is bfloat16 where the device computes in it, and float32 elsewhere."""
    if dtype != "auto":
        found = getattr(torch, dtype, None)
        if found not in (torch.float32, torch.bfloat16, torch.float16):
            raise UserError(f"dtype: {dtype} is not accepted; choose auto, float32, bfloat16 or float16")
        return found
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        # PyTorch computes in bfloat16 on every processor, but only these instructions make it faster.
        native = any(value is True and "bf16" in key for key, value in torch.cpu.get_capabilities().items())
    else:
        native = False
    return torch.bfloat16 if native else torch.float32


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, name: str) -> None:
    """Raises UserError if the tokenizer has tokens that the model has no embedding for, or no output head exists."""
    if model.get_output_embeddings() is None:
        raise UserError(f"model {name}: {type(model).__name__} has no output head, so it has nothing to teach heads")
    rows = model.get_input_embeddings().weight.shape[0]
    if tokenizer is not None and len(tokenizer) > rows:
        raise UserError(
            f"model {name}: its tokenizer has {len(tokenizer)} tokens but the model embeds only {rows}; "
            "they do not belong together"
        )


def trunk_fingerprint(model: PreTrainedModel, dtype: torch.dtype | None = None) -> str:
    """SHA-256 that tells trunks apart: configuration, and names, shapes, number formats and a sample of the weights.

    Of each tensor up to 1,024 elements at equal distances are read, so that it takes no time. Models that
    were trained differently differ in it; a change of single weights between the sampled ones is not seen.
    Where the model was loaded from makes no difference.

    Args:
        dtype: takes the weights as they are in this number format.
    """
    volatile = ("transformers_version", "dtype", "torch_dtype", "architectures", "use_cache")
    settings = {
        key: value for key, value in model.config.to_dict().items() if not key.startswith("_") and key not in volatile
    }
    tensors = []
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        step = max(1, values.numel() // SAMPLED)
        sample = values[::step][:SAMPLED].to(dtype or values.dtype)
        read = "" if sample.is_meta else sample.cpu().contiguous().view(torch.uint8).numpy().tobytes().hex()
        tensors.append([name, list(parameter.shape), str(sample.dtype), read])
    return fingerprint_json([type(model).__name__, settings, tensors])


def _with_weights(
    place: str, options: dict[str, Any], name: str, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    further: dict[str, Any] = builtin_models.gguf_options() if "gguf_file" in options else {"use_safetensors": True}
    model, report = AutoModelForCausalLM.from_pretrained(
        place, dtype=dtype, output_loading_info=True, **options, **further
    )
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers only warns, and fills them with random numbers.
        raise UserError(f"model {name}: its files lack {len(missing)} weights, among them {missing[0]}")
    # Weights from a GGUF file come in float32 whatever is asked for.
    return model.to(device=device, dtype=dtype)


def _without_weights(place: str, options: dict[str, Any], dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    from transformers.initialization import no_init_weights

    config = AutoConfig.from_pretrained(place, **options)
    # Memory that is not written to is not taken.
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, trust_remote_code=bool(options["trust_remote_code"])
        )
    model.tie_weights()
    return model


def _tokenizer(place: str, options: dict[str, Any], name: str, *, needed: bool) -> PreTrainedTokenizerBase | None:
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        # Where files are missing, transformers makes a tokenizer of its special tokens alone for some models.
        if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
            raise UserError("it has no vocabulary: are its files, such as tokenizer.json, there?")
        return tokenizer
    except Exception as error:
        if not needed:
            return None
        if "remote" in str(error) or "custom code" in str(error):
            raise
        raise UserError(f"model {name}: its tokenizer cannot be loaded ({_first_line(error)})") from error


def _on_meta(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()


def _explain(error: Exception, name: str, *, local: bool, reachable: bool) -> UserError:
    text = str(error)
    if "trust_remote_code" in text or "custom code" in text:
        return UserError(f"model {name}: it needs code that comes with it; set trust_remote_code=true if you trust it")
    if "gguf" in text.lower() and "architecture" in text:
        from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

        known = ", ".join(sorted(GGUF_CONFIG_MAPPING))
        return UserError(f"model {name}: transformers reads no GGUF files of its architecture; accepted: {known}")
    if not local and not reachable:
        return UserError(f"model {name}: the hub cannot be reached and no copy is cached; {WITHOUT_NETWORK}")
    if "Unrecognized configuration class" in text:
        return UserError(f"model {name}: it is not a causal language model that transformers knows")
    return UserError(f"model {name}: cannot be loaded: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def real_tokens(model: Any, tokenizer: Any) -> int:
    """Rows of the vocabulary that are tokens; those past them only pad the matrix to a round size."""
    rows = model.get_output_embeddings().weight.shape[0]
    return min(rows, max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1))
