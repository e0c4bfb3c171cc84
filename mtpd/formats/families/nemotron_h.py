"""Nemotron-H: a head is several sub-layers, the first of them with the projection, the last with the norm."""

from mtpd.formats.family import EMBED, HIDDEN, NORM, PROJECT, Family

FAMILY = Family(
    name="nemotron-h",
    title="Nemotron-H",
    model_types=("nemotron_h",),
    counts=("num_nextn_predict_layers",),
    names=(
        ("mtp.layers.{first}.enorm.weight", EMBED),
        ("mtp.layers.{first}.hnorm.weight", HIDDEN),
        ("mtp.layers.{first}.eh_proj.weight", PROJECT),
        ("mtp.layers.{last}.final_layernorm.weight", NORM),
        ("mtp.layers.{s}.{rest}", "layers.{i}.block.layers.{j}.{rest}"),
    ),
    sublayers="mtp_layers_block_type",
    cannot_run="its heads are several layers each, and a chain head has one",
    engines=("vLLM",),
    reference="vLLM nemotron_h_mtp.py",
)
