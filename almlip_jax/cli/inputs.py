"""What commands read: structures, potentials, and configs with types."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from almlip_jax.cli.output import say
from almlip_jax.errors import InputError

if TYPE_CHECKING:
    from ase import Atoms

    from almlip_jax.campaign.config import ExperimentConfig, LabelConfig
    from almlip_jax.structures.labels import FileReading


def read_frames(
    files: Sequence[Path], reading: FileReading, *, require_labels: bool = False, ignore_labels: bool = False
) -> list[Atoms]:
    """Structures of files that are read as was said."""
    from almlip_jax.structures.io import read_structures

    arguments = reading.arguments
    return read_structures(files, require_labels=require_labels, ignore_labels=ignore_labels, **arguments)


def load_potential(path: Path, types: Sequence[str] | None = None) -> Any:
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


def as_remembered(reading: FileReading, potential: Any, path: Path) -> FileReading:
    """How files are read that go with a potential: types that are not given are those that it remembers.

    Says so where the order that is given is another one, in which elements would change places without a word.
    """
    from almlip_jax.potential.file_types import noted_file_types

    remembered = noted_file_types(potential.metadata).symbols
    if reading.types is None:
        return reading.model_copy(update={"types": remembered or None})
    both = min(len(remembered), len(reading.types))
    if tuple(reading.types)[:both] != remembered[:both]:
        say(f"types are taken for {', '.join(reading.types)}; those of the files of {path} are {', '.join(remembered)}")
    return reading


def load_reading(path: Path, reading: FileReading) -> tuple[Any, FileReading]:
    """The potential at a place, and how files are read that go with it; see `load_potential`, `as_remembered`."""
    potential = load_potential(path, reading.types)
    return potential, as_remembered(reading, potential, path)


def load_folder(path: Path) -> Any:
    """As `load_potential`, for commands that read no types."""
    if path.is_file():
        raise InputError(
            f"{path} is no folder of a potential; of an .mtp file one is made by: almlip convert {path} FOLDER --types "
            "Si,O."
        )
    return load_potential(path)


def is_mtp_file(path: Path) -> bool:
    """Whether a path is a potential in MLIP-2's format."""
    from almlip_jax.models.mtp.text import is_mtp

    return path.is_file() and is_mtp(path)


_Typed = TypeVar("_Typed", "ExperimentConfig", "LabelConfig")


def with_types(settings: _Typed, types: str | None) -> _Typed:
    """The settings with the types of an option, where it was given."""
    from almlip_jax.structures.labels import parse_types

    if types is None:
        return settings
    return settings.model_copy(update={"system": settings.system.model_copy(update={"types": parse_types(types)})})
