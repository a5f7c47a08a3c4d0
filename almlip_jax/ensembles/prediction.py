"""The predictions of an ensemble for a graph: those of its members, and their committee statistics.

The statistics are those that are declared in `scores`; here is what they are made of.

Where members also say something about their own errors (`ensembles.heads`), the law of total variance adds it up: the
epistemic variance is that of the members plus the mean of what each says about its prediction, the total one is the
epistemic one plus the mean noise.  For forces these are variances of vectors, three times that of a component.  Members
that say nothing about themselves have epistemic and total deviations equal to the spread.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import field
from functools import cached_property

import jax
import jax.numpy as jnp
from flax import struct

from almlip_jax.ensembles.heads import Noise
from almlip_jax.models.base import linear_rows
from almlip_jax.scores import Needs, Score, atom_scores, scores
from almlip_jax.structures.graph import Graph, atom_counts, sum_over_atoms
from almlip_jax.targets import Target


@struct.dataclass
class Prediction:
    """Energies, forces, virial and features of a graph; with a leading member axis M from an ensemble.

    Attributes:
        energy: [(M,) S] eV, relative to the reference energies.
        forces: [(M,) A, 3] eV/Angstrom.
        virial: [(M,) S, 3, 3] eV, ``-dE/d(strain)``; stress = -virial / volume.
        features: [(L,) A, F] invariant features of the last hidden layer, of each model.
        code: [(L,) A, Q] what the last, linear layer of a model tells central species apart by; None: one by one.
        noise: with an axis over models L from an ensemble: what each model says about its own errors, if anything.
        further: name -> [(L,) S, ...], or [(L,) A, ...] of atoms, targets that not every model gives (`targets`):
            dipoles [(L,) S, 3].
    """

    energy: jax.Array
    forces: jax.Array
    virial: jax.Array
    features: jax.Array
    noise: Noise | None = None
    code: jax.Array | None = None
    further: Mapping[str, jax.Array] = field(default_factory=dict)

    def linear_rows(self, graph: Graph, num_species: int) -> jax.Array:
        """What the weights of each model's last layer are multiplied by, [L, A, d]; see `models.base.linear_rows`."""
        return rows_of_models(self.features, self.code, graph, num_species)


def rows_of_models(features: jax.Array, code: jax.Array | None, graph: Graph, num_species: int) -> jax.Array:
    """`models.base.linear_rows` of features [L, A, F] and codes [L, A, Q] of several models, [L, A, d]."""
    return jax.vmap(lambda x, q: linear_rows(x, q, graph, num_species))(features, code)


@struct.dataclass
class Committee:
    """Statistics over the member axis of a `Prediction`.

    Attributes:
        energy: [S] eV, mean (relative to the reference energies).
        forces: [A, 3] eV/Angstrom, mean.
        virial: [S, 3, 3] eV, mean.
        further: name -> [S, ...], or [A, ...] of atoms, means of the further targets that the models give.
        scores: name -> [S], every score of structures that follows from predictions alone (`scores.scores`).
        atom_scores: name -> [A], every such score of atoms (0 for padding).
    """

    energy: jax.Array
    forces: jax.Array
    virial: jax.Array
    further: Mapping[str, jax.Array]
    scores: Mapping[str, jax.Array]
    atom_scores: Mapping[str, jax.Array]


def committee_statistics(prediction: Prediction, graph: Graph) -> Committee:
    """Reduces the member axis of a `Prediction` to the mean and every committee score.

    Args:
        prediction: with leading member axis, energy [M, S], forces [M, A, 3], virial [M, S, 3, 3].
        graph: the graph it was made for.

    Returns:
        `Committee`, arrays without the member axis.

    >>> import jax.numpy as jnp
    >>> from almlip_jax.ensembles import Prediction, committee_statistics
    >>> from almlip_jax.structures.graph import lone_atom
    >>> nothing = {"forces": jnp.zeros((2, 1, 3)), "virial": jnp.zeros((2, 1, 3, 3)), "features": jnp.zeros((1, 1, 4))}
    >>> committee = committee_statistics(Prediction(energy=jnp.array([[1.0], [3.0]]), **nothing), lone_atom())
    >>> float(committee.energy[0]), float(committee.scores["energy_std"][0])  # eV
    (2.0, 1.0)
    """
    seen = Seen(prediction, graph)
    return Committee(
        energy=seen.energy,
        forces=seen.forces,
        virial=jnp.mean(prediction.virial, axis=0),
        further={name: seen.mean_of(name) for name in prediction.further},
        scores={one.name: seen[one.name] for one in seen.given(scores(fitted=False))},
        atom_scores={one.name: seen.atom(one.name) for one in seen.given(atom_scores(fitted=False))},
    )


class Seen:
    """What declarations of scores look at; whatever several of them need is computed once.

    Args:
        prediction: with leading member axis.
        graph: the graph it was made for.
    """

    def __init__(self, prediction: Prediction, graph: Graph) -> None:
        self.prediction, self.graph = prediction, graph
        self._scores = {one.name: one for one in scores(fitted=False)}
        self._atom_scores = {one.name: one for one in atom_scores(fitted=False)}
        self._found: dict[object, jax.Array] = {}
        self._held: list[jax.Array] = []

    def __getitem__(self, name: str) -> jax.Array:
        """Another score of structures, [S]."""
        return self._once(("score", name), self._scores[name])

    def atom(self, name: str) -> jax.Array:
        """A score of atoms, [A]; 0 for padding."""
        return self._once(("atom score", name), self._atom_scores[name])

    def given(self, declared: Iterable[Score]) -> list[Score]:
        """Those that belong to what the members predict."""
        return [one for one in declared if one.target is None or one.target in self.prediction.further]

    def mean_of(self, target: str) -> jax.Array:
        """[S, ...] or [A, ...] of a target that not every model gives, mean of the models."""
        key = ("mean of", target)
        if key not in self._found:
            self._found[key] = jnp.mean(self.prediction.further[target], axis=0)
        return self._found[key]

    def deviation(self, target: Target) -> jax.Array:
        """[S] or [A], of such a target over all of its components: ``sqrt(mean_m |X_m - X|^2)``; 0 for padding."""
        change = self.prediction.further[target.name] - self.mean_of(target.name)
        found = jnp.sqrt(jnp.mean(jnp.sum(change**2, axis=tuple(range(2, change.ndim))), axis=0))
        return found if target.per == "structure" else jnp.where(self.graph.atom_mask, found, 0)

    def _once(self, key: object, score: Score) -> jax.Array:
        if key not in self._found:
            if score.largest_of is not None:
                self._found[key] = self.largest(self.atom(score.largest_of))
            elif score.mean_of is not None:
                self._found[key] = self.mean(self.atom(score.mean_of))
            else:
                assert score.of is not None  # of every declared one that is not fitted
                self._found[key] = score.of(self)
        return self._found[key]

    @cached_property
    def energy(self) -> jax.Array:
        """[S] eV, mean of the members."""
        return jnp.mean(self.prediction.energy, axis=0)

    @cached_property
    def forces(self) -> jax.Array:
        """[A, 3] eV/Angstrom, mean of the members."""
        return jnp.mean(self.prediction.forces, axis=0)

    @cached_property
    def force_length(self) -> jax.Array:
        """[A] eV/Angstrom, of the mean forces."""
        return jnp.linalg.norm(self.forces, axis=-1)

    @cached_property
    def counts(self) -> jax.Array:
        """[S], atoms of each structure, at least 1."""
        return atom_counts(self.graph)

    def mean(self, of_atoms: jax.Array) -> jax.Array:
        """[S] mean over the atoms of each structure, of values [A] that are 0 for padding."""
        return self._reduced("mean", of_atoms, lambda: sum_over_atoms(of_atoms, self.graph) / self.counts)

    def largest(self, of_atoms: jax.Array) -> jax.Array:
        """[S] largest value of each structure's atoms, of values [A] >= 0."""
        return self._reduced("largest", of_atoms, lambda: _max_over_atoms(of_atoms, self.graph))

    def _reduced(self, how: str, of_atoms: jax.Array, reduce: Callable[[], jax.Array]) -> jax.Array:
        # deviations of different meaning are one array where members say nothing about themselves; an array that is
        # let go leaves its identity to the next one, so that those that were seen are held
        key = (how, id(of_atoms))
        if key not in self._found:
            self._held.append(of_atoms)
            self._found[key] = reduce()
        return self._found[key]

    @cached_property
    def _variances(self) -> dict[Needs, tuple[jax.Array, jax.Array]]:
        """Of energies [S] and of force vectors [A]."""
        energy = jnp.mean((self.prediction.energy - self.energy) ** 2, axis=0)
        forces = jnp.mean(jnp.sum((self.prediction.forces - self.forces) ** 2, axis=-1), axis=0)
        found: dict[Needs, tuple[jax.Array, jax.Array]] = {"spread": (energy, forces)}
        noise = self.prediction.noise
        if noise is not None:
            energy = energy + jnp.mean(noise.energy.epistemic, axis=0)
            forces = forces + 3 * jnp.mean(noise.forces.epistemic, axis=0)
            found["epistemic"] = energy, forces
            energy = energy + jnp.mean(noise.energy.variance, axis=0)
            forces = forces + 3 * jnp.mean(noise.forces.variance, axis=0)
            found["total"] = energy, forces
        return found

    def energy_deviation(self, kind: Needs) -> jax.Array:
        """[S] eV; ``epistemic`` and ``total`` are the spread where members say nothing about themselves."""
        kind = kind if kind in self._variances else "spread"
        key = ("energy deviation", kind)
        if key not in self._found:
            self._found[key] = jnp.sqrt(self._variances[kind][0])
        return self._found[key]

    def force_deviation(self, kind: Needs) -> jax.Array:
        """[A] eV/Angstrom, of force vectors, 0 for padding; see `energy_deviation`."""
        kind = kind if kind in self._variances else "spread"
        key = ("force deviation", kind)
        if key not in self._found:
            variance = self._variances[kind][1]
            self._found[key] = jnp.where(self.graph.atom_mask, jnp.sqrt(variance), 0)
        return self._found[key]


def _max_over_atoms(values: jax.Array, graph: Graph) -> jax.Array:
    masked = jnp.where(graph.atom_mask, values, 0)
    # NaN must stay visible: a maximum that drops it would let an exploded frame pass a gate.
    return jnp.maximum(jax.ops.segment_max(masked, graph.structure, graph.num_structures), 0)
