"""What an export layout is, and the ones there are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mtpd.formats.exported_run import Run
from mtpd.formats.layouts import glm4_moe, hf_mtp, in_place, medusa, mimo, speculators
from mtpd.heads.chain.config import KIND as CHAIN_HEADS
from mtpd.heads.medusa.config import KIND as MEDUSA_HEADS


@dataclass(frozen=True)
class Layout:
    """One form of an exported directory.

    Attributes:
        about: for the model card: what the directory is.
        refused: why a run does not fit, with the alternative; None if it does.
        write: fills an empty directory, all but its model card.
        serve: commands by engine; `{out}` is the directory, `{base}` the base, `{k}` the drafts a round, `{n}` the
            heads that were written.
    """

    name: str
    about: str
    refused: Callable[[Run], str | None]
    write: Callable[[Run, Path], None]
    serve: dict[str, str]
    kind: str = CHAIN_HEADS.name
    """Of the heads that it is for."""


TRANSFORMERS = (
    'AutoModelForCausalLM.from_pretrained("{out}", trust_remote_code=True).generate(**inputs)  # drafts {k} a round'
)
VLLM = """vllm serve {out} --speculative-config '{{"method": "mtp", "num_speculative_tokens": {k}}}'"""
DRAFT = (
    """vllm serve {base} --hf-overrides '{{"num_nextn_predict_layers": 1}}' --speculative-config """
    """'{{"method": "mtp", "model": "{out}", "num_speculative_tokens": {k}}}'"""
)
SGLANG = (
    "python -m sglang.launch_server --model-path {out} --speculative-algorithm NEXTN --speculative-num-steps {k} "
    "--speculative-eagle-topk 1"
)

SGLANG_DRAFT = (
    "python -m sglang.launch_server --model-path {base} --speculative-algorithm NEXTN "
    "--speculative-draft-model-path {out} --speculative-num-steps {k} --speculative-eagle-topk 1"
)
# Models of this kind name the MTP layers of the published sizes alone.
GLM = (
    'model = AutoModelForCausalLM.from_pretrained("{out}")\n'
    "first = model.config.num_hidden_layers\n"
    'model._keys_to_ignore_on_load_unexpected = [rf"model\\.layers\\.{{first + i}}\\." for i in range({n})]\n'
    "model.generate(**inputs, use_mtp=True)  # drafts {n} a round"
)
MEDUSA = (
    "vllm serve {base} --speculative-config "
    """'{{"method": "medusa", "model": "{out}", "num_speculative_tokens": {k}}}'"""
)

LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout(
            "in-place",
            "the base with its own MTP tensors replaced; every other file is the base's, byte for byte",
            in_place.refused,
            in_place.write,
            {
                "transformers": 'AutoModelForCausalLM.from_pretrained("{out}").generate(**inputs, use_mtp=True)',
                "vLLM": VLLM,
                "SGLang (not run by mtpd's authors)": SGLANG,
            },
        ),
        Layout(
            "hf-mtp",
            "the base with heads as further layers, in transformers' own MTP layout",
            hf_mtp.refused,
            hf_mtp.write,
            {"transformers": TRANSFORMERS},
        ),
        Layout(
            "mimo-draft",
            "a draft model beside an unchanged base: one block that is used at every depth, under MiMo's names",
            mimo.draft_refused,
            mimo.write_draft,
            {"vLLM": DRAFT, "SGLang (not run by mtpd's authors)": SGLANG_DRAFT},
        ),
        Layout(
            "mimo",
            "base and heads together under MiMo's names, for engines that hand on the state before the final norm",
            mimo.refused,
            mimo.write,
            {"vLLM": VLLM},
        ),
        Layout(
            "fastmtp",
            "base and heads together under MiMo's names, for engines that hand on the state after the final norm",
            mimo.fastmtp_refused,
            mimo.write,
            {"SGLang (not run by mtpd's authors)": SGLANG},
        ),
        Layout(
            "glm4moe",
            "base and heads written exactly as a GLM-4.5 model, which engines know with MTP",
            glm4_moe.refused,
            glm4_moe.write,
            {"vLLM": VLLM, "transformers": GLM},
        ),
        Layout(
            "speculators",
            'one block as a speculators "mtp" model: for exchange, no engine loads it for these bases',
            speculators.refused,
            speculators.write,
            {},
        ),
        Layout(
            "medusa",
            "Medusa heads beside an unchanged base",
            medusa.refused,
            medusa.write,
            {"vLLM": MEDUSA},
            kind=MEDUSA_HEADS.name,
        ),
    )
}
