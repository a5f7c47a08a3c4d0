"""A potential for ``pair_style jax/kk`` of lammps-jax: LAMMPS on GPUs, in as many processes as it likes.

The bundle holds StableHLO programs that are given the positions of a process, its own atoms first and ghosts behind,
and LAMMPS's full list of neighbours, skin included.  Energies of the own atoms come of their own edges, which end at
ghosts too; forces on ghosts are handed back by LAMMPS.  That is all there is of an atom of a local model; others, whose
atoms hear of each other, are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.data import atomic_numbers

from almlip_jax.compilation import check_name, written_for
from almlip_jax.ensembles import MixedEnsemble
from almlip_jax.ensembles.atom_blocks import apart
from almlip_jax.errors import InputError
from almlip_jax.files import replacing
from almlip_jax.given import given_structures
from almlip_jax.packages import package_version
from almlip_jax.potential import Potential
from almlip_jax.potential.following import in_type
from almlip_jax.structures.followed import size_bucket
from almlip_jax.structures.neighbors import find_edges, periodic_cell
from almlip_jax.units import KCAL_PER_MOL

if TYPE_CHECKING:
    from almlip_jax.compilation import Precision

_UNITS = {"metal": 1.0, "real": KCAL_PER_MOL}  # eV; both have Angstrom
_HEADROOM = 1.3  # of neighbours, over the most that an atom has
_MORE_ATOMS = 1.1  # owned atoms and ghosts, over those of the structures


@dataclass(frozen=True)
class LammpsRoom:
    """How much a process of LAMMPS may hold.

    Attributes:
        owned: atoms of its own.
        atoms: these and ghosts.
        listed: neighbours of an atom in LAMMPS's list, skin included.
        neighbors: of these within the cutoff.
    """

    owned: int
    atoms: int
    listed: int
    neighbors: int


def room_for(structures: Sequence[Atoms], cutoff: float, skin: float, owned: int | None = None) -> LammpsRoom:
    """Room for some structures in one process, each with the images that LAMMPS keeps as ghosts.

    Args:
        structures: at least one.
        cutoff: Angstrom.
        skin: Angstrom, of LAMMPS's list (``neighbor``).
        owned: atoms of a process, where there are several or more are to come.

    Raises:
        InputError: there is no structure.
    """
    if not structures:
        raise InputError("there is no structure to say how much room is needed; give at least one.")
    reach = cutoff + skin
    most = max(map(len, structures)) if owned is None else owned
    shells = [_with_ghosts(one, most, reach) for one in structures]
    listed = max(find_edges(one, reach).largest_count for one in structures)
    within = max(find_edges(one, cutoff).largest_count for one in structures)
    mine = int(np.ceil(_MORE_ATOMS * most)) if owned is None else owned
    return LammpsRoom(
        owned=mine,
        atoms=max(int(np.ceil(_MORE_ATOMS * max(shells))), mine),
        listed=size_bucket(int(np.ceil(_HEADROOM * listed))),
        neighbors=size_bucket(int(np.ceil(_HEADROOM * within))),
    )


def _with_ghosts(atoms: Atoms, own: int, reach: float) -> float:
    """Atoms of a process that has `own` of a structure as its own, with all that is within reach of its part."""
    cell = periodic_cell(atoms.cell.array, atoms.pbc)
    heights = 1 / np.linalg.norm(np.linalg.inv(cell), axis=0)
    part = np.cbrt(min(own / len(atoms), 1.0))  # as if the structure were divided alike along each direction
    wider = np.where(atoms.pbc, 1 + 2 * reach / np.maximum(heights * part, 1e-9), 1.0)
    return float(own * np.prod(wider))


def export_lammps_jax(
    potential: Potential,
    path: Path | str,
    structures: Sequence[Atoms] | Atoms,
    elements: Sequence[str],
    *,
    atoms: int | None = None,
    skin: float = 2.0,
    units: Literal["metal", "real"] = "metal",
    precision: Precision | None = None,
    platform: Literal["cuda", "cpu"] = "cuda",
    references: bool = True,
) -> LammpsRoom:
    """Writes a bundle for ``pair_style jax/kk``.

    Args:
        potential: of a local model; its mean drives LAMMPS, which is told nothing of the spread.
        path: the file, JSON.
        structures: like those that are to be run; they say how much room there is.
        elements: of each type of atoms, from type 1 on.
        atoms: that a process holds of its own, see `room_for`.
        skin: Angstrom, of LAMMPS's list.
        units: of LAMMPS.
        precision: of positions, models and results, that of the potential where not given.
        platform: what LAMMPS runs on.
        references: whether reference energies are added; in float32 the sum of large ones is rounded to 1e-7 of it.

    Raises:
        InputError: lammps-jax is not installed, the model is not local, or an element is not known or that of no type.
    """
    package_version("lammps-jax", "lammps-jax")
    _check(potential, units)
    path, structures = Path(path), given_structures(structures, "structures")
    potential.check_elements(structures)
    untyped = {symbol for one in structures for symbol in one.get_chemical_symbols()} - {*elements}
    if untyped:
        raise InputError(f"the structures hold {min(untyped)}, which is the element of no type; name it among them.")
    room = room_for(structures, potential.cutoff, skin, atoms)
    chosen = precision or potential.precision
    check_name(chosen)
    from lammps_jax.export import export_model

    function = energies_of(potential, room, elements, chosen, _UNITS[units], references=references)
    kind = "gpu" if platform == "cuda" else "cpu"
    with replacing(path) as temporary, jax.enable_x64(True) if chosen == "float64" else nullcontext():
        with written_for(kind):
            export_model(
                energy_fn=function,
                path=temporary,
                max_atoms=room.atoms,
                max_neighbors=room.listed,
                max_owned=room.owned,
                cutoff=potential.cutoff,
                unit_style=units,
                precision=chosen,
                newton="on",
                n_species=len(elements),
                platform=platform,
            )
    return room


def _check(potential: Potential, units: str) -> None:
    if units not in _UNITS:
        raise InputError(f"LAMMPS is to work in units '{units}'; a potential works in {' or '.join(_UNITS)}.")
    ensemble = potential.ensemble
    groups = ensemble.groups if isinstance(ensemble, MixedEnsemble) else (ensemble,)
    if not all(one.model.local and not one.model.long_range for one in groups):
        raise InputError(
            "a bundle for lammps-jax needs a model whose atoms see their own neighbours alone, and atoms of this one "
            "hear of each other; run it with 'almlip lammps', or distil it into a local one."
        )


def energies_of(
    potential: Potential,
    room: LammpsRoom,
    elements: Sequence[str],
    precision: str,
    unit: float,
    *,
    references: bool,
) -> Callable[[jax.Array, jax.Array, Any], jax.Array]:
    """What lammps-jax exports: energies [atoms] of positions [atoms, 3], types [atoms] from 0 on, and a neighbour list.

    A position that is not a number, or more neighbours within the cutoff than there is room for, gives energies and
    forces that are no numbers.

    Raises:
        InputError: an element is not known.
    """
    numbers = [atomic_numbers.get(symbol, 0) for symbol in elements]
    if not numbers or 0 in numbers:
        raise InputError(f"'{','.join(elements)}' does not name an element for each type of atoms, as Si,O does.")
    strange = next((n for n, number in enumerate(numbers, 1) if number not in potential.species.numbers), None)
    if strange is not None:
        known = ", ".join(potential.species.symbols)
        symbol = elements[strange - 1]
        raise InputError(f"type {strange} is {symbol}, and the potential knows {known}; name one of these.")
    indices = potential.species.index(np.array(numbers))
    own = np.array([potential.reference_energies[number] if references else 0.0 for number in numbers])
    dtype, kinds = np.dtype(precision), len(potential.species)
    params = jax.tree.map(lambda x: in_type(x, dtype), potential.params)

    def energies(positions: jax.Array, types: jax.Array, graph: Any) -> jax.Array:
        """In the units of LAMMPS; 0 of ghosts."""
        listed, counts = graph.neighbors.T, graph.num_neighbors  # [owned, slots] and [owned]
        there = (jnp.arange(room.listed) < counts[:, None]) & (listed < room.atoms)
        neighbors, kept, full = _within(positions, jnp.where(there, listed, 0), there, potential.cutoff, room)
        vectors = positions[neighbors] - positions[: room.owned, None]
        species = jnp.asarray(indices, jnp.int32)[jnp.clip(types, 0, len(numbers) - 1)]
        ones = jnp.ones(room.owned, dtype)
        some = apart(
            species[: room.owned],
            species[neighbors],
            jnp.where(kept[..., None], vectors, 0),
            kept,
            jnp.ones(room.owned, bool),
            (0 * ones, ones),
            kinds,
        )
        inside = jax.tree.map(jnp.asarray, params)  # arrays of the host cannot be asked by traced indices
        said = jnp.mean(potential.ensemble.atom_energies(inside, some), axis=0)[: room.owned]
        said = said + jnp.asarray(own, dtype)[jnp.clip(types[: room.owned], 0, len(numbers) - 1)]
        said = said / unit * jnp.where(full, jnp.nan, 1.0)  # a factor, so that forces are no numbers either
        return jnp.pad(said.astype(dtype), (0, room.atoms - room.owned))

    return energies


def _within(
    positions: jax.Array, listed: jax.Array, there: jax.Array, cutoff: float, room: LammpsRoom
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The neighbours of a list that are nearer than the cutoff, in slots without gaps.

    Args:
        positions: [atoms, 3] Angstrom.
        listed: [owned, slots] int.
        there: [owned, slots] bool.
        cutoff: Angstrom.
        room: how many slots there are to be.

    Returns:
        neighbours [owned, neighbors] int, which of them there are, and whether an atom [owned] has too many.
    """
    here = jax.lax.stop_gradient(positions)
    squares = jnp.sum((here[listed] - here[: room.owned, None]) ** 2, axis=-1)
    near = there & ~(squares >= cutoff**2)  # what is not a number stays, and makes its energy one that is not
    rank = jnp.cumsum(near.astype(jnp.int32), axis=1)
    wanted = jnp.arange(1, room.neighbors + 1, dtype=jnp.int32)
    slot = jax.vmap(lambda counts: jnp.searchsorted(counts, wanted))(rank)
    kept = wanted <= rank[:, -1:]
    found = jnp.take_along_axis(listed, jnp.where(kept, slot, 0), axis=1)
    own = jnp.arange(room.owned, dtype=found.dtype)[:, None]
    return jnp.where(kept, found, own), kept, rank[:, -1] > room.neighbors
