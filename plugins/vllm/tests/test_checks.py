"""What the plugin refuses before the first request, without vLLM."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from mtpd_vllm.checks import SAME, refused, refused_base, refused_setting


def settings(
    *, drafts: int = 3, stages: int = 1, replicas: int = 1, lora: object = None, second: bool = False
) -> SimpleNamespace:
    """The settings of a server that the checks read."""
    return SimpleNamespace(
        speculative_config=SimpleNamespace(num_speculative_tokens=drafts),
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages, data_parallel_size=replicas),
        lora_config=lora,
        use_v2_model_runner=second,
    )


REFUSED: dict[str, tuple[dict[str, Any], bool, str]] = {
    "drafts": ({"drafts": 4}, True, "num_speculative_tokens 4 is not accepted; accepted: 1 to 3, the heads there are"),
    "stages": ({"stages": 2, "second": True}, True, "pipeline_parallel_size 2 is not accepted"),
    "LoRA": ({"lora": object()}, True, "enable_lora is not accepted"),
    "proposer": ({"drafts": 2}, False, "num_speculative_tokens 2 is not accepted on the V1 runner of this vLLM"),
    "replicas": ({"replicas": 2}, True, "data_parallel_size above 1 is not accepted on the V1 runner"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_would_draft_wrongly_are_refused(case: str) -> None:
    """Fault: more drafts than heads, stages without the embedding, LoRA or a changed proposer, served silently."""
    changes, drafter, words = REFUSED[case]
    said = refused_setting(settings(**changes), 3, drafter=drafter)
    assert said is not None
    assert words in said
    assert said.startswith("mtpd-vllm: ")
    assert "accepted:" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("changes", "drafter"),
    [({}, True), ({"drafts": 1}, False), ({"second": True}, False), ({"second": True, "replicas": 2}, False)],
)
def test_settings_that_are_served(changes: dict[str, Any], drafter: bool) -> None:
    """Fault: a refusal of what is served, such as the V2 runner for want of the V1 runner's proposer."""
    assert refused_setting(settings(**changes), 3, drafter=drafter) is None


@pytest.mark.parametrize(
    ("found", "hooks", "words"),
    [
        ("0.27.1", True, "vLLM 0.27.1 is not known to it; accepted: 0.28 and newer, below 0.34"),
        ("0.34.0rc1", True, "vLLM 0.34.0rc1 is not known to it"),
        ("1.0", True, "vLLM 1.0 is not known to it"),
        ("0.30.0", False, "vLLM 0.30.0 lacks its hooks for several MTP heads"),
        ("0.28.0", True, None),
        ("0.33.1+cpu", True, None),
    ],
)
def test_versions(found: str, hooks: bool, words: str | None) -> None:
    """Fault: heads served by a vLLM whose private parts are others."""
    said = refused(found, hooks=hooks)
    assert (said is None) == (words is None)
    assert words is None or words in str(said)


@pytest.mark.parametrize("key", SAME)
def test_another_base_is_named_by_its_key(key: str) -> None:
    """Fault: heads beside another base, which drafts what nobody accepts."""
    base = dict.fromkeys(SAME, 4) | {"model_type": "llama"}
    config = SimpleNamespace(**base | {"model_type": "mtp", "base_model_type": "llama"})
    assert refused_base(SimpleNamespace(**base), config) is None
    said = refused_base(SimpleNamespace(**base | {key: 5}), config)
    assert said is not None
    assert f"for another base: its {key} is {base[key]}, that of the one served 5" in said
