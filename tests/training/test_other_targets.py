"""Targets that another package declares are read, learned, evaluated and judged like ours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.calculators.emt import EMT
from small_training import SPECIES, labelled, settings_of, trainer_of, water

from almlip_jax import scores, targets
from almlip_jax.campaign.config import ExperimentConfig
from almlip_jax.campaign.report_figures import error_curves, structure_parities
from almlip_jax.campaign.settings import TargetErrorSettings
from almlip_jax.campaign.stages import _predictions
from almlip_jax.dynamics import ExplorationSettings
from almlip_jax.ensembles import Prediction
from almlip_jax.errors import InputError, LabelError
from almlip_jax.evaluation import error_metrics
from almlip_jax.evaluation.pairs import label_pairs
from almlip_jax.evaluation.tables import error_table
from almlip_jax.evaluation.tidy import columns
from almlip_jax.evaluation.training_curves import training_curves
from almlip_jax.group_looks import group_looks
from almlip_jax.models import ModelSettings
from almlip_jax.oracles import Labeller, LocalSettings
from almlip_jax.oracles.base import Results, judged, obtain_label
from almlip_jax.oracles.sources.calculator import CalculatorSettings, calculated
from almlip_jax.oracles.sources.external import ExternalSettings
from almlip_jax.oracles.sources.user import UserSourceSettings
from almlip_jax.oracles.spool import label_from_json, label_to_json
from almlip_jax.oracles.store import LabelStore
from almlip_jax.potential import Potential
from almlip_jax.scoring import labelled_frame, predicted_frame
from almlip_jax.structures.extxyz_reading import read_extxyz
from almlip_jax.structures.graph import Targets, lone_atoms
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.labels import LabelKeys
from almlip_jax.structures.packing import pack
from almlip_jax.structures.remembered import as_text, remember
from almlip_jax.templates import TEMPLATES
from almlip_jax.training import TrainingSettings, reference_energies
from almlip_jax.training.loss import residuals
from almlip_jax.training.penalties import HuberLoss, SquaredLoss
from almlip_jax.unit_names import unit_of

PACKAGE = '''
from dataclasses import dataclass, replace
from typing import Literal

import jax
import jax.numpy as jnp
import jax.numpy as jnp

from almlip_jax.models import SharedDensitySettings
from almlip_jax.models.around import Around
from almlip_jax.structures.graph import atom_counts, sum_over_atoms
from almlip_jax.targets import Target, declare

declare(
    Target("charges", "e", meaning="partial charges of the atoms", per="atom", weight=20.0),
    Target("quadrupole", "e*A^2", shape=(3, 3), symmetry="tensor", structures="open"),
)


@dataclass(frozen=True)
class Charged(Around):
    """Charges linear in features and species, of neutral structures; and the quadrupole that they make."""

    @property
    def targets(self):
        return "charges", "quadrupole"

    def init(self, key):
        width = self.inner.settings.hidden[-1] + self.num_species
        return self.inner.init(key) | {"charge": 0.1 * jax.random.normal(jax.random.fold_in(key, 1), (width,))}

    def apply(self, params, geometry, graph):
        output = self.inner.apply(params, geometry, graph)
        species = jax.nn.one_hot(graph.species, self.num_species)
        charges = jnp.concatenate([output.features, species], axis=1) @ params["charge"]
        charges -= (sum_over_atoms(charges, graph) / atom_counts(graph))[graph.structure]
        middle = sum_over_atoms(graph.positions, graph) / atom_counts(graph)[:, None]
        away = graph.positions - middle[graph.structure]  # a graph has an origin of its own
        square = away[:, :, None] * away[:, None, :]
        quadrupole = sum_over_atoms(charges[:, None, None] * square, graph)
        return replace(output, further={"charges": charges, "quadrupole": quadrupole})


class ChargedSettings(SharedDensitySettings):
    """The shared-density model with charges."""

    kind: Literal["charged"] = "charged"

    @property
    def further(self):
        return "charges", "quadrupole"

    def build(self, species):
        return Charged(super().build(species))
'''

SMALL = {"kind": "charged", "cutoff": 4.0, "radial": 4, "l_max": 1, "channels": 4, "hidden": (8,)}


@pytest.fixture
def package(with_kinds: Callable[[str], None]) -> None:
    with_kinds(PACKAGE)


def charged(seed: int, *, periodic: bool = False) -> Atoms:
    """A water molecule about the origin, with energy, forces, and the charges of a simple model of water."""
    atoms = water(seed)
    atoms.positions -= atoms.positions.mean(axis=0)
    if periodic:
        atoms.set_cell([15.0] * 3)
        atoms.pbc = True
    labelled(atoms)
    charges = np.where(atoms.numbers == 8, -0.8, 0.4)
    atoms.calc.results["charges"] = charges
    atoms.calc.results["quadrupole"] = np.einsum("i,ia,ib->ab", charges, atoms.positions, atoms.positions)
    return atoms


# ------------------------------------------------------------------------------------------------------------- labels


@pytest.mark.usefixtures("package")
def test_files_hold_them_under_several_names(tmp_path: Path) -> None:
    atoms, path = charged(0), tmp_path / "a.extxyz"
    quadrupole = atoms.calc.results["quadrupole"]
    write_structures(path, [atoms])
    (read,) = read_structures(path)
    assert read.calc.results["quadrupole"].shape == (3, 3)
    assert not {"quadrupole", "charges"} & {*read.info, *read.arrays}
    for name in ("charges", "quadrupole"):
        np.testing.assert_array_equal(read.calc.results[name], atoms.calc.results[name])
    path.write_text(as_text(remember([atoms], 1, np.random.default_rng(0))))  # as a potential keeps it
    (kept,) = read_extxyz(path)
    for name in ("charges", "quadrupole", "forces"):
        np.testing.assert_array_equal(kept.calc.results[name], atoms.calc.results[name])
    write_structures(path, read_structures(path))
    np.testing.assert_array_equal(read_structures(path)[0].calc.results["quadrupole"], quadrupole)

    atoms.calc.results["node_energy"] = np.zeros(3)  # which nothing declares
    assert write_structures(tmp_path / "a.db", [atoms]) == ("node_energy",)
    (read,) = read_structures(tmp_path / "a.db")
    for name in ("charges", "quadrupole", "forces"):
        np.testing.assert_array_equal(read.calc.results[name], atoms.calc.results[name])

    bare = water(0)
    for key, keys in (("REF_quadrupole", None), ("Q", LabelKeys(quadrupole="Q", charges="mulliken"))):
        named = bare.copy()
        named.info, named.calc = {key: quadrupole}, bare.calc
        if keys is not None:
            named.set_array("mulliken", atoms.calc.results["charges"])
        write_structures(path, [named])
        (read,) = read_structures(path, keys=keys)
        np.testing.assert_array_equal(read.calc.results["quadrupole"], quadrupole)
        assert ("charges" in read.calc.results) == (keys is not None)
    bare.info = {"quadrupole": quadrupole[0]}
    write_structures(path, [bare])
    with pytest.raises(InputError, match=r"the quadrupole has shape \(3,\), not \(3, 3\)"):
        read_structures(path)
    assert read_structures(path, ignore_labels=True)[0].info == {}


@pytest.mark.usefixtures("package")
def test_label_stores_and_label_sources_keep_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "charging.py").write_text(
        "import sys\n"
        "import numpy as np\n"
        "def make(short=False):\n"
        "    others = {'charges': np.array([-0.8, 0.4, 0.4])} | ({} if short else {'quadrupole': np.eye(3)})\n"
        "    energy = -2.0 if 'jax' in sys.modules else -1.0\n"
        "    return lambda atoms: (energy, np.zeros((len(atoms), 3)), None, others)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    settings = UserSourceSettings(function="charging:make", targets=("charges", "quadrupole"))
    assert settings.gives("charges") and not settings.gives("dipole")
    assert "targets" not in UserSourceSettings(function="charging:make").identity() and "targets" in settings.identity()
    label = obtain_label(settings.build(), settings, water(0), "one")
    assert label.error is None
    back = label_from_json(label_to_json(label))
    with LabelStore(tmp_path / "labels.db") as store, Labeller(settings, store, LocalSettings(workers=1)) as labeller:
        (found,) = labeller.label([water(0)], {"purpose": "train"})
        assert found.atoms.get_potential_energy() == -1.0, "a worker is told of targets and imports no package"
        store.record([(water(1), {"purpose": "test"}, back)])
    with LabelStore(tmp_path / "labels.db", readonly=True) as store:
        held = list(store.labelled())
    assert len(held) == 2
    for stored, name in product(held, ("charges", "quadrupole")):
        np.testing.assert_array_equal(stored.label.further[name], label.further[name])
        np.testing.assert_array_equal(stored.atoms.calc.results[name], label.further[name])
    less = settings.model_copy(update={"parameters": {"short": True}})
    error = obtain_label(less.build(), less, water(0), "two").error
    assert error is not None and "returned no quadrupole among the others" in error
    with pytest.raises(LabelError, match=r"returned charges that is not \(3,\) finite"):
        judged(Results(0.0, np.zeros((3, 3)), None, {"charges": np.zeros(2)}), 3, 100.0)


class Charging(EMT):
    """A calculator that also gives charges."""

    implemented_properties = (*EMT.implemented_properties, "charges")

    def calculate(self, atoms: Atoms, *given: Any) -> None:
        super().calculate(atoms, *given)
        self.results["charges"] = 0.1 * atoms.numbers


@pytest.mark.usefixtures("package")
def test_calculators_are_asked_for_what_they_give() -> None:
    water_molecule, asked = water(0), ("charges", "quadrupole")
    bare = CalculatorSettings(calculator="somewhere:Charging")
    assert bare.identity().keys() == CalculatorSettings(calculator="somewhere:Charging", targets=()).identity().keys()
    assert CalculatorSettings(calculator="a:B", targets=asked).asked_of(water_molecule) == asked
    assert CalculatorSettings(calculator="a:B", targets=asked).asked_of(charged(0, periodic=True)) == ("charges",)
    found = calculated(water_molecule.copy(), Charging(), force_consistent=True, further=("charges",))
    np.testing.assert_allclose(found.further["charges"], [0.8, 0.1, 0.1])
    with pytest.raises(LabelError, match="the calculator gives no quadrupole; leave it out of oracle.targets"):
        calculated(water_molecule.copy(), Charging(), force_consistent=True, further=asked)


@pytest.mark.usefixtures("package")
def test_labels_made_elsewhere_come_back_in_the_order_of_the_atoms(tmp_path: Path) -> None:
    asked = charged(0)
    turned = asked[[1, 2, 0]]
    turned.info = {"label_identity": "x"}
    given = asked.calc.results
    turned.calc = asked.calc.__class__(turned, energy=given["energy"], forces=given["forces"][[1, 2, 0]])
    turned.calc.results["charges"] = np.array([0.3, 0.5, -0.8])
    (tmp_path / "results").mkdir()
    write_structures(tmp_path / "results" / "done.extxyz", [turned])
    label = ExternalSettings(method="m", folder=tmp_path).delivery().label("x", asked)
    assert label is not None
    np.testing.assert_array_equal(label.further["charges"], [-0.8, 0.3, 0.5])
    np.testing.assert_array_equal(label.forces, given["forces"])


# ----------------------------------------------------------------------------------------------------------- settings


@pytest.mark.usefixtures("package")
def test_settings_have_keys_for_them() -> None:
    given = {"loss": {"charges": 5, "kind": "huber", "charges_delta": 0.2}, "second_stage": {"quadrupole": 3.0}}
    training = TrainingSettings.model_validate(given)
    charges, quadrupole = targets.targets(("charges", "quadrupole"))
    first, second = training.losses
    assert [loss.weight_of(charges) for loss in (first, second)] == [5.0, 5.0]
    assert [loss.weight_of(quadrupole) for loss in (first, second)] == [1.0, 3.0]
    assert (first.delta_of(charges), SquaredLoss().weight_of(charges)) == (0.2, 20.0)
    assert SquaredLoss(charges=20.0) == SquaredLoss() and "charges" not in SquaredLoss().model_dump()
    assert TrainingSettings.model_validate(training.model_dump(mode="json")) == training
    shown = HuberLoss.model_json_schema()["properties"]
    assert shown["charges"]["default"] == 20.0 and shown["quadrupole_delta"]["unit"] == "e*Angstrom^2"
    with pytest.raises(ValueError, match="unknown key 'charge'; did you mean 'charges'"):
        SquaredLoss.model_validate({"charge": 1.0})
    with pytest.raises(ValueError, match="charges\n.*greater than or equal to 0"):
        SquaredLoss.model_validate({"charges": -1.0})
    assert TargetErrorSettings(metric="charges_rmse", value=0.1).of == charges
    assert ExplorationSettings.model_validate({"monitor": ["quadrupole_std"]}).scores[-1] == "quadrupole_std"
    assert "quadrupole_mae" in columns() and error_curves()["charges_rmse"] == ("charges RMSE", "me")
    assert unit_of("validation_quadrupole_rmse_0") == "e*A^2" and unit_of("charges_std_max") == "e"


def test_without_the_package_nothing_knows_them() -> None:
    with pytest.raises(ValueError, match="unknown key 'charges'"):
        SquaredLoss.model_validate({"charges": 1.0})
    assert "charges_rmse" not in targets.target_errors() and "charges_std" not in scores.score_units()


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        (targets.Target("dipole", "e*A"), "another target 'dipole'"),
        (targets.Target("stress", "eV"), "another target 'stress'"),
        (targets.Target("total charge", "e"), "cannot be the name"),
        (targets.Target("spin", ""), "cannot be the name"),
        (targets.Target("pull", "eV/A", derived_from="energy"), "cannot be derived"),
        (targets.Target("charges", "e", per="atom", by_atoms=True), "belongs to atoms"),
        (targets.Target("energy", "eV"), "another target 'energy'"),
    ],
)
def test_declarations_that_mean_nothing_are_refused(target: targets.Target, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        targets.declare(target)
    targets.declare(targets.DIPOLE)  # again, as when a cell of a notebook runs twice


# ------------------------------------------------------------------------------------------------ training, evaluation


@pytest.mark.usefixtures("package")
def test_they_are_packed_where_they_are_wanted() -> None:
    frames = [charged(0), water(1)]
    frames[1].info["charges_weight"] = 0.5
    data = pack(frames, SPECIES, 4.0, neighbors=8, further=("charges", "quadrupole")).data
    np.testing.assert_allclose(data.labels["charges"][:6], [-0.8, 0.4, 0.4, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(data.labels["quadrupole"][0], frames[0].calc.results["quadrupole"], rtol=1e-5)
    assert data.weights["charges"][:2].tolist() == [1, 0] and data.weights["quadrupole"][:2].tolist() == [1, 0]


@pytest.mark.usefixtures("package")
def test_residuals_of_atoms_are_those_of_labelled_structures() -> None:
    """Two lone atoms with charges of 0.3 and 0.4 e too much, the second without a label, the third slot padding."""
    graph = lone_atoms(3, jnp.dtype(jnp.float32))
    graph = replace(graph, atom_mask=jnp.asarray([True, True, False]), structure_mask=jnp.asarray([True, True, False]))
    none = {"energy": jnp.zeros((1, 3)), "forces": jnp.zeros((1, 3, 3)), "virial": jnp.zeros((1, 3, 3, 3))}
    given = {"charges": jnp.asarray([0.5, 0.4, 7.0]), "quadrupole": jnp.full((3, 3, 3), 0.5)}
    prediction = Prediction(**none, features=jnp.zeros((3, 1)), further=given)
    labels = Targets(
        {"charges": jnp.asarray([0.2, 0.0, 0.0]), "quadrupole": jnp.zeros((3, 3, 3))},
        {"charges": jnp.asarray([2.0, 0.0, 0.0]), "quadrupole": jnp.asarray([1.0, 1.0, 0.0])},
    )
    found = residuals(prediction, graph, labels, jnp.ones(3))
    assert float(found.sums["charges"]) == pytest.approx(2.0 * 0.3**2) and found.counts["charges"] == 1
    assert float(found.sums["quadrupole"]) == pytest.approx(2 * 0.5**2) and found.counts["quadrupole"] == 2


@pytest.mark.usefixtures("package")
def test_campaigns_know_what_they_ask_of_each_other() -> None:
    given = TEMPLATES["molecule"].content | {
        "model": SMALL,
        "test": {"md": [{"temperature": 300}]},
        "stopping": {"target_error": {"metric": "charges_rmse", "value": 0.01}},
    }
    source = {"kind": "user", "function": "my:labels", "targets": ["charges", "quadrupole"]}
    config = ExperimentConfig.model_validate(given | {"oracle": source})
    assert config.model.further == ("charges", "quadrupole")
    with pytest.raises(ValueError, match="learns quadrupoles .* from labels, which the label source does not give"):
        ExperimentConfig.model_validate(given | {"oracle": source | {"targets": ["charges"]}})
    with pytest.raises(ValueError, match="gives no charges; take a model that gives it, or name another metric"):
        ExperimentConfig.model_validate(given | {"oracle": source, "model": {}})


@pytest.mark.slow
@pytest.mark.usefixtures("package")
def test_they_are_learned_evaluated_and_judged() -> None:
    """From labels to every number that is told of them."""
    dataset: list[Atoms] = [charged(seed) for seed in range(16)]
    model: Any = ModelSettings.parse(SMALL)
    settings = settings_of(max_steps=240, learning_rate=0.02, loss={"energy": 1.0, "forces": 0.1, "quadrupole": 5.0})
    trainer = trainer_of(dataset, settings, model=model)
    references = reference_energies(dataset, SPECIES)
    result = trainer.train(dataset, None, jax.random.key(0), reference_energies=references)
    first, last = (report.errors for report in (result.history[0], result.history[-1]))
    assert last["charges_rmse"] < min(0.05, 0.3 * first["charges_rmse"])
    assert {"validation_charges_rmse_1", "validation_quadrupole_rmse_0"} < set(result.rows()[0])
    assert [one.name for one in training_curves(result.rows())[1:]] == [
        "validation charges RMSE",
        "validation quadrupole RMSE",
    ]

    potential = Potential(model, SPECIES, result.params, references)
    frames = [charged(101), charged(102), Atoms("O", [[0.0, 0.0, 0.0]]), charged(3, periodic=True)]
    found = potential.evaluate(frames)
    assert [one.shape for one in found.further["charges"]] == [(3,), (3,), (1,), (3,)]
    quadrupole = found.further["quadrupole"]
    assert quadrupole.shape == (4, 3, 3) and np.isnan(quadrupole[3]).all() and np.isfinite(quadrupole[:3]).all()
    for n in range(2):
        by_hand = np.einsum("i,ia,ib->ab", found.further["charges"][n], frames[n].positions, frames[n].positions)
        np.testing.assert_allclose(quadrupole[n], by_hand, atol=1e-5)
    members = [
        Potential(model, SPECIES, jax.tree.map(lambda x, m=m: x[m : m + 1], result.params), references) for m in (0, 1)
    ]
    apart = [one.evaluate(frames[:1]).further["charges"][0] for one in members]
    np.testing.assert_allclose(found.atom_scores["charges_std"][0], np.std(apart, axis=0), atol=1e-6)
    assert found.scores["charges_std_max"][0] == pytest.approx(found.atom_scores["charges_std"][0].max())
    assert found.scores["quadrupole_std"][0] > 0 and np.isnan(found.scores["quadrupole_std"][3])

    metrics = error_metrics(frames, found)
    errors = np.concatenate([found.further["charges"][n] - frames[n].calc.results["charges"] for n in (0, 1, 3)])
    assert metrics["charges_rmse"] == pytest.approx(np.sqrt(np.mean(errors**2))) and metrics["charges_rmse"] < 0.1
    assert metrics["quadrupole_mae"] < 0.1
    heads = [str(column.header).split("\n") for column in error_table(metrics, "").columns]
    assert ["charges RMSE", "me"] in heads and ["quadrupole MAE", "me*A^2"] in heads
    pairs = label_pairs(frames, found)
    assert pairs["charges"].label.shape == (9, 1) and pairs["quadrupole"].label.shape == (2, 9)

    told = predicted_frame(potential, frames[0], found, 0)
    np.testing.assert_allclose(told.arrays["predicted_charges"][:, 0], found.further["charges"][0])
    assert told.info["predicted_quadrupole"].shape == (9,) and "charges_std" in told.arrays
    told = labelled_frame(potential, frames[0], found, 0)
    np.testing.assert_allclose(told.calc.results["charges"], found.further["charges"][0])
    assert told.calc.results["quadrupole"].shape == (3, 3) and "predicted_charges" not in told.arrays
    atoms = frames[0].copy()
    atoms.calc = potential.calculator()
    np.testing.assert_allclose(atoms.get_charges(), found.further["charges"][0], atol=1e-6)
    assert atoms.calc.results["quadrupole"].shape == (3, 3)
    tested = [frames[0], frames[1], frames[3]]
    for frame in tested:
        frame.info["group"] = "water"
    arrays = _predictions(tested, potential.evaluate(tested))
    assert arrays["charges_true"].shape == (9,) and arrays["charges_structure"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    drawn = structure_parities(arrays | {"structure_group": np.array(["water"] * 3)}, group_looks({"water"}))
    assert len(drawn["charges"].data[0].x) == 9 and len(drawn["quadrupole"].data[0].x) == 18
    assert arrays["quadrupole_pred"].shape == (2, 3, 3) and arrays["quadrupole_structure"].tolist() == [0, 1]
