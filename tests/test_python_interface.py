"""The loop in thirty lines of the public interface: it learns, and compiles nothing after its first round."""

from __future__ import annotations

import traceback
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms
from tiny_campaign import SECTIONS

import almlip_jax as al
from almlip_jax.errors import InputError, LabelError
from almlip_jax.selection import Selection, chain, max_det, threshold
from almlip_jax.structures.electronic_state import electronic_state

# Of the sizes of the tiny campaign: programs of its trainings and explorations serve here, too.
WALKERS = {name: value for name, value in SECTIONS["exploration"].items() if name not in ("kind", "thresholds")}
LEARNER = {name: SECTIONS[name] for name in ("model", "ensemble")} | {
    "training": SECTIONS["training"] | {"max_steps": 60}
}
FIRST, BATCH, MOST = 8, 3, 14
"""Structures of the first dataset, of a batch, and of the dataset in the end."""
GATE = {"kind": "fixed", "record": 1e-3, "stop": 1e3}


@pytest.fixture(scope="module")
def rounds(count_compilations):
    """Three rounds on water with a harmonic label source of the test's own: potentials, batches and compilations."""
    start, data, compiled = molecule("H2O"), [], []
    data = [harmonic(frame) for frame in al.rattle(start, FIRST, np.random.default_rng(0), stdev=0.05)]
    learner = al.Learner(MOST, **LEARNER)
    found = []
    for step in range(3):
        with count_compilations() as events:
            potential = learner.fit(data)
            explorer = potential.explorer(WALKERS)
            explored = explorer.run([start], GATE, labelled=data, step=step)
            pool, options = explored.recorded, {"step": step, "room": explorer.room}
            batch = al.select({"kind": "bait"}, potential, pool, data, BATCH, **options)
        data = data + [harmonic(frame) for frame in batch]
        found.append((potential, explored, batch))
        compiled.append(len(events))
    return found, compiled, data


def harmonic(frame: Atoms) -> Atoms:
    """The frame with energy and forces of springs between all atoms."""
    at = frame.positions
    apart = at[:, None] - at[None]
    length = np.linalg.norm(apart, axis=-1) + np.eye(len(at))
    stretch = (length - 1.2) * (1 - np.eye(len(at)))
    labelled = frame.copy()
    forces = -10 * np.sum(stretch[..., None] * apart / length[..., None], axis=1)
    labelled.calc = SinglePointCalculator(labelled, energy=2.5 * np.sum(stretch**2), forces=forces)
    return labelled


def test_later_rounds_compile_nothing(rounds):
    _, compiled, _ = rounds
    assert compiled[1:] == [0, 0]


def test_other_temperatures_and_lengths_of_later_rounds_compile_nothing(rounds, count_compilations):
    """Settings make another explorer, and each potential an ensemble of its own, equal to that of the first round."""
    found, _, data = rounds
    walkers = WALKERS | {"walkers": [{"temperature": 350}, {"temperature": 700}], "steps": WALKERS["steps"] + 20}
    with count_compilations() as compiled:
        explored = found[-1][0].explorer(walkers).run([molecule("H2O")], (1e-2, 1e2), labelled=data, step=3)
    assert not compiled and list(explored.walker_temperature) == [350, 700]


def test_each_round_has_data_and_random_numbers_of_its_own(rounds):
    found, _, data = rounds
    batches = [len(batch) for _, _, batch in found]
    assert all(1 <= size <= BATCH for size in batches) and len(data) == FIRST + sum(batches)
    sizes = [potential.metadata["dataset_size"] for potential, _, _ in found]
    assert sizes == [FIRST, FIRST + batches[0], FIRST + sum(batches[:2])]
    first, second = (explored.recorded[0].positions for _, explored, _ in found[:2])
    assert not np.allclose(first, second)
    assert all("gain" in frame.info for _, _, batch in found for frame in batch)


def test_a_potential_of_the_loop_is_one_like_any_other(rounds, tmp_path):
    found, _, data = rounds
    potential = found[-1][0]
    potential.save(tmp_path / "water")
    loaded = al.load(tmp_path / "water")
    assert [one.get_chemical_formula() for one in loaded.compositions] == ["H2O"]
    again = loaded.evaluate(data[:3])
    np.testing.assert_array_equal(again.energy, potential.evaluate(data[:3]).energy)


def test_the_same_seed_gives_the_same_potential(rounds):
    found, _, data = rounds
    again = al.Learner(MOST, **LEARNER).fit(data[:FIRST]).evaluate(data)
    np.testing.assert_array_equal(again.energy, found[0][0].evaluate(data).energy)


def test_a_potential_notes_the_states_of_its_data(rounds):
    found, _, data = rounds
    assert found[0][0].states_met == {electronic_state(atoms) for atoms in data[:20]} and not found[0][0].states
    ion = data[0].copy()
    ion.info.update(charge=5)
    with pytest.warns(UserWarning, match="has charge 5 and spin 1, but the .* has learned of .* tells none apart"):
        found[0][0].evaluate([ion])


def test_more_structures_than_the_budget_are_refused(rounds):
    with pytest.raises(InputError, match="8 structures are more than the budget of 7"):
        al.Learner(FIRST - 1).fit(rounds[2][:FIRST])


def test_thresholds_from_true_errors_take_frames_that_were_not_trained_on(rounds):
    """A training set says nothing of true errors, and nothing is not taken for something."""
    found, _, data = rounds
    explorer, rule = found[0][0].explorer(WALKERS), {"kind": "conformal", "tolerance": 0.5, "alpha": 0.2}
    with pytest.raises(InputError, match="conformal thresholds follow from labelled structures, and there are none"):
        explorer.run(data[:1], rule, labelled=data)
    held_out = data[FIRST : FIRST + 4]
    wanted = al.thresholds(rule, found[0][0], held_out)
    run = explorer.run(data[:1], rule, labelled=data[:FIRST], calibration=held_out)
    np.testing.assert_allclose(run.thresholds.record, wanted.record, rtol=1e-6)


@pytest.mark.usefixtures("labels_here")
def test_selectors_follow_errors_and_times_where_they_are_given(rounds, tmp_path):
    found, _, data = rounds
    potential, pool, known = found[0][0], data[FIRST:], data[:FIRST]
    assert potential.metadata["validation_forces_rmse"] > 0

    def gains(selector, **more):
        return [frame.info["gain"] for frame in al.select(selector, potential, pool, known, 2, **more)]

    adaptive = {"kind": "adaptive", "alpha": 0.3}
    assert gains(adaptive) != gains(adaptive, errors=[1.0, 1.0, 1.0])  # no progress: uncertainty weighs more
    al.label({"kind": "tblite"}, [molecule("H2O")], store=tmp_path / "labels.db")
    by_cost = {"kind": "cost_aware", "selector": {"kind": "top_k"}}
    assert gains(by_cost) != gains(by_cost, store=tmp_path / "labels.db")


def test_selectors_of_environments_compile_nothing_as_data_grow(rounds, count_compilations):
    potential, pool = rounds[0][0][0], al.rattle(molecule("H2O"), 12, np.random.default_rng(5), stdev=0.1)
    data = [harmonic(frame) for frame in al.rattle(molecule("H2O"), 26, np.random.default_rng(6), stdev=0.05)]
    chain = {"kind": "chain", "filters": [{"kind": "new_environments"}], "selector": {"kind": "cover"}}
    for selector in (chain, {"kind": "environment_entropy", "features": "latent"}):
        first = al.select(selector, potential, pool, data[:FIRST], 3)
        with count_compilations() as compiled:
            second = al.select(selector, potential, pool[1:], data[:26], 3)
        assert not compiled and len(first) and len(second) and second[0].info["gain"] > 0


def test_a_spread_that_is_not_there_is_refused(rounds):
    first = rounds[0][0][0]
    params = jax.tree.map(lambda leaf: leaf[:1], first.params)
    alone = replace(first, params=params, members=al.EnsembleSettings(size=1), fitted={})
    with pytest.raises(InputError, match="one member"):
        al.select({"kind": "top_k"}, alone, rounds[2][FIRST:], rounds[2][:FIRST], 1)


LIKE_A_CONFIG = [
    (lambda _, pool: al.label({"kind": "tblit"}, pool), "source: 'tblit' is not a valid kind; did you mean 'tblite'?"),
    (lambda _, pool: al.label("tblit", pool), "source: 'tblit' is not a valid kind; did you mean 'tblite'?"),
    (lambda _, pool: al.label("tblite", pool, executor="slurn"), "executor: 'slurn' is not a valid kind; did you mean"),
    (
        lambda one, pool: al.select({"kind": "bait", "sgma": 1}, one, pool, pool, 2),
        "selector.sgma: unknown key 'sgma'",
    ),
    (
        lambda one, pool: al.select(al.TrainingSettings(), one, pool, pool, 2),
        "selector: a TrainingSettings is no ",
    ),
    (lambda one, pool: al.select(None, one, pool, pool, 2), "selector: it should be keys and values, not null"),
    (lambda one, pool: al.select("bait", one, pool, pool, 0), "k: it should be a whole number of at least 1, not 0"),
    (lambda one, pool: al.select("bait", one, pool, pool, -1), "k: it should be a whole number of at least 1, not -1"),
    (
        lambda one, pool: al.select("bait", one, pool, pool, 2.0),
        "k: it should be a whole .* not 2.0",
    ),
    (lambda one, pool: al.thresholds("relativ", one, pool), "rule: 'relativ' is not a valid kind; did you mean"),
    (lambda one, pool: al.thresholds(len, one, pool), "rule: the function len .* code of your own .* kind 'user'"),
    (lambda one, pool: al.thresholds("relative", one, pool, score="forse"), "score: 'forse' is not a known score; "),
    (lambda one, pool: al.thresholds("relative", one, pool, score="force_std_mx"), "did you mean 'force_std_max'?"),
    (lambda one, pool: al.thresholds("relative", one, pool, score="dipole_std"), "the model gives no dipole"),
    (lambda one, pool: al.thresholds("relative", one, pool, score="latent_distance"), "fitted to a training set; give"),
    (
        lambda one, pool: al.thresholds({"kind": "conformal", "tolerance": 1}, one, pool, score="dipole_std"),
        "conformal thresholds need a gate score of atoms",
    ),
    (
        lambda one, pool: al.thresholds({"kind": "conformal", "tolerance": 1}, one, [*pool, molecule("H2O")]),
        "conformal thresholds follow from true errors, and structure 4 has no forces",
    ),
    (lambda one, pool: al.know({"wlkers": []}, one, pool, 0), "settings.wlkers: unknown key 'wlkers'; did you mean"),
    (lambda one, _: one.explorer({"stps": 3}), "exploration.stps: unknown key 'stps'; did you mean 'steps'?"),
    (lambda one, _: one.explorer("md"), "exploration: it should be keys and values, not md"),
    (lambda one, pool: one.explorer(WALKERS).run(pool, (1.0, 0.1)), "the stop threshold 0.1 is below the record thr"),
    (lambda one, pool: one.explorer(WALKERS).run(pool, (float("nan"), 1.0)), "the stop threshold 1 is below"),
    (lambda one, pool: one.explorer(WALKERS).run(pool, [1.0, 2.0, 3.0]), "gate: two numbers are needed, record and"),
    (lambda one, pool: one.explorer(WALKERS).run(pool, "conformal"), "gate.tolerance: the key is missing"),
    (lambda one, _: one.evaluate("pool.xyz"), "read_structures reads the file 'pool.xyz'"),
    (lambda one, _: one.evaluate(3), r"structures \(ase.Atoms\) are needed, not an int"),
    (lambda one, pool: one.evaluate([pool[0], pool[0][0]]), "structures: item 1 is an Atom, not a structure"),
    (lambda _, pool: al.label(EMT, pool), "source: the class EMT is no SourceSettings; give .* or an object of it"),
    (lambda _, pool: al.label(lambda: EMT(), pool), "source: a function that labels takes a structure, and this one d"),
    (lambda _, pool: al.label(EMT(), pool, store="labels.db"), "store: nothing tells what an object of your own calc"),
    (lambda _, pool: al.label(EMT(), pool, executor="local"), "executor: an object of your own labels in this process"),
    (lambda _, pool: al.label("tblite", pool, identity="mine"), "identity and charge_and_spin are of objects of your"),
    (lambda one, pool: al.select(max_det(2), one, pool, pool, 2), "k: a selector itself has the number of structures"),
    (
        lambda one, pool: al.select("bait", one, pool, pool, 2, features=["latent"]),
        "features and atom_features are for",
    ),
    (lambda one, pool: al.select(max_det(2), one, pool, pool, features=["latnt"]), "'latnt' is not a .*; did you mean"),
    (lambda one, pool: al.select(lambda pool: pool, one, pool, pool), "selector: it has to be a function of key, pool"),
    (lambda one, pool: al.select(lambda key, *_: key, one, pool, pool), r"a selector gives a Selection \(indices, val"),
    (
        lambda one, pool: al.select(max_det, one, pool, pool),
        "the selector has to be a function of key, pool and labell",
    ),
    (
        lambda one, pool: al.select(lambda _, some, __: float(some.cost[0]), one, pool, pool),
        "the selector has to be a function of key, pool and labelled that jax can compile: ",
    ),
    (
        lambda one, pool: al.select(lambda _, some, __: some.features["full_gradient"], one, pool, pool),
        "the selector looks for 'full_gradient', which candidates do not have; see features",
    ),
    (
        lambda one, pool: al.select(
            lambda *_: Selection(jnp.array([40]), jnp.array([True]), jnp.zeros(1)), one, pool, pool
        ),
        "the selector chose row 40, which is no candidate",
    ),
    (lambda *_: al.Learner(20, model={"sise": "tiny"}), "model.sise: unknown key 'sise'; did you mean 'size'?"),
    (lambda *_: al.Learner(20, ensemble={"size": 0}), "ensemble.size: 0 is out of bounds; it should be at least 1"),
    (lambda *_: al.Learner(20, training={"max_stps": 9}), "training.max_stps: unknown key 'max_stps'; did you mean"),
    (lambda *_: al.Learner(0), "budget: it should be a whole number of at least 1, not 0"),
    (lambda *_: al.Learner(-3), "budget: it should be a whole number of at least 1, not -3"),
    (lambda *_: al.Learner("20"), "budget: it should be a whole number of at least 1, not '20'"),
    (lambda *_: al.Learner(20, precision="float16"), "precision is 'float32' or 'float64', not 'float16'"),
    (lambda *_: al.Learner(20, precision="float64"), r'call prepare_jax\("float64"\) first'),
    (lambda *_: al.prepare_jax("float16"), "precision is 'float32' or 'float64', not 'float16'"),
    (lambda _, pool: al.rattle(pool[0], -3, np.random.default_rng(0), stdev=0.1), "count: it should be .* not -3"),
    (lambda _, pool: al.rattle(pool, 3, np.random.default_rng(0), stdev=0.1), "rattling displaces one structure"),
    (lambda _, pool: al.rattle(pool[0], 3, 0, stdev=0.1), "rattling draws from a generator such as"),
    (lambda _, pool: al.rattle(pool[0], 3, np.random.default_rng(0), stdev=-0.1), "rattling needs stdev >= 0"),
]


@pytest.mark.parametrize(("call", "refusal"), LIKE_A_CONFIG)
def test_what_is_given_is_refused_as_in_a_config(rounds, call, refusal):
    """One sentence with the argument and a hint, and nothing of pydantic."""
    found, _, data = rounds
    with pytest.raises(InputError, match=refusal) as refused:
        call(found[0][0], data[:4])
    assert "\n" not in str(refused.value)
    assert "pydantic" not in "".join(traceback.format_exception(refused.value))


def test_the_name_of_a_kind_and_one_structure_will_do(rounds):
    found, _, data = rounds
    potential, pool, known = found[0][0], data[FIRST:], data[:FIRST]

    def chosen(selector):
        return [frame.info["gain"] for frame in al.select(selector, potential, pool, known, 2)]

    assert chosen("lcmd") == chosen({"kind": "lcmd"})
    assert al.thresholds("relative", potential, data) == al.thresholds({"kind": "relative"}, potential, data)
    assert len(al.select("top_k", potential, pool[0], known[0], 3)) == 1
    assert potential.evaluate(data[0]).energy.shape == (1,)
    np.testing.assert_array_equal(potential.evaluate(data[0]).energy, potential.evaluate(data[:1]).energy)
    assert al.error_metrics(data[0], potential.evaluate(data[0]))["num_structures"] == 1


def test_a_gate_may_be_any_two_numbers_or_what_thresholds_gave(rounds):
    found, _, data = rounds
    explorer = found[0][0].explorer(WALKERS)
    wanted = al.thresholds(GATE, found[0][0], data)
    gates = [GATE, (1e-3, 1e3), [1e-3, 1e3], np.array([1e-3, 1e3]), wanted]
    runs = [explorer.run(data[0], gate) for gate in gates]
    for run in runs:
        assert float(np.max(run.thresholds.record)) == pytest.approx(1e-3)
        assert len(run.recorded) == len(runs[0].recorded)


def test_know_takes_a_dict_of_settings(rounds):
    found, _, data = rounds
    watched = WALKERS | {"monitor": ["latent_distance"]}
    known = al.know(watched, found[0][0], data, 0)
    same = al.know(al.ExplorationSettings.model_validate(watched), found[0][0], data, 0)
    levels = [
        al.thresholds("relative", found[0][0], data, score="latent_distance", knowledge=one) for one in (known, same)
    ]
    assert levels[0] == levels[1] and levels[0].record > 0


def test_selectors_themselves_choose_like_their_settings(rounds):
    found, _, data = rounds
    potential, pool, known = found[0][0], data[FIRST:], data[:FIRST]

    def chosen(selector, *k, **more):
        batch = al.select(selector, potential, pool, known, *k, **more)
        return [(frame.info["gain"], tuple(frame.positions.ravel())) for frame in batch]

    same = chosen(max_det(2), features=["last_layer_gradient"])  # other features as well would round these otherwise
    assert same == chosen({"kind": "max_det"}, 2)
    assert [place for _, place in chosen(max_det(2))] == [place for _, place in same]
    filtered = chain(threshold("force_std_max", 0.0), selector=max_det(2, features="latent"))
    assert chosen(filtered, features=["latent"]) == chosen(max_det(2, features="latent"), features=["latent"])


def test_a_function_of_ones_own_selects(rounds, count_compilations):
    found, _, data = rounds
    potential, pool = found[0][0], data[FIRST:]

    def widest_spread(key, pool, labelled):
        worth = jnp.where(pool.valid, pool.scores["energy_std"], -jnp.inf)
        gain, indices = jax.lax.top_k(worth, 3)
        return Selection(indices, pool.valid[indices], gain)

    batch = al.select(widest_spread, potential, pool, data[:FIRST])
    wanted = np.sort(potential.evaluate(pool).scores["energy_std"])[::-1][:3]
    np.testing.assert_allclose([frame.info["gain"] for frame in batch], wanted, rtol=1e-6)
    with count_compilations() as compiled:
        assert len(al.select(widest_spread, potential, pool[1:], data[:FIRST])) == 3
    assert not compiled


def test_double_precision_is_there_where_jax_has_it():
    with jax.enable_x64(True):
        assert al.Learner(np.int64(20), precision="float64").dtype == np.float64


N2 = [Atoms("N2", [[0.0, 0.0, 0.0], [0.0, 0.0, length]]) for length in (1.0, 1.1, 1.2)]


def by_emt(frame: Atoms) -> Atoms:
    frame.calc = EMT()
    frame.set_constraint(FixAtoms([0]))  # the forces of a label are those of all atoms
    return frame


@pytest.mark.parametrize(
    "source",
    [EMT(), by_emt, lambda _: EMT(), lambda atoms: (by_emt(atoms).get_potential_energy(), EMT().get_forces(atoms))],
    ids=["calculator", "structure", "makes calculators", "numbers"],
)
def test_objects_of_ones_own_label(source):
    labelled = al.label(source, N2)
    for frame, given in zip(labelled, N2, strict=True):
        assert given.calc is None and isinstance(frame.calc, SinglePointCalculator)
        expected = given.copy()
        expected.calc = EMT()
        assert frame.get_potential_energy() == pytest.approx(expected.get_potential_energy(), abs=1e-9)
        np.testing.assert_allclose(frame.get_forces(), expected.get_forces(), atol=1e-9)


def test_labels_of_ones_own_are_kept_under_the_name_that_they_are_given(tmp_path):
    asked = []

    def counted(frame):
        asked.append(len(frame))
        return by_emt(frame)

    for identity, calls in (("EMT of ASE", 3), ("EMT of ASE", 3), ("EMT, second version", 6)):
        labelled = al.label(counted, N2, store=tmp_path / "labels.db", identity=identity)
        assert len(labelled) == 3 and len(asked) == calls
    with al.LabelStore(tmp_path / "labels.db") as store:
        assert store.count_calls() == 6


def unconverged() -> EMT:
    calculator = EMT()
    calculator.converged = False
    return calculator


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (lambda atoms: unconverged(), "has not converged"),
        (lambda atoms: (float("nan"), np.zeros((2, 3))), "the energy nan"),
        (lambda atoms: (0.0, np.full((2, 3), 200.0)), "exceeds max_force"),
        (lambda atoms: (0.0, np.zeros((3, 3))), r"forces of shape \(3, 3\) for 2 atoms"),
        (lambda atoms: 1 / 0, "ZeroDivisionError"),
        (lambda atoms: None, "the function gave NoneType, not a structure with a calculator"),
        (lambda atoms: atoms, "without a calculator"),
        (lambda atoms: by_emt(Atoms("N2", [[0, 0, 0], [0, 0, 1.15]])), "the function gave another structure"),
    ],
)
def test_what_is_no_label_of_ones_own_is_refused(source, reason):
    with pytest.raises(LabelError, match=f"1 of 1 labels failed, first that of structure 0: .*{reason}"):
        al.label(source, N2[0])
    assert al.label(source, N2[0], failed="leave_out") == []


def test_charges_reach_objects_of_ones_own_only_where_they_say_so():
    ion = N2[0].copy()
    ion.info["charge"] = 2
    with pytest.raises(LabelError, match="has charge 2 and multiplicity 1; give charge_and_spin=True"):
        al.label(EMT(), ion)
    (labelled,) = al.label(lambda atoms: (atoms.info["charge"], np.zeros((2, 3))), ion, charge_and_spin=True)
    assert labelled.get_potential_energy() == 2


def test_labels_are_paid_once(tmp_path):
    water = molecule("H2O")
    first = al.label({"kind": "tblite"}, [water], store=tmp_path / "labels.db")
    with al.LabelStore(tmp_path / "labels.db") as store:
        assert store.count_calls() == 1
    again = al.label({"kind": "tblite"}, [water, water], store=tmp_path / "labels.db")
    with al.LabelStore(tmp_path / "labels.db") as store:
        assert store.count_calls() == 1
    assert again[1].get_potential_energy() == first[0].get_potential_energy()


@pytest.mark.usefixtures("labels_here")
def test_a_label_that_fails_is_named_or_left_out():
    water, crashed = molecule("H2O"), molecule("H2O")
    crashed.positions[1] = crashed.positions[0] + 0.05
    with pytest.raises(LabelError, match="1 of 2 labels failed, first that of structure 1"):
        al.label({"kind": "tblite"}, [water, crashed])
    assert len(al.label({"kind": "tblite"}, [crashed, water], failed="leave_out")) == 1


def test_a_label_that_failed_is_tried_again_where_asked(tmp_path) -> None:
    """Without that it stays failed, and says so; labels that are there are not calculated again."""
    water, broken = molecule("H2O"), molecule("H2O")
    broken.positions += 1.0
    calls = []

    def source(atoms):
        calls.append(atoms)
        if len(calls) == 2:
            raise RuntimeError("no program")
        return 0.0, np.zeros((3, 3))

    def labelled(**how):
        return al.label(source, [water, broken], store=tmp_path / "labels.db", identity="mine", **how)

    with pytest.raises(LabelError, match="structure 1: RuntimeError: no program$"):
        labelled()
    with pytest.raises(LabelError, match="it failed in an earlier call, and is tried again with retry=True"):
        labelled()
    assert len(labelled(retry=True)) == 2 and len(calls) == 3
