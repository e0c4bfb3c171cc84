"""Requests to `mtpd eval`, and their checks before anything is loaded: nothing here needs PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mtpd.data.find_model import check_model
from mtpd.errors import UserError
from mtpd.evaluate import gate
from mtpd.evaluate.acceptance import Acceptance
from mtpd.evaluate.compare import Asked
from mtpd.evaluate.history import Past, read_history
from mtpd.evaluate.suites import Suite, load_suite
from mtpd.finished_run import RECIPE
from mtpd.heads import read_config
from mtpd.recipe import load_recipe


@dataclass(frozen=True)
class Request:
    """A request to `mtpd eval`; the options of the command say what each field means."""

    run: Path
    suites: Sequence[str] | None
    suite_dir: Path | None
    mode: Literal["offline", "decoded", "served"] | None
    output: Path | None
    heads: str
    drafts: int | None
    limit: int | None
    max_new_tokens: int | None
    responses: Path
    against: Path | None
    asked: Asked
    history: Path | None
    write_baseline: Path | None
    check_trunk: bool
    markdown: Path | None
    junit: Path | None
    untrusted: bool = False
    model: str | None = None

    def baseline(self) -> Acceptance | None:
        """Reads the file that the result is compared with."""
        return None if self.against is None else Acceptance.load(self.against)

    def past(self) -> list[Past]:
        """Reads the earlier results that `--markdown` shows."""
        return [] if self.history is None else read_history(self.history)


def check_request(request: Request, baseline: Acceptance | None) -> dict[str, Suite]:
    """The suites that are measured, with what the command does not say as the baseline has it.

    Raises:
        UserError: an option of another value than accepted, or one that does not go with the baseline.
    """
    request.asked.check()
    if request.asked.max_drop_worst is not None and request.against is None:
        raise UserError(
            f"--max-drop-worst: {request.asked.max_drop_worst} needs --against; a first release has --min-tau instead"
        )
    if request.model is not None:
        check_model(request.model)
    heads = read_config(request.run / request.heads)
    drafts = request.drafts or heads.depth
    heads.check_depth(drafts, key="--drafts")
    recipe = request.run / RECIPE
    arguments = load_recipe(recipe).data.chat_template_kwargs if recipe.is_file() else {}
    suites = {
        name: load_suite(
            name,
            request.suite_dir,
            limit=request.limit or _setting(baseline, name, "limit"),
            max_new_tokens=request.max_new_tokens or _setting(baseline, name, "max_new_tokens"),
            chat_template_kwargs=arguments,
            untrusted=request.untrusted,
        )
        for name in request.suites or (["demo"] if baseline is None else baseline.suites)
    }
    if baseline is not None:
        if baseline.mode == "served" and request.mode != "served":
            raise UserError(
                f"--against: {request.against} was measured on a server; accepted: with --server, the same way"
            )
        gate.check_rows(baseline, str(request.against))
        between = f"{request.against} and {request.run}"
        gate.check_mode(baseline, request.mode or baseline.mode, between)
        if baseline.mode != "served":
            gate.check_settings(baseline, {**(baseline.settings or {}), "drafts": drafts}, between)
        gate.check_suites(baseline, {name: suite.settings for name, suite in suites.items()}, between)
    return suites


def _setting(baseline: Acceptance | None, suite: str, key: str) -> int | None:
    found = None if baseline is None or suite not in baseline.suites else baseline.suites[suite].settings
    value = (found or {}).get(key)
    return value if isinstance(value, int) and value > 0 else None
