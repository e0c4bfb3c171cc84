"""The acceptance file: counts, from which ratios are computed when they are read.

AR_k is the share accepted at depth k of the drafts whose depths 1..k-1 were accepted, CAR_k the share
of drafts whose first k tokens are all accepted, and tau = 1 + Σ CAR_k.
"""

from __future__ import annotations

import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mtpd.decode import Counts
from mtpd.errors import UserError
from mtpd.files import write_whole


class SuiteCounts(BaseModel):
    """Sums over the prompts of one suite."""

    model_config = ConfigDict(extra="forbid")

    prompts: int = Field(default=0, ge=0)
    tokens: int = Field(default=0, ge=0)
    forwards: int = Field(default=0, ge=0)
    drafted: list[int]
    accepted: list[int]
    seconds: float = Field(default=0.0, ge=0)
    plain_seconds: float | None = None
    identical: int | None = None
    """Decoded prompts whose text equals plain `generate` token for token; null offline."""
    ties: int | None = None
    """Of the others, those that part from it at a tie: two tokens whose logits agree to rounding. null offline."""
    expected: list[float] | None = None
    """Sums over drafts of Σ_x min(p, q) at each depth, teacher-forced: what sampling would accept; null decoded."""
    expected_rows: list[int] | None = None
    """How many drafts those sums are over."""

    @model_validator(mode="after")
    def _possible(self) -> SuiteCounts:
        if len(self.drafted) != len(self.accepted):
            raise ValueError("drafted and accepted differ in length")
        if any(not 0 <= a <= d for a, d in zip(self.accepted, self.drafted, strict=True)):
            raise ValueError("accepted counts are not between 0 and drafted")
        for name, values in (("drafted", self.drafted), ("accepted", self.accepted)):
            if any(later > earlier for earlier, later in pairwise(values)):
                raise ValueError(f"{name} counts rise with depth")
        return self

    @classmethod
    def empty(cls, depth: int) -> SuiteCounts:
        return cls(drafted=[0] * depth, accepted=[0] * depth)

    def add(self, counts: Counts, *, seconds: float = 0.0) -> None:
        """Adds one decoded text."""
        self.prompts += 1
        self.tokens += counts.tokens
        self.forwards += counts.forwards
        self.drafted = [a + b for a, b in zip(self.drafted, counts.drafted, strict=True)]
        self.accepted = [a + b for a, b in zip(self.accepted, counts.accepted, strict=True)]
        self.seconds += seconds

    @property
    def car(self) -> list[float]:
        """CAR_1..CAR_K."""
        return [a / d if d else 0.0 for a, d in zip(self.accepted, self.drafted, strict=True)]

    @property
    def ar(self) -> list[float]:
        """AR_1..AR_K, so that CAR_k is their product up to k."""
        car = self.car
        return [now / before if before else 0.0 for now, before in zip(car, [1.0, *car[:-1]], strict=True)]

    @property
    def tau(self) -> float:
        """Tokens per forward pass of the trunk: 1 + Σ CAR_k."""
        return 1.0 + sum(self.car)

    @property
    def expected_acceptance(self) -> list[float] | None:
        """Mean Σ_x min(p, q) by depth."""
        if self.expected is None or self.expected_rows is None:
            return None
        return [total / rows if rows else 0.0 for total, rows in zip(self.expected, self.expected_rows, strict=True)]

    @property
    def speedup(self) -> float | None:
        """Wall-clock tokens/s against plain decoding of the same prompts in the same process."""
        return self.plain_seconds / self.seconds if self.plain_seconds and self.seconds else None


class Acceptance(BaseModel):
    """Contents of `acceptance.json`."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    schema_version: Literal[1] = Field(default=1, alias="schema")
    mode: Literal["offline", "decoded"]
    sampling: dict[str, float] | None = None
    trunk: str
    heads: str
    versions: dict[str, str] = Field(default_factory=lambda: library_versions())
    suites: dict[str, SuiteCounts]

    def total(self, suites: Iterable[str] | None = None) -> SuiteCounts:
        """Sums over suites (all of them by default)."""
        chosen = [self.suites[name] for name in (self.suites if suites is None else suites)]
        depth = len(chosen[0].drafted)
        total = SuiteCounts.empty(depth)
        for suite in chosen:
            total.prompts += suite.prompts
            total.tokens += suite.tokens
            total.forwards += suite.forwards
            total.drafted = [a + b for a, b in zip(total.drafted, suite.drafted, strict=True)]
            total.accepted = [a + b for a, b in zip(total.accepted, suite.accepted, strict=True)]
            total.seconds += suite.seconds
        for name in ("plain_seconds", "identical", "ties"):
            values = [getattr(suite, name) for suite in chosen]
            setattr(total, name, None if None in values else sum(values))
        for name in ("expected", "expected_rows"):
            columns = [getattr(suite, name) for suite in chosen]
            setattr(total, name, None if None in columns else [sum(c) for c in zip(*columns, strict=True)])
        return total

    def save(self, path: str | Path) -> None:
        write_whole(path, self.model_dump_json(indent=2, by_alias=True) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> Acceptance:
        """Reads an acceptance file.

        Raises:
            UserError: it is missing, no JSON, or its counts are impossible.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"{path}: not an acceptance file: {where}: {first['msg']}") from error


def library_versions() -> dict[str, str]:
    """Versions of what a number depends on."""
    found = {"python": platform.python_version()}
    for name in ("mtpd", "torch", "transformers", "trl", "datasets", "deepspeed", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
