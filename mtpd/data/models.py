"""Models by name: a hub id, a directory of a model or an adapter, a `.gguf` file, or the built-in `demo` and `tiny`."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import cache
from pathlib import Path
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
from mtpd.data.find_model import BUILT_IN, find_adapter, locate, refused_base
from mtpd.data.load_errors import explain, first_line, quantisation_of
from mtpd.data.merge_adapter import merge_adapter, resize_for
from mtpd.data.sources import hub_access
from mtpd.errors import MtpdError, UserError
from mtpd.files import fingerprint_json
from mtpd.quantised import cast_ordinary, has_quantised, rows_of

logger = logging.getLogger(__name__)

NVIDIA = Path("/dev/nvidia0")
"""Is there where Linux has the driver of a GPU, whether PyTorch can use it or not."""
LARGE = 3_000_000_000
"""Parameters of a model that runs on a CPU only where the user says so."""
SAMPLED = 1024
"""Elements of each tensor that a fingerprint reads."""


@overload
def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    base: str | None = None,
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
    base: str | None = None,
    config_only: Literal[True],
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]: ...
def load_model(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    base: str | None = None,
    config_only: bool = False,
    empty: bool = False,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Loads a causal LM, in eval mode, and its tokenizer.

    Attention is PyTorch's scaled dot product wherever the architecture allows it (transformers' default).

    Args:
        name: hub id, local directory, .gguf file, "demo" (SmolLM2-135M-Instruct) or "tiny" (random weights). The
            directory of a PEFT adapter means the adapter merged into its base, and a line says so.
        dtype: "auto", "float32", "bfloat16" or "float16"; auto is bfloat16 where the device has it.
        device: "auto" or a torch device.
        trust_remote_code: whether code that comes with the model may run.
        base: the model that an adapter is for, in place of what the adapter says.
        config_only: builds the model on the meta device, without weights; the tokenizer is then
            None where there is none (a config alone is enough to plan a run).
        empty: leaves the weights as the memory was; another process has them.

    Raises:
        UserError: the model is missing, cannot be read, is no causal LM, lacks weights, needs remote
            code, or does not fit its tokenizer.
    """
    adapter = find_adapter(name, base, weights=not config_only and not empty)
    if adapter is not None:
        further: dict[str, Any] = {"config_only": True} if config_only else {"empty": empty}
        try:
            model, tokenizer = load_model(
                adapter.base, dtype=dtype, device=device, trust_remote_code=trust_remote_code, **further
            )
        except UserError as error:
            raise refused_base(name, adapter, error) from error
        if any(adapter.path.glob("tokenizer*")):
            tokenizer = _tokenizer(
                str(adapter.path), {"trust_remote_code": trust_remote_code}, name, needed=not config_only
            )
        resize_for(model, adapter.path)
        if not config_only and not empty:
            model = merge_adapter(model, adapter, name)
            logger.warning("model %s: is an adapter for %s; the two are merged in memory", name, adapter.base)
        refuse_unknown_tokens(model, tokenizer, name=name)
        return model.eval(), tokenizer
    where = resolve_device(device)
    if where.type == "cuda" and where.index is not None:
        # Kernels of libraries run on the current device, whatever their tensors say.
        torch.cuda.set_device(where)
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
            if device == "auto" and where.type == "cpu" and not config_only and unusable_gpu() is not None:
                _refuse_large(AutoConfig.from_pretrained(place, **options), shown, trust_remote_code)
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
            how = quantisation_of(place, options) if local or reachable else None
            raise explain(error, shown, local=local, reachable=reachable, quantised=how) from error
    check_output_head(model, name=shown)
    refuse_unknown_tokens(model, tokenizer, name=shown)
    return model.eval(), tokenizer


def context_of(name: str, *, trust_remote_code: bool = False, base: str | None = None) -> int | None:
    """The longest sequence, in tokens, that a model was made for, from its configuration alone; None if it says none.

    Raises:
        UserError: as `load_model`.
    """
    adapter = find_adapter(name, base, weights=False)
    if adapter is not None:
        return context_of(adapter.base, trust_remote_code=trust_remote_code)
    if name in BUILT_IN:
        config: Any = builtin_models.demo_config() if name == "demo" else builtin_models.tiny()[0].config
    else:
        place, local, options = locate(name, weights=False)
        with hub_access(needed=not local) as reachable:
            try:
                config = AutoConfig.from_pretrained(place, trust_remote_code=trust_remote_code, **options)
            except Exception as error:
                raise explain(error, name, local=local, reachable=reachable) from error
    return getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)


def resolve_device(device: str) -> torch.device:
    """A torch device that exists here; "auto" is the accelerator if there is one.

    Raises:
        UserError: there is no such device.
    """
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if accelerator is None:
            _warn_of_unusable_gpu()
        return accelerator or torch.device("cpu")
    try:
        where = torch.device(device)
        if where.type == "cuda":
            # A tensor there would take half a gigabyte on the first GPU for each process that has another one.
            if (where.index or 0) >= torch.cuda.device_count():
                raise RuntimeError(unusable_gpu() or f"PyTorch sees {torch.cuda.device_count()} of them")
        else:
            torch.empty(1, device=where)
    except (RuntimeError, AssertionError) as error:
        why = f" ({first_line(error)})" if device.startswith("cuda") else ""
        raise UserError(
            f"device: {device} is not usable here{why}; accepted are auto, cpu, and what PyTorch sees"
        ) from error
    return where


def describe_device(device: torch.device) -> str:
    """Names a device for people, with what it is where it is a GPU."""
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def unusable_gpu() -> str | None:
    """Why PyTorch does not use the NVIDIA GPU that this machine has; None if it has none, or PyTorch does use it."""
    if not NVIDIA.exists() or torch.cuda.is_available():
        return None
    if torch.version.cuda is None:
        return "this PyTorch is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return first_line(error)
    return "PyTorch sees none"


@cache
def _warn_of_unusable_gpu() -> None:
    why = unusable_gpu()
    if why is not None:
        logger.warning("this machine has an NVIDIA GPU that cannot be used (%s): everything runs on the CPU", why)


def _refuse_large(config: PretrainedConfig, name: str, trust_remote_code: bool) -> None:
    """Raises UserError for a model that would run for days on a CPU that the user does not know of."""
    model = _on_meta(config, torch.float32, trust_remote_code)
    count = sum(parameter.numel() for parameter in model.parameters())
    if count > LARGE:
        raise UserError(
            f"device: auto is the CPU, since the GPU of this machine cannot be used ({unusable_gpu()}), and model "
            f"{name} has {count / 1e9:.1f}G parameters; accepted: a PyTorch that sees the GPU, or device=cpu"
        )


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


def check_output_head(model: PreTrainedModel, *, name: str) -> None:
    """Raises UserError for a model without an output head."""
    if model.get_output_embeddings() is None:
        raise UserError(f"model {name}: {type(model).__name__} has no output head, so it has nothing to teach heads")


def refuse_unknown_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, *, name: str) -> None:
    """Makes a tokenizer that has more tokens than the model embeds refuse text with one of those.

    Text models that were cut out of larger ones have such tokenizers: their text has none of these tokens.
    """
    rows = rows_of(model.get_input_embeddings())
    if tokenizer is not None and max(tokenizer.get_vocab().values(), default=0) >= rows:
        tokenizer._encode_plus = _KnownTokens(tokenizer, rows, name)


class _KnownTokens:
    """The encoding of a tokenizer, which all text passes, up to a number of tokens."""

    def __init__(self, tokenizer: Any, rows: int, name: str) -> None:
        self.tokenizer, self.rows, self.name = tokenizer, rows, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        found = type(self.tokenizer)._encode_plus(self.tokenizer, *args, **kwargs)
        ids = found["input_ids"]
        ids = ids.tolist() if isinstance(ids, torch.Tensor) else ids
        for text in ids if ids and isinstance(ids[0], list) else [ids]:
            unknown = next((token for token in text if token >= self.rows), None)
            if unknown is not None:
                raise UserError(
                    f"model {self.name}: text has token {unknown} ({self.tokenizer.convert_ids_to_tokens(unknown)!r}), "
                    f"which its tokenizer knows and the model does not: it embeds {self.rows:,} tokens; accepted: text "
                    "without it, or the tokenizer that the model was trained with"
                )
        return found


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
    quantised = has_quantised(model)
    for name, parameter in _stored_tensors(model, quantised):
        values = parameter.detach().flatten()
        step = max(1, values.numel() // SAMPLED)
        sample = values[::step][:SAMPLED].to(values.dtype if quantised else dtype or values.dtype)
        read = "" if sample.is_meta else sample.cpu().contiguous().view(torch.uint8).numpy().tobytes().hex()
        tensors.append([name, list(parameter.shape), str(sample.dtype), read])
    return fingerprint_json([type(model).__name__, settings, tensors])


def _stored_tensors(model: PreTrainedModel, quantised: bool) -> Iterator[tuple[str, torch.Tensor]]:
    """What a model keeps its weights in: parameters, and for some ways of quantising buffers and tensors of a class."""
    if not quantised:
        yield from model.named_parameters()
        return
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        own = type(tensor) not in (torch.Tensor, torch.nn.Parameter) and tensor.is_floating_point()
        yield name, tensor.dequantize() if own else tensor


def _with_weights(
    place: str, options: dict[str, Any], name: str, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    further: dict[str, Any] = builtin_models.gguf_options() if "gguf_file" in options else {"use_safetensors": True}
    if device.type != "cpu" and "gguf_file" not in options:
        # Straight to the device: no process has the whole model in main memory.
        further["device_map"] = {"": device}
    model, report = AutoModelForCausalLM.from_pretrained(
        place, dtype=dtype, output_loading_info=True, **options, **further
    )
    missing = sorted(report["missing_keys"])
    if missing:
        # transformers only warns, and fills them with random numbers.
        raise UserError(f"model {name}: its files lack {len(missing)} weights, among them {missing[0]}")
    if has_quantised(model):
        cast_ordinary(model, dtype)
        # Some libraries unpack at the first forward pass of the whole model, which heads may never call.
        with torch.no_grad():
            model(input_ids=torch.zeros(1, 1, dtype=torch.long, device=model.device), use_cache=False)
        return model
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
        raise UserError(f"model {name}: its tokenizer cannot be loaded ({first_line(error)})") from error


def _on_meta(config: PretrainedConfig, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code).eval()


def real_tokens(model: Any, tokenizer: Any) -> int:
    """Rows of the vocabulary that are tokens; those past them only pad the matrix to a round size."""
    rows = rows_of(model.get_output_embeddings())
    return min(rows, max(len(tokenizer), max(tokenizer.get_vocab().values()) + 1))
