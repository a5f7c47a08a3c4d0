"""Committees of architectures train as their parts would alone; potentials grow new elements."""

from __future__ import annotations

from dataclasses import replace

import jax
import numpy as np
import pytest
from ase.build import molecule
from small_training import PLAIN as MODEL
from small_training import SPECIES, labelled, same_bits, settings_of, water

from almlip_jax.ensembles import Ensemble, EnsembleSettings
from almlip_jax.errors import InputError
from almlip_jax.features import FeatureRequest
from almlip_jax.fitting import fit_potential
from almlip_jax.models import build_model
from almlip_jax.potential import Potential
from almlip_jax.structures.graph import lone_atom
from almlip_jax.training import (
    EpochReport,
    Trainer,
    TrainingResult,
    build_trainer,
    checkpoint,
    params_for,
    plan_capacity,
    reference_energies,
)

MEMBERS = EnsembleSettings(
    size=3,
    bootstrap="none",
    variants=[{}, {"model": {"cutoff": 3.0, "hidden": [6]}, "training": {"loss": {"energy": 1.0}, "max_steps": 40}}],
)


@pytest.fixture(scope="module")
def mixed(waters, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    seen = []
    found = fit_potential(waters, MODEL, MEMBERS, settings_of(), 0, seen.append, folder / "kept")
    return *found, seen, folder


@pytest.mark.slow
def test_each_architecture_trains_as_it_would_alone(waters, mixed):
    """With its own settings, on graphs that reach as far as the farthest sighted."""
    potential, _, _, _ = mixed
    references, training = reference_energies(waters, SPECIES), settings_of(max_steps=40, loss={"energy": 1.0})
    second = MODEL.model_copy(update={"cutoff": 3.0, "hidden": (6,)})
    capacity = plan_capacity(waters, 4.0, settings_of())
    alone = Trainer(Ensemble(build_model(second, SPECIES), 1), SPECIES, capacity, training, EnsembleSettings(size=1))
    whole = build_trainer(MODEL, MEMBERS, SPECIES, capacity, settings_of())
    key = jax.random.key(3)
    together = whole.train(waters, None, key, reference_energies=references)
    own = alone.train(waters, None, jax.random.split(key, 2)[1], reference_energies=references)
    for a, b in zip(jax.tree.leaves(together.params[1]), jax.tree.leaves(own.params), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5)
    assert len(potential.params) == 2 and jax.tree.leaves(potential.params[0])[0].shape[0] == 2


def test_reports_speak_of_all_members(mixed):
    _, result, seen, _ = mixed
    assert len(seen) == len(result.history) and seen[-1].step >= seen[-1].steps == 100
    first, last = result.history[0], result.history[-1]
    assert first.train_loss.shape == (3,) and np.isnan(first.train_loss[2]) and np.isfinite(last.train_loss).all()
    assert np.isfinite(first.errors["forces_rmse"]) and all(np.diff([report.step for report in result.history]) > 0)


def test_what_is_kept_goes_on_and_is_thrown_away(waters, mixed):
    potential, _, _, folder = mixed
    again, _ = fit_potential(waters, MODEL, MEMBERS, settings_of(), 0, checkpoint=folder / "kept")
    assert same_bits(potential.params, again.params)
    checkpoint.discard(folder / "kept")
    assert not (folder / "kept").exists()


def test_it_is_saved_and_loaded(waters, mixed):
    potential, _, _, folder = mixed
    potential.save(folder / "p")
    back = Potential.load(folder / "p")
    a, b = (one.evaluate(waters, features=FeatureRequest(("latent",))) for one in (potential, back))
    np.testing.assert_array_equal(np.concatenate(a.forces), np.concatenate(b.forces))
    np.testing.assert_array_equal(a.features["latent"], b.features["latent"])
    assert back.ensemble == potential.ensemble and back.cutoff == 4.0 and a.scores["force_std_max"].min() > 0


@pytest.mark.slow
def test_new_elements_are_added(waters):
    """At a learning rate of zero water stays what it was; then carbon is learned."""
    members, others = EnsembleSettings(size=2, likelihood="mean_variance"), []
    late = {"start": 0.5, "kind": "nll"}
    before, _ = fit_potential(waters, MODEL, members, settings_of(second_stage=late), 0)
    for seed in range(12):
        atoms = molecule("CO")
        atoms.rattle(0.05, seed=seed)
        others.append(labelled(atoms))
    still = settings_of(max_steps=1, second_stage=late)  # the cosine has come to its end at the first step
    after, _ = fit_potential(others, MODEL, members, still, 1, start=before)
    assert after.species.numbers == (1, 6, 8)
    assert after.reference_energies[1] == before.reference_energies[1]
    a, b = before.evaluate(waters), after.evaluate(waters)
    np.testing.assert_allclose(np.concatenate(a.forces), np.concatenate(b.forces), atol=1e-3)
    np.testing.assert_allclose(a.scores["force_total_max"], b.scores["force_total_max"], rtol=1e-3)
    learned, _ = fit_potential(others, MODEL, members, settings_of(max_steps=300, second_stage=late), 1, start=after)
    true = np.concatenate([atoms.get_forces() for atoms in others])
    errors = [np.std(np.concatenate(p.evaluate(others).forces) - true) for p in (after, learned)]
    assert errors[1] < 0.2 * errors[0]


def test_another_architecture_is_refused(waters, mixed):
    with pytest.raises(InputError, match="another architecture"):
        fit_potential(waters, MODEL, EnsembleSettings(size=2), settings_of(), 0, start=mixed[0])
    assert mixed[0].evaluate([water(0)]).energy.shape == (1,)


def test_a_committee_goes_on_without_models_that_diverged_twice(waters, mixed, monkeypatch, tmp_path):
    """Also without a whole architecture; the next training begins where those that are left stand, the others anew."""
    potential, result, _, _ = mixed
    references, capacity = potential.reference_energies, plan_capacity(waters, 4.0, settings_of())
    whole = build_trainer(MODEL, MEMBERS, SPECIES, capacity, settings_of())
    graph = lone_atom()
    before = np.asarray(jax.jit(potential.ensemble.energies)(potential.params, graph))

    def trained(params, *gone: tuple[int, ...]) -> TrainingResult:
        for trainer, own, lost in zip(whole.trainers, potential.params, gone, strict=True):
            left = jax.tree.map(lambda x, lost=lost: np.delete(np.asarray(x), lost, axis=0), own)
            ended = TrainingResult(left, result.history[:1], lost)
            monkeypatch.setattr(
                trainer, "train", lambda _, begun, *__, ended=ended, **___: heard.append(begun) or ended
            )
        return whole.train(waters, params, jax.random.key(0), reference_energies=references)

    for gone, kept, begun in (
        (((1,), ()), [0, 2], (1, 1)),
        (((), (0,)), [0, 1], (2, None)),
        (((), ()), [0, 1, 2], (2, 1)),
    ):
        heard = []
        found = trained(None, *gone)
        members = found.members(MEMBERS)
        assert heard == [None, None] and members.size == len(kept) and found.left_out == tuple({0, 1, 2} - {*kept})
        fewer = replace(potential, params=found.params, members=members)
        fewer.save(tmp_path / "p")
        fewer = Potential.load(tmp_path / "p")
        after = jax.jit(fewer.ensemble.energies)(fewer.params, graph)
        np.testing.assert_allclose(after, before[kept], rtol=1e-5, atol=1e-6)
        heard = []
        trained(params_for(MEMBERS, members, fewer.params), (), ())
        assert tuple(one if one is None else len(jax.tree.leaves(one)[0]) for one in heard) == begun
        assert same_bits(jax.tree.map(lambda x: x[:1], heard[0]), jax.tree.map(lambda x: x[:1], potential.params[0]))
    with pytest.raises(InputError, match="models 0, 1 diverged in two trainings, and the ensemble cannot do without"):
        trained(None, (0, 1), ())
    with pytest.raises(InputError, match="the training loss is not finite"):
        trained(None, (0, 1), (0,))


def test_reports_from_before_an_interruption_are_part_of_it(mixed, waters, monkeypatch):
    """A group that goes on tells what is new alone; the errors of what it keeps may stand in what it told before."""
    potential, _, _, _ = mixed
    whole = build_trainer(MODEL, MEMBERS, SPECIES, plan_capacity(waters, 4.0, settings_of()), settings_of())
    for trainer, params in zip(whole.trainers, potential.params, strict=True):
        ones = np.ones(trainer.ensemble.size)
        none, best = ones > 1, (ones > 0, ones > 1)
        told = tuple(
            EpochReport(1, step, 40, ones, ones, ones, force * ones, none, kept, 1.0)
            for step, force, kept in zip((20, 40), (0.5, 0.7), best, strict=True)
        )

        def resumed(*_, on_epoch, ended=(params, told), **__):
            on_epoch(ended[1][-1])
            return TrainingResult(*ended)

        monkeypatch.setattr(trainer, "train", resumed)
    found = whole.train(waters, None, jax.random.key(0), reference_energies=potential.reference_energies, steps=40)
    assert len(found.history) == 4 and found.errors["forces_rmse"] == pytest.approx(0.5)
