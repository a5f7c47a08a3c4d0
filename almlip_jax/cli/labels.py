"""Commands that make structures and label them: ``generate``, ``label``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from almlip_jax.cli.inputs import with_types
from almlip_jax.cli.options import ConfigFile, DbFile, JsonFile, OptionalOutFile, OutFile, SetOption, TypesOption
from almlip_jax.cli.output import complain, print_pairs, rounded, say, say_left_out, write_result
from almlip_jax.cli.program import app
from almlip_jax.errors import InputError, LabelError

if TYPE_CHECKING:
    from ase import Atoms

    from almlip_jax.campaign.config import LabelConfig
    from almlip_jax.oracles import LabelResult


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

    settings = with_types(load_config(config, overrides or []), types)
    if not settings.initial.generated:
        raise InputError(f"{config} says nothing in initial.generated; name what is to be made there.")
    inputs = Inputs(settings)
    made = inputs.generated_to_label
    for left_out in inputs.left_out(settings.initial.generated):
        say(left_out)
    frames = []
    for kind, some in made.items():
        for frame in some:
            frame.info["generator"] = kind
            frames.append(frame)
    say_left_out(write_structures(out, frames, type_numbers=settings.system.arguments["type_numbers"]))
    counts = {kind: len(some) for kind, some in made.items()}
    print_pairs("Generated structures", {kind: str(count) for kind, count in counts.items()} | {"written": str(out)})
    write_result(json_file, {"num_structures": len(frames), "by_kind": counts, "out": str(out)})


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
    from almlip_jax.structures.io import require_place, write_structures
    from almlip_jax.structures.labels import LABEL_ERROR

    settings = with_types(load_settings(LabelConfig, config, overrides or []), types)
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
    results = _labels(settings, frames, store_path, retry)
    failed = [(n, result.error) for n, result in enumerate(results) if result.atoms is None]
    for number, error in failed:
        frames[number].info[LABEL_ERROR] = error
    pairs = zip(results, frames, strict=True)
    written = [frame if result.atoms is None else result.atoms for result, frame in pairs]
    say_left_out(write_structures(out, written, type_numbers=settings.system.arguments["type_numbers"]))
    rows = {
        "labelled": len(frames) - len(failed),
        "failed": len(failed),
        "taken from the store": sum(r.cached for r in results),
    }
    print_pairs("Labels", {**{name: str(value) for name, value in rows.items()}, "store": str(store_path)})
    write_result(json_file, {**rows, "failures": failed, "out": str(out), "store": str(store_path)})
    if failed:
        number, reason = failed[0]
        earlier = sum(results[n].cached for n, _ in failed)
        again = f" ({earlier} of them in an earlier call; --retry tries these again)" if earlier else ""
        raise LabelError(f"{len(failed)} of {len(frames)} labels failed{again}; frame {number}: {reason}")


def _labels(settings: LabelConfig, frames: list[Atoms], store_path: Path, retry: bool) -> list[LabelResult]:
    """The labels of all frames; those that are made elsewhere and have not arrived end the command."""
    from almlip_jax.oracles import Labeller, LabelStore, PendingLabels
    from almlip_jax.progress import open_progress

    provenance = {"purpose": "label", "campaign": settings.name}
    with LabelStore(store_path) as store, Labeller(settings.oracle, store, settings.executor) as labeller:
        try:
            with open_progress() as progress, progress.stage("label", len(frames), unit="labels") as advance:
                return labeller.label(frames, provenance, on_label=lambda _: advance(1), retry=retry)
        except PendingLabels as pending:
            complain(str(pending))
            raise typer.Exit(3) from None


def _show_first_label(settings: LabelConfig, frames: list[Atoms], dry_run: bool, json_file: Path | None) -> None:
    """What the first structure's label would take, or whether its forces and stress are derivatives of its energy."""
    from almlip_jax.oracles.base import bare
    from almlip_jax.oracles.finite_differences import check_derivatives

    if dry_run:
        text = settings.oracle.preview(bare(frames[0]))
        sys.stdout.write(text + "\n")
        write_result(json_file, {"preview": text})
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
    print_pairs(heading, {"energy": f"{energy:.6f} eV", **rows, "seconds": rounded(found.seconds)})
    told = {name: [asdict(one) for one in getattr(found, name)] for name in ("compared", "stresses")}
    write_result(json_file, {"energy": energy, **told, "agrees": found.agrees, "seconds": found.seconds})
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
