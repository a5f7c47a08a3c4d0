"""A potential as programs that need nothing of this package: StableHLO in one file, with parameters and checks inside.

A program is given atomic numbers, positions and cell of one structure, padded to a number of atoms, and gives what the
committee says of it.  It looks for neighbours itself, in room that is fixed when it is written; whatever does not fit,
or is not known, is told in ``ok`` and the results beside it, and then no other result is a number.

The file is a zip archive: ``about.json`` says what the programs take and give, and which of them is for which device.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from almlip_jax.compilation import check_name, written_for
from almlip_jax.ensembles.repulsion import with_repulsion, without_repulsion
from almlip_jax.errors import InputError
from almlip_jax.files import plain, replacing
from almlip_jax.given import given_structures
from almlip_jax.packages import package_version
from almlip_jax.potential import Potential
from almlip_jax.potential.answers import of_atoms
from almlip_jax.potential.following import in_type, members_and_scores
from almlip_jax.precision import full_precision
from almlip_jax.scores import atom_scores, scores
from almlip_jax.structures.followed import size_bucket
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.neighbors import find_edges
from almlip_jax.structures.slots import Layout
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.walkers import Room, WalkerNeighbors, neighbors_anew, walker_neighbors
from almlip_jax.targets import targets

if TYPE_CHECKING:
    from almlip_jax.compilation import Precision

FORMAT = 1
"""Version of the file: of what the programs take and give, and of ``about.json``."""

_SQUEEZED = 1.12  # by which cutoffs are longer for how far images and bins reach: cells may get thinner by a tenth
_HEADROOM = 1.3  # of neighbours, over the most that an atom has
_PROGRAMS = {"cpu": ("cpu",), "gpu": ("cuda",), "tpu": ("tpu",)}  # kind of backend -> platforms that are lowered for
PLATFORMS = tuple(_PROGRAMS)
"""Kinds of devices that there are programs for, as `jax.default_backend` names them."""
_INPUTS = {
    "numbers": "atomic numbers, 0 in places without an atom",
    "positions": "Angstrom, in any image of the cell",
    "cell": "Angstrom, rows are the cell vectors; anything in directions that are not periodic",
    "pbc": "which cell vectors are periodic",
    "charge": "e, of the structure; looked at where `sees_state` is true",
    "spin": "multiplicity 2S+1, likewise",
}
_OUTPUTS = {
    "energy": ("eV", "committee mean, reference energies included"),
    "forces": ("eV/A", "committee mean"),
    "virial": ("eV", "committee mean of -dE/d(strain); stress = -virial / volume"),
    "member_energy": ("eV", "of each member, reference energies included"),
    "member_forces": ("eV/A", "of each member"),
    "member_virial": ("eV", "of each member"),
    "force_error": ("eV/A", "length of the error vector to be expected, as calibrated: slope * force_total"),
    "ok": ("", "whether all that follows holds; where it does not, no number above is one"),
    "neighbors": ("", "most neighbours that an atom has"),
    "neighbors_fit": ("", "no atom has more neighbours than there is room for"),
    "search_reaches": ("", "the cell is not too thin for the search, and atoms do not crowd beyond what it holds"),
    "elements_known": ("", "the potential knows all elements"),
    "finite": ("", "positions and cell are numbers, and the cell vectors span their directions"),
}
_SPREAD = "spread: sqrt(mean over the M members of |F_m - F|^2), the norm of the vector of an atom, divisor M"


@dataclass(frozen=True)
class Capacity:
    """How large a structure a program takes.

    Attributes:
        atoms: places for atoms.
        room: of its neighbours.
    """

    atoms: int
    room: Room


def capacity_for(
    structures: Sequence[Atoms], cutoff: float, *, atoms: int | None = None, neighbors: int | None = None
) -> Capacity:
    """Room for some structures, and others like them: a third more neighbours, cells thinner by a tenth.

    Args:
        structures: at least one.
        cutoff: Angstrom.
        atoms: places, where there are to be more than the largest structure needs.
        neighbors: of each atom, likewise.

    Raises:
        InputError: there is no structure, or what is asked for does not hold them.
    """
    if not structures:
        raise InputError("there is no structure to say how much room is needed; give at least one.")
    most = max(map(len, structures))
    if atoms is not None and atoms < most:
        raise InputError(f"{atoms} atoms are asked for, and a structure has {most}; give more, or leave it out.")
    places = size_bucket(most) if atoms is None else atoms
    count = max(find_edges(one, cutoff).largest_count for one in structures)
    if neighbors is not None and neighbors < count:
        raise InputError(f"{neighbors} neighbours are asked for, and an atom has {count}; give more, or leave it out.")
    slots = size_bucket(int(np.ceil(_HEADROOM * count))) if neighbors is None else neighbors
    if not any(one.pbc.any() for one in structures):
        slots = min(slots, max(places - 1, 1))
    room = None
    for one in structures:
        room = _looked_through(one, places, cutoff, room).room
    assert room is not None
    return Capacity(places, Room(max(slots, 1), room.images, room.bins))


def _looked_through(atoms: Atoms, places: int, cutoff: float, room: Room | None) -> WalkerNeighbors:
    """The list of a structure, whose search reaches far enough, and no less far than before."""
    positions = np.zeros((1, places, 3))
    positions[0, : len(atoms)] = atoms.positions
    mask = np.arange(places)[None] < len(atoms)
    with jax.enable_x64(True):
        return walker_neighbors(positions, atoms.cell.array[None], atoms.pbc[None], mask, _SQUEEZED * cutoff, 0.0, room)


def export_stablehlo(
    potential: Potential,
    path: Path | str,
    structures: Sequence[Atoms] | Atoms,
    *,
    atoms: int | None = None,
    neighbors: int | None = None,
    precision: Precision | None = None,
    platforms: Sequence[str] | str = PLATFORMS,
) -> dict[str, Any]:
    """Writes a potential as programs for several devices, which any program with jax can run.

    Args:
        potential: with what was fitted to it.
        path: the file.
        structures: like those that the programs will be given; they say how much room there is.
        atoms: see `capacity_for`.
        neighbors: likewise.
        precision: of the models, that of the potential where not given; positions come, and results go, in float64.
        platforms: of ``cpu``, ``gpu`` (CUDA) and ``tpu``.

    Returns:
        what ``about.json`` says.

    Raises:
        InputError: flatbuffers is not installed, a platform or element is not known, or `capacity_for` refuses.
    """
    package_version("flatbuffers", "export")
    platforms = [platforms] if isinstance(platforms, str) else platforms
    unknown = [name for name in platforms if name not in _PROGRAMS]
    if unknown or not platforms:
        raise InputError(f"there are programs for {', '.join(_PROGRAMS)}, not for {', '.join(unknown) or 'nothing'}.")
    structures = given_structures(structures, "structures")
    potential.check_elements(structures)
    capacity = capacity_for(structures, potential.cutoff, atoms=atoms, neighbors=neighbors)
    chosen = precision or potential.precision
    check_name(chosen)
    exported = {name: _exported(potential, capacity, chosen, name) for name in dict.fromkeys(platforms)}
    about = _about(potential, capacity, chosen, exported)
    with replacing(Path(path)) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("about.json", json.dumps(plain(about), indent=2, allow_nan=False) + "\n")
        for name, one in exported.items():
            archive.writestr(about["programs"][name], bytes(one.serialize()))
    return about


def _exported(potential: Potential, capacity: Capacity, precision: str, kind: str) -> Any:
    """The program for one kind of device."""
    from jax import export

    places = capacity.atoms
    with jax.enable_x64(True), written_for(kind):
        given = (
            jax.ShapeDtypeStruct((places,), np.int32),
            jax.ShapeDtypeStruct((places, 3), np.float64),
            jax.ShapeDtypeStruct((3, 3), np.float64),
            jax.ShapeDtypeStruct((3,), bool),
            jax.ShapeDtypeStruct((), np.int32),
            jax.ShapeDtypeStruct((), np.int32),
        )
        function = jax.jit(full_precision(program_of(potential, capacity, precision)))
        return export.export(function, platforms=_PROGRAMS[kind])(*given)


def program_of(potential: Potential, capacity: Capacity, precision: str) -> Callable[..., dict[str, jax.Array]]:
    """What is exported: a function of the inputs, which gives the outputs by name; traced with 64 bits."""
    dtype = np.dtype(precision)
    params, novelty = jax.tree.map(lambda x: in_type(x, dtype), (potential.params, potential.novelty))
    bare, repelling = without_repulsion(potential.ensemble)
    repels = any(one is not None for one in repelling)
    indices, references = _by_number(potential.species, potential.reference_energies)

    def of_structure(
        numbers: jax.Array,
        positions: jax.Array,
        cell: jax.Array,
        pbc: jax.Array,
        charge: jax.Array,
        spin: jax.Array,
    ) -> dict[str, jax.Array]:
        """What the potential says about one structure, and whether it fits."""
        real, listed = numbers != 0, (numbers >= 0) & (numbers < len(indices))
        place = jnp.where(listed, numbers, 0)
        species, known = jnp.asarray(indices)[place], jnp.all(listed & (jnp.asarray(indices)[place] >= 0) | ~real)
        atoms = jnp.sum(real)
        middle = jnp.sum(jnp.where(real[:, None], positions, 0), axis=0) / jnp.maximum(atoms, 1)
        positions = jnp.where(real[:, None], positions - middle, 0)
        neighbors = neighbors_anew(
            Layout(positions[None], cell[None], pbc[None], real[None]), potential.cutoff, capacity.room
        )
        state = charge.astype(dtype)[None], spin.astype(dtype)[None]
        graph = neighbors.graph(positions[None], jnp.maximum(species, 0)[None], *state)
        with jax.enable_x64(precision == "float64"):  # where x64 is on, numbers without a type would be float64
            own = jax.tree.map(lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, graph)
            # arrays of the host cannot be asked by traced indices
            constants, fitted = jax.tree.map(jnp.asarray, (params, novelty))
            prediction = bare.predict(constants, own)
            found = {} if repels else members_and_scores(prediction, fitted, own)
        if repels:  # large energies that all but cancel: from edges as they were found, in float64
            found = members_and_scores(with_repulsion(prediction, repelling, graph), fitted, graph)
        energy = jnp.sum(jnp.where(real, jnp.asarray(references)[place], 0))
        checks = _checks(neighbors, capacity.room, known, positions, cell, pbc)
        return _told(potential, found, energy, graph, jnp.any(pbc), checks)

    return of_structure


def _by_number(species: SpeciesTable, energies: Mapping[int, float]) -> tuple[np.ndarray, np.ndarray]:
    """Species index, -1 of elements that are not known, and reference energy in eV, by atomic number."""
    indices, references = np.full(len(chemical_symbols), -1, np.int32), np.zeros(len(chemical_symbols))
    indices[list(species.numbers)] = np.arange(len(species))
    for number, energy in energies.items():
        references[number] = energy
    return indices, references


def _checks(
    neighbors: WalkerNeighbors, room: Room, known: jax.Array, positions: jax.Array, cell: jax.Array, pbc: jax.Array
) -> dict[str, jax.Array]:
    """Whether a structure fits and is one."""
    periodic = jnp.where(pbc[:, None], cell, 0)
    lengths = jnp.sqrt(jnp.sum(periodic**2, axis=1))
    unit = jnp.where(pbc[:, None], periodic / jnp.where(lengths > 0, lengths, 1)[:, None], 0)
    gram = jnp.sum(unit[:, None] * unit[None], axis=-1) + jnp.diag(jnp.where(pbc, 0, 1).astype(unit.dtype))
    a, b, c = gram
    spanned = jnp.sum(a * jnp.cross(b, c)) > 1e-8  # squared volume of the unit vectors
    is_open = jnp.asarray((True,) * 3 if room.bins is None else room.bins.open)
    checks = {
        "neighbors_fit": neighbors.largest_count <= room.capacity,
        "search_reaches": ~neighbors.unsearched & jnp.all(pbc | is_open),
        "elements_known": known,
        "finite": jnp.all(jnp.isfinite(positions)) & jnp.all(jnp.isfinite(periodic)) & spanned,
    }
    return {"ok": jnp.all(jnp.stack(list(checks.values()))), "neighbors": neighbors.largest_count, **checks}


def _told(
    potential: Potential,
    found: Mapping[str, Any],
    references: jax.Array,
    graph: Graph,
    periodic: jax.Array,
    checks: Mapping[str, jax.Array],
) -> dict[str, jax.Array]:
    """The outputs: float64, and not a number where a check fails."""
    wide = jax.tree.map(lambda x: x.astype(jnp.float64), dict(found))
    results = {
        "energy": wide["energy"][0] + references,
        "forces": wide["forces"],
        "virial": wide["virial"][0],
        "member_energy": wide["member_energy"][:, 0] + references,
        "member_forces": wide["member_forces"],
        "member_virial": wide["member_virial"][:, 0],
        **{name: values[0] for name, values in wide["scores"].items()},
        **{of_atoms(name): jnp.where(graph.atom_mask, x, 0) for name, x in wide["atom_scores"].items()},
    }
    results |= {name: jnp.max(results[of_atoms(name)]) for name in potential.novelty if name in wide["atom_scores"]}
    for target in targets(wide["further"]):
        value = wide["further"][target.name]
        results[target.label] = value[0] if target.per == "structure" else value
        if target.structures != "all":
            lacking = [one.name for one in scores() if one.target == target.name]
            lacking += [of_atoms(one.name) for one in atom_scores() if one.target == target.name]
            has = ~periodic if target.structures == "open" else graph.volume[0] != 1
            for name in (target.label, *(name for name in lacking if name in results)):
                results[name] = jnp.where(has, results[name], jnp.nan)
    slope = potential.calibration.get("slope")
    if slope is not None:
        results["force_error"] = slope * results["force_total"]
    return {name: jnp.where(checks["ok"], value, jnp.nan) for name, value in results.items()} | dict(checks)


def left_out(potential: Potential) -> list[str]:
    """Scores of a potential that its programs do not give: grades over all parameters take more than a program."""
    active = potential.active_set
    return [active.settings.score] if active is not None and active.settings.score not in potential.novelty else []


def _about(potential: Potential, capacity: Capacity, precision: str, exported: Mapping[str, Any]) -> dict[str, Any]:
    """What ``about.json`` says."""
    one = next(iter(exported.values()))
    outputs = jax.tree.unflatten(one.out_tree, one.out_avals)
    metadata = {key: potential.metadata[key] for key in ("dataset_size",) if key in potential.metadata}
    return {
        "format": FORMAT,
        "written_by": {name: package_version(name) for name in ("almlip-jax", "jax")},
        "calling_convention": one.calling_convention_version,
        "programs": {name: f"{name}.jax" for name in exported},
        "precision": precision,
        "atoms": capacity.atoms,
        "neighbors": capacity.room.capacity,
        "edges": capacity.atoms * capacity.room.capacity,
        "search": {key: value for key, value in asdict(capacity.room).items() if key != "capacity"},
        "species": list(potential.species.symbols),
        "numbers": list(potential.species.numbers),
        "cutoff": potential.cutoff,
        "members": potential.ensemble.members,
        "sees_state": potential.ensemble.sees_state,
        "states": [list(state) for state in sorted(potential.states_met)],
        "units": {"energy": "eV", "length": "Angstrom"},
        "force_std": _SPREAD,
        "left_out": left_out(potential),
        "metadata": metadata,
        "inputs": [
            {"name": name, "shape": list(aval.shape), "dtype": str(aval.dtype), "meaning": meaning}
            for (name, meaning), aval in zip(_INPUTS.items(), one.in_avals, strict=True)
        ],
        "outputs": {
            name: dict(zip(("unit", "meaning"), _meaning(name), strict=True))
            | {"shape": list(aval.shape), "dtype": str(aval.dtype)}
            for name, aval in outputs.items()
        },
    }


def _meaning(name: str) -> tuple[str, str]:
    """Unit and meaning of an output."""
    known = dict(_OUTPUTS)
    known |= {of_atoms(one.name): (one.unit, one.meaning) for one in atom_scores()}
    known |= {one.name: (one.unit, one.meaning) for one in scores()}
    known |= {one.label: (one.unit, one.meaning) for one in targets() if one.label not in known}
    return known[name]
