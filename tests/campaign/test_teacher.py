"""Campaigns with a teacher: what it teaches is worth labels, costs none, and survives kills; what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.morse import MorsePotential
from ase.calculators.singlepoint import SinglePointCalculator
from tiny_campaign import SECTIONS, Killed, KillingProgress, result_of, run_or_resume, tiny_config

from almlip_jax import label
from almlip_jax.campaign.checks import check_campaign
from almlip_jax.campaign.continuity import check_settings
from almlip_jax.campaign.report import write_report
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.state import Stage, read_state
from almlip_jax.campaign.status import campaign_status
from almlip_jax.campaign.teaching import learner_of_teacher
from almlip_jax.errors import InputError
from almlip_jax.files import read_csv
from almlip_jax.learner import Learner
from almlip_jax.models import LinearLast
from almlip_jax.models.anchored import binding_of
from almlip_jax.oracles import LabelStore
from almlip_jax.oracles.base import SourceSettings
from almlip_jax.origins import Taught
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures
from almlip_jax.structures.remembered import bare
from almlip_jax.structures.species import SpeciesTable

TEACHER: dict[str, Any] = {
    "source": {"kind": "tblite", "method": "GFN1-xTB"},
    "executor": {"kind": "local", "workers": 1},
    "temperatures": [300, 600],
    "frames": 40,
    "every": 4,
    "equilibration": 8,
    "training": {"max_steps": 1000},
    "tuning": {"max_steps": 100},
}
COUNT = 4
MEAN = {"kind": "mean", "of": [{"kind": "tblite", "method": "GFN1-xTB"}, {"kind": "tblite"}]}
DELTA = {"kind": "delta", "base": {"size": "tiny"}, "correction": {"size": "tiny"}}
SECTIONS_WITH: dict[str, Any] = {
    "teacher": TEACHER,
    "initial": {"rattle": None, "md": (), "from_teacher": {"count": COUNT}},
    "stopping": {"max_rounds": 1},
}
FILTERED = {
    "batch": 3,
    "selector": {
        "kind": "chain",
        "filters": [{"kind": "agreement", "forces": 1e-6}],
        "selector": {"kind": "max_det"},
    },
}


@dataclass(frozen=True)
class Nameless(LinearLast):
    """A model that does not say what its last layer is; nobody evaluates it."""

    species: SpeciesTable
    cutoff: float

    num_species = 2

    def unused(self, *given: Any) -> Any:
        raise NotImplementedError

    geometry = init = survey = standardise = with_species = apply = last_scale = unused


def taught(folder: Path, run_dir: Path, progress: Any = None, **changes: Any) -> Any:
    return run_or_resume(folder, run_dir, progress, **{**SECTIONS_WITH, **changes})


def results(run_dir: Path) -> dict[str, Any]:
    """What must not depend on interruptions; seconds do."""
    found = result_of(run_dir)
    for row in found["metrics"]:
        del row["label_seconds"], row["teacher_seconds"]
    frames = read_structures(RunDirectory(run_dir).teacher.frames)
    return found | {"teacher": [(a.positions.tobytes(), a.get_potential_energy()) for a in frames]}


@pytest.fixture(scope="module", autouse=True)
def compile_once(cache: Path, compiled_in: Any) -> Iterator[None]:
    """Every compiled program is kept, and reports are left out."""
    with compiled_in(cache), pytest.MonkeyPatch.context() as patch:
        patch.setattr("almlip_jax.campaign.loop.write_report", lambda run_dir, drawn: run_dir)
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory, compile_once: None) -> Path:
    """A folder with a campaign that has a teacher, ``taught``, whose batch is what it differs from the teacher in."""
    folder = tmp_path_factory.mktemp("taught")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SourceSettings, "in_process", True)  # as `labels_here` has it for a test
        taught(folder, folder / "taught", selection=FILTERED)
    return folder


@pytest.mark.usefixtures("labels_here")
def test_a_teacher_is_worth_labels(study: Path) -> None:
    """Four labels and a hundred steps against as many labels and the three hundred steps of the tiny campaign.

    The two methods differ by 20 eV for a molecule, which no network has to learn.
    """
    first = {"rattle": {"count": COUNT, "stdev": 0.05}, "md": ()}
    # ends with its first errors, and has room for as many labels as the tiny campaign, whose programs serve again
    ending = {"max_rounds": 4, "max_labels": 10, "target_error": {"value": 1e3}}
    alone = {"initial": first, "stopping": ending}
    run_or_resume(study, study / "alone", **alone)
    first = [read_csv(study / name / "metrics.csv")[0] for name in ("taught", "alone")]
    for group in ("300K", "600K"):
        assert first[0][f"forces_rmse_{group}"] < 0.5 * first[1][f"forces_rmse_{group}"]
        assert first[0][f"energy_rmse_{group}"] < 0.05  # eV/atom
    frames = read_structures(RunDirectory(study / "taught").teacher.frames)
    test = read_structures(RunDirectory(study / "taught").test)
    apart = np.mean([a.get_potential_energy() for a in frames]) - np.mean([a.get_potential_energy() for a in test])
    assert abs(apart) > 10


def test_labels_of_the_teacher_count_as_none(study: Path) -> None:
    run = RunDirectory(study / "taught")
    with LabelStore(run.labels, readonly=True) as store:
        calls = {name: entry["calls"] for name, entry in store.summary().items()}
    assert calls == {"initial": COUNT, "train": 3, "test": 1 + 2 * (5 + 20)}
    with LabelStore(run.teacher_labels, readonly=True) as store:
        of_teacher = {name: entry["calls"] for name, entry in store.summary().items()}
    assert of_teacher["teacher"] == 1 + 2 * (8 + 20 * 4) and of_teacher["agreement"] > 0
    assert len(read_structures(run.teacher.frames)) == 40
    last = read_csv(run.metrics)[-1]
    assert last["labels"] == COUNT + 3 and last["teacher_calls"] == sum(of_teacher.values())
    assert last["teacher_seconds"] > 0 and last["label_seconds"] > 0
    costs = campaign_status(run.path)["costs"]
    assert costs["teacher_calls"] == last["teacher_calls"] and set(costs) == {
        "label_seconds",
        "teacher_calls",
        "teacher_seconds",
    }
    page = write_report(run.path).read_text()
    assert "dynamics for the teacher" in page and "agreement, by the teacher" in page


def test_first_labels_are_frames_of_the_teacher(study: Path) -> None:
    run = RunDirectory(study / "taught")
    frames = {atoms.positions.tobytes() for atoms in read_structures(run.teacher.frames)}
    first = read_structures(run.round(0).dataset)
    assert len(first) == COUNT and {atoms.positions.tobytes() for atoms in first} <= frames
    assert {atoms.info["origin"] for atoms in first} == {"teacher"}


@pytest.mark.slow
@pytest.mark.parametrize("stage, within", [("teacher", True), ("pretrain", True), ("initial set", False)])
def test_a_kill_changes_nothing(study: Path, tmp_path: Path, stage: str, within: bool) -> None:
    with pytest.raises(Killed):
        taught(study, tmp_path / "run", KillingProgress(None, stage, within=within), selection=FILTERED)
    reached = {"teacher": Stage.TEACHER, "pretrain": Stage.PRETRAIN, "initial set": Stage.INITIAL}
    assert read_state(RunDirectory(tmp_path / "run")).stage is reached[stage]
    taught(study, tmp_path / "run", selection=FILTERED)
    assert results(tmp_path / "run") == results(study / "taught")


@pytest.mark.slow
def test_a_kill_while_candidates_are_compared_changes_nothing(study: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        taught(study, tmp_path / "run", KillingProgress(0, "teacher", within=True), selection=FILTERED)
    assert read_state(RunDirectory(tmp_path / "run")).stage is Stage.SELECT
    taught(study, tmp_path / "run", selection=FILTERED)
    assert results(tmp_path / "run") == results(study / "taught")


CORRECTION = {"cutoff": 3.0, "radial": 4, "l_max": 1, "channels": 4, "hidden": [8]}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{"replay": 3.0, "replay_share": 0.8}, {"correction": CORRECTION}], ids=["replay", "correction"]
)
def test_other_ways_to_learn_from_both_sources(study: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    """The teacher's frames again, under a last layer of their own: a large weight does not spoil what labels say.

    Or a correction of what it taught, which stays as it was.  A campaign that was killed ends as one that was not.
    """
    asked = {"teacher": {**TEACHER, **changes}, "stopping": {"max_rounds": 0}}
    taught(study, tmp_path / "run", **asked)
    row, without = (read_csv(folder / "metrics.csv")[0] for folder in (tmp_path / "run", study / "taught"))
    assert row["energy_rmse_300K"] < 0.1
    assert row["forces_rmse_300K"] < 1.5 * without["forces_rmse_300K"]
    with pytest.raises(Killed):
        taught(study, tmp_path / "killed", KillingProgress(0, "train", within=True), **asked)
    taught(study, tmp_path / "killed", **asked)
    assert results(tmp_path / "killed") == results(tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    first, last = Potential.load(run.teacher.potential), Potential.load(run.round(0).potential)
    assert (last.settings.kind == "delta") is ("correction" in changes)
    if "correction" in changes:
        held = zip(jax.tree.leaves(last.params["constants"]["base"]), jax.tree.leaves(first.params), strict=True)
        assert all(np.array_equal(now, before) for now, before in held)


@pytest.mark.slow
def test_a_potential_of_the_oracle_learns_from_a_teacher(study: Path, reference: Path, tmp_path: Path) -> None:
    """It goes on from its parameters, and tunings see what it remembers; a campaign that was killed ends the same."""
    before = Potential.load(RunDirectory(reference / "run").round(2).potential)
    asked = {
        "teacher": {**TEACHER, "replay": 0.5, "training": {"max_steps": 1, "learning_rate": 1e-6}},
        "initial": {**SECTIONS_WITH["initial"], "potential": str(RunDirectory(reference / "run").round(2).potential)},
        "stopping": {"max_rounds": 0},
    }
    taught(study, tmp_path / "run", **asked)
    run = RunDirectory(tmp_path / "run")
    pretrained, tuned = Potential.load(run.teacher.potential), Potential.load(run.round(0).potential)
    for begun, made in zip(jax.tree.leaves(before.params), jax.tree.leaves(pretrained.params), strict=True):
        np.testing.assert_allclose(made, begun, atol=1e-4)
    assert len(tuned.remembered) == len(before.remembered) + COUNT - 1, "one of the new ones validates"
    seen = f"{len(before.remembered)} structures that the potential remembers are trained on again"
    assert seen in run.log.read_text()
    row = read_csv(run.metrics)[0]
    assert row["labels"] == COUNT and row["energy_rmse_300K"] < 0.1, "levels of both are those of the oracle"
    taught(study, tmp_path / "longer", **{**asked, "teacher": TEACHER})
    row, without = (read_csv(folder / "metrics.csv")[0] for folder in (tmp_path / "longer", study / "taught"))
    assert row["forces_rmse_300K"] < 1.2 * without["forces_rmse_300K"], "it learns as much as from nothing"
    for place in ((None, "pretrain"), (0, "train")):
        killed = tmp_path / f"killed-{place[1]}"
        with pytest.raises(Killed):
            taught(study, killed, KillingProgress(*place, within=True), **asked)
        taught(study, killed, **asked)
        assert results(killed) == results(run.path)


@pytest.mark.slow
def test_a_driver_gives_frames_and_the_teacher_their_labels(study: Path, tmp_path: Path) -> None:
    """The teacher is called for the frames alone; dynamics, labels and what follows are the same after kills."""
    driven = {**TEACHER, "driver": {"kind": "tblite", "method": "IPEA1-xTB"}}
    taught(study, tmp_path / "driven", teacher=driven)
    run = RunDirectory(tmp_path / "driven")
    calls = {}
    for path in (run.teacher_labels, run.driver_labels):
        with LabelStore(path, readonly=True) as store:
            calls[path.name] = {name: entry["calls"] for name, entry in store.summary().items()}
    assert calls == {"teacher.db": {"frames": 40}, "driver.db": {"teacher": 1 + 2 * (8 + 20 * 4)}}
    last = read_csv(run.metrics)[-1]
    assert last["teacher_calls"] == 40 + 1 + 2 * (8 + 20 * 4)
    frames = read_structures(run.teacher.frames)
    assert {atoms.info["origin"] for atoms in frames} == {"teacher-300K", "teacher-600K"}
    again = label(TEACHER["source"], [bare(atoms) for atoms in frames])
    for atoms, known in zip(frames, again, strict=True):
        np.testing.assert_allclose(atoms.get_forces(), known.get_forces(), atol=1e-6)
    page = write_report(run.path).read_text()
    assert "dynamics for the teacher" in page and "frames, by the teacher" in page
    for stage in ("teacher", "frames"):
        killed = tmp_path / f"killed-{stage}"
        with pytest.raises(Killed):
            taught(study, killed, KillingProgress(None, stage, within=True), teacher=driven)
        taught(study, killed, teacher=driven)
        assert results(killed) == results(run.path)


@pytest.mark.slow
def test_nothing_is_bought_that_the_teacher_agrees_on(study: Path, tmp_path: Path) -> None:
    filters = [{"kind": "agreement", "forces": 100.0, "energy": 100.0}]
    chain = {"kind": "chain", "filters": filters, "selector": {"kind": "max_det"}}
    outcome = taught(study, tmp_path / "run", selection={"selector": chain})
    assert outcome.labels == COUNT and read_csv(tmp_path / "run" / "metrics.csv")[0]["selected"] == 0


def test_what_could_not_serve_is_refused(tmp_path: Path) -> None:
    saved = {"kind": "potential", "path": str(tmp_path / "nowhere")}
    for changes, why in (
        ({"teacher": None}, r"from_teacher takes frames of a teacher"),
        ({"teacher": {**TEACHER, "source": {"kind": "tblite"}}}, r"teacher\.source is the oracle itself"),
        ({"teacher": {**TEACHER, "driver": {"kind": "tblite"}}}, r"teacher\.driver is the oracle itself"),
        ({"teacher": {**TEACHER, "driver": {"kind": "file", "path": "labels.xyz"}}}, r"teacher\.driver of kind 'file'"),
        ({"teacher": {**TEACHER, "source": {"kind": "file", "path": "labels.xyz"}}}, r"cannot drive dynamics"),
        ({"training": {"warm_steps": 10, "warm_start": True}}, r"leave warm_steps out"),
        (
            {"initial": {"potential": str(tmp_path)}, "teacher": {**TEACHER, "correction": {}}},
            r"what initial\.potential knows of the oracle; leave teacher\.correction out, or the potential",
        ),
        ({"teacher": {**TEACHER, "replay_share": 0.7}}, r"give replay a weight"),
        ({"teacher": {**TEACHER, "replay": 0.7, "correction": {}}}, r"leave replay out, or correction"),
        ({"teacher": {**TEACHER, "correction": {}}, "ensemble": {"size": 2, "heads": 2}}, r"needs plain members"),
        (
            {"teacher": {**TEACHER, "correction": {"dipole": True}}},
            r"teacher.correction: a correction is one of energies; take models that do not give dipole",
        ),
        (
            {"teacher": {**TEACHER, "correction": {"kind": "user", "function": "test_teacher:Nameless"}}},
            r"teacher\.correction: .*'test_teacher:Nameless' has no last layer that could begin at zero",
        ),
        ({"teacher": {**TEACHER, "correction": {"repulsion": True}}}, r"teacher.correction: the repulsion of nuclei"),
        (
            {"teacher": {**TEACHER, "correction": {}}, "ensemble": {"size": 2, "variants": [{}, {}]}},
            r"one architecture",
        ),
        ({"teacher": None, "initial": SECTIONS["initial"], "model": DELTA}, r"corrects a trained potential"),
        ({"teacher": {**TEACHER, "replay": 0.5}, "ensemble": {"size": 2, "heads": 2}}, r"leave these out, or"),
        (
            {"teacher": None, "initial": SECTIONS["initial"], "selection": FILTERED},
            r"compares candidates with a teacher",
        ),
        ({"initial": {"from_teacher": {"selector": FILTERED["selector"]}}}, r"has just learned; leave the filter out"),
        ({"teacher": {**TEACHER, "driver": TEACHER["source"]}}, r"teacher\.driver is teacher\.source itself"),
        ({"teacher": {**TEACHER, "source": MEAN}}, r"teacher\.source asks the oracle itself for a part of its mean"),
        ({"initial": {"from_teacher": {"count": 41}}}, r"count 41 is more than teacher\.frames 40"),
        ({"system": {"structures": ()}}, r"names no start geometry"),
        ({"teacher": {**TEACHER, "source": saved}}, r"nowhere is not a potential"),
        ({"teacher": {**TEACHER, "driver": saved}}, r"nowhere is not a potential"),
    ):
        with pytest.raises(ValueError, match=why):
            taught(tmp_path, tmp_path / "run", **changes)
        assert not (tmp_path / "run" / "labels.db").exists()


def test_a_length_that_no_training_has_is_told_of(tmp_path: Path) -> None:
    """Trainings of a campaign with a teacher have lengths of their own."""
    told: list[str] = []
    check_campaign(tiny_config(tmp_path, **{**SECTIONS_WITH, "training": {"max_steps": 77}}), told.append)
    (sentence,) = told
    assert sentence.startswith("training.max_steps 77 counts for nothing with a teacher") and " 1000" in sentence
    check_campaign(tiny_config(tmp_path, **{**SECTIONS_WITH, "training": {"max_steps": 100}}), told.append)
    assert len(told) == 1


def test_another_teacher_is_refused(study: Path) -> None:
    run = RunDirectory(study / "taught")
    for changes, key in (
        ({"source": {"kind": "tblite", "method": "IPEA1-xTB"}}, r"teacher\.source"),
        ({"frames": 41}, r"teacher\.frames"),
        ({"driver": {"kind": "tblite", "method": "IPEA1-xTB"}}, r"teacher\.driver"),
    ):
        with pytest.raises(InputError, match=f"the teacher differs from .*{key}"):
            taught(study, run.path, teacher={**TEACHER, **changes}, selection=FILTERED)
    with pytest.raises(InputError, match="the teacher differs"):
        config = tiny_config(study, **{**SECTIONS_WITH, "initial": SECTIONS["initial"], "teacher": None})
        check_settings(
            config.model_copy(update={"initial": tiny_config(study, **SECTIONS_WITH).initial}),
            run,
            read_state(run),
            accept=False,
        )
    begun = read_state(run).model_copy(update={"stage": Stage.TEACHER})  # with more frames, nothing is learned yet
    larger = tiny_config(study, **{**SECTIONS_WITH, "teacher": {**TEACHER, "frames": 41}, "selection": FILTERED})
    assert check_settings(larger, run, begun, accept=False) is None
    changed = {**TEACHER, "tuning": {"max_steps": 50}, "executor": {"kind": "local", "workers": 2}}
    assert taught(study, run.path, teacher=changed, selection=FILTERED).finished


@pytest.mark.slow
@pytest.mark.parametrize("warm", [False, True])
def test_rounds_begin_with_what_was_taught_or_the_round_before(study: Path, tmp_path: Path, warm: bool) -> None:
    """References are fitted anew to the labels, or kept; one step hardly changes the parameters it begins with."""
    tuning = {"max_steps": 1, "learning_rate": 1e-6}
    training = {"warm_start": warm, "final_steps": 1}
    taught(study, tmp_path / "run", teacher={**TEACHER, "tuning": tuning}, training=training)
    run = RunDirectory(tmp_path / "run")
    pretrained, first, second, final = (
        Potential.load(folder.potential) for folder in (run.teacher, run.round(0), run.round(1), run.final)
    )
    assert (first.reference_energies == second.reference_energies) is warm
    assert (second.reference_energies == final.reference_energies) is True
    for one in (first, second, final):
        for begun, made in zip(jax.tree.leaves(pretrained.params), jax.tree.leaves(one.params), strict=True):
            np.testing.assert_allclose(made, begun, atol=1e-4)


def of_emt(atoms: Atoms, seed: int, calculator: Any = EMT) -> Atoms:
    atoms.rattle(0.05, seed=seed)
    atoms.calc = calculator()
    results = {"energy": atoms.get_potential_energy(), "forces": atoms.get_forces()}
    atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


@pytest.mark.slow
def test_elements_that_a_teacher_never_met_are_fresh() -> None:
    """Its frames say nothing of how features of their atoms are scaled: errors were 20 times what they are now."""
    morse = partial(MorsePotential, epsilon=0.35, r0=2.8, rho0=4.0)
    frames = [of_emt(bulk("Cu", cubic=True), n, morse) for n in range(12)]
    data = [of_emt(molecule("N2"), n) for n in range(8)] + [of_emt(bulk("Cu", cubic=True), 50 + n) for n in range(5)]
    test, species = [of_emt(molecule("N2"), 100 + n) for n in range(8)], SpeciesTable((7, 29))
    asked: dict[str, Any] = {"model": SECTIONS["model"], "ensemble": {"size": 2}, "species": species, "seed": 7}
    asked["training"] = {"batch_size": 4, "max_steps": 200, "validate_every": 50, "validation_fraction": 0.2}
    isolated = {7: -10.0, 29: -3.0}
    first = learner_of_teacher(frames, isolated, **asked).fit(frames)
    assert first.species.numbers == (29,) and first.isolated == {29}
    known = Taught(first, tuple(frames), weight=0.1)
    tuned = Learner(len(data), typical=data, start=known, isolated=isolated, **asked).fit(data)
    apart = np.concatenate(tuned.evaluate(test).forces) - np.concatenate([frame.get_forces() for frame in test])
    assert tuned.species == species and np.sqrt(np.mean(apart**2)) < 60  # eV/Angstrom; 298 with both from the first
    params, references = tuned.params, tuned.reference_energies
    moved = known.aligned(frames, params, references)
    bound = [binding_of(some, number)[-1] for some, number in ((first.params, 1), (params, 2))]
    for frame, same in zip(frames, moved, strict=True):
        shift = 4 * (references[29] + bound[1] - first.reference_energies[29] - bound[0])
        assert same.get_potential_energy() == pytest.approx(frame.get_potential_energy() + shift)
