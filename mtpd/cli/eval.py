"""`mtpd eval`: measures the heads of a run on suites, and compares them with a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mtpd.cli.kept import KEPT_RESPONSES, keeping
from mtpd.cli.options import Debug
from mtpd.cli.terminal import quiet_libraries
from mtpd.finished_run import check_finished
from mtpd.run.check import acceptance_file, check_file

RESPONSES = Path("~/.cache/mtpd/responses")
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory of mtpd distill.")]
MaxDrop = Annotated[
    float,
    typer.Option("--max-drop", help="The loss that is accepted: 0.01 is one point of CAR_1, and one percent of tau."),
]
MarkdownFile = Annotated[Path | None, typer.Option("--markdown", help="Write the result for a pull request.")]
JunitFile = Annotated[Path | None, typer.Option("--junit", help="Write the result as JUnit XML.")]


def evaluate(
    context: typer.Context,
    run: RunArgument,
    suite: Annotated[
        str | None,
        typer.Option(help="Suites, with commas between them. Default: those of --against, else demo."),
    ] = None,
    suite_dir: Annotated[
        Path | None, typer.Option(help="A folder of further suites (.yaml) and rows (.jsonl), looked into first.")
    ] = None,
    mode: Annotated[
        Literal["offline", "decoded"] | None,
        typer.Option(
            help="offline: reads the model's greedy text once. decoded: really decodes. "
            "Default: that of --against, else offline."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="The acceptance file. Default: evaluation.json in the run directory."),
    ] = None,
    heads: Annotated[str, typer.Option(help="Folder of the heads in the run directory.")] = "heads",
    drafts: Annotated[int | None, typer.Option(min=1, help="Tokens drafted a round. Default: all heads.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Prompts of each suite. Default: as in --against, else the suite's own.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of a response. Default: as in --against, else the suite's own.")
    ] = None,
    responses: Annotated[Path, typer.Option(help="Where the model's responses are kept between calls.")] = RESPONSES,
    against: Annotated[
        Path | None,
        typer.Option(help="Compare with this acceptance file, or the one of a run, on the same prompts."),
    ] = None,
    max_drop: MaxDrop = 0.01,
    write_baseline: Annotated[
        Path | None, typer.Option(help="Also write the result here, if the gate passes or there is none.")
    ] = None,
    check_trunk: Annotated[
        bool, typer.Option("--check-trunk", help="Also measure the model itself, before and after the run.")
    ] = False,
    markdown: MarkdownFile = None,
    junit: JunitFile = None,
    untrusted: Annotated[
        bool,
        typer.Option(
            "--untrusted",
            help="Run and suites are somebody else's: code of the model is not run, and paths in the folder of suites "
            "stay inside of it.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Measure how many drafts of a run's heads are accepted.

    Exit codes: 0 fine, 3 worse than the baseline, 4 undecided (more prompts needed), 2 a mistake, 1 a failure.

    Examples:

        mtpd eval runs/demo --suite demo -o acceptance.json

        mtpd eval runs/demo --suite gsm8k,humaneval --suite-dir suites --write-baseline baselines/main.json

        mtpd eval runs/demo --against baselines/main.json --max-drop 0.01
    """
    from mtpd.evaluate.suites import check_names  # takes a moment that --help has no need of

    names = None if suite is None else [name.strip() for name in suite.split(",") if name.strip()]
    for option, file in (("--output", output), ("--markdown", markdown), ("--junit", junit)):
        check_file(file, key=option)
    check_file(write_baseline, key="--write-baseline")
    check_finished(run, heads=heads)
    if against is not None:
        against = acceptance_file(against, name="evaluation-decoded.json" if mode == "decoded" else "evaluation.json")
    check_names(names, suite_dir, against=against)
    with quiet_libraries(debug=debug or bool(context.find_root().params.get("debug"))):
        from mtpd.run.evaluate import Request, evaluate_run  # brings in torch

        request = Request(
            run=run,
            suites=names,
            suite_dir=suite_dir,
            mode=mode,
            output=output,
            heads=heads,
            drafts=drafts,
            limit=limit,
            max_new_tokens=max_new_tokens,
            responses=responses.expanduser(),
            against=against,
            max_drop=max_drop,
            write_baseline=write_baseline,
            check_trunk=check_trunk,
            markdown=markdown,
            junit=junit,
            untrusted=untrusted,
        )
        with keeping(KEPT_RESPONSES):
            code = evaluate_run(request)
    if code:
        raise typer.Exit(code)
