"""Arguments and options that several commands have."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from almlip_jax.errors import InputError
from almlip_jax.places import file_to_write, folder_to_write

if TYPE_CHECKING:
    from almlip_jax.structures.labels import FileReading

_DRAWN = (".png", ".pdf", ".svg")  # endings of figures


def _structures_to_write(path: Path | None) -> Path | None:
    """A file that structures can be written to, or none."""
    from almlip_jax.structures.io import require_format

    if path is not None:
        require_format(path)
    return file_to_write(path)


def frames_to_add_to(path: Path | None) -> Path | None:
    """A file that frames can be added to one by one, or none."""
    from almlip_jax.structures.io import require_xyz

    if path is not None:
        require_xyz(path)
    return file_to_write(path)


def _figure_to_write(path: Path | None) -> Path | None:
    """A file that a figure can be drawn into, or none."""
    if path is not None and path.suffix.lower() not in _DRAWN:
        raise InputError(f"{path} should end in {', '.join(_DRAWN[:-1])} or {_DRAWN[-1]}, which says its format.")
    return file_to_write(path)


def _database_to_write(path: Path | None) -> Path | None:
    """The same, which may be an ASE database."""
    from almlip_jax.structures.io import require_format

    if path is not None:
        require_format(path, databases=True)
    return file_to_write(path)


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
PredictionsFile = Annotated[
    Path | None,
    typer.Option(
        callback=_structures_to_write,
        help="Also write the frames with labels, predictions and uncertainties (extxyz or cfg).",
    ),
]
FigureFile = Annotated[
    Path | None, typer.Option("--figure", callback=_figure_to_write, help="PNG, PDF or SVG file to draw into.")
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
class ReadingOptions:
    """Options that say how files of structures are read; `with_reading_options` gives them to a command."""

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
        options = {name: f"--{name}-key" for name in ("energy", "forces", "stress", "virial")}
        options["stress_unit"] = "--stress-unit"
        for name, key in others.items():
            if name in options:
                raise InputError(f"--label-key {name}={key} should be {options[name]} {key}, an option of its own.")
            if not key:
                raise InputError(f"--label-key {name} names no key; give it as dipole=mu.")
        given = FileReading(types=None if self.types is None else parse_types(self.types))
        return given.otherwise(FileReading() if base is None else base).with_keys(
            energy=self.energy_key,
            forces=self.forces_key,
            stress=self.stress_key,
            virial=self.virial_key,
            stress_unit=self.stress_unit,
            **others,
        )


def with_reading_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command with the options of `ReadingOptions` where it takes them together, as ``files``."""
    own = inspect.signature(command, eval_str=True).parameters.items()
    shared = inspect.signature(ReadingOptions, eval_str=True).parameters

    @functools.wraps(command)
    def gathering(**given: Any) -> None:
        files = ReadingOptions(**{name: given.pop(name) for name in shared})
        command(**given, files=files)

    parameters = [one for name, given in own for one in (shared.values() if name == "files" else (given,))]
    keywords = [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in parameters]
    gathering.__signature__ = inspect.Signature(keywords)  # type: ignore[attr-defined]
    return gathering
