"""The acceptance file: counts by prompt and by suite, from which ratios are computed when they are read.

AR_k is the share accepted at depth k of the drafts whose depths 1..k-1 were accepted, CAR_k the share
of drafts whose first k tokens are all accepted, and tau = 1 + Σ CAR_k.

Schema 2 has a row of counts for each prompt, which intervals and paired comparisons need, and the settings of the
measurement. Schema 3 has beside the heads' own counts those of heads and look-up together, and each alone. Schema 4 has
in each row where its rounds were, and what its prompt is: the slices of `mtpd.evaluate.slices`. Files of schema 1,
which have sums alone, and of 2 and 3 are still read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mtpd.decode.counts import FIRST, Counts, Places, conditional, shares, sum_sources
from mtpd.errors import UserError
from mtpd.evaluate.load import Load
from mtpd.evaluate.versions import library_versions
from mtpd.files import read_sealed, sealed, write_whole

RANDOM = (
    "The model predicts text no better than chance, as random weights do: these numbers show that everything runs, "
    "and say nothing about heads."
)
"""Stands beside every table of an acceptance file whose trunk is random."""

Settings = dict[str, str | int | float | bool | None]
"""What a measurement depends on besides trunk and heads: names and plain values."""


class DrafterCounts(BaseModel):
    """Counts of one drafter: heads, look-up, or both together."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    nodes: int | None = None
    """Drafts verified in each round at most; null where as many were as paid."""
    tokens: int = Field(ge=0)
    forwards: int = Field(ge=0)
    seconds: float | None = Field(default=None, ge=0)
    """null offline."""
    sources: dict[str, list[int]] = Field(default_factory=dict)
    """Accepted drafts by source, then by depth."""

    @property
    def tau(self) -> float:
        """Tokens per forward pass of the trunk."""
        return self.tokens / self.forwards if self.forwards else 0.0

    @classmethod
    def of(cls, parts: Sequence[DrafterCounts]) -> DrafterCounts:
        """Sums over prompts."""
        return cls(
            nodes=parts[0].nodes,
            tokens=sum(part.tokens for part in parts),
            forwards=sum(part.forwards for part in parts),
            seconds=_sum_or_none(part.seconds for part in parts),
            sources=sum_sources([part.sources for part in parts]),
        )


class CountsModel(BaseModel):
    """Counts over one prompt or many."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    tokens: int = Field(default=0, ge=0)
    forwards: int = Field(default=0, ge=0)
    drafted: list[int]
    accepted: list[int]
    seconds: float = Field(default=0.0, ge=0)
    plain_seconds: float | None = Field(default=None, ge=0)
    """Of transformers' own `generate` without heads; null offline."""
    engine_seconds: float | None = Field(default=None, ge=0)
    """Of mtpd's own engine without drafts; null offline, and in files from before it was measured."""
    expected: list[float] | None = None
    """Sums over drafts of Σ_x min(p, q) at each depth, teacher-forced: what sampling would accept; null decoded."""
    expected_rows: list[int] | None = None
    """How many drafts those sums are over."""
    drafters: dict[str, DrafterCounts] | None = None
    """Heads and look-up `together`, `heads` as a tree, and `lookup` alone; null in files of schemas 1 and 2."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if len(self.drafted) != len(self.accepted):
            raise ValueError("drafted and accepted differ in length")
        if any(not 0 <= a <= d for a, d in zip(self.accepted, self.drafted, strict=True)):
            raise ValueError("accepted counts are not between 0 and drafted")
        for name, values in (("drafted", self.drafted), ("accepted", self.accepted)):
            if any(later > earlier for earlier, later in pairwise(values)):
                raise ValueError(f"{name} counts rise with depth")
        if (self.expected is None) != (self.expected_rows is None):
            raise ValueError("expected and expected_rows go together")
        if self.expected is not None and self.expected_rows is not None:
            if not len(self.expected) == len(self.expected_rows) == len(self.drafted):
                raise ValueError("expected, expected_rows and drafted differ in length")
            # Each draft adds at most 1, up to the rounding of float32 sums.
            if any(not 0 <= e <= r * 1.001 for e, r in zip(self.expected, self.expected_rows, strict=True)):
                raise ValueError("expected sums are not between 0 and expected_rows")
        return self

    @property
    def depth(self) -> int:
        """K, tokens drafted a round."""
        return len(self.drafted)


class PromptCounts(CountsModel):
    """One prompt."""

    id: str
    prompt: str
    """Fingerprint of the tokens that the model read, chat template included."""
    text: str = ""
    """Fingerprint of the text that was measured on: the response tokens."""
    identical: bool | None = None
    """Decoded: whether the text equals plain `generate` token for token; null offline."""
    tie: bool | None = None
    """Decoded: whether it parts from it at a tie, two tokens whose logits agree to rounding; null offline."""
    trained: Literal["exact", "near"] | None = None
    """The run was trained on this prompt, or on one that is nearly the same."""
    family: str | None = None
    """What the row says that it is of; null where it says nothing, as are the next two."""
    mode: str | None = None
    """Arguments of the chat template that wrote the prompt."""
    language: str | None = None
    places: Places | None = None
    """Where the rounds were, as `mtpd.decode.counts` has it; null in files of schemas 1 to 3."""

    @model_validator(mode="after")
    def _places_add_up(self) -> Self:
        for kind, buckets in (self.places or {}).items():
            if kind not in FIRST or any(len(counts) != self.depth + 1 for counts in buckets.values()):
                raise ValueError(
                    f"places: {kind} is not accepted; accepted: {', '.join(FIRST)}, each with K + 1 counts"
                )
            if _columns(list(buckets.values()), self.depth + 1) != [*self.drafted[:1], *self.accepted]:
                raise ValueError(f"places: {kind} does not add up to drafted and accepted")
        return self

    @classmethod
    def of(cls, counts: Counts, **fields: Any) -> PromptCounts:
        """One text as decoding counted it."""
        return cls(
            tokens=counts.tokens,
            forwards=counts.forwards,
            drafted=counts.drafted,
            accepted=counts.accepted,
            places=counts.places or {kind: {} for kind in FIRST},
            **fields,
        )


class Control(BaseModel):
    """Sums as in `SuiteCounts`, of drafts compared with targets one position too late: they must collapse."""

    model_config = ConfigDict(extra="forbid")

    drafted: list[int]
    accepted: list[int]

    @property
    def car(self) -> list[float]:
        """CAR_1..CAR_K against the shifted targets."""
        return shares(self.accepted, self.drafted)


class SuiteCounts(CountsModel):
    """Sums over the prompts of one suite, and the prompts that they are sums of."""

    prompts: int = Field(default=0, ge=0)
    identical: int | None = None
    """Decoded prompts whose text equals plain `generate` token for token; null offline."""
    ties: int | None = None
    """Of the others, those that part from it at a tie: two tokens whose logits agree to rounding. null offline."""
    control: Control | None = None
    """The same drafts against targets moved by one position; null decoded."""
    settings: Settings | None = None
    """Source, template, limit, seed and length; null in files of schema 1."""
    rows: list[PromptCounts] | None = None
    """null in files of schema 1, and in sums over suites."""

    @model_validator(mode="after")
    def _rows_add_up(self) -> SuiteCounts:
        if self.rows is None:
            return self
        if len({row.id for row in self.rows}) < len(self.rows):
            raise ValueError("rows: two prompts have one id")
        if any(row.depth != self.depth for row in self.rows):
            raise ValueError("rows: they differ in depth from the sums")
        if self.rows or self.prompts:
            sums = SuiteCounts.of(self.rows, self.depth)
            for name in _SUMMED:
                if not _equal(getattr(self, name), getattr(sums, name)):
                    raise ValueError(f"rows: {name} is not their sum")
        return self

    @classmethod
    def empty(cls, depth: int) -> SuiteCounts:
        return cls(drafted=[0] * depth, accepted=[0] * depth)

    @classmethod
    def of(cls, rows: Sequence[PromptCounts], depth: int, **fields: Any) -> SuiteCounts:
        """Sums over prompts."""
        return cls.model_construct(
            prompts=len(rows),
            tokens=sum(row.tokens for row in rows),
            forwards=sum(row.forwards for row in rows),
            drafted=_columns([row.drafted for row in rows], depth),
            accepted=_columns([row.accepted for row in rows], depth),
            seconds=sum(row.seconds for row in rows),
            plain_seconds=_sum_or_none(row.plain_seconds for row in rows),
            engine_seconds=_sum_or_none(row.engine_seconds for row in rows),
            identical=_sum_or_none(row.identical for row in rows),
            ties=_sum_or_none(row.tie for row in rows),
            expected=_columns([row.expected for row in rows], depth),
            expected_rows=_columns([row.expected_rows for row in rows], depth),
            drafters=_sum_drafters([row.drafters for row in rows]),
            **{"rows": list(rows), **fields},
        )

    @property
    def car(self) -> list[float]:
        """CAR_1..CAR_K."""
        return shares(self.accepted, self.drafted)

    @property
    def ar(self) -> list[float]:
        """AR_1..AR_K, so that CAR_k is their product up to k."""
        return conditional(self.car)

    @property
    def tau(self) -> float:
        """Tokens per forward pass of the trunk: 1 + Σ CAR_k."""
        return 1.0 + sum(self.car)

    @property
    def expected_acceptance(self) -> list[float] | None:
        """Mean Σ_x min(p, q) by depth."""
        if self.expected is None or self.expected_rows is None:
            return None
        return shares(self.expected, self.expected_rows)

    @property
    def speed_up(self) -> float | None:
        """Wall-clock tokens/s against transformers' `generate` on the same prompts in the same process."""
        return self.plain_seconds / self.seconds if self.plain_seconds and self.seconds else None

    @property
    def speed_up_over_engine(self) -> float | None:
        """Wall-clock tokens/s against the same engine without drafts: what the drafts alone gain."""
        return self.engine_seconds / self.seconds if self.engine_seconds and self.seconds else None

    @property
    def trained(self) -> int:
        """Prompts that the run was trained on, or nearly."""
        return sum(row.trained is not None for row in self.rows or [])


_SUMMED = (
    "prompts",
    "tokens",
    "forwards",
    "drafted",
    "accepted",
    "seconds",
    "plain_seconds",
    "engine_seconds",
    "identical",
    "ties",
    "drafters",
)


class Acceptance(BaseModel):
    """Contents of `acceptance.json`."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True, allow_inf_nan=False)

    schema_version: Literal[1, 2, 3, 4] = Field(default=4, alias="schema")
    mode: Literal["offline", "decoded", "served"]
    sampling: dict[str, float] | None = None
    settings: Settings | None = None
    """Number format, tokens drafted a round, and what else all suites share; null in files of schema 1."""
    trunk: str
    heads: str
    heads_trunk: str | None = None
    """Fingerprint of the trunk that the heads were trained for, where they were measured under another one."""
    random_trunk: bool = False
    """The trunk predicts prompts no better than chance: its weights are random, and the counts mean nothing."""
    versions: dict[str, str] = Field(default_factory=library_versions)
    suites: dict[str, SuiteCounts]
    loads: list[Load] | None = None
    """Of a server, by requests at a time; null in other modes."""

    @model_validator(mode="after")
    def _one_depth(self) -> Acceptance:
        if len({suite.depth for suite in self.suites.values()}) > 1:
            raise ValueError("suites: they differ in depth")
        return self

    def total(self, suites: Iterable[str] | None = None) -> SuiteCounts:
        """Sums over suites (all of them by default)."""
        chosen = [self.suites[name] for name in (self.suites if suites is None else suites)]
        depth = chosen[0].depth
        return SuiteCounts.model_construct(
            prompts=sum(suite.prompts for suite in chosen),
            tokens=sum(suite.tokens for suite in chosen),
            forwards=sum(suite.forwards for suite in chosen),
            drafted=_columns([suite.drafted for suite in chosen], depth),
            accepted=_columns([suite.accepted for suite in chosen], depth),
            seconds=sum(suite.seconds for suite in chosen),
            plain_seconds=_sum_or_none(suite.plain_seconds for suite in chosen),
            engine_seconds=_sum_or_none(suite.engine_seconds for suite in chosen),
            identical=_sum_or_none(suite.identical for suite in chosen),
            ties=_sum_or_none(suite.ties for suite in chosen),
            expected=_columns([suite.expected for suite in chosen], depth),
            expected_rows=_columns([suite.expected_rows for suite in chosen], depth),
            drafters=_sum_drafters([suite.drafters for suite in chosen]),
            control=_total_control([suite.control for suite in chosen], depth),
        )

    def save(self, path: str | Path) -> None:
        content = self.model_dump(mode="json", by_alias=True, exclude_unset=False)
        write_whole(path, _laid_out(sealed(content)) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Acceptance:
        """Reads an acceptance file.

        Raises:
            UserError: it is missing, no JSON, holds no suite, or its counts are impossible.
        """
        try:
            found = cls.model_validate(read_sealed(path, refusal="not an acceptance file"))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: not an acceptance file: {where}: {first['msg']}") from error
        if not any(suite.prompts for suite in found.suites.values()):
            raise UserError(f"{path}: holds no suite with a prompt in it; measure with mtpd eval")
        return found


def _columns(lists: Sequence[Sequence[Any] | None], depth: int) -> Any:
    """Sums by depth; None where one of the lists is missing."""
    if None in lists:
        return None
    return [sum(column) for column in zip(*lists, strict=True)] if lists else [0] * depth


def _sum_or_none(values: Iterable[Any]) -> Any:
    found = list(values)
    return None if None in found or not found else sum(found)


def _sum_drafters(parts: Sequence[dict[str, DrafterCounts] | None]) -> dict[str, DrafterCounts] | None:
    """Sums by drafter, of those that all have; None where one has none."""
    found = [part for part in parts if part]
    if not found or len(found) < len(parts):
        return None
    names = [name for name in found[0] if all(name in part for part in found)]
    return {name: DrafterCounts.of([part[name] for part in found]) for name in names}


def _total_control(controls: Sequence[Control | None], depth: int) -> Control | None:
    found = [control for control in controls if control is not None]
    if len(found) < len(controls):
        return None
    return Control(
        drafted=_columns([control.drafted for control in found], depth),
        accepted=_columns([control.accepted for control in found], depth),
    )


def _equal(stored: Any, summed: Any) -> bool:
    if isinstance(stored, float) and isinstance(summed, float):
        return math.isclose(stored, summed, rel_tol=1e-6, abs_tol=1e-9)
    return bool(stored == summed)


def _laid_out(value: Any, indent: int = 0, levels: int = 4) -> str:
    """JSON with a line for each entry of the outer levels, and one for each prompt."""
    inside = isinstance(value, dict) or (isinstance(value, list) and any(isinstance(item, dict) for item in value))
    if not value or levels == 0 or not inside:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    pad = "\n" + " " * (indent + 1)
    if isinstance(value, list):
        items = [json.dumps(item, ensure_ascii=False, allow_nan=False) for item in value]
        return "[" + pad + f",{pad}".join(items) + "\n" + " " * indent + "]"
    items = [f"{json.dumps(key)}: {_laid_out(item, indent + 1, levels - 1)}" for key, item in value.items()]
    return "{" + pad + f",{pad}".join(items) + "\n" + " " * indent + "}"
