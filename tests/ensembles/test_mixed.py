"""Committees of architectures: each member as it would be alone, and settings that build them."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from almlip_jax.ensembles import Ensemble, EnsembleSettings, MixedEnsemble, build_ensemble, member_models
from almlip_jax.errors import InputError
from almlip_jax.models import SharedDensitySettings
from almlip_jax.structures.packing import BatchShape, pack, plan_batches, take_batch
from almlip_jax.structures.species import SpeciesTable

MODEL = SharedDensitySettings(cutoff=4.0, radial=4, l_max=1, channels=4, hidden=(8,))
SPECIES = SpeciesTable((1, 8))
OTHER = {"kind": "nequip", "channels": 2, "layers": 1, "l_max": 1, "radial": 4}
MEMBERS = EnsembleSettings(
    size=5, variants=[{}, {"model": {"cutoff": 2.5, "hidden": [6, 6], "species_channels": 1}}, {"model": OTHER}]
)


predict = jax.jit(lambda ensemble, params, graph: ensemble.predict(params, graph), static_argnums=0)


def graph_of(atoms: Atoms, cutoff: float, slots: int):
    packed = pack([atoms], SPECIES, cutoff, neighbors=slots, dtype=np.float64)
    return take_batch(packed.data, plan_batches(packed, np.arange(1), BatchShape(len(atoms), slots, 1))[0], 0)[0]


def test_members_take_the_variants_in_turn():
    found = member_models(MODEL, MEMBERS)
    assert [count for _, _, count in found] == [2, 2, 1]
    plain, short, other = (model for model, _, _ in found)
    assert plain == MODEL and (short.cutoff, short.hidden, short.channels) == (2.5, (6, 6), 4)
    assert (other.kind, other.channels, other.cutoff) == ("nequip", 2, 4.0)
    assert isinstance(build_ensemble(MODEL, EnsembleSettings(size=3), SPECIES), Ensemble)


def test_a_variant_may_name_a_size():
    found = member_models(SharedDensitySettings(), EnsembleSettings(variants=[{}, {"model": {"size": "small"}}]))
    assert found[1][0] == SharedDensitySettings(size="small")


def test_each_member_is_what_it_is_alone():
    """Also one that sees less far than the graph reaches."""
    with jax.enable_x64(True):
        ensemble = build_ensemble(MODEL, MEMBERS, SPECIES)
        assert isinstance(ensemble, MixedEnsemble) and ensemble.members == 5 and ensemble.cutoff == 4.0
        params = jax.tree.map(lambda x: np.asarray(x, np.float64), jax.jit(ensemble.init)(jax.random.key(0)))
        atoms = molecule("H2O") + molecule("H2O")
        atoms.positions[3:] += [0.3, 0.2, 2.6]
        atoms.rattle(0.1, seed=0)
        together = predict(ensemble, params, graph_of(atoms, 4.0, 5))
        assert jax.eval_shape(ensemble.atom_energies, params, graph_of(atoms, 4.0, 5)).shape == (5, 6)
        first = 0
        for group, one in zip(ensemble.groups, params, strict=True):
            alone = predict(group, one, graph_of(atoms, group.cutoff, 5))
            mine = slice(first, first + group.size)
            np.testing.assert_allclose(together.energy[mine], alone.energy, rtol=1e-12)
            species, width = alone.code.shape[-1] if alone.code is not None else 2, alone.features.shape[-1]
            rows = together.linear_rows(graph_of(atoms, 4.0, 5), 2)[mine].reshape(group.size, 6, 2, -1)
            mine_alone = alone.linear_rows(graph_of(atoms, group.cutoff, 5), 2).reshape(group.size, 6, species, width)
            np.testing.assert_allclose(rows[:, :, :species, :width], mine_alone, rtol=1e-12)
            assert not rows[:, :, species:].any() and not rows[..., width:].any()
            np.testing.assert_allclose(together.forces[mine], alone.forces, atol=1e-12)
            np.testing.assert_allclose(together.virial[mine], alone.virial, atol=1e-12)
            width = alone.features.shape[-1]
            np.testing.assert_allclose(together.features[mine, :, :width], alone.features, atol=1e-12)
            assert not np.any(together.features[mine, :, width:])
            first += group.size
        energies = jax.jit(ensemble.energies)(params, graph_of(atoms, 4.0, 5))
        np.testing.assert_allclose(energies, together.energy, rtol=1e-12)


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"model": {"chanels": 3}}, "entry 1, model.*channels"),
        ({"model": {"kind": "mace", "l_max": 9}}, "entry 1, model.l_max"),
    ],
)
def test_a_wrong_variant_is_named(variant, message):
    with pytest.raises(InputError, match=message):
        build_ensemble(MODEL, EnsembleSettings(size=2, variants=[{}, variant]), SPECIES)
