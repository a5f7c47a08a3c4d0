"""Trainings side by side give what each gives alone."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from ase import Atoms
from small_training import SPECIES, labelled, settings_of, trainer_of, water

from almlip_jax.errors import InputError
from almlip_jax.training import EpochReport, Job, SideBySideTrainer, TrainingResult, reference_energies
from almlip_jax.training.trainer import weights_key_of


def pair(seed: int) -> Atoms:
    """Two molecules: batches of these hold fewer structures."""
    atoms = water(seed) + water(seed + 1)
    atoms.positions[3:] += [2.5, 0, 0]
    return labelled(atoms)


@pytest.mark.parametrize("kind", ["equal sizes", pytest.param("mixed sizes", marks=pytest.mark.slow)])
def test_each_ends_as_it_would_alone(kind):
    """Data, order, first parameters and length of an epoch are those of each training."""
    jobs = []
    for n in range(3):
        sizes = [pair if kind == "mixed sizes" and seed % (n + 2) == 0 else water for seed in range(10)]
        dataset = [make(100 * n + seed) for seed, make in enumerate(sizes)]
        jobs.append(Job(dataset, jax.random.key(n), reference_energies(dataset, SPECIES)))
    largest = max((job.dataset for job in jobs), key=lambda dataset: sum(len(atoms) for atoms in dataset))
    trainer = trainer_of(largest, settings_of(max_steps=40, validate_every=10))
    heard = []
    together = SideBySideTrainer(trainer).train(jobs, on_epoch=lambda n, report: heard.append((n, report.step)))
    for n, (job, found) in enumerate(zip(jobs, together, strict=True)):
        alone = trainer.train(job.dataset, None, job.key, reference_energies=job.reference_energies)
        assert [report.step for report in found.history] == [report.step for report in alone.history]
        assert [step for m, step in heard if m == n] == [report.step for report in alone.history]
        for a, b in zip(jax.tree.leaves(found.params), jax.tree.leaves(alone.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=5e-3, atol=1e-4)


def test_datasets_of_different_numbers_are_refused(waters):
    references = reference_energies(waters, SPECIES)
    jobs = [Job(waters[:n], jax.random.key(n), references) for n in (4, 6)]
    with pytest.raises(InputError, match=r"not of \[4, 6\]"):
        SideBySideTrainer(trainer_of(waters, settings_of())).train(jobs)


def test_a_job_whose_model_diverged_is_trained_once_more(waters, monkeypatch):
    """With the same others beside it, from another stream and with the same weights; the others keep what they had."""
    together = SideBySideTrainer(trainer_of(waters, settings_of()))
    references = reference_energies(waters, SPECIES)
    jobs = [Job(waters, jax.random.key(n), references) for n in range(3)]
    asked: list[list[Job]] = []

    def attempt(given: list[Job], *_: object) -> list[TrainingResult]:
        asked.append(list(given))
        again, results = len(asked) > 1, []
        for n in range(3):
            loss = np.array([1.0 + again, np.nan if n == 1 and not again else 3.0 + again])
            report = EpochReport(1, 60, 60, loss, loss, loss, loss, np.zeros(2, bool), np.ones(2, bool), 1.0)
            results.append(TrainingResult({"w": loss}, (report,)))
        return results

    monkeypatch.setattr(together, "_attempt", attempt)
    said: list[str] = []
    found = together.train(jobs, say=said.append)
    assert [result.params["w"].tolist() for result in found] == [[1.0, 3.0], [1.0, 4.0], [1.0, 3.0]]
    assert [len(result.history) for result in found] == [1, 2, 1] and found[1].history[-1].step == 120
    assert said == ["model 1 of training 1 diverged, and is trained once more."]
    for first, second in zip(*asked, strict=True):
        assert np.any(jax.random.key_data(first.key) != jax.random.key_data(second.key))
        assert np.array_equal(jax.random.key_data(weights_key_of(first.key)), jax.random.key_data(second.weights_key))
