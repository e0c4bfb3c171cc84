"""`mtpd extend`: more heads out of those of a finished run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mtpd.cli.errors import disk_full
from mtpd.cli.eval import RunArgument
from mtpd.cli.kept import RESUMES, RESUMES_WITHOUT_FRESH, keeping
from mtpd.cli.options import Debug
from mtpd.cli.terminal import quiet_libraries
from mtpd.errors import UserError
from mtpd.finished_run import check_finished


def extend(
    context: typer.Context,
    run: RunArgument,
    to: Annotated[int | None, typer.Option("--to", help="Heads after the last stage.")] = None,
    stages: Annotated[
        str | None,
        typer.Option("--stages", help="Heads after each stage, such as 8,16. Default: twice as many each time."),
    ] = None,
    shared: Annotated[
        bool, typer.Option("--shared", help="New heads use the blocks there are, and have no weights of their own.")
    ] = False,
    adapters: Annotated[
        int | None,
        typer.Option("--adapters", help="New heads use the blocks there are, with LoRA adapters of this rank."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option("--steps", help="Training steps of each stage; 0 adds heads without training.")
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak learning rate of a stage.")
    ] = None,
    auto: Annotated[
        bool, typer.Option("--auto", help="Add stages until one no longer makes decoding faster here.")
    ] = False,
    untrusted: Annotated[
        bool,
        typer.Option(
            "--untrusted",
            help="The run is somebody else's: paths in its recipe stay inside this folder, and nothing in it runs code "
            "or sends data away.",
        ),
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Start over: delete what an earlier call left of these stages.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Add heads to a run: they start as copies of the last ones, and only they are trained (looped extension, MTP-D).

    Each stage is a run directory in RUN/extended. The same command resumes an interrupted stage.

    Options that are left out come from the `extend` section of the run's recipe.

    Examples:

        mtpd extend runs/demo --to 8

        mtpd extend runs/demo --to 16 --stages 8,16 --adapters 16 --learning-rate 2e-3

        mtpd extend runs/demo --to 8 --steps 0
    """
    check_finished(run)
    if shared and adapters is not None:
        raise UserError("--shared: is not accepted with --adapters; accepted: one of them")
    form = "shared" if shared else "adapters" if adapters is not None else None
    values = {
        "to": to,
        "stages": None if stages is None else _numbers(stages),
        "form": form,
        "rank": adapters,
        "steps": steps,
        "learning_rate": learning_rate,
        "auto": auto or None,
    }
    given: dict[str, Any] = {key: value for key, value in values.items() if value is not None}
    with quiet_libraries(debug=debug or bool(context.find_root().params.get("debug"))):
        from mtpd.parallel import ranks  # brings in torch
        from mtpd.run.extend import extend as run_stages

        try:
            with keeping(RESUMES_WITHOUT_FRESH if fresh else RESUMES):
                path: Path = run_stages(run, given, fresh=fresh, untrusted=untrusted)
        except Exception as error:
            if full := disk_full(error, run):
                raise full from error
            raise
        if ranks.speaks():
            typer.echo(f"done: {path}")


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise UserError(
            f"--stages: {text} is not accepted; accepted: numbers with commas between them, such as 8,16"
        ) from None
