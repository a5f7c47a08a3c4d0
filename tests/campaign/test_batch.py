"""What selectors are told of a campaign: what labels cost, and the weight that follows progress."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
from ase import Atoms

from almlip_jax.campaign.batch import (
    AtomRoom,
    candidates,
    undecided,
    validation_error,
)
from almlip_jax.campaign.consistency import check_adaptive
from almlip_jax.campaign.cost import PaidLabel, expected_costs, paid_labels
from almlip_jax.features import Described
from almlip_jax.oracles import LabelStore
from almlip_jax.oracles.base import Label
from almlip_jax.selection import (
    ChainSettings,
    CostAwareSettings,
    SelectorSettings,
    TopFractionSettings,
    TopKSettings,
    uncertainty_weight,
)
from almlip_jax.training import VALIDATION_ERROR, EpochReport, TrainingResult, TrainingSettings, validation_note


def test_candidates_are_padded_and_carry_their_price():
    frames = [Atoms("H3"), Atoms("H5")]
    found = Described({"latent": np.zeros((2, 2))}, {}, {"s": np.ones(2)})
    made = candidates(frames, found, 4, scalars={"weight": 0.4})
    assert list(made.cost) == [3, 5, 0, 0] and list(made.valid) == [True] * 2 + [False] * 2
    assert made.scalars["weight"] == pytest.approx(0.4)
    assert list(candidates(frames, found, cost=np.array([2.0, 0.5])).cost) == [2.0, 0.5]


def test_atoms_find_room_that_lasts_as_long_as_they_fit():
    frames = [Atoms("H3"), Atoms("OH4")]
    found = Described({}, {"x": [np.full((3, 2), 1.0), np.full((5, 2), 2.0)]})
    once, often = (AtomRoom.of([3, 5, 4], 2, each_once=one) for one in (True, False))
    assert (once, often) == (AtomRoom(9, 5), AtomRoom(10, 5))
    made = candidates(frames, found, 4, room=AtomRoom(9, 6)).environments
    assert made.members.tolist() == [[0, 1, 2, -1, -1, -1], [3, 4, 5, 6, 7, -1], [-1] * 6, [-1] * 6]
    assert made.species.tolist() == [1, 1, 1, 8, 1, 1, 1, 1, 0] and made.rows["x"].shape == (9, 2)
    assert candidates(frames, found).environments.rows["x"].shape == (8, 2)
    assert AtomRoom(7, 4).holding(frames) == AtomRoom(8, 8) and AtomRoom(9, 5).holding(frames) == AtomRoom(9, 5)


def test_a_choice_among_equals_is_told():
    assert "nothing in which the 5 candidates differ" in (undecided([0.0, 0.0], 5) or "")
    assert undecided([0.2, 0.0], 5) is None
    assert undecided([0.0, 0.0], 2) is None and undecided([], 5) is None
    assert undecided([None], 5) is None and undecided([float("nan")], 5) is None, "nothing is known of their gains"


class TestCost:
    frames: ClassVar = [Atoms("H2"), Atoms("H4"), Atoms("O4")]

    def test_follows_the_times_of_labels(self) -> None:
        paid = [PaidLabel("H2", 2, 1.0), PaidLabel("H2", 2, 3.0), PaidLabel("H8", 8, 128.0)]
        # 2 s with two atoms and 128 s with eight lie on 2 (n / 2)^3
        np.testing.assert_allclose(expected_costs(self.frames, paid, 1.0), [2.0, 16.0, 16.0])
        np.testing.assert_allclose(expected_costs(self.frames, [*paid, PaidLabel("O4", 4, 16.0)], 1.0)[2], 16.0)

    def test_follows_the_exponent_where_times_do_not_tell(self) -> None:
        np.testing.assert_allclose(expected_costs(self.frames, [], 3.0), [8.0, 64.0, 64.0])
        np.testing.assert_allclose(expected_costs(self.frames, [PaidLabel("H2", 2, 5.0)], 2.0), [5.0, 20.0, 20.0])

    def test_learns_from_the_store_but_not_from_dynamics_of_test_sets(self, tmp_path: Path) -> None:
        def label(name: str, seconds: float, calls: int = 1) -> Label:
            return Label(name, energy=0.0, forces=np.zeros((2, 3)), seconds=seconds, calls=calls)

        frame = Atoms("H2", positions=[[0, 0, 0], [0, 0, 0.7]])
        with LabelStore(tmp_path / "labels.db") as store:
            entries = [("train", label("a", 4.0)), ("test", label("b", 400.0, 100)), ("train", label("c", 0.0))]
            store.record([(frame, {"purpose": purpose}, one) for purpose, one in entries])
            assert paid_labels(store) == [PaidLabel("H2", 2, 4.0)]

    def test_is_asked_for_by_cost_aware_alone(self) -> None:
        by_cost = CostAwareSettings(selector=TopKSettings(), exponent=3)
        chained = ChainSettings(filters=(TopFractionSettings(fraction=0.5),), selector=by_cost)
        assert by_cost.cost_exponent == 3 == chained.cost_exponent and TopKSettings().cost_exponent is None


def test_validation_error_is_that_of_the_parameters_that_were_kept():
    """Not of lower errors at other moments, and without models that were left out."""

    def report(step: int, errors: list[float], kept: list[int]) -> EpochReport:
        none, forces = np.zeros(3), np.array(errors)
        best = np.array(kept, bool)
        return EpochReport(1, step, 60, none, none, none, forces, np.zeros(3, bool), best, 1.0)

    history = (report(20, [0.3, 0.5, 0.1], [1, 1, 1]), report(40, [0.2, 0.4, 9.0], [0, 1, 0]))
    result = TrainingResult(None, history, (2,))
    assert validation_error(validation_note(result)) == pytest.approx(0.35)
    assert result.errors == {"forces_rmse": pytest.approx(0.35)}
    for none in ((report(20, [np.nan] * 3, [1, 1, 1]),), ()):
        assert validation_note(TrainingResult(None, none)) == {VALIDATION_ERROR: None}
    assert np.isnan(validation_error({})) and np.isnan(validation_error({VALIDATION_ERROR: None}))


PATIENT = """
from typing import Literal
from almlip_jax.selection import LeafSelector

class PatientSettings(LeafSelector):
    kind: Literal["patient"] = "patient"

    @property
    def follows_errors(self):
        return True

    def scalars(self, errors):
        return {"rounds": float(len(errors))}

    def build(self, k):
        raise NotImplementedError
"""


def test_a_selector_of_a_package_is_told_of_errors_too(with_kinds):
    with_kinds(PATIENT)
    inside = {"kind": "cost_aware", "selector": {"kind": "adaptive", "alpha": 0.2}}
    assert SelectorSettings.parse(inside).scalars([]) == {"uncertainty_weight": 0.2}
    chain = {"kind": "chain", "filters": [{"kind": "top_fraction", "fraction": 0.5}], "selector": {"kind": "patient"}}
    settings = SelectorSettings.parse(chain)
    assert settings.scalars([1.0, 0.8]) == {"rounds": 2.0} and TopKSettings().scalars([1.0, 0.8]) == {}
    with pytest.raises(ValueError, match="selector 'patient' follows the error on structures kept for validation"):
        check_adaptive(settings, TrainingSettings(validation_fraction=0), "selector")


def test_weight_of_uncertainty_rises_as_progress_fades():
    steady = uncertainty_weight(0.3, [1.0, 0.8, 0.6])
    assert steady == pytest.approx(0.3) == uncertainty_weight(0.3, []) == uncertainty_weight(0.3, [1.0])
    assert uncertainty_weight(0.3, [1.0, 0.8, 0.8]) == pytest.approx(0.3 + 0.3 * 0.7)
    assert uncertainty_weight(0.3, [1.0, 0.8, 1.0]) == pytest.approx(0.3 * 0.7)
    assert uncertainty_weight(0.3, [1.0, np.nan, 0.8, 0.8]) == uncertainty_weight(0.3, [1.0, 0.8, 0.8])
