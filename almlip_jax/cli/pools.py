"""Commands that look at pools with a potential: ``score``, ``select``, ``select-add``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from almlip_jax.cli.inputs import load_reading, read_frames
from almlip_jax.cli.options import (
    ConfigFile,
    JsonFile,
    OutFile,
    PotentialPlace,
    ReadingOptions,
    ScoredFile,
    SetOption,
    TypesOption,
)
from almlip_jax.cli.output import print_pairs, rounded, say, say_left_out, show, write_result
from almlip_jax.cli.program import app
from almlip_jax.errors import InputError
from almlip_jax.places import folder_to_write
from almlip_jax.unit_names import with_unit

if TYPE_CHECKING:
    from almlip_jax.scoring import PoolSummary


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
    model, reading = load_reading(potential, ReadingOptions(types=types).reading())
    numbers = reading.arguments["type_numbers"]
    if train_file is not None:
        labelled = read_frames([train_file], reading, ignore_labels=True)
        model.check_elements(labelled, str(train_file))
        model = model.spanning(labelled, None if model.active_set is None else model.active_set.settings)
    from almlip_jax.progress import open_progress
    from almlip_jax.scoring import score_pool
    from almlip_jax.structures.io import count_structures

    total = count_structures(pool)
    with open_progress() as progress, progress.stage("score", total, unit="frames") as advance:
        summary = score_pool(model, pool, out, advance, type_numbers=numbers, labels=labels)
    say_left_out(summary.left_out)
    spread = model.ensemble.members > 1 or not model.member_settings.likelihood.silent
    shown = {name for name in summary.largest if spread or name not in summary.mean}  # else 0 everywhere
    print_pairs(
        f"{'Mean and largest scores' if spread else 'Scores'} of {summary.number} structures",
        {
            **{name: _of_pool(name, summary) for name in summary.largest if name in shown},
            **({"most uncertain frame": str(summary.most_uncertain)} if spread else {}),
            "written": str(out),
        },
    )
    scored = {"num_structures": summary.number, "mean": summary.mean, "most_uncertain": summary.most_uncertain}
    scored["largest"] = {name: {"value": value, "frame": frame} for name, (value, frame) in summary.largest.items()}
    write_result(json_file, {**scored, "out": str(out)})


def _of_pool(name: str, summary: PoolSummary) -> str:
    """Mean of a score, where it has one, its largest value and the frame of that."""
    largest, frame = summary.largest[name]
    most = f"largest {with_unit(rounded(largest), name)} (frame {frame})"
    return f"{with_unit(rounded(summary.mean[name]), name)}, {most}" if name in summary.mean else most


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
    model, reading = load_reading(potential, ReadingOptions(types=types).reading(settings.system))
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
        in_their_states(read_frames([file], reading, ignore_labels=True), settings.system)
        for file in (pool, train_file)
    )
    model.check_elements(frames, str(pool))
    model.check_elements(labelled, str(train_file))
    batch = chosen(selector, model, frames, labelled, min(k, len(frames)), seed=settings.seed)
    found = [(frame.info["pool_index"], frame.info["gain"]) for frame in batch]
    say_left_out(write_structures(out, batch, type_numbers=reading.arguments["type_numbers"] or model.type_numbers))
    table = Table("pool index", "gain", title=f"{len(batch)} of {len(frames)} by {selector.kind}")
    for index, gain in found[:20]:
        table.add_row(str(index), rounded(gain))
    show(table)
    if (remark := undecided([gain for _, gain in found], len(frames))) is not None:
        say(remark)
    write_result(json_file, {"indices": [i for i, _ in found], "gain": [g for _, g in found], "out": str(out)})


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
    model, reading = load_reading(potential, ReadingOptions(types=types).reading())
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
    frames = read_frames([pool], reading, ignore_labels=True)
    labelled = [] if train_file is None else read_frames([train_file], reading, ignore_labels=True)
    model.check_elements(frames, str(pool))
    model.check_elements(labelled, str(train_file))
    batch, grown = offered(model, frames, labelled)
    say_left_out(write_structures(out, batch, type_numbers=reading.arguments["type_numbers"] or model.type_numbers))
    if save is not None:
        grown.save(save)
    table = Table("pool index", MV_GRADE, title=f"{len(batch)} of {len(frames)} enter the active set")
    for frame in batch[:20]:
        table.add_row(str(frame.info["pool_index"]), rounded(frame.info[MV_GRADE]))
    show(table)
    found = {"indices": [frame.info["pool_index"] for frame in batch], "grades": [f.info[MV_GRADE] for f in batch]}
    write_result(json_file, {**found, "out": str(out), "potential": None if save is None else str(save)})
