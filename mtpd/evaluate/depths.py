"""Which depth pays: what each further draft gains and costs, and how many drafts are fastest on this machine.

What a depth gains is CAR_k, the tokens that it adds to a forward pass of the trunk (its marginal tau), from offline
acceptance. What it costs is measured: greedy decoding, one prompt at a time, with every number of drafts in turns.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.table import Table

from mtpd.decode.engine import Engine
from mtpd.decode.speed import PARTS, generated, now, watch
from mtpd.decode.text import Request
from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance, SuiteCounts
from mtpd.evaluate.run_tables import say_if_random
from mtpd.evaluate.versions import machine
from mtpd.files import read_sealed, sealed, write_whole
from mtpd.heads import Heads
from mtpd.trunk import Trunk

PAYS = 1.01
"""A further depth has to make decoding so many times faster: less is within the noise of the measurement."""


class Depth(BaseModel):
    """Decoding with so many drafts a round."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    depth: int = Field(ge=0)
    """Drafts a round; 0 decodes without heads."""
    tokens_per_second: float = Field(gt=0)
    round_ms: float = Field(ge=0)
    """Of a round: drafting, the trunk's pass, and the choice of tokens."""
    draft_ms: float = Field(ge=0)
    """Of the drafts in it."""
    part_ms: dict[str, float] | None = None
    """Of all its parts, `mtpd.decode.speed.PARTS`; null in files from before it was kept."""
    car: float | None = None
    """CAR of this depth, which is its marginal tau; offline, on all prompts measured."""


class Depths(BaseModel):
    """Contents of `depths.json`."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, allow_inf_nan=False)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    prompts: int
    max_new_tokens: int
    dtype: str
    heads: str = ""
    """Fingerprint of the heads; empty in files from before it was kept."""
    machine: str = ""
    plain_tokens_per_second: float
    """Of transformers' own `generate`, in the same process."""
    depths: list[Depth] = Field(min_length=2)
    """From no drafts on."""

    @property
    def fastest(self) -> int:
        """Drafts a round with which decoding is fastest; fewer where more gain next to nothing."""
        best = max(each.tokens_per_second for each in self.depths)
        return next(each.depth for each in self.depths if each.tokens_per_second * PAYS >= best)

    def speed_up(self, depth: int) -> float:
        """Tokens/s against transformers' `generate`."""
        return self.depths[depth].tokens_per_second / self.plain_tokens_per_second

    def speed_up_over_engine(self, depth: int) -> float:
        """Tokens/s against the same engine without drafts."""
        return self.depths[depth].tokens_per_second / self.depths[0].tokens_per_second

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(sealed(self.model_dump(mode="json", by_alias=True)), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path) -> Depths:
        """Raises UserError: the file cannot be read."""
        try:
            return cls.model_validate(read_sealed(path, refusal="not a measurement of depths"))
        except ValidationError as error:
            raise UserError(f"{path}: cannot be read as a measurement of depths; delete it") from error


@dataclass
class _Timed:
    """Runs of one number of drafts."""

    seconds: list[float] = field(default_factory=list)
    part_ms: dict[str, list[float]] = field(default_factory=lambda: {part: [] for part in PARTS})
    """Of a round, by part."""
    tokens: int = 0


def measure_depths(
    trunk: Trunk,
    heads: Heads,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end_tokens: Collection[int] = (),
    runs: int = 2,
    acceptance: SuiteCounts | None = None,
    heads_fingerprint: str = "",
) -> Depths:
    """Decodes all prompts with 0..K drafts a round and by plain `generate`, in turns; medians over runs.

    Args:
        acceptance: counts of the same heads, for the CAR of each depth.
    """
    counts = range(heads.depth + 1)
    timed = {count: _Timed() for count in counts}
    plain = _Timed()
    for count in counts:
        _decode(trunk, heads, prompts[:1], count, _Timed(), max_new_tokens=2, end_tokens=end_tokens)
    generated(trunk, prompts[:1], max_new_tokens=2, end_tokens=end_tokens, batch=1)
    for run in range(runs):
        began = now(trunk)
        texts = generated(trunk, prompts, max_new_tokens=max_new_tokens, end_tokens=end_tokens, batch=1)
        plain.seconds.append(now(trunk) - began)
        plain.tokens = sum(map(len, texts))
        for count in counts if run % 2 == 0 else reversed(counts):
            _decode(trunk, heads, prompts, count, timed[count], max_new_tokens=max_new_tokens, end_tokens=end_tokens)
    cars = [None, *(acceptance.car if acceptance is not None else [None] * heads.depth)]
    part_ms = {
        count: {part: statistics.median(values) for part, values in each.part_ms.items()}
        for count, each in timed.items()
    }
    return Depths(
        prompts=len(prompts),
        max_new_tokens=max_new_tokens,
        dtype=str(trunk.dtype).removeprefix("torch."),
        heads=heads_fingerprint,
        machine=machine(),
        plain_tokens_per_second=plain.tokens / statistics.median(plain.seconds),
        depths=[
            Depth(
                depth=count,
                tokens_per_second=each.tokens / statistics.median(each.seconds),
                round_ms=sum(part_ms[count].values()),
                draft_ms=part_ms[count]["drafts"],
                part_ms=part_ms[count],
                car=cars[count],
            )
            for count, each in timed.items()
        ],
    )


def _decode(
    trunk: Trunk,
    heads: Heads,
    prompts: Sequence[Sequence[int]],
    count: int,
    timed: _Timed,
    *,
    max_new_tokens: int,
    end_tokens: Collection[int],
) -> None:
    # A chain cut short reads nothing with the heads that do not draft.
    drafting = heads.first(count) if count else heads
    engine = Engine(
        trunk,
        drafting if count else None,
        slots=1,
        capacity=max(map(len, prompts)) + max_new_tokens,
        depth=count or None,
        end_tokens=end_tokens,
    )
    spent = watch(engine, trunk)
    began = now(trunk)
    timed.tokens = sum(len(text.tokens) for text in engine.run(Request(each, max_new_tokens) for each in prompts))
    timed.seconds.append(now(trunk) - began)
    for part, seconds in spent.seconds.items():
        timed.part_ms[part].append(1000 * seconds / max(1, spent.rounds))


def depths_pay_table(found: Depths, before: Acceptance | None = None) -> Table:
    """One line a depth, the fastest one marked.

    Args:
        before: acceptance of the same depths before training, shown beside.
    """
    title = (
        f"Which depth pays ({found.prompts} prompts, {found.max_new_tokens} tokens, {found.dtype}; transformers' "
        f"generate {found.plain_tokens_per_second:.1f} tokens/s)"
    )
    table = Table(title=title, title_justify="left")
    if before is not None:
        say_if_random(table, before)
    columns = ("drafts", "CAR = marginal tau", "draft ms", "marginal ms", "round ms", "tokens/s")
    for column in (*columns, "speed-up over generate", "speed-up over no drafts"):
        table.add_column(column, justify="right")
    first = before.total().car if before is not None else []
    for each, previous in zip(found.depths, [None, *found.depths], strict=False):
        car = "" if each.car is None else f"{each.car:.3f}"
        if each.depth and each.car is not None and len(first) >= each.depth:
            car = f"{first[each.depth - 1]:.3f} → {car}"
        table.add_row(
            str(each.depth),
            car,
            f"{each.draft_ms:.1f}" if each.depth else "",
            f"{each.draft_ms - previous.draft_ms:.1f}" if previous is not None else "",
            f"{each.round_ms:.1f}",
            f"{each.tokens_per_second:.1f}",
            f"{found.speed_up(each.depth):.2f}x",
            f"{found.speed_up_over_engine(each.depth):.2f}x",
            style="bold" if each.depth == found.fastest else None,
        )
    return table
