"""A score that is declared once stands everywhere: committees, settings, schema, gates, files, the calculator."""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from ase.build import molecule
from pydantic import ValidationError

from almlip_jax import scores as declared
from almlip_jax import targets
from almlip_jax.campaign.settings import StoppingSettings
from almlip_jax.dynamics import ExplorationSettings, know
from almlip_jax.dynamics.thresholds import CalibratedThresholds
from almlip_jax.ensembles import EnsembleSettings, Prediction, committee_statistics, gives_score
from almlip_jax.potential import Potential, fitted, novelty
from almlip_jax.scores import Score, declare
from almlip_jax.selection import SelectorSettings, TopKSettings
from almlip_jax.structures.graph import lone_atoms
from almlip_jax.targets import Target
from almlip_jax.unit_names import unit_of

RANGE = Score(
    "force_range",
    "eV/A",
    "largest component minus smallest, over members",
    lambda seen: jnp.max(jnp.ptp(seen.prediction.forces, axis=0), axis=-1),
    per="atom",
)
RANGE_MAX = Score("force_range_max", "eV/A", "largest of an atom", largest_of="force_range")


@pytest.fixture
def added(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_STRUCTURES", "_ATOMS"):
        monkeypatch.setattr(declared, name, dict(getattr(declared, name)))
    declare(RANGE, RANGE_MAX)


def committee() -> Any:
    forces = np.random.default_rng(0).normal(size=(3, 2, 3))
    prediction = Prediction(
        jnp.zeros((3, 2)), jnp.asarray(forces), jnp.zeros((3, 2, 3, 3)), features=jnp.zeros((3, 2, 1))
    )
    return forces, committee_statistics(prediction, lone_atoms(2, jnp.dtype(jnp.float32)))


def gate(score: str, **more: Any) -> ExplorationSettings:
    return ExplorationSettings.model_validate({"gate": {"kind": "absolute", "score": score, **more}})


def test_a_committee_gives_what_is_declared(added):
    forces, found = committee()
    expected = np.ptp(forces, axis=0).max(axis=-1)
    np.testing.assert_allclose(found.atom_scores["force_range"], expected, rtol=1e-6)
    np.testing.assert_allclose(found.scores["force_range_max"], expected, rtol=1e-6)
    assert "force_range_max" in found.scores and unit_of("force_range_max_0") == "eV/A"


def test_values_that_a_score_lets_go_are_not_taken_for_later_ones(added):
    """Each of many scores reduces an array that nobody else holds."""
    factors = range(1, 101)
    for factor in factors:
        alone = partial(lambda seen, by: seen.mean(by * seen.force_length), by=factor)
        held = partial(lambda seen, by: -by + seen.forces[:, 0], by=factor)
        declare(
            Score(f"alone_{factor}", "eV/A", "", alone),
            Score(f"held_{factor}", "eV/A", "", held, per="atom"),
            Score(f"held_mean_{factor}", "eV/A", "", mean_of=f"held_{factor}"),
        )
    forces, found = committee()
    mean = forces.mean(axis=0)
    for factor in factors:
        expected = factor * np.linalg.norm(mean, axis=-1)
        np.testing.assert_allclose(found.scores[f"alone_{factor}"], expected, rtol=1e-5)
        np.testing.assert_allclose(found.scores[f"held_mean_{factor}"], mean[:, 0] - factor, rtol=1e-5)


def test_targets_of_ours_have_scores_of_their_spread_too(monkeypatch):
    """Their declaration is enough, as for targets of packages; the module is made once more beside itself."""
    charges = Target("charges", "e", per="atom")
    monkeypatch.setattr(targets, "_TARGETS", targets._TARGETS | {"charges": charges})
    origin = importlib.util.spec_from_file_location("scores_again", declared.__file__)
    again = importlib.util.module_from_spec(origin)
    monkeypatch.setitem(sys.modules, "scores_again", again)
    origin.loader.exec_module(again)
    assert {"dipole_std", "charges_std_max", "charges_std_mean"} <= {one.name for one in again.scores()}


def test_settings_take_what_is_declared(added):
    assert gate("force_range_max", species={"H": 0.5}).scores[-1] == "force_range_max"
    assert SelectorSettings.parse({"kind": "top_k", "score": "force_range_max"}).score_names == ("force_range_max",)
    assert StoppingSettings(monitor="force_range_max").monitor == "force_range_max"
    CalibratedThresholds(tolerance=0.1).check("force_range_max")
    assert "force_range_max" in TopKSettings.model_json_schema()["properties"]["score"]["enum"]
    assert not gives_score("force_range_max", EnsembleSettings(size=1, likelihood="evidential"))


FITTED = """
from typing import ClassVar

import jax.numpy as jnp
from flax import struct
from almlip_jax.potential.fitted import fitted_kind
from almlip_jax.potential.novelty import fits
from almlip_jax.scores import Score, declare

declare(
    Score("beyond", "", "how far a feature is beyond all of the training set", per="atom", needs="training_set"),
    Score("beyond", "", "largest of an atom", largest_of="beyond", needs="training_set"),
)

@fitted_kind
@struct.dataclass
class Box:
    kind: ClassVar[str] = "box"
    version: ClassVar[int] = 1
    low: object
    high: object

    def arrays(self):
        return {"low": self.low, "high": self.high}

    def numbers(self):
        return {}

    @classmethod
    def restored(cls, arrays, numbers):
        return cls(arrays["low"], arrays["high"])

    def of(self, prediction, graph):
        x = prediction.features
        over = jnp.maximum(x - self.high[:, None], self.low[:, None] - x)
        return jnp.where(graph.atom_mask, jnp.max(over, axis=(0, 2)), 0)

@fits("beyond")
def fit(features, species, num_species):
    return Box(features.min(axis=1), features.max(axis=1))
"""


def test_a_package_brings_a_score_that_is_fitted(committee, with_kinds, monkeypatch, tmp_path):
    """By a class of its own, which potentials keep; gates find it where they know the training set."""
    for module, name in ((novelty, "_FITS"), (fitted, "_KINDS")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))
    with_kinds(FITTED)
    frames = [molecule(name) for name in ("H2O", "CO2", "CH3OH")]
    walkers = {"walkers": [{"temperature": 300}], "gate": {"kind": "absolute", "score": "beyond"}}
    committee.with_fitted(**know(walkers, committee, frames[:2], 0).novelty).save(tmp_path / "p")
    potential = Potential.load(tmp_path / "p")
    assert set(know(walkers, potential, None, 0).novelty) == {"beyond"}
    known, other = (committee.atom_features(one)[0] for one in (frames[:2], frames[2:]))
    beyond = np.maximum(other - known.max(axis=1)[:, None], known.min(axis=1)[:, None] - other).max(axis=(0, 2))
    found = potential.evaluate(frames)
    assert found.scores["beyond"][:2] == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(found.atom_scores["beyond"][2], beyond, rtol=1e-4, atol=1e-6)
    assert found.scores["beyond"][2] == pytest.approx(beyond.max(), rel=1e-4) and beyond.max() > 1e-3


def test_a_cell_of_a_notebook_may_run_twice(added):
    cell = """declare(Score("twice", "eV", "told twice", lambda seen: {factor} * seen.energy))"""
    for _ in range(2):
        exec(compile(cell.format(factor=2), "cell", "exec"), {"declare": declare, "Score": Score})
    with pytest.raises(ValueError, match="another score 'twice'"):
        exec(compile(cell.format(factor=3), "cell", "exec"), {"declare": declare, "Score": Score})


def test_no_other_name_passes():
    assert "force_range_max" not in committee()[1].scores
    for name, meant in (("force_range_max", "force_"), ("latent_distanc", "latent_distance")):
        with pytest.raises(ValidationError, match=f"'{name}' is not a known score; did you mean '{meant}"):
            gate(name)
    with pytest.raises(ValidationError, match="not a known score; did you mean 'latent_distance'"):
        TopKSettings(score="latent_distanc")
    assert TopKSettings(score="latent_distance").score_names == ("latent_distance",)
    with pytest.raises(ValidationError, match="'force_std_max' is always there, without being asked for"):
        ExplorationSettings(monitor=("latent_distance", "force_std_max"))
    with pytest.raises(ValidationError, match="'latent_distanc' is not a known score; did you mean 'latent_distance'"):
        ExplorationSettings(monitor=("latent_distanc",))


@pytest.mark.parametrize(
    ("score", "problem"),
    [
        (Score("force_std", "eV", "another", lambda seen: seen.energy, per="atom"), "another score 'force_std'"),
        (Score("a b", "", "", lambda seen: seen.energy), "cannot be the name of a score"),
        (Score("new", "", "", largest_of="nothing"), "needs the score 'nothing' of atoms"),
        (Score("new", "", ""), "needs one of"),
        (Score("new", "", "", lambda seen: seen.energy, mean_of="force_std"), "needs one of"),
    ],
)
def test_declarations_that_say_no_value_or_two_are_refused(score, problem):
    with pytest.raises(ValueError, match=problem):
        declare(score)
    assert score not in declared.scores() + declared.atom_scores()
