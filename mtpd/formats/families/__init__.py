"""Families of native MTP checkpoints, one small table each. A new family is a file here and a line below."""

from mtpd.formats.families import (
    deepseek_v3,
    ernie4_5_moe,
    evabyte,
    exaone_moe,
    fastmtp,
    glm4_moe,
    inkling,
    medusa,
    mimo_7b,
    mimo_v2,
    nemotron_h,
    qwen3_5,
    qwen3_next,
    speculators,
    step3_5,
    transformers_native,
)
from mtpd.formats.families.table import Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (
        deepseek_v3,
        glm4_moe,
        qwen3_next,
        qwen3_5,
        mimo_7b,
        mimo_v2,
        ernie4_5_moe,
        step3_5,
        exaone_moe,
        nemotron_h,
        inkling,
        transformers_native,
        speculators,
        fastmtp,
        medusa,
        evabyte,
    )
}
