"""What everything else relies on where a model is concerned, checked for one: of a user's own, before it is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ase import Atoms
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

from almlip_jax.ensembles import Ensemble
from almlip_jax.errors import InputError
from almlip_jax.given import given_settings, given_structures
from almlip_jax.models import LinearLast, Model, ModelSettings, Params, build_model
from almlip_jax.models.constants import learned_leaves
from almlip_jax.structures.graph import Graph
from almlip_jax.structures.neighbors import largest_neighbor_count
from almlip_jax.structures.packing import BatchShape, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable

_CLOSE = 1e-5  # relative, of what should be equal; models may hold single-precision constants
_STEP = 1e-3  # Angstrom, of finite differences
_SLOPE = 1e-3  # relative, of forces by finite differences
_NEAR = 1e-4  # Angstrom, from the cutoff
_EMPTY = (
    "empty slots of a graph hold vectors of length 0, where neither a direction nor the derivative of a length exists: "
    "let the geometry put others in their place (`edge_mask`)."
)
_LOOKED_AT = 6  # atoms whose derivatives are looked at one by one


def check_model(
    model: ModelSettings | Mapping[str, Any] | str, structures: Sequence[Atoms] | Atoms, *, seed: int = 0
) -> list[str]:
    """Refuses a model that does not keep what it promises, with random parameters on some structures.

    Looked at, in double precision: that constants are set and nothing else changes its shape; that energies, forces and
    features are finite, also where slots of a graph are empty; that energies and features stay the same where
    structures are turned, mirrored and their atoms reordered; that forces are the derivatives of energies; that an atom
    which reaches the cutoff is felt no more; that charge and spin change nothing unless the model ``sees_state``; that
    in a ``local`` model an atom's energy depends on its own edges; that the rows of ``linear`` are derivatives by
    parameters, and those of ``features`` and ``code``; and that more species (``with_species``) change nothing for
    those that were there.

    Args:
        model: settings of it, a dict of them such as ``{"kind": "user", "function": "my_models:make"}``, or the name of
            a kind.
        structures: like those that it is meant for, of a few atoms each, and with some that are disordered.
        seed: of the parameters.

    Returns:
        what the model does not offer and need not, a sentence for each.

    Raises:
        InputError: the settings are not valid, no structure holds two atoms, or the model breaks a promise; the
            sentence says which.

    >>> from ase.build import molecule
    >>> from almlip_jax import check_model
    >>> check_model({"kind": "mtp", "level": 4, "radial_basis_size": 3}, molecule("H2O"))
    []
    """
    settings = given_settings(ModelSettings, model, "model")
    frames = list(given_structures(structures, "structures"))
    if not any(len(frame) > 1 for frame in frames):
        raise InputError("structures: a model is checked on structures of several atoms; give some.")
    with jax.enable_x64(True):
        return _Check(settings, tuple(frames), seed).all()


@dataclass(frozen=True, eq=False)
class _Check:
    """One check of one model; arrays are in float64."""

    settings: ModelSettings
    frames: tuple[Atoms, ...]
    seed: int

    def all(self) -> list[str]:
        """Looks at every promise, and gives what is not offered."""
        self.constants()
        self.finite()
        self.symmetries()
        self.slopes()
        self.cutoff()
        self.states()
        self.locality()
        self.rows()
        return [remark for remark in (self.more_species(), self.last()) if remark is not None]

    @cached_property
    def species(self) -> SpeciesTable:
        return SpeciesTable.of(self.frames)

    @cached_property
    def model(self) -> Model:
        return build_model(self.settings, self.species)

    @cached_property
    def ensemble(self) -> Ensemble:
        return Ensemble(self.model, 1)

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        return list(combinations_with_replacement(self.species.numbers, 2))

    @cached_property
    def shape(self) -> BatchShape:
        """Of every graph, so that one program serves all; with empty slots of each sort."""
        atoms = max(sum(map(len, self.frames)), 2 * len(self.pairs), len(self.species))
        neighbors = max(2, largest_neighbor_count(self.frames, self.model.cutoff)) + 2
        return BatchShape(atoms + 2, neighbors, max(len(self.frames), len(self.pairs), len(self.species)) + 1)

    def graph(self, frames: Sequence[Atoms], species: SpeciesTable | None = None) -> Graph:
        packed = pack(
            frames, species or self.species, self.model.cutoff, neighbors=self.shape.neighbors, dtype=np.float64
        )
        plan, _ = plan_batches(packed, np.arange(len(frames)), self.shape)
        return take_batch(packed.data, plan, 0)[0]

    @cached_property
    def here(self) -> Graph:
        return self.graph(self.frames)

    @cached_property
    def params(self) -> Params:
        """Standardised, with a leading axis of one model."""
        fresh = _double(jax.jit(self.ensemble.init)(jax.random.key(self.seed)))
        survey = jax.jit(self.ensemble.survey)(self.here)
        return jax.jit(lambda one, seen: self.ensemble.standardise(one, seen, 1.0))(fresh, survey)

    def seen(self, frames: Sequence[Atoms]) -> _Seen:
        return self.predicted(self.graph(frames))

    def predicted(self, graph: Graph) -> _Seen:
        found = self._predict(self.params, graph)
        real, of = np.asarray(graph.atom_mask), np.asarray(graph.structure_mask)
        return _Seen(*(np.asarray(part)[0] for part in found[:3])).of(real, of)

    @cached_property
    def _predict(self) -> Any:
        def parts(params: Params, graph: Graph) -> tuple[jax.Array, ...]:
            found = self.ensemble.predict(params, graph)
            return found.energy, found.forces, found.features

        return jax.jit(parts)

    @cached_property
    def now(self) -> _Seen:
        return self.predicted(self.here)

    # -- promises -----------------------------------------------------------------------------------------------------

    def constants(self) -> None:
        """`standardise` keeps the shapes of all parameters."""
        fresh = jax.eval_shape(self.ensemble.init, jax.random.key(self.seed))
        before, after = (jax.tree.map(jnp.shape, one) for one in (fresh, self.params))
        if before != after:
            raise InputError("`standardise` gives parameters of other names or shapes than `init`; let it keep them.")
        unset = [leaf for leaf in jax.tree.leaves(self.params) if not np.all(np.isfinite(leaf))]
        if unset:
            raise InputError(f"`init` or `standardise` gives numbers that are not finite; {_EMPTY}")

    def finite(self) -> None:
        for what, values in vars(self.now).items():
            if not np.all(np.isfinite(values)):
                raise InputError(f"{what} are not finite; {_EMPTY}")

    def symmetries(self) -> None:
        """Energies and features of structures that are turned, mirrored, moved and reordered are the same."""
        stream = np.random.default_rng(self.seed)
        turn = -Rotation.random(random_state=self.seed).as_matrix()
        turned, orders = [], []
        for frame in self.frames:
            orders.append(stream.permutation(len(frame)))
            other = frame[orders[-1]]
            other.info = frame.info
            other.set_cell(frame.cell.array @ turn.T)
            other.positions = frame.positions[orders[-1]] @ turn.T + 0.3
            turned.append(other)
        starts = np.cumsum([0, *map(len, self.frames)])
        order = np.concatenate([start + one for start, one in zip(starts, orders, strict=False)])
        found = self.seen(turned)
        moved = "where structures are turned, mirrored and moved, and their atoms reordered"
        self._same(found.energies, self.now.energies, f"energies change {moved}")
        self._same(found.features, self.now.features[order], f"features change {moved}")

    def slopes(self) -> None:
        """Forces along one direction for each structure, by differences of fourth order."""
        stream = np.random.default_rng(self.seed + 1)
        along = [stream.normal(size=(len(frame), 3)) for frame in self.frames]
        energies = []
        for step in (_STEP, -_STEP, 2 * _STEP, -2 * _STEP):
            moved = [frame.copy() for frame in self.frames]
            for frame, direction in zip(moved, along, strict=True):
                frame.positions += step * direction
            energies.append(self.seen(moved).energies)
        by_steps = (8 * (energies[0] - energies[1]) - (energies[2] - energies[3])) / (12 * _STEP)
        starts = np.cumsum([0, *map(len, self.frames)])
        parts = [self.now.forces[a:b] for a, b in zip(starts, starts[1:], strict=False)]
        exact = -np.array([np.sum(one * part) for one, part in zip(along, parts, strict=True)])
        size = np.array([np.linalg.norm(one) * np.linalg.norm(part) for one, part in zip(along, parts, strict=True)])
        wrong = np.abs(by_steps - exact) > _SLOPE * (size + 0.1)
        if np.any(wrong):
            raise InputError(
                f"forces are not the derivatives of energies (structure {int(np.argmax(wrong))}: {exact[wrong][0]:.6g} "
                f"eV/Angstrom along a direction, {by_steps[wrong][0]:.6g} by differences); what energies depend on has "
                "to come through the geometry, and to be smooth."
            )

    def cutoff(self) -> None:
        """Two atoms at the cutoff, of each pair of species, have the energies of lone ones."""
        near = self.model.cutoff - _NEAR
        dimers = [Atoms(numbers=pair, positions=[[0, 0, 0], [0, 0, near]]) for pair in self.pairs]
        lone = self.seen([Atoms([z]) for z in self.species.numbers]).energies
        alone = dict(zip(self.species.numbers, lone, strict=True))
        for (one, other), energy in zip(self.pairs, self.seen(dimers).energies, strict=True):
            felt = abs(energy - alone[one] - alone[other])
            if not felt < 10 * _NEAR:  # not a number is too much
                raise InputError(
                    f"two atoms at the cutoff ({near:.4f} Angstrom) change the energy by {felt:.3g} eV; let every "
                    "function of a distance end at the cutoff, with its slope (`models.radial.polynomial_cutoff`)."
                )

    def states(self) -> None:
        """Charge and spin change nothing, unless the model says that it sees them."""
        if self.ensemble.sees_state:
            return
        told = self.here.replace(charge=self.here.charge + 1, spin=self.here.spin + 1)  # type: ignore[attr-defined]
        self._same(
            self.predicted(told).energies,
            self.now.energies,
            "energies depend on charge or spin, and the model says that `sees_state` is false",
        )

    def locality(self) -> None:
        """Derivatives of the energies of some atoms by the edges of others."""
        if not self.model.local:
            return
        real = np.flatnonzero(np.asarray(self.here.atom_mask))[:_LOOKED_AT]

        def energies(vectors: jax.Array) -> jax.Array:
            moved = self.here.replace(vectors=vectors)  # type: ignore[attr-defined]
            return self.ensemble.atom_energies(self.params, moved)[0, real]

        by_edges = np.linalg.norm(jax.jit(jax.jacrev(energies))(self.here.vectors), axis=(2, 3))  # [looked at, A]
        own = by_edges[np.arange(len(real)), real].copy()
        by_edges[np.arange(len(real)), real] = 0
        if np.any(by_edges > _CLOSE * (own.max() + 1e-3)):
            raise InputError(
                "the model says that it is `local`, and the energy of an atom depends on edges of other atoms: large "
                "structures would get other energies than small ones; set it to false."
            )

    def rows(self) -> None:
        """Every column of `linear` is the derivative of the energies by some parameter."""
        real = np.flatnonzero(np.asarray(self.here.atom_mask))
        chosen = real[np.unique(np.linspace(0, len(real) - 1, _LOOKED_AT).astype(int))]
        rows = np.asarray(jax.jit(self.ensemble.linear)(self.params, self.here))[0]
        if rows.ndim != 2 or len(rows) != len(self.here.atom_mask):
            raise InputError(f"`linear` gives an array of shape {rows.shape}; it should be [atoms, weights].")

        def energies(params: Params) -> jax.Array:
            return self.ensemble.atom_energies(params, self.here)[0, chosen]

        by_params = jax.jit(jax.jacrev(energies))(self.params)
        columns = np.concatenate([np.reshape(leaf, (len(chosen), -1)) for leaf in learned_leaves(by_params)], axis=1).T
        size = np.sqrt(np.mean(rows[chosen] ** 2)) + 1e-12
        apart, _ = cKDTree(columns / size).query(rows[chosen].T / size)
        if np.any(apart > 100 * _CLOSE):
            raise InputError(
                f"column {int(np.argmax(apart))} of `linear` is the derivative of energies by no parameter; features "
                "have to be what the last layer multiplies by its weights, and `last_scale` all that stands before it."
            )
        told = self.rows_of_features()
        if rows.shape != told.shape or np.any(np.abs(rows - told)[real] > 100 * _CLOSE * size):
            raise InputError(
                "`linear` gives other rows than `features` and `code` of what `apply` gives, of which grades, active "
                "sets and last-layer features are made; let `apply` give these, and `linear` be that of `LinearLast`."
            )

    def rows_of_features(self) -> np.ndarray:
        """What `linear` is of a model whose last layer is linear in its features, [A, d]."""

        def made(params: Params) -> jax.Array:
            found = self.ensemble.predict(params, self.here).linear_rows(self.here, self.model.num_species)
            return jax.vmap(self.model.last_scale)(params)[:, None, None] * found

        return np.asarray(jax.jit(made)(self.params))[0]

    def more_species(self) -> str | None:
        """Whether species can be added, by which energies of those that were there stay the same."""
        new = next(z for z in (2, 10, 18, 36, 54) if z not in self.species.numbers)
        wanted = SpeciesTable(tuple(sorted({*self.species.numbers, new})))
        larger = Ensemble(build_model(self.settings, wanted), 1)
        fresh = _double(jax.jit(larger.init)(jax.random.key(self.seed + 1)))
        try:
            grown = self.ensemble.with_species(self.params, fresh, wanted)
        except NotImplementedError:
            return "`with_species` is not there: no training that begins with a potential can add elements."
        if jax.tree.map(jnp.shape, grown) != jax.tree.map(jnp.shape, fresh):
            raise InputError("`with_species` gives parameters of other names or shapes than `init` for these species.")
        graph = self.graph(self.frames, wanted)
        found = np.asarray(jax.jit(larger.predict)(grown, graph).energy)[0, np.asarray(graph.structure_mask)]
        self._same(found, self.now.energies, "`with_species` changes energies of the species that were there")
        return None

    def last(self) -> str | None:
        """Whether weights times rows are the energy, up to what the species adds: where the model says them."""
        if isinstance(self.model, LinearLast):
            try:
                self.model.last(jax.tree.map(lambda leaf: leaf[0], self.params))
                return None
            except InputError:
                pass
        return "`last` is not there: frames of a teacher cannot be seen again with a last layer of their own."

    def _same(self, one: np.ndarray, other: np.ndarray, what: str) -> None:
        apart = float(np.max(np.abs(one - other), initial=0))
        if not apart <= _CLOSE * (float(np.max(np.abs(other), initial=0)) + 1):
            raise InputError(f"{what} (by {apart:.3g}).")


@dataclass(frozen=True)
class _Seen:
    """Predictions of one model: energies [n], forces [N, 3] and features [N, F], those of all structures in a row."""

    energies: np.ndarray
    forces: np.ndarray
    features: np.ndarray

    def of(self, real: np.ndarray, structures: np.ndarray) -> _Seen:
        return _Seen(self.energies[structures], self.forces[real], self.features[real])


def _double(params: Params) -> Params:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
