"""Potentials: what is saved comes back, faces agree with each other and with derivatives, batches change nothing."""

from __future__ import annotations

import itertools
import json
import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.fd import calculate_numerical_forces
from ase.calculators.singlepoint import SinglePointCalculator

import almlip_jax
from almlip_jax import compilation
from almlip_jax.cli.inputs import load_potential
from almlip_jax.dynamics import ExplorationSettings, know
from almlip_jax.dynamics.knowledge import structure_scores
from almlip_jax.ensembles import Ensemble
from almlip_jax.errors import InputError
from almlip_jax.feature_names import atom_feature_names, feature_names
from almlip_jax.features import FeatureRequest, described, unlearned_names
from almlip_jax.models import SharedDensitySettings, build_model
from almlip_jax.models.charge_energy import charge_energy_of, with_charge_energy, without_charge_energy
from almlip_jax.potential import Calibration, Potential, evaluator, novelty_names
from almlip_jax.potential.evaluator import joined, rows_of
from almlip_jax.structures import neighbors
from almlip_jax.structures.remembered import as_text, remember
from almlip_jax.structures.species import SpeciesTable

SETTINGS = SharedDensitySettings(cutoff=3.5, radial=4, l_max=1, channels=4, hidden=(8,))
SPECIES = SpeciesTable((1, 6, 8))
EVERY = FeatureRequest(tuple(feature_names()), columns=64, atoms=tuple(atom_feature_names()))


@pytest.fixture(scope="module")
def potential(committee) -> Potential:
    assert (committee.settings, committee.species) == (SETTINGS, SPECIES)
    return replace(committee, metadata={"made": "by a test"}).with_fitted(calibration=Calibration({"scale": 1.5}))


@pytest.fixture(scope="module")
def structures() -> list[Atoms]:
    frames = [molecule("CH3CH2OH"), molecule("H2O"), bulk("C", "diamond", a=3.6), molecule("CO2")] * 9
    for n, frame in enumerate(frames):
        frame.rattle(0.05, seed=n)
    return frames


def test_save_and_load(potential, structures, tmp_path):
    potential.save(tmp_path / "p")
    back = almlip_jax.load(tmp_path / "p")
    assert back.settings == potential.settings and back.species == potential.species
    assert dict(back.reference_energies) == dict(potential.reference_energies)
    assert back.calibration == {"scale": 1.5} and back.metadata == {"made": "by a test"}
    a, b = potential.evaluate(structures[:4]), back.evaluate(structures[:4])
    np.testing.assert_array_equal(a.energy, b.energy)
    np.testing.assert_array_equal(np.concatenate(a.forces), np.concatenate(b.forces))
    potential.save(tmp_path / "p")  # the same once more
    assert repr(back) == "Potential(shared_density, HCO, cutoff 3.5 A, 3 members)"


def test_a_potential_from_before_charges_had_a_price_still_loads(potential, tmp_path):
    """As it was, with what was fitted to it; saved again it has a place for the price."""
    settings = SETTINGS.model_copy(update={"electronic_state": True, "products": 0})
    params = jax.device_get(jax.jit(Ensemble(build_model(settings, SPECIES), 3).init)(jax.random.key(0)))
    told = Potential(settings, SPECIES, params, potential.reference_energies)
    told.with_fitted(calibration=Calibration({"scale": 1.5})).save(tmp_path / "p")
    text = json.loads((tmp_path / "p" / "potential.json").read_text())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "p" / text["params"], without_charge_energy(params), force=True)
    del text["charge_energy"]
    (tmp_path / "p" / "potential.json").write_text(json.dumps(text))
    back = Potential.load(tmp_path / "p")
    assert back.calibration == {"scale": 1.5} and not charge_energy_of(back.params).any()
    assert (back.settings, dict(back.reference_energies)) == (settings, dict(told.reference_energies))
    jax.tree.map(np.testing.assert_array_equal, back.params, params)
    costly = replace(back, params=with_charge_energy(back.params, np.array([9.0, 1.0])), fitted={})
    for one in (back, costly):
        one.save(tmp_path / "p")
        again = Potential.load(tmp_path / "p")
        np.testing.assert_array_equal(charge_energy_of(again.params), charge_energy_of(one.params))


def test_a_potential_takes_the_place_of_another_whole(potential, tmp_path, monkeypatch):
    """Killed at any moment, the old or the new one is there; what is not ours stays; the old layout loads."""
    params = jax.tree.map(lambda x: x + 1, potential.params)
    other = replace(potential, params=params, metadata={"made": "later"}, fitted={})
    potential.save(tmp_path / "p")
    (tmp_path / "p" / "notes.txt").write_text("mine")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for place in ("almlip_jax.potential.storage.write_text", "almlip_jax.potential.storage._holds"):
        with monkeypatch.context() as patch:
            patch.setattr(place, killed)
            with pytest.raises(KeyboardInterrupt):
                other.save(tmp_path / "p")
        assert Potential.load(tmp_path / "p").metadata == {"made": "by a test"}
    other.save(tmp_path / "p")
    back = Potential.load(tmp_path / "p")
    assert back.metadata == {"made": "later"} and (tmp_path / "p" / "notes.txt").read_text() == "mine"
    np.testing.assert_array_equal(back.params["last"], other.params["last"])
    assert len(list((tmp_path / "p").iterdir())) == 3  # the old parameters are gone
    text = json.loads((tmp_path / "p" / "potential.json").read_text())
    (tmp_path / "p" / "potential.json").write_text(json.dumps(text | {"format": 2}))
    with pytest.raises(InputError, match="of format 2, which an earlier version wrote; train it again"):
        Potential.load(tmp_path / "p")
    potential.save(tmp_path / "p")
    assert Potential.load(tmp_path / "p").metadata == {"made": "by a test"}
    assert len(list((tmp_path / "p").iterdir())) == 3


@pytest.fixture(scope="module")
def knowing(potential, structures) -> Potential:
    return potential.knowing(structures[:8])


def test_two_atoms_in_one_place_are_told(potential):
    """Energy and forces are no numbers there; the structures beside it are what they are."""
    torn = molecule("CH4")
    torn.positions[2] = torn.positions[1]
    with pytest.warns(UserWarning, match=r"structures, frame 1 \(CH4\): two atoms are in one place") as told:
        energies = potential.evaluate([molecule("CH4"), torn, torn]).energy
    assert np.isfinite(energies).tolist() == [True, False, False] and len(told) == 1


def test_a_potential_knows_its_training_set(knowing, structures, tmp_path):
    """Saved and loaded, it grades atoms by an active set of training atoms; scores of structures are the largest."""
    rows = FeatureRequest(("last_layer_gradient",))
    knowing.save(tmp_path / "p")
    back = Potential.load(tmp_path / "p")
    kept = {*novelty_names(), "active_set", "calibration", "training_set"}
    assert set(back.fitted) == kept and back.training_set is not None
    text = json.loads((tmp_path / "p" / "potential.json").read_text())
    assert text["fitted"]["calibration"]["numbers"] == {"scale": 1.5}
    atoms, inside = structures[8].copy(), back.evaluate(structures[:8], features=rows)
    two = [atoms, structures[2]]  # whose neighbours need the room that those of the others needed: no other program
    found = back.evaluate(two)
    features, species = back.atom_features(structures[:8])
    rows_of_two, species_of_two = back.atom_features(two)
    ours, which = rows_of_two[:, : len(atoms)], species_of_two[: len(atoms)]
    entries, active = [], back.active_set
    for z, model in itertools.product(range(3), range(3)):
        training = features[model, species == z].astype(np.float64)
        least = np.sqrt(np.mean(training**2, axis=0)) * 1000 * np.finfo(np.float32).eps  # what rounding leaves
        for row in active.matrix[model, z]:  # an atom, or what stands for no atom
            (places,) = np.nonzero(row)
            stands = len(places) == 1 and row[places[0]] == max(1e-5, least[places[0]])
            assert stands or np.min(np.abs(training - row).max(axis=1)) == 0
        inverse = np.linalg.inv(active.matrix[model, z])
        entries.append(np.where(which == z, np.abs(ours[model] @ inverse).max(axis=1), 0))
    grade = np.sqrt(np.mean(np.sum(np.reshape(entries, (3, 3, -1)), axis=0) ** 2, axis=0))
    np.testing.assert_allclose(found.atom_scores["extrapolation_grade"][0], grade, rtol=1e-3)
    assert 0.9 < max(inside.scores["extrapolation_grade"]) <= 1.002
    for name in (*novelty_names(), "extrapolation_grade"):
        np.testing.assert_array_equal(inside.scores[name], [max(of_atoms) for of_atoms in inside.atom_scores[name]])
        np.testing.assert_array_equal(back.training_set.scores[name], inside.scores[name])
    np.testing.assert_array_equal(back.training_set.rows, inside.features["last_layer_gradient"])
    atoms.calc = back.calculator()
    atoms.get_potential_energy()
    np.testing.assert_allclose(atoms.calc.results["atom_extrapolation_grade"], grade, rtol=1e-3)


def test_explorations_can_do_without_the_training_set(knowing, structures):
    """Where the potential knows it: the same novelty scores, rows for the admission, and scores for thresholds."""
    asking = {
        "monitor": (*novelty_names(), "extrapolation_grade"),
        "admission": {"kind": "farthest"},
        "walkers": [{"temperature": 300}],
    }
    settings = ExplorationSettings.model_validate(asking)
    with_it, without = (know(settings, knowing, given, 3, 10) for given in (structures[:8], None))
    jax.tree.map(np.testing.assert_array_equal, with_it.novelty, without.novelty)
    jax.tree.map(np.testing.assert_array_equal, with_it.context, without.context)
    for score in ("force_std_max", "latent_distance"):
        scores = structure_scores(score, knowing, structures[:8], with_it)
        np.testing.assert_allclose(without.scores[score], scores, rtol=1e-4)
    with pytest.raises(InputError, match="does not know its training set"):
        know(settings, replace(knowing, fitted={}), None, 3)


def test_what_was_fitted_to_other_parameters_is_not_carried(knowing, tmp_path):
    """Neither in memory nor by a folder whose files were mixed; files that are taken out are done without."""
    params = jax.tree.map(lambda x: x + 1, knowing.params)
    with pytest.warns(UserWarning, match=r"fitted to other parameters .*: active_set, calibration, latent"):
        other = replace(knowing, params=params)
    assert not other.fitted and other.force_error(np.ones(2)) is None
    knowing.save(tmp_path / "one")
    other.save(tmp_path / "two")
    assert not list((tmp_path / "two").glob("fitted-*"))
    text, mixed = (json.loads((tmp_path / name / "potential.json").read_text()) for name in ("one", "two"))
    file = next((tmp_path / "one").glob("fitted-active_set-*"))
    mixed["fitted"] = {"active_set": text["fitted"]["active_set"]}
    (tmp_path / "two" / "potential.json").write_text(json.dumps(mixed))
    shutil.copy(file, tmp_path / "two")
    with pytest.raises(InputError, match=r"what was fitted as active_set cannot be used \(it was fitted to other"):
        Potential.load(tmp_path / "two")
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="not a readable npz file.*can do without fitted-active_set"):
        Potential.load(tmp_path / "one")
    file.unlink()
    assert set(Potential.load(tmp_path / "one").novelty) == {"latent_distance"}
    other.save(tmp_path / "one")  # the files of the old one go
    assert not list((tmp_path / "one").glob("fitted-*"))
    for kind, version in (("calibration", 9), ("posterior", 1)):
        mixed["fitted"] = {"calibration": {"kind": kind, "version": version, "params": "0", "numbers": {}}}
        (tmp_path / "two" / "potential.json").write_text(json.dumps(mixed))
        with pytest.raises(InputError, match=f"'{kind}' of format {version} is not known to this version"):
            Potential.load(tmp_path / "two")
    (tmp_path / "two" / "potential.json").write_text(json.dumps(mixed | {"format": 99}))
    with pytest.raises(InputError, match="of a later version"):
        Potential.load(tmp_path / "two")


def test_remembered_structures_are_saved_with_it(potential, structures, tmp_path):
    """And go when another takes its place, or when somebody does not want to pass them on."""
    knows = [frame.copy() for frame in structures[:4]]
    for frame in knows:
        frame.calc = SinglePointCalculator(frame, energy=-1.0 / 3.0, forces=np.full((len(frame), 3), 1.0 / 7.0))
    one = replace(potential, remembered=remember(knows, 9, np.random.default_rng(0)))
    two = replace(potential, remembered=remember(knows[:2], 9, np.random.default_rng(0)))
    for each in (one, two, one):
        each.save(tmp_path / "p")
        back = Potential.load(tmp_path / "p").remembered
        assert as_text(back) == as_text(each.remembered) and len(back) == len(each.remembered)
        assert len(list((tmp_path / "p").iterdir())) == 3
    (sample,) = (tmp_path / "p").glob("remembered-*.extxyz")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / sample.name).write_text("")  # of a saving that was killed: not a foreign folder
    potential.save(tmp_path / "half")
    assert Potential.load(tmp_path / "half").remembered == () and len(list((tmp_path / "half").iterdir())) == 2
    sample.write_text(sample.read_text()[:300])
    with pytest.raises(InputError, match=r"remembered-.*\.extxyz"):
        Potential.load(tmp_path / "p")
    sample.unlink()
    assert Potential.load(tmp_path / "p").remembered == ()


def test_isolated_atoms_have_their_reference_energies(potential, structures):
    """Exactly, for the elements they are known of; of others nothing changes, and forces only by what binds."""
    free = replace(potential, params=jax.tree.map(lambda x: x + np.float32(0.1), potential.params), fitted={})

    def anchored(*binding: float) -> Potential:
        members = len(jax.tree.leaves(free.params)[0])
        constants = free.params["constants"] | {"binding": jnp.tile(jnp.asarray(binding, jnp.float32), (members, 1))}
        return replace(free, isolated=frozenset({1, 8}), params=free.params | {"constants": constants})

    frames = [*(Atoms(symbol) for symbol in "HCO"), structures[0]]
    said, bound, deeper = (one.evaluate(frames) for one in (free, anchored(0, 0, 0), anchored(-2, 0, -3)))
    for found in (bound, deeper):
        np.testing.assert_allclose(found.energy[[0, 2]], [-13.6, -2040.0], rtol=1e-7)
        assert found.scores["energy_std"][0] < 1e-6 and abs(found.energy[1] + 1030) > 1e-3
    own = said.energy[:3] - [-13.6, -1030.0, -2040.0]
    assert abs(own).min() > 1e-2
    assert bound.energy[3] == pytest.approx(said.energy[3] - 6 * own[0] - own[2], abs=1e-3)
    np.testing.assert_allclose(bound.forces[3], said.forces[3], atol=1e-5)
    assert deeper.energy[3] - bound.energy[3] == pytest.approx(6 * -2 - 3, rel=1e-4)
    np.testing.assert_allclose(deeper.forces[3], bound.forces[3], atol=1e-3)
    # half bound, near the cutoff, where the share that is bound changes fast
    h, distance = 1e-2, 0.85 * free.cutoff
    pairs = [Atoms("OH", [[0, 0, 0], [0, 0, distance + n * h]]) for n in (-1, 0, 1)]
    torn = anchored(-2, 0, -3).evaluate(pairs, shape=free.batch_shape(frames))
    assert abs(torn.forces[1][1, 2]) > 1
    assert torn.forces[1][1, 2] == pytest.approx(-(torn.energy[2] - torn.energy[0]) / (2 * h), rel=1e-2)


def test_calibration_turns_the_spread_into_the_expected_error(potential, structures):
    held_out = [frame.copy() for frame in structures[:8]]
    found = potential.evaluate(held_out)
    rng = np.random.default_rng(0)
    for frame, forces, spread in zip(held_out, found.forces, found.atom_scores["force_total"], strict=True):
        noise = rng.normal(size=forces.shape)
        noise *= 2.5 * spread[:, None] / np.linalg.norm(noise, axis=1, keepdims=True)  # errors 2.5 times the spread
        frame.calc = SinglePointCalculator(frame, forces=forces + noise)
    calibrated = potential.calibrated(held_out)
    assert calibrated.calibration["slope"] == pytest.approx(2.5, rel=1e-5)
    assert calibrated.calibration["structures"] == 8
    alone = held_out[0][:1]  # its forces are 0 to every member
    alone.calc = SinglePointCalculator(alone, forces=np.full((1, 3), 1e-7))
    assert potential.calibrated([*held_out, alone]).calibration == calibrated.calibration
    frame = structures[0].copy()
    frame.calc = calibrated.calculator()
    frame.get_forces()
    np.testing.assert_allclose(frame.calc.results["force_error"], 2.5 * frame.calc.results["force_total"], rtol=1e-5)
    assert calibrated.calibrated(held_out[:1]).calibration == {}


def test_damaged_potentials_are_one_sentence(potential, tmp_path):
    with pytest.raises(InputError, match=r"no potential\.json"):
        Potential.load(tmp_path / "nowhere")
    potential.save(tmp_path / "p")
    description = tmp_path / "p" / "potential.json"
    text = description.read_text()
    description.write_text(text[:100])
    with pytest.raises(InputError, match="damaged"):
        Potential.load(tmp_path / "p")
    description.write_text(json.dumps({k: v for k, v in json.loads(text).items() if k != "species"}))
    with pytest.raises(InputError, match="species"):
        Potential.load(tmp_path / "p")
    description.write_text(text)
    for file in next((tmp_path / "p").glob("params-*")).rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    with pytest.raises(InputError, match="cannot be read"):
        Potential.load(tmp_path / "p")
    potential.save(tmp_path / "p")  # the same parameters in the place of the damaged ones
    Potential.load(tmp_path / "p")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="not a potential"):
        potential.save(tmp_path / "other")
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_wrong_content_in_a_potential_is_one_sentence(potential, damages, tmp_path, monkeypatch):
    """Whatever stands in the place of the description or of one file of the parameters, also for commands."""
    monkeypatch.setattr(compilation, "prepare_jax", lambda precision: None)
    potential.save(tmp_path / "p")
    params = next((tmp_path / "p").glob("params-*"))
    for path in [tmp_path / "p" / "potential.json", params / "_METADATA", params / "manifest.ocdbt"]:
        whole = path.read_bytes()
        for damage, content in damages(path).items():
            if damage.split(":")[0] == "versions":  # nothing follows from them
                continue
            path.write_bytes(content)
            try:
                load_potential(tmp_path / "p")
            except InputError as error:
                assert "\n" not in str(error) and str(tmp_path / "p") in str(error), (path, damage)
            else:
                raise AssertionError(f"{damage} in {path.name} was taken")
        path.write_bytes(whole)
    Potential.load(tmp_path / "p")


def test_batches_and_order_change_nothing(potential, structures):
    together = potential.evaluate(structures, features=EVERY)
    order = np.random.default_rng(0).permutation(len(structures))
    shuffled = potential.evaluate([structures[i] for i in order], features=EVERY)
    np.testing.assert_allclose(shuffled.energy, together.energy[order], rtol=1e-6)
    for name, values in together.scores.items():
        np.testing.assert_allclose(shuffled.scores[name], values[order], rtol=2e-3, atol=2e-4)
    for name, values in together.features.items():
        np.testing.assert_allclose(shuffled.features[name], values[order], rtol=1e-3, atol=1e-4)
    for n, frame in enumerate(structures):
        assert together.forces[n].shape == (len(frame), 3)
        assert np.isnan(together.stress[n]).all() == (not frame.pbc.all())


@pytest.mark.parametrize("score", ["latent_distance", "extrapolation_grade"])
def test_selectors_look_at_what_compares_with_the_training_set(potential, structures, score):
    labelled = [frame.copy() for frame in structures]
    pool = [frame.copy() for frame in structures]
    for n, frame in enumerate(pool):
        frame.rattle(0.02 + 0.1 * (n % 3), seed=n)
    settings = ExplorationSettings(monitor=(score,))
    expected = structure_scores(score, potential, pool, know(settings, potential, labelled, seed=0))
    found = almlip_jax.select({"kind": "top_k", "score": score}, potential, pool, labelled, 3)
    best = np.argsort(-expected)[:3]
    for frame, row in zip(found, best, strict=True):
        np.testing.assert_array_equal(frame.positions, pool[row].positions)
        assert frame.info["gain"] == pytest.approx(expected[row], rel=1e-4)
    beyond = {"kind": "threshold", "score": score, "minimum": float(np.sort(expected)[-2])}
    chain = {"kind": "chain", "filters": [beyond], "selector": {"kind": "random"}}
    left = almlip_jax.select(chain, potential, pool, labelled, 3)
    assert {float(frame.positions.sum()) for frame in left} == {float(pool[row].positions.sum()) for row in best[:2]}
    with pytest.raises(InputError, match=f"looks at {score}, which compares with what is labelled"):
        almlip_jax.select({"kind": "top_k", "score": score}, potential, pool, [], 3)


def test_evaluations_part_and_join(potential, structures):
    whole = potential.evaluate(structures, features=EVERY)
    last = len(structures) - 1
    joined_again = joined([rows_of(whole, [last, 1]), rows_of(whole, [0])])
    for part, row in enumerate((last, 1, 0)):
        one, other = vars(rows_of(joined_again, [part])), vars(rows_of(whole, [row]))
        assert jax.tree.structure(one) == jax.tree.structure(other)
        jax.tree.map(np.testing.assert_array_equal, one, other)
    assert len(joined_again.energy) == len(joined_again.forces) == 3


@pytest.mark.parametrize("chunk", [1024, 7])
def test_a_stream_gives_the_numbers_of_the_list(potential, structures, monkeypatch, chunk):
    """To the last bit, frames in groups of one size that chunks split, and shapes that grow on the way."""
    whole = potential.evaluate(structures, features=EVERY)
    order = np.argsort([len(frame) for frame in structures], kind="stable")
    frames = [structures[i] for i in order]
    monkeypatch.setattr("almlip_jax.potential.evaluator._CHUNK_FRAMES", chunk)
    together = potential.evaluate(frames, features=EVERY)
    streamed, start = [], 0
    for batch, found in potential.evaluate_stream(iter(frames), features=EVERY):
        rows = slice(start, start + len(batch))
        assert all(a is b for a, b in zip(batch, frames[rows], strict=True))
        np.testing.assert_array_equal(found.energy, together.energy[rows])
        np.testing.assert_array_equal(found.stress, together.stress[rows])
        for a, b in (
            (found.forces, together.forces),
            (found.atom_scores["force_std"], together.atom_scores["force_std"]),
        ):
            np.testing.assert_array_equal(np.concatenate(a), np.concatenate(b[rows]))
        for a, b in ((found.scores, together.scores), (found.features, together.features)):
            assert set(a) == set(b)
            for name in a:
                np.testing.assert_array_equal(a[name], b[name][rows])
        start += len(batch)
        streamed.append(len(batch))
    assert start == len(frames) and (len(streamed) == 6) == (chunk == 7)
    np.testing.assert_allclose(together.energy, whole.energy[order], rtol=1e-6)
    np.testing.assert_allclose(together.scores["force_std_max"], whole.scores["force_std_max"][order], rtol=1e-3)


def test_rows_of_atoms_average_to_those_of_structures(potential, structures):
    assert set(atom_feature_names()) == {"latent", "last_layer_gradient", "power_spectrum"}
    found = potential.evaluate(structures, features=EVERY)
    for name, rows in found.atom_features.items():
        assert [len(one) for one in rows] == [len(frame) for frame in structures]
        means = np.stack([np.mean(one, axis=0) for one in rows])
        np.testing.assert_allclose(means, found.features[name], rtol=1e-4, atol=1e-5 * np.abs(means).max())
    shuffled = structures[0][[3, 1, 2, 0, *range(4, len(structures[0]))]]
    again = potential.evaluate([shuffled], features=EVERY, shape=potential.batch_shape(structures))
    again = again.atom_features["power_spectrum"][0]
    scale = np.abs(again).max()
    np.testing.assert_allclose(again[0], found.atom_features["power_spectrum"][0][3], atol=1e-4 * scale)


def test_some_features_need_no_potential(potential, structures):
    assert unlearned_names() == ("composition", "power_spectrum")
    request = FeatureRequest(unlearned_names(), columns=64, atoms=("power_spectrum",))
    found, wanted = described(structures, request, 3.5, SPECIES), potential.evaluate(structures, features=EVERY)
    for name, rows in found.features.items():
        np.testing.assert_allclose(rows, wanted.features[name], rtol=1e-5, atol=1e-5 * np.abs(rows).max())
    for ours, theirs in zip(found.atom_features["power_spectrum"], wanted.atom_features["power_spectrum"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    with jax.enable_x64(True):
        rows = described(structures, request, 3.5, SPECIES).features["power_spectrum"]
    assert rows.dtype == np.float64 and not np.array_equal(rows, rows.astype(np.float32))
    with pytest.raises(ValueError, match="'latent' need a potential"):
        described(structures, FeatureRequest(("latent",)), 3.5, SPECIES)


def test_an_evaluation_searches_each_structure_once(potential, structures, monkeypatch):
    searched = []

    def counted(atoms: Atoms, cutoff: float) -> object:
        searched.append(atoms)
        return search(atoms, cutoff)

    search = neighbors._pairs
    monkeypatch.setattr(neighbors, "_pairs", counted)
    waters = [molecule("H2O") for _ in range(3)]
    for frames, features in ((structures, EVERY), (waters, FeatureRequest())):  # the room for molecules needs no search
        searched.clear()
        potential.evaluate(frames, features=features)
        assert [id(one) for one in searched] == [id(one) for one in frames]


def test_features_of_a_prediction_need_no_other_evaluation_and_are_the_same_beside_gradients(
    potential, structures
):
    def evaluations() -> int:
        return sum(program._cache_size() for program in (evaluator._evaluate, evaluator._evaluate_apart))

    plain = potential.evaluate(structures)
    compiled = evaluations()
    asked = FeatureRequest.of(("last_layer_gradient", "latent"), atoms=("latent",))
    found = potential.evaluate(structures, features=asked)
    assert evaluations() == compiled > 0
    np.testing.assert_array_equal(found.energy, plain.energy)
    together = potential.evaluate(structures, features=EVERY)
    assert asked.of_prediction and not EVERY.of_prediction
    for name, rows in found.features.items():
        np.testing.assert_allclose(rows, together.features[name], rtol=1e-4, atol=1e-6 * np.abs(rows).max())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
        found.atom_features["latent"],
        together.atom_features["latent"],
    )


def test_a_stream_looks_no_further_than_a_chunk_and_compiles_once(potential, monkeypatch, count_compilations):
    taken = []

    def frames():
        for seed in range(200):
            frame = molecule("H2O")
            frame.rattle(0.05, seed=seed)
            taken.append(seed)
            yield frame

    monkeypatch.setattr("almlip_jax.potential.evaluator._CHUNK_FRAMES", 32)
    stream = potential.evaluate_stream(frames())
    assert len(next(stream)[0]) == len(taken) == 32
    with count_compilations() as compiled:
        assert sum(len(batch) for batch, _ in stream) == 168
    assert not compiled
    monkeypatch.setattr("almlip_jax.potential.evaluator._CHUNK_ATOMS", 30)
    taken.clear()
    next(potential.evaluate_stream(frames()))
    assert len(taken) == 10
    assert list(potential.evaluate_stream([])) == []


def test_shapes_of_a_stream_grow_by_buckets(potential):
    small, large = molecule("H2O"), molecule("CH3CH2OH")
    crystal = bulk("C", "diamond", a=3.6) * (6, 6, 6)
    first = potential.batch_shape([small])
    assert first.neighbors == 2 and first.atoms >= 256
    second = potential.batch_shape([large], first)
    assert second.neighbors == 8 and potential.batch_shape([small, molecule("CO2")], second) == second
    third = potential.batch_shape([crystal], second)
    assert third.neighbors % 8 == 0 and third.atoms >= 432 and potential.batch_shape([large], third) == third


def test_scores_are_their_definitions(potential, structures):
    frame = structures[0]
    found = potential.evaluate([frame])
    members = [
        Potential(
            SETTINGS, SPECIES, jax.tree.map(lambda x, m=m: x[m : m + 1], potential.params), potential.reference_energies
        )
        for m in range(3)
    ]
    energies = np.array([one.evaluate([frame]).energy[0] for one in members])
    forces = np.array([one.evaluate([frame]).forces[0] for one in members])
    spread = np.sqrt(np.mean(np.sum((forces - forces.mean(axis=0)) ** 2, axis=-1), axis=0))
    np.testing.assert_allclose(found.energy[0], energies.mean(), rtol=1e-7)
    np.testing.assert_allclose(found.atom_scores["force_std"][0], spread, rtol=1e-3)
    expected = {
        "energy_std": energies.std(),
        "energy_std_per_atom": energies.std() / 9,
        "force_std_mean": spread.mean(),
        "force_std_max": spread.max(),
        "force_std_rel": np.max(spread / (np.linalg.norm(forces.mean(axis=0), axis=-1) + 0.1)),
        "max_disagreement": np.ptp(energies),
    }
    for name, value in expected.items():
        assert found.scores[name][0] == pytest.approx(value, rel=2e-2), name


def test_the_calculator_gives_the_derivatives_of_its_energy(potential):
    with jax.enable_x64(True):
        double = Potential(
            SETTINGS,
            SPECIES,
            jax.tree.map(lambda x: x.astype(np.float64), potential.params),
            potential.reference_energies,
        )
        atoms = molecule("CH3CH2OH")
        atoms.rattle(0.05, seed=3)
        atoms.calc = double.calculator()
        forces = atoms.get_forces()
        np.testing.assert_allclose(forces, calculate_numerical_forces(atoms, eps=1e-4), atol=1e-5)
        assert atoms.calc.results["force_std"].shape == (9,) and atoms.calc.results["force_std_max"] > 0
        solid = bulk("C", "diamond", a=3.6)
        solid.rattle(0.05, seed=4)
        solid.calc = double.calculator()
        stress, h = solid.get_stress(voigt=False), 1e-5
        for i, j in [(0, 0), (0, 1)]:
            energies = []
            for sign in (1, -1):
                strain = np.eye(3)
                strain[i, j] += sign * h / 2
                strain[j, i] += sign * h / 2
                moved = solid.copy()
                moved.set_cell(solid.cell.array @ strain, scale_atoms=True)
                moved.calc = solid.calc
                energies.append(moved.get_potential_energy())
            numeric = (energies[0] - energies[1]) / (2 * h) / solid.get_volume()
            assert stress[i, j] == pytest.approx(numeric, rel=1e-4, abs=1e-6)


def test_energy_fn_agrees_with_the_calculator(potential, structures):
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.05, seed=5)
    neighbors, energy = potential.energy_fn(atoms)
    _, absolute = potential.energy_fn(atoms, reference_energies=True)
    positions = jnp.asarray(atoms.positions, jnp.float32)
    of_both = jax.jit(lambda x, near: (*jax.value_and_grad(energy)(x, near), absolute(x, near)))
    value, gradient, total = of_both(positions, neighbors.update(positions[None]))
    found = potential.evaluate([atoms], shape=potential.batch_shape(structures))
    assert float(value) + potential.reference_energy(atoms) == pytest.approx(found.energy[0], abs=1e-3)
    assert float(total) == pytest.approx(found.energy[0], abs=1e-3)
    np.testing.assert_allclose(-gradient, found.forces[0], rtol=1e-3, atol=1e-3)


def test_energy_fn_follows_the_spaces_of_jax_md(potential):
    """Fractional coordinates of an oblique box, atoms in other images, a strain; what a list does not know is NaN."""
    atoms = bulk("C", "diamond", a=3.6)
    atoms.set_cell(atoms.cell.array @ [[1, 0.1, 0], [0, 1, 0.2], [0, 0, 1.05]], scale_atoms=True)
    atoms.rattle(0.1, seed=5)
    first, energy = potential.energy_fn(atoms, fractional_coordinates=True)
    box = jnp.asarray(atoms.cell.array.T, jnp.float32)
    near = first.update(atoms.positions[None], np.asarray(atoms.cell.array)[None])
    of_both = jax.jit(
        jax.value_and_grad(lambda x, eps, listed: energy(x, listed, box=box, perturbation=eps, kT=0.1), argnums=(0, 1))
    )
    placed, crossed = atoms.get_scaled_positions(wrap=False), np.array([[0, 1, 0], [-1, 0, 2]])
    atoms.calc = potential.calculator()
    for fractional in (placed, placed + crossed):
        value, (gradient, by_strain) = of_both(fractional.astype(np.float32), np.eye(3), near)
        assert float(value) + potential.reference_energy(atoms) == pytest.approx(atoms.get_potential_energy(), abs=1e-3)
        np.testing.assert_allclose(-gradient, atoms.get_forces(), atol=1e-5)
        stress = 0.5 * (by_strain + by_strain.T) / atoms.get_volume()
        np.testing.assert_allclose(stress, atoms.get_stress(voigt=False), atol=1e-5)
    apart = placed + [[0, 0, 0], [0.3, 0, 0]]
    overflown = first.replace(largest_count=jnp.asarray(first.capacity + 1))
    for fractional, listed in ((apart, near), (placed, overflown)):
        value, (gradient, by_strain) = of_both(fractional.astype(np.float32), np.eye(3), listed)
        assert np.isnan(value) and np.isnan(gradient).all() and np.isnan(by_strain).all()


def test_energy_fn_of_members_and_what_it_refuses(potential):
    atoms = molecule("H2O")
    neighbors, energies = potential.energy_fn(atoms, members=True, reference_energies=True)
    atoms.calc = potential.calculator()
    found = jax.jit(energies)(atoms.positions, neighbors)
    np.testing.assert_allclose(found, atoms.calc.get_property("member_energy", atoms), rtol=1e-6)
    with pytest.raises(InputError, match=r"positions of 3 atoms are \[3, 3\], not \[2, 3\]"):
        energies(atoms.positions[:2], neighbors)
    with pytest.raises(InputError, match=r"a box is one length, three, or a matrix.*not an array \[2\]"):
        energies(atoms.positions, neighbors, box=[1.0, 2.0])
    with pytest.raises(InputError, match="no atom"):
        potential.energy_fn(Atoms())
    with pytest.raises(InputError, match="of one structure, not of 2"):
        potential.energy_fn([atoms, atoms])
    with pytest.raises(InputError, match="jax_enable_x64"):
        potential.energy_fn(atoms, precision="float64")
    neutral = replace(potential, fitted={}, metadata={"states_met": [[0, 1]]})
    atoms.info["charge"] = 1
    with pytest.warns(UserWarning, match="has charge 1"):
        neutral.energy_fn(atoms)
    with jax.enable_x64(True):  # lists and energies keep to the precision of the potential
        listed, energy = potential.energy_fn(bulk("C", "diamond", a=3.6))
        assert jax.eval_shape(energy, jax.ShapeDtypeStruct((2, 3), np.float64), listed).dtype == np.float32
        assert potential.energy_fn(atoms, precision="float64")[0].built_at.dtype == np.float64


def test_a_calculator_looks_at_charge_and_spin_again(potential):
    """ASE compares positions, cell and numbers; charge and spin stand in ``info``."""
    atoms = molecule("CH3CH2OH")
    atoms.calc = potential.calculator()
    atoms.get_potential_energy()
    assert not atoms.calc.calculation_required(atoms, ["energy"])
    atoms.info["total_charge"] = 1
    assert atoms.calc.calculation_required(atoms, ["energy"])


def test_unknown_elements_and_nothing(potential):
    with pytest.raises(InputError, match="atom 0 is Au"):
        potential.evaluate([Atoms("Au")])
    with pytest.raises(InputError, match="pool.xyz, frame 1: atom 0 is Au"):
        list(potential.evaluate_stream([molecule("H2O"), Atoms("Au")], source="pool.xyz"))
    with pytest.raises(InputError, match="no structure"):
        potential.evaluate([])
