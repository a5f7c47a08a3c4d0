"""One structure after the other through an ensemble, as engines ask for them: only what is asked for, and soon.

Engines (ASE, LAMMPS) call once a step with a structure that moved a little.  Its list of neighbours is kept
(`structures.followed`), sizes come in buckets, so that structures of similar size share a program, and a program gives
no more than a call needs: the energy alone takes no reverse pass, forces no score.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from ase.data import chemical_symbols
from jax.sharding import Mesh

from almlip_jax.compilation import check_name
from almlip_jax.ensembles import (
    AnyEnsemble,
    MixedEnsemble,
    Prediction,
    committee_statistics,
    gathered,
    laid_over,
    member_devices,
    spread_members,
)
from almlip_jax.errors import InputError
from almlip_jax.models import Params
from almlip_jax.potential.answers import Answer, Layout, Reader, of_atoms, readers_of
from almlip_jax.potential.novelty import FittedScore
from almlip_jax.precision import full_precision
from almlip_jax.scores import Score, atom_scores, largest_of, scores
from almlip_jax.structures.electronic_state import electronic_state
from almlip_jax.structures.followed import Follower, Listed, Place, followed_graph
from almlip_jax.structures.graph import Graph, Places, atom_virials, forces_and_virial
from almlip_jax.targets import targets

if TYPE_CHECKING:
    from almlip_jax.compilation import Precision
    from almlip_jax.potential.potential import Potential

Part: TypeAlias = Literal["energies", "forces", "scores", "atoms"]
"""What a program gives: ``energies`` those of atoms and members, from a forward pass alone; ``forces`` the means of all
that the models predict; ``scores`` the same, what each member says, and every score; ``atoms`` energies and stresses of
atoms, and forces."""

_ENERGIES = ("energies", "energies_std", "member_energies", "member_energy", "energy", "free_energy")
_FORCES = ("energy", "free_energy", "forces", "stress")
_MEMBERS = ("member_energy", "member_forces", "member_stress")
_WORTH_SHARING = 3.5e7  # operations of a call, some two milliseconds of a core: cores that meet take half of one
_PROGRAMS = 64  # kinds of programs that are remembered; each holds one for every bucket of sizes


def reads_positions(ensemble: AnyEnsemble) -> bool:
    """Whether energies depend on more than edges, so that a virial cannot be told apart by atoms."""
    groups = ensemble.groups if isinstance(ensemble, MixedEnsemble) else (ensemble,)
    return any(one.model.long_range for one in groups)


def given_scores(declared: Iterable[Score], potential: Potential) -> list[str]:
    """Names of the scores that a potential gives."""
    known = [one for one in declared if one.target is None or one.target in potential.ensemble.targets]
    fitted = set(potential.novelty) | ({active.settings.score} if (active := potential.active_set) else set())
    return [one.name for one in known if not one.fitted or one.name in fitted]


def parts_of(potential: Potential) -> dict[str, tuple[Part, ...]]:
    """Name of every result that a potential gives -> the parts that give it, the least work first."""
    ensemble = potential.ensemble
    given = tuple(one.label for one in targets(ensemble.targets))
    error = ("force_error",) if potential.force_error(np.ones(1)) is not None else ()
    scored = (*given_scores(scores(), potential), *map(of_atoms, given_scores(atom_scores(), potential)), *error)
    stresses = () if reads_positions(ensemble) else ("stresses",)
    by_part: dict[Part, tuple[str, ...]] = {
        "energies": _ENERGIES,
        "forces": (*_FORCES, *given),
        "scores": (*_FORCES, *given, *_MEMBERS, *scored),
        "atoms": (*_ENERGIES, *_FORCES, *stresses) if stresses else (),
    }
    every = dict.fromkeys(name for part in get_args(Part) for name in by_part[part])
    return {name: tuple(part for part in get_args(Part) if name in by_part[part]) for name in every}


class _Laid(NamedTuple):
    """A list of neighbours.

    Attributes:
        found: as it was found.
        out: where the members are.
        references: eV, of the elements of its atoms.
        reference: eV, their sum.
    """

    found: Listed
    out: Listed
    references: np.ndarray
    reference: float


class Following:
    """A potential that follows structures.

    Args:
        potential: with what was fitted to it.
        skin: Angstrom, by which lists of neighbours reach beyond the cutoff.
        precision: of the evaluation, that of the potential where not given.
        share: whether the cores of a CPU share out the members of a committee of one architecture, as in our own
            dynamics; worth it where members take long and other programs leave the cores alone.  None: where a call
            has work enough.

    Raises:
        InputError: the skin is negative or no number, or there is no such precision.
    """

    def __init__(
        self, potential: Potential, skin: float, precision: Precision | None = None, *, share: bool | None = False
    ) -> None:
        check_name(precision or potential.precision)
        if not (np.isfinite(skin) and skin >= 0):
            raise InputError(f"the skin of a list of neighbours must not be negative, and is {skin} Angstrom.")
        self.potential = potential
        self.precision = precision or potential.precision
        self.known = parts_of(potential)
        dtype = np.dtype(self.precision)
        self._references = np.full(len(chemical_symbols), np.nan)  # eV by atomic number
        for number, energy in potential.reference_energies.items():
            self._references[number] = energy
        self.follower = Follower(potential.species, potential.cutoff, skin, dtype)
        self._declared: tuple[Score, ...] = ()
        self._programs: dict[Part, _Program] = {}
        self._taken: dict[Part, tuple[Layout, dict[str, Reader]]] = {}
        self._last: tuple[np.ndarray, tuple[int, int]] | None = None
        with self._in_precision():
            arrays, novelty = jax.tree.map(lambda x: in_type(x, dtype), (potential.params, potential.novelty))
        self._arrays: tuple[Params, Mapping[str, FittedScore]] = arrays, novelty
        self._listed: _Laid | None = None
        self._devices: Mesh | None = None
        self._lay(_sharing(arrays) if share else None)
        self._undecided = share is None and _sharing(arrays) is not None

    def __call__(self, atoms: Atoms, part: Part) -> Answer:
        """Results of a structure by the names that ASE gives them, to be read before the structure is changed.

        Raises:
            InputError: an element, charge or spin is not known or no number, or neighbours cannot be looked for.
        """
        if len(atoms) == 0:
            raise InputError("there is no atom to evaluate.")
        return self.moved(atoms, part, self.state_of(atoms))

    def state_of(self, atoms: Atoms) -> tuple[int, int]:
        """Charge and multiplicity of a structure.

        Raises:
            InputError: they are no numbers.

        Warns:
            UserWarning: nothing was learned of them; once for each structure that is followed.
        """
        state = electronic_state(atoms)
        self._look_at_state(atoms, state)
        return state

    def moved(self, atoms: Atoms, part: Part, state: tuple[int, int]) -> Answer:
        """As a call, of a structure whose charge and multiplicity are known and have been looked at (`state_of`)."""
        with self._in_precision():
            listed, place = self.follower.look(atoms, state)
            if self._undecided:
                self._decide(part, listed, place)
            if self._listed is None or self._listed.found is not listed:
                references = self._references[atoms.numbers]
                self._listed = _Laid(listed, self._on_devices(listed), references, float(references.sum()))
            laid = self._listed
            novelty = self._novelty if part == "scores" else {}
            packed, layout = self._program(part)(self._params, novelty, laid.out, place)
        return Answer(atoms, packed, layout, self._readers(part, layout), laid.references, laid.reference)

    def parts(self, wanted: Set[str]) -> list[Part]:
        """The parts that give some results, as little work as does; of names that are not known, nothing."""
        chosen: set[Part] = set()
        for name in sorted(wanted & self.known.keys(), key=lambda name: (len(self.known[name]), name)):
            if not chosen & {*self.known[name]}:
                chosen.add(self.known[name][0])
        return [part for part in get_args(Part) if part in chosen]

    def _program(self, part: Part) -> _Program:
        """The program of a part; asking for it by value would take longer than the rest of a call."""
        declared = (*scores(fitted=False), *atom_scores(fitted=False))
        if declared != self._declared:
            self._declared, self._programs = declared, {}
        if part not in self._programs:
            self._programs[part] = _program(self.potential.ensemble, part, declared, self._devices is not None)
        return self._programs[part]

    def _lay(self, devices: Mesh | None) -> None:
        """Puts members on one device, or over several."""
        params, novelty = self._arrays
        self._devices, self._programs, self._listed = devices, {}, None
        with self._in_precision():
            self._params = jax.device_put(params) if devices is None else spread_members(params)
            self._novelty = self._on_devices(jax.device_put(novelty))

    def _decide(self, part: Part, listed: Listed, place: Place) -> None:
        """Shares members out where a call has work enough: a rule, not a measurement, so that runs can be repeated."""
        self._undecided = False
        novelty = self._novelty if part == "scores" else {}
        if self._program(part).operations(self._params, novelty, listed, place) > _WORTH_SHARING:
            self._lay(_sharing(self._params))

    def _on_devices(self, tree: Any) -> Any:
        """Arrays where members are; a program would copy them there in every call."""
        return tree if self._devices is None else laid_over(tree, self._devices, of_members=False)

    def __getstate__(self) -> dict[str, Any]:
        """Without programs, and without arrays of devices, which come back in the precision of the other process."""
        empty: dict[str, Any] = dict.fromkeys(("_listed", "_params", "_novelty"))
        programs: dict[str, Any] = {"_programs": {}, "_declared": (), "_taken": {}}
        return self.__dict__ | empty | programs | {"_devices": self._devices is not None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Puts parameters on devices again, shared out where they were and there are several."""
        self.__dict__.update(state)
        self._lay(_sharing(self._arrays[0]) if state["_devices"] else None)

    def _in_precision(self) -> AbstractContextManager[Any]:
        return jax.enable_x64(True) if self.precision == "float64" else nullcontext()

    def _look_at_state(self, atoms: Atoms, state: tuple[int, int]) -> None:
        """Warns where nothing was learned of a state; once for each structure that is followed."""
        last, self._last = self._last, (atoms.numbers.copy(), state)
        if last is not None and last[1] == state and np.array_equal(last[0], atoms.numbers):
            return
        strange = self.potential.strange_state(atoms)
        if strange is not None:
            warnings.warn(strange, stacklevel=4)

    def _readers(self, part: Part, layout: Layout) -> dict[str, Reader]:
        """What takes results out of what a program gives."""
        held = self._taken.get(part)
        if held is None or held[0] is not layout:
            readers = readers_of(part, layout, self.potential)
            known = {name: read for name, read in readers.items() if name in self.known}
            held = self._taken[part] = layout, known
        return held[1]


def _sharing(params: Params) -> Mesh | None:
    """The cores of a CPU that members are laid over; None where that is one, or they are of several architectures."""
    if isinstance(params, tuple) or jax.default_backend() != "cpu":
        return None
    devices = member_devices(params)
    return devices if devices.size > 1 else None


def in_type(values: Any, dtype: np.dtype) -> Any:
    """Numbers in a type; whole ones as they are."""
    array = np.asarray(values)
    return array.astype(dtype) if np.issubdtype(array.dtype, np.floating) else array


class _Program:
    """A compiled function whose results come in one array: each array costs some microseconds, of which a call has few.

    Args:
        function: of parameters, novelty scores, list and place; gives a tree of floating-point arrays.
    """

    def __init__(self, function: Callable[..., dict[str, Any]]) -> None:
        self._layouts: dict[Hashable, Layout] = {}  # noted where a shape is traced

        def packed(params: Params, novelty: Mapping[str, FittedScore], listed: Listed, place: Place) -> jax.Array:
            found = function(params, novelty, listed, place)
            self._layouts[_key(novelty, listed, place)] = Layout.of(found)
            return jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(found)])

        self._run = jax.jit(full_precision(packed))

    def operations(
        self, params: Params, novelty: Mapping[str, FittedScore], listed: Listed, place: Place
    ) -> float:
        """Floating-point operations of a call, by XLA's count; 0 where it does not say."""
        found = self._run.lower(params, novelty, listed, place).cost_analysis()
        return float((found or {}).get("flops", 0.0))

    def __call__(
        self, params: Params, novelty: Mapping[str, FittedScore], listed: Listed, place: Place
    ) -> tuple[np.ndarray, Layout]:
        """The results on the host, float64, and where in them they lie."""
        packed = np.asarray(self._run(params, novelty, listed, place)).astype(np.float64)
        return packed, self._layouts[_key(novelty, listed, place)]


def _key(novelty: Mapping[str, FittedScore], listed: Listed, place: Place) -> Hashable:
    """What the layout of results depends on, besides the function."""
    return tuple(novelty), listed.neighbors.shape, place.numbers.dtype


@lru_cache(maxsize=_PROGRAMS)
def _program(ensemble: AnyEnsemble, part: Part, declared: tuple[Score, ...], shared: bool) -> _Program:
    """What gives a part of the results of a structure, of members that are laid over devices where they are shared.

    Potentials of one architecture share it; and scores that are declared later have one of their own.
    """
    predict = gathered(ensemble.predict) if shared else ensemble.predict

    def of_structure(
        params: Params, novelty: Mapping[str, FittedScore], listed: Listed, place: Place
    ) -> dict[str, Any]:
        """What is asked for, of the structure as it is now."""
        graph = followed_graph(listed, place, ensemble.cutoff)
        if part == "energies":
            return {"atom_energies": ensemble.atom_energies(params, graph)}
        if part == "atoms":
            return _atoms(ensemble, params, graph)
        if part == "forces":
            return _forces(predict(params, graph), graph)
        return members_and_scores(predict(params, graph), novelty, graph)

    return _Program(of_structure)


def _atoms(ensemble: AnyEnsemble, params: Params, graph: Graph) -> dict[str, Any]:
    """Energies of atoms and members; and, by a reverse pass of their mean, forces and the virials of atoms."""

    def total(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        moved = graph.replace(vectors=vectors)  # type: ignore[attr-defined]
        of_atoms = ensemble.atom_energies(params, moved)
        return jnp.sum(jnp.where(graph.atom_mask, jnp.mean(of_atoms, axis=0), 0)), of_atoms

    (energy, of_atoms), gradient = jax.value_and_grad(total, has_aux=True)(graph.vectors)
    by_edge = jnp.where(graph.edge_mask[..., None], gradient, 0)
    forces, virial = forces_and_virial(Places(by_edge), graph)
    each = atom_virials(by_edge, graph)
    return {
        "energy": energy[None],
        "forces": forces,
        "virial": virial,
        "further": {},
        "atom_energies": of_atoms,
        "atom_virial": 0.5 * (each + jnp.swapaxes(each, -1, -2)),
    }


def _forces(prediction: Prediction, graph: Graph) -> dict[str, Any]:
    """Means over the members; what else a committee knows the compiler leaves out."""
    committee = committee_statistics(prediction, graph)
    return {name: getattr(committee, name) for name in ("energy", "forces", "virial", "further")}


def members_and_scores(prediction: Prediction, novelty: Mapping[str, FittedScore], graph: Graph) -> dict[str, Any]:
    """What an ensemble says of a graph, from what its members said: means, every score, and each member."""
    committee = committee_statistics(prediction, graph)
    fitted = {name: one.of(prediction, graph) for name, one in novelty.items()}
    far = {name: values for name, values in fitted.items() if largest_of(name) is not None}
    alone = {name: values for name, values in fitted.items() if name not in far}
    return {
        **{name: getattr(committee, name) for name in ("energy", "forces", "virial", "further")},
        "scores": {**committee.scores, **alone},
        "atom_scores": {**committee.atom_scores, **far},
        "member_energy": prediction.energy,
        "member_forces": prediction.forces,
        "member_virial": prediction.virial,
    }
