"""The command line: reads arguments, prints tables or JSON, and draws pictures."""

from __future__ import annotations

import sys
import warnings
from typing import Annotated

import typer

from simfluence._version import __version__
from simfluence.cli import attribution, fitting, queries, recording
from simfluence.cli.text import complain, say
from simfluence.errors import SimfluenceError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Simulate training runs: what would the losses have been under another curriculum?",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> bool:
    if wanted:
        say(f"simfluence {__version__}")
        raise typer.Exit
    return wanted


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass  # the option's callback does the work


runs_app = typer.Typer(help="Inspect a run store.", no_args_is_help=True)
app.add_typer(runs_app, name="runs")

for _command in (
    fitting.demo,
    recording.record,
    fitting.fit,
    fitting.evaluate,
    fitting.tune,
    fitting.learning_curve,
    queries.what_if,
    queries.leave_one_out,
    queries.removal,
    attribution.attribute,
    attribution.lds,
):
    app.command(_command.__name__.replace("_", "-"))(_command)
runs_app.command("ls")(recording.runs_ls)
runs_app.command("show")(recording.runs_show)


def main() -> None:
    """Run the command line; print an error of simfluence as one line and exit with code 1."""
    warnings.showwarning = lambda message, *_: complain(f"warning: {message}")
    try:
        app()
    except SimfluenceError as error:
        complain(f"error: {error}")
        sys.exit(1)
