"""Corrections of trained potentials: base and correction add up everywhere, and training leaves the base alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from ase.build import bulk, molecule
from small_training import PLAIN as MODEL
from small_training import labelled, water

from almlip_jax.delta_learning import Corrected, check_correction, corrected
from almlip_jax.ensembles import EnsembleSettings, build_ensemble
from almlip_jax.errors import InputError
from almlip_jax.learner import Learner
from almlip_jax.models import DeltaSettings, MaceSettings, ModelSettings, SharedDensitySettings
from almlip_jax.models.anchored import with_binding
from almlip_jax.models.constants import CONSTANTS
from almlip_jax.models.delta import BASE, CORRECTION
from almlip_jax.oracles import TBLiteSettings
from almlip_jax.potential import Potential
from almlip_jax.structures.species import SpeciesTable

SHORT = SharedDensitySettings(cutoff=3.0, radial=3, l_max=1, channels=3, hidden=(5,))
REFERENCES = {1: -10.0, 8: -100.0, 14: -50.0}


def base_of(numbers: tuple[int, ...], isolated: bool = False, **members: int) -> Potential:
    """A potential with random parameters in the place of a trained one."""
    species, settings = SpeciesTable(numbers), EnsembleSettings(**{"size": 2, **members})
    alone = frozenset(numbers) if isolated else frozenset()
    params = jax.jit(build_ensemble(MODEL, settings, species, alone).init)(jax.random.key(3))
    params = with_binding(params, np.linspace(-0.3, 0.2, len(numbers))) if isolated else params
    references = {z: REFERENCES[z] for z in numbers}
    return Potential(MODEL, species, jax.device_get(params), references, members=settings, isolated=alone)


def test_base_and_correction_add_up(tmp_path: Path) -> None:
    """Each with its own cutoff: energies, forces, stresses and atoms of the members are sums, saved and loaded too."""
    base = base_of((14,))
    frames = [bulk("Si") * (1, 1, 2), bulk("Si", cubic=True)]
    for seed, atoms in enumerate(frames):
        atoms.rattle(0.1, seed=seed)
    silent = corrected(base, frames, SHORT)
    assert silent.settings.cutoff == MODEL.cutoff
    known, same = base.evaluate(frames), silent.evaluate(frames)
    np.testing.assert_allclose(same.energy, known.energy, atol=1e-5)
    np.testing.assert_allclose(same.stress, known.stress, atol=1e-7)
    wanted = build_ensemble(SHORT, EnsembleSettings(size=2), base.species)
    own = jax.jit(wanted.init)(jax.random.key(7))
    told = replace(silent, params=silent.params | {CORRECTION: jax.device_get(own)})
    alone = Potential(SHORT, base.species, jax.device_get(own), {14: 0.0}, members=EnsembleSettings(size=2))
    told.save(tmp_path / "saved")
    both, apart = Potential.load(tmp_path / "saved").evaluate(frames), alone.evaluate(frames)
    assert np.abs(apart.energy).max() > 0.01
    np.testing.assert_allclose(both.energy, known.energy + apart.energy, atol=1e-4)
    np.testing.assert_allclose(both.stress, known.stress + apart.stress, atol=1e-6)
    for n in range(2):
        np.testing.assert_allclose(both.forces[n], known.forces[n] + apart.forces[n], atol=1e-5)
    graph = next(iter(told.graphs(frames[:1])))
    members = told.ensemble.atom_energies(told.params, graph)
    np.testing.assert_allclose(
        members, base.ensemble.atom_energies(base.params, graph) + wanted.atom_energies(own, graph), atol=1e-5
    )
    atoms = frames[1].copy()
    atoms.calc = told.calculator()
    np.testing.assert_allclose(atoms.get_forces(), both.forces[1], atol=1e-5)
    np.testing.assert_allclose(atoms.get_stress(), both.stress[1], atol=1e-6)


@pytest.mark.parametrize("isolated", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["fitted", "isolated"])
def test_a_training_learns_the_difference_and_leaves_the_base_alone(isolated: bool) -> None:
    base, data = base_of((1, 8), isolated), [water(seed) for seed in range(10)]
    started = Corrected.of(base, data, SHORT, seed=1)
    alone = {1: -13.0, 8: -2001.0} if isolated else {}
    training = {"max_steps": 60, "learning_rate": 0.02, "validate_every": 20, "ema": 0.9, "batch_size": 4}
    learner = Learner(10, typical=data, start=started, isolated=alone, training=training)
    tuned = learner.fit(data)
    assert isinstance(tuned.settings, DeltaSettings)
    held = zip(jax.tree.leaves(tuned.params[CONSTANTS][BASE]), jax.tree.leaves(base.params), strict=True)
    assert all(np.array_equal(now, before) for now, before in held)

    def error(potential: Potential) -> float:
        apart = np.concatenate(potential.evaluate(data).forces) - np.concatenate([a.get_forces() for a in data])
        return float(np.sqrt(np.mean(np.square(apart))))

    assert error(tuned) < 0.6 * error(base)
    if isolated:  # these are met exactly
        ends = tuned.evaluate([molecule("H"), molecule("O")]).energy
        np.testing.assert_allclose(ends, list(alone.values()), atol=1e-3)
        return
    wider = {"size": 3, "bootstrap": "none"}
    with pytest.raises(InputError, match="corrects a trained potential, and none is given for all of its members"):
        Learner(10, typical=data, start=tuned, ensemble=wider, training=training).fit(data)
    with pytest.raises(InputError, match="corrects a trained potential"):
        Learner(10, typical=data, model=tuned.settings, training=training, isolated={}).fit(data)


@pytest.mark.slow
def test_a_mace_correction_begins_at_zero() -> None:
    """The read-outs of its earlier layers too."""
    base, frames = base_of((1, 8)), [labelled(molecule("H2O"))]
    small = MaceSettings(cutoff=3.0, channels=2, layers=2, l_max=1, hidden_l_max=1, read_out=(3,))
    np.testing.assert_allclose(
        corrected(base, frames, small).evaluate(frames).energy, base.evaluate(frames).energy, atol=1e-5
    )


def test_a_model_of_ones_own_is_a_correction() -> None:
    """It begins at zero and learns in a unit of its own."""
    frames = [water(seed) for seed in range(6)]
    given = {"kind": "user", "function": "pair_model:Pairs", "cutoff": 3.0}
    base = base_of((1, 8))
    start = Corrected.of(base, frames, given)
    assert np.allclose(start.potential.evaluate(frames).energy, base.evaluate(frames).energy, atol=1e-5)
    training = {"max_steps": 5, "validation_fraction": 0.0, "batch_size": 3}
    tuned = Learner(6, start=start, training=training).fit(frames)
    assert np.abs(tuned.params[CORRECTION]["last"]).max() > 0


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("silent", "'pair_model:silent' has no last layer that could begin at zero: it"),
        ("misnamed", "names 'first', but `init` gives constants, last"),
    ],
)
def test_a_correction_has_to_name_its_last_layer(function: str, why: str) -> None:
    with pytest.raises(InputError, match=why):
        check_correction(
            ModelSettings.parse({"kind": "user", "function": f"pair_model:{function}"}), SpeciesTable((1, 8))
        )


def test_what_cannot_be_corrected_is_refused() -> None:
    frames = [molecule("H2O")]
    with pytest.raises(InputError, match="TBLiteSettings is no potential.*Distil"):
        Corrected.of(TBLiteSettings(), frames)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"has ensemble\.heads or ensemble\.likelihood"):
        corrected(base_of((1, 8), heads=2), frames)
    with pytest.raises(InputError, match="a correction of kind 'user'|is not a model|cannot be imported"):
        corrected(base_of((1, 8)), frames, {"kind": "user", "function": "nowhere:model"})
    for changes, why in (
        ({"correction": {"dipole": True}}, "do not give dipole"),
        ({"correction": {"repulsion": True}}, "leave repulsion out"),
    ):
        with pytest.raises(ValueError, match=why):
            ModelSettings.parse({"kind": "delta", "base": MODEL.model_dump(), **changes})
