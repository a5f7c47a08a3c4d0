"""Potentials as folders: what lies in one, written so that a kill leaves the old or the new one, and read again."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ase.data import atomic_numbers, chemical_symbols

from almlip_jax.ensembles import AnyEnsemble, EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.files import PARTIAL, cannot_write, flush_to_disk, make_folder, plain, read_npz, write_npz, write_text
from almlip_jax.models import ModelSettings, Params
from almlip_jax.models.charge_energy import CHARGE_ENERGY, with_charges_for_nothing, without_charge_energy
from almlip_jax.potential.fitted import Fitted, params_digest
from almlip_jax.saved_potential import DESCRIPTION, PARAMS, REMEMBERED
from almlip_jax.structures.extxyz_reading import read_extxyz
from almlip_jax.structures.labels import required_types
from almlip_jax.structures.remembered import as_text
from almlip_jax.structures.species import SpeciesTable

if TYPE_CHECKING:
    from almlip_jax.potential.potential import Potential

_FITTED = "fitted"  # of files that hold the arrays of what was fitted; its name and a hash of the arrays follow
_PACKAGE = "model_package"  # key of the package that adds the kind of its model
_OWN = re.compile(
    rf"{PARAMS}(-[0-9a-f]{{16}})?|{REMEMBERED}-[0-9a-f]{{16}}\.extxyz|{_FITTED}-\w+-[0-9a-f]{{16}}\.npz"
    rf"|\.({PARAMS}|{REMEMBERED}|{_FITTED}-\w+)-[0-9a-f]{{16}}\.\d+{re.escape(PARTIAL)}.*"
)
"""Names of what `Potential.save` makes next to the description, finished or not."""

_FORMAT = 4
"""Of the description; 1 had a calibration in the place of what is fitted."""


def save(potential: Potential, directory: Path | str) -> None:
    """Writes a potential as a folder; see `Potential.save`."""
    target = Path(directory).resolve()
    check_place(target)
    arrays = jax.tree.map(np.asarray, potential.params)
    place = target / f"{PARAMS}-{params_digest(arrays)}"
    make_folder(target)
    try:
        if not _holds(place, arrays):
            building = target / f".{place.name}.{os.getpid()}{PARTIAL}"
            shutil.rmtree(building, ignore_errors=True)
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(building, arrays)
            shutil.rmtree(place, ignore_errors=True)  # damaged
            building.rename(place)
            flush_to_disk(target)
    except OSError as error:
        raise cannot_write(target, error) from error
    names = {PARAMS: place.name}
    if potential.remembered:
        text = as_text(potential.remembered)
        names[REMEMBERED] = f"{REMEMBERED}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.extxyz"
        write_text(target / names[REMEMBERED], text)
    fitted = {name: _save_fitted(target, name, one) for name, one in potential.fitted.items()}
    write_text(target / DESCRIPTION, json.dumps(_description(potential, names, fitted), indent=2) + "\n")
    used = {*names.values(), *(one["file"] for one in fitted.values() if "file" in one)}
    for other in target.iterdir():  # what an older potential, or a kill, has left here
        if other.name not in used and _OWN.fullmatch(other.name):
            if other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
            else:
                other.unlink(missing_ok=True)


def _save_fitted(target: Path, name: str, one: Fitted) -> dict[str, Any]:
    """Writes the arrays of something fitted, if it has any; gives what the description holds of it."""
    arrays = dict(one.value.arrays())
    if not arrays:
        return one.description()
    file = f"{_FITTED}-{name}-{params_digest(arrays)}.npz"
    write_npz(target / file, arrays)
    return one.description() | {"file": file}


def _description(potential: Potential, names: Mapping[str, str], fitted: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "format": _FORMAT,
        **names,
        "model": potential.settings.model_dump(mode="json"),
        **({} if (package := potential.settings.package()) is None else {_PACKAGE: package}),
        "species": list(potential.species.symbols),
        "ensemble": potential.member_settings.model_dump(mode="json"),
        "dtype": str(jax.tree.leaves(potential.params)[0].dtype),
        **({CHARGE_ENERGY: True} if potential.ensemble.sees_state else {}),
        "reference_energies": {chemical_symbols[z]: e for z, e in potential.reference_energies.items()},
        "isolated_atoms": [chemical_symbols[z] for z in sorted(potential.isolated)],
        "fitted": plain(fitted),
        "versions": {name: version(name) for name in ("jax", "flax", "e3nn-jax", "orbax-checkpoint")},
        "metadata": dict(potential.metadata),
    }


def load(kind: type[Potential], directory: Path | str, types: Sequence[str] | None = None) -> Potential:
    """Reads a potential from a folder, or from a file of MLIP-2; see `Potential.load`."""
    source = Path(directory).resolve()
    if source.is_file():
        from almlip_jax.models.mtp.text import is_mtp
        from almlip_jax.potential.mtp_files import load_mtp  # makes potentials, and so imports what imports this

        if not is_mtp(source):
            raise InputError(f"{source} is no potential: neither a folder of one nor an .mtp file.")
        return load_mtp(source, required_types(source, types))
    try:
        return _read(kind, source)
    except InputError:  # one that is replaced between two looks takes its parameters with it
        return _read(kind, source)


def _read(kind: type[Potential], source: Path) -> Potential:
    try:
        text = json.loads((source / DESCRIPTION).read_text())
        _require_format(int(text["format"]))
        folder = source / Path(text["params"]).name
        settings = _model(text)
        species = SpeciesTable(tuple(sorted(atomic_numbers[s] for s in text["species"])))
        references = {atomic_numbers[s]: float(e) for s, e in text["reference_energies"].items()}
        isolated = frozenset(atomic_numbers[s] for s in text["isolated_atoms"])
        metadata = dict(text["metadata"])
        described = {str(name): dict(one) for name, one in text["fitted"].items()}
        sample = source / Path(text[REMEMBERED]).name if REMEMBERED in text else None
        members = EnsembleSettings.model_validate(text["ensemble"])
        ensemble = build_ensemble(settings, members, species, isolated)
        dtype = jnp.dtype(str(text["dtype"]))
        wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), _shapes(ensemble))
        held = wanted if CHARGE_ENERGY in text else without_charge_energy(wanted)
    except FileNotFoundError as error:
        raise InputError(f"{source} is not a potential: it has no potential.json.") from error
    except InputError as error:
        raise InputError(f"{source} cannot be used: {error}") from error
    except Exception as error:  # whatever stands in the place of a description stumbles in its own way
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{source}/potential.json is damaged ({why}); restore a copy or train again.") from error
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            params = checkpointer.restore(folder, held)
    except Exception as error:  # orbax raises many kinds for a damaged checkpoint
        raise InputError(f"{folder} cannot be read ({type(error).__name__}); restore a copy or train again.") from error
    arrays = with_charges_for_nothing(jax.tree.map(np.asarray, params), wanted)
    try:
        remembered = tuple(read_extxyz(sample)) if sample is not None and sample.exists() else ()
    except InputError as error:
        raise InputError(f"{error} The potential can do without that file: delete it.") from error
    fitted = _read_fitted(source, described, params_digest(arrays))
    return kind(settings, species, arrays, references, fitted, metadata, members, isolated, remembered)


@lru_cache(maxsize=32)
def _shapes(ensemble: AnyEnsemble) -> Params:
    """Of the parameters: potentials of one architecture are read many times, and tracing takes longer than reading."""
    return jax.eval_shape(ensemble.init, jax.random.key(0))


def _require_format(number: int) -> None:
    if number > _FORMAT:
        raise ValueError(f"format {number} is of a later version of this program")
    if number < _FORMAT:
        raise InputError(f"it is of format {number}, which an earlier version wrote; train it again.")


def _model(text: Mapping[str, Any]) -> ModelSettings:
    """The settings of the model that a description names.

    Raises:
        InputError: another package adds models of their kind, and is not installed.
    """
    kind, package = text["model"].get("kind"), text.get(_PACKAGE)
    if package is not None and kind not in ModelSettings.kinds():
        raise InputError(f"its model is of kind '{kind}', which the package '{package}' adds; install that.")
    return ModelSettings.parse(text["model"])


def _read_fitted(source: Path, described: Mapping[str, Mapping[str, Any]], params: str) -> dict[str, Fitted]:
    """What was fitted to parameters with some digest; without what has been taken out of the folder.

    Raises:
        InputError: a file or its description is damaged, of a later version, or of other parameters.
    """
    found = {}
    for name, text in described.items():
        place = source / Path(text["file"]).name if "file" in text else None
        if place is not None and not place.exists():
            continue
        try:
            one = Fitted.described(text, {} if place is None else read_npz(place))
            if one.params != params:
                raise InputError("it was fitted to other parameters")
        except Exception as error:  # whatever stands in the place of what was fitted stumbles in its own way
            why = " ".join(f"{type(error).__name__}: {error}".split()).removeprefix("InputError: ").rstrip(".")
            cure = (
                "restore a copy or fit again"
                if place is None
                else f"the potential can do without {place.name}: delete it"
            )
            raise InputError(f"{source}: what was fitted as {name} cannot be used ({why}); {cure}.") from error
        found[name] = one
    return found


def check_place(directory: Path | str) -> None:
    """Whether a potential can be saved in a folder.

    Raises:
        InputError: it is a file, or holds something other than a potential.
    """
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise InputError(f"{target} is a file; choose another name for the folder of the potential.")
    if target.exists() and not (target / DESCRIPTION).exists():
        strange = [path.name for path in target.iterdir() if not _OWN.fullmatch(path.name)]
        if strange:
            raise InputError(
                f"{target} exists and is not a potential (it holds {min(strange)}); choose another folder."
            )


def _holds(place: Path, arrays: Params) -> bool:
    """Whether a folder holds some parameters, undamaged."""
    if not place.exists():
        return False
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            there = checkpointer.restore(place, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays))
    except Exception:  # orbax raises many kinds for a damaged checkpoint
        return False
    return params_digest(there) == params_digest(arrays)
