"""Earlier acceptance files of a folder, in the order of their names: 2026-11-29.json, or v1.json and v2.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mtpd.errors import UserError
from mtpd.evaluate.acceptance import Acceptance

BARS = "▁▂▃▄▅▆▇█"
LAST = 20
"""Results in a sparkline at most."""


@dataclass(frozen=True)
class Past:
    """An earlier measurement."""

    name: str
    """Of its file, without the ending."""
    acceptance: Acceptance


def read_history(folder: Path) -> list[Past]:
    """Reads the acceptance files of a folder.

    Raises:
        UserError: no such folder, no file in it, or one that is no acceptance file.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; accepted: a folder of acceptance files, named so that they sort")
    found = [Past(path.stem, Acceptance.load(path)) for path in sorted(folder.glob("*.json"))]
    if not found:
        raise UserError(f"{folder}: holds no acceptance file; accepted: .json files that mtpd eval wrote")
    return found


def sparklines(past: Sequence[Past], now: Acceptance) -> dict[str | None, str]:
    """Draws tau of the last results and of this one: of each suite, and under None of all together.

    Results of another mode are left out, and so are those of other suites where it is about all together.
    """
    known = [each.acceptance for each in past if each.acceptance.mode == now.mode]
    same = [each for each in known if each.suites.keys() == now.suites.keys()]
    taus: dict[str | None, list[float]] = {None: [each.total().tau for each in [*same, now]]}
    for name, suite in now.suites.items():
        taus[name] = [*(each.suites[name].tau for each in known if name in each.suites), suite.tau]
    return {name: sparkline(values[-LAST:]) for name, values in taus.items() if len(values) > 1}


def sparkline(values: Sequence[float]) -> str:
    """Draws values between the lowest and the highest one: ▁▄█ 1.20 → 1.35"""
    low, high = min(values), max(values)
    steps = [round((value - low) / (high - low) * (len(BARS) - 1)) if high > low else 3 for value in values]
    return f"{''.join(BARS[step] for step in steps)} {values[0]:.2f} → {values[-1]:.2f}"
