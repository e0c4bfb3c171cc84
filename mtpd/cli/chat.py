"""`mtpd chat`: a conversation in the terminal."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from mtpd.cli.generate import (
    Depth,
    Dtype,
    Run,
    Seed,
    Sources,
    Temperature,
    Tokens,
    TopP,
    drafting_of,
    show,
    summary,
    token_ids,
)
from mtpd.cli.options import Debug, UntrustedRun
from mtpd.cli.terminal import quiet_libraries
from mtpd.decode.drafting import ALL_SOURCES
from mtpd.run.check import check_finished


def chat(
    run: Run,
    max_new_tokens: Tokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    sources: Sources = ALL_SOURCES,
    depth: Depth = None,
    dtype: Dtype = None,
    system: Annotated[str | None, typer.Option("--system", help="What the model is told before the talk.")] = None,
    untrusted: UntrustedRun = False,
    debug: Debug = False,
) -> None:
    """Talk with a run's model, through its chat template. An empty line or Ctrl-D ends the talk.

    Accepted drafts are green (heads), cyan (look-up) or yellow (corpus); the others have no colour.

    Example:

        mtpd chat runs/demo
    """
    check_finished(run)
    drafting = drafting_of(sources, depth)
    with quiet_libraries(debug=debug):
        from mtpd.decode.stream_text import Session, settings  # brings in torch
        from mtpd.run.loading import load

        model = load(run, dtype=dtype, drafting=drafting, untrusted=untrusted)
        session = Session(model, settings(temperature, top_p, seed))
        messages = [{"role": "system", "content": system}] if system else []
        session.warm_up()
        while line := _ask():
            messages.append({"role": "user", "content": line})
            began = time.perf_counter()
            pieces: list[str] = []

            def take(piece: str, source: str | None, pieces: list[str] = pieces) -> None:
                pieces.append(piece)
                show(piece, source)

            text = session.write(token_ids(model, run, messages), max_new_tokens, show=take)
            typer.echo()
            typer.secho(summary(text, time.perf_counter() - began), err=True, dim=True)
            messages.append({"role": "assistant", "content": "".join(pieces)})


def _ask() -> str:
    try:
        return input("> ").strip()
    except EOFError:
        return ""
