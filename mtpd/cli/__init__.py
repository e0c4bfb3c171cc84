"""The command line. Each command is a file here; this one joins them."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer

from mtpd.cli import (
    bench,
    chat,
    compare,
    data,
    distill,
    eval,
    export,
    extend,
    generate,
    graft,
    history,
    import_,
    inspect,
    pretrain,
    recipe,
    report,
    verify,
)
from mtpd.cli.errors import report as report_error
from mtpd.cli.errors import say
from mtpd.cli.kept import take_kept
from mtpd.cli.options import Debug
from mtpd.interrupts import INTERRUPTED, TERMINATED, Terminated, terminable

app = typer.Typer(
    name="mtpd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("distill")(distill.distill)
app.command("extend")(extend.extend)
app.command("pretrain")(pretrain.pretrain)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("bench")(bench.bench)
app.command("eval")(eval.evaluate)
app.command("compare")(compare.compare)
app.command("report")(report.report)
app.command("history")(history.history)
app.command("import")(import_.import_heads)
app.command("export")(export.export)
app.command("verify")(verify.verify)
app.command("inspect")(inspect.inspect)
app.command("graft")(graft.graft)
app.add_typer(data.app, name="data")
app.add_typer(recipe.app, name="recipe")


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"mtpd {version('mtpd')}")
        except PackageNotFoundError:
            typer.echo("mtpd (not installed)")
        raise typer.Exit


@app.callback()
def _root(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Multi-token-prediction heads for any Hugging Face causal language model, by self-distillation.

    Example:

        mtpd distill demo
    """


def _speaks() -> bool:
    """Whether this process tells the user how a command ended; of several ranks, one does."""
    ranks = sys.modules.get("mtpd.parallel.ranks")  # brings in torch
    return ranks is None or bool(ranks.speaks())


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and gives back its exit code.

    0, 1 for a failure, 2 for a user's mistake, 130 for Ctrl-C and 143 for SIGTERM, as shells and schedulers know them.

    Args:
        arguments: the words after `mtpd`; None takes them from the process.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    take_kept()
    try:
        # Not standalone: errors come here instead of being printed by Typer.
        with terminable():
            code = typer.main.get_command(app).main(words, prog_name="mtpd", standalone_mode=False)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Terminated:
        code = TERMINATED
    except Exception as error:
        if "--debug" in words:
            traceback.print_exc()
        return report_error(error, words)
    kept = take_kept()
    if code in (INTERRUPTED, TERMINATED) and _speaks():
        ended = "interrupted" if code == INTERRUPTED else "terminated"
        say("; ".join([ended, *([kept] if kept else [])]))
    return code or 0
