"""What a saved potential says without being loaded: elements, electronic states, and a digest of what it is.

It is a folder that `Potential.save` wrote, or a file of MLIP-2 (``.mtp``), whose types are given beside it.

Needs no jax, so that label sources and campaigns can ask before anything is computed.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from ase.data import atomic_numbers

from almlip_jax.errors import InputError

DESCRIPTION = "potential.json"
"""The file of a potential that is there to be read."""
PARAMS = "params"
"""Key of the folder that holds the parameters; a hash of them is part of its name."""
REMEMBERED = "remembered"
"""Key of the file that holds remembered structures; a hash of its content is part of its name."""

_PREDICTS = ("model", "species", "ensemble", "dtype", "reference_energies", "isolated_atoms", PARAMS)
"""Keys of a description that decide what a potential predicts."""


@dataclass(frozen=True)
class SavedPotential:
    """The description of a potential.

    Attributes:
        folder: where it is.
        content: what `Potential.save` wrote.
    """

    folder: Path
    content: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path | str, types: Sequence[str] | None = None) -> SavedPotential:
        """The description in a folder, or what a file of MLIP-2 says.

        Args:
            folder: the folder, or the file.
            types: element of each type of a file, from type 0 on; not looked at for a folder.

        Raises:
            InputError: there is none, or it is damaged; or the types of a file are not known.
        """
        place = Path(folder)
        if place.is_file():
            return SavedMtp.of(place, types)
        try:
            return _read(place, (place / DESCRIPTION).stat().st_mtime_ns)
        except OSError as error:
            raise InputError(f"{place} is not a potential: it has no {DESCRIPTION}.") from error

    @property
    def model(self) -> Mapping[str, Any]:
        """Settings of its architecture."""
        return dict(self.content["model"])

    @property
    def ensemble(self) -> Mapping[str, Any]:
        """Settings of its members."""
        return dict(self.content["ensemble"])

    def holds(self, params_digest: str) -> bool:
        """Whether parameters with this digest are those that belong there."""
        return str(self.content[PARAMS]).endswith(params_digest)

    @property
    def numbers(self) -> frozenset[int]:
        """Atomic numbers of the elements that it knows."""
        return frozenset(atomic_numbers[symbol] for symbol in self.content["species"])

    @property
    def precision(self) -> str:
        """``float32`` or ``float64``."""
        return str(self.content["dtype"])

    @property
    def remembered(self) -> Path | None:
        """The file of the structures that it remembers; None where there is none."""
        name = self.content.get(REMEMBERED)
        place = None if name is None else self.folder / Path(name).name
        return place if place is not None and place.exists() else None

    @property
    def states(self) -> frozenset[tuple[int, int]] | None:
        """Charges and multiplicities that it tells apart and has learned of; None where it tells none apart."""
        noted = self.content["metadata"].get("states")
        return None if noted is None else frozenset((int(charge), int(spin)) for charge, spin in noted)

    @property
    def states_met(self) -> frozenset[tuple[int, int]]:
        """Charges and multiplicities that one which tells none apart was trained on; none where nothing is known."""
        return frozenset((int(charge), int(spin)) for charge, spin in self.content["metadata"].get("states_met", ()))

    def digest(self, *, training: bool = False) -> str:
        """SHA-256 of all that its predictions depend on.

        Args:
            training: of all that a training which begins with it depends on, its remembered structures too.
        """
        said: dict[str, Any] = {key: self.content[key] for key in _PREDICTS}
        if training:
            kept = self.remembered
            said |= {REMEMBERED: None if kept is None else kept.name, "states": self.content["metadata"].get("states")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


class SavedMtp(SavedPotential):
    """A file of MLIP-2; what it is follows from its content and from the elements of its types."""

    @classmethod
    def of(cls, path: Path, types: Sequence[str] | None) -> SavedMtp:
        """What a file says, as `SavedPotential.read` gives it."""
        from almlip_jax.structures.labels import required_types  # reads settings, which few others need

        try:
            text = path.read_bytes()
        except OSError as error:
            raise InputError(f"{path} cannot be read: {error.strerror}.") from error
        if text.removeprefix(b"\xef\xbb\xbf").split(maxsplit=1)[:1] != [b"MTP"]:
            raise InputError(f"{path} is no potential: neither a folder of one nor an .mtp file.")
        numbers = required_types(path, types)
        count = re.search(rb"^\s*species_count\s*=\s*(\d+)", text, re.MULTILINE)
        if count is not None and int(count[1]) != len(numbers):
            raise InputError(f"{path} has {int(count[1])} types, but {len(numbers)} elements are given for them.")
        known = sorted((one for one in types or () if atomic_numbers[one]), key=atomic_numbers.__getitem__)
        said = {PARAMS: hashlib.sha256(text).hexdigest(), "types": list(types or ()), "dtype": "float64"}
        return cls(path, {**said, "species": known, "metadata": {}})

    @property
    def model(self) -> Mapping[str, Any]:
        """Settings of its architecture; needs jax."""
        from almlip_jax.models.mtp.text import read_mtp
        from almlip_jax.potential.mtp_files import settings_of

        return settings_of(read_mtp(self.folder)).model_dump(mode="json")

    @property
    def ensemble(self) -> Mapping[str, Any]:
        """It is one member."""
        return {"size": 1}

    def holds(self, params_digest: str) -> bool:
        """Whether the file is what it was when it was described: it has no other digest of parameters."""
        return hashlib.sha256(self.folder.read_bytes()).hexdigest() == self.content[PARAMS]

    def digest(self, *, training: bool = False) -> str:
        """SHA-256 of the file and of the elements of its types: all that predictions and trainings depend on."""
        said = {key: self.content[key] for key in (PARAMS, "types")}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=16)
def _read(folder: Path, written: int) -> SavedPotential:
    """Reads a description once for each time that it was written."""
    try:
        content = json.loads((folder / DESCRIPTION).read_text())
        missing = [key for key in (*_PREDICTS, "metadata") if key not in content]
    except (OSError, ValueError, TypeError) as error:
        raise InputError(f"{folder / DESCRIPTION} cannot be read ({error}); restore a copy or train again.") from error
    if missing:
        raise InputError(f"{folder / DESCRIPTION} has no '{missing[0]}'; restore a copy or train again.")
    return SavedPotential(folder, content)
