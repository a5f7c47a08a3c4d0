"""Whole campaigns, small in every respect: what they write, what they pay for, when they end, and what they refuse."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import ase.io
import jax
import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms
from tiny_campaign import SECTIONS, Killed, KillingProgress, result_of, run_or_resume, tiny_config

import almlip_jax
from almlip_jax.campaign import finish_campaign, run_campaign
from almlip_jax.campaign.preparation import Source, initial_set, split_pool, start_geometries
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.settings import MdExploration
from almlip_jax.campaign.starts import Beginnings, going_on, walker_starts
from almlip_jax.campaign.state import read_state
from almlip_jax.errors import InputError, LabelError
from almlip_jax.files import read_csv, read_json, read_npz
from almlip_jax.keys import numpy_generator
from almlip_jax.oracles import Labeller, LabelStore, TBLiteSettings, label_structures, rattle
from almlip_jax.progress import SilentProgress
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.structures.repeats import geometry_key

pytestmark = pytest.mark.usefixtures("compile_once")

Counting = Callable[[], AbstractContextManager[list[str]]]
CompiledIn = Callable[[Path], AbstractContextManager[None]]

FMAX = 0.1  # eV/Angstrom
# A rule that ends a campaign early and leaves the sizes of its programs as they are.
AT_FIRST_ERROR = {"target_error": {"value": 1e3}}


def first_batch(folder: Path, run_dir: Path, **sections: Any) -> None:
    """Runs or resumes a campaign up to its first batch."""
    with pytest.raises(Killed):
        run_or_resume(folder, run_dir, KillingProgress(0, "label"), **sections)


class CompileCounter(SilentProgress):
    """Counts the programs that jax compiles (or takes from its cache) in each round.

    Args:
        compiled: grows with everything that is compiled.
    """

    def __init__(self, compiled: list[str]) -> None:
        super().__init__()
        self.compiled = compiled
        self.began: list[int] = []

    def round(self, index: int, total: int) -> None:
        super().round(index, total)
        self.began.append(len(self.compiled))

    @property
    def of_round(self) -> list[int]:
        return np.diff([*self.began, len(self.compiled)]).tolist()


@pytest.fixture(scope="session")
def labelled_pool(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file with labelled structures of the water molecule."""
    folder = tmp_path_factory.mktemp("pool")
    start = tiny_config(folder).system.structures
    assert isinstance(start, Path)
    frames = rattle(read_structures(start)[0], 30, numpy_generator(3, "pool"), stdev=0.06)
    with LabelStore(folder / "labels.db") as store, pytest.MonkeyPatch.context() as patch:
        patch.setattr(TBLiteSettings, "in_process", True)
        results = label_structures(frames, TBLiteSettings(), store, provenance={"purpose": "pool"})
    write_structures(folder / "pool.extxyz", [result.atoms for result in results if result.atoms is not None])
    return folder / "pool.extxyz"


def pool_sections(pool: Path, **changes: Any) -> dict[str, Any]:
    """A study on a fixed, labelled pool; as large as the tiny campaign, so that its programs serve again."""
    sections = {
        "oracle": {"kind": "file", "path": str(pool)},
        "initial": {"rattle": None, "md": (), "from_pool": 8},
        "test": {"md": (), "from_pool": 8},
        "exploration": {"kind": "pool", "files": str(pool)},
        "selection": {"batch": 3, "selector": {"kind": "top_k"}},
    }
    return {**sections, **changes}


def keys(path: Path) -> list[bytes]:
    return [geometry_key(atoms) for atoms in read_structures(path)]


class TestRunDirectory:
    def test_holds_everything_in_files_that_others_can_open(self, reference: Path) -> None:
        run = RunDirectory(reference / "run")
        for path in (run.config, run.versions, run.state, run.labels, run.measured, run.test, run.metrics, run.report):
            assert path.exists(), path
        for folder in run.rounds()[:-1]:
            for path in (folder.training, folder.evaluation, folder.test_predictions, folder.batch, folder.labelled):
                assert path.exists(), path
            assert ase.io.read(folder.trajectory(0), ":")
        assert len(ase.io.read(run.round(0).dataset, ":")) == 8
        assert os.readlink(run.path / "potential") == "rounds/002/potential", "a link to the newest potential"
        assert almlip_jax.load(run.path / "potential").metadata["round"] == 2
        log = run.log.read_text()
        assert "session begins" in log  # more than once where another test has resumed it
        assert [log.count(text) for text in ("  round 3/3", "  label: 3 labels in")] == [1, 2], log
        assert "  finished: " in log and log.endswith("  session ended\n")

    def test_the_dataset_grows_by_the_batches_in_their_order(self, reference: Path) -> None:
        run = RunDirectory(reference / "run")
        for index in (0, 1):
            batch, labelled = keys(run.round(index).batch), keys(run.round(index).labelled)
            assert len(batch) == 3 and batch == labelled
            assert keys(run.round(index + 1).dataset) == keys(run.round(index).dataset) + labelled
        origins = [atoms.info["origin"] for atoms in read_structures(run.round(2).dataset)]
        assert origins == ["rattle"] * 6 + ["md-300K"] * 2 + ["exploration"] * 6

    def test_the_test_set_is_never_trained_on(self, reference: Path) -> None:
        run = RunDirectory(reference / "run")
        assert not set(keys(run.test)) & set(keys(run.round(2).dataset))
        groups = [atoms.info["group"] for atoms in read_structures(run.test)]
        assert groups == ["300K"] * 4 + ["600K"] * 4

    def test_every_call_is_counted_those_of_the_test_set_apart(self, reference: Path) -> None:
        run = RunDirectory(reference / "run")
        with LabelStore(run.labels, readonly=True) as store:
            purposes = {name: entry["calls"] for name, entry in store.summary().items()}
        assert purposes == {"initial": 6 + 1 + 4, "train": 6, "test": 2 * (5 + 20)}  # the start is known
        assert [row["labels"] for row in read_csv(run.metrics)] == [11, 14, 17]
        assert [row["test_calls"] for row in read_csv(run.metrics)] == [50, 50, 50]

    def test_provenance_says_where_a_label_came_from(self, reference: Path) -> None:
        with LabelStore(reference / "run" / "labels.db", readonly=True) as store:
            rows = list(store.labelled("train"))
        for row in rows:
            assert {"campaign", "round", "walker", "step", "score", "gain"} <= set(row.provenance)
            assert row.provenance["selector"] == "max_det"

    def test_walkers_are_traced_with_what_the_gate_did(self, reference: Path) -> None:
        folder = RunDirectory(reference / "run").round(0)
        found = read_npz(folder.walkers)
        assert found["force_std_max"].shape == (len(found["step"]), 2)
        assert (float(found["gate_record"]), float(found["gate_stop"])) == (0.1, 10.0)
        for frame in read_structures(folder.pool):
            assert frame.info["force_std_max"] > 0.1
            assert np.isclose(frame.arrays["force_std"].max(), frame.info["force_std_max"])
        assert set(found["status"]) <= {"completed", "stopped", "unphysical", "buffer_full"}

    def test_the_potential_loads_and_predicts_what_was_evaluated(self, reference: Path) -> None:
        run = RunDirectory(reference / "run")
        potential = almlip_jax.load(run.round(2).potential)
        frames = read_structures(run.test)
        found = potential.evaluate(frames).forces
        errors = np.concatenate([f - a.get_forces() for f, a in zip(found, frames, strict=True)])
        assert np.isclose(np.sqrt(np.mean(errors**2)), read_json(run.round(2).evaluation)["forces_rmse"], rtol=1e-6)

    def test_the_rounds_learn(self, reference: Path) -> None:
        """Three hundred steps of a tiny model: too few to compare rounds, enough to explain most of the forces."""
        run = RunDirectory(reference / "run")
        labels = np.concatenate([a.get_forces() for a in read_structures(run.test)])
        errors = [read_json(run.round(n).evaluation)["forces_rmse"] for n in range(3)]
        assert np.mean(errors) < 0.5 * np.sqrt(np.mean(labels**2))


@pytest.mark.slow
def test_nothing_compiles_after_round_1_while_the_dataset_grows_from_20_to_170(
    tmp_path: Path, count_compilations: Counting
) -> None:
    with count_compilations() as compiled:
        counter = CompileCounter(compiled)
        outcome = run_or_resume(
            tmp_path,
            tmp_path / "run",
            counter,
            initial={"rattle": {"count": 20, "stdev": 0.05}, "md": ()},
            test={"md": SECTIONS["test"]["md"][:1]},
            exploration={**SECTIONS["exploration"], "record_every": 5, "buffer": 12},
            selection={"batch": 10},
            stopping={"max_rounds": 15, "max_labels": 170},
        )
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    assert outcome.labels == 170 and [row["dataset_size"] for row in rows] == list(range(20, 171, 10))
    assert counter.of_round[2:] == [0] * 14


@dataclass(frozen=True)
class Study:
    """A campaign that has ended: the folder of its start geometry, its own, programs compiled in each round."""

    folder: Path
    run: RunDirectory
    compiled: list[int]


class TestRelaxedStarts:
    """The tiny campaign in smaller batches, so that its programs serve again, with relaxed starts."""

    sections: ClassVar[dict[str, Any]] = {
        "exploration": {
            **SECTIONS["exploration"],
            "thresholds": {"kind": "fixed", "record": 0.1, "stop": 2.0},
            "starts": {"kind": "relaxed", "fmax": FMAX, "steps": 100},
            "continue_walkers": True,
        },
        "selection": {"batch": 2},
    }

    @pytest.fixture(scope="class")
    def study(
        self,
        reference: Path,
        cache: Path,
        compiled_in: CompiledIn,
        count_compilations: Counting,
        tmp_path_factory: pytest.TempPathFactory,
    ) -> Study:
        run_dir = tmp_path_factory.mktemp("relaxed") / "run"
        with compiled_in(cache), count_compilations() as compiled, pytest.MonkeyPatch.context() as patch:
            patch.setattr("almlip_jax.campaign.loop.write_report", lambda run_dir, drawn: run_dir)
            counter = CompileCounter(compiled)
            run_or_resume(reference, run_dir, counter, stopping={"max_rounds": 3}, **self.sections)
        return Study(reference, RunDirectory(run_dir), counter.of_round)

    def test_are_compiled_for_once(self, study: Study) -> None:
        assert study.compiled[1:] == [0, 0, 0]
        assert {"explorer", "relaxer"} <= set(read_json(study.run.measured))

    def test_lie_downhill_of_where_they_come_from(self, study: Study) -> None:
        """The mean potential at the starts that are written, and at the labelled structures that were drawn."""
        config = tiny_config(study.folder, **self.sections)
        assert isinstance(config.exploration, MdExploration)
        geometries, baths = start_geometries(config.system), config.exploration.temperatures
        ends = []
        for index in range(3):
            folder = study.run.round(index)
            given = Beginnings(geometries, [], read_structures(folder.dataset), baths, config.seed, index)
            drawn = walker_starts(config.exploration.starts, given, going_on(study.run, index))
            starts = read_structures(folder.starts)
            found = almlip_jax.load(folder.potential).evaluate([*starts, *drawn])
            assert found.energy is not None
            for n, start in enumerate(starts):
                assert start.info["walker"] == n
                ends.append(start.info.get("relaxation", "gone on"))
                if ends[-1] == "converged":
                    assert np.linalg.norm(found.forces[n], axis=1).max() < FMAX * 1.01 + 1e-3
                assert found.scores["force_std_max"][n] <= 2.0 * (1 + 1e-4) or ends[-1] == "gone on"
                assert found.energy[n] <= found.energy[2 + n] + 1e-4
        assert ends.count("converged") >= 2

    def test_walkers_that_go_on_are_not_relaxed(self, study: Study) -> None:
        went_on = []
        for index in (1, 2):
            ends = read_structures(study.run.round(index - 1).last_frames)
            starts = read_structures(study.run.round(index).starts)
            same = [bool(np.array_equal(a.positions, b.positions)) for a, b in zip(ends, starts, strict=True)]
            assert same == [end.info["status"] == "completed" for end in ends]
            assert same == ["relaxation" not in start.info for start in starts]
            went_on += same
        assert any(went_on)

    def test_are_the_same_after_a_kill(self, study: Study, tmp_path: Path) -> None:
        killing = KillingProgress(0, "explore", within=True)
        sections = {**self.sections, "stopping": {"max_rounds": 3}}
        with pytest.raises(Killed):
            run_or_resume(study.folder, tmp_path / "run", killing, **sections)
        run = RunDirectory(tmp_path / "run")
        assert (read_state(run).round, read_state(run).stage) == (0, "explore")
        first_batch(study.folder, tmp_path / "run", **sections)
        for name in ("starts", "pool", "batch"):
            assert getattr(run.round(0), name).read_bytes() == getattr(study.run.round(0), name).read_bytes()


@pytest.mark.slow
def test_starts_of_a_file_serve_without_geometries(reference: Path, tmp_path: Path) -> None:
    given = reference / "run" / "rounds" / "000" / "dataset.extxyz"
    sections = {
        "system": {"structures": ()},
        "initial": {"dataset": str(given), "rattle": None, "md": ()},
        "test": {"md": ()},
        "exploration": {**SECTIONS["exploration"], "starts": {"kind": "file", "path": str(given)}},
    }
    first_batch(reference, tmp_path / "run", **sections)
    run = RunDirectory(tmp_path / "run")
    for start, frame in zip(read_structures(run.round(0).starts), read_structures(given)[:2], strict=True):
        np.testing.assert_array_equal(start.positions, frame.positions)
    assert run.round(0).batch.exists()


class TestPool:
    @pytest.fixture(scope="class")
    def study(self, labelled_pool: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
        folder = tmp_path_factory.mktemp("study")
        run_or_resume(folder, folder / "run", **pool_sections(labelled_pool))
        return folder / "run"

    def test_the_pool_shrinks_by_what_was_selected(self, study: Path) -> None:
        rows = read_csv(study / "metrics.csv")
        assert [row["candidates"] for row in rows] == [14, 11, None]
        run = RunDirectory(study)
        assert set(keys(run.round(1).pool)) == set(keys(run.round(0).pool)) - set(keys(run.round(0).batch))
        everything = keys(run.round(2).dataset) + keys(run.test)
        assert len(set(everything)) == len(everything) == 8 + 6 + 8

    def test_the_batch_has_the_highest_scores(self, study: Path) -> None:
        run = RunDirectory(study)
        scores = sorted(frame.info["force_std_mean"] for frame in read_structures(run.round(0).pool))
        batch = [frame.info["force_std_mean"] for frame in read_structures(run.round(0).batch)]
        assert batch == scores[:-4:-1]
        row = read_csv(run.metrics)[0]
        assert np.isclose(row["sigma_batch"], np.mean(batch), rtol=1e-5)
        assert np.isclose(row["sigma_pool"], np.mean(scores[:-3]), rtol=1e-5)

    def test_selectors_share_what_they_are_compared_on(self, study: Path, labelled_pool: Path, tmp_path: Path) -> None:
        other = pool_sections(labelled_pool, selection={"selector": {"kind": "random"}})
        first_batch(tmp_path, tmp_path / "run", **other)
        one, two = RunDirectory(study), RunDirectory(tmp_path / "run")
        assert keys(one.test) == keys(two.test) and keys(one.round(0).dataset) == keys(two.round(0).dataset)
        assert keys(one.round(0).batch) != keys(two.round(0).batch)

    def test_strata_hold_their_shares_of_the_dataset(self, labelled_pool: Path, tmp_path: Path) -> None:
        frames = read_structures(labelled_pool)
        for place, frame in enumerate(frames):
            frame.info["source"] = "scan" if place % 4 == 0 else "dynamics"
        write_structures(tmp_path / "told.extxyz", frames)
        selector = {"kind": "stratified", "by": "source", "selector": {"kind": "top_k"}, "shares": {"scan": 2}}
        told = pool_sections(tmp_path / "told.extxyz", selection={"batch": 3, "selector": selector})
        run_or_resume(tmp_path, tmp_path / "run", **told)
        run = RunDirectory(tmp_path / "run")
        for index in (0, 1):
            left, batch = (read_structures(path) for path in (run.round(index).pool, run.round(index).batch))
            scans = sum(frame.info["source"] == "scan" for frame in left)
            assert sum(frame.info["source"] == "scan" for frame in batch) == min(3, scans)
        dataset = read_structures(run.round(2).dataset)
        assert {frame.info.get("source") for frame in dataset} == {"scan", "dynamics"}, "initial set and batches say it"
        assert all("source" in frame.info for frame in dataset)

    def test_ends_when_it_is_used_up(self, labelled_pool: Path, tmp_path: Path) -> None:
        sections = pool_sections(labelled_pool, test={"md": (), "from_pool": 19})
        outcome = run_or_resume(tmp_path, tmp_path / "run", **sections)
        assert outcome.rule == "pool_exhausted" and not outcome.converged and outcome.round == 1

    def test_scripts_finish_what_they_find(self, labelled_pool: Path, tmp_path: Path) -> None:
        few = {"max_labels": 11}  # of the sizes of the other studies, so that their programs serve again
        config = tiny_config(tmp_path, **pool_sections(labelled_pool, stopping=few))
        with pytest.raises(Killed):
            finish_campaign(config, tmp_path / "run", progress=KillingProgress(0, "label"))
        state = finish_campaign(config, tmp_path / "run")
        assert state.finished and state.rule == "max_labels" and len(state.history) == 2
        log = (tmp_path / "run" / "run.log").read_bytes()
        assert finish_campaign(config, tmp_path / "run") == state
        assert (tmp_path / "run" / "run.log").read_bytes() == log, "nothing was done"
        larger = tiny_config(tmp_path, **pool_sections(labelled_pool, stopping={"max_rounds": 2}))
        assert len(finish_campaign(larger, tmp_path / "run").history) == 3

    def test_shares_are_drawn_by_name(self) -> None:
        split = split_pool(50, 5, 7, seed=1)
        assert sorted([*split.test, *split.initial, *split.rest]) == list(range(50))
        assert split_pool(50, 9, 7, seed=1).test == split.test
        with pytest.raises(InputError, match="too few"):
            split_pool(10, 5, 7, seed=1)


@pytest.mark.usefixtures("labels_here")
class TestEndings:
    def test_a_potential_that_is_sure_of_everything_has_converged(self, reference: Path, tmp_path: Path) -> None:
        sure = {**SECTIONS["exploration"], "thresholds": {"kind": "fixed", "record": 1e3, "stop": 1e4}}
        rule = {"share_below": {"share": 0.5, "rounds": 1}}
        outcome = run_or_resume(reference, tmp_path / "run", exploration=sure, stopping=rule)
        assert outcome.converged and outcome.round == 0
        assert outcome.rule == "share_below" and "100.0 % of 120 frames" in outcome.reason
        state = read_state(RunDirectory(tmp_path / "run"))
        assert state.finished and state.reason == outcome.reason

    def test_another_exploration_goes_on_where_one_found_nothing(self, reference: Path, tmp_path: Path) -> None:
        """It ended since nothing was recorded, whatever `stopping` says; a lower threshold was passed over."""
        sure = {**SECTIONS["exploration"], "thresholds": {"kind": "fixed", "record": 1e3, "stop": 1e4}}
        limits = {"max_labels": 14}  # of the sizes of the tiny campaign, so that its programs serve again
        first = run_or_resume(reference, tmp_path / "run", exploration=sure, stopping=limits)
        assert (first.rule, first.round, first.labels) == ("nothing_recorded", 0, 11)
        other = {"batch_size": 2}
        again = run_or_resume(reference, tmp_path / "run", exploration=sure, stopping=limits, training=other)
        assert (again.rule, again.round) == ("nothing_recorded", 0)
        told = (tmp_path / "run" / "run.log").read_text()
        assert "nothing_recorded still holds: nothing is left to do" in told
        whole = run_or_resume(reference, tmp_path / "whole", stopping=limits)
        found = run_or_resume(reference, tmp_path / "run", stopping=limits)
        assert (found.rule, found.round) == (whole.rule, whole.round) == ("max_labels", 1)
        results = [result_of(tmp_path / name) for name in ("run", "whole")]
        assert results[0] == results[1]
        assert read_state(RunDirectory(tmp_path / "run")).history[0].explored_anew

    def test_the_target_error_ends_it_before_it_explores(self, reference: Path, tmp_path: Path) -> None:
        outcome = run_or_resume(reference, tmp_path / "run", stopping=AT_FIRST_ERROR)
        assert outcome.rule == "target_error" and outcome.converged and outcome.round == 0
        assert not RunDirectory(tmp_path / "run").round(0).walkers.exists()

    def test_walkers_that_end_without_a_candidate_do_not_mean_convergence(
        self, reference: Path, tmp_path: Path
    ) -> None:
        sure = {"thresholds": {"kind": "fixed", "record": 1e3, "stop": 1e4}, "sanity": {"max_temperature": 1e-6}}
        outcome = run_or_resume(reference, tmp_path / "run", exploration={**SECTIONS["exploration"], **sure})
        assert outcome.rule == "max_rounds" and not outcome.converged and outcome.labels == 11
        rows = read_csv(tmp_path / "run" / "metrics.csv")
        assert [row["dataset_size"] for row in rows] == [8, 8, 8]
        assert set(read_npz(RunDirectory(tmp_path / "run").round(1).walkers)["cause"]) == {"hot"}


class TestLabelSource:
    def sections(self, mood: Path) -> dict[str, Any]:
        oracle = {"kind": "ase", "calculator": "moody_calculator:Moody", "parameters": {"mood": str(mood)}}
        return {"oracle": oracle, "initial": {"rattle": {"count": 8, "stdev": 0.05}, "md": ()}, "test": {"md": ()}}

    @pytest.mark.usefixtures("labels_here")
    def test_a_batch_that_fails_as_a_whole_ends_the_run_and_is_tried_again(
        self, reference: Path, tmp_path: Path
    ) -> None:
        mood = tmp_path / "mood"

        class SpoilsTheMood(SilentProgress):
            def round(self, index: int, total: int) -> None:
                mood.write_text("all")

        sections = self.sections(mood) | {"stopping": {"max_labels": 14}}
        with pytest.raises(LabelError, match=r"none of the 3 structures of round 0.*not in the mood.*resume"):
            run_or_resume(reference, tmp_path / "run", SpoilsTheMood(), **sections)
        assert "not in the mood" in str(read_state(RunDirectory(tmp_path / "run")).reason)
        mood.unlink()
        outcome = run_or_resume(reference, tmp_path / "run", **sections)
        assert outcome.finished and outcome.labels == 8 + 3 + 3  # calls that failed were paid, too
        assert read_csv(tmp_path / "run" / "metrics.csv")[-1]["dataset_size"] == 11

    @pytest.mark.usefixtures("labels_here")
    def test_a_batch_that_fails_again_is_left_out(self, reference: Path, tmp_path: Path) -> None:
        """Where it is the structures, and not the source, nothing else could go on."""
        mood = tmp_path / "mood"

        class SpoilsTheMood(SilentProgress):
            def round(self, index: int, total: int) -> None:
                mood.write_text("all") if index == 0 else mood.unlink(missing_ok=True)

        sections = self.sections(mood) | {"stopping": {"max_rounds": 2, "share_below": None}}
        with pytest.raises(LabelError, match="left out if they fail again"):
            run_or_resume(reference, tmp_path / "run", SpoilsTheMood(), **sections)
        outcome = run_or_resume(reference, tmp_path / "run", SpoilsTheMood(), **sections)
        assert outcome.finished and outcome.rule == "max_rounds" and outcome.labels == 8 + 3 + 3 + 3
        rows = read_csv(tmp_path / "run" / "metrics.csv")
        assert [row["dataset_size"] for row in rows] == [8, 8, 11]

    @pytest.mark.usefixtures("labels_here")
    def test_single_failures_are_left_out_and_kept_in_the_store(self, tmp_path: Path) -> None:
        mood = tmp_path / "mood"
        mood.write_text("stretched")
        config = tiny_config(tmp_path, **self.sections(mood))
        said: list[str] = []
        with LabelStore(tmp_path / "labels.db") as store, Labeller(config.oracle, store) as labeller:
            source = Source(
                start_geometries(config.system), config.system, labeller, 7, {}, said.append, lambda n: None
            )
            frames = initial_set(config.initial, source, ())
            failed = list(store.labelled(failed=True))
            assert store.count_calls() == 8
        assert 0 < len(failed) < 8 and len(frames) == 8 - len(failed)
        assert "not in the mood" in str(failed[0].label.error) and "not in the mood" in said[0]

    def test_labels_made_elsewhere_are_waited_for(
        self, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(TBLiteSettings, "in_process", True)  # of those who make them
        elsewhere = tmp_path / "elsewhere"
        sections = {
            "oracle": {"kind": "external", "method": "xtb-by-hand", "folder": str(elsewhere)},
            "initial": {"rattle": {"count": 8, "stdev": 0.05}, "md": ()},
            "test": {"md": (), "files": [{"path": str(reference / "run" / "test.extxyz"), "group": "md"}]},
            "stopping": {"max_labels": 11},
        }
        outcome = run_or_resume(reference, tmp_path / "run", **sections)
        for number in range(2):  # the initial set, then the batch
            assert not outcome.finished and "resume" in outcome.reason
            assert read_state(RunDirectory(tmp_path / "run")).reason == outcome.reason
            (request,) = sorted(set((elsewhere / "requested").iterdir()) - {elsewhere / "requested" / "done"})
            with LabelStore(tmp_path / f"by-hand-{number}.db") as store:
                results = label_structures(
                    read_structures(request), TBLiteSettings(), store, provenance={"purpose": "hand"}
                )
            write_structures(elsewhere / "results" / f"{number}.extxyz", [r.atoms for r in results if r.atoms])
            request.unlink()
            outcome = run_or_resume(reference, tmp_path / "run", **sections)
        assert outcome.finished and outcome.labels == 11


class TestRefused:
    def test_starts_that_cannot_serve_before_anything_is_paid(self, tmp_path: Path) -> None:
        write_structures(tmp_path / "list.extxyz", [Atoms("HF", np.eye(3)[:2])])
        kinds = [
            ({"kind": "file", "path": str(tmp_path / "list.extxyz")}, r"list\.extxyz, frame 0 holds F"),
            ({"kind": "file", "path": str(tmp_path / "nowhere.xyz")}, r"nowhere\.xyz"),
            ({"kind": "relaxed", "cell": "full"}, r"starts\.cell moves cells, but no start structure is periodic"),
        ]
        for starts, refusal in kinds:
            with pytest.raises(InputError, match=refusal):
                run_or_resume(tmp_path, tmp_path / "run", exploration={**SECTIONS["exploration"], "starts": starts})
            assert not (tmp_path / "run" / "labels.db").exists()

    def test_what_a_training_would_refuse_before_anything_is_paid(self, tmp_path: Path) -> None:
        """All of it was told when labels had been paid, the active sets after the first training."""
        ion = molecule("H2O")
        ion.info.update(charge=1, spin=2)
        write_structures(tmp_path / "both.extxyz", [molecule("H2O"), ion])
        write_structures(tmp_path / "atom.extxyz", [Atoms("O")])
        write_structures(tmp_path / "sparse.extxyz", [Atoms("O", cell=[20] * 3, pbc=True)])
        slab = Atoms("H2O", molecule("H2O").positions, cell=[6] * 3, pbc=True, constraint=FixAtoms([0]))
        write_structures(tmp_path / "slab.extxyz", [slab])
        dynamics = SECTIONS["exploration"]
        held = {"system": {"structures": str(tmp_path / "slab.extxyz")}}
        distance = {"kind": "distance", "points": [0, 5]}
        pull = {"kind": "restraint", "variable": distance, "stiffness": 1.0, "centre": 1.0}
        npt = {**dynamics, "integrator": {"kind": "npt"}}
        relaxed = {**dynamics, "starts": {"kind": "relaxed", "cell": "full"}}
        gate = {"kind": "absolute", "score": "force_std_max", "species": {"F": 0.5}}
        heads = {"ensemble": {"size": 1, "heads": 4}, "training": {**SECTIONS["training"], "loss": {"kind": "nll"}}}
        cases: list[tuple[dict[str, Any], str]] = [
            ({"system": {"structures": str(tmp_path / "both.extxyz")}}, "structures 0 and 1 .*charge and spin"),
            ({"system": {"structures": str(tmp_path / "atom.extxyz")}}, r"geometry 0 .* isolated atom \(O\)"),
            ({"system": {"structures": str(tmp_path / "sparse.extxyz")}}, "no two atoms of any start geometry"),
            ({"active_set": {"parameters": "all"}, **heads}, "one head each"),
            ({"active_set": {"parameters": "all"}, "model": {"kind": "shared_density"}}, "columns is too large"),
            ({"exploration": {**dynamics, "gate": gate}}, r"gate\.species names F"),
            ({"exploration": {**dynamics, "swaps": {"elements": ["O", "F"]}}}, "no start structure holds two elements"),
            ({"exploration": {**dynamics, "biases": [pull]}}, "biases.0 looks at atom 5, and start geometry 0 has 3"),
            ({"exploration": npt, **held}, "start geometry 0 holds atoms fixed, which a moving cell"),
            ({"exploration": relaxed, **held}, "start geometry 0 holds atoms fixed, which a moving cell"),
            ({"exploration": {**dynamics, "remove_drift": True}, **held}, "beside which nothing drifts"),
        ]
        for sections, refusal in cases:
            with pytest.raises(InputError, match=refusal):
                run_or_resume(tmp_path, tmp_path / "run", **sections)
            assert not (tmp_path / "run" / "labels.db").exists()

    def test_an_initial_set_beyond_the_budget_before_anything_is_paid(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"needs 11 label-source calls.*max_labels 10"):
            run_or_resume(tmp_path, tmp_path / "run", stopping={"max_labels": 10})
        assert not (tmp_path / "run" / "labels.db").exists()

    def test_dynamics_without_a_start_geometry(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"system\.structures"):
            run_or_resume(tmp_path, tmp_path / "run", system={"structures": ()})

    def test_a_directory_that_holds_a_campaign(self, reference: Path) -> None:
        with pytest.raises(InputError, match="holds a campaign already"):
            run_campaign(tiny_config(reference), reference / "run")

    def test_a_label_source_that_is_not_installed(
        self, reference: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The error may be held on to, as a notebook does, and the store can be opened nevertheless."""

        def missing(_: object) -> str:
            raise InputError("tblite is not installed")

        with monkeypatch.context() as patch:
            patch.setattr(TBLiteSettings, "version", missing)
            with pytest.raises(InputError, match="not installed") as held:
                run_or_resume(reference, tmp_path / "run")
        with LabelStore(RunDirectory(tmp_path / "run").labels):
            assert held.tb is not None

    def test_a_start_file_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"nowhere\.xyz"):
            run_or_resume(tmp_path, tmp_path / "run", system={"structures": str(tmp_path / "nowhere.xyz")})


@pytest.mark.usefixtures("labels_here")
def test_seeds_decide(reference: Path, tmp_path: Path) -> None:
    run_or_resume(reference, tmp_path / "run", seed=8, stopping=AT_FIRST_ERROR)
    one, two = result_of(reference / "run"), result_of(tmp_path / "run")
    assert one["sets"]["rounds/000/dataset.extxyz"] != two["sets"]["rounds/000/dataset.extxyz"]
    assert one["sets"]["test"] != two["sets"]["test"]


@pytest.mark.usefixtures("labels_here")
def test_a_campaign_may_begin_with_labels_that_exist(reference: Path, tmp_path: Path) -> None:
    given = reference / "run" / "rounds" / "000" / "dataset.extxyz"
    initial = {"dataset": str(given), "rattle": None, "md": ()}
    outcome = run_or_resume(reference, tmp_path / "run", initial=initial, stopping=AT_FIRST_ERROR)
    assert outcome.labels == 0
    assert keys(RunDirectory(tmp_path / "run").round(0).dataset) == keys(given)


@pytest.mark.slow
@pytest.mark.usefixtures("labels_here")
def test_double_precision(tmp_path: Path) -> None:
    run_or_resume(tmp_path, tmp_path / "run", precision="float64")
    assert read_json(RunDirectory(tmp_path / "run").round(2).potential / "potential.json")["dtype"] == "float64"
    assert not jax.config.jax_enable_x64
