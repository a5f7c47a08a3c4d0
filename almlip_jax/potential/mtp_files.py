"""Moment tensor potentials of files (``.mtp``) as potentials, and members of potentials as such files.

A file knows types, of which a table of elements says what they are; a potential sorts its elements.  Energies of a file
are whole: the reference energies of a potential are part of its ``species_coeffs``, and these become reference energies
again, so that large constants cost no digits, and a training of other elements leaves them alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ase.data import chemical_symbols

from almlip_jax.ensembles import Ensemble, EnsembleSettings
from almlip_jax.errors import InputError
from almlip_jax.models import Anchored, Mtp, MtpSettings
from almlip_jax.models.anchored import binding_of
from almlip_jax.models.constants import CONSTANTS
from almlip_jax.models.mtp.model import described
from almlip_jax.models.mtp.moments import RadialBasis
from almlip_jax.models.mtp.recognised import recognised
from almlip_jax.models.mtp.text import MtpText, Trained, read_mtp
from almlip_jax.potential.file_types import FileTypes, noted_file_types
from almlip_jax.potential.potential import Potential
from almlip_jax.structures.species import SpeciesTable

_OF_MEMBERS = ("scaling", "potential_name", "potential_tag")


def settings_of(text: MtpText) -> MtpSettings:
    """Settings of the model that a file describes, but for what each member has for itself: scaling, name and tag.

    Raises:
        InputError: a number of the file is beyond what the model takes.
    """
    try:
        return MtpSettings(**{key: value for key, value in described(text).items() if key not in _OF_MEMBERS})
    except ValueError as error:
        raise InputError(f"the moment tensor potential is not one of those that are known ({error}).") from error


def load_mtp(paths: Path | str | Sequence[Path | str], numbers: Sequence[int]) -> Potential:
    """The potential of a file, or the committee of several; in float64.

    Args:
        paths: the files, each a member.
        numbers: atomic number of each type, from type 0 on; 0 for one that no atom has.  Such types, and those whose
            coefficients are all 0 (`texts_of`), are no elements of the potential, which remembers their places.

    Raises:
        InputError: a file cannot be read, is a template, or has another number of types; no type is an element; or
            files differ in more than their coefficients.
    """
    files = [paths] if isinstance(paths, str | Path) else list(paths)
    return joined_potential([read_mtp(path) for path in files], numbers, [str(path) for path in files])


def joined_potential(texts: Sequence[MtpText], numbers: Sequence[int], names: Sequence[str]) -> Potential:
    """As `load_mtp`, of what files hold; their names are for messages."""
    repeated = sorted({chemical_symbols[z] for z in numbers if z and list(numbers).count(z) > 1})
    if repeated:
        raise InputError(f"{repeated[0]} is given for two types; a potential tells its types apart by their element.")
    settings, members = settings_of(texts[0]), []
    trained = [text.trained for text in texts if text.trained is not None and text.types == len(numbers)]
    known = [z for n, z in enumerate(numbers) if z and (not trained or any(_says(one, n) for one in trained))]
    if not known:
        raise InputError(f"no type of {names[0]} is an element that the file says anything of.")
    table = SpeciesTable(tuple(sorted(known)))
    for text, name in zip(texts, names, strict=True):
        if text.trained is None:
            raise InputError(f"{name} is a template without coefficients; train with model.template: {name} instead.")
        if text.types != len(numbers):
            raise InputError(f"{name} has {text.types} types, but {len(numbers)} elements are given for them.")
        if settings_of(text) != settings:
            raise InputError(f"{name} differs from {names[0]} in more than coefficients; members do not.")
        members.append(_params(text, text.trained, [list(numbers).index(z) for z in table.numbers]))
    params = _stacked(members)
    alone = params["species"].mean(axis=0)
    params = params | {"species": params["species"] - alone}
    references = dict(zip(table.numbers, alone.tolist(), strict=True))
    types = FileTypes(tuple(numbers), tuple(text.name for text in texts), tuple(text.tag for text in texts))
    origin = {"files": [Path(name).name for name in names], **types.note()}
    return Potential(settings, table, params, references, metadata=origin, members=EnsembleSettings(size=len(members)))


def _says(trained: Trained, place: int) -> bool:
    """Whether a type has a coefficient that is not 0."""
    radial = trained.radial
    return bool(trained.species[place] or np.any(radial[place]) or np.any(radial[:, place]))


def _params(text: MtpText, trained: Trained, types: list[int]) -> dict[str, Any]:
    """Parameters of one member, whose species are these types."""
    known = recognised(text.basis)
    moment = trained.moment if known is None else trained.moment[list(known.places)]
    scaling = 1.0 if text.scaling is None else text.scaling
    constants = {"scaling": np.array(scaling), "moment_scale": np.ones(len(moment)), "last_scale": np.array(1.0)}
    radial = trained.radial[np.ix_(types, types)]
    return {"radial": radial, "moment": moment, "species": trained.species[types], CONSTANTS: constants}


def _stacked(members: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        key: _stacked([one[key] for one in members]) if key == CONSTANTS else np.stack([one[key] for one in members])
        for key in members[0]
    }


def texts_of(potential: Potential, numbers: Sequence[int] | None = None) -> list[MtpText]:
    """The members of a potential as files have them, reference energies within.

    Args:
        potential: of moment tensor potentials.
        numbers: atomic number of each type, from type 0 on, 0 for one that no atom has; `file_types` where not given.
            Coefficients of types that are no elements of the potential are 0.

    Raises:
        InputError: a member is more than a moment tensor potential, or the elements are not those of the potential.
    """
    model, ensemble = _bare_model(potential), potential.ensemble
    table = potential.species
    given = file_types(potential) if numbers is None else list(numbers)
    wanted = [z for z in given if z in table.numbers]
    if sorted(wanted) != list(table.numbers) or (numbers is not None and any(z and z not in wanted for z in given)):
        raise InputError(f"the types should be the elements {', '.join(table.symbols)} of the potential, each once.")
    places = table.index(np.array(wanted))
    at = np.flatnonzero(np.isin(given, wanted))
    references = np.array([potential.reference_energies[z] for z in wanted])
    assert isinstance(ensemble, Ensemble)
    names, own_name, own_tag = noted_file_types(potential.metadata), f"MTP_L{model.settings.level}", ""
    if isinstance(potential.settings, MtpSettings):
        own_name, own_tag = potential.settings.potential_name or own_name, potential.settings.potential_tag
    radial = RadialBasis(*model.radial_basis)
    found: list[MtpText] = []
    for n in range(ensemble.size):
        one = jax.tree.map(lambda x, n=n: np.asarray(x, np.float64)[n], potential.params)
        for moment, species in _linear(model, one, ensemble.heads.count):
            _refuse_bound(potential, one, species)
            inner = one if ensemble.heads.plain else one["model"]
            energies, radial_of = np.zeros(len(given)), np.zeros((len(given), len(given), *inner["radial"].shape[2:]))
            energies[at] = np.where(np.isin(wanted, list(potential.isolated)), 0.0, species[places]) + references
            radial_of[np.ix_(at, at)] = inner["radial"][np.ix_(places, places)]
            trained = Trained(radial_of, energies, moment)
            scaling = float(inner[CONSTANTS]["scaling"])
            name, tag = names.name(len(found), own_name), names.tag(len(found), own_tag)
            found.append(MtpText(model.basis, radial, len(given), scaling, trained, name, tag))
    return found


def file_types(potential: Potential) -> list[int]:
    """Atomic number of each type that its files are written with where no others are asked for.

    The order of `Potential.type_numbers` up to its last element: types of other elements between, and those that no
    atom has, keep their places, so that ``.cfg`` files of before fit.
    """
    numbers = potential.type_numbers
    known = [n for n, z in enumerate(numbers) if z in potential.species.numbers]
    return numbers[: known[-1] + 1]


def _refuse_bound(potential: Potential, one: dict[str, Any], species: np.ndarray) -> None:
    """Refuses a member whose atoms are bound, by what was fitted or learned, as they meet others (`Anchored`)."""
    counted = np.isin(potential.species.numbers, list(potential.isolated))
    if np.any(counted & (binding_of(one, len(potential.species)) + species != 0)):
        raise InputError(
            "the potential cannot be written as an .mtp file, since a function of its own binds its atoms to meet "
            "the energies of isolated atoms; train without these (isolated atoms among the data, and "
            "training.reference_energies)."
        )


def _bare_model(potential: Potential) -> Mtp:
    """The moment tensor potential that members are, with nothing added to it."""
    ensemble = potential.ensemble
    model = ensemble.model if isinstance(ensemble, Ensemble) else None
    inner = model.inner if isinstance(model, Anchored) else model
    if not isinstance(inner, Mtp):
        what = "a repulsion of nuclei is added to it" if potential.settings.repulsion else "it is of another kind"
        raise InputError(f"the potential cannot be written as an .mtp file, since {what}.")
    assert isinstance(ensemble, Ensemble)
    if ensemble.heads.count > 1 and len(potential.species) > 1:
        raise InputError(
            "the potential has no place in .mtp files, since the coefficients of its heads depend on the species; "
            "train an ensemble of models."
        )
    return inner


def _linear(model: Mtp, one: dict[str, Any], heads: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Moment and species coefficients of each head of a model."""
    inner = one.get("model", one)
    exact = model.coefficients(inner)
    moment, species = np.asarray(exact.moment, np.float64), np.asarray(exact.species, np.float64)
    if heads == 1:
        return [(moment, species)]
    last = one["heads"]["last"][:, 0] * one["heads"][CONSTANTS]["scale"] / one["heads"]["last"].shape[-1] ** 0.5
    scale = inner[CONSTANTS]["moment_scale"]
    return [(moment + more[: len(moment)] * scale, species + more[len(moment) :]) for more in last]


def save_mtp(potential: Potential, path: Path | str, numbers: Sequence[int] | None = None) -> list[Path]:
    """Writes the members of a potential as files; those of a committee get a number before the suffix.

    Args:
        potential: as for `texts_of`.
        path: ``pot.mtp``, or ``pot_0.mtp``, ``pot_1.mtp``, ... of a committee.
        numbers: as for `texts_of`.

    Returns:
        the files.

    Raises:
        InputError: as `texts_of`, or a file cannot be written.
    """
    texts, path = texts_of(potential, numbers), Path(path)
    several = len(texts) > 1
    paths = [path.with_stem(f"{path.stem}_{n}") if several else path for n in range(len(texts))]
    for text, one in zip(texts, paths, strict=True):
        text.write(one)
    return paths


__all__ = ["file_types", "joined_potential", "load_mtp", "save_mtp", "settings_of", "texts_of"]
