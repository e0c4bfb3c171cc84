"""`mtpd generate`: one prompt, and the text with what the heads contributed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mtpd.cli.options import Debug, UntrustedRun
from mtpd.cli.terminal import quiet_libraries
from mtpd.data.rows.prompt import Prompt
from mtpd.decode.drafting import ALL_SOURCES, SOURCES
from mtpd.errors import UserError
from mtpd.finished_run import RECIPE
from mtpd.recipe import load_recipe
from mtpd.run.check import check_finished

if TYPE_CHECKING:
    from mtpd.decode.model import Model

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run directory that `mtpd distill` has finished.")]
Text = Annotated[str | None, typer.Option("--prompt", help="The prompt; without it, standard input is read.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to write at most.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy; more draws at random.")]
TopP = Annotated[
    float,
    typer.Option("--top-p", min=0.0, max=1.0, help="Draw from the likeliest tokens that make up this probability."),
]
Sources = Annotated[
    str,
    typer.Option(
        "--sources",
        help="What drafts, separated by commas: heads, lookup (what followed the newest tokens when they last stood in "
        "the text), corpus (the same in the responses trained on, if the run has their index: data.corpus_mb). As much "
        "in each round as pays on this machine.",
    ),
]
Depth = Annotated[
    int | None,
    typer.Option(
        "--depth", min=1, help="Draft a chain of so many heads in every round, and nothing else.", show_default=False
    ),
]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"] | None,
    typer.Option("--dtype", help="Number format of the model; by default that of the run.", show_default=False),
]
Seed = Annotated[int, typer.Option("--seed", help="Seed of random draws; the same seed writes the same text.")]
COLOURS = {"heads": typer.colors.GREEN, "lookup": typer.colors.CYAN, "corpus": typer.colors.YELLOW}
"""Of accepted drafts by their source."""


def drafting_of(sources: str, depth: int | None) -> dict[str, Any]:
    """Turn options into fields of `mtpd.decode.drafting.Drafting`.

    Raises:
        UserError: a source that there is not.
    """
    names = [name.strip() for name in sources.split(",") if name.strip()]
    unknown = [name for name in names if name not in SOURCES]
    if unknown or not names:
        raise UserError(f"--sources: {', '.join(unknown) or 'nothing'} is not accepted; accepted: {', '.join(SOURCES)}")
    return {"sources": names, "depth": depth}


def generate(
    run: Run,
    prompt: Text = None,
    max_new_tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    sources: Sources = ALL_SOURCES,
    depth: Depth = None,
    dtype: Dtype = None,
    raw: Annotated[bool, typer.Option("--raw", help="Take the prompt as it is, without the chat template.")] = False,
    untrusted: UntrustedRun = False,
    debug: Debug = False,
) -> None:
    """Answer one prompt. Accepted drafts are green (heads), cyan (look-up) or yellow (corpus), the rest has no colour.

    Example:

        mtpd generate runs/demo --prompt "Name three rivers."
    """
    check_finished(run)
    drafting = drafting_of(sources, depth)
    text = prompt if prompt is not None else sys.stdin.read()
    if not text.strip():
        raise UserError("prompt: it is empty; pass --prompt TEXT, or text on standard input")
    with quiet_libraries(debug=debug):
        from mtpd.decode.stream_text import Session, settings  # brings in torch
        from mtpd.run.loading import load

        model = load(run, dtype=dtype, drafting=drafting, untrusted=untrusted)
        session = Session(model, settings(temperature, top_p, seed))
        ids = token_ids(model, run, text if raw else [{"role": "user", "content": text}])
        session.warm_up()
        began = time.perf_counter()
        written = session.write(ids, max_new_tokens, show=show)
        typer.echo()
        typer.echo(summary(written, time.perf_counter() - began), err=True)


def token_ids(model: Model, run: Path, said: str | list[dict[str, Any]]) -> list[int]:
    """Token ids of a text, or of messages, up to where the model answers; as the run's own prompts are read.

    Raises:
        UserError: the model has no chat template for a conversation, or it refuses the messages.
    """
    from mtpd.data.rendering import render  # brings in torch

    data = load_recipe(run / RECIPE).data
    escape = data.special_tokens_in_text == "escape"
    return render(model.tokenizer, Prompt("said", said, template=data.chat_template_kwargs, escape=escape))


def show(piece: str, source: str | None) -> None:
    """Write a piece of text in the colour of its source."""
    typer.secho(piece, nl=False, fg=None if source is None else COLOURS[source])
    sys.stdout.flush()


def summary(text: Any, seconds: float) -> str:
    """Sums up tokens, passes, accepted drafts and speed of one text."""
    counts = text.counts(0)
    drafted = [f"{sum(each)} from {source}" for source, each in counts.sources.items()]
    return (
        f"{counts.tokens} tokens in {counts.forwards} passes of the model (tau {counts.tau:.2f}); drafts accepted: "
        f"{', '.join(drafted) or 'none'}; {counts.tokens / seconds:.1f} tokens/s"
    )
