"""How often the check of exports (`mtpd.formats.read_back`) is wrong: false alarms, and tensors that nobody reads.

    python benchmarks/read_back.py --json read_back.json
    python benchmarks/read_back.py --run runs/demo --seeds 5

Random models of each kind are exported in each layout and number format, with heads whose attention and MLP add nothing
yet: the check must not depend on what heads have learned. For each seed of the noise every kind of tensor is spoiled. A
false alarm is a tensor that is read and said to be unread. Power is how many kinds are caught of a loader that is given
the same numbers for that kind whatever the file holds. Both are decided by how far outputs move, of which the extremes
are shown. ATEN_CPU_CAPABILITY=default or avx2 and ONEDNN_MAX_CPU_ISA=AVX2 make PyTorch compute as on older machines.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from lab import machine, write_rows
from torch import Tensor
from transformers import AutoModelForCausalLM

from mtpd.formats import layouts
from mtpd.formats.directory import Checkpoint
from mtpd.formats.export import export
from mtpd.formats.exported_run import open_run
from mtpd.formats.find_heads import find_heads, layer_shapes
from mtpd.formats.noise_check import Perturbed, perturbed
from mtpd.formats.read_back import MOVES, Reader, movements, reader_of, texts_of, unread
from mtpd.heads import HeadsConfig, build_heads, save_heads
from mtpd.heads.chain.start import initialise, source_layers
from mtpd.trunk import Trunk

SIZES: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BASES = {
    "llama": transformers.LlamaConfig,
    "mistral": transformers.MistralConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
}
LAYOUTS = {
    "hf-mtp": tuple(BASES),
    "hyv3-draft": ("llama", "mistral", "qwen3"),
    "mimo-draft": ("llama", "qwen2"),
    "mtpd-vllm": tuple(BASES),
    "medusa": ("llama",),
}
FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass
class Found:
    """Movements of outputs where tensors are read, and where a loader ignores them."""

    read: list[float] = field(default_factory=list)
    ignored: list[float] = field(default_factory=list)
    alarms: int = 0

    def row(self, name: str) -> dict[str, Any]:
        return {
            "name": name,
            "false_alarms": self.alarms,
            "read": len(self.read),
            "least_moved": min(self.read),
            "caught": sum(share < MOVES for share in self.ignored),
            "ignored": len(self.ignored),
            "most_moved_ignored": max(self.ignored),
            "unit": "share of the output",
            "machine": machine(),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run of mtpd distill instead of the random models")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    rows = []
    print(f"{'':32} false alarms   least moved   ignored, caught   most moved")
    with tempfile.TemporaryDirectory() as folder:
        for name, run, layout in [(str(options.run), options.run, "hf-mtp")] if options.run else cases(Path(folder)):
            row = checked(run, layout, seeds=options.seeds).row(name)
            rows.append(row)
            print(
                f"{name:32} {row['false_alarms']:5d} of {row['read']:<5d} {row['least_moved']:10.4f}   "
                f"{row['caught']:7d} of {row['ignored']:<5d} {row['most_moved_ignored']:10.1e}",
                flush=True,
            )
    if options.json:
        write_rows(options.json, rows)


def cases(folder: Path) -> Iterator[tuple[str, Path, str]]:
    """Names, runs and layouts."""
    for dtype in FORMATS:
        for layout, bases in LAYOUTS.items():
            for base in bases:
                name = f"{layout}, {base}, {dtype}"
                yield name, random_run(folder / name.replace(", ", "-"), layout, base, dtype), layout


def random_run(folder: Path, layout: str, base: str, dtype: str) -> Path:
    """A run directory, and the checkpoint of its base."""
    torch.manual_seed(0)
    window = {"sliding_window": None} if base == "mistral" else {}
    model = AutoModelForCausalLM.from_config(BASES[base](**SIZES, **window))
    depth = 1 if layout == "mimo-draft" else 2
    trunk = Trunk(model.eval())
    if layout == "medusa":
        config = HeadsConfig(kind="medusa", depth=depth, hidden_size=64, columns=SIZES["vocab_size"])
    else:
        config = HeadsConfig(depth=depth, hidden_size=64, source_layers=source_layers("identity", depth, trunk.depth))
    heads = build_heads(trunk, config)
    if layout != "medusa":
        initialise(heads, trunk, "identity")
    model.to(FORMATS[dtype]).save_pretrained(folder / "base")
    save_heads(heads, folder / "run" / "heads")
    kind = f"kind: {config.kind}, depth: {depth}"
    (folder / "run" / "recipe.yaml").write_text(f"model: {folder / 'base'}\nheads: {{{kind}}}\n")
    return folder / "run"


def checked(path: Path, layout: str, *, seeds: int) -> Found:
    """Exports a run and repeats the check."""
    found = Found()
    with tempfile.TemporaryDirectory() as beside:
        folder = Path(beside) / "out"
        export(path, folder, to=layout, perturb=False)
        run, written = open_run(path), Checkpoint(folder)
        apart = not layer_shapes(written, without=set())
        native = find_heads(written, family=layouts.LAYOUTS[layout].family, base=run.base if apart else written)
        loaded: Any = AutoModelForCausalLM.from_pretrained(run.base.path if apart else folder, dtype="auto")
        trunk = Trunk(loaded.eval())
        _, reader = reader_of(run, native, trunk, texts_of(trunk))
        for seed in range(seeds):
            with torch.inference_mode(), perturbed(native, seed=seed) as copy:
                moved = movements(reader, copy)
                found.alarms += len(unread(native, moved))
                # Biases of zero that a layout adds for bases without any are not read, and need not be.
                shares = {kind: shares for kind, shares in moved.items() if max(shares) > MOVES}
                found.read += [share for each in shares.values() for share in each]
                for kind in shares:
                    found.ignored += movements(ignoring(kind, copy, reader), copy, kinds=[kind])[kind]
    return found


def ignoring(kind: str, copy: Perturbed, reader: Reader) -> Reader:
    """A loader that has numbers of its own for one kind of tensor."""

    def read(folder: Path) -> list[Tensor]:
        copy.spoil(kind, draw=2)
        return reader(folder)

    return read


if __name__ == "__main__":
    main()
