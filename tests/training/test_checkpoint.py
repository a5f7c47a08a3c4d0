"""A training that was interrupted ends as if it had never stopped, bit for bit; other trainings leave it alone."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ase import Atoms
from small_training import PLAIN, SPECIES, same_bits, settings_of, trainer_of, water

from almlip_jax.errors import InputError
from almlip_jax.fitting import fit_potential
from almlip_jax.training import EnsembleSettings, EpochReport, Trainer, TrainingResult, reference_energies
from almlip_jax.training import checkpoint as checkpoints

# Six validations; everything that a state may hold is at work in it.
SETTINGS = settings_of(
    max_steps=6 * 14,
    validate_every=10,
    schedule="plateau",
    plateau_patience=1,
    learning_rate=0.05,
    second_stage={"start": 0.4, "energy": 30.0},
)


class Interruption(Exception):
    """Stands for Ctrl-C."""


@pytest.fixture(scope="module")
def trainer(waters) -> Trainer:
    return trainer_of([*waters, water(50)], SETTINGS, model=PLAIN)


def trained(trainer: Trainer, dataset: list[Atoms], key: int = 0, **options: Any) -> TrainingResult:
    references = reference_energies(dataset, SPECIES)
    return trainer.train(dataset, None, jax.random.key(key), reference_energies=references, **options)


@pytest.fixture(scope="module")
def whole(trainer, waters) -> TrainingResult:
    """The training that nobody interrupts."""
    return trained(trainer, waters)


def interrupted(trainer: Trainer, waters: list[Atoms], folder: Path, *, after: int, every: int = 1) -> None:
    heard: list[EpochReport] = []

    def on_epoch(report: EpochReport) -> None:
        heard.append(report)
        if len(heard) == after:
            raise Interruption

    with pytest.raises(Interruption):
        trained(trainer, waters, on_epoch=on_epoch, checkpoint=folder, checkpoint_every=every)


def assert_same(one: TrainingResult, other: TrainingResult) -> None:
    assert same_bits(one.params, other.params)
    for a, b in zip(one.history, other.history, strict=True):
        assert same_bits({**asdict(a), "seconds": 0}, {**asdict(b), "seconds": 0})


@pytest.mark.parametrize(("every", "left"), [(1, 3), (2, 4), (5, 6)])
def test_it_goes_on_bit_for_bit(trainer, waters, whole, tmp_path, every, left, count_compilations):
    """Stopped after three of six validations, with the last checkpoint as old as ``every`` has it (or none yet)."""
    assert len(whole.history) == 6
    interrupted(trainer, waters, tmp_path / "state", after=3, every=every)
    heard: list[EpochReport] = []
    with count_compilations() as compiled:
        again = trained(trainer, waters, on_epoch=heard.append, checkpoint=tmp_path / "state", checkpoint_every=every)
    assert_same(again, whole)
    assert len(heard) == left and not compiled
    seconds = [report.seconds for report in again.history]
    assert seconds == sorted(seconds)


@pytest.mark.slow
def test_a_new_process_goes_on_as_well(trainer, waters, whole, tmp_path):
    """A trainer made anew shares nothing with the first one but the file."""
    interrupted(trainer, waters, tmp_path, after=2)
    heard: list[EpochReport] = []
    anew = trainer_of([*waters, water(50)], SETTINGS, model=PLAIN)
    again = trained(anew, waters, on_epoch=heard.append, checkpoint=tmp_path)
    assert_same(again, whole)
    assert len(heard) == 4


def test_one_that_ended_is_not_done_again(trainer, waters, whole, tmp_path):
    first = trained(trainer, waters, checkpoint=tmp_path)
    heard: list[EpochReport] = []
    again = trained(trainer, waters, on_epoch=heard.append, checkpoint=tmp_path)
    assert_same(first, whole)
    assert_same(again, whole)
    assert not heard
    checkpoints.discard(tmp_path)
    assert not tmp_path.exists()


def test_what_a_kill_left_half_written_is_discarded_too(tmp_path, monkeypatch):
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    saved = checkpoints.Saved([np.zeros(3)], {}, [{"step": np.array(1)}])
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)  # a killed process does not tidy up
        patch.setattr("os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            checkpoints.save(tmp_path / "training", "mine", saved)
    assert any((tmp_path / "training").iterdir())
    checkpoints.discard(tmp_path / "training")
    assert not (tmp_path / "training").exists()


def test_another_training_begins_at_its_beginning(trainer, waters, whole, tmp_path):
    """Another key, other labels, one structure more, other first parameters, another length."""
    interrupted(trainer, waters, tmp_path, after=3)
    file = next(tmp_path.iterdir())
    kept = file.read_bytes()
    moved = [*waters[:-1], waters[-1].copy()]
    moved[-1].calc = type(waters[0].calc)(moved[-1], **waters[-1].calc.results)
    moved[-1].calc.results["energy"] += 1e-3
    references = reference_energies(waters, SPECIES)

    def numbers_heard(dataset: list[Atoms], key: int = 0, params: Any = None, **options: Any) -> int:
        file.write_bytes(kept)
        heard: list[EpochReport] = []
        trainer.train(
            dataset,
            params,
            jax.random.key(key),
            reference_energies=references,
            on_epoch=heard.append,
            checkpoint=tmp_path,
            **options,
        )
        return len(heard)

    assert numbers_heard(waters) == 3
    assert numbers_heard(waters, key=1) == 6
    assert numbers_heard(moved) == 6
    assert numbers_heard([*waters, water(50)]) > 3
    assert numbers_heard(waters, params=whole.params) == 6
    assert numbers_heard(waters, steps=5 * 14) == 5


@pytest.mark.parametrize("damage", [b"", b"not an archive", None])
def test_a_damaged_file_counts_for_nothing(trainer, waters, whole, tmp_path, damage):
    interrupted(trainer, waters, tmp_path, after=1)
    file = next(tmp_path.iterdir())
    file.write_bytes(file.read_bytes()[:-200] if damage is None else damage)
    assert_same(trained(trainer, waters, checkpoint=tmp_path), whole)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    saved = checkpoints.Saved([np.arange(3)], {"state": 2**100}, [{"step": 1}])
    checkpoints.save(tmp_path, "mine", saved)

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints.np, "savez", fail)
    with pytest.raises(InputError, match="the disk is full"):
        checkpoints.save(tmp_path, "mine", checkpoints.Saved([np.arange(4)], {}, [{"step": 2}]))
    found = checkpoints.load(tmp_path, "mine")
    assert found is not None and found.order == {"state": 2**100} and len(found.leaves[0]) == 3
    assert checkpoints.load(tmp_path, "another's") is None and len(list(tmp_path.iterdir())) == 1


@pytest.mark.slow
def test_fitting_goes_on_after_an_interruption(waters, tmp_path):
    def fitted(on_epoch: Any = None, checkpoint: Path | None = None) -> Any:
        settings = settings_of(max_steps=160, validate_every=10)
        return fit_potential(waters, PLAIN, EnsembleSettings(size=2), settings, 7, on_epoch, checkpoint)

    def stop(report: EpochReport) -> None:
        if report.step > 140:
            raise Interruption

    with pytest.raises(Interruption):
        fitted(stop, tmp_path)
    heard: list[EpochReport] = []
    potential, result = fitted(heard.append, tmp_path)
    whole, expected = fitted()
    assert_same(result, expected)
    assert same_bits(potential.params, whole.params) and len(heard) < 0.5 * len(result.history)
