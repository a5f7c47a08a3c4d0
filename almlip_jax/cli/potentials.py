"""Commands that train a potential and compare it with labels: ``train``, ``evaluate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from almlip_jax.cli.inputs import as_remembered, is_mtp_file, load_potential, load_reading, read_frames
from almlip_jax.cli.options import (
    ConfigFile,
    JsonFile,
    PotentialPlace,
    PredictionsFile,
    ReadingOptions,
    SetOption,
    with_reading_options,
)
from almlip_jax.cli.output import print_pairs, rounded, say, say_left_out, show, write_result
from almlip_jax.cli.program import app
from almlip_jax.errors import InputError
from almlip_jax.places import folder_to_write
from almlip_jax.unit_names import with_unit

if TYPE_CHECKING:
    from ase import Atoms

    from almlip_jax.campaign.config import TrainConfig
    from almlip_jax.potential import Potential
    from almlip_jax.saved_potential import SavedPotential
    from almlip_jax.training import EpochReport, TrainingResult


@app.command()
@with_reading_options
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
    files: ReadingOptions,
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
        start = load_potential(begin, of_begin)
        reading = as_remembered(reading, start, begin)
        settings = _as_of(start, SavedPotential.read(begin, of_begin), settings)
    prepare_jax(settings.precision)
    check_place(out)
    structures = in_their_states(read_frames(data, reading, require_labels=True), settings.system)
    held_out = (
        in_their_states(read_frames(validation, reading, require_labels=True), settings.system) if validation else []
    )
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
    if types is None or not is_mtp_file(path):
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
    shown = {name: with_unit(rounded(value), name) for name, value in rows.items()}
    print_pairs("Training", {**shown, "potential": str(potential), "learning curve": str(curve)})
    write_result(json_file, {**rows, "potential": str(potential), "training": str(curve)})


@app.command()
@with_reading_options
def evaluate(
    potential: PotentialPlace,
    data: Annotated[Path, typer.Argument(help="Labelled structures.")],
    group_key: Annotated[str, typer.Option(help="Key of a frame's info that names its group.")] = "group",
    predictions: PredictionsFile = None,
    figures: Annotated[
        Path | None,
        typer.Option(callback=folder_to_write, help="Also draw parity and calibration (PDF, PNG) into this folder."),
    ] = None,
    *,
    files: ReadingOptions,
    json_file: JsonFile = None,
) -> None:
    """Compare a potential with labels: errors and calibration, of all structures, of each group and each element."""
    model, reading = load_reading(potential, files.reading())
    from almlip_jax.evaluation import error_metrics
    from almlip_jax.evaluation.tables import error_table, partly_labelled, uncertainty_table
    from almlip_jax.structures.io import require_place
    from almlip_jax.structures.labels import hint_of_keys, likely_keys

    frames = read_frames([data], reading)
    if not any(frame.calc is not None for frame in frames):
        raise InputError(
            f"{data} has no labels to compare with; label it, {hint_of_keys(frames[0])}, or write what the potential "
            "predicts with `almlip score --labels predicted`."
        )
    model.check_elements(frames, str(data))
    types = reading.arguments["type_numbers"] or model.type_numbers
    if predictions is not None:
        require_place(predictions, frames, str(data), type_numbers=types)
    evaluated = model.evaluate(frames)
    metrics = error_metrics(frames, evaluated, group_key=group_key)
    show(error_table(metrics, f"{data.name}: {len(frames)} structures"))
    for sentence in partly_labelled(metrics):
        say(sentence)
    if not metrics["num_labelled"]["forces"] and (likely := likely_keys(frames[0], "forces")):
        say(f"perhaps {', '.join(likely)} (--forces-key).")
    uncertainties = uncertainty_table(metrics)
    if uncertainties is not None:
        show(uncertainties)
    written: list[Path] = []
    if predictions is not None:
        from almlip_jax.scoring import write_predictions

        say_left_out(write_predictions(model, frames, evaluated, predictions, types))
        written.append(predictions)
    if figures is not None:
        from almlip_jax.figures.command import draw_errors

        drawn, notes = draw_errors(frames, evaluated, figures, group_key)
        written += drawn
        for note in notes:
            say(note)
    if written:
        print_pairs("Evaluation", {str(path): "written" for path in written})
    write_result(json_file, metrics | {"written": [str(path) for path in written]})
