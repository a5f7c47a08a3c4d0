"""Reference energies of the species, in float64: those of isolated atoms where they are known, else a robust fit."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from ase import Atoms
from ase.data import atomic_numbers, chemical_symbols

from almlip_jax.errors import InputError
from almlip_jax.structures.electronic_state import total_charge
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.structures.weights import loss_weights
from almlip_jax.training.settings import TrainingSettings

_SPREADS = 6.0  # robust standard deviations up to which a residual counts by its square
_LEAST_SPREAD = 1e-3  # eV/atom
_DOUBTFUL = (50.0, 5.0)  # robust standard deviations, and eV/atom, beyond which an energy is reported as doubtful
_CHARGED, _TOLD = 0.03, 0.7  # eV/atom that charges have to explain, and what share of the rest they may leave
_SAME = 1e-3  # eV, by which two energies of one isolated atom may differ


@dataclass(frozen=True)
class References:
    """Reference energies, and what is known of them.

    Attributes:
        energies: eV by atomic number, for every species.
        costs: eV of a positive and of a negative elementary charge, which the model is to hold; 0 where they were not
            sought.
        isolated: elements whose energy is that of the isolated atom, which a potential then gives exactly.
        doubtful: places of structures whose energy is far from what all the others suggest.
    """

    energies: dict[int, float]
    costs: tuple[float, float] = (0.0, 0.0)
    isolated: frozenset[int] = frozenset()
    doubtful: tuple[int, ...] = ()


def doubts(structures: Sequence[Atoms], references: References) -> str | None:
    """A sentence on structures whose energies are doubtful; None where there are none."""
    named = [f"{n} ({structures[n].get_chemical_formula()})" for n in references.doubtful[:5]]
    if not named:
        return None
    more = f" and {len(references.doubtful) - 5} more" if len(references.doubtful) > 5 else ""
    plural = "s" if len(references.doubtful) > 1 else ""
    return (
        f"the energy of structure{plural} {', '.join(named)}{more} is far from what the others suggest; check "
        "the label, unit and settings, or leave it out."
    )


def untold_charges(structures: Sequence[Atoms]) -> str | None:
    """A sentence on charges that show in the energies, for a model that is not told of them; None where none do.

    Reference energies of the elements cannot give what an electron costs where there are several compositions.  The
    network then has to, from what atoms see, and its forces suffer.

    Args:
        structures: labelled; isolated atoms and structures without an energy do not count.
    """
    known = [atoms for atoms in without_isolated_atoms(structures) if _has_energy(atoms)]
    charges = np.array([total_charge(atoms) for atoms in known], dtype=np.float64)
    if len(known) == 0 or np.ptp(charges) == 0:
        return None
    sizes = np.array([len(atoms) for atoms in known], dtype=np.float64)
    shares = np.stack([[np.sum(atoms.numbers == z) for atoms in known] for z in SpeciesTable.of(known).numbers], axis=1)
    energies = np.array([atoms.calc.results["energy"] for atoms in known], dtype=np.float64) / sizes

    def left(columns: np.ndarray) -> float:
        """Root mean square of the energies per atom that these columns do not give."""
        per_atom = columns / sizes[:, None]
        return float(np.sqrt(np.mean((energies - per_atom @ robust_fit(per_atom, energies)) ** 2)))

    without, told = left(shares), left(np.column_stack([shares, charges]))
    if told > _TOLD * without or without - told < _CHARGED:
        return None
    return (
        f"structures have charges from {charges.min():+g} to {charges.max():+g}, which this model is not told: it has "
        f"to learn {without:.2g} eV/atom of their energies, of which charges explain all but {told:.2g}, and forces "
        "suffer; set model.electronic_state: true."
    )


def is_isolated_atom(atoms: Atoms) -> bool:
    """Whether a structure is an isolated atom: alone in open space, or said to be one by ``info["config_type"]``.

    Raises:
        InputError: it is said to be one, and has several atoms.
    """
    kind = str(atoms.info.get("config_type", "")).replace("_", "").replace(" ", "").lower()
    if kind != "isolatedatom":
        return len(atoms) == 1 and not atoms.pbc.any()
    if len(atoms) != 1:
        raise InputError(
            f"a structure of config_type {atoms.info['config_type']} is {atoms.get_chemical_formula()}, not one atom; "
            "correct its config_type."
        )
    return True


def without_isolated_atoms(structures: Iterable[Atoms]) -> list[Atoms]:
    """What is trained on: a potential meets the energies of isolated atoms exactly, and has nothing to learn there."""
    return [atoms for atoms in structures if not is_isolated_atom(atoms)]


def isolated_atom_energies(structures: Iterable[Atoms]) -> dict[int, float]:
    """Energies, eV by atomic number, of the neutral isolated atoms among some structures.

    Raises:
        InputError: two of one element differ.
    """
    energies: dict[int, float] = {}
    for atoms in structures:
        labelled = atoms.calc is not None and "energy" in atoms.calc.results
        if not labelled or not is_isolated_atom(atoms) or total_charge(atoms) != 0:
            continue
        number, energy = int(atoms.numbers[0]), float(atoms.calc.results["energy"])
        if abs(energies.setdefault(number, energy) - energy) > _SAME:
            raise InputError(
                f"isolated {chemical_symbols[number]} has the energies {energies[number]:.6g} and {energy:.6g} eV in "
                "two structures; keep the one of its ground state."
            )
    return energies


def given_references(settings: TrainingSettings) -> dict[int, float]:
    """Energies of isolated atoms that the settings give, eV by atomic number.

    Raises:
        InputError: the file cannot be read, or holds something else than isolated atoms with energies.
    """
    given = settings.reference_energies
    if isinstance(given, dict):
        return {atomic_numbers[symbol]: energy for symbol, energy in given.items()}
    frames = read_structures(given)
    for number, atoms in enumerate(frames):
        if len(atoms) != 1 or not _has_energy(atoms):
            raise InputError(
                f"{given}, frame {number} is not one atom with an energy, as training.reference_energies needs; take "
                "it out."
            )
        atoms.info["config_type"] = "IsolatedAtom"
    return isolated_atom_energies(frames)


def find_references(
    structures: Sequence[Atoms],
    species: SpeciesTable,
    *,
    isolated: Mapping[int, float] | None = None,
    kept: Mapping[int, float] | None = None,
    charges: bool = False,
) -> References:
    """Reference energies for a training.

    Args:
        structures: labelled; isolated atoms among them say what their own energies are.
        species: the species table.
        isolated: further energies of isolated atoms, which come before those of the structures.
        kept: those of a potential that the training begins with; they come before everything else.
        charges: whether the model is told of charge, so that the cost of one is fitted beside the elements.

    Raises:
        InputError: isolated atoms contradict each other, or nothing says anything of energies.
    """
    kept = {z: e for z, e in (kept or {}).items() if z in species.numbers}
    alone = {**isolated_atom_energies(structures), **(isolated or {})}
    alone = {z: e for z, e in alone.items() if z in species.numbers and z not in kept}
    known = {**alone, **kept}
    bonded = [n for n, atoms in enumerate(structures) if not is_isolated_atom(atoms)]
    if not bonded and len(known) == len(species):
        return References(known, isolated=frozenset(alone))
    found = fitted_references([structures[n] for n in bonded], species, known, charges=charges)
    return replace(found, isolated=frozenset(alone), doubtful=tuple(bonded[n] for n in found.doubtful))


def reference_energies(
    structures: Sequence[Atoms], species: SpeciesTable, known: Mapping[int, float] | None = None
) -> dict[int, float]:
    """Energy of each species, eV, such that their sums come close to the energies of the structures.

    Least squares of the energies per atom, in which residuals beyond six robust standard deviations count in
    proportion to their size only (Huber's loss), so that a few wrong energies move nothing.  Where structures do not
    determine the energies (for example with one composition), these are as close as possible to a common value.

    Args:
        structures: labelled structures; those without an energy do not count, or whose energy has weight 0 where others
            have more.
        species: the species table.
        known: energies that stay as they are; only those of the other species are sought.

    Returns:
        eV by atomic number; of a species that does not occur, the common value.

    Raises:
        InputError: no structure has an energy.
    """
    return fitted_references(structures, species, known or {}).energies


def fitted_references(
    structures: Sequence[Atoms], species: SpeciesTable, known: Mapping[int, float], *, charges: bool = False
) -> References:
    """The energies of all species, the costs of charges, and places of structures with doubtful energies.

    Arguments and errors are those of `reference_energies`; ``charges`` says whether costs of charges are sought.
    """
    known_energy = [n for n, a in enumerate(structures) if _has_energy(a)]
    # where no energy counts in the training, as with forces alone, they still tell where energies lie
    weighted = [n for n in known_energy if loss_weights(structures[n], f"structure {n}")["energy"] > 0]
    places = weighted or known_energy
    if not places:
        raise InputError("no structure has an energy; training needs labelled structures.")
    labelled = [structures[n] for n in places]
    sizes = np.array([len(a) for a in labelled], dtype=np.float64)
    shares = np.array([[np.sum(a.numbers == z) for z in species.numbers] for a in labelled]) / sizes[:, None]
    energies = np.array([a.calc.results["energy"] for a in labelled], dtype=np.float64) / sizes
    fixed = np.array([z in known for z in species.numbers])
    values = np.array([known.get(z, 0.0) for z in species.numbers])
    left, unknown = energies - shares @ values, shares[:, ~fixed]
    charged = np.zeros((len(labelled), 2))
    if charges:
        charged = charge_columns([total_charge(atoms) for atoms in labelled]) / sizes[:, None]
    costs = np.zeros(2)
    if unknown.any() or charged.any():
        values[~fixed], costs = robust_energies(left, unknown, charged)
    if not unknown.any():
        values[~fixed] = _common(left, values, fixed)
    residual = energies - shares @ values - charged @ costs
    residual -= np.median(residual)  # with isolated atoms it holds what binds them
    spreads, least = _DOUBTFUL
    doubtful = np.abs(residual) > max(spreads * _spread(residual), least)
    return References(
        {z: float(e) for z, e in zip(species.numbers, values, strict=True)},
        (float(costs[0]), float(costs[1])),
        doubtful=tuple(places[n] for n in np.flatnonzero(doubtful)),
    )


def charge_columns(charges: npt.ArrayLike) -> np.ndarray:
    """Amounts of positive and of negative charge [n, 2] of structures with total charges [n] e.

    All 0 where an amount is the same for all structures: their energies then do not say what it costs.
    """
    charge = np.asarray(charges, np.float64)
    columns = np.stack([np.maximum(charge, 0), np.maximum(-charge, 0)], axis=1)
    return np.where(np.ptp(columns, axis=0) > 0, columns, 0) if len(columns) else columns


def robust_energies(
    energies: np.ndarray, shares: np.ndarray, charges: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Energies that come close to energies per atom by ``shares @ of_species + charges @ of_charges``.

    Args:
        energies: [n] eV/atom.
        shares: [n, S] of each species among the atoms.
        charges: [n, 2] positive and negative charge per atom, e; as `charge_columns`.

    Returns:
        of_species [S] eV, see `reference_energies`; of_charges [2] eV, 0 where there are no charges.
    """
    share, number = shares.sum(axis=1), shares.shape[1]
    common = float(np.median(energies[share > 0] / share[share > 0])) if share.any() else 0.0
    present = charges.any(axis=0)
    found = robust_fit(np.hstack([shares, charges[:, present]]), energies - common * share)
    costs = np.zeros(charges.shape[1])
    costs[present] = found[number:]
    return common + found[:number], costs


def _common(left: np.ndarray, values: np.ndarray, fixed: np.ndarray) -> float:
    """A value for species that occur nowhere: the mean of the known ones."""
    return float(values[fixed].mean()) if fixed.any() else float(np.median(left))


def proportions_left_open(counts: np.ndarray) -> np.ndarray:
    """Changes of reference energies [S, d] that change no energy of structures that were learned from.

    Of one composition the energies of its elements can be shifted against each other.

    Args:
        counts: [n, S] of each element, or of other things that have reference energies, in these structures.
    """
    _, sizes, directions = np.linalg.svd(np.unique(counts, axis=0))
    return np.asarray(directions[np.sum(sizes > 1e-8 * max(sizes, default=0.0)) :].T)


def robust_fit(shares: np.ndarray, energies: np.ndarray) -> np.ndarray:
    """Coefficients of smallest norm by Huber's loss: least absolute deviations first, whose spread sets its width.

    Args:
        shares: [n, S] of each species, or of other columns.
        energies: [n] eV/atom.

    Returns:
        [S] eV.
    """

    def solved(weights: np.ndarray) -> np.ndarray:
        root = np.sqrt(weights)
        return np.linalg.lstsq(shares * root[:, None], energies * root, rcond=1e-10)[0]

    coefficients = solved(np.ones(len(energies)))
    for _ in range(100):
        coefficients = solved(1 / np.maximum(np.abs(energies - shares @ coefficients), 1e-6))
    width = _SPREADS * _spread(energies - shares @ coefficients)
    for _ in range(30):
        coefficients = solved(np.minimum(1, width / np.maximum(np.abs(energies - shares @ coefficients), 1e-12)))
    return coefficients


def _spread(residual: np.ndarray) -> float:
    """Robust standard deviation, eV/atom."""
    return max(1.4826 * float(np.median(np.abs(residual))), _LEAST_SPREAD)


def _has_energy(atoms: Atoms) -> bool:
    return atoms.calc is not None and "energy" in atoms.calc.results
