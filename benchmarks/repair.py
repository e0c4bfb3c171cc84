"""Heads under a model that was fine-tuned since: what they lose, and how few tokens bring them back.

    python benchmarks/repair.py runs/demo --json repair.json

A LoRA adapter makes the model of a run write Python functions, as the source of Python's standard library has them:
the user's turn names a function and says what it does, the answer is its source. Then the heads of the run are measured
under the model before and after, on held-out prompts of both kinds, and trained on with the fine-tuned model as the
teacher, on 10,000, 30,000 and 100,000 tokens of its answers; new heads are trained on the same tokens beside them.

All is kept in --work, and the same command goes on with it: adapter, answers, and an acceptance file for each result,
which `mtpd compare` reads.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from lab import Lab, machine, recipe, write_rows
from measure import clock

from mtpd.alignment import IGNORED
from mtpd.data.given import given_samples
from mtpd.data.packing import Sample, pack
from mtpd.data.prompts import Prompt, load_prompts
from mtpd.data.responses import generate_responses
from mtpd.data.stdlib import HELD_OUT, SOURCE, documents
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.intervals import intervals
from mtpd.evaluate.offline import measure_offline
from mtpd.finished_run import open_finished
from mtpd.heads import Heads, load_heads

LINES = range(4, 40)
"""Of a function that is asked for."""
CHARACTERS = 700
FUNCTIONS = "functions"
PARTS = ("built-in", FUNCTIONS, "all")
"""Kinds of held-out prompts, and all of them."""


def functions(source: str) -> Iterator[dict[str, Any]]:
    """Functions with a docstring, as conversations: what it does, and its source."""
    for path, text in documents(source):
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (about := ast.get_docstring(node)):
                continue
            code = textwrap.dedent(ast.get_source_segment(text, node, padded=True) or "")
            if len(code.splitlines()) not in LINES or len(code) > CHARACTERS:
                continue
            asked = f"Write the Python function {node.name}({ast.unparse(node.args)}): {about.splitlines()[0]}"
            turns = [("user", asked), ("assistant", f"```python\n{code}\n```")]
            messages = [{"role": role, "content": content} for role, content in turns]
            yield {"id": f"{path}:{node.lineno}", "family": FUNCTIONS, "messages": messages}


def prompts_of(source: str, path: Path, count: int) -> list[Prompt]:
    """So many functions, drawn, out of a file that is written once."""
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = random.Random(0).sample(found := list(functions(source)), min(len(found), 2000))
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_prompts(str(path))[:count]


def fine_tune(lab: Lab, prompts: Sequence[Prompt], folder: Path, options: Any) -> None:
    """Trains a LoRA adapter of all linear layers on the answers of prompts, and writes it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    texts = [each for prompt in prompts for each in given_samples(lab.tokenizer, prompt, end_tokens=lab.ends)]
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(lab.trunk.model, config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=options.adapter_rate)
    steps = len(texts) // options.adapter_batch
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    for step in range(steps):
        chosen = texts[step * options.adapter_batch : (step + 1) * options.adapter_batch]
        total = 0.0
        for text in chosen:
            ids, response = torch.tensor([text.ids]), torch.tensor([text.response_mask])
            loss = model(input_ids=ids, labels=ids.masked_fill(~response, IGNORED)).loss / len(chosen)
            loss.backward()
            total += float(loss.detach())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == steps - 1:
            print(f"adapter, step {step + 1} of {steps}: loss {total:.3f}", flush=True)
    model.save_pretrained(folder)


class Experiment:
    """All measurements, in files that are not made twice."""

    def __init__(self, options: Any) -> None:
        self.options, self.work, self.run = options, options.work, open_finished(options.run)
        self.json: Path = options.json or self.work / "repair.json"
        self.table: list[dict[str, Any]] = json.loads(self.json.read_text()) if self.json.is_file() else []
        self.held_out = [
            *load_prompts("builtin-held-out", limit=options.held_out),
            *prompts_of(HELD_OUT, self.work / "functions-held-out.jsonl", options.held_out),
        ]
        self.functions = prompts_of(SOURCE, self.work / "functions.jsonl", options.limit)
        mixed = [*load_prompts("builtin", limit=options.limit), *self.functions]
        self.prompts = random.Random(0).sample(mixed, len(mixed))

    def responses(self, lab: Lab, prompts: Sequence[Prompt], name: str, *, tokens: int) -> list[Sample]:
        return generate_responses(
            lab.trunk.model,
            lab.tokenizer,
            [Prompt(each.id, each.prompt, family=each.family) for each in prompts],
            self.work / f"{name}.jsonl",
            trunk=lab.fingerprint,
            max_new_tokens=tokens,
            max_length=lab.trunk.context,
        )

    def measured(self, name: str) -> bool:
        """Whether there is such a row already; prints it."""
        for row in self.table:
            if row["name"] == name:
                shown = (f"{part} {row[part][0]:.3f} [{row[part][1]:.3f}, {row[part][2]:.3f}]" for part in PARTS)
                print(f"{name}: tau {', '.join(shown)}; {row['seconds']:.0f} s", flush=True)
                return True
        return False

    def measure(self, lab: Lab, name: str, heads: Heads, *, seconds: float = 0.0, tokens: int = 0) -> None:
        """Measures on held-out prompts of both kinds, and adds a row to the table."""
        longest = self.options.held_out_tokens
        samples = self.responses(lab, self.held_out, f"held-out-{lab.fingerprint[:8]}", tokens=longest)
        samples = [
            Sample(s.id, s.ids, s.response_mask, FUNCTIONS if s.family == FUNCTIONS else "built-in") for s in samples
        ]
        copy = heads.to(lab.trunk.dtype).eval()
        suites = measure_offline(lab.trunk, copy, samples, end_tokens=lab.ends, progress=False)
        found = Acceptance(mode="offline", trunk=lab.fingerprint, heads=name, suites=suites)
        folder = self.work / "measured"
        folder.mkdir(parents=True, exist_ok=True)
        found.save(folder / f"{name.replace(',', '').replace(' ', '-')}.json")
        row: dict[str, Any] = {"machine": machine(), "name": name, "seconds": seconds, "tokens": tokens}
        for part, estimates in intervals(found).items():
            tau = estimates["tau"]
            row[part or "all"] = [tau.value, tau.low, tau.high]
        self.table.append({**row, "car": {part: each.car for part, each in suites.items()}})
        write_rows(self.json, self.table)
        self.measured(name)

    def train(self, lab: Lab, name: str, size: int, *, source: Heads | None) -> None:
        """Heads trained on so many response tokens of the fine-tuned model, from other heads or from nothing."""
        if self.measured(name):
            return
        rows, old = self.rows(lab, size), self.run.recipe
        given = recipe(
            heads=old.heads.model_dump(mode="json") | {"source": None},
            train=old.train.model_dump(mode="json") | {"logging_steps": 10},
        )
        store = lab.store(rows, "repair")
        began = clock()
        heads = lab.heads(given, rows, store, source=source)
        start = clock() - began
        seconds = lab.train(given, heads.train(), rows, store)
        self.measure(lab, name, heads, seconds=start + seconds, tokens=size)

    def rows(self, lab: Lab, size: int) -> Any:
        """So many response tokens of the fine-tuned model; a smaller number gives the first part."""
        samples: list[Sample] = []
        for part in range(0, len(self.prompts), 128):
            prompts = self.prompts[part : part + 128]
            chosen, count = [], 0
            samples += self.responses(lab, prompts, f"part-{part:04d}", tokens=160)
            for sample in samples:
                response = sample.response_ids[: size - count]
                if response:
                    chosen.append(Sample.of(sample.id, sample.prompt_ids, response, sample.family))
                    count += len(response)
            if count == size:
                return pack(chosen, row_length=512)
        raise SystemExit(f"--limit: {self.options.limit} gives fewer than {size} tokens")

    def go(self) -> None:
        folder, heads = self.work / "adapter", self.options.run / "heads"
        lab = Lab.open(self.run.model, self.work)
        if not self.measured("before"):
            self.measure(lab, "before", load_heads(heads, lab.trunk, fingerprint=lab.fingerprint))
        if not (folder / "adapter_model.safetensors").is_file():
            fine_tune(lab, self.functions[: self.options.adapter_texts], folder, self.options)
        lab = Lab.open(str(folder), self.work)
        if not self.measured("after"):
            self.measure(lab, "after", load_heads(heads, lab.trunk))
        for size in self.options.sizes:
            self.train(lab, f"{size:,} tokens, repaired", size, source=load_heads(heads, lab.trunk))
            self.train(lab, f"{size:,} tokens, from nothing", size, source=None)
        print(f"\n| heads | {' | '.join(PARTS)} | s |\n|---|{'---|' * len(PARTS)}---|")
        for row in self.table:
            cells = (f"{row[part][0]:.3f} [{row[part][1]:.3f}, {row[part][2]:.3f}]" for part in PARTS)
            print(f"| {row['name']} | {' | '.join(cells)} | {row['seconds']:.0f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="a finished run with chain heads")
    parser.add_argument("--work", type=Path, default=Path("runs/repair"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 30_000, 100_000])
    parser.add_argument("--limit", type=int, default=540, help="prompts of each kind that are answered, at most")
    parser.add_argument("--held-out", type=int, default=60, help="prompts of each kind that are measured on")
    parser.add_argument("--held-out-tokens", type=int, default=96)
    parser.add_argument("--adapter-texts", type=int, default=400)
    parser.add_argument("--adapter-batch", type=int, default=8)
    parser.add_argument("--adapter-rate", type=float, default=5e-4)
    parser.add_argument("--threads", type=int, default=0)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    Experiment(options).go()


if __name__ == "__main__":
    main()
