"""Commands for studies: ``sweep``, ``distil``, ``figure``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from almlip_jax.cli.options import ConfigFile, JsonFile, SetOption
from almlip_jax.cli.output import complain, print_pairs, rounded, say, show, write_result
from almlip_jax.cli.program import app
from almlip_jax.interrupts import exit_status
from almlip_jax.places import folder_to_write

if TYPE_CHECKING:
    from almlip_jax.distillation import Distilled


@app.command()
def sweep(
    config: ConfigFile,
    out: Annotated[
        Path | None,
        typer.Option("--out", callback=folder_to_write, help="Folder of the sweep; that of the config by default."),
    ] = None,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="Points to run, as system=..,selector=..,seed=..; repeatable.")
    ] = None,
    overrides: SetOption = None,
    json_file: JsonFile = None,
) -> None:
    """Compare selectors on labelled pools; the same command goes on after an interruption."""
    from almlip_jax.compilation import prepare_jax
    from almlip_jax.config import load_settings
    from almlip_jax.progress import open_progress
    from almlip_jax.sweep import SweepConfig, parse_only, render_result, run_sweep

    settings = load_settings(SweepConfig, config, overrides or []).based(config.resolve().parent)
    prepare_jax(settings.precision)
    folder = out or settings.out or Path("runs") / config.stem
    wanted = parse_only(only or [], settings)
    try:
        with open_progress() as progress:
            result = run_sweep(settings, folder, only=wanted, progress=progress)
    except KeyboardInterrupt as stop:
        complain("interrupted; nothing is lost, the same command goes on.")
        raise typer.Exit(exit_status(stop)) from None
    show(render_result(result))
    write_result(json_file, result.summary())


@app.command()
def distil(
    config: ConfigFile,
    out: Annotated[Path, typer.Option("--out", callback=folder_to_write, help="Folder of student and results.")],
    overrides: SetOption = None,
    json_file: JsonFile = None,
) -> None:
    """Train a student on what a teacher says, and compare both; the same command goes on after an interruption."""
    from almlip_jax.compilation import prepare_jax
    from almlip_jax.config import load_settings
    from almlip_jax.distillation import DistilConfig, run_distillation
    from almlip_jax.oracles import PendingLabels
    from almlip_jax.progress import open_progress

    settings = load_settings(DistilConfig, config, overrides or [])
    prepare_jax(settings.precision)
    try:
        with open_progress() as progress:
            result = run_distillation(settings, out, progress=progress)
    except PendingLabels as pending:
        complain(str(pending))
        raise typer.Exit(3) from None
    except KeyboardInterrupt as stop:
        complain("interrupted; nothing is lost, the same command goes on.")
        raise typer.Exit(exit_status(stop)) from None
    _show_distilled(result)
    write_result(json_file, result.summary())
    if not result.finished:
        raise typer.Exit(3)


def _show_distilled(result: Distilled) -> None:
    from almlip_jax.evaluation.tables import rows_of_errors

    rows = {"folder": str(result.out), "calls of the teacher": str(result.calls)}
    if not result.finished:
        print_pairs("Distillation", rows | {"waits": result.reason})
        return
    named = {
        f"{group}: {which.replace('_', ' ')}": values
        for group, several in result.errors.items()
        for which, values in several.items()
    }
    show(rows_of_errors(named, "Student and teacher", "group: compared"))
    if result.times is not None:
        took = result.times
        rows["teacher"] = f"{rounded(took.teacher)} s a structure, threads {took.teacher_cores}"
        rows["student"] = f"{rounded(took.student)} s a structure, cores {took.student_cores}"
        rows["student is faster"] = f"{rounded(took.times_faster)} times, each on one core"
    print_pairs("Distillation", {"potential": str(result.out / "potential"), **rows})


@app.command()
def figure(
    name: Annotated[str, typer.Argument(help="Name of a figure, `tables`, or `all`.")],
    tables: Annotated[list[Path], typer.Argument(help="CSV tables of a sweep; for `training`, training.csv files.")],
    out: Annotated[Path, typer.Option("--out", callback=folder_to_write, help="Folder to write into.")],
    quantity: Annotated[str, typer.Option(help="Error that selectors are compared by.")] = "forces_rmse",
    baseline: Annotated[str, typer.Option(help="Selector that the others are compared with.")] = "random",
    json_file: JsonFile = None,
) -> None:
    """Draw the figures, and write the tables, of a comparison of selectors."""
    from almlip_jax.figures.command import make

    study = make(name, tables, out, quantity, baseline)
    print_pairs("Study", {path: "written" for path in study["written"]} | study["skipped"])
    for note in study["notes"]:
        say(note)
    write_result(json_file, study)
