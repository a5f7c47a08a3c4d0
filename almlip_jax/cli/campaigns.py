"""Commands for campaigns: ``run``, ``resume``, ``status``, ``report``."""

from __future__ import annotations

import functools
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from almlip_jax.cli.options import ConfigFile, JsonFile, RunFolder, SetOption
from almlip_jax.cli.output import complain, print_pairs, show, write_result
from almlip_jax.cli.program import app
from almlip_jax.errors import InputError
from almlip_jax.interrupts import exit_status
from almlip_jax.places import folder_to_write
from almlip_jax.unit_names import with_unit

if TYPE_CHECKING:
    from almlip_jax.campaign.config import ExperimentConfig
    from almlip_jax.campaign.loop import Outcome


@app.command()
def run(
    config: ConfigFile,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", callback=folder_to_write, help="Run directory; runs/NAME by default."),
    ] = None,
    overrides: SetOption = None,
    json_file: JsonFile = None,
) -> None:
    """Run a whole campaign: label, train, explore, select, and again, until a stopping rule holds."""
    from almlip_jax.campaign import run_campaign
    from almlip_jax.campaign.config import load_config

    settings = load_config(config, overrides or [])
    folder = run_dir or Path("runs") / settings.name
    if (folder / "state.json").exists():
        raise InputError(f"{folder} holds a campaign already; go on with `almlip resume {folder}`, or choose another.")
    _campaign(settings, folder, json_file, run_campaign)


@app.command()
def resume(
    run_dir: RunFolder,
    overrides: SetOption = None,
    accept_changes: Annotated[
        bool, typer.Option("--accept-changes", help="Go on even with another label source or files edited by hand.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Go on with a campaign that was stopped or killed, or that ended and may now go further (--set)."""
    from almlip_jax.campaign import resume_campaign
    from almlip_jax.campaign.config import load_run_config

    if not (run_dir / "state.json").exists():
        raise InputError(f"{run_dir} holds no campaign to resume; begin one with `almlip run`.")
    work = functools.partial(resume_campaign, accept_changes=accept_changes)
    _campaign(load_run_config(run_dir, overrides or []), run_dir, json_file, work)


def _campaign(settings: ExperimentConfig, folder: Path, json_file: Path | None, work: Callable[..., Outcome]) -> None:
    from almlip_jax.compilation import prepare_jax
    from almlip_jax.progress import open_progress

    prepare_jax(settings.precision)
    try:
        with open_progress() as progress:
            outcome = work(settings, folder, progress=progress)
    except KeyboardInterrupt as stop:
        complain(f"interrupted; nothing is lost, go on with: {shlex.join(['almlip', 'resume', str(folder)])}")
        raise typer.Exit(exit_status(stop)) from None
    show_outcome(outcome, json_file)
    if not outcome.finished:
        raise typer.Exit(3)


def show_outcome(outcome: Outcome, json_file: Path | None) -> None:
    """Writes how a campaign ended."""
    rows = {
        "run directory": str(outcome.run_dir),
        "ended because of": outcome.rule or "-",
        "reason": outcome.reason,
        "converged": "yes" if outcome.converged else "no",
        "rounds": str(outcome.round),
        "labels": str(outcome.labels),
        "potential": str(outcome.potential) if outcome.potential else "-",
        "report": str(outcome.run_dir / "report.html"),
    }
    if outcome.costs:
        from almlip_jax.campaign.status import told_costs

        rows["cost"] = told_costs(outcome.costs)
    rows |= {name: with_unit(f"{value:.4g}", name) for name, value in outcome.errors.items() if "_rmse_" in name}
    print_pairs("Campaign", rows)
    fields = {name: getattr(outcome, name) for name in outcome.__dataclass_fields__}
    write_result(json_file, {name: str(v) if isinstance(v, Path) else v for name, v in fields.items()})


@app.command()
def status(run_dir: RunFolder, json_file: JsonFile = None) -> None:
    """Say where a campaign stands, whether it converges, and if not, what holds it back."""
    from almlip_jax.campaign.status import campaign_status, render_status

    standing = campaign_status(run_dir)
    show(render_status(standing))
    write_result(json_file, standing)


@app.command()
def report(run_dir: RunFolder, json_file: JsonFile = None) -> None:
    """Write the report of a campaign, finished or not, as one HTML page."""
    from almlip_jax.campaign.report import write_report

    path = write_report(run_dir)
    print_pairs("Report", {"written": str(path)})
    write_result(json_file, {"report": str(path)})
