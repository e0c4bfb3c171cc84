"""PEFT adapters as models: merged in memory into the model that they are for."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from transformers import PreTrainedModel

from mtpd.data.find_model import Adapter
from mtpd.errors import UserError

PREFIX = "base_model.model."
"""Of the names of modules in an adapter's file."""


def merge_adapter(model: PreTrainedModel, adapter: Adapter, name: str) -> PreTrainedModel:
    """Merges an adapter into its base, modules that were trained as a whole included.

    Args:
        name: what messages call the adapter.

    Raises:
        UserError: an adapter of a kind that cannot be merged, or of another model.
    """
    from peft import PeftConfig, PeftModel  # takes seconds to import

    try:
        config = PeftConfig.from_pretrained(str(adapter.path))
        if config.is_prompt_learning or config.is_adaption_prompt:
            raise UserError(
                f"model {name}: is an adapter of kind {config.peft_type.value}, which cannot be merged into its base; "
                "accepted: LoRA, and others that change weights"
            )
        config.inference_mode = True
        wrapped = PeftModel(model, config)
        found = wrapped.load_adapter(str(adapter.path), "default", torch_device=str(model.device))
        # PEFT writes an embedding that was resized and trained twice, and reads one of the two.
        odd = [*found.missing_keys, *(key for key in found.unexpected_keys if "modules_to_save" not in key)]
        if odd:
            raise UserError(f"model {name}: is an adapter that does not fit {adapter.base}: {odd[0]} is in one of them")
        return wrapped.merge_and_unload(safe_merge=True).requires_grad_(False)
    except UserError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model {name}: is an adapter that cannot be merged into {adapter.base}: {reason}") from error


def resize_for(model: PreTrainedModel, path: Path) -> None:
    """Gives the embedding as many rows as an adapter has, which was trained with further tokens."""
    embedding = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embedding)
    for file in path.glob("adapter_model*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                if key.startswith(f"{PREFIX}{name}.") and key.endswith("weight") and "lora_" not in key:
                    rows = opened.get_slice(key).get_shape()[0]
                    if rows != embedding.weight.shape[0]:
                        model.resize_token_embeddings(rows, mean_resizing=False)
                    return
