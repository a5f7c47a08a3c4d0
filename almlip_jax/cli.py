"""The command line ``almlip``: every command reads files, does one thing, prints a short table, and says so in JSON.

Heavy rooms are imported inside the commands, so that ``almlip --help`` is quick.  Errors are one sentence on standard
error and exit status 1; an interrupted run says how to go on and exits with 130.
"""

from __future__ import annotations

import functools
import inspect
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer
from rich.console import Console, Group, RenderableType
from rich.measure import Measurement
from rich.panel import Panel
from rich.table import Table
from typer.core import TyperGroup

from almlip_jax import __version__
from almlip_jax.errors import CapacityError, InputError, LabelError
from almlip_jax.interrupts import exit_status, listening
from almlip_jax.places import file_to_write, folder_to_write
from almlip_jax.unit_names import with_unit

if TYPE_CHECKING:
    from ase import Atoms

    from almlip_jax.campaign.config import ExperimentConfig, LabelConfig, TrainConfig
    from almlip_jax.campaign.loop import Outcome
    from almlip_jax.distillation import Distilled
    from almlip_jax.potential import Potential
    from almlip_jax.progress import Progress
    from almlip_jax.saved_potential import SavedPotential
    from almlip_jax.scoring import PoolSummary
    from almlip_jax.simulation.settings import SimulationConfig
    from almlip_jax.structures.labels import FileReading
    from almlip_jax.training import EpochReport, TrainingResult


class _Commands(TyperGroup):
    """Commands whose errors become sentences before click or typer handles them."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the command that was asked for."""
        with _plain_warnings(), _one_sentence():
            return super().invoke(ctx)


app = typer.Typer(
    name="almlip",
    cls=_Commands,
    help="Active learning of machine-learned interatomic potentials.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
console = Console()
if not console.is_terminal:
    console.width = 10_000  # a file has no line width


def _structures_to_write(path: Path | None) -> Path | None:
    """A file that structures can be written to, or none."""
    from almlip_jax.structures.io import require_format

    if path is not None:
        require_format(path)
    return file_to_write(path)


def _frames_to_add_to(path: Path | None) -> Path | None:
    """A file that frames can be added to one by one, or none."""
    from almlip_jax.structures.io import require_xyz

    if path is not None:
        require_xyz(path)
    return file_to_write(path)


def _database_to_write(path: Path | None) -> Path | None:
    """The same, which may be an ASE database."""
    from almlip_jax.structures.io import require_format

    if path is not None:
        require_format(path, databases=True)
    return file_to_write(path)


AnySimulation = TypeVar("AnySimulation", bound="SimulationConfig")
_Typed = TypeVar("_Typed", "ExperimentConfig", "LabelConfig")
JsonFile = Annotated[Path | None, typer.Option("--json", callback=file_to_write, help="Also write the result as JSON.")]
SetOption = Annotated[list[str] | None, typer.Option("--set", help="Override a key, as dotted.key=value; repeatable.")]
ConfigFile = Annotated[Path, typer.Argument(help="YAML config.")]
OutFile = Annotated[
    Path, typer.Option("--out", callback=_structures_to_write, help="File to write: .extxyz or .xyz, or MLIP-2's .cfg.")
]
ScoredFile = Annotated[
    Path,
    typer.Option(
        "--out",
        callback=_database_to_write,
        help="File to write: .extxyz or .xyz, MLIP-2's .cfg, or an ASE database, .db.",
    ),
]
OptionalOutFile = Annotated[
    Path | None,
    typer.Option("--out", callback=_structures_to_write, help="File to write: .extxyz or .xyz, or MLIP-2's .cfg."),
]
RunFolder = Annotated[Path, typer.Argument(help="Run directory.")]
PotentialFolder = Annotated[Path, typer.Argument(help="Folder of a saved potential.")]
PotentialPlace = Annotated[Path, typer.Argument(help="Folder of a saved potential, or an .mtp file (with --types).")]
RunOption = Annotated[
    Path | None,
    typer.Option("--out", callback=folder_to_write, help="Folder of the run; that of the config by default."),
]
DbFile = Annotated[
    Path | None, typer.Option("--db", callback=file_to_write, help="Label store; next to the output by default.")
]
TypesOption = Annotated[
    str | None, typer.Option("--types", help="Element of each type of .cfg files, from type 0 on, as Si,O.")
]

CommandOption = Annotated[
    Literal["campaign", "explore", "md", "sweep", "distil"],
    typer.Option("--of", help="The command that the config is for."),
]


@dataclass(frozen=True)
class _ReadingOptions:
    """Options that say how files of structures are read; `_with_reading_options` gives them to a command."""

    energy_key: Annotated[str | None, typer.Option(help="Key of the energies (eV) in the data.")] = None
    forces_key: Annotated[str | None, typer.Option(help="Key of the forces (eV/Angstrom).")] = None
    stress_key: Annotated[str | None, typer.Option(help="Key of the stresses.")] = None
    virial_key: Annotated[str | None, typer.Option(help="Key of the virials (-volume * stress, eV).")] = None
    stress_unit: Annotated[str | None, typer.Option(help="Unit of the stresses: eV/A^3, GPa or kbar.")] = None
    label_key: Annotated[
        list[str] | None, typer.Option(help="Key of other labels, as dipole=mu (e*Angstrom); may be given repeatedly.")
    ] = None
    types: TypesOption = None

    def reading(self, base: FileReading | None = None) -> FileReading:
        """How files are read: as a config says, except where options were given."""
        from almlip_jax.structures.labels import FileReading, parse_types

        others = dict(pair.partition("=")[::2] for pair in self.label_key or ())
        given = FileReading(types=None if self.types is None else parse_types(self.types))
        return given.otherwise(FileReading() if base is None else base).with_keys(
            energy=self.energy_key,
            forces=self.forces_key,
            stress=self.stress_key,
            virial=self.virial_key,
            stress_unit=self.stress_unit,
            **others,
        )


def _with_reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `_ReadingOptions` where it takes them together, as ``files``."""
    own = inspect.signature(command, eval_str=True).parameters.items()
    shared = inspect.signature(_ReadingOptions, eval_str=True).parameters

    @functools.wraps(command)
    def gathering(**given: Any) -> None:
        files = _ReadingOptions(**{name: given.pop(name) for name in shared})
        command(**given, files=files)

    parameters = [one for name, given in own for one in (shared.values() if name == "files" else (given,))]
    keywords = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    gathering.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return gathering


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


# ------------------------------------------------------------------------------------------------------------ campaign


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
        _complain(f"interrupted; nothing is lost, go on with: {shlex.join(['almlip', 'resume', str(folder)])}")
        raise typer.Exit(exit_status(stop)) from None
    _show_outcome(outcome, json_file)
    if not outcome.finished:
        raise typer.Exit(3)


def _show_outcome(outcome: Outcome, json_file: Path | None) -> None:
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
    _print_pairs("Campaign", rows)
    fields = {name: getattr(outcome, name) for name in outcome.__dataclass_fields__}
    _write_json(json_file, {name: str(v) if isinstance(v, Path) else v for name, v in fields.items()})


@app.command()
def status(run_dir: RunFolder, json_file: JsonFile = None) -> None:
    """Say where a campaign stands, whether it converges, and if not, what holds it back."""
    from almlip_jax.campaign.status import campaign_status, render_status

    standing = campaign_status(run_dir)
    _show(render_status(standing))
    _write_json(json_file, standing)


@app.command()
def report(run_dir: RunFolder, json_file: JsonFile = None) -> None:
    """Write the report of a campaign, finished or not, as one HTML page."""
    from almlip_jax.campaign.report import write_report

    path = write_report(run_dir)
    _print_pairs("Report", {"written": str(path)})
    _write_json(json_file, {"report": str(path)})


# ------------------------------------------------------------------------------------------------------------ potential


@app.command()
@_with_reading_options
def train(
    config: ConfigFile,
    data: Annotated[list[Path], typer.Option("--data", help="Labelled structures; repeatable.")],
    out: Annotated[Path, typer.Option("--out", callback=folder_to_write, help="Folder of the potential.")],
    begin: Annotated[
        Path | None,
        typer.Option("--from", help="Potential to fine-tune (folder or .mtp); elements that it lacks are added."),
    ] = None,
    validation: Annotated[
        list[Path] | None,
        typer.Option("--validation", help="Labelled structures to validate on, in place of a share of the data."),
    ] = None,
    *,
    files: _ReadingOptions,
    overrides: SetOption = None,
    json_file: JsonFile = None,
) -> None:
    """Train an ensemble on labelled structures; the same command goes on with a training that was interrupted."""
    from almlip_jax.campaign.config import TrainConfig
    from almlip_jax.campaign.preparation import in_their_states
    from almlip_jax.compilation import prepare_jax
    from almlip_jax.config import load_settings
    from almlip_jax.files import write_csv
    from almlip_jax.potential import check_place
    from almlip_jax.saved_potential import SavedPotential
    from almlip_jax.training import checkpoint

    settings = load_settings(TrainConfig, config, overrides or [])
    reading = files.reading(settings.system)
    start = None
    if begin is not None:
        of_begin = _types_of_file(begin, reading.types)
        start = _load(begin, of_begin)
        reading = _as_remembered(reading, start, begin)
        settings = _as_of(start, SavedPotential.read(begin, of_begin), settings)
    prepare_jax(settings.precision)
    check_place(out)
    structures = in_their_states(_read(data, reading, require_labels=True), settings.system)
    held_out = in_their_states(_read(validation, reading, require_labels=True), settings.system) if validation else []
    place = out.resolve()
    unfinished = place.with_name(f"{place.name}.training")  # next to it: a potential appears whole or not at all
    potential, result = _fit(settings, structures, held_out, start, unfinished)
    if reading.types is not None:
        potential = potential.with_types(reading.arguments["type_numbers"])
    potential.save(out)
    curve = place.with_name(f"{place.name}.training.csv")
    write_csv(curve, result.rows())
    checkpoint.discard(unfinished)
    _show_training(result, len(structures), out, curve, json_file)


def _types_of_file(path: Path, types: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """Of the types of a training's data, those of an ``.mtp`` file that it begins with: the first ones."""
    if types is None or not _is_mtp(path):
        return types
    from almlip_jax.models.mtp.text import read_mtp

    return types[: read_mtp(path).types]


def _as_of(start: Potential, saved: SavedPotential, settings: TrainConfig) -> TrainConfig:
    """The settings, with model, ensemble and precision of a potential to begin with where they are not given."""
    from almlip_jax.campaign.beginning import as_of
    from almlip_jax.fitting import check_start

    settings = as_of(saved, settings)
    check_start(start, settings.model, settings.ensemble)
    return settings


def _fit(
    settings: TrainConfig,
    structures: Sequence[Atoms],
    held_out: Sequence[Atoms],
    start: Potential | None,
    unfinished: Path,
) -> tuple[Potential, TrainingResult]:
    """The training that settings describe, with its progress shown."""
    from almlip_jax.fitting import fit_potential
    from almlip_jax.progress import open_progress, reaching

    with open_progress() as progress, progress.stage("train", unit="steps") as advance:
        reached = reaching(advance)

        def on_epoch(epoch: EpochReport) -> None:
            reached(epoch.step, **epoch.errors)

        return fit_potential(
            structures,
            settings.model,
            settings.ensemble,
            settings.training,
            settings.seed,
            on_epoch,
            unfinished,
            start,
            progress.message,
            held_out,
            settings.know_training_set,
            settings.active_set,
        )


def _show_training(
    result: TrainingResult, structures: int, potential: Path, curve: Path, json_file: Path | None
) -> None:
    last = result.history[-1]
    errors = {f"validation_{name}": error for name, error in result.errors.items()}
    rows = {"structures": structures, "epochs": last.epoch, "steps": last.step, "seconds": last.seconds} | errors
    shown = {name: with_unit(_number(value), name) for name, value in rows.items()}
    _print_pairs("Training", {**shown, "potential": str(potential), "learning curve": str(curve)})
    _write_json(json_file, {**rows, "potential": str(potential), "training": str(curve)})


@app.command()
@_with_reading_options
def evaluate(
    potential: PotentialPlace,
    data: Annotated[Path, typer.Argument(help="Labelled structures.")],
    group_key: Annotated[str, typer.Option(help="Key of a frame's info that names its group.")] = "group",
    predictions: Annotated[
        Path | None,
        typer.Option(help="Also write the frames with labels, predictions and uncertainties (extxyz or cfg)."),
    ] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Also draw parity and calibration, as PDF and PNG, into this folder.")
    ] = None,
    *,
    files: _ReadingOptions,
    json_file: JsonFile = None,
) -> None:
    """Compare a potential with labels: errors and calibration, of all structures, of each group and each element."""
    if predictions is not None:
        from almlip_jax.structures.io import require_format

        require_format(predictions)
    reading = files.reading()
    model = _load(potential, reading.types)
    reading = _as_remembered(reading, model, potential)
    from almlip_jax.evaluation import error_metrics
    from almlip_jax.evaluation.tables import error_table, partly_labelled, uncertainty_table
    from almlip_jax.structures.labels import hint_of_keys, likely_keys

    frames = _read([data], reading)
    if not any(frame.calc is not None for frame in frames):
        raise InputError(
            f"{data} has no labels to compare with; label it, {hint_of_keys(frames[0])}, or write what the potential "
            "predicts with `almlip score --labels predicted`."
        )
    model.check_elements(frames, str(data))
    evaluated = model.evaluate(frames)
    metrics = error_metrics(frames, evaluated, group_key=group_key)
    _show(error_table(metrics, f"{data.name}: {len(frames)} structures"))
    for sentence in partly_labelled(metrics):
        console.print(sentence, markup=False, highlight=False)
    if not metrics["num_labelled"]["forces"] and (likely := likely_keys(frames[0], "forces")):
        console.print(f"perhaps {', '.join(likely)} (--forces-key).", markup=False, highlight=False)
    uncertainties = uncertainty_table(metrics)
    if uncertainties is not None:
        _show(uncertainties)
    written: list[Path] = []
    if predictions is not None:
        from almlip_jax.scoring import write_predictions

        _say_left_out(write_predictions(model, frames, evaluated, predictions, reading.arguments["type_numbers"]))
        written.append(predictions)
    if figures is not None:
        from almlip_jax.figures.command import draw_errors

        drawn, notes = draw_errors(frames, evaluated, figures, group_key)
        written += drawn
        for note in notes:
            console.print(note, markup=False, highlight=False)
    if written:
        _print_pairs("Evaluation", {str(path): "written" for path in written})
    _write_json(json_file, metrics | {"written": [str(path) for path in written]})


@app.command()
def score(
    potential: PotentialPlace,
    pool: Annotated[Path, typer.Argument(help="Structures; labels are not needed.")],
    out: ScoredFile,
    labels: Annotated[
        Literal["kept", "predicted"],
        typer.Option(
            "--labels",
            help="Energy, forces and stress of the file: those that came with the structures, if any (predictions are "
            "under names of their own then), or those of the potential.",
        ),
    ] = "kept",
    train_file: Annotated[
        Path | None,
        typer.Option("--train", help="Grades over the active set of these structures, in place of the potential's."),
    ] = None,
    types: TypesOption = None,
    json_file: JsonFile = None,
) -> None:
    """Write structures with predictions and the uncertainty of each frame and atom, however many there are."""
    reading = _ReadingOptions(types=types).reading()
    model = _load(potential, reading.types)
    reading = _as_remembered(reading, model, potential)
    numbers = reading.arguments["type_numbers"]
    if train_file is not None:
        labelled = _read([train_file], reading, ignore_labels=True)
        model.check_elements(labelled, str(train_file))
        model = model.spanning(labelled, None if model.active_set is None else model.active_set.settings)
    from almlip_jax.progress import open_progress
    from almlip_jax.scoring import score_pool
    from almlip_jax.structures.io import count_structures

    total = count_structures(pool)
    with open_progress() as progress, progress.stage("score", total, unit="frames") as advance:
        summary = score_pool(model, pool, out, advance, type_numbers=numbers, labels=labels)
    _say_left_out(summary.left_out)
    spread = model.ensemble.members > 1 or model.member_settings.likelihood != "none"
    shown = {name for name in summary.largest if spread or name not in summary.mean}  # else 0 everywhere
    _print_pairs(
        f"{'Mean and largest scores' if spread else 'Scores'} of {summary.number} structures",
        {
            **{name: _of_pool(name, summary) for name in summary.largest if name in shown},
            **({"most uncertain frame": str(summary.most_uncertain)} if spread else {}),
            "written": str(out),
        },
    )
    scored = {"num_structures": summary.number, "mean": summary.mean, "most_uncertain": summary.most_uncertain}
    scored["largest"] = {name: {"value": value, "frame": frame} for name, (value, frame) in summary.largest.items()}
    _write_json(json_file, {**scored, "out": str(out)})


@app.command()
def select(
    config: ConfigFile,
    potential: Annotated[Path, typer.Option("--potential", help="Folder of a saved potential, or .mtp file.")],
    pool: Annotated[Path, typer.Option("--pool", help="Candidates.")],
    train_file: Annotated[Path, typer.Option("--train", help="What is labelled already.")],
    k: Annotated[int, typer.Option("-k", min=1, help="Size of the batch.")],
    out: OutFile,
    types: TypesOption = None,
    overrides: SetOption = None,
    json_file: JsonFile = None,
) -> None:
    """Choose the batch worth labelling from a pool, with the selector of a config."""
    from almlip_jax.campaign.config import SelectConfig
    from almlip_jax.config import load_settings

    settings = load_settings(SelectConfig, config, overrides or [])
    reading = _ReadingOptions(types=types).reading(settings.system)
    model = _load(potential, reading.types)
    reading = _as_remembered(reading, model, potential)
    from almlip_jax.campaign.batch import undecided
    from almlip_jax.campaign.consistency import check_columns, check_selector
    from almlip_jax.campaign.preparation import in_their_states
    from almlip_jax.steps import select as chosen
    from almlip_jax.structures.io import write_structures

    selector = settings.selection.selector
    try:
        check_selector(selector, model.member_settings, "selection.selector", model.ensemble.targets)
    except ValueError as error:
        raise InputError(f"{potential}: {error}") from error
    check_columns(selector, k, "selection.selector")
    frames, labelled = (
        in_their_states(_read([file], reading, ignore_labels=True), settings.system) for file in (pool, train_file)
    )
    model.check_elements(frames, str(pool))
    model.check_elements(labelled, str(train_file))
    batch = chosen(selector, model, frames, labelled, min(k, len(frames)), seed=settings.seed)
    found = [(frame.info["pool_index"], frame.info["gain"]) for frame in batch]
    _say_left_out(write_structures(out, batch, type_numbers=reading.arguments["type_numbers"] or model.type_numbers))
    table = Table("pool index", "gain", title=f"{len(batch)} of {len(frames)} by {selector.kind}")
    for index, gain in found[:20]:
        table.add_row(str(index), _number(gain))
    _show(table)
    if (remark := undecided([gain for _, gain in found], len(frames))) is not None:
        console.print(remark, markup=False, highlight=False)
    _write_json(json_file, {"indices": [i for i, _ in found], "gain": [g for _, g in found], "out": str(out)})


@app.command(name="select-add")
def select_add(
    potential: PotentialPlace,
    pool: Annotated[Path, typer.Argument(help="Candidates; labels are not needed.")],
    out: OutFile,
    train_file: Annotated[
        Path | None,
        typer.Option("--train", help="Build the active set from these structures, in place of that of the potential."),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option("--save", callback=folder_to_write, help="Also save the potential with the set that grew."),
    ] = None,
    types: TypesOption = None,
    json_file: JsonFile = None,
) -> None:
    """Offer structures to the active set of a potential, and write those that enter it: select-add of MLIP-2."""
    reading = _ReadingOptions(types=types).reading()
    model = _load(potential, reading.types)
    reading = _as_remembered(reading, model, potential)
    from almlip_jax.potential import check_place
    from almlip_jax.scoring import MV_GRADE
    from almlip_jax.steps import select_add as offered
    from almlip_jax.structures.io import write_structures

    if save is not None:
        check_place(save)
    if model.active_set is None and train_file is None:
        raise InputError(
            f"{potential} has no active set; name the structures that it was trained on with --train, or train it "
            "with active_set in its config."
        )
    frames = _read([pool], reading, ignore_labels=True)
    labelled = [] if train_file is None else _read([train_file], reading, ignore_labels=True)
    model.check_elements(frames, str(pool))
    model.check_elements(labelled, str(train_file))
    batch, grown = offered(model, frames, labelled)
    _say_left_out(write_structures(out, batch, type_numbers=reading.arguments["type_numbers"] or model.type_numbers))
    if save is not None:
        grown.save(save)
    table = Table("pool index", MV_GRADE, title=f"{len(batch)} of {len(frames)} enter the active set")
    for frame in batch[:20]:
        table.add_row(str(frame.info["pool_index"]), _number(frame.info[MV_GRADE]))
    _show(table)
    found = {"indices": [frame.info["pool_index"] for frame in batch], "grades": [f.info[MV_GRADE] for f in batch]}
    _write_json(json_file, {**found, "out": str(out), "potential": None if save is None else str(save)})


# -------------------------------------------------------------------------------------------------------------- studies


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
    _print_pairs("Study", {path: "written" for path in study["written"]} | study["skipped"])
    for note in study["notes"]:
        console.print(note, markup=False, highlight=False)
    _write_json(json_file, study)


# --------------------------------------------------------------------------------------------------------------- labels


@app.command()
def generate(
    config: ConfigFile,
    out: OutFile,
    types: TypesOption = None,
    overrides: SetOption = None,
    json_file: JsonFile = None,
) -> None:
    """Write the structures that initial.generated of a config makes, without labels, as a campaign would label them."""
    from almlip_jax.campaign.config import load_config
    from almlip_jax.campaign.inputs import Inputs
    from almlip_jax.structures.io import write_structures

    settings = _typed(load_config(config, overrides or []), types)
    if not settings.initial.generated:
        raise InputError(f"{config} says nothing in initial.generated; name what is to be made there.")
    inputs = Inputs(settings)
    made = inputs.generated_to_label
    for left_out in inputs.left_out(settings.initial.generated):
        console.print(left_out, markup=False, highlight=False)
    frames = []
    for kind, some in made.items():
        for frame in some:
            frame.info["generator"] = kind
            frames.append(frame)
    _say_left_out(write_structures(out, frames, type_numbers=settings.system.arguments["type_numbers"]))
    counts = {kind: len(some) for kind, some in made.items()}
    _print_pairs("Generated structures", {kind: str(count) for kind, count in counts.items()} | {"written": str(out)})
    _write_json(json_file, {"num_structures": len(frames), "by_kind": counts, "out": str(out)})


def _typed(settings: _Typed, types: str | None) -> _Typed:
    """The settings with the types of an option, where it was given."""
    from almlip_jax.structures.labels import parse_types

    if types is None:
        return settings
    return settings.model_copy(update={"system": settings.system.model_copy(update={"types": parse_types(types)})})


@app.command()
def label(
    config: ConfigFile,
    structures: Annotated[Path, typer.Argument(help="Structures to label.")],
    out: OptionalOutFile = None,
    db: DbFile = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the input of the first structure and what would run; run nothing.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Label the first structure, and hold forces and stress against its energy.")
    ] = False,
    retry: Annotated[
        bool, typer.Option("--retry", help="Try again what has failed in this store; without, it stays failed.")
    ] = False,
    types: TypesOption = None,
    overrides: SetOption = None,
    json_file: JsonFile = None,
) -> None:
    """Label structures with the label source of a config, in parallel, into a label store.

    The file written has a frame for each one given, in order, with all it had; one that failed says why in label_error.
    """
    from almlip_jax.campaign.config import LabelConfig
    from almlip_jax.campaign.preparation import requested_frames
    from almlip_jax.config import load_settings
    from almlip_jax.oracles import Labeller, LabelStore, PendingLabels
    from almlip_jax.progress import open_progress
    from almlip_jax.structures.io import LABEL_ERROR, require_place, write_structures

    settings = _typed(load_settings(LabelConfig, config, overrides or []), types)
    frames = requested_frames(structures, settings.system)
    if dry_run and check:
        raise InputError("--dry-run runs nothing, and --check labels; give one of them.")
    if dry_run or check:
        _show_first_label(settings, frames, dry_run, json_file)
        return
    if out is None:
        raise InputError("name the file to write: --out labelled.extxyz.")
    require_place(out, frames, str(structures), type_numbers=settings.system.arguments["type_numbers"])
    store_path = db or out.with_suffix(".db")
    provenance = {"purpose": "label", "campaign": settings.name}
    with LabelStore(store_path) as store, Labeller(settings.oracle, store, settings.executor) as labeller:
        try:
            with open_progress() as progress, progress.stage("label", len(frames), unit="labels") as advance:
                results = labeller.label(frames, provenance, on_label=lambda _: advance(1), retry=retry)
        except PendingLabels as pending:
            _complain(str(pending))
            raise typer.Exit(3) from None
    failed = [(n, result.error) for n, result in enumerate(results) if result.atoms is None]
    for number, error in failed:
        frames[number].info[LABEL_ERROR] = error
    pairs = zip(results, frames, strict=True)
    written = [frame if result.atoms is None else result.atoms for result, frame in pairs]
    _say_left_out(write_structures(out, written, type_numbers=settings.system.arguments["type_numbers"]))
    rows = {
        "labelled": len(frames) - len(failed),
        "failed": len(failed),
        "taken from the store": sum(r.cached for r in results),
    }
    _print_pairs("Labels", {**{name: str(value) for name, value in rows.items()}, "store": str(store_path)})
    _write_json(json_file, {**rows, "failures": failed, "out": str(out), "store": str(store_path)})
    if failed:
        number, reason = failed[0]
        earlier = sum(results[n].cached for n, _ in failed)
        again = f" ({earlier} of them in an earlier call; --retry tries these again)" if earlier else ""
        raise LabelError(f"{len(failed)} of {len(frames)} labels failed{again}; frame {number}: {reason}")


def _show_first_label(settings: LabelConfig, frames: list[Atoms], dry_run: bool, json_file: Path | None) -> None:
    """What the first structure's label would take, or whether its forces and stress are derivatives of its energy."""
    from almlip_jax.oracles.base import bare
    from almlip_jax.oracles.finite_differences import check_derivatives

    if dry_run:
        text = settings.oracle.preview(bare(frames[0]))
        sys.stdout.write(text + "\n")
        _write_json(json_file, {"preview": text})
        return
    found = check_derivatives(frames[0], settings.oracle, settings.executor)
    rows = {
        f"atom {one.atom} ({frames[0].symbols[one.atom]}), {'xyz'[one.axis]}": (
            f"force {one.force:.4f}, by differences {one.difference:.4f} eV/A"
        )
        for one in found.compared
    }
    rows |= {
        f"stress {one.component}": f"{one.stress:.5f}, by differences {one.difference:.5f} eV/A^3"
        for one in found.stresses
    }
    energy = found.label.get_potential_energy()
    heading = "Forces and stress" if found.stresses else "Forces"
    _print_pairs(heading, {"energy": f"{energy:.6f} eV", **rows, "seconds": _number(found.seconds)})
    told = {name: [asdict(one) for one in getattr(found, name)] for name in ("compared", "stresses")}
    _write_json(json_file, {"energy": energy, **told, "agrees": found.agrees, "seconds": found.seconds})
    if not all(one.agrees for one in found.compared):
        raise LabelError(
            "the forces are not the derivatives of the energy; converge the SCF more tightly, and use the free energy "
            "where electrons are smeared"
        )
    if not found.agrees:
        raise LabelError(
            "the forces are the derivatives of the energy, and the stress is not; raise the cutoff (with few plane "
            "waves their number changes with the cell), or leave stresses out of labels and training"
        )


@app.command()
@_with_reading_options
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Structures in any format that is read; a potential.")],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="File to write: .extxyz, .xyz, .cfg or .db; a potential: .mtp, or folder."),
    ],
    *,
    files: _ReadingOptions,
    json_file: JsonFile = None,
) -> None:
    """Write structures in another format (extended XYZ, MLIP-2 cfg, ASE database), or a potential from or to .mtp."""
    if source.is_dir() or target.suffix == ".mtp" or _is_mtp(source):
        _convert_potential(source, target, files.reading().types, json_file)
        return
    from almlip_jax.structures import convert as conversion

    reading = files.reading()
    converted = conversion.convert(source, target, reading)
    rows = {"structures": str(converted.number), "written": str(target)}
    rows |= {"types from 0 on": ", ".join(converted.types)} if converted.types else {}
    rows |= {"left out": ", ".join(converted.left_out)} if converted.left_out else {}
    _print_pairs("Conversion", rows)
    summary = {"structures": converted.number, "types": list(converted.types), "left_out": list(converted.left_out)}
    _write_json(json_file, {**summary, "out": str(target)})


def _is_mtp(path: Path) -> bool:
    from almlip_jax.models.mtp.text import is_mtp

    return path.is_file() and is_mtp(path)


def _convert_potential(source: Path, target: Path, types: tuple[str, ...] | None, json_file: Path | None) -> None:
    from almlip_jax.structures.labels import required_types, type_numbers

    if source.is_dir():
        potential = _load_folder(source)
        from ase.data import chemical_symbols

        from almlip_jax.potential.mtp_files import file_types, save_mtp

        if target.suffix != ".mtp":
            raise InputError(f"{target} should end in .mtp, the format that a potential is converted to.")
        written = save_mtp(potential, target, None if types is None else type_numbers(types))
        symbols = tuple(chemical_symbols[z] for z in file_types(potential)) if types is None else types
        if empty := [one for one in symbols if one not in potential.species.symbols]:
            told = f"of {', '.join(empty)} the potential knows nothing: coefficients of these types are 0 in the file."
            console.print(told, markup=False, highlight=False)
    elif not _is_mtp(source):
        raise InputError(f"{source} is no potential: neither a folder of one nor an .mtp file.")
    elif target.suffix == ".mtp":
        from almlip_jax.models.mtp.text import read_mtp

        read_mtp(source).write(target)
        written, symbols = [target], ()
    else:
        from almlip_jax.compilation import prepare_jax
        from almlip_jax.potential import check_place

        numbers = required_types(source, types)
        check_place(target)
        prepare_jax("float64")
        from almlip_jax.potential.mtp_files import load_mtp

        load_mtp(source, numbers).save(target)
        written, symbols = [target], types or ()
    rows = {"written": ", ".join(map(str, written))} | ({"types from 0 on": ", ".join(symbols)} if symbols else {})
    _print_pairs("Conversion", rows)
    _write_json(json_file, {"types": list(symbols), "out": [str(path) for path in written]})


# ---------------------------------------------------------------------------------------------------------- simulation


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


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def lammps(
    context: typer.Context,
    potential: PotentialFolder,
    script: Annotated[Path, typer.Argument(help="Input script of LAMMPS.")],
    elements: Annotated[
        str | None, typer.Option("--elements", help="Element of each type of atoms, from type 1 on, as Si,O.")
    ] = None,
    record: Annotated[
        Path | None, typer.Option("--record", callback=_frames_to_add_to, help="File for uncertain frames (extxyz).")
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
    model = _load_folder(potential)
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
    rows |= {f"last {score}": with_unit(_number(outcome.last[score]), score)} if score in outcome.last else {}
    _print_pairs("LAMMPS with the potential", rows)
    told = {"evaluations": outcome.evaluations, "lists": outcome.lists, "recorded": outcome.recorded}
    _write_json(json_file, {**told, "status": outcome.status, "last": dict(outcome.last)})
    if outcome.status != 0:
        raise typer.Exit(outcome.status)  # as lmp ends


@app.command()
def export(
    potential: PotentialFolder,
    out: Annotated[Path, typer.Argument(metavar="OUT", callback=file_to_write, help="File to write.")],
    like: Annotated[
        Path, typer.Option("--like", help="Structures like those to come; they say how much room there has to be.")
    ],
    stablehlo: Annotated[
        bool, typer.Option("--stablehlo", help="StableHLO programs that need jax and nothing of this package.")
    ] = False,
    lammps_jax: Annotated[
        bool, typer.Option("--lammps-jax", help="A bundle for pair_style jax/kk of lammps-jax.")
    ] = False,
    atoms: Annotated[int | None, typer.Option("--atoms", min=1, help="Most atoms; of a process, with LAMMPS.")] = None,
    neighbors: Annotated[
        int | None, typer.Option("--neighbors", min=1, help="Most neighbours of an atom, with --stablehlo.")
    ] = None,
    precision: Annotated[
        Literal["float32", "float64"] | None, typer.Option("--precision", help="That of the potential by default.")
    ] = None,
    platforms: Annotated[
        str | None,
        typer.Option("--platforms", help="Of cpu,gpu,tpu: all by default; with --lammps-jax gpu (default) or cpu."),
    ] = None,
    elements: Annotated[
        str | None, typer.Option("--elements", help="Element of each type of LAMMPS, from type 1 on, as Si,O.")
    ] = None,
    units: Annotated[
        Literal["metal", "real"] | None, typer.Option("--units", help="Of LAMMPS, metal by default.")
    ] = None,
    skin: Annotated[
        float | None, typer.Option("--skin", min=0, help="Of the list of LAMMPS, 2 Angstrom by default.")
    ] = None,
    without_references: Annotated[
        bool, typer.Option("--without-references", help="Leave out reference energies, with --lammps-jax.")
    ] = False,
    types: TypesOption = None,
    json_file: JsonFile = None,
) -> None:
    """Write a potential as programs for other software: energy, forces, virial and spread in room that is fixed."""
    if stablehlo == lammps_jax:
        raise InputError("say what is to be written: --stablehlo or --lammps-jax, one of them.")
    of_lammps: dict[str, Any] = {"elements": elements, "units": units, "skin": skin}
    of_lammps |= {"without-references": without_references or None}
    wrong = [name for name, value in of_lammps.items() if stablehlo and value is not None]
    wrong += ["neighbors"] if lammps_jax and neighbors is not None else []
    if wrong:
        raise InputError(f"--{wrong[0]} belongs to {'--lammps-jax' if stablehlo else '--stablehlo'}; leave it out.")
    names = None if platforms is None else platforms.split(",")
    numbers = _ReadingOptions(types=types).reading().arguments["type_numbers"]
    model = _load_folder(potential)
    from almlip_jax.structures.io import read_structures

    structures = read_structures(like, ignore_labels=True, type_numbers=numbers)
    if stablehlo:
        from almlip_jax.interfaces.stablehlo import PLATFORMS, export_stablehlo, left_out

        room = {"atoms": atoms, "neighbors": neighbors}
        about = export_stablehlo(model, out, structures, **room, precision=precision, platforms=names or PLATFORMS)
        told = {key: about[key] for key in ("format", "precision", "atoms", "neighbors", "edges")}
        told["programs"] = ", ".join(about["programs"])
        _say_left_out(left_out(model))
    else:
        told = _bundle(model, out, structures, of_lammps, names, atoms=atoms, precision=precision)
    _print_pairs("Exported", {"written": str(out), **{key: str(value) for key, value in told.items()}})
    _write_json(json_file, {"out": str(out), **told})


def _bundle(
    potential: Potential,
    out: Path,
    structures: Sequence[Atoms],
    options: Mapping[str, Any],
    platforms: Sequence[str] | None,
    **further: Any,
) -> dict[str, Any]:
    """Writes a bundle for lammps-jax; the room that it has."""
    from almlip_jax.interfaces.lammps_jax import export_lammps_jax

    if options["elements"] is None:
        raise InputError("--lammps-jax needs --elements, the element of each type of atoms, as Si,O.")
    if platforms not in (None, ["gpu"], ["cpu"]):
        raise InputError(f"a bundle is for gpu or for cpu, not for {','.join(platforms or ())}.")
    room = export_lammps_jax(
        potential,
        out,
        structures,
        [symbol.strip() for symbol in options["elements"].split(",")],
        skin=2.0 if options["skin"] is None else options["skin"],
        units=options["units"] or "metal",
        platform="cpu" if platforms == ["cpu"] else "cuda",
        references=not options["without-references"],
        **further,
    )
    return asdict(room)


@app.command(name="free-energy")
def free_energy(
    run: Annotated[Path, typer.Argument(help="Folder of a run with the bias `metadynamics`, running or finished.")],
    out: Annotated[Path, typer.Option("--out", help="CSV file to write.")],
    bias: Annotated[
        int | None, typer.Option("--bias", min=0, help="Position of the metadynamics among the biases, from 0.")
    ] = None,
    points: Annotated[int | None, typer.Option("--points", min=2, max=5000, help="Points along each variable.")] = None,
    ranges: Annotated[
        list[str] | None, typer.Option("--range", help="First and last value, as 1.0,2.5; once for each variable.")
    ] = None,
    figure_file: Annotated[Path | None, typer.Option("--figure", help="PNG, PDF or SVG file to draw into.")] = None,
    json_file: JsonFile = None,
) -> None:
    """Write the free energy estimated from the hills of a metadynamics run."""
    from almlip_jax.simulation.free_energy import draw, run_free_energy, write_table

    surface = run_free_energy(run, bias=bias, points=points, ranges=[_range(text) for text in ranges or []])
    write_table(out, surface)
    rows = {"hills": str(surface.hills), "highest": f"{_number(float(surface.mean.max()))} eV", "table": str(out)}
    if figure_file is not None:
        draw(figure_file, surface)
        rows["figure"] = str(figure_file)
    _print_pairs("Free energy along " + ", ".join(surface.names), rows)
    if surface.missed:
        _complain(
            f"{surface.missed} hills found no room and are missing in the free energy; give the bias more `hills`."
        )
    _write_json(json_file, {"hills": surface.hills, "missed": surface.missed, "names": surface.names, "out": str(out)})


def _range(text: str) -> tuple[float, float]:
    try:
        first, last = (float(part) for part in text.split(","))
    except ValueError as error:
        raise InputError(f"--range {text} is not two numbers with a comma, such as 1.0,2.5.") from error
    return first, last


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
    potential = _load(settings.potential, settings.types)
    try:
        with open_progress() as progress:
            summary = work(settings, folder, potential, progress)
    except KeyboardInterrupt as stop:
        again = ["almlip", command, str(config), *(["--out", str(out)] if out else [])]
        again += [part for override in overrides or [] for part in ("--set", override)]
        _complain(f"interrupted; go on with: {shlex.join(again)}")
        raise typer.Exit(exit_status(stop)) from None
    _show(render_summary(summary))
    _write_json(json_file, summary)
    failed = failure(summary)
    if failed is not None:
        raise InputError(failed)


# --------------------------------------------------------------------------------------------------------------- sweep


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
        _complain("interrupted; nothing is lost, the same command goes on.")
        raise typer.Exit(exit_status(stop)) from None
    _show(render_result(result))
    _write_json(json_file, result.summary())


# -------------------------------------------------------------------------------------------------------- distillation


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
        _complain(str(pending))
        raise typer.Exit(3) from None
    except KeyboardInterrupt as stop:
        _complain("interrupted; nothing is lost, the same command goes on.")
        raise typer.Exit(exit_status(stop)) from None
    _show_distilled(result)
    _write_json(json_file, result.summary())
    if not result.finished:
        raise typer.Exit(3)


def _show_distilled(result: Distilled) -> None:
    from almlip_jax.evaluation.tables import rows_of_errors

    rows = {"folder": str(result.out), "calls of the teacher": str(result.calls)}
    if not result.finished:
        _print_pairs("Distillation", rows | {"waits": result.reason})
        return
    named = {
        f"{group}: {which.replace('_', ' ')}": values
        for group, several in result.errors.items()
        for which, values in several.items()
    }
    _show(rows_of_errors(named, "Student and teacher", "group: compared"))
    if result.times is not None:
        took = result.times
        rows["teacher"] = f"{_number(took.teacher)} s a structure, threads {took.teacher_cores}"
        rows["student"] = f"{_number(took.student)} s a structure, cores {took.student_cores}"
        rows["student is faster"] = f"{_number(took.times_faster)} times, each on one core"
    _print_pairs("Distillation", {"potential": str(result.out / "potential"), **rows})


# --------------------------------------------------------------------------------------------------------------- config


@app.command()
def init(
    template: Annotated[str, typer.Argument(help="Name of a template; `list` shows them.")] = "list",
    code: Annotated[
        str | None, typer.Option("--code", help="Code that labels, as espresso, gpaw, cp2k, vasp, aims, orca.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", callback=file_to_write, help="File to write; standard output by default.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Write a commented config to begin with."""
    from almlip_jax.templates import TEMPLATES, render

    if template == "list":
        _print_pairs("Templates", {name: one.title for name, one in TEMPLATES.items()})
        _write_json(json_file, {name: one.title for name, one in TEMPLATES.items()})
        return
    text = render(template, code)
    if out is None:
        sys.stdout.write(text)
    elif out.exists():
        raise InputError(f"{out} exists; choose another file.")
    else:
        out.write_text(text)
        _print_pairs("Template", {"written": str(out)})
    _write_json(json_file, {"template": template, "code": code, "out": str(out) if out else None})


@app.command()
def schema(
    of: CommandOption = "campaign",
    json_file: JsonFile = None,
) -> None:
    """Print the JSON schema of configs, for editors."""
    from almlip_jax.templates import KINDS

    content = KINDS[of].model_json_schema()
    if json_file is None:
        sys.stdout.write(json.dumps(content, indent=2) + "\n")
    _write_json(json_file, content)


@app.command()
def explain(
    path: Annotated[str, typer.Argument(help="Dotted keys, as exploration.gate or selection.selector.bait.")] = "",
    of: CommandOption = "campaign",
) -> None:
    """Explain the keys of a config section: what they may hold, their defaults, units and meaning."""
    from almlip_jax.config_keys import explain as explained
    from almlip_jax.templates import KINDS

    sys.stdout.write(explained(KINDS[of], path) + "\n")


# -------------------------------------------------------------------------------------------------------------- helpers


def _read(
    files: Sequence[Path], reading: FileReading, *, require_labels: bool = False, ignore_labels: bool = False
) -> list[Atoms]:
    from almlip_jax.structures.io import read_structures

    arguments = reading.arguments
    return read_structures(files, require_labels=require_labels, ignore_labels=ignore_labels, **arguments)


def _load(path: Path, types: Sequence[str] | None = None) -> Any:
    """The potential in a folder, or of an ``.mtp`` file with types, with jax set to its precision."""
    from almlip_jax.saved_potential import SavedPotential

    try:
        dtype = SavedPotential.read(path, types).precision
    except InputError:
        dtype = "float32"  # loading says what is wrong
    from almlip_jax.compilation import prepare_jax

    prepare_jax("float64" if dtype == "float64" else "float32")
    from almlip_jax.potential import Potential

    return Potential.load(path, types)


def _of_pool(name: str, summary: PoolSummary) -> str:
    """Mean of a score, where it has one, its largest value and the frame of that."""
    largest, frame = summary.largest[name]
    most = f"largest {with_unit(_number(largest), name)} (frame {frame})"
    return f"{with_unit(_number(summary.mean[name]), name)}, {most}" if name in summary.mean else most


def _as_remembered(reading: FileReading, potential: Any, path: Path) -> FileReading:
    """How files are read that go with a potential: types that are not given are those that it remembers.

    Says so where the order that is given is another one, in which elements would change places without a word.
    """
    from almlip_jax.potential.file_types import noted_file_types

    remembered = noted_file_types(potential.metadata).symbols
    if reading.types is None:
        return reading.model_copy(update={"types": remembered or None})
    both = min(len(remembered), len(reading.types))
    if tuple(reading.types)[:both] != remembered[:both]:
        console.print(
            f"types are taken for {', '.join(reading.types)}; those of the files of {path} are {', '.join(remembered)}",
            markup=False,
            highlight=False,
        )
    return reading


def _load_folder(path: Path) -> Any:
    """As `_load`, for commands that read no types."""
    if path.is_file():
        raise InputError(
            f"{path} is no folder of a potential; of an .mtp file one is made by: almlip convert {path} FOLDER --types "
            "Si,O."
        )
    return _load(path)


def _show(content: RenderableType) -> None:
    """Writes tables: whole words in a terminal however narrow, and as wide as they are into files and pipes."""
    _fold(content)
    console.print(content, width=Measurement.get(console, console.options, content).maximum)


def _fold(content: RenderableType) -> None:
    """Continues what does not fit on the next line instead of cutting it off."""
    if isinstance(content, Table):
        for column in content.columns:
            column.overflow = "fold"
    elif isinstance(content, Panel):
        content.expand = False
        _fold(content.renderable)
    elif isinstance(content, Group):
        for part in content.renderables:
            _fold(part)


def _print_pairs(title: str, rows: Mapping[str, str]) -> None:
    table = Table(title=title, show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    _show(table)


def _number(value: float) -> str:
    return "-" if isinstance(value, float) and math.isnan(value) else f"{value:.4g}"


def _write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    from almlip_jax.files import write_json

    if path is not None:
        write_json(path, content)


def _say_left_out(names: Sequence[str]) -> None:
    """Names what the format of a file that was written has no place for."""
    if names:
        _complain(f"left out, as the format has no place for it: {', '.join(names)}")


def _complain(sentence: str) -> None:
    Console(stderr=True, highlight=False, soft_wrap=True).print(sentence, markup=False)


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
        _complain(f"almlip: {_of_system(error) if isinstance(error, OSError) else error}")
        sys.exit(1)
    except KeyboardInterrupt as stop:
        _complain("almlip: interrupted")
        sys.exit(exit_status(stop))


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """What this package warns of is told as a sentence, without the lines of its source that it comes from."""
    usual, here = warnings.formatwarning, str(Path(__file__).parent)

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


if __name__ == "__main__":
    from almlip_jax.__main__ import main as start

    start()
