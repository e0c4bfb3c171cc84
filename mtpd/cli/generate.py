"""`mtpd generate`: one prompt, and the text with what the heads contributed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mtpd.cli.options import Debug, UntrustedRun
from mtpd.cli.terminal import quiet_libraries
from mtpd.errors import UserError
from mtpd.run.check import check_finished

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory that `mtpd distill` has finished.")]
Prompt = Annotated[str | None, typer.Option("--prompt", help="The prompt; without it, standard input is read.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to write at most.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy; more draws at random.")]
TopP = Annotated[float, typer.Option("--top-p", min=0.0, max=1.0, help="Draw from the likeliest tokens of this mass.")]
Depth = Annotated[
    int | None,
    typer.Option(
        "--depth",
        help="Drafts a round; by default what `mtpd bench --tune` found, else what was fastest in the run "
        "(depths.json, evaluation.decode_depth), else all heads.",
    ),
]
Tree = Annotated[
    int | None,
    typer.Option("--tree", min=0, help="Draft a tree of so many tokens, for heads that draft independently; 0: none."),
]
Lookup = Annotated[
    bool | None,
    typer.Option(
        "--lookup/--no-lookup",
        help="Heads and look-up draft together: what followed the newest tokens when they last stood in the text.",
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Number format; by default that of the run.", show_default=False),
]
Seed = Annotated[int, typer.Option("--seed", help="Of the random draws.")]


def generate(
    run: Run,
    prompt: Prompt = None,
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    depth: Depth = None,
    tree: Tree = None,
    lookup: Lookup = None,
    dtype: Dtype = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template.")] = False,
    untrusted: UntrustedRun = False,
    debug: Debug = False,
) -> None:
    """Answer one prompt with a run's heads: accepted drafts are green, the model's own tokens are not.

    Example:

        mtpd generate runs/demo --prompt "Name three rivers."
    """
    check_finished(run)
    text = prompt if prompt is not None else sys.stdin.read()
    if not text.strip():
        raise UserError("prompt: it is empty; pass --prompt TEXT, or text on standard input")
    with quiet_libraries(debug=debug):
        from mtpd.decode.stream_text import Session, settings  # brings in torch
        from mtpd.run.loading import load

        model = load(run, dtype=dtype, depth=depth, tree=tree, lookup=lookup, untrusted=untrusted)
        session = Session(model, settings(temperature, top_p, seed))
        ids = session.prompt(text, raw=raw)
        session.warm_up()
        began = time.perf_counter()
        written = session.write(ids, max_new_tokens, show=_show)
        typer.echo()
        typer.echo(summary(written, session.model.depth, time.perf_counter() - began), err=True)


def _show(piece: str, accepted: bool) -> None:
    typer.secho(piece, nl=False, fg=typer.colors.GREEN if accepted else None)
    sys.stdout.flush()


def summary(text: Any, depth: int, seconds: float) -> str:
    """What one text cost."""
    forwards = 1 + len(text.rounds)
    rate = f"{len(text.tokens) / seconds:.1f} tokens/s"
    return (
        f"{len(text.tokens)} tokens in {forwards} passes of the model (tau {len(text.tokens) / forwards:.2f}, "
        f"up to {depth} drafts a round), {rate}"
    )
