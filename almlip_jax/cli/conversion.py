"""Commands that write for other software: ``convert``, ``export``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from almlip_jax.cli.inputs import is_mtp_file, load_folder
from almlip_jax.cli.options import JsonFile, PotentialFolder, ReadingOptions, TypesOption, with_reading_options
from almlip_jax.cli.output import print_pairs, say, say_left_out, write_result
from almlip_jax.cli.program import app
from almlip_jax.errors import InputError
from almlip_jax.places import file_to_write

if TYPE_CHECKING:
    from ase import Atoms

    from almlip_jax.potential import Potential


@app.command()
@with_reading_options
def convert(
    source: Annotated[Path, typer.Argument(metavar="IN", help="Structures in any format that is read; a potential.")],
    target: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="File to write: .extxyz, .xyz, .cfg or .db; a potential: .mtp, or folder."),
    ],
    *,
    files: ReadingOptions,
    json_file: JsonFile = None,
) -> None:
    """Write structures in another format (extended XYZ, MLIP-2 cfg, ASE database), or a potential from or to .mtp."""
    if source.is_dir() or target.suffix == ".mtp" or is_mtp_file(source):
        _convert_potential(source, target, files.reading().types, json_file)
        return
    from almlip_jax.structures import convert as conversion

    reading = files.reading()
    converted = conversion.convert(source, target, reading)
    rows = {"structures": str(converted.number), "written": str(target)}
    rows |= {"types from 0 on": ", ".join(converted.types)} if converted.types else {}
    rows |= {"left out": ", ".join(converted.left_out)} if converted.left_out else {}
    print_pairs("Conversion", rows)
    summary = {"structures": converted.number, "types": list(converted.types), "left_out": list(converted.left_out)}
    write_result(json_file, {**summary, "out": str(target)})


def _convert_potential(source: Path, target: Path, types: tuple[str, ...] | None, json_file: Path | None) -> None:
    from almlip_jax.structures.labels import required_types, type_numbers

    if source.is_dir():
        potential = load_folder(source)
        from ase.data import chemical_symbols

        from almlip_jax.potential.mtp_files import file_types, save_mtp

        if target.suffix != ".mtp":
            raise InputError(f"{target} should end in .mtp, the format that a potential is converted to.")
        written = save_mtp(potential, target, None if types is None else type_numbers(types))
        symbols = tuple(chemical_symbols[z] for z in file_types(potential)) if types is None else types
        if empty := [one for one in symbols if one not in potential.species.symbols]:
            told = f"of {', '.join(empty)} the potential knows nothing: coefficients of these types are 0 in the file."
            say(told)
    elif not is_mtp_file(source):
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
    print_pairs("Conversion", rows)
    write_result(json_file, {"types": list(symbols), "out": [str(path) for path in written]})


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
    others, owner = (of_lammps, "--lammps-jax") if stablehlo else ({"neighbors": neighbors}, "--stablehlo")
    if wrong := [name for name, value in others.items() if value is not None]:
        raise InputError(f"--{wrong[0]} belongs to {owner}; leave it out.")
    if out.exists() and like.exists() and out.samefile(like):
        raise InputError(f"{out} is read; give another file to write.")
    names = None if platforms is None else platforms.split(",")
    numbers = ReadingOptions(types=types).reading().arguments["type_numbers"]
    model = load_folder(potential)
    from almlip_jax.structures.io import read_structures

    structures = read_structures(like, ignore_labels=True, type_numbers=numbers)
    if stablehlo:
        from almlip_jax.interfaces.stablehlo import PLATFORMS, export_stablehlo, left_out

        room = {"atoms": atoms, "neighbors": neighbors}
        about = export_stablehlo(model, out, structures, **room, precision=precision, platforms=names or PLATFORMS)
        told = {key: about[key] for key in ("format", "precision", "atoms", "neighbors", "edges")}
        told["programs"] = ", ".join(about["programs"])
        say_left_out(left_out(model))
    else:
        told = _bundle(model, out, structures, of_lammps, names, atoms=atoms, precision=precision)
    print_pairs("Exported", {"written": str(out), **{key: str(value) for key, value in told.items()}})
    write_result(json_file, {"out": str(out), **told})


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
