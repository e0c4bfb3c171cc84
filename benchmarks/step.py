"""A whole training step: with and without the trunk, and beside the MTP model of the `speculators` package.

    python benchmarks/step.py --json step.json

One row of tokens through trunk, heads, loss, backward pass and optimizer, in tokens/s. The trunk is a Qwen3 with
random weights and the shape of SmolLM2-135M, because that is a kind which `speculators` has. `first epoch` runs the
trunk, `second epoch` reads its states from a store on the disk. Against `speculators` (0.9): cross-entropy, one
shared block, the same width, tokens and depth, the trunk run in both or in neither; that part is left out where the
package is not installed. It needs an environment of its own, being made for an older transformers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from lab import machine, write_rows
from measure import alternate, peak_bytes
from transformers import Qwen3Config, Qwen3ForCausalLM

from mtpd.data.packing import PackedRows
from mtpd.data.store import DiskStore, with_hidden
from mtpd.distill.model import DistillModel
from mtpd.heads import build_heads
from mtpd.heads.config import HeadsConfig
from mtpd.heads.initialise import initialise
from mtpd.losses.settings import LossSettings
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
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=trunk.dtype == torch.bfloat16)


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
        self.optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-4)

    def step(self, batch: dict[str, torch.Tensor], store: DiskStore | None) -> None:
        with autocast(self.trunk):
            loss = self.model(**with_hidden(batch, self.trunk, store))["loss"]
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


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
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step(self, batch: dict[str, torch.Tensor], hidden: torch.Tensor | None) -> None:
        ids, positions = batch["input_ids"], batch["position_ids"]
        with autocast(self.trunk):
            if hidden is None:
                hidden = self.trunk.hidden(ids, position_ids=positions)
            _, loss, _ = self.model(ids, hidden, position_ids=positions)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--draft", type=int, default=8192, help="tokens of the draft vocabulary of the epochs' rows")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    options = parser.parse_args()
    table: list[dict[str, Any]] = []
    print(machine(), flush=True)

    def report(name: str, ours: float, other: float, against: str, unit: str) -> None:
        row = {"name": name, "ours": ours, "other": other, "against": against, "unit": unit, "ratio": ours / other}
        table.append({**row, "runs": options.runs, "machine": machine()})
        print(f"{name:45} {unit:9} {ours:.4g}, {against} {other:.4g}: {ours / other:.2f}", flush=True)
        write_rows(options.json, table)

    for name in options.dtypes:
        trunk = new_trunk(getattr(torch, name))
        ids = torch.randint(49_152, (1, options.tokens), generator=torch.Generator().manual_seed(0))
        rows = PackedRows(ids, ids, torch.arange(options.tokens)[None], documents=1, cut=0, dropped=0)
        batch = {key: value[None] for key, value in rows[0].items()} | {"row": torch.tensor([0])}
        weights, none = (1.0,) * options.depth, (0.0,) * options.depth

        def rate(times: dict[str, float], each: str) -> float:
            return options.tokens / times[each]

        try:
            theirs = Speculators(trunk, options.depth)
        except ImportError as error:
            print(f"speculators is left out: {error}", flush=True)
        else:
            ours = Ours(trunk, LossSettings(weights, none), shared=True)
            hidden = trunk.hidden(batch["input_ids"], position_ids=batch["position_ids"])

            def from_states(ours: Ours = ours, batch: Any = batch, hidden: Any = hidden) -> None:
                with autocast(ours.trunk):
                    loss = ours.model(**{key: batch[key] for key in batch if key != "row"}, hidden=hidden)["loss"]
                loss.backward()
                ours.optimizer.step()
                ours.optimizer.zero_grad()

            contenders: dict[str, Callable[[], None]] = {
                "ours": lambda: ours.step(batch, None),
                "theirs": lambda: theirs.step(batch, None),
                "ours from states": from_states,
                "theirs from states": lambda: theirs.step(batch, hidden),
            }
            memory = {each: peak_bytes(function) for each, function in contenders.items()}
            times = alternate(contenders, runs=options.runs)
            for suffix in ("", " from states"):
                label = f"step CE, shared block{suffix}, {name}"
                mine, other = f"ours{suffix}", f"theirs{suffix}"
                report(label, rate(times, mine), rate(times, other), "speculators", "tokens/s")
                report(label, memory[mine], memory[other], "speculators", "bytes")
            del theirs, ours

        for vocabulary in (0, options.draft):
            heads = Ours(trunk, LossSettings(none, weights), shared=False, vocabulary=vocabulary)
            with tempfile.TemporaryDirectory() as folder:
                full = DiskStore(folder, trunk, rows, key={})
                full.put([0], trunk.hidden(batch["input_ids"], position_ids=batch["position_ids"]))
                full.flush()

                def first(heads: Ours = heads, folder: str = folder) -> None:
                    empty = DiskStore(f"{folder}/empty", trunk, rows, key={})
                    heads.step(batch, empty)

                steps = {"first": first, "second": lambda: heads.step(batch, full)}
                for function in steps.values():
                    function()
                times = alternate(steps, runs=options.runs)
            label = f"step KL, {vocabulary or 49_152} columns, second epoch, {name}"
            report(label, rate(times, "second"), rate(times, "first"), "first epoch", "tokens/s")

        plain = Ours(trunk, LossSettings(none, weights), shared=False, vocabulary=options.draft)
        saving = Ours(
            trunk, LossSettings(none, weights), shared=False, vocabulary=options.draft, checkpoint_blocks=True
        )
        steps = {"plain": lambda: plain.step(batch, None), "saving": lambda: saving.step(batch, None)}
        memory = {each: peak_bytes(function) for each, function in steps.items()}
        times = alternate(steps, runs=options.runs)
        label = f"step with checkpoint_blocks, {name}"
        report(label, rate(times, "saving"), rate(times, "plain"), "without", "tokens/s")
        report(label, memory["saving"], memory["plain"], "without", "bytes")


if __name__ == "__main__":
    main()
