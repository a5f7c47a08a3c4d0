"""The final potential: trained once the campaign has ended, longer than its rounds, whatever happens meanwhile."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from rich.console import Console
from tiny_campaign import Killed, run_or_resume

from almlip_jax.campaign.report import write_report
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.state import read_state
from almlip_jax.campaign.status import campaign_status, render_status
from almlip_jax.files import read_csv, read_json
from almlip_jax.potential import Potential
from almlip_jax.progress import SilentProgress
from almlip_jax.structures.io import read_structures
from almlip_jax.training import training_part

pytestmark = pytest.mark.usefixtures("compile_once", "labels_here")

STEPS = 700  # of the final training; the rounds train 300
SECTIONS: dict[str, Any] = {"training": {"final_steps": STEPS}, "stopping": {"target_error": {"value": 1e3}}}
"""The tiny campaign that ends with its first evaluation."""


class Watching(SilentProgress):
    """Notes the stages, and the steps and reports of each training; ends the campaign where it is asked to.

    Args:
        kill: number of a training from 0, and the step at which the process ends.
        compiled: grows with everything that is compiled.
    """

    def __init__(self, kill: tuple[int, int] | None = None, compiled: list[str] | None = None) -> None:
        super().__init__()
        self.kill = kill
        self.stages: list[str] = []
        self.steps: list[int] = []
        self.reports: list[int] = []
        self.compiled = [] if compiled is None else compiled
        self.began: list[int] = []
        self.rounds: list[tuple[int, int]] = []

    def round(self, index: int, total: int) -> None:
        self.rounds.append((index, total))

    @contextmanager
    def stage(self, name: str, total: int | None = None, *, unit: str = "") -> Iterator[Callable[..., None]]:
        self.stages.append(name)
        self.began.append(len(self.compiled))
        if name == "train":
            self.steps.append(0)
            self.reports.append(0)

        def advance(n: int = 1, **fields: float | int | str) -> None:
            if name == "train":
                self.steps[-1] += n
                self.reports[-1] += 1
                if self.kill is not None and self.kill[0] == len(self.steps) - 1 and self.steps[-1] >= self.kill[1]:
                    raise Killed

        yield advance

    @property
    def of_stage(self) -> list[int]:
        """Programs compiled in each stage."""
        return np.diff([*self.began, len(self.compiled)]).tolist()


def params_of(folder: Path) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(Potential.load(folder).params)]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(scope="module")
def whole(
    reference: Path,
    cache: Path,
    compiled_in: Callable[[Path], AbstractContextManager[None]],
    count_compilations: Callable[[], AbstractContextManager[list[str]]],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[RunDirectory, Watching]:
    """A campaign with a final potential that nobody interrupted, and what was seen of it."""
    run = tmp_path_factory.mktemp("final") / "run"
    with compiled_in(cache), count_compilations() as compiled:
        watching = Watching(compiled=compiled)
        outcome = run_or_resume(reference, run, watching, **SECTIONS)
    assert outcome.potential == run / "final" / "potential"
    assert outcome.errors == read_json(run / "state.json")["final"]["errors"] != {}
    return RunDirectory(run), watching


def test_trains_as_long_as_asked_and_compiles_nothing(whole: tuple[RunDirectory, Watching], reference: Path) -> None:
    run, watching = whole
    assert watching.stages[-4:] == ["train", "evaluate", "train", "evaluate"] and watching.steps == [300, STEPS]
    assert watching.rounds[0][1] > 1 and watching.rounds[-1] == (0, 1)  # the time left counts no further round
    assert watching.of_stage[-2:] == [0, 0]
    assert read_csv(run.final.training)[-1]["step"] == STEPS
    last, final = params_of(run.round(0).potential), params_of(run.final.potential)
    assert same(last, params_of(RunDirectory(reference / "run").round(0).potential)) and not same(last, final)
    assert not run.final.unfinished_training.exists()
    remembered = Potential.load(run.final.potential).remembered
    dataset = read_structures(run.round(0).dataset)
    learned = [atoms.positions.tobytes() for atoms in training_part(dataset, 0.2)]
    assert [atoms.positions.tobytes() for atoms in remembered] == learned and len(learned) < len(dataset)


def test_its_errors_are_shown(whole: tuple[RunDirectory, Watching]) -> None:
    run, _ = whole
    final = read_state(run).final
    assert final is not None and (final.round, final.steps) == (0, STEPS)
    by_group = read_json(run.final.evaluation)["by_group"]
    assert final.errors["forces_rmse_300K"] == by_group["300K"]["forces_rmse"]
    (row,) = read_csv(run.metrics)
    assert row["final_forces_rmse_600K"] == final.errors["forces_rmse_600K"] != row["forces_rmse_600K"]
    status = campaign_status(run.path)
    assert status["final"] == {"potential": str(run.final.potential), "steps": STEPS, "errors": final.errors}
    console = Console(file=io.StringIO(), width=200)
    console.print(render_status(status))
    line = next(line for line in console.file.getvalue().splitlines() if "forces_rmse_600K" in line)
    assert f"{row['forces_rmse_600K']:.4g}" in line and f"{row['final_forces_rmse_600K']:.4g}" in line
    shown = f"<b>{1e3 * final.errors['forces_rmse_300K']:.1f} meV/Å</b><span>final force RMSE 300K</span>"
    assert shown in write_report(run.path).read_text()


@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_a_kill_changes_nothing(
    whole: tuple[RunDirectory, Watching],
    reference: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
) -> None:
    run, again = RunDirectory(tmp_path / "run"), Watching()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        if stage == "evaluate":
            patch.setattr("almlip_jax.campaign.rounds.Rounds.evaluate_final", _killed)
        run_or_resume(reference, run.path, Watching((1, 550) if stage == "train" else None), **SECTIONS)
    state = read_state(run)
    assert state.finished and (state.final is None) == (stage == "train")
    run_or_resume(reference, run.path, again, **SECTIONS)
    # a training is validated every 50 steps, and kept every ten validations
    assert again.reports == ([(STEPS - 500) // 50] if stage == "train" else [])
    assert same(params_of(run.final.potential), params_of(whole[0].final.potential))
    assert read_json(run.final.evaluation) == read_json(whole[0].final.evaluation)


def _killed(*_: object) -> None:
    raise Killed


def test_may_be_asked_for_after_the_end_and_is_made_once(
    whole: tuple[RunDirectory, Watching], reference: Path, tmp_path: Path
) -> None:
    """Another length makes it anew; without one, what is there stays."""
    shutil.copytree(whole[0].path, tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    for final_steps, trained in ((STEPS, []), (400, [400]), (None, [])):
        watching = Watching()
        sections = {**SECTIONS, "training": {"final_steps": final_steps}}
        assert run_or_resume(reference, run.path, watching, **sections).potential == run.final.potential
        assert watching.steps == trained
    final = read_state(run).final
    assert final is not None and final.steps == 400 and final.errors.keys() == read_state(whole[0]).final.errors.keys()


def test_a_larger_budget_makes_it_out_of_date(
    whole: tuple[RunDirectory, Watching], reference: Path, tmp_path: Path
) -> None:
    shutil.copytree(whole[0].path, tmp_path / "run")
    run, watching = RunDirectory(tmp_path / "run"), Watching((0, 1))
    with pytest.raises(Killed):
        run_or_resume(reference, run.path, watching, training={"final_steps": STEPS})
    state = read_state(run)
    assert not state.finished and state.final is None and state.round == 1
    assert campaign_status(run.path)["final"] is None and "final_forces_rmse_300K" not in read_csv(run.metrics)[0]
