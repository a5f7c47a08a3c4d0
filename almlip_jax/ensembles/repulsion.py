"""The repulsion of nuclei apart from the members that it is part of, in a precision of its own.

Pairs at short distances repel each other by tens or hundreds of electron-volts, of which little is left in the sum of
all forces.  Where edge vectors are there in float64, that part need not be rounded as the models are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import jax.numpy as jnp

from almlip_jax.ensembles.ensemble import Ensemble
from almlip_jax.ensembles.mixed import AnyEnsemble, MixedEnsemble
from almlip_jax.ensembles.prediction import Prediction
from almlip_jax.models import Anchored, Delta, Model, WithRepulsion
from almlip_jax.models.charge_energy import WithChargeEnergy
from almlip_jax.structures.graph import Graph, Places, forces_and_virial, sum_over_atoms


def without_repulsion(ensemble: AnyEnsemble) -> tuple[AnyEnsemble, tuple[WithRepulsion | None, ...]]:
    """An ensemble without repulsion, which takes the same parameters, and what adds it to each member, if anything."""
    if isinstance(ensemble, MixedEnsemble):
        parts = [_without(group) for group in ensemble.groups]
        members = [repelling for group, repelling in parts for _ in range(group.members)]
        return MixedEnsemble(tuple(group for group, _ in parts)), tuple(members)
    bare, repelling = _without(ensemble)
    return bare, (repelling,) * ensemble.members


def with_repulsion(prediction: Prediction, repelling: Sequence[WithRepulsion | None], graph: Graph) -> Prediction:
    """What members say with the repulsion of each of them, in the precision of the graph's vectors.

    Args:
        prediction: of the members without it, with leading member axis.
        repelling: what adds it to each of them.
        graph: whose edges are known to that precision.
    """
    energy, forces, virial = (
        x.astype(graph.vectors.dtype) for x in (prediction.energy, prediction.forces, prediction.virial)
    )
    for one in dict.fromkeys(each for each in repelling if each is not None):
        chosen = jnp.asarray([each == one for each in repelling], graph.vectors.dtype)
        of_structures, of_atoms, strained = _repulsion(one, graph)
        energy = energy + chosen[:, None] * of_structures
        forces = forces + chosen[:, None, None] * of_atoms
        virial = virial + chosen[:, None, None, None] * strained
    return replace(prediction, energy=energy, forces=forces, virial=virial)


def _repulsion(one: WithRepulsion, graph: Graph) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Energy [S], forces [A, 3] and virial [S, 3, 3]."""

    def total(vectors: jax.Array) -> tuple[jax.Array, jax.Array]:
        energy = sum_over_atoms(one.alone(Places(vectors).of(graph)), graph)
        return jnp.sum(energy), energy

    gradient, energy = jax.grad(total, has_aux=True)(graph.vectors)
    return energy, *forces_and_virial(Places(gradient), graph)


def _without(ensemble: Ensemble) -> tuple[Ensemble, WithRepulsion | None]:
    model, repelling = _told_apart(ensemble.model)
    return replace(ensemble, model=model), repelling


def _told_apart(model: Model) -> tuple[Model, WithRepulsion | None]:
    """A model without the repulsion that is added to it, or to the one that it stands around or corrects."""
    if isinstance(model, WithRepulsion):
        return model.inner, model
    if type(model) in (Anchored, WithChargeEnergy):  # not a user's own, which may do more than add
        inner, found = _told_apart(model.inner)  # type: ignore[attr-defined]
        return replace(model, inner=inner), found  # type: ignore[type-var, return-value]
    if isinstance(model, Delta):
        base, found = _told_apart(model.base)
        return replace(model, base=base), found
    return model, None
