"""The program ``almlip``: its commands in one, and errors as sentences.

Errors are one sentence on standard error and exit status 1; an interrupted run says how to go on and exits with 130.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from almlip_jax import __version__
from almlip_jax.cli.output import complain
from almlip_jax.errors import CapacityError, InputError, LabelError
from almlip_jax.interrupts import exit_status, listening


class _Commands(TyperGroup):
    """Commands whose errors become sentences before click or typer handles them."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        with plain_warnings(), _one_sentence():
            return super().invoke(ctx)


app = typer.Typer(
    name="almlip",
    cls=_Commands,
    help="Active learning of machine-learned interatomic potentials.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"almlip {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show a traceback for errors.")] = False,
) -> None:
    if debug:
        os.environ["ALMLIP_DEBUG"] = "1"


@contextmanager
def _one_sentence() -> Iterator[None]:
    """Turns errors a user can act on into a sentence and exit status 1."""
    try:
        yield
    except BrokenPipeError:  # the reader closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (InputError, LabelError, CapacityError, OSError) as error:
        if os.environ.get("ALMLIP_DEBUG"):
            raise
        complain(f"almlip: {_of_system(error) if isinstance(error, OSError) else error}")
        sys.exit(1)
    except KeyboardInterrupt as stop:
        complain("almlip: interrupted")
        sys.exit(exit_status(stop))


@contextmanager
def plain_warnings() -> Iterator[None]:
    """What this package warns of is told as a sentence, without the lines of its source that it comes from."""
    usual, here = warnings.formatwarning, str(Path(__file__).parents[1])

    def formatted(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        if category is UserWarning and filename.startswith(here):
            return f"almlip: {message}\n"
        return usual(message, category, filename, lineno, line)

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = usual


def _of_system(error: OSError) -> str:
    """What the system refused, as a sentence."""
    if error.strerror is None or error.filename is None:
        return str(error)
    return f"{error.filename} cannot be used ({error.strerror})."


def main() -> None:
    """The program ``almlip``, once it is imported; it starts in `almlip_jax.__main__`."""
    with listening(), _one_sentence():
        app()
