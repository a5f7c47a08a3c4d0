"""Campaigns that begin with a saved potential: what it knew stays, and it has to stay what it was."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ase.build import molecule
from tiny_campaign import SECTIONS, Killed, KillingProgress, result_of, run_or_resume, tiny_config

from almlip_jax.campaign import resume_campaign
from almlip_jax.campaign.beginning import with_beginning
from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.errors import InputError
from almlip_jax.files import read_csv
from almlip_jax.keys import numpy_generator
from almlip_jax.learner import Learner
from almlip_jax.oracles import LabelStore, TBLiteSettings, label_structures, rattle
from almlip_jax.potential import Potential
from almlip_jax.saved_potential import SavedPotential
from almlip_jax.structures.io import read_structures

pytestmark = pytest.mark.usefixtures("compile_once", "labels_here")


@pytest.fixture
def saved(reference: Path, tmp_path: Path) -> Path:
    """The potential of the last round of the tiny campaign."""
    shutil.copytree(RunDirectory(reference / "run").round(2).potential, tmp_path / "saved")
    return tmp_path / "saved"


def begun_with(saved: Path, steps: int = 20) -> dict[str, Any]:
    """A campaign with other random numbers that ends with its second training."""
    return {
        "seed": 11,
        "initial": {"potential": str(saved)},
        "training": {"max_steps": steps},
        "stopping": {"max_rounds": 1},
    }


@pytest.mark.slow
def test_a_few_steps_are_enough_and_a_kill_changes_nothing(saved: Path, reference: Path, tmp_path: Path) -> None:
    """Twenty steps from a potential that knows water; from fresh parameters they teach next to nothing."""
    sections = begun_with(saved)
    run_or_resume(tmp_path, tmp_path / "run", **sections)
    run_or_resume(tmp_path, tmp_path / "fresh", **{**sections, "initial": {}, "stopping": {"max_rounds": 0}})
    errors = [read_csv(tmp_path / name / "metrics.csv")[0]["forces_rmse_300K"] for name in ("run", "fresh")]
    assert errors[0] < 0.5 * errors[1]
    began, made = (
        Potential.load(saved),
        [Potential.load(tmp_path / "run" / "rounds" / f"00{n}" / "potential") for n in (0, 1)],
    )
    for potential in made:
        assert potential.reference_energies == began.reference_energies
        kept = {atoms.positions.tobytes() for atoms in potential.remembered}
        assert kept & {atoms.positions.tobytes() for atoms in began.remembered}
    with pytest.raises(Killed):
        run_or_resume(tmp_path, tmp_path / "killed", KillingProgress(1, "train", within=True), **sections)
    run_or_resume(tmp_path, tmp_path / "killed", **sections)
    assert result_of(tmp_path / "killed") == result_of(tmp_path / "run")


def test_another_potential_in_its_place_is_refused(saved: Path, reference: Path, tmp_path: Path) -> None:
    sections = begun_with(saved)
    with pytest.raises(Killed):
        run_or_resume(tmp_path, tmp_path / "run", KillingProgress(0, "train"), **sections)
    other = Potential.load(RunDirectory(reference / "run").round(0).potential)
    other.save(saved)
    with pytest.raises(InputError, match=r"initial\.potential\) is not the one that the campaign began with"):
        run_or_resume(tmp_path, tmp_path / "run", **sections)
    shutil.rmtree(saved)
    with pytest.raises(InputError, match="is not a potential"):
        resume_campaign(tiny_config(tmp_path, **sections), tmp_path / "run")


def test_another_architecture_is_refused_before_anything_is_paid(saved: Path, tmp_path: Path) -> None:
    sections = begun_with(saved) | {"model": {**SECTIONS["model"], "channels": 5}}
    with pytest.raises(InputError, match=r"initial\.potential: .*model\.channels 4, not 5"):
        run_or_resume(tmp_path, tmp_path / "run", **sections)
    assert not (tmp_path / "run" / "labels.db").exists()


def test_model_and_ensemble_are_its_own_where_not_given(saved: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path, **begun_with(saved))
    given = {name: getattr(config, name) for name in config.model_fields_set - {"model", "ensemble"}}
    taken = with_beginning(ExperimentConfig.model_validate(given))
    assert taken.model == config.model and taken.ensemble == config.ensemble and taken.precision == "float32"


def test_the_digest_tells_what_a_training_depends_on(saved: Path) -> None:
    def digests() -> tuple[str, str]:
        return SavedPotential.read(saved).digest(), SavedPotential.read(saved).digest(training=True)

    first = digests()
    next(saved.glob("remembered-*")).unlink()
    assert digests()[0] == first[0] and digests()[1] != first[1]


@pytest.mark.slow
def test_elements_are_added_and_what_was_known_stays(saved: Path, tmp_path: Path) -> None:
    start = Potential.load(saved)
    frames = rattle(molecule("CH4"), 4, numpy_generator(5, "methane"), stdev=0.05)
    with LabelStore(tmp_path / "labels.db") as store:
        results = label_structures(frames, TBLiteSettings(), store, provenance={"purpose": "test"})
    methane = [result.atoms for result in results if result.atoms is not None]
    learner = Learner(20, typical=methane, start=start, training={"batch_size": 4})
    assert learner.species.symbols == ("H", "C", "O") and learner.settings == start.member_settings
    params, references = learner.beginning(methane, None)
    assert {z: references[z] for z in (1, 8)} == {z: start.reference_energies[z] for z in (1, 8)}
    potential = Potential(start.settings, learner.species, params, references, members=start.member_settings)
    water = read_structures(saved / next(saved.glob("remembered-*")).name)
    np.testing.assert_allclose(potential.evaluate(water).energy, start.evaluate(water).energy, atol=1e-4)
    left = [a.get_potential_energy() for a in methane] - potential.evaluate(methane).energy
    # of 113 eV: the energy of carbon takes up what the others leave, but for what an untrained network scatters by
    assert np.abs(np.mean(left)) < 0.2 * np.std(left) < 2.0
    assert jax.tree.leaves(params)[0].shape[0] == 2
