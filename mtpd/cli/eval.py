"""`mtpd eval`: measures the heads of a run on suites, and compares them with a baseline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mtpd.cli.kept import KEPT_RESPONSES, keeping
from mtpd.cli.options import Debug
from mtpd.cli.terminal import quiet_libraries
from mtpd.errors import UserError
from mtpd.finished_run import check_finished
from mtpd.run.check import acceptance_file, check_file

MOST_AT_A_TIME = 1024
RESPONSES = Path("~/.cache/mtpd/responses")
RunArgument = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory of mtpd distill.")]
MaxDrop = Annotated[
    float,
    typer.Option(
        "--max-drop", help="The largest loss that passes: 0.01 is one point of CAR_1, and one percent of tau."
    ),
]
MaxDropWorst = Annotated[
    float | None,
    typer.Option(
        "--max-drop-worst",
        help="The largest loss of tau that passes in each slice (see --by), all of them tested together: 0.05 is five "
        "percent.",
        show_default=False,
    ),
]
By = Annotated[
    str | None,
    typer.Option(
        help="Also show slices: suite, family, mode, language, position (in the response) or context, with commas "
        "between them. The gate on slices looks at these, or at all.",
        show_default=False,
    ),
]
MarkdownFile = Annotated[
    Path | None,
    typer.Option("--markdown", help="Also write the result to this Markdown file, as a comment for a pull request."),
]
JunitFile = Annotated[
    Path | None, typer.Option("--junit", help="Also write the result to this JUnit XML file, for a CI system.")
]
Guard = Annotated[
    Literal["heads", "together", "both"],
    typer.Option(
        "--guard", help="What must not get worse: the heads (CAR_1, tau), heads and look-up together, or both."
    ),
]


def evaluate(
    context: typer.Context,
    run: RunArgument,
    suite: Annotated[
        str | None,
        typer.Option(
            help="Names of suites (sets of prompts), with commas between them. Default: those of --against, else demo."
        ),
    ] = None,
    suite_dir: Annotated[
        Path | None,
        typer.Option(help="A folder with your own suites: NAME.yaml, or prompts in NAME.jsonl. It goes first."),
    ] = None,
    mode: Annotated[
        Literal["offline", "decoded"] | None,
        typer.Option(
            help="offline: compare the drafts with a text that the model has written. decoded: decode with the heads, "
            "and measure speed too. Default: that of --against, else offline."
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="The file to write. Default: evaluation.json in the run directory, or evaluation-NAME.json for "
            "another --model.",
        ),
    ] = None,
    heads: Annotated[
        str, typer.Option(help="Which heads of the run to measure, by their folder, such as heads-before.")
    ] = "heads",
    drafts: Annotated[
        int | None, typer.Option(min=1, help="How many tokens are drafted at a time. Default: one for each head.")
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Prompts of each suite, at most. Default: as in --against, else the suite's own."),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens of a response, at most. Default: as in --against, else the suite's own."),
    ] = None,
    responses: Annotated[
        Path, typer.Option(help="The folder in which the model's responses are kept for later calls.")
    ] = RESPONSES,
    against: Annotated[
        Path | None,
        typer.Option(help="Compare with an earlier result on the same prompts: a file that mtpd eval wrote, or a run."),
    ] = None,
    max_drop: MaxDrop = 0.01,
    guard: Guard = "both",
    max_drop_worst: MaxDropWorst = None,
    by: By = None,
    min_tau: Annotated[
        float | None,
        typer.Option(
            "--min-tau",
            help="Fail below this tau, without a baseline too: of all suites together, and of each slice of --by.",
            show_default=False,
        ),
    ] = None,
    history: Annotated[
        Path | None,
        typer.Option(
            help="A folder of earlier results, named so that they sort: --markdown shows tau over them.",
            show_default=False,
        ),
    ] = None,
    write_baseline: Annotated[
        Path | None,
        typer.Option(help="Also write the result to this file, if the comparison passes or there is none."),
    ] = None,
    check_trunk: Annotated[
        bool,
        typer.Option(
            "--check-trunk",
            help="Also measure whether the run changed the model itself: perplexity, and exact match "
            "where a suite has answers.",
        ),
    ] = False,
    markdown: MarkdownFile = None,
    junit: JunitFile = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Another model under the same heads, such as a fine-tuned one or the directory of an adapter: says "
            "what it costs them, slice by slice, beside the run's own measurement. Default: the run's own.",
            show_default=False,
        ),
    ] = None,
    server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Measure what a running server (vLLM, llama.cpp, SGLang) accepts, which has the exported heads. "
            "Nothing is loaded here.",
            show_default=False,
        ),
    ] = None,
    plain_server: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="With --server: one of the same model without drafts, to compare texts and speed with.",
            show_default=False,
        ),
    ] = None,
    concurrency: Annotated[
        str, typer.Option(help="With --server: requests at a time, with commas for several; counts are of the first.")
    ] = "1",
    untrusted: Annotated[
        bool,
        typer.Option(
            "--untrusted",
            help="For a run or suites from somebody else: do not run Python code of the model, and refuse paths that "
            "lead out of the folder of suites.",
        ),
    ] = False,
    debug: Debug = False,
) -> None:
    """Measure how many drafts of a run's heads are accepted.

    Exit codes: 0 fine, 3 worse than the baseline, 4 undecided (more prompts needed), 2 a mistake, 1 a failure.

    Examples:

        mtpd eval runs/demo --suite demo -o acceptance.json

        mtpd eval runs/demo --suite gsm8k,humaneval --suite-dir suites --write-baseline baselines/main.json

        mtpd eval runs/demo --against baselines/main.json --max-drop 0.01 --max-drop-worst 0.05

        mtpd eval runs/demo --by family,position --min-tau 1.3

        mtpd eval runs/demo --model ./fine-tuned --against runs/demo

        mtpd eval runs/demo --server http://localhost:8000 --concurrency 1,8,32
    """
    from mtpd.evaluate.compare import Asked  # these take a moment that --help has no need of
    from mtpd.evaluate.slices import check_axes
    from mtpd.evaluate.suites import check_names
    from mtpd.run.request import Request, check_request

    at_a_time = _concurrency(server, plain_server, concurrency, mode=mode, model=model)
    names = None if suite is None else [name.strip() for name in suite.split(",") if name.strip()]
    for option, file in (("--output", output), ("--markdown", markdown), ("--junit", junit)):
        check_file(file, key=option)
    check_file(write_baseline, key="--write-baseline")
    check_finished(run, heads=heads)
    if against is not None:
        against = acceptance_file(against, name="evaluation-decoded.json" if mode == "decoded" else "evaluation.json")
    check_names(names, suite_dir, against=against)
    request = Request(
        run=run,
        suites=names,
        suite_dir=suite_dir,
        mode="served" if server is not None else mode,
        output=output,
        heads=heads,
        drafts=drafts,
        limit=limit,
        max_new_tokens=max_new_tokens,
        responses=responses.expanduser(),
        against=against,
        asked=Asked(max_drop, guard, max_drop_worst, check_axes(by), min_tau),
        history=history,
        write_baseline=write_baseline,
        check_trunk=check_trunk,
        markdown=markdown,
        junit=junit,
        untrusted=untrusted,
        model=model,
    )
    check_request(request, request.baseline())
    with quiet_libraries(debug=debug or bool(context.find_root().params.get("debug"))):
        if server is not None:
            from mtpd.run.evaluate_served import evaluate_server  # these bring in torch

            code = evaluate_server(request, server, plain=plain_server, concurrency=at_a_time)
        else:
            from mtpd.run.evaluate import evaluate_run

            with keeping(KEPT_RESPONSES):
                code = evaluate_run(request)
    if code:
        raise typer.Exit(code)


def _concurrency(
    server: str | None, plain: str | None, concurrency: str, *, mode: str | None, model: str | None
) -> list[int]:
    """Requests at a time.

    Raises:
        UserError: a value that is not accepted, or options that do not go together.
    """
    for option, url in (("--server", server), ("--plain-server", plain)):
        if url is not None and not url.startswith(("http://", "https://")):
            raise UserError(f"{option}: {url} is not accepted; accepted: an address such as http://localhost:8000")
    if server is None and plain is not None:
        raise UserError("--plain-server: goes with --server; accepted: both, or --server alone")
    if server is not None and (mode is not None or model is not None):
        option, value = ("--mode", mode) if mode is not None else ("--model", model)
        raise UserError(f"{option}: {value} is not accepted with --server, which decodes itself")
    words = [word.strip() for word in concurrency.split(",")]
    if not all(word.isdecimal() and 1 <= int(word) <= MOST_AT_A_TIME for word in words):
        raise UserError(
            f"--concurrency: {concurrency} is not accepted; accepted: numbers up to {MOST_AT_A_TIME}, such as 1,8,32"
        )
    return [int(word) for word in words]
