"""What the plugin refuses, in one line each, before the first request."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

FIRST, BEYOND = (0, 28), (0, 34)
"""vLLM from the first of these on, and below the second. What was run is in the README."""
SAME = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
"""Keys of the base's config in which another base is seen."""


@cache
def refused_version() -> str | None:
    """Says why this vLLM is not accepted; None if it is."""
    from vllm import __version__ as found
    from vllm.config import SpeculativeConfig
    from vllm.config.speculative import MTPModelTypes

    hooks = "mtp" in getattr(MTPModelTypes, "__args__", ()) and hasattr(SpeculativeConfig, "use_multi_module_mtp")
    return refused(found, hooks=hooks)


def refused(found: str, *, hooks: bool) -> str | None:
    """Says why a version of vLLM is not accepted; None if it is.

    Args:
        hooks: whether it has what the plugin builds on.
    """
    numbers = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    accepted = f"{'.'.join(map(str, FIRST))} and newer, below {'.'.join(map(str, BEYOND))}"
    if not FIRST <= numbers < BEYOND:
        return f"mtpd-vllm: vLLM {found} is not known to it; accepted: {accepted}"
    if not hooks:
        return f"mtpd-vllm: vLLM {found} lacks its hooks for several MTP heads; accepted: an unchanged {accepted}"
    return None


def refused_setting(vllm_config: Any, heads: int, *, drafter: bool) -> str | None:
    """Says why heads are not served with these settings; None if they are.

    Args:
        heads: how many there are.
        drafter: whether this plugin's proposer is in place for the V1 runner.
    """
    drafts = vllm_config.speculative_config.num_speculative_tokens
    parallel = vllm_config.parallel_config
    first = not vllm_config.use_v2_model_runner
    what = f"mtpd-vllm: num_speculative_tokens {drafts} is not accepted"
    if drafts > heads:
        return f"{what}; accepted: 1 to {heads}, the heads there are"
    if parallel.pipeline_parallel_size > 1:
        return (
            f"mtpd-vllm: pipeline_parallel_size {parallel.pipeline_parallel_size} is not accepted, its last stage "
            "lacks the base's embedding; accepted: 1, with tensor_parallel_size for several GPUs"
        )
    if vllm_config.lora_config is not None:
        return "mtpd-vllm: enable_lora is not accepted, heads are for one base; accepted: a base with LoRA merged"
    if first and drafts > 1 and not drafter:
        return (
            f"{what} on the V1 runner of this vLLM, whose code has changed; accepted: 1, or the V2 runner "
            "(VLLM_USE_V2_MODEL_RUNNER=1)"
        )
    if first and parallel.data_parallel_size > 1:
        return "mtpd-vllm: data_parallel_size above 1 is not accepted on the V1 runner; accepted: the V2 runner, or 1"
    return None


def refused_base(base: Any, config: Any) -> str | None:
    """Says in which key the config of the served base differs from that of the heads' own; None if it does not."""
    for key in SAME:
        ours = config.base_model_type if key == "model_type" else getattr(config, key, None)
        theirs = getattr(base, key, None)
        if ours != theirs:
            return f"mtpd-vllm: these heads are for another base: its {key} is {ours}, that of the one served {theirs}"
    return None
