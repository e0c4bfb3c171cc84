"""Step-3.5: each head has an output head of its own, and hands its state on before the norm."""

from mtpd.formats.family import NORM, UNEMBEDDING, Family, layered

FAMILY = Family(
    name="step3.5",
    title="Step-3.5",
    model_types=("step3p5", "step3p7"),
    counts=("num_nextn_predict_layers",),
    names=(
        ("model.layers.{n}.transformer.shared_head.norm.weight", NORM),
        ("model.layers.{n}.transformer.shared_head.output.weight", UNEMBEDDING),
        *layered("model.layers.{n}"),
    ),
    hidden="before",
    recycled="before",
    norm="one_plus",
    own_output=True,
    cannot_run="its heads read states before the norm and have output heads of their own",
    engines=("vLLM", "SGLang", "llama.cpp"),
    reference="vLLM step3p5_mtp.py",
)
