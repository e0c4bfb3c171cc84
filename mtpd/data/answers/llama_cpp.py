"""llama.cpp's own form of a completion, which gives token ids back; its OpenAI one gives text alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

PATH = "/completion"


def is_llama_cpp(answer: Mapping[str, Any]) -> bool:
    """Whether an answer to OpenAI's request is llama.cpp's: no other server has its timings."""
    timings = answer.get("timings")
    return isinstance(timings, Mapping) and "predicted_n" in timings


def as_own(body: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI's request in llama.cpp's form, drawn as other engines do: temperature first, then top-p, nothing else."""
    return {
        "prompt": body["prompt"],
        "n_predict": body["max_tokens"],
        "temperature": body["temperature"],
        "top_p": body["top_p"],
        "samplers": ["temperature", "top_p"],
        "return_tokens": True,
    }


def as_openai(answer: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's answer in OpenAI's form, with the ids that vLLM adds to it."""
    choice = {
        "text": answer.get("content", ""),
        "token_ids": answer.get("tokens"),
        "finish_reason": "length" if answer.get("stop_type") == "limit" else "stop",
    }
    return {**answer, "choices": [choice], "usage": {"completion_tokens": answer.get("tokens_predicted")}}
