"""Commands that run dynamics with a potential: ``explore``, ``md``, ``lammps``, and ``free-energy``."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from almlip_jax.cli.inputs import load_folder, load_potential
from almlip_jax.cli.options import (
    ConfigFile,
    FigureFile,
    JsonFile,
    PotentialFolder,
    RunOption,
    SetOption,
    frames_to_add_to,
)
from almlip_jax.cli.output import complain, print_pairs, rounded, show, write_result
from almlip_jax.cli.program import app
from almlip_jax.errors import InputError
from almlip_jax.interrupts import exit_status
from almlip_jax.places import file_to_write
from almlip_jax.unit_names import with_unit

if TYPE_CHECKING:
    from almlip_jax.potential import Potential
    from almlip_jax.progress import Progress
    from almlip_jax.simulation.settings import SimulationConfig

AnySimulation = TypeVar("AnySimulation", bound="SimulationConfig")


@app.command()
def explore(config: ConfigFile, out: RunOption = None, overrides: SetOption = None, json_file: JsonFile = None) -> None:
    """Explore with a trained potential under a gate; the same command goes on after an interruption."""
    from almlip_jax.simulation import ExploreConfig, run_exploration

    _simulate(ExploreConfig, run_exploration, "explore", config, out, overrides, json_file)


@app.command()
def md(config: ConfigFile, out: RunOption = None, overrides: SetOption = None, json_file: JsonFile = None) -> None:
    """Run production dynamics with a trained potential; the same command goes on after an interruption."""
    from almlip_jax.simulation import MdConfig, run_md

    _simulate(MdConfig, run_md, "md", config, out, overrides, json_file)


def _simulate(
    kind: type[AnySimulation],
    work: Callable[[AnySimulation, Path, Potential, Progress], dict[str, Any]],
    command: str,
    config: Path,
    out: Path | None,
    overrides: list[str] | None,
    json_file: Path | None,
) -> None:
    from almlip_jax.config import load_settings
    from almlip_jax.progress import open_progress
    from almlip_jax.simulation.summary import failure, render_summary

    settings = load_settings(kind, config, overrides or [])
    folder = out or settings.out or Path("runs") / config.stem
    potential = load_potential(settings.potential, settings.types)
    try:
        with open_progress() as progress:
            summary = work(settings, folder, potential, progress)
    except KeyboardInterrupt as stop:
        again = ["almlip", command, str(config), *(["--out", str(out)] if out else [])]
        again += [part for override in overrides or [] for part in ("--set", override)]
        complain(f"interrupted; go on with: {shlex.join(again)}")
        raise typer.Exit(exit_status(stop)) from None
    show(render_summary(summary))
    write_result(json_file, summary)
    failed = failure(summary)
    if failed is not None:
        raise InputError(failed)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lammps(
    context: typer.Context,
    potential: PotentialFolder,
    script: Annotated[Path, typer.Argument(help="Input script of LAMMPS.")],
    elements: Annotated[
        str | None, typer.Option("--elements", help="Element of each type of atoms, from type 1 on, as Si,O.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--record", callback=frames_to_add_to, help="File for uncertain frames (extxyz).")
    ] = None,
    above: Annotated[float | None, typer.Option("--above", help="Threshold of the score, in its unit.")] = None,
    score: Annotated[str, typer.Option("--score", help="Score that decides what is recorded.")] = "force_std_max",
    every: Annotated[int, typer.Option("--every", min=1, help="Least steps between recorded frames.")] = 1,
    append: Annotated[bool, typer.Option("--append", help="Go on in the file of --record, if it is there.")] = False,
    per_atom: Annotated[
        str, typer.Option("--per-atom", help="Results that become properties of atoms, as force_std,energies.")
    ] = "force_std",
    charge: Annotated[
        int | None,
        typer.Option("--charge", help="Charge of what the potential sees, e; that of its training data by default."),
    ] = None,
    spin: Annotated[int | None, typer.Option("--spin", min=1, help="Its multiplicity 2S+1, likewise.")] = None,
    skin: Annotated[float, typer.Option("--skin", min=0, help="Skin of the neighbour list, Angstrom.")] = 0.5,
    share: Annotated[
        bool | None,
        typer.Option("--share/--one-core", help="Share out the members among the cores, or do not; by their work."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Run an input script of LAMMPS with the potential behind its line `fix ID GROUP external pf/callback 1 1`.

    Further arguments are those of the program lmp, such as -log none or -var T 300.
    """
    from almlip_jax.scores import names, scores

    if (record is None) != (above is None):
        raise InputError("--record says where frames are written and --above which; give both or none.")
    if append and record is None:
        raise InputError("--append belongs to --record; leave it out.")
    if score not in names(scores()):
        raise InputError(f"--score {score} is no score of structures; give one of {', '.join(names(scores()))}.")
    model = load_folder(potential)
    from almlip_jax.interfaces.lammps import Coupling
    from almlip_jax.interfaces.lammps_script import run_script
    from almlip_jax.interfaces.recording import Recording

    coupling = Coupling(
        elements=None if elements is None else [symbol.strip() for symbol in elements.split(",")],
        per_atom=tuple(name for name in per_atom.split(",") if name),
        charge=charge,
        spin=spin,
        skin=skin,
        share=share,
    )
    recording = None if record is None or above is None else Recording(record, score, above, every, append)
    outcome = run_script(model, script, coupling=coupling, recording=recording, arguments=context.args)
    rows = {"evaluations": str(outcome.evaluations), "neighbour lists": str(outcome.lists)}
    rows |= {} if record is None else {"frames recorded": f"{outcome.recorded} in {record}"}
    rows |= {f"last {score}": with_unit(rounded(outcome.last[score]), score)} if score in outcome.last else {}
    print_pairs("LAMMPS with the potential", rows)
    told = {"evaluations": outcome.evaluations, "lists": outcome.lists, "recorded": outcome.recorded}
    write_result(json_file, {**told, "status": outcome.status, "last": dict(outcome.last)})
    if outcome.status != 0:
        raise typer.Exit(outcome.status)  # as lmp ends


@app.command(name="free-energy")
def free_energy(
    run: Annotated[Path, typer.Argument(help="Folder of a run with the bias `metadynamics`, running or finished.")],
    out: Annotated[Path, typer.Option("--out", callback=file_to_write, help="CSV file to write.")],
    bias: Annotated[
        int | None, typer.Option("--bias", min=0, help="Position of the metadynamics among the biases, from 0.")
    ] = None,
    points: Annotated[int | None, typer.Option("--points", min=2, max=5000, help="Points along each variable.")] = None,
    ranges: Annotated[
        list[str] | None, typer.Option("--range", help="First and last value, as 1.0,2.5; once for each variable.")
    ] = None,
    figure_file: FigureFile = None,
    json_file: JsonFile = None,
) -> None:
    """Write the free energy estimated from the hills of a metadynamics run."""
    from almlip_jax.simulation.free_energy import draw, run_free_energy, write_table

    asked = [_range(text) for text in ranges or []]
    surface = run_free_energy(run, bias=bias, points=points, ranges=asked, drawn=figure_file is not None)
    write_table(out, surface)
    rows = {"hills": str(surface.hills), "highest": f"{rounded(float(surface.mean.max()))} eV", "table": str(out)}
    if figure_file is not None:
        draw(figure_file, surface)
        rows["figure"] = str(figure_file)
    print_pairs("Free energy along " + ", ".join(surface.names), rows)
    if surface.missed:
        complain(
            f"{surface.missed} hills found no room and are missing in the free energy; give the bias more `hills`."
        )
    write_result(json_file, {"hills": surface.hills, "missed": surface.missed, "names": surface.names, "out": str(out)})


def _range(text: str) -> tuple[float, float]:
    try:
        first, last = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--range {text} is not two numbers with a comma, such as 1.0,2.5.") from error
    return first, last
