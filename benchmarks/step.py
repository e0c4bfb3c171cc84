"""A whole training step: with and without the trunk, and beside the MTP model of the `speculators` package.

    python benchmarks/step.py --json step.json

One row of tokens through trunk, heads, loss, backward pass and optimizer, in tokens/s. The trunk is a Qwen3 with
random weights and the shape of SmolLM2-135M, because that is a kind which `speculators` has. `first epoch` runs the
trunk, `second epoch` reads its states from a store on the disk. Against `speculators` (0.9): cross-entropy, one
shared block, the same width, tokens and depth, the trunk run in both or in neither; that part is left out where the
package is not installed. It needs an environment of its own, being made for an older transformers. `roofline` is the
time that the products of a step, counted while it runs, would take at the rate measured for one large product.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lab import machine, write_rows
from measure import alternate, peak_bytes, product_rate
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3Config, Qwen3ForCausalLM

from mtpd.data.disk_store import DiskStore, fill
from mtpd.data.packing import PackedRows
from mtpd.data.store import HiddenStates, with_hidden
from mtpd.heads import build_heads
from mtpd.heads.chain.start import initialise
from mtpd.heads.config import HeadsConfig
from mtpd.losses.settings import LossSettings
from mtpd.train.model import DistillModel
from mtpd.trunk import Trunk


def new_trunk(dtype: torch.dtype) -> Trunk:
    """A random Qwen3 of SmolLM2-135M's shape."""
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    return Trunk(Qwen3ForCausalLM(config).to(dtype))


def autocast(trunk: Trunk) -> AbstractContextManager[Any]:
    """Heads are float32 and computed in the trunk's number format, as in training."""
    return torch.autocast(trunk.device.type, dtype=trunk.dtype, enabled=trunk.dtype != torch.float32)


class Ours:
    """Heads of a trunk with their optimizer."""

    def __init__(self, trunk: Trunk, loss: LossSettings, *, shared: bool, vocabulary: int = 0, **options: Any) -> None:
        depth = len(loss.alpha)
        layers = [trunk.depth - 1] * (1 if shared else depth)
        config = HeadsConfig(
            depth=depth,
            hidden_size=trunk.hidden_size,
            source_layers=layers,
            shared=shared,
            vocabulary_size=vocabulary,
        )
        heads = build_heads(trunk, config)
        initialise(heads, trunk, "identity", seed=0)
        if vocabulary:
            heads.get_buffer("vocabulary").copy_(torch.arange(vocabulary))
        self.trunk = trunk
        self.model = DistillModel(trunk, heads.train(), loss, **options)
        self.optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-4, fused=True)

    def step(self, batch: dict[str, torch.Tensor], store: HiddenStates | None) -> None:
        with autocast(self.trunk):
            loss = self.model(**with_hidden(batch, self.trunk, store))["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


class Kept:
    """A store of one row that is at hand already."""

    def __init__(self, hidden_BTD: torch.Tensor) -> None:
        self.hidden_TD = hidden_BTD[0]

    def __contains__(self, row: object) -> bool:
        return row == 0

    def __getitem__(self, row: int) -> torch.Tensor:
        return self.hidden_TD

    def expect(self, row: int) -> None:
        pass

    def put(self, rows: Sequence[int], hidden_BTD: torch.Tensor) -> None:
        raise AssertionError("all rows are here")

    def flush(self) -> None:
        pass


class Speculators:
    """The MTP model of `speculators` on the same trunk.

    Raises:
        ImportError: it is not installed.
    """

    def __init__(self, trunk: Trunk, depth: int) -> None:
        from speculators.config import SpeculatorsConfig, VerifierConfig
        from speculators.models.mtp.config import MTPSpeculatorConfig
        from speculators.models.mtp.core import MTPDraftModel
        from speculators.proposals.greedy import GreedyTokenProposalConfig

        config = MTPSpeculatorConfig(
            transformer_layer_config=trunk.config,
            speculators_config=SpeculatorsConfig(
                algorithm="mtp",
                proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=depth)],
                default_proposal_method="greedy",
                verifier=VerifierConfig(name_or_path=None, architectures=["Qwen3ForCausalLM"]),
            ),
        )
        self.trunk = trunk
        self.model = MTPDraftModel(config)
        self.model.embed_tokens.weight.data = trunk.model.get_input_embeddings().weight.data
        self.model.lm_head.weight.data = trunk.unembedding.weight.data
        del self.model.verifier_lm_head
        with torch.no_grad():
            for parameter in self.model.mtp_layers.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(std=0.02)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def step(self, batch: dict[str, torch.Tensor], hidden: torch.Tensor | None) -> None:
        ids, positions = batch["input_ids"], batch["position_ids"]
        with autocast(self.trunk):
            if hidden is None:
                hidden = self.trunk.hidden(ids, position_ids=positions)
            _, loss, _ = self.model(ids, hidden, position_ids=positions)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


Report = Callable[[str, float, float, str, str], None]
"""(name, ours, other, against, unit) of one line of the table."""


def against_speculators(trunk: Trunk, batch: dict[str, torch.Tensor], depth: int, runs: int, report: Report) -> None:
    """Cross-entropy with one shared block, the trunk run in both, and in neither."""
    try:
        theirs = Speculators(trunk, depth)
    except ImportError as error:
        print(f"speculators is left out: {error}", flush=True)
        return
    tokens = batch["input_ids"].numel()
    ours = Ours(trunk, LossSettings((1.0,) * depth, (0.0,) * depth), shared=True)
    hidden = trunk.hidden(batch["input_ids"], position_ids=batch["position_ids"])
    kept = Kept(hidden)
    contenders: dict[str, Callable[[], None]] = {
        "ours": lambda: ours.step(batch, None),
        "theirs": lambda: theirs.step(batch, None),
        "ours from states": lambda: ours.step(batch, kept),
        "theirs from states": lambda: theirs.step(batch, hidden),
    }
    memory = {each: peak_bytes(function) for each, function in contenders.items()}
    times = alternate(contenders, runs=runs)
    for suffix in ("", " from states"):
        mine, other = f"ours{suffix}", f"theirs{suffix}"
        report(f"CE, shared block{suffix}", tokens / times[mine], tokens / times[other], "speculators", "tokens/s")
        report(f"CE, shared block{suffix}", memory[mine], memory[other], "speculators", "bytes")


def epochs(ours: Ours, rows: PackedRows, batch: dict[str, torch.Tensor], name: str, runs: int, report: Report) -> None:
    """A step that runs the trunk and stores its states, and one that reads them."""
    with tempfile.TemporaryDirectory() as folder:
        full = DiskStore(f"{folder}/full", ours.trunk, rows, key={})
        fill(full, ours.trunk, rows, progress=False)

        def first() -> None:
            with tempfile.TemporaryDirectory() as empty:
                store = DiskStore(empty, ours.trunk, rows, key={})
                ours.step(batch, store)
                store.flush()

        steps = {"first": first, "second": lambda: ours.step(batch, full)}
        for function in steps.values():
            function()
        times = alternate(steps, runs=runs)
    tokens = batch["input_ids"].numel()
    report(f"{name}, second epoch", tokens / times["second"], tokens / times["first"], "first epoch", "tokens/s")


def roofline(ours: Ours, batch: dict[str, torch.Tensor], name: str, runs: int, report: Report) -> None:
    """A step with the trunk, and one from its states, beside what their products alone would take."""
    trunk, (_, tokens) = ours.trunk, batch["input_ids"].shape
    kept = Kept(trunk.hidden(batch["input_ids"], position_ids=batch["position_ids"]))
    rows = trunk.unembedding.weight.shape[0]
    for suffix, store in (("", None), (" from states", kept)):

        def step(store: HiddenStates | None = store) -> None:
            ours.step(batch, store)

        with FlopCounterMode(display=False) as counted:
            step()
        times = alternate({"step": step}, runs=runs)
        rate = product_rate(tokens, trunk.hidden_size, rows, trunk.dtype)
        least = counted.get_total_flops() / rate
        report(
            f"{name}{suffix}, {counted.get_total_flops() / tokens / 1e6:.0f} MFLOP a token at {rate / 1e9:.0f} GFLOP/s",
            times["step"],
            least,
            "roofline",
            "seconds",
        )


def option(plain: Ours, other: Ours, batch: dict[str, torch.Tensor], name: str, runs: int, report: Report) -> None:
    """The same step with an option and without it."""
    steps = {"with": lambda: other.step(batch, None), "without": lambda: plain.step(batch, None)}
    for function in steps.values():
        function()
    memory = {each: peak_bytes(function) for each, function in steps.items()}
    times = alternate(steps, runs=runs)
    tokens = batch["input_ids"].numel()
    report(name, tokens / times["with"], tokens / times["without"], "without", "tokens/s")
    report(name, memory["with"], memory["without"], "without", "bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--draft", type=int, default=8192, help="tokens of the draft vocabulary")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--parts", nargs="*", default=["speculators", "epochs", "roofline", "checkpoint", "compile"])
    options = parser.parse_args()
    table: list[dict[str, Any]] = []
    print(machine(), flush=True)
    for dtype in options.dtypes:

        def report(name: str, ours: float, other: float, against: str, unit: str, dtype: str = dtype) -> None:
            row = {"name": f"step {name}, {dtype}", "ours": ours, "other": other, "against": against, "unit": unit}
            table.append({**row, "ratio": ours / other, "runs": options.runs, "machine": machine()})
            print(f"{row['name']:55} {unit:9} {ours:.4g}, {against} {other:.4g}: {ours / other:.2f}", flush=True)
            write_rows(options.json, table)

        trunk = new_trunk(getattr(torch, dtype))
        ids = torch.randint(49_152, (1, options.tokens), generator=torch.Generator().manual_seed(0))
        rows = PackedRows(ids, ids, torch.arange(options.tokens)[None], documents=1, cut=0, dropped=0)
        batch = {key: value[None] for key, value in rows[0].items()} | {"row": [0]}
        loss = LossSettings((0.0,) * options.depth, (1.0,) * options.depth)
        if "speculators" in options.parts:
            against_speculators(trunk, batch, options.depth, options.runs, report)
        draft = Ours(trunk, loss, shared=False, vocabulary=options.draft)
        if "epochs" in options.parts:
            epochs(draft, rows, batch, f"KL, {options.draft} columns", options.runs, report)
            epochs(Ours(trunk, loss, shared=False), rows, batch, "KL, all columns", options.runs, report)
        if "roofline" in options.parts:
            roofline(draft, batch, f"KL, {options.draft} columns", options.runs, report)
        for part, key in (("checkpoint", "checkpoint_blocks"), ("compile", "compiled")):
            if part in options.parts:
                other = Ours(trunk, loss, shared=False, vocabulary=options.draft, **{key: True})
                option(draft, other, batch, f"with {key}", options.runs, report)


if __name__ == "__main__":
    main()
