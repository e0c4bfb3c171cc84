"""Heads for a model through the Python API, and what they gain.

    python examples/quickstart.py
    python examples/quickstart.py ./my-checkpoint runs/my-quickstart

A model is a hub id, a local directory, a .gguf file, `demo` (SmolLM2-135M-Instruct), or `tiny`: random weights,
which show in seconds that all works, and gain nothing. The second word is the run directory.
"""

import sys

import mtpd

SMALL = ["heads.depth=2", "data.limit=32", "evaluation.prompts_limit=7", "evaluation.max_new_tokens=32"]


def main(model: str = "tiny", output: str = "runs/quickstart") -> None:
    recipe = mtpd.load_recipe(None, [f"model={model}", f"output={output}", *SMALL])
    run = mtpd.distill(recipe)
    for name in ("acceptance-before.json", "acceptance.json"):
        held_out = mtpd.Acceptance.load(run / name).total()
        car = " ".join(f"CAR_{k}={share:.2f}" for k, share in enumerate(held_out.car, start=1))
        print(f"{name}: tau={held_out.tau:.2f} tokens per forward pass, {car}")
    print(f"the heads are in {run / 'heads'}")


if __name__ == "__main__":
    main(*sys.argv[1:])
