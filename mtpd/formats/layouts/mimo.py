"""Base and block together under MiMo-7B's names, for vLLM, which hands the block the state before the final norm."""

from __future__ import annotations

from mtpd.formats.exported_run import Run
from mtpd.formats.families.fastmtp import FAMILY
from mtpd.formats.layout import VLLM, Layout
from mtpd.formats.layouts import fastmtp, mimo_draft
from mtpd.formats.norm_folding import same_size


def refused(run: Run) -> str | None:
    if reason := mimo_draft.refused(run):
        return reason
    gain, eps = run.base_norm().load(), float(run.base.text_config.get("rms_norm_eps") or 1e-6)
    # Signs could only be moved into the whole base (`mtpd.formats.norm_folding`).
    if same_size(gain, eps=eps) and bool((gain > 0).all()):
        return None
    return (
        "the engine hands on the base's state before its final norm, and the heads have learned from the state after "
        "it; that is the same only where all gains of the norm are equal, and here they are not; accepted: mimo-draft, "
        "hf-mtp"
    )


LAYOUT = Layout(
    "mimo",
    "base and heads together under MiMo's names, for engines that hand on the state before the final norm",
    refused,
    fastmtp.write,
    {"vllm": VLLM},
    rank=30,
    family=FAMILY,
)
