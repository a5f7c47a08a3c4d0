"""Structures that come more than once in one training: the same label counts once, and contradictions are told."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from small_training import MODEL, settings_of, water

from almlip_jax.ensembles import EnsembleSettings
from almlip_jax.errors import InputError
from almlip_jax.fitting import each_once, fit_potential
from almlip_jax.learner import Learner
from almlip_jax.structures import repeats
from almlip_jax.training import Trainer
from almlip_jax.training.dataset import split

WATERS = [water(seed) for seed in range(12)]


class Captured(Exception):
    """Ends a fitting where its training would begin."""


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What a training is given, what validates, and what is said, of a fit of some structures."""

    def fitted(structures: list[Atoms], validation: list[Atoms]) -> tuple[list[Atoms], list[Atoms], list[str]]:
        heard: list[Any] = []
        said: list[str] = []

        def train(self: Trainer, dataset: list[Atoms], *_: object, validation: list[Atoms], **__: object) -> None:
            heard.extend([dataset, validation])
            raise Captured

        monkeypatch.setattr(Trainer, "train", train)
        settings = settings_of(validation_fraction=0.2)
        with pytest.raises(Captured):
            fit_potential(
                structures, MODEL, EnsembleSettings(size=2), settings, 0, say=said.append, validation=validation
            )
        return heard[0], heard[1], said

    return fitted


def relabelled(frame: Atoms, by: float = 0.0, **info: Any) -> Atoms:
    other = frame.copy()
    other.info |= info
    results = frame.calc.results | {"energy": frame.calc.results["energy"] + by}
    other.calc = SinglePointCalculator(other, **results)
    return other


def test_copies_count_once_and_do_not_validate_what_they_trained(given):
    copies = [relabelled(frame) for frame in WATERS]
    dataset, _, said = given([*WATERS, *copies], [])
    assert dataset == WATERS
    assert said == [
        "the data: 12 structures come again with the same label, and count once; give a weight to what is to count "
        "more."
    ]
    training, validating = split(24, 0.2)  # without that most of those that validate would have trained
    assert {n % 12 for n in validating} & {n % 12 for n in training}


def test_contradictions_are_told_by_their_places_in_the_data(given):
    """Isolated atoms, which are not trained on, count where structures are numbered, as they do in files."""
    atom = Atoms("H")
    atom.calc = SinglePointCalculator(atom, energy=-13.6)
    dataset, _, said = given([atom, *WATERS, relabelled(WATERS[2], by=3.0)], [])
    assert len(dataset) == 13
    assert (
        "the data: the same structure has different labels in frames 3 and 13 (energy 1e+03 meV/atom apart)" in said[0]
    )


def test_a_copy_with_more_to_say_is_kept():
    weighty, further = relabelled(WATERS[0], weight=3.0), relabelled(WATERS[1])
    further.calc.results["dipole"] = np.zeros(3)
    said: list[str] = []
    data = [*WATERS[:2], weighty, further, relabelled(weighty), relabelled(WATERS[1])]
    assert [id(frame) for frame in each_once(data, "the data", said.append)] == [id(frame) for frame in data[:4]]
    assert "2 structures come again" in said[0]


def test_what_is_trained_on_does_not_validate(given):
    other = [water(100), relabelled(WATERS[1])]
    dataset, validating, said = given(WATERS, other)
    assert dataset == WATERS and validating == other[:1]
    assert said == ["1 of 2 structures to validate on are trained on, and do not validate."]
    with pytest.raises(InputError, match="all structures to validate on are trained on too"):
        fit_potential(WATERS, MODEL, EnsembleSettings(size=2), settings_of(), 0, validation=other[1:])


def test_an_element_has_to_be_trained_on(given):
    """Else the potential would say that it knows an element of which it learned nothing."""
    methane = molecule("CH4")
    methane.calc = SinglePointCalculator(methane, energy=-40.0, forces=np.zeros((5, 3)))
    with pytest.raises(InputError, match="structures to validate on hold C, which no structure that is"):
        fit_potential(WATERS, MODEL, EnsembleSettings(size=2), settings_of(), 0, validation=[water(100), methane])
    data = list(WATERS)
    data[int(split(12, 0.2)[1][0])] = methane
    said = given(data, [])[2]
    assert "C occurs only in structures that are kept to validate on" in said[0]


def test_a_learner_counts_them_once_too(monkeypatch: pytest.MonkeyPatch):
    heard: list[list[Atoms]] = []

    def train(self: Trainer, dataset: list[Atoms], *_: object, **__: object) -> None:
        heard.append(dataset)
        raise Captured

    monkeypatch.setattr(Trainer, "train", train)
    said: list[str] = []
    learner = Learner(20, model=MODEL, ensemble=EnsembleSettings(size=2), training=settings_of(), say=said.append)
    for _ in range(2):
        with pytest.raises(Captured):
            learner.fit([*WATERS, relabelled(WATERS[0])])
    assert heard == [WATERS, WATERS]
    (remark,) = said
    assert remark.startswith("the data: 1 structure comes again with the same label, and counts once")


def test_many_labels_of_one_structure_take_time_in_proportion(monkeypatch: pytest.MonkeyPatch):
    """Each of 1,000 labels of one structure differs from all others."""
    compared = 0

    def counting(one: Atoms, other: Atoms) -> str | None:
        nonlocal compared
        compared += 1
        return repeats_difference(one, other)

    repeats_difference = repeats.label_difference
    monkeypatch.setattr(repeats, "label_difference", counting)
    said: list[str] = []
    data = [relabelled(WATERS[0], by=0.01 * n) for n in range(1000)]
    assert repeats.without_repeats(data, repeats.geometry_key, "the data", said.append) == data
    assert compared < 20 * len(data) and "and 996 more" in said[0]
