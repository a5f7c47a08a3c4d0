"""Active sets of potentials: against explicit inverses, derivatives and sums; saved, offered to and renewed."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from pydantic import ValidationError
from typer.testing import CliRunner

from almlip_jax import cli, select_add
from almlip_jax.campaign.rundir import PotentialDirectory
from almlip_jax.campaign.stages import trained
from almlip_jax.dynamics import ExplorationSettings, know
from almlip_jax.dynamics.thresholds import GradeThresholds
from almlip_jax.ensembles import EnsembleSettings
from almlip_jax.errors import InputError
from almlip_jax.fitting import fit_potential
from almlip_jax.learner import Learner
from almlip_jax.models import build_model
from almlip_jax.models.constants import learned_leaves
from almlip_jax.models.mtp import MtpSettings
from almlip_jax.potential import ActiveSetSettings, ActiveStructures, Potential, spanning
from almlip_jax.potential.active_set import Rows, built, empty_set, rows_from
from almlip_jax.potential.mtp_files import save_mtp
from almlip_jax.potential.spanning import rows_of
from almlip_jax.progress import SilentProgress
from almlip_jax.structures.io import read_cfg, write_structures
from almlip_jax.structures.species import SpeciesTable
from almlip_jax.training import TrainingSettings


def numbered(count: int) -> list[Atoms]:
    """Structures that tell which they are by a position."""
    return [Atoms("H", positions=[[float(n), 0.0, 0.0]]) for n in range(count)]


def rows(values: np.ndarray, block: np.ndarray | None = None, blocks: int = 1) -> Rows:
    """One structure for each row."""
    n = values.shape[1]
    where = np.zeros(n, np.int64) if block is None else block
    return Rows(values, where, blocks, np.arange(n), np.zeros(n, np.int64))


def by_hand(values: np.ndarray, matrix: np.ndarray, threshold: float) -> tuple[np.ndarray, list[int]]:
    """Swaps with a fresh inverse each; -1 for rows that stay."""
    matrix, places = matrix.copy(), [-1] * len(matrix)
    while True:
        entries = np.abs(values @ np.linalg.inv(matrix))
        i, j = np.unravel_index(np.argmax(entries), entries.shape)
        if entries[i, j] <= threshold:
            return matrix, places
        matrix[j], places[j] = values[i], int(i)


def test_the_set_is_that_of_explicit_swaps_and_keeps_its_structures():
    """Built from some, offered others: rows, structures and grades are those of swaps with a fresh inverse each."""
    rng = np.random.default_rng(0)
    first, more = rng.normal(size=(1, 30, 4)), 2 * rng.normal(size=(1, 12, 4))
    active = built(rows(first), numbered(30), ActiveSetSettings(), "float64")
    matrix, places = by_hand(first[0], 1e-5 * np.eye(4), 1 + 1e-7)
    np.testing.assert_allclose(active.matrix[0, 0], matrix)
    assert [active.structures[n].positions[0, 0] for n in active.owner[0, 0, :, 0]] == places
    grades = np.abs(first[0] @ np.linalg.inv(matrix)).max(axis=1)
    np.testing.assert_allclose(active.grades(rows(first)), grades)
    assert grades.max() <= 1 + 1e-7 and active.offered == 30 and active.filled == 4

    others = [Atoms("O", positions=[[float(n), 0, 0]]) for n in range(12)]
    after, entered = active.offered_rows(rows(more), others)
    matrix, swapped = by_hand(more[0], matrix, 1.001)
    np.testing.assert_allclose(after.matrix[0, 0], matrix)
    assert entered == sorted({n for n in swapped if n >= 0}) and len(entered) > 0
    for old, new, (structure, atom) in zip(places, swapped, after.owner[0, 0], strict=True):
        stands = after.structures[structure]
        assert (stands.symbols[0], stands.positions[0, 0], atom) == (("H", old, 0) if new < 0 else ("O", new, 0))
    again, entered = after.offered_rows(rows(more), others)  # what has entered, or was refused, is refused again
    assert entered == [] and np.array_equal(again.matrix, after.matrix)


def test_fewer_structures_than_parameters_leave_rows_of_the_start():
    """K < m: rows of epsilon or of the identity stand for what nothing spans, and measure the grade of it."""
    values = np.array([[[2.0, 0, 0, 0], [0, 3.0, 0, 0]]])
    outside = rows(np.array([[[0.0, 0, 0.5, 0]]]))
    for start, size in (("epsilon", 1e-5), ("identity", 1.0)):
        settings = ActiveSetSettings(start=start)
        active = built(rows(values), numbered(2), settings, "float64")
        np.testing.assert_array_equal(active.matrix[0, 0], np.diag([2.0, 3.0, size, size]))
        np.testing.assert_array_equal(active.owner[0, 0], [[0, 0], [1, 0], [-1, -1], [-1, -1]])
        assert active.grades(outside)[0] == pytest.approx(0.5 / size)
    small = built(rows(0.1 * values), numbered(2), ActiveSetSettings(start="identity"), "float64")
    assert small.filled == 0  # rows below those of the identity do not replace them


def test_in_float32_what_rounding_leaves_spans_nothing():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(1, 40, 3))
    values[..., 2] = values[..., 0] * (1 + 1e-7 * rng.normal(size=40))  # the same column but for rounding
    assert built(rows(values), numbered(40), ActiveSetSettings(epsilon=1e-9), "float64").filled == 3
    assert built(rows(values), numbered(40), ActiveSetSettings(epsilon=1e-9), "float32").filled == 2


def test_one_rule_gives_a_set_for_each_species_or_one_for_all():
    """Rows in blocks are as good as whole rows, most of them zero; where species share weights there is one block."""
    rng = np.random.default_rng(2)
    features, species = rng.normal(size=(1, 24, 3)), np.arange(24) % 2
    apart = rows_from(features, None, species, [1] * 24, 2, ActiveSetSettings())
    whole = np.eye(2)[species][:, :, None] * features[0][:, None, :]
    together = by_hand(whole.reshape(24, 6), 1e-5 * np.eye(6), 1 + 1e-7)[0]
    grade = np.abs(whole.reshape(24, 6) @ np.linalg.inv(together)).max(axis=1)
    active = built(apart, numbered(24), ActiveSetSettings(), "float64")
    assert active.matrix.shape == (1, 2, 3, 3)
    np.testing.assert_allclose(active.grades(apart), grade)
    shared = rows_from(features, np.ones((1, 24, 1)), species, [1] * 24, 2, ActiveSetSettings())
    assert shared.blocks == 1
    np.testing.assert_array_equal(shared.values, features)
    coded = rng.normal(size=(1, 24, 2))
    summed = rows_from(features, coded, species, [12, 12], 2, ActiveSetSettings(mode="configuration", per_atom=False))
    expected = np.einsum("aq,af->qf", coded[0, 12:], features[0, 12:]).ravel()
    np.testing.assert_allclose(summed.values[0, 1], expected)
    halved = rows_from(features, coded, species, [12, 12], 2, ActiveSetSettings(mode="configuration"))
    np.testing.assert_allclose(halved.values, summed.values / 12)


# ------------------------------------------------------------------------------------------------------ of a potential


@pytest.fixture(scope="module")
def potential(committee) -> Potential:
    """Two models, over which devices are spread."""
    params = jax.tree.map(lambda x: x[:2], committee.params)
    return replace(committee, params=params, reference_energies={1: 0.0, 6: 0.0, 8: 0.0})


@pytest.fixture(scope="module")
def structures() -> list[Atoms]:
    kinds = [molecule("CH3CH2OH"), molecule("H2O"), bulk("C", "diamond", a=3.6), molecule("CO2")]
    frames = [kinds[n % 4].copy() for n in range(20)]
    for n, frame in enumerate(frames):
        frame.rattle(0.05, seed=n)
    frames[3].info["charge"] = 1
    return frames


@pytest.fixture(scope="module")
def spanned(potential, structures) -> Potential:
    return potential.spanning(structures[:12])


def test_grades_of_predictions_are_those_of_rows(potential, spanned, structures, tmp_path):
    """In float32 on the device and from rows on the host; saved and loaded; of atoms, and of structures."""
    of_structures = potential.spanning(structures[:12], {"mode": "configuration"})
    for graded, settings in (
        (spanned, spanned.active_set.settings),
        (of_structures, of_structures.active_set.settings),
    ):
        graded.save(tmp_path / settings.mode)
        back = Potential.load(tmp_path / settings.mode)
        for name, values in graded.active_set.arrays().items():
            np.testing.assert_array_equal(back.active_set.arrays()[name], values)
        assert back.active_set.structures == graded.active_set.structures and back.active_set.settings == settings
        found, own = back.evaluate(structures), rows_of(graded, structures, settings)
        grades = graded.active_set.grades(own)
        largest = np.zeros(len(structures))
        np.maximum.at(largest, own.structure, grades)
        near = largest < 100
        assert near[:12].all() and largest[:12].max() <= 1 + 2e-7 and largest[12:].max() > 1
        np.testing.assert_allclose(found.scores[settings.score][near], largest[near], rtol=0.01, atol=0.01)
    with pytest.raises(KeyError):
        found.atom_scores["configuration_grade"]


@pytest.mark.slow
def test_rows_by_all_parameters_are_gradients(potential, structures):
    """Of atoms they add up to those of their structure, and move the energy as parameters move."""
    some = structures[:3]
    settings = [ActiveSetSettings(mode=m, parameters="all", per_atom=False) for m in ("neighborhood", "configuration")]
    of_atoms, of_all = (rows_of(potential, some, one) for one in settings)
    for n in range(3):
        added = of_atoms.values[:, of_atoms.structure == n].sum(axis=1)
        np.testing.assert_allclose(added, of_all.values[:, n], rtol=1e-3, atol=1e-4)
    (graph, *_) = potential.graphs(some)
    exact = jax.grad(lambda params: jnp.sum(potential.ensemble.energies(params, graph)))(potential.params)
    joined = np.concatenate([np.reshape(leaf, (2, -1)) for leaf in learned_leaves(exact)], axis=1)
    np.testing.assert_allclose(of_all.values[:, 0], joined, rtol=1e-3, atol=1e-4)
    graded = potential.spanning(some, settings[1])
    assert graded.evaluate(some).scores["configuration_grade"].max() <= 1.01
    watched = ExplorationSettings.model_validate(
        {"walkers": [{"temperature": 300}], "monitor": ["configuration_grade"]}
    )
    with pytest.raises(InputError, match="over all parameters, whose derivatives dynamics do not know"):
        know(watched, graded, some, 0)


def test_an_earlier_set_is_renewed_and_not_built_anew(spanned, structures):
    """Other parameters: the rows of what stood in it are computed again, and give way only where the volume grows."""
    moved = replace(spanned, params=jax.tree.map(lambda x: x * 1.05, spanned.params), fitted={})
    renewed = moved.spanning(structures, earlier=spanned.active_set)
    assert renewed.active_set.offered == len(spanned.active_set.structures) + len(structures)
    inside = renewed.active_set.grades(rows_of(renewed, structures, renewed.active_set.settings))
    assert inside.max() <= 1.001 + 1e-9
    own = rows_of(moved, renewed.active_set.structures, ActiveSetSettings())
    for (model, block, place), structure in np.ndenumerate(renewed.active_set.owner[..., 0]):
        if structure >= 0:
            of_structure, atom = own.structure == structure, renewed.active_set.owner[model, block, place, 1]
            found = renewed.active_set.matrix[model, block, place]
            np.testing.assert_allclose(found, own.values[model, of_structure][atom], rtol=1e-4, atol=1e-5)
    twice = moved.spanning(structures, earlier=spanned.active_set)
    np.testing.assert_array_equal(twice.active_set.matrix, renewed.active_set.matrix)


def test_select_add_gives_what_enters(spanned, structures, tmp_path):
    """From Python and from the command line, which writes for MLIP-2 too: grades become features of the file."""
    far = [molecule("CH3OH"), structures[0].copy(), molecule("H2O"), structures[2].copy()]
    far[0].positions[0] += 0.3
    for frame in far:  # graded before, over another set
        frame.arrays |= {"nbh_grades": np.full(len(frame), 7.0), "extrapolation_grade": np.full(len(frame), 7.0)}
        frame.info["extrapolation_grade"] = 7.0
    batch, grown = select_add(spanned, far)
    own = spanned.evaluate(batch).atom_scores["extrapolation_grade"]
    for frame, of_atoms in zip(batch, own, strict=True):
        np.testing.assert_allclose(frame.arrays["nbh_grades"], of_atoms, rtol=0.02, atol=0.02)
        assert frame.arrays["nbh_grades"].max() == frame.info["MV_grade"]
        assert not {"extrapolation_grade", "configuration_grade"} & {*frame.info, *frame.arrays}
    assert batch[0].info["pool_index"] == 0 and batch[0].info["MV_grade"] > 2
    for frame in batch:  # grades are over the set before, in which those structures lay inside
        assert frame.info["MV_grade"] <= 1.001 or frame.info["pool_index"] not in (1, 3)
    grades = [frame.info["MV_grade"] for frame in batch]
    assert grades == sorted(grades, reverse=True)
    assert grown.evaluate(far).scores["extrapolation_grade"].max() < 1.05
    assert select_add(grown, far)[0] == []
    spanned.save(tmp_path / "p")
    write_structures(tmp_path / "pool.xyz", far)
    asked = ["select-add", str(tmp_path / "p"), str(tmp_path / "pool.xyz"), "--out", str(tmp_path / "add.cfg")]
    result = CliRunner().invoke(cli.app, [*asked, "--save", str(tmp_path / "q"), "--json", str(tmp_path / "a.json")])
    assert result.exit_code == 0, (result.output, result.exception)
    written = read_cfg(tmp_path / "add.cfg", [1, 6, 8])
    assert [frame.info["MV_grade"] for frame in written] == pytest.approx(grades)
    for frame, known in zip(written, batch, strict=True):
        np.testing.assert_allclose(frame.arrays["nbh_grades"], known.arrays["nbh_grades"])
    assert json.loads((tmp_path / "a.json").read_text())["indices"] == [f.info["pool_index"] for f in batch]
    np.testing.assert_array_equal(Potential.load(tmp_path / "q").active_set.matrix, grown.active_set.matrix)
    asked = ["score", str(tmp_path / "p"), str(tmp_path / "pool.xyz"), "--out", str(tmp_path / "graded.cfg")]
    result = CliRunner().invoke(cli.app, asked)
    assert result.exit_code == 0 and re.search(r"extrapolation_grade\W+largest", result.output), result.output
    scored = spanned.evaluate(far).scores["extrapolation_grade"]
    graded = read_cfg(tmp_path / "graded.cfg", [1, 6, 8])
    np.testing.assert_allclose([frame.info["MV_grade"] for frame in graded], scored, rtol=1e-5)
    of_atoms = [frame.arrays["nbh_grades"] for frame in graded]
    np.testing.assert_allclose([grades.max() for grades in of_atoms], scored, rtol=1e-5)
    np.testing.assert_array_equal(of_atoms[0], spanned.evaluate(far).atom_scores["extrapolation_grade"][0])
    with pytest.raises(InputError, match="has no active set"):
        replace(spanned, fitted={}).offer(far)


def test_files_from_elsewhere_have_grades_over_a_training_set(tmp_path):
    """What `calc-grade` does: potential, training set and structures are files of MLIP-2."""
    train, test = silicon(12, 0.1), silicon(5, 0.25, 100)
    with jax.enable_x64(True):
        potential = moment_tensors(6, np.float64)
        graded = potential.spanning(train)
        known = graded.evaluate(test).atom_scores["extrapolation_grade"]
        save_mtp(potential, tmp_path / "si.mtp")
    for name, frames in (("train.cfg", train), ("test.cfg", test)):
        write_structures(tmp_path / name, frames, type_numbers=[14])
    places = [str(tmp_path / name) for name in ("si.mtp", "test.cfg", "train.cfg", "out.cfg")]
    asked = ["score", *places[:2], "--types", "Si", "--train", places[2], "--out", places[3]]
    result = CliRunner().invoke(cli.app, asked)
    assert result.exit_code == 0, (result.output, result.exception)
    for frame, grades in zip(read_cfg(places[3], [14]), known, strict=True):
        near = grades < 1e3
        np.testing.assert_allclose(frame.arrays["nbh_grades"][near], grades[near], rtol=1e-3)
        assert frame.info["MV_grade"] == pytest.approx(frame.arrays["nbh_grades"].max(), rel=1e-6)


# ------------------------------------------------------------------------------------ of moment tensor potentials


@cache
def drawn(settings: MtpSettings) -> dict[str, np.ndarray]:
    with jax.enable_x64(False):
        return jax.device_get(jax.jit(build_model(settings, SpeciesTable((14,))).init)(jax.random.key(1)))


def moment_tensors(level: int, dtype: type) -> Potential:
    """For silicon, with parameters that are the same but for rounding whatever their precision."""
    settings = MtpSettings(level=level, cutoff=5.0, min_dist=1.8, scaling=0.01)
    rng, own = np.random.default_rng(0), dict(drawn(settings))
    for name in ("radial", "moment", "species"):
        own[name] = rng.normal(size=own[name].shape).astype(np.float32)
    params = jax.tree.map(lambda x: np.asarray(x, dtype)[None], own)
    return Potential(settings, SpeciesTable((14,)), params, {14: 0.0}, members=EnsembleSettings(size=1))


def silicon(count: int, stdev: float, first: int = 0) -> list[Atoms]:
    """Strained and rattled cells of diamond."""
    frames = []
    for n in range(first, first + count):
        frame = bulk("Si", "diamond", a=5.43, cubic=True)
        frame.set_cell(frame.cell * (0.94 + 0.12 * (n % 7) / 6), scale_atoms=True)
        frame.rattle(stdev, seed=n)
        frames.append(frame)
    return frames


def test_rows_of_a_moment_tensor_potential_are_its_basis_functions():
    """Energies are rows times linear coefficients, one set serves all, and grades are those of explicit swaps.

    Grades that float32 gives in dynamics differ from those of float64 by next to nothing.
    """
    train, test = silicon(30, 0.15), silicon(20, 0.25, 100)
    with jax.enable_x64(True):
        exact = moment_tensors(8, np.float64).spanning(train)
        active = exact.active_set
        own, rows_of_train = (rows_of(exact, frames, active.settings).values[0] for frames in (test, train))
        linear = np.concatenate([exact.params["moment"][0], exact.params["species"][0]])
        sums = (own @ linear).reshape(len(test), -1).sum(axis=1)
        np.testing.assert_allclose(sums, exact.evaluate(test).energy, rtol=1e-10)
        matrix, _ = by_hand(rows_of_train, 1e-5 * np.eye(10), 1 + 1e-7)
        np.testing.assert_allclose(active.matrix[0, 0], matrix, rtol=1e-12)
        grades = np.abs(own @ np.linalg.inv(matrix)).max(axis=1)
        found = np.concatenate(exact.evaluate(test).atom_scores["extrapolation_grade"])
        np.testing.assert_allclose(found, grades, rtol=1e-9)
    between = (grades > 1) & (grades < 10)
    assert between.sum() > 10
    single = moment_tensors(8, np.float32).with_fitted(active_set=active)
    told = np.concatenate(single.evaluate(test).atom_scores["extrapolation_grade"])
    assert np.abs(told / grades - 1)[between].max() < 1e-3
    atoms = test[0].copy()
    atoms.calc = single.calculator()
    atoms.calc.calculate(atoms, ["extrapolation_grade"])
    np.testing.assert_allclose(atoms.calc.results["atom_extrapolation_grade"], grades[:8], rtol=1e-3)
    assert atoms.calc.results["extrapolation_grade"] == pytest.approx(grades[:8].max(), rel=1e-3)


def labelled(frames: list[Atoms]) -> list[Atoms]:
    """With some energies and forces."""
    for frame in frames:
        frame.calc = SinglePointCalculator(frame, energy=-float(len(frame)), forces=np.zeros((len(frame), 3)))
    return frames


def test_the_first_set_holds_what_is_trained_on_again(tmp_path):
    """Structures that the potential to begin with remembers are seen again: in `train --from` and in campaigns."""
    training = TrainingSettings(projection={"iterations": 1, "starts": 1}, validation_fraction=0.0)
    remembered = labelled(silicon(4, 0.3, 50))
    start = replace(moment_tensors(4, np.float32), remembered=tuple(remembered))
    new, size = labelled(silicon(3, 0.02)), EnsembleSettings(size=1)
    by_command, _ = fit_potential(new, start.settings, size, training, 0, start=start, spanned=ActiveSetSettings())
    learner = Learner(3, training=training, start=start, typical=new)
    folder = PotentialDirectory(tmp_path)
    in_campaign = trained(
        learner,
        new,
        learner.beginning(new, None),
        jax.random.key(0),
        np.random.default_rng(0),
        folder,
        SilentProgress(),
        metadata={},
        spanned=ActiveSetSettings(),
    )
    again = {atoms.positions.tobytes() for atoms in remembered}
    for potential in (by_command, in_campaign):
        stands = {atoms.positions.tobytes() for atoms in potential.active_set.structures}
        assert stands & again and potential.active_set.offered == 7
        assert potential.evaluate(remembered).scores["extrapolation_grade"].max() < 1.01


def test_grades_see_a_species_that_no_structure_has():
    """Also where its isolated atoms have their energies, so that constants of species cancel: as without these.

    Isolated atoms themselves are exact, and lie inside.
    """
    settings, species = MtpSettings(level=6, cutoff=5.0, min_dist=1.8, scaling=0.01), SpeciesTable((9, 14))
    mixed = silicon(2, 0.1)
    for frame in mixed:
        frame.numbers[:2] = 9
    with jax.enable_x64(True):
        for isolated in (frozenset(), frozenset({9, 14}), frozenset({9})):
            model = build_model(settings, species, isolated)
            params = jax.tree.map(lambda x: np.asarray(x)[None], model.init(jax.random.key(0)))
            bare = Potential(
                settings,
                species,
                params,
                {9: -2.0, 14: -1.0},
                members=EnsembleSettings(size=1),
                isolated=isolated,
            )
            potential = bare.spanning(silicon(12, 0.1))
            for frame, grades in zip(mixed, potential.evaluate(mixed).atom_scores["extrapolation_grade"], strict=True):
                assert (grades[frame.numbers == 9] > 9e4).all() and (grades[frame.numbers == 14] < 5e4).all()
            batch, grown = select_add(potential, mixed)
            assert batch and (grown.evaluate(mixed).scores["extrapolation_grade"] < 1.01).all()
            lone = potential.evaluate([Atoms("F"), Atoms("Si")], shape=potential.batch_shape(mixed))
            known = [z in isolated for z in (9, 14)]
            np.testing.assert_array_equal(lone.scores["extrapolation_grade"] < 1e-6, known)


def test_many_rows_are_looked_at_in_parts(monkeypatch):
    """Built, renewed and offered to as if all rows were there at once: nothing lies outside, and owners are right."""
    train, test = silicon(30, 0.15), silicon(20, 0.25, 100)
    with jax.enable_x64(True):
        potential = moment_tensors(8, np.float64)
        whole = potential.spanning(train)
        looked: list[int] = []
        monkeypatch.setattr(spanning, "_FEW", 8)
        monkeypatch.setattr(spanning, "_ENTRIES", 10 * 8 * 7)  # seven structures of eight atoms, ten columns
        monkeypatch.setattr(
            spanning, "rows_of", lambda p, some, given: (looked.append(len(some)), rows_of(p, some, given))[1]
        )
        found = potential.spanning(train)
        assert max(looked) == 7 and looked[:6] == [1, 7, 7, 7, 7, 2]
        offer = found.offer(test)
        renewed = found.spanning(train, earlier=found.active_set).active_set
        own = rows_of(potential, train, ActiveSetSettings())
        for active in (found.active_set, renewed):
            assert active.filled == 10 and active.grades(own).max() <= 1.001
            stands = rows_of(potential, active.structures, active.settings)
            for row, (structure, atom) in zip(active.matrix[0, 0], active.owner[0, 0], strict=True):
                mine = stands.values[0, stands.structure == structure][atom]
                np.testing.assert_allclose(row, mine, rtol=1e-9, atol=1e-12)
        volumes = [np.linalg.slogdet(one.active_set.matrix[0, 0])[1] for one in (found, whole)]
        assert abs(volumes[0] - volumes[1]) < 1
        of_test = rows_of(potential, test, ActiveSetSettings())
        assert offer.active.grades(of_test).max() <= 1.001 + 1e-9 and len(offer.entered) > 2
        entered = {tuple(test[n].positions[0]) for n in offer.entered}
        assert entered <= {tuple(one.positions[0]) for one in offer.active.structures}
        np.testing.assert_allclose(offer.grades[offer.entered[0]], offer.grades.max())


def test_what_is_computed_in_float32_spans_no_more_than_that():
    """Of a potential in float64, as files of MLIP-2 give, where jax computes in float32."""
    crystals = [bulk("Si", "diamond", a=a, cubic=True) for a in (5.3, 5.4, 5.5)]
    active = moment_tensors(8, np.float64).spanning(crystals).active_set
    columns = rows_of(moment_tensors(8, np.float64), crystals, ActiveSetSettings()).values[0]
    large = (np.sqrt(np.mean(columns**2, axis=0)) > 0.5) & (active.owner[0, 0, :, 0] < 0)
    assert large.any()
    size = np.diagonal(active.matrix[0, 0])[large]
    np.testing.assert_allclose(size, 1.19e-4 * np.sqrt(np.mean(columns**2, axis=0))[large], rtol=0.01)


def test_an_element_that_comes_later_is_rounded_too():
    """Of a set that is renewed, rows of the start of an element that it lacks know the size of their columns."""
    first, later = rows(np.ones((1, 4, 2)), np.zeros(4, int), 2), rows(7 * np.ones((1, 4, 2)), np.ones(4, int), 2)
    alone = empty_set([first], ActiveSetSettings(), "float32").matrix
    both = empty_set([first, later], ActiveSetSettings(), "float32").matrix
    np.testing.assert_allclose(np.diagonal(alone[0, 1]), 1e-5)
    np.testing.assert_allclose(np.diagonal(both[0, 1]), 7 * np.diagonal(alone[0, 0]))


def test_walkers_stop_where_the_grade_breaks():
    """In the loop the grade is that of the frames, one member is enough, and thresholds are those of MLIP-2."""
    potential = moment_tensors(4, np.float32).spanning(silicon(12, 0.05))
    score = potential.active_set.settings.score
    asked = {
        "walkers": [{"temperature": 3000, "count": 2}],
        "steps": 200,
        "chunk": 100,
        "timestep": 2.0,
        "trace_every": 1,
        "record_every": 1,
        "gate": {"score": score},
    }
    rule = {"kind": "grade", "gamma_select": 1.5, "gamma_break": 4.0}
    found = potential.explorer(asked).run(silicon(2, 0.02), rule)
    assert len(found.recorded) > 2 and "STOPPED" in {status.name for status in found.status}
    again = potential.evaluate(found.recorded).scores[score]
    np.testing.assert_allclose([frame.info[score] for frame in found.recorded], again, rtol=2e-3)
    assert again.min() > 1.49
    trace = found.scores[score]
    for walker, status in enumerate(found.status):
        seen = trace[:, walker][np.isfinite(trace[:, walker])]
        assert (seen[:-1] <= 4.0).all() and (seen[-1] > 4.0) == (status.name == "STOPPED")


@pytest.mark.slow
def test_structures_have_grades_in_the_loop_too():
    potential = moment_tensors(4, np.float32).spanning(silicon(12, 0.05), {"mode": "configuration"})
    asked = {
        "walkers": [{"temperature": 300, "count": 2}],
        "steps": 200,
        "chunk": 100,
        "timestep": 2.0,
        "trace_every": 1,
        "record_every": 1,
        "gate": {"score": "configuration_grade"},
    }
    rule = {"kind": "grade", "gamma_select": 1.0, "gamma_break": 50.0}
    found = potential.explorer(asked).run(silicon(2, 0.02), rule)
    again = potential.evaluate(found.recorded).scores["configuration_grade"]
    assert len(again) > 2 and again.min() > 0.999
    np.testing.assert_allclose([frame.info["configuration_grade"] for frame in found.recorded], again, rtol=1e-4)


def test_thresholds_of_grades_ask_for_a_grade():
    rule = GradeThresholds(gamma_select=2, gamma_break=10)
    rule.check("extrapolation_grade")
    assert rule.resolve(lambda: np.zeros(0), lambda _: None).levels == (2, 10)
    with pytest.raises(ValueError, match="set the score of the gate to extrapolation_grade or configuration_grade"):
        rule.check("force_std_max")
    with pytest.raises(ValidationError, match="gamma_break 1 is below gamma_select 2"):
        GradeThresholds(gamma_select=2, gamma_break=1)


def test_damaged_sets_are_one_sentence(spanned):
    arrays, numbers = dict(spanned.active_set.arrays()), spanned.active_set.numbers()
    for name, wrong in (("owner", arrays["owner"] + 10**6), ("matrix", arrays["matrix"][..., :-1])):
        with pytest.raises(ValueError, match="not there|do not fit"):
            ActiveStructures.restored({**arrays, name: wrong}, numbers)
    assert empty_set([rows(np.ones((1, 1, 2)))], ActiveSetSettings(), "float64").filled == 0


def test_no_structures_span_nothing_and_change_nothing(spanned):
    potential = spanned
    with pytest.raises(InputError, match="there is no structure in the training set"):
        potential.spanning([])
    with pytest.raises(InputError, match="there is no structure in the training set"):
        potential.spanning([], earlier=potential.active_set)
    offered = potential.offer([])
    assert offered.active is potential.active_set and offered.entered == () and offered.grades.shape == (0,)
