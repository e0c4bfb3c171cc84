"""`mtpd verify`: an export in a real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mtpd.cli.checks import served_export
from mtpd.cli.options import Debug
from mtpd.cli.terminal import quiet_libraries
from mtpd.data.sources import check_source
from mtpd.errors import UserError


def verify(
    path: Annotated[Path, typer.Argument(metavar="EXPORT", help="A directory that mtpd export wrote.")],
    engine: Annotated[Literal["transformers", "vllm"], typer.Option("--engine", help="The engine that serves it.")],
    suite: Annotated[
        str, typer.Option("--suite", help="demo (held-out built-in prompts), a .jsonl file, or a datasets id.")
    ] = "demo",
    limit: Annotated[int, typer.Option("--limit", min=1, help="Prompts of the suite, at most.")] = 4,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=2, help="Tokens of each text.")] = 32,
    drafts: Annotated[
        int | None,
        typer.Option("--drafts", min=1, help="How many tokens are drafted at a time. Default: all exported heads."),
    ] = None,
    run: Annotated[
        Path | None, typer.Option("--run", help="The run that was exported, if it has been moved since.")
    ] = None,
    environment: Annotated[
        Path | None,
        typer.Option(
            "--environment", help="With --engine vllm: a virtual environment that has it, made there if it is missing."
        ),
    ] = None,
    perturb: Annotated[
        bool, typer.Option(help="Also serve noise in place of the heads: less must be accepted then.")
    ] = True,
    debug: Debug = False,
) -> None:
    """Serve an export in float32 and compare its text and drafts with mtpd's own.

    Drafts are compared one by one where the engine gives them (transformers; vLLM with the plugin),
    elsewhere by their acceptance.

    Exit codes: 0 all agree, 3 text, drafts or acceptance differ, 2 a mistake, 1 a failure.

    Example:

        mtpd verify out --engine vllm
    """
    if environment is not None and engine != "vllm":
        raise UserError(f"--environment: {environment} is for --engine vllm; {engine} runs in this environment")
    served_export(path, engine=engine, run=run, drafts=drafts)
    prompts = "builtin-held-out" if suite == "demo" else suite
    check_source(prompts, key="--suite")
    with quiet_libraries(debug=debug):
        from mtpd.formats.verify import verify as serve  # brings in torch

        found = serve(
            path,
            engine=engine,
            prompts=prompts,
            limit=limit,
            max_new_tokens=max_new_tokens,
            drafts=drafts,
            run=run,
            environment=environment,
            perturb=perturb,
        )
        for line in found.lines():
            typer.echo(line)
    if not found.ok:
        raise typer.Exit(3)
