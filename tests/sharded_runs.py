"""Training runs on a tiny model, in one process or as a rank of several; the ranks write what tests look at.

`python tests/sharded_runs.py FOLDER CASE...` is one rank, told by the environment which one, as launchers do.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import architectures
import kinds
import torch
from transformers import TrainerCallback

from mtpd.alignment import IGNORED
from mtpd.data.disk_store import fill
from mtpd.data.packing import PackedRows, Sample
from mtpd.data.store import MemoryStore
from mtpd.heads import Heads, save_heads
from mtpd.heads.chain.heads import ChainHeads
from mtpd.recipe import parse_recipe
from mtpd.run.directory import RunDirectory
from mtpd.run.session import Session
from mtpd.run.training import train_heads
from mtpd.train.finished_depths import FinishedDepths
from mtpd.train.joint_trunk import AdaptedTrunk, FullTrunk
from mtpd.trunk import Trunk

LENGTH = 16


@dataclass(frozen=True)
class Case:
    """One run.

    Attributes:
        rows: of the data.
        resume: a checkpoint of another run of the same folder, as "case/checkpoint-N", from which it goes on.
        form: of the heads, by its name in tests/kinds.py; None for a chain.
        loss: what they are trained on.
        parts: of each row, in as many processes.
        after: depths that are finished, and not trained.
        train: other keys of that section of the recipe.
        further: other keys of the recipe. States are kept in memory where they say so, else not.
    """

    deepspeed: str | None
    rows: int = 16
    micro_batch_rows: int = 2
    accumulation: int = 1
    steps: int = 20
    resume: str | None = None
    architecture: str = "llama"
    form: str | None = None
    loss: str = "mtp_d"
    parts: int = 1
    after: int = 0
    train: dict[str, Any] = field(default_factory=dict)
    further: dict[str, Any] = field(default_factory=dict)


def rows_of(count: int) -> PackedRows:
    """Rows of two documents, with more response tokens in some than in others."""
    ids = architectures.random_tokens(count, LENGTH, seed=7)
    places = torch.arange(LENGTH)
    positions = torch.where(places < 6, places, places - 6).expand(count, LENGTH)
    labels = torch.where((places >= 2) & (places < 6 + torch.arange(count)[:, None] % 9 + 1), ids, IGNORED)
    return PackedRows(ids, labels, positions, documents=2 * count, cut=0, dropped=0)


def new_heads(trunk: Trunk, form: str | None) -> Heads:
    torch.manual_seed(0)
    if form is not None:
        return kinds.random_kind(trunk, form, depth=2).train()
    return architectures.random_heads(trunk, depth=2).train()


def run_case(name: str, case: Case, folder: Path, callbacks: Sequence[TrainerCallback] = ()) -> None:
    """Trains as `mtpd distill` does, into a folder of its own; the heads that come out are in `heads/`."""
    run = folder / name
    recipe = parse_recipe(
        {
            "model": "tiny",
            "output": str(run),
            "device": "cpu",
            "dtype": "float32",
            "heads": {"depth": 2},
            "train": {
                "deepspeed": case.deepspeed,
                "sequence_parallel": case.parts,
                "micro_batch_rows": case.micro_batch_rows,
                "gradient_accumulation": case.accumulation,
                "loss": case.loss,
                "max_steps": case.steps,
                "learning_rate": 1e-3,
                "logging_steps": 1,
                "save_steps": 0 if "evaluation" in case.further else 10,
                "arguments": {"save_total_limit": 9},
                **case.train,
            },
            **case.further,
        }
    )
    first = int(os.environ.get("RANK", "0")) == 0
    if first:
        run.mkdir(parents=True)
        if case.resume is not None:
            shutil.copytree(folder / case.resume, run / Path(case.resume).name)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    trunk = architectures.tiny_trunk(case.architecture)
    if recipe.dtype == "bfloat16":
        trunk = copy.deepcopy(trunk).to(torch.bfloat16)
    session = Session(recipe, RunDirectory(run), trunk, None, "", [2], False)
    heads = new_heads(trunk, case.form)
    samples = [Sample.of("one", *architectures.greedy_text("llama", 5, 16))] if recipe.evaluation.steps else []
    rows = rows_of(case.rows)
    options: dict[str, Any] = {}
    store = MemoryStore(trunk, rows) if recipe.data.hidden_states == "memory" else None
    if store is not None:
        fill(store, trunk, rows, progress=False)
    if case.after:
        assert isinstance(heads, ChainHeads)
        options["below"] = FinishedDepths(trunk, heads.first(case.after), None)
        for head in heads.chain()[: case.after]:
            head.requires_grad_(False)
    if recipe.trunk.train != "frozen":
        session.trunk = trunk = copy.deepcopy(trunk)
        settings = {"original_teacher": recipe.trunk.teacher == "original"}
        adapted = recipe.trunk.train == "lora"
        joint = AdaptedTrunk(trunk, rank=4, seed=0, **settings) if adapted else FullTrunk(trunk, **settings)
        options["joint"] = joint
    train_heads(session, heads, rows, store, samples, callbacks=callbacks, **options)
    if first and "joint" in options:
        options["joint"].save(run)
    if first:
        save_heads(heads, run / "heads")


def in_ranks(cases: Sequence[str], folder: Path, *, ranks: int = 2, script: Path = Path(__file__)) -> None:
    """Runs cases in several processes, one case after the other."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    paths = os.pathsep.join(map(str, Path(__file__).resolve().parents[:2]))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    processes = []
    for rank in range(ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
        own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-W", "ignore", str(script), str(folder), *cases],
                env={**environment, **{key: str(value) for key, value in own.items()}},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    try:
        outputs = [process.communicate(timeout=1200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output[-4000:]


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics of the steps of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


class Watch(TrainerCallback):
    """Counts, while a run is trained, what is gathered of the trunk, and what the optimizer keeps."""

    def __init__(self, architecture: str) -> None:
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus
        from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator as Coordinator

        self.trunk = architectures.tiny_trunk(architecture)
        self.found: dict[str, Any] = {"steps": [], "backward": [], "contexts": 0}
        self.counts: dict[int, int] = {}
        real, enter = Coordinator._PartitionedParameterCoordinator__all_gather_params_, GatheredParameters.__enter__

        def gather(this: Any, params: Any, forward: bool, quantize: bool = False) -> None:
            for each in params:
                if not each.requires_grad and each.ds_status == ZeroParamStatus.NOT_AVAILABLE:
                    self.counts[each.ds_id] = self.counts.get(each.ds_id, 0) + 1
                    if not forward or torch._C._current_graph_task_id() >= 0:
                        self.found["backward"].append(each.ds_id)
            real(this, params, forward, quantize)

        def context(this: Any) -> None:
            self.found["contexts"] += any(not each.requires_grad for each in this.params)
            enter(this)

        Coordinator._PartitionedParameterCoordinator__all_gather_params_ = gather
        GatheredParameters.__enter__ = context

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.counts = {}

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        names = {each.ds_id: name for name, each in self.parameters() if hasattr(each, "ds_id")}
        self.found["steps"].append({names[number]: count for number, count in self.counts.items()})

    def on_train_end(self, *args: Any, optimizer: Any, model: Any, **kwargs: Any) -> None:
        state = optimizer.optimizer.optimizer.state
        shares = [each for _, each in self.parameters() if hasattr(each, "ds_id")]
        self.found |= {
            "state": sum(value.numel() for kept in state.values() for value in kept.values() if value.ndim),
            "share": sum(each.ds_tensor.numel() for each in shares),
            "whole": sum(each.ds_numel for each in shares),
            "layers": sum(1 for _ in self.trunk.decoder.layers.parameters()),
            "partitioned": len(shares),
            "contexts": self.found["contexts"],
        }

    def parameters(self) -> Any:
        return self.trunk.model.named_parameters()

    def write(self, path: Path) -> None:
        """What was found, and whether the trunk is whole again."""
        before = architectures.tiny_model("llama").state_dict()
        after = self.trunk.model.state_dict()
        self.found["restored"] = all(torch.equal(before[name], after[name]) for name in before)
        self.found["left"] = any(hasattr(each, "ds_id") for each in self.trunk.model.parameters())
        path.write_text(json.dumps(self.found))


BF16 = {"dtype": "bfloat16"}
STORED = {"data": {"hidden_states": "memory"}}
ADAPTED = {"trunk": {"train": "lora", "teacher": "detached"}, "data": {"hidden_states": "recompute"}}
JOINT = {"trunk": {"train": "full"}}
MEASURED = {"evaluation": {"steps": 2, "max_new_tokens": 16}}
CASES: dict[str, Case] = {
    # Four rows a step, each in another way.
    "ddp": Case(None),
    "zero1": Case("zero1"),
    "zero2": Case("zero2", micro_batch_rows=1, accumulation=2),
    "zero3": Case("zero3", micro_batch_rows=1, accumulation=2),
    # The last round of an epoch has a row for one process, and none for the other.
    "ddp-uneven": Case(None, rows=9, steps=8),
    "zero3-uneven": Case("zero3", rows=9, steps=8),
    "zero3-tied": Case("zero3-cpu", steps=6, architecture="qwen2"),
    "zero3-circuit": Case("zero3", steps=4, form="cp-shared", loss="ce"),
    "zero2-bf16": Case("zero2", steps=6, further=BF16),
    "zero3-measured": Case("zero3", steps=4, further=MEASURED),
    # Both processes have a part of each of the four rows of a step.
    "split": Case("zero1", micro_batch_rows=4, parts=2),
    "split-zero3": Case("zero3", micro_batch_rows=2, accumulation=2, parts=2),
    "split-uneven": Case("zero2", rows=9, micro_batch_rows=4, steps=8, parts=2),
    "split-tied": Case("zero2", micro_batch_rows=4, steps=6, architecture="qwen2", parts=2),
    "split-circuit": Case("zero2", micro_batch_rows=4, steps=4, form="cp-shared", loss="ce", parts=2),
    "split-bf16": Case("zero2", micro_batch_rows=4, steps=6, further=BF16, parts=2),
    "split-extended": Case(
        "zero2", micro_batch_rows=4, steps=4, parts=2, after=1, train={"checkpoint_blocks": True}, further=STORED
    ),
    "split-adapted": Case("zero2", micro_batch_rows=4, steps=4, parts=2, form="decoder", further=ADAPTED),
    "split-joint": Case("zero1", micro_batch_rows=4, steps=4, parts=2, further=JOINT),
    "split-measured": Case("zero3", micro_batch_rows=4, steps=4, parts=2, further=MEASURED),
    "split-resumed": Case("zero2", micro_batch_rows=2, accumulation=2, resume="one/checkpoint-10", parts=2),
    # They go on from step 10 of the run in one process, or of one in two.
    "ddp-resumed": Case(None, resume="one/checkpoint-10"),
    "zero2-resumed": Case("zero2", resume="zero3/checkpoint-10"),
    "zero3-resumed": Case("zero3", resume="one/checkpoint-10"),
}


def main() -> None:
    torch.set_num_threads(1)
    folder, *names = sys.argv[1:]
    for name in names:
        case = CASES[name]
        watch = Watch(case.architecture) if name == "zero3" else None
        run_case(name, case, Path(folder), () if watch is None else (watch,))
        if watch is not None:
            watch.write(Path(folder) / name / f"watched-{os.environ['RANK']}.json")


if __name__ == "__main__":
    main()
