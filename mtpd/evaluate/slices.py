"""Slices of a measurement: acceptance by suite, family, mode, language, and by where a round was.

Heads disappoint in a slice first: with thinking on, in another language, behind the length that they were trained on.
A slice is a set of rounds: those of some prompts, or those of all prompts within a range of positions.

Slices are small, and percentiles of a bootstrap are too narrow for a dozen prompts. So the error of a ratio here is
the jackknife's over prompts (Miller 1974: each prompt left out in turn), and intervals are those of Student's t. A
prompt with many rounds weighs more than one with few: the degrees of freedom are one less than the number of prompts
of equal weight that the weights are worth, (Σ rounds)² / Σ rounds² (Kish 1965).

Legend: N prompts, C columns of counts: rounds, then those accepted at each depth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtpd.decode.counts import FIRST
from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance, PromptCounts
from mtpd.evaluate.intervals import CONFIDENCE, FEWEST, Array, Estimate

AXES = ("suite", "family", "mode", "language", "position", "context")
"""What `--by` takes. position: tokens of the response before a round; context: those and the prompt's."""
KINDS = {"position": "text", "context": "context"}
"""Axes of places, and what counts call them."""
PLAIN = "plain"
"""The mode of prompts that no argument changes."""
FEW = 10
"""Buckets of positions with rounds of fewer prompts are joined with their neighbours."""


@dataclass(frozen=True)
class Ratio:
    """A ratio of a slice with its jackknife error."""

    value: float
    error: float
    """Standard error; infinite where there are too few prompts."""
    freedom: float
    """Degrees of freedom."""

    def __neg__(self) -> Ratio:
        return Ratio(-self.value, self.error, self.freedom)

    def estimate(self, confidence: float = CONFIDENCE, *, within: tuple[float, float] | None = None) -> Estimate:
        """The value with its interval; without one where there are too few prompts."""
        if not math.isfinite(self.error):
            return Estimate(self.value)
        from scipy.special import stdtrit  # takes a moment to import

        half = float(stdtrit(self.freedom, (1 + confidence) / 2)) * self.error if self.error else 0.0
        low, high = (-math.inf, math.inf) if within is None else within
        return Estimate(self.value, max(low, self.value - half), min(high, self.value + half))


@dataclass(frozen=True)
class Slice:
    """Rounds of a measurement that have something in common."""

    axis: str
    name: str
    counts: Array
    """Counts [N, C] of the prompts that have rounds in it."""

    @property
    def prompts(self) -> int:
        """Prompts with rounds in it."""
        return len(self.counts)

    @property
    def rounds(self) -> int:
        """Rounds that count."""
        return int(self.counts[:, 0].sum())

    def ratios(self) -> dict[str, Estimate]:
        """tau, and CAR and AR by depth, with 95% intervals."""
        depth = self.counts.shape[1] - 1
        functions: dict[str, tuple[Callable[[Array], Array], tuple[float, float]]] = {"tau": (tau, (1.0, 1.0 + depth))}
        for k in range(1, depth + 1):
            functions[f"car_{k}"] = (_share(k, 0), (0.0, 1.0))
            functions[f"ar_{k}"] = (_share(k, k - 1), (0.0, 1.0))
        return {
            name: jackknife(function, self.counts).estimate(within=bounds)
            for name, (function, bounds) in functions.items()
        }


def slices(acceptance: Acceptance, axes: Sequence[str]) -> list[Slice]:
    """The slices of a measurement along some axes, those of one axis after another.

    Raises:
        UserError: the file has no counts by prompt, or none by position where an axis needs them.
    """
    rows = _rows(acceptance)
    if not rows:
        raise UserError("--by: the file has no counts by prompt (schema 1); measure again with mtpd eval")
    if KINDS.keys() & set(axes) and not has_places(acceptance):
        raise UserError(
            f"--by: the file has no counts by position (schema {acceptance.schema_version}); measure again with mtpd "
            "eval"
        )
    found = []
    for axis in axes:
        for name, (counts,) in along(axis, [rows]).items():
            found.append(Slice(axis, name, counts[counts[:, 0] > 0]))
    return found


def has_places(acceptance: Acceptance) -> bool:
    """Whether a file has counts by position, in every row."""
    return all(row.places is not None for _, row in _rows(acceptance))


def _rows(acceptance: Acceptance) -> list[tuple[str, PromptCounts]]:
    return [(name, row) for name, suite in acceptance.suites.items() for row in suite.rows or []]


def along(axis: str, sides: Sequence[Sequence[tuple[str, PromptCounts]]]) -> dict[str, list[Array]]:
    """The slices of an axis, by name, each with the counts [N, C] of each side.

    Args:
        sides: one measurement, or two of the same prompts: suite and counts of each. What a prompt is is taken from the
            side that knows.
    """
    if axis in KINDS:
        return _by_place(KINDS[axis], [[row for _, row in side] for side in sides])
    labels = [
        next((label for suite, row in both if (label := _label(axis, suite, row))), "")
        for both in zip(*sides, strict=True)
    ]
    if axis == "mode" and any(labels):
        labels = [label or PLAIN for label in labels]
    if axis == "family":
        labels = [label or suite for label, (suite, _) in zip(labels, sides[0], strict=True)]
    names = list(dict.fromkeys(label for label in labels if label))
    whole = [np.array([[*row.drafted[:1], *row.accepted] for _, row in side], dtype=np.float64) for side in sides]
    return {name: [side[[label == name for label in labels]] for side in whole] for name in names}


def _label(axis: str, suite: str, row: PromptCounts) -> str:
    return suite if axis == "suite" else {"family": row.family, "mode": row.mode, "language": row.language}[axis] or ""


def _by_place(kind: str, sides: Sequence[Sequence[PromptCounts]]) -> dict[str, list[Array]]:
    """Buckets of positions, small ones joined with their neighbours."""
    depth = sides[0][0].depth
    lowers = sorted({lower for side in sides for row in side for lower in (row.places or {}).get(kind, {})})
    tables = {
        lower: [
            np.array([(row.places or {}).get(kind, {}).get(lower, [0] * (depth + 1)) for row in side], dtype=np.float64)
            for side in sides
        ]
        for lower in lowers
    }
    groups = [[lower] for lower in lowers]

    def prompts(group: list[int]) -> int:
        return min(
            int((np.sum([tables[lower][side] for lower in group], axis=0)[:, 0] > 0).sum())
            for side in range(len(sides))
        )

    while len(groups) > 1:
        smallest = min(range(len(groups)), key=lambda index: prompts(groups[index]))
        if prompts(groups[smallest]) >= FEW:
            break
        # Late positions join those before them.
        other = smallest - 1 if smallest else 1
        low, high = sorted((smallest, other))
        groups[low : high + 1] = [groups[low] + groups[high]]
    return {
        _range(kind, group, last=group is groups[-1]): [
            np.sum([tables[lower][side] for lower in group], axis=0) for side in range(len(sides))
        ]
        for group in groups
    }


def _range(kind: str, group: Sequence[int], *, last: bool) -> str:
    """Names a range of positions: 16-63, or 256+ for the last one."""
    if last:
        return f"{group[0]}+"
    return f"{group[0]}-{max(FIRST[kind], 2 * group[-1]) - 1}"


def tau(sums_C: Array) -> Array:
    """Tokens per forward pass, of counts whose last axis is C."""
    return 1.0 + _over(sums_C[..., 1:].sum(axis=-1), sums_C[..., 0])


def _share(k: int, of: int) -> Callable[[Array], Array]:
    return lambda sums_C: _over(sums_C[..., k], sums_C[..., of])


def _over(part: Array, whole: Array) -> Array:
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)


def jackknife(function: Callable[..., Array], *sides: Array) -> Ratio:
    """A function of sums over prompts with its error, each prompt left out in turn.

    Args:
        function: of one array of sums for each side; sums of C columns, or [N, C] for all that leave one out.
        sides: counts [N, C], the same prompts in each.
    """
    rounds = np.sum([side[:, 0] for side in sides], axis=0)
    count = int((rounds > 0).sum())
    sums = [side.sum(axis=0) for side in sides]
    value = float(function(*sums))
    if count < FEWEST:
        return Ratio(value, math.inf, 0.0)
    without = function(*(each - side for each, side in zip(sums, sides, strict=True)))[rounds > 0]
    error = math.sqrt((count - 1) / count * float(((without - without.mean()) ** 2).sum()))
    worth = float(rounds.sum() ** 2 / (rounds**2).sum())
    return Ratio(value, error, max(1.0, worth - 1.0))


def template_mode(arguments: Mapping[str, Any]) -> str | None:
    """Names the arguments of a chat template: enable_thinking=false, tools; None where there are none."""
    found = [
        name if name == "tools" else f"{name}={json.dumps(value, sort_keys=True)}"
        for name, value in sorted(arguments.items())
    ]
    return ", ".join(found) or None


def check_axes(text: str | None) -> tuple[str, ...]:
    """Reads `--by`: axes with commas between them.

    Raises:
        UserError: one that there is not.
    """
    found = tuple(dict.fromkeys(axis.strip() for axis in (text or "").split(",") if axis.strip()))
    unknown = [axis for axis in found if axis not in AXES]
    if unknown or (text is not None and not found):
        shown = unknown[0] if unknown else repr(text)
        raise UserError(f"--by: {shown} is not accepted; accepted: {', '.join(AXES)}")
    return found
