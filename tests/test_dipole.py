"""The dipole of molecules as a target: labels, files, model, spread, errors, calculator; and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from pydantic import TypeAdapter, ValidationError
from scipy.spatial.transform import Rotation
from typer.testing import CliRunner

from almlip_jax import cli
from almlip_jax.campaign.consistency import check_labels
from almlip_jax.cli.options import ReadingOptions
from almlip_jax.dynamics import ExplorationSettings
from almlip_jax.dynamics.judging import check_exploration
from almlip_jax.ensembles import Ensemble, EnsembleSettings
from almlip_jax.errors import InputError, LabelError
from almlip_jax.evaluation import error_metrics
from almlip_jax.evaluation.pairs import label_pairs
from almlip_jax.evaluation.tables import error_table
from almlip_jax.models import ModelSettings, SharedDensitySettings, build_model
from almlip_jax.models.dipoles import molecular_dipoles
from almlip_jax.oracles.base import Label, Results, judged, obtain_label
from almlip_jax.oracles.sources.xtb import TBLiteSettings
from almlip_jax.oracles.spool import label_from_json, label_to_json
from almlip_jax.oracles.store import LabelStore
from almlip_jax.potential import Evaluated, Potential
from almlip_jax.scoring import predicted_frame
from almlip_jax.structures.graph import lone_atoms
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.labels import FileReading, LabelKeys
from almlip_jax.structures.packing import pack
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import TrainingSettings, check_training
from almlip_jax.training.dataset import training_set

MODEL = SharedDensitySettings(cutoff=4.0, radial=4, l_max=1, channels=4, hidden=(8,), dipole=True)
SPECIES = SpeciesTable((1, 6, 8))
TURN = Rotation.random(random_state=3).as_matrix() @ np.diag([1.0, 1.0, -1.0])  # a rotation and a reflection
AWAY = np.array([3.0, -7.0, 40.0])


def methanol() -> Atoms:
    atoms = molecule("CH3OH")
    atoms.rattle(0.05, seed=1)
    return atoms


def hydronium() -> Atoms:
    atoms = molecule("H2O") + Atoms("H", [[0.0, 0.3, 1.2]])
    atoms.info["charge"] = 1
    return atoms


def turned(atoms: Atoms) -> Atoms:
    moved = atoms.copy()
    moved.positions = atoms.positions @ TURN.T + AWAY
    return moved


def in_a_cell(atoms: Atoms) -> Atoms:
    inside = atoms.copy()
    inside.set_cell([20.0] * 3)
    inside.pbc = True
    return inside


# ------------------------------------------------------------------------------------------------------------- labels


def test_tblite_gives_dipoles_about_the_centre_of_mass():
    label = TBLiteSettings(dipole=True).build()
    water = molecule("H2O")
    dipole = label(water).further["dipole"]
    np.testing.assert_allclose(dipole, [0, 0, -0.476], atol=1e-3)  # 2.29 debye, from the oxygen towards the hydrogens
    for atoms in (water, hydronium()):
        moved = turned(atoms)
        np.testing.assert_allclose(label(moved).further["dipole"], TURN @ label(atoms).further["dipole"], atol=1e-4)
    # about the origin, moving an ion by a changes its dipole by its charge times a
    assert np.linalg.norm(label(turned(hydronium())).further["dipole"]) < 2
    assert "dipole" not in TBLiteSettings().build()(water).further


def test_labels_without_dipoles_are_those_of_earlier_versions():
    assert "dipole" not in TBLiteSettings().identity()
    assert TBLiteSettings(dipole=True).identity() == TBLiteSettings().identity() | {"dipole": True}


def test_stores_and_workers_keep_dipoles(tmp_path: Path):
    settings, atoms = TBLiteSettings(dipole=True), hydronium()
    label = obtain_label(settings.build(), settings, atoms, "an identity")
    assert label.error is None and label.further["dipole"].shape == (3,)
    back = label_from_json(label_to_json(label))
    np.testing.assert_array_equal(back.further["dipole"], label.further["dipole"])
    with LabelStore(tmp_path / "labels.db") as store:
        store.record([(atoms, {"purpose": "train", "campaign": "test"}, label)])
    with LabelStore(tmp_path / "labels.db", readonly=True) as store:
        (stored,) = store.labelled()
    np.testing.assert_array_equal(stored.label.further["dipole"], label.further["dipole"])
    np.testing.assert_array_equal(stored.atoms.calc.results["dipole"], label.further["dipole"])
    write_structures(tmp_path / "labelled.extxyz", [stored.atoms])
    (read,) = read_structures(tmp_path / "labelled.extxyz")
    np.testing.assert_allclose(read.calc.results["dipole"], label.further["dipole"], rtol=1e-12)


def frame(dipole: Any, **info: Any) -> Atoms:
    atoms = methanol()
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((6, 3)))
    atoms.info.update(info)
    if dipole is not None:
        atoms.calc.results["dipole"] = np.asarray(dipole)
    return atoms


def test_files_name_dipoles_in_several_ways(tmp_path: Path):
    for name, keys in (("REF_dipole", LabelKeys()), ("mu", LabelKeys(dipole="mu"))):
        write_structures(tmp_path / "a.extxyz", [frame(None, **{name: np.array([0.1, 0.2, 0.3])})])
        (read,) = read_structures(tmp_path / "a.extxyz", keys=keys)
        np.testing.assert_allclose(read.calc.results["dipole"], [0.1, 0.2, 0.3])
    write_structures(tmp_path / "a.extxyz", [frame(None, REF_dipole=np.array([0.1, 0.2]))])
    with pytest.raises(InputError, match=r"the dipole has shape \(2,\), not \(3,\)"):
        read_structures(tmp_path / "a.extxyz")


def test_the_key_of_dipoles_is_an_option_and_overrides_that_of_a_config():
    assert ReadingOptions().reading().keys is None
    config = FileReading(keys=LabelKeys(energy="dft", dipole="mu"))
    assert ReadingOptions(label_key=["dipole=d"]).reading(config).keys == LabelKeys(energy="dft", dipole="d")
    for given, message in (("energy=E", "should be --energy-key E"), ("dipole", "names no key")):
        with pytest.raises(InputError, match=message):
            ReadingOptions(label_key=[given]).reading(config)


def test_dipoles_are_packed_where_they_are_wanted():
    frames = [frame([0.1, 0.2, 0.3], dipole_weight=0.5), frame(None), in_a_cell(methanol())]
    assert set(pack(frames, SPECIES, 4.0, neighbors=8).data.labels) == {"energy", "forces", "virial"}
    data = pack(frames, SPECIES, 4.0, neighbors=8, further=("dipole",)).data
    np.testing.assert_allclose(data.labels["dipole"][:2], [[0.1, 0.2, 0.3], [0, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(data.weights["dipole"][:3], [0.5, 0, 0])


@pytest.mark.parametrize("wrong", [[0.1, 0.2], [np.nan, 0, 0], "none"])
def test_a_dipole_that_is_none_is_no_label(wrong):
    with pytest.raises(LabelError):
        judged(Results(0.0, np.zeros((6, 3)), None, {"dipole": wrong}), 6, 100.0)


# -------------------------------------------------------------------------------------------------------------- model


def test_charges_add_up_and_ions_have_an_origin():
    """Against the sum written out, for atoms of one structure each and together."""
    graph = lone_atoms(3, jnp.dtype(jnp.float32))
    positions = jnp.asarray([[0.0, 0, 0], [1, 0, 0], [0, 2, 0]])
    whole = replace(graph, structure=jnp.zeros(3, jnp.int32), positions=positions, charge=jnp.asarray([1.0, 0, 0]))
    whole = replace(whole, structure_mask=jnp.asarray([True, False, False]))
    charges, dipoles = jnp.asarray([0.1, 0.2, 0.3]), jnp.asarray([[0, 0, 1.0], [0, 0, 2], [0, 0, 3]])
    masses = np.array([1.008, 12.011, 15.999])
    centre = masses @ positions / masses.sum()
    expected = (charges + 0.4 / 3) @ (positions - centre) + jnp.asarray([0, 0, 6])
    np.testing.assert_allclose(molecular_dipoles(charges, dipoles, whole, SPECIES)[0], expected, rtol=1e-6)


@pytest.fixture(scope="module")
def potential() -> Potential:
    ensemble = Ensemble(build_model(MODEL, SPECIES), 2)
    return Potential(MODEL, SPECIES, jax.jit(ensemble.init)(jax.random.key(0)), {1: 0.0, 6: 0.0, 8: 0.0})


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return [methanol(), turned(methanol()), hydronium(), turned(hydronium()), in_a_cell(methanol())]


@pytest.fixture(scope="module")
def found(potential: Potential, frames: list[Atoms]) -> Evaluated:
    return potential.evaluate(frames)


def test_dipoles_turn_and_do_not_move(found):
    dipoles, spread = found.further["dipole"], found.scores["dipole_std"]
    assert np.linalg.norm(dipoles[:4], axis=1).min() > 0.05
    for n in (0, 2):
        np.testing.assert_allclose(dipoles[n + 1], TURN @ dipoles[n], atol=2e-4)
        assert spread[n] > 1e-3 and spread[n + 1] == pytest.approx(spread[n], rel=1e-3)
    assert np.isnan(dipoles[4]).all() and np.isnan(spread[4]) and np.isfinite(found.energy).all()


def test_the_calculator_gives_them(potential, found):
    atoms = methanol()
    atoms.calc = potential.calculator()
    spread = atoms.calc.get_property("dipole_std", atoms)  # first, so that one program gives both
    assert spread == pytest.approx(found.scores["dipole_std"][0], rel=1e-3)
    np.testing.assert_allclose(atoms.get_dipole_moment(), found.further["dipole"][0], atol=1e-5)
    told = predicted_frame(potential, atoms, found, 0)
    np.testing.assert_allclose(told.info["predicted_dipole"], found.further["dipole"][0])
    assert told.info["dipole_std"] > 0


def test_errors_are_those_of_components(found, frames):
    labels = [frame(found.further["dipole"][0] + [0.3, 0.0, 0.0]), *frames[1:]]
    metrics = error_metrics(labels, found)
    assert metrics["dipole_mae"] == pytest.approx(0.1) and metrics["dipole_rmse"] == pytest.approx(0.3 / np.sqrt(3))
    assert len(label_pairs(labels, found)["dipole"].label) == 1
    assert [str(column.header).split()[0] for column in error_table(metrics, "").columns][-2:] == ["dipole"] * 2
    assert "dipole_mae" not in error_metrics(labels, replace(found, further={}))


# ------------------------------------------------------------------------------------------------------------ refusals


def check(model: dict[str, Any], ensemble: dict[str, Any] = {}, **training: Any) -> None:  # noqa: B006
    settings: Any = TypeAdapter(ModelSettings).validate_python(model)
    check_training(settings, EnsembleSettings.model_validate(ensemble), TrainingSettings.model_validate(training))


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (dict(model={"dipole": True}, ensemble={"heads": 2}), "model.dipole needs ensemble.heads 1"),
        (
            dict(
                model={"dipole": True},
                ensemble={"likelihood": "mean_variance"},
                loss={"kind": "nll"},
            ),
            "a loss of kind 'nll' judges no dipoles",
        ),
        (dict(model={}, loss={"dipole": 5.0}), "the loss weighs dipoles by 5, but the model gives none"),
        (dict(model={}, second_stage={"dipole": 5.0}), "the loss weighs dipoles by 5"),
        (
            dict(model={"dipole": True}, ensemble={"size": 2, "variants": [{}, {"model": {"dipole": False}}]}),
            "some of ensemble.variants give a dipole",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused(given, problem):
    with pytest.raises(InputError, match=problem):
        check(**given)
    check({"dipole": True}, loss={"dipole": 5.0, "kind": "huber"})


def test_label_sources_must_give_what_is_learned():
    check_labels(("dipole",), TBLiteSettings(dipole=True))
    check_labels((), TBLiteSettings())
    with pytest.raises(
        ValueError, match="learns dipoles .* from labels, which the label source does not"
    ):
        check_labels(("dipole",), TBLiteSettings())


def test_models_without_dipoles_take_no_such_key():
    for model in ({"kind": "mace", "dipole": True}, {"l_max": 0, "dipole": True}):
        with pytest.raises(ValidationError, match="dipole"):
            TypeAdapter(ModelSettings).validate_python(model)


def test_structures_that_teach_no_dipole_are_refused():
    def packed(*structures: Atoms) -> None:
        training_set(
            structures,
            SPECIES,
            4.0,
            None,  # type: ignore[arg-type]  # not looked at before
            reference_energies={},
            validation_fraction=0.0,
            dtype=np.float32,
            further=("dipole",),
        )

    with pytest.raises(InputError, match="no structure has one to learn from"):
        packed(frame(None))
    with pytest.raises(InputError, match=r"structure 1 \(CH4O\) is periodic, but a dipole belongs to molecules"):
        packed(frame([0.0, 0.0, 0.1]), in_a_cell(frame(None)))
    label: Label = obtain_label(
        TBLiteSettings(dipole=True).build(), TBLiteSettings(dipole=True), in_a_cell(methanol()), ""
    )
    assert label.error is not None and "a dipole belongs to molecules" in label.error


def test_dynamics_look_at_the_spread_of_dipoles_where_asked():
    assert "dipole_std" not in ExplorationSettings().scores
    for given in ({"monitor": ["dipole_std"]}, {"gate": {"kind": "absolute", "score": "dipole_std"}}):
        settings = ExplorationSettings.model_validate(given)
        assert "dipole_std" in settings.scores
        check_exploration(settings, EnsembleSettings(size=2), further=("dipole",))
        with pytest.raises(
            ValueError, match="exploration looks at dipole_std, but the model gives no dipole; set model"
        ):
            check_exploration(settings, EnsembleSettings(size=2))


def test_a_command_selects_by_the_spread_of_dipoles(potential, frames, found, tmp_path: Path):
    """The potential says that it gives dipoles, and the config needs a selector alone."""
    potential.save(tmp_path / "potential")
    write_structures(tmp_path / "pool.extxyz", frames[:3])
    (tmp_path / "config.yaml").write_text("selection: {selector: {kind: top_k, score: dipole_std}}\n")
    files = {"--potential": "potential", "--pool": "pool.extxyz", "--train": "pool.extxyz", "--out": "batch.extxyz"}
    options = [part for option, name in files.items() for part in (option, str(tmp_path / name))]
    done = CliRunner().invoke(cli.app, ["select", str(tmp_path / "config.yaml"), "-k", "1", *options])
    assert done.exit_code == 0, done.output + str(done.exception)
    (chosen,) = read_structures(tmp_path / "batch.extxyz")
    spread = found.scores["dipole_std"][:3]  # two of them are equal to rounding
    assert spread[chosen.info["pool_index"]] == pytest.approx(spread.max(), rel=1e-5)
    assert spread.min() < 0.9 * spread.max()
