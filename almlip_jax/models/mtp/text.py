"""Files of moment tensor potentials (``.mtp``, format 1.1.0), read and written.

The first line is ``MTP``.  Then come lines ``key = value``; between those that say what the radial functions are made
of and those of the basis the radial coefficients, for each ordered pair of types a line ``i-j`` and one line in braces
for each radial function.  A template, which has not been trained, lacks scaling and coefficients.  Both ``.._coeffs``
and ``.._coefs`` are read, and the former is written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from almlip_jax.errors import InputError
from almlip_jax.files import replacing
from almlip_jax.models.mtp.basis import Basis, basis
from almlip_jax.models.mtp.contractions import factors_of, tree
from almlip_jax.models.mtp.moments import RadialBasis

_VERSION, _RADIAL_TYPE = "1.1.0", "RBChebyshev"
_SPELLINGS = {f"{name}_coefs": f"{name}_coeffs" for name in ("radial", "species", "moment")}
_KEYS = {
    "version",
    "potential_name",
    "scaling",
    "species_count",
    "potential_tag",
    "radial_basis_type",
    "min_dist",
    "max_dist",
    "radial_basis_size",
    "radial_funcs_count",
    "radial_coeffs",
    "alpha_moments_count",
    "alpha_index_basic_count",
    "alpha_index_basic",
    "alpha_index_times_count",
    "alpha_index_times",
    "alpha_scalar_moments",
    "alpha_moment_mapping",
    "species_coeffs",
    "moment_coeffs",
}
_INTEGERS = {"alpha_index_basic": 4, "alpha_index_times": 4, "alpha_moment_mapping": 1}  # numbers in a row of each
_PAIR = re.compile(r"(\d+)\s*-\s*(\d+)")
_MTP = "MTP"
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Trained:
    """What a training gives.

    Attributes:
        radial: [Z, Z, mu, R] coefficients, of a central type and that of a neighbour.
        species: [Z] eV.
        moment: [S] eV.
    """

    radial: np.ndarray
    species: np.ndarray
    moment: np.ndarray


@dataclass(frozen=True, eq=False)
class MtpText:
    """What a file holds.

    Attributes:
        basis: moments, products and scalars as they stand there.
        radial_basis: what radial functions are made of.
        types: number of types.
        scaling: factor of all radial functions; templates may have none.
        trained: None of a template.
        name: of the potential.
        tag: free text.
    """

    basis: Basis
    radial_basis: RadialBasis
    types: int = 1
    scaling: float | None = None
    trained: Trained | None = None
    name: str = "MTP"
    tag: str = ""

    def __str__(self) -> str:
        found, radial, trained = self.basis, self.radial_basis, self.trained
        head = {"version": _VERSION, "potential_name": self.name}
        if self.scaling is not None:
            head["scaling"] = _number(self.scaling)
        head |= {"species_count": str(self.types), "potential_tag": self.tag, "radial_basis_type": _RADIAL_TYPE}
        lines = [_MTP, *(f"{key} = {value}" for key, value in head.items())]
        lines += [f"\tmin_dist = {_number(radial.min_dist)}", f"\tmax_dist = {_number(radial.max_dist)}"]
        lines += [f"\tradial_basis_size = {radial.size}", f"\tradial_funcs_count = {found.radial_functions}"]
        if trained is not None:
            lines += ["\tradial_coeffs", *_radial_lines(trained.radial)]
        body = {
            "alpha_moments_count": found.size,
            "alpha_index_basic_count": len(found.moments),
            "alpha_index_basic": _listed(found.moments),
            "alpha_index_times_count": len(found.products),
            "alpha_index_times": _listed(found.products),
            "alpha_scalar_moments": len(found.scalars),
            "alpha_moment_mapping": _listed(found.scalars),
        }
        lines += [f"{key} = {value}" for key, value in body.items()]
        if trained is not None:
            lines += [f"species_coeffs = {_row(trained.species)}", f"moment_coeffs = {_row(trained.moment)}"]
        return "\n".join(lines) + "\n"

    def write(self, path: Path | str) -> None:
        """Writes it; the file appears complete or not at all.

        Raises:
            InputError: it cannot be written.
        """
        with replacing(Path(path)) as building:
            building.write_text(str(self), encoding="utf-8", newline="\n")


def template(level: int, radial_size: int = 8, distances: tuple[float, float] = (2.0, 5.0)) -> str:
    """An untrained potential of one species, with radial functions of `radial_size` Chebyshev polynomials."""
    return str(MtpText(basis(level), RadialBasis(radial_size, *distances), scaling=0.01, name=f"MTP_L{level}"))


def _number(value: float) -> str:
    return repr(float(value))  # every digit


def _row(values: np.ndarray) -> str:
    return "{" + ", ".join(_number(value) for value in values.tolist()) + "}"


def _radial_lines(radial: np.ndarray) -> Iterator[str]:
    for i, of_central in enumerate(radial):
        for j, of_pair in enumerate(of_central):
            yield f"\t\t{i}-{j}"
            yield from (f"\t\t\t{_row(row)}" for row in of_pair)


def _listed(values: Any) -> str:
    """Integers or rows of them in braces."""
    rows = ("{" + ", ".join(map(str, row)) + "}" if isinstance(row, tuple) else str(row) for row in values)
    return "{" + ", ".join(rows) + "}"


def is_mtp(path: Path) -> bool:
    """Whether a file begins as those of moment tensor potentials do."""
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").split(maxsplit=1)[:1] == [_MTP.encode()]


def read_mtp(path: Path | str) -> MtpText:
    """Reads a file.

    Raises:
        InputError: it cannot be read; file, key and what is wrong with it are named.
    """
    path = Path(path)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path} cannot be read ({reason}); correct the path or the file.") from error
    try:
        return _Entries.of(lines).text()
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


@dataclass(frozen=True)
class _Entries:
    """The entries of a file: text by key, and rows of radial coefficients by pair of types."""

    values: dict[str, str]
    radial: dict[tuple[int, int], list[list[float]]]

    @classmethod
    def of(cls, lines: list[str]) -> _Entries:
        """Entries of the lines of a file."""
        stripped = [line.strip() for line in lines]
        if not stripped or stripped[0] != _MTP:
            raise InputError("it is no moment tensor potential, whose first line is MTP.")
        values: dict[str, str] = {}
        radial: dict[tuple[int, int], list[list[float]]] = {}
        rows: list[list[float]] | None = None
        for line in stripped[1:]:
            pair = _PAIR.fullmatch(line)
            if not line:
                continue
            if pair is not None and "radial_coeffs" in values:
                rows = radial.setdefault((int(pair[1]), int(pair[2])), [])
            elif line.startswith("{") and rows is not None:
                rows.append(_floats("radial_coeffs", line))
            else:
                rows = None
                key, _, value = (part.strip() for part in line.partition("="))
                key = _SPELLINGS.get(key, key)
                if key not in _KEYS:
                    raise InputError(f"the line '{line[:60]}' is not understood; remove or correct it.")
                if key in values:
                    raise InputError(f"{key} comes twice; remove one.")
                values[key] = value
        return cls(values, radial)

    def text(self) -> MtpText:
        """What the entries say."""
        for key, known in (("version", _VERSION), ("radial_basis_type", _RADIAL_TYPE)):
            if self._needed(key) != known:
                raise InputError(f"{key} is {self.values[key]}, but only {known} is read.")
        low, high = self._number("min_dist", float), self._number("max_dist", float)
        if not 0 <= low < high:
            raise InputError(f"min_dist {low:g} and max_dist {high:g} are no interval of distances; correct them.")
        found, size, types = self._basis(), self._number("radial_basis_size", int), self._number("species_count", int)
        if size < 1 or types < 1:
            raise InputError("radial_basis_size and species_count should be at least 1; correct them.")
        if self._number("radial_funcs_count", int) < found.radial_functions:
            raise InputError(f"alpha_index_basic takes {found.radial_functions} radial functions, more than there are.")
        trained = self._trained(found, types, size)
        scaling = self._number("scaling", float) if "scaling" in self.values else None
        if scaling is not None and not 0 < scaling < np.inf:
            raise InputError(f"scaling is {scaling:g}, but should be greater than 0; correct it.")
        name, tag = self.values.get("potential_name", ""), self.values.get("potential_tag", "")
        return MtpText(found, RadialBasis(size, low, high), types, scaling, trained, name, tag)

    def _needed(self, key: str) -> str:
        if key not in self.values:
            raise InputError(f"it has no {key}; add it.")
        return self.values[key]

    def _number(self, key: str, kind: Callable[[str], T]) -> T:
        try:
            return kind(self._needed(key))
        except ValueError as error:
            raise InputError(f"{key} is '{self.values[key]}', which is no such number; correct it.") from error

    def _basis(self) -> Basis:
        moments, products, mapping = (self._integers(key) for key in _INTEGERS)  # as wide as is said there
        found = Basis(tuple(moments), tuple(products), tuple(one[0] for one in mapping))
        if not found.moments or not found.scalars or len(set(found.moments)) < len(moments):
            raise InputError("alpha_index_basic or alpha_moment_mapping is empty, or has an entry twice.")
        if min(map(min, moments)) < 0:
            raise InputError("alpha_index_basic has a negative number; correct it.")
        said = {
            "alpha_moments_count": found.size,
            "alpha_index_basic_count": len(moments),
            "alpha_index_times_count": len(products),
            "alpha_scalar_moments": len(mapping),
        }
        for key, number in said.items():
            if self._number(key, int) != number:
                raise InputError(f"{key} is {self.values[key]}, but the lists have {number}; correct one of them.")
        tree(found), factors_of(found)
        return found

    def _integers(self, key: str) -> list[Any]:
        """Rows of integers in nested braces."""
        text, width = self._needed(key), _INTEGERS[key]
        plain = text.replace("{", " ").replace("}", " ").replace(",", " ").split()
        try:
            numbers = [int(word) for word in plain]
        except ValueError as error:
            raise InputError(f"{key} should hold whole numbers ({error}); correct it.") from error
        if len(numbers) % width or text.count("{") != text.count("}"):
            raise InputError(f"{key} should be a list of {width} whole numbers each; correct it.")
        return [tuple(numbers[at : at + width]) for at in range(0, len(numbers), width)]

    def _trained(self, found: Basis, types: int, size: int) -> Trained | None:
        """Scaling and coefficients; None where none of them is there."""
        keys = ("scaling", "radial_coeffs", "species_coeffs", "moment_coeffs")
        there = [key for key in keys[1:] if key in self.values]
        if not there:
            return None
        absent = [key for key in keys if key not in self.values]
        if absent:
            raise InputError(f"it has {there[0]}, but no {absent[0]}: neither a template nor a trained potential.")
        functions = self._number("radial_funcs_count", int)
        radial = np.zeros((types, types, functions, size))
        if sorted(self.radial) != [(i, j) for i in range(types) for j in range(types)]:
            raise InputError(f"radial_coeffs should have a part i-j for each of the {types}^2 pairs of types.")
        for (i, j), rows in self.radial.items():
            if [len(row) for row in rows] != [size] * functions:
                raise InputError(f"radial_coeffs of {i}-{j} should be {functions} rows of {size} numbers.")
            radial[i, j] = rows
        species, moment = (np.array(_floats(key, self.values[key])) for key in keys[2:])
        if len(species) != types or len(moment) != len(found.scalars):
            raise InputError(
                f"species_coeffs and moment_coeffs should have {types} and {len(found.scalars)} numbers, not "
                f"{len(species)} and {len(moment)}."
            )
        if not all(np.all(np.isfinite(one)) for one in (radial, species, moment)):
            raise InputError("a coefficient is not finite; correct it.")
        return Trained(radial[:, :, : found.radial_functions], species, moment)


def _floats(key: str, text: str) -> list[float]:
    """Numbers in braces."""
    try:
        return [float(word) for word in text.removeprefix("{").removesuffix("}").split(",")]
    except ValueError as error:
        raise InputError(f"{key} should be numbers in braces, with commas ({error}); correct it.") from error
