"""The `config.json` of an export: the base's config, and what the heads are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from mtpd_vllm.checks import refused_version


class MtpdConfig(PreTrainedConfig):
    """The config of a base with chain heads.

    Args:
        base_model_type: the base's `model_type`; all other keys of its config follow.
        block_of: by head, the number of its block, from 0 on: heads may share one. There are as many heads.
        draft_vocab_size: tokens that are drafted; 0 is all.

    Raises:
        ValueError: this vLLM is not accepted.
    """

    # One of the types for which vLLM chooses its method "mtp".
    model_type = "mtp"

    def __init__(
        self,
        base_model_type: str = "",
        block_of: Sequence[int] = (),
        draft_vocab_size: int = 0,
        architectures: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        # transformers makes one without arguments, to see what the defaults are.
        if base_model_type:
            if refusal := refused_version():
                raise ValueError(refusal)
            kwargs.pop("model_type", None)
            base = AutoConfig.for_model(base_model_type, **kwargs)
            # Its rotary settings and defaults are then the base's own.
            self.__dict__.update(vars(base))
            # A head's layer has a number behind the base's, and no sliding window.
            self.__dict__.pop("layer_types", None)
        self.architectures = architectures
        self.base_model_type = base_model_type
        # The key by which vLLM chooses its speculator for several heads.
        self.num_nextn_predict_layers = len(block_of)
        self.block_of = list(block_of)
        self.draft_vocab_size = draft_vocab_size
