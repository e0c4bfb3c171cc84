"""The plan of a run, from the configuration of its model alone: `mtpd distill --dry-run`. Nothing is written."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from mtpd.data.models import load_model, real_tokens, resolve_device, resolve_dtype
from mtpd.data.vocabulary import draft_size
from mtpd.heads import Heads, build_heads, configure_heads
from mtpd.parallel.sequence import check_split
from mtpd.plan.estimate import Sizes, TextEstimate, estimate_disk, estimate_memory, estimate_text
from mtpd.plan.scaling import SPARE, Fit, Load, fits, host_memory
from mtpd.recipe import Recipe, stages_of
from mtpd.run.session import check_row_length, with_fitting_defaults, with_native_depth
from mtpd.trunk import Trunk

WIDTH = 100
SHARDED_BY_DEEPSPEED = {
    "none": "nothing has to be sharded",
    "zero1": "the optimizer state of the heads is sharded",
    "zero2": "the gradients and the optimizer state of the heads are sharded",
    "zero3": "the trunk's layers and all of the heads are sharded",
    "zero3-cpu": "the trunk's layers are in host memory, a share with each process",
    "zero3-nvme": "the trunk's layers are on the disk, a share with each process",
}


@dataclass(frozen=True)
class Plan:
    """The plan of a run. Sizes in bytes; None where a data set has to be loaded to know."""

    recipe: Recipe
    architecture: str
    layers: int
    hidden_size: int
    vocabulary: int
    """Rows of the embedding."""
    draft_vocabulary: int
    context: int
    dtype: torch.dtype
    device: torch.device
    frozen: int
    """Parameters of the trunk, its output head included."""
    trained: int
    """Parameters of all heads."""
    of_trunk: int
    """Parameters that `trunk.train` trains."""
    text: TextEstimate
    memory: dict[str, dict[str, int]]
    """By phase (generating, training, decoding) and purpose."""
    disk: dict[str, int | None]
    sizes: Sizes
    load: Load
    devices: int
    device_memory: float
    """Bytes of each device."""
    given: bool
    """Whether the devices are those that were asked for, and not those of this machine."""
    processes: int
    """That train: one for each device that was asked for, or as many as there have to be, whatever is at hand."""

    @property
    def shardings(self) -> list[Fit]:
        """The ways to shard over the devices, from the first to be tried on."""
        found = fits(self.load, self.devices, self.device_memory)
        if self.load.parts > 1:
            # Without DeepSpeed rows are not shared.
            found = [fit for fit in found if fit.sharding != "none"]
        # A trunk that is trained is whole everywhere.
        return found if not self.of_trunk else [fit for fit in found if not fit.sharding.startswith("zero3")]

    @property
    def peak_memory(self) -> int:
        """Bytes of the phase that takes most."""
        return max(sum(purposes.values()) for purposes in self.memory.values())

    def table(self) -> str:
        """The plan as a reader sees it, lines of at most 100 characters."""
        return lines_of(self._lines())

    def _lines(self) -> list[tuple[str, str]]:
        recipe, text = self.recipe, self.text
        name = str(self.dtype).removeprefix("torch.")
        draft = "all can be drafted"
        if self.draft_vocabulary < self.vocabulary:
            draft = f"{self.draft_vocabulary:,} can be drafted"
        depth = recipe.heads.depth
        heads = f"one head that is used {depth} times" if recipe.heads.shared else f"{depth} heads"
        lines = [
            ("plan", f"{recipe.model} into {recipe.output}; nothing is loaded or written now"),
            (
                "model",
                f"{self.architecture}: {self.layers} layers, width {self.hidden_size:,}, {name} on {self.device}",
            ),
            ("vocabulary", f"{self.vocabulary:,} tokens; {draft}"),
            (
                "trunk" if self.of_trunk else "frozen",
                f"{self.frozen:,} parameters, {size(self.frozen * self.dtype.itemsize)}"
                + (f"; {self.of_trunk:,} trained" if self.of_trunk else ""),
            ),
            ("trained", f"{self.trained:,} parameters in {heads}, {size(4 * self.trained)} in float32"),
            *self._extension(),
            ("", ""),
            ("prompts", self._prompts()),
            ("tokens", f"{amount(text.tokens)} at most, in {amount(text.rows)} rows of {recipe.data.row_length:,}"),
            ("steps", self._steps()),
            ("trunk passes", self._passes()),
            ("", ""),
        ]
        for phase, purposes in self.memory.items():
            lines.append((f"memory, {phase}", f"{size(sum(purposes.values()))}: {_parts(purposes)}"))
        lines += [*self._sharding(), ("", "")]
        known = sum(part or 0 for part in self.disk.values())
        beyond = " and what is not known yet" if None in self.disk.values() else ""
        lines += [("disk", f"{size(known)}{beyond}: {_parts(self.disk)}"), ("", "")]
        notes = ["memory and disk are estimates; what libraries take for themselves is not in them", *text.notes]
        if recipe.train.deepspeed is not None:
            notes.append("memory by phase is that of a process that shards nothing")
        return lines + [("assumed" if not index else "", note) for index, note in enumerate(notes)]

    def _sharding(self) -> list[tuple[str, str]]:
        """Lists what a device holds in training by `train.deepspeed`, and the first value that fits."""
        found = self.shardings
        whose = "as given" if self.given else "of this machine"
        each = f"{size(self.device_memory)} each" if self.devices > 1 else size(self.device_memory)
        lines = [("devices", f"{self.devices} with {each}, {whose}; a plan fills {SPARE:.0%} of it")]
        needed = ", ".join(f"{_value(fit)} {size(fit.total)}{'' if fit.fits else ' (too much)'}" for fit in found)
        lines.append(("train.deepspeed", f"memory of a device in training: {needed}"))
        chosen = next((fit for fit in found if fit.fits), None)
        if chosen is None:
            least = min(found, key=lambda fit: fit.total)
            largest = max(least.memory, key=lambda name: least.memory[name])
            text = f"none fits; {_value(least)} needs least, most of it for {largest} ({size(least.memory[largest])})"
        else:
            text = f"{_value(chosen)} is the first that fits: {SHARDED_BY_DEEPSPEED[chosen.sharding]}"
            if host := host_memory(self.load, chosen.sharding, self.devices):
                text += f" ({size(host)})"
        own = self.recipe.train.deepspeed or "null"
        if chosen is None or own != _value(chosen):
            text += f"; the recipe has {own}"
        return [*lines, ("", text)]

    def _extension(self) -> list[tuple[str, str]]:
        """Describes what the heads are extended to afterwards."""
        extend = self.recipe.extend
        if extend.to is None and not extend.auto:
            return []
        stages = ", ".join(map(str, stages_of(extend, self.recipe.heads.depth)))
        form = f"adapters of rank {extend.rank}" if extend.form == "adapters" else extend.form
        until = " at most, as long as a stage pays" if extend.auto else ""
        return [("extended", f"to {stages} heads{until}; new depths: {form}")]

    def _prompts(self) -> str:
        data, text = self.recipe.data, self.text
        line = f"{amount(text.prompts)} to train on, {amount(text.held_out)} held out"
        if data.responses != "given":
            line += f"; responses of at most {data.max_new_tokens:,} tokens"
        return line + (f"; {amount(text.given)} given texts" if data.given else "")

    def _steps(self) -> str:
        train = self.recipe.train
        rows = train.micro_batch_rows * train.gradient_accumulation * (self.processes // train.sequence_parallel)
        together = f", {self.processes} processes" if self.processes > 1 else ""
        together += f", {train.sequence_parallel} to a row" if train.sequence_parallel > 1 else ""
        return f"{amount(self.text.steps)} optimizer steps of {rows:,} rows{together}"

    def _passes(self) -> str:
        """Counts how often the trunk runs over the training text."""
        data, train = self.recipe.data, self.recipe.train
        passes = []
        if data.server is not None:
            passes.append(f"generation by {data.server}, {data.generation_batch} requests at a time, and a check")
        elif data.responses_file is not None:
            passes.append(f"no generation but a check of {data.responses_file}")
        elif data.responses == "trunk":
            passes.append(f"generation, {data.generation_batch} prompts at a time")
        if data.hidden_states != "recompute":
            passes.append("1 in training, or none if all states are stored")
        else:
            passes.append(f"{train.epochs:g} in training" if train.max_steps <= 0 else "each row of each step")
        return "; ".join([*passes, "held-out prompts: generation, and 1 before and after"])


def plan(recipe: Recipe, *, devices: int | None = None, device_memory: float | None = None) -> Plan:
    """Plans a run on the meta device: no weight is loaded, no data set downloaded, no file written.

    Args:
        devices: to plan for; None for those of this machine.
        device_memory: of each device in GB (powers of ten); None for that of this machine.

    Raises:
        UserError: what the run itself would refuse, as far as it shows without weights.
    """
    recipe = with_fitting_defaults(recipe)
    if Path(recipe.model).expanduser().is_dir():
        # Of a model on the hub, the heads would have to be downloaded to be counted.
        recipe = with_native_depth(recipe)
    model, tokenizer = load_model(
        recipe.model,
        dtype=recipe.dtype,
        device=recipe.device,
        trust_remote_code=recipe.trust_remote_code,
        base=recipe.model_base,
        config_only=True,
    )
    device = resolve_device(recipe.device)
    dtype = resolve_dtype(recipe.dtype, device)
    trunk = Trunk(model, tokens=real_tokens(model, tokenizer) if tokenizer is not None else None)
    check_row_length(recipe, trunk)
    processes = devices or recipe.train.sequence_parallel
    check_split(recipe, trunk, processes=processes)
    rows = trunk.unembedding.weight.shape[0]
    columns = min(draft_size(recipe.heads.vocabulary) or rows, trunk.tokens or rows)
    restricted = columns if columns < rows else 0
    config = configure_heads(recipe.heads.model_dump(), trunk, vocabulary=restricted, fingerprint="")
    heads = build_heads(trunk, config)
    frozen = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in heads.parameters() if parameter.requires_grad)
    sizes = Sizes.of(
        trunk.config,
        frozen=frozen,
        trained=trained,
        # Heads without decoder layers keep next to nothing for their backward pass.
        depth=recipe.heads.depth if config.source_layers else 0,
        columns=columns,
        tokens=rows,
        item=dtype.itemsize,
    )
    of_trunk = {
        "frozen": 0,
        "lora": sum(
            recipe.trunk.rank * (module.in_features + module.out_features)
            for module in trunk.decoder.layers.modules()
            if type(module) is nn.Linear
        ),
        "full": frozen,
    }[recipe.trunk.train]
    rank_groups = processes // recipe.train.sequence_parallel
    text = estimate_text(recipe, tokenizer, context=trunk.context, processes=rank_groups)
    wanted = recipe.evaluation.dtype
    decoding = dtype if wanted == "trunk" else resolve_dtype(wanted, device)
    memory = estimate_memory(
        recipe, sizes, text, decoding_item=decoding.itemsize, own_logits=heads.chunk_bytes(), of_trunk=of_trunk
    )
    count, bytes_of_each = _devices(device, devices)
    return Plan(
        recipe=recipe,
        architecture=trunk.name,
        layers=trunk.depth,
        hidden_size=trunk.hidden_size,
        vocabulary=rows,
        draft_vocabulary=columns,
        context=trunk.context,
        dtype=dtype,
        device=device,
        frozen=frozen,
        trained=trained,
        of_trunk=of_trunk,
        text=text,
        memory=memory,
        disk=estimate_disk(recipe, sizes, text, of_trunk=of_trunk),
        sizes=sizes,
        load=training_load(recipe, trunk, heads, sizes, memory["training"], of_trunk=of_trunk),
        devices=count,
        device_memory=bytes_of_each if device_memory is None else 1e9 * device_memory,
        given=devices is not None or device_memory is not None,
        processes=processes,
    )


def training_load(
    recipe: Recipe, trunk: Trunk, heads: Heads, sizes: Sizes, training: Mapping[str, int], *, of_trunk: int = 0
) -> Load:
    """Counts what a rank holds in training.

    Args:
        training: bytes by purpose, as `estimate_memory` gives them.
        of_trunk: parameters that `trunk.train` trains: they are sharded as those of the heads are.
    """
    layers = list(trunk.decoder.layers)
    parts: Any = getattr(heads, "layers", None)
    blocks = list(parts) if parts is not None and len(parts) else [heads]
    # What the formula says itself; of a trunk that is trained in float32, its copy in its own number format.
    sharded = {"trunk", "trunk, float32", "trunk in its number format", "adapters of the trunk, float32"}
    sharded |= {"heads, float32", "gradients", "optimizer"}
    return Load(
        trunk=sizes.frozen,
        layers=sum(map(_numbers, layers)),
        largest_layer=max(map(_numbers, layers)),
        heads=sizes.trained + of_trunk,
        largest_head=max(map(_numbers, blocks)),
        hidden=sizes.hidden,
        item=sizes.item,
        beside={name: part for name, part in training.items() if name not in sharded and part},
        parts=recipe.train.sequence_parallel,
    )


def _numbers(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _devices(device: torch.device, count: int | None) -> tuple[int, float]:
    """Gives the number of devices to plan for, and bytes of each on this machine."""
    if device.type == "cpu":
        return count or 1, psutil.virtual_memory().total / (count or 1)
    here = torch.accelerator.device_count()
    return count or here, float(torch.accelerator.get_memory_info(0)[1])


def _value(fit: Fit) -> str:
    """Reads the value that the recipe key has to be."""
    return "null" if fit.sharding == "none" else fit.sharding


def lines_of(rows: Sequence[tuple[str, str]]) -> str:
    """Prints titles with what is said of them, in lines of at most 100 characters."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold")
    grid.add_column()
    for title, line in rows:
        grid.add_row(title, line)
    buffer = io.StringIO()
    Console(file=buffer, width=WIDTH, no_color=True, highlight=False, markup=False).print(grid)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines())


def amount(count: int | None) -> str:
    """A count with separators, or that it is not known."""
    return "an unknown number" if count is None else f"{count:,}"


def size(count: float) -> str:
    """Bytes in kB, MB or GB (powers of ten)."""
    if count >= 1e9:
        return f"{count / 1e9:,.1f} GB"
    return f"{count / 1e6:,.0f} MB" if count >= 1e6 else f"{count / 1e3:,.0f} kB"


def _parts(parts: Mapping[str, int | None]) -> str:
    return ", ".join(
        f"{name} ({'unknown' if part is None else size(part)})" for name, part in parts.items() if part != 0
    )
