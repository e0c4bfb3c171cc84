"""`mtpd bench`: how fast a run's heads decode here."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from mtpd.cli.generate import Depth, Dtype, Run, Sources, drafting_of
from mtpd.cli.options import Debug, UntrustedRun
from mtpd.cli.terminal import quiet_libraries
from mtpd.data.sources import check_source
from mtpd.decode.drafting import ALL_SOURCES
from mtpd.errors import UserError
from mtpd.finished_run import RECIPE
from mtpd.recipe import load_recipe
from mtpd.run.check import check_finished, row_format

WAYS = ("plain", "engine", "lookup", "own-lookup", "chain", "heads", "assistant", "transformers")


def bench(
    run: Run,
    suite: Annotated[
        str, typer.Option("--suite", help="demo (held-out built-in prompts), a .jsonl file, or a datasets id.")
    ] = "demo",
    against: Annotated[
        str,
        typer.Option(
            "--against",
            help="Ways to compare with, separated by commas. Of transformers: plain (generate), lookup (its prompt "
            "look-up), assistant (a smaller model drafts), transformers (the same heads). Of this package: engine (no "
            "drafts; always measured), own-lookup, chain (all heads in every round), heads.",
        ),
    ] = "plain",
    assistant: Annotated[
        str | None,
        typer.Option("--assistant", help="Model that drafts for --against assistant: a directory or a hub name."),
    ] = None,
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Prompts of the suite, at most.")] = 6,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens of each text, at most.")] = 128,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts decoded at a time.")] = 1,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Times each way is measured; medians are shown.")] = 3,
    sources: Sources = ALL_SOURCES,
    depth: Depth = None,
    dtype: Dtype = None,
    tune: Annotated[
        bool,
        typer.Option("--tune", help="First measure this machine's times anew; they decide how much is drafted."),
    ] = False,
    untrusted: UntrustedRun = False,
    debug: Debug = False,
) -> None:
    """Measure tokens/s of a run against other ways of decoding, greedy, in one process.

    One prompt at a time, chains of every length are measured too, and kept in the run for its report.

    Example:

        mtpd bench runs/demo --against plain,own-lookup,heads
    """
    check_finished(run)
    ways = ["mtpd", *[way.strip() for way in against.split(",") if way.strip()]]
    unknown = [way for way in ways[1:] if way not in WAYS]
    if unknown:
        raise UserError(f"--against: {', '.join(unknown)} is not accepted; accepted: {', '.join(WAYS)}")
    if ("assistant" in ways) != (assistant is not None):
        raise UserError("--assistant: goes with --against assistant; accepted: both or neither")
    drafting = drafting_of(sources, depth)
    if suite != "demo":
        check_source(suite, key="--suite")
    with quiet_libraries(debug=debug):
        from mtpd.data.models import load_model
        from mtpd.data.prompts import load_prompts  # these bring in torch
        from mtpd.data.rendering import render_all
        from mtpd.data.responses import end_tokens
        from mtpd.data.rows.left_out import LeftOut
        from mtpd.decode.speed import PARTS, breakdown, compare
        from mtpd.evaluate.acceptance import RANDOM
        from mtpd.evaluate.compare import console
        from mtpd.evaluate.depths import depths_pay_table
        from mtpd.evaluate.trunk_quality import at_chance
        from mtpd.run.depths import depths_of_run
        from mtpd.run.loading import load

        # A speed-up over generate counts its slower loop in, so that of the drafts alone stands beside it.
        ways = [*dict.fromkeys([*ways, "engine"])]
        model = load(run, dtype=dtype, drafting=drafting, untrusted=untrusted)
        ends = end_tokens(model.trunk.model, model.tokenizer)
        form = row_format(load_recipe(run / RECIPE).data, columns=False)
        chosen = load_prompts("builtin-held-out" if suite == "demo" else suite, form=form)
        # Every so many: neighbours are often of one kind.
        chosen = chosen[:: max(1, len(chosen) // prompts)][:prompts]
        room = model.trunk.context - max_new_tokens
        left_out = LeftOut()
        texts = [ids for _, ids in render_all(model.tokenizer, chosen, left_out) if 0 < len(ids) <= room]
        left_out.check(len(chosen), source=f"--suite: {suite}")
        costs = model.measure_costs() if tune else model.costs
        smaller = None
        if assistant is not None:
            smaller, _ = load_model(assistant, dtype=dtype or "auto", device=str(model.device))
        speeds = compare(
            model,
            texts,
            ways=ways,
            max_new_tokens=max_new_tokens,
            end_tokens=ends,
            batch=batch,
            runs=runs,
            assistant=smaller,
        )
        parts = breakdown(model, texts[:2], batch=batch)
        by_depth = None
        if batch == 1:
            by_depth = depths_of_run(run, model, texts, end_tokens=ends, max_new_tokens=max_new_tokens, runs=runs)
        passes = ", ".join(f"{1000 * costs.of_pass(size):.1f}" for size in (1, 8, 32))
        typer.echo(
            f"{len(texts)} prompts of {suite}, {batch} at a time, {model.trunk.dtype}; {described(model)}\n"
            f"a pass over 1, 8 and 32 tokens takes {passes} ms, a head {1000 * costs.head:.1f} ms"
        )
        for line in lines(speeds):
            typer.echo(line)
        if at_chance(model.trunk, texts):
            typer.echo(RANDOM)
        shares = ", ".join(f"{part} {100 * parts.share(part):.0f}%" for part in PARTS)
        typer.echo(f"a round: {1000 * sum(parts.seconds.values()) / parts.rounds:.1f} ms ({shares})")
        if by_depth is not None:
            console().print(depths_pay_table(by_depth))


def described(model: Any) -> str:
    """Says in words what drafts."""
    return f"a chain of {model.depth} in every round" if model.depth else f"drafts of {' and '.join(model.sources)}"


def lines(speeds: dict[str, Any]) -> list[str]:
    """The table of a comparison, one line a way, each named by what it is."""
    from mtpd.decode.speed import WAYS  # brings in torch

    ours = speeds["mtpd"]
    shown = []
    for way, speed in speeds.items():
        tau = f", tau {speed.tau:.2f}" if speed.tau else ""
        same = sum(a == b for a, b in zip(ours.texts, speed.texts, strict=True))
        ratio = (
            ""
            if way == "mtpd"
            else f", mtpd is {ours.against(speed):.2f}x as fast, {same} of {len(ours.texts)} texts the same"
        )
        shown.append(f"{way}: {speed.rate:.1f} tokens/s, {WAYS[way]}{tau}{ratio}")
    return shown
