"""Labels through a SLURM on this machine whose jobs, nodes and controller end early, as may the program itself."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import slurm_cluster
from ase import Atoms
from label_calculators import calls
from slurm_cluster import Cluster, until

from almlip_jax import cluster as parsl_jobs
from almlip_jax.cluster import SlurmSettings
from almlip_jax.oracles import Labeller, LabelResult, LabelStore
from almlip_jax.oracles.sources.calculator import CalculatorSettings
from almlip_jax.structures.io import write_structures

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing() or "there is a SLURM"),
]

Waters = Callable[..., list[Atoms]]
LABELS = 10
SETTINGS = SlurmSettings(
    walltime="00:10:00",
    exclusive=False,
    workers_per_node=2,
    address="127.0.0.1",
    worker_init=f"export PYTHONPATH={Path(__file__).parent}:$PYTHONPATH",
)


_LABELLING = """
import sys
from pathlib import Path
from almlip_jax import cluster
from almlip_jax.oracles import Labeller, LabelStore, SourceSettings
from almlip_jax.structures.io import read_structures
cluster.HEARTBEAT_SECONDS = 2
folder = Path(sys.argv[1])
settings = cluster.SlurmSettings.model_validate_json(sys.argv[3])
with LabelStore(folder / "labels.db") as store:
    with Labeller(SourceSettings.parse(sys.argv[2]), store, settings) as labeller:
        labeller.label(read_structures(folder / "frames.extxyz"), {"purpose": "train"})
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A cluster that the commands of this process find."""
    pytest.importorskip("parsl")
    folder = tmp_path / "slurm"
    folder.mkdir()
    monkeypatch.setattr(parsl_jobs, "HEARTBEAT_SECONDS", 2)
    with slurm_cluster.running(folder) as cluster:
        monkeypatch.setenv("SLURM_CONF", str(cluster.config))
        yield cluster


def labelled(
    oracle: CalculatorSettings, folder: Path, frames: list[Atoms], disturb: Callable[[], None], *, ahead: bool = False
) -> list[LabelResult]:
    """Labels of some structures, through SLURM, while something happens once the first are there.

    Args:
        oracle: the label source.
        folder: of the store.
        frames: the structures.
        disturb: what happens.
        ahead: whether they are begun before they are waited for.
    """
    errors: list[BaseException] = []

    def disturbing() -> None:
        try:
            until(lambda: len(calls(folder)) >= 4, 120)
            disturb()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=disturbing)
    with LabelStore(folder / "labels.db") as store, Labeller(oracle, store, SETTINGS) as labeller:
        thread.start()
        if ahead:
            assert labeller.begin(frames, {"purpose": "train"}) is None
        results = labeller.label(frames, {"purpose": "train"})
        thread.join()
        assert not errors, errors
        assert [row.label.identity for row in store.labelled()] == [result.identity for result in results]
        assert store.summary()["train"]["failed"] == 0
    return results


def made_again(folder: Path) -> int:
    """How many labels were calculated more than once."""
    counts = Counter(calls(folder))
    assert len(counts) == LABELS and max(counts.values()) <= 2, counts
    return sum(count - 1 for count in counts.values())


@pytest.fixture
def slow_springs(springs: CalculatorSettings) -> CalculatorSettings:
    """Labels of a second."""
    return springs.model_copy(update={"parameters": {**springs.parameters, "delay": 1.0}})


@pytest.mark.parametrize("ahead", [False, True])
def test_a_batch_is_labelled(
    ahead: bool, slurm: Cluster, waters: Waters, springs: CalculatorSettings, tmp_path: Path
) -> None:
    labelled(springs, tmp_path, waters(LABELS), lambda: None, ahead=ahead)
    assert made_again(tmp_path) == 0
    until(lambda: not slurm.jobs(), 30)


def test_a_job_that_the_queue_kills_costs_no_more_than_it_was_at(
    slurm: Cluster, waters: Waters, slow_springs: CalculatorSettings, tmp_path: Path
) -> None:
    first: list[str] = []

    def cancel() -> None:
        first.extend(slurm.jobs())
        slurm.ask("scancel", *first)

    labelled(slow_springs, tmp_path, waters(LABELS), cancel)
    assert len(first) == 1 and made_again(tmp_path) <= 2


def test_a_node_that_goes_away(
    slurm: Cluster, waters: Waters, slow_springs: CalculatorSettings, tmp_path: Path
) -> None:
    lost: list[str] = []

    def pull_the_plug() -> None:
        lost.append(slurm.node())
        slurm.kill(lost[0])

    labelled(slow_springs, tmp_path, waters(LABELS), pull_the_plug)
    assert made_again(tmp_path) <= 2
    assert "down" in slurm.ask("sinfo", "--noheader", "--format=%T", f"--nodes={lost[0]}")


def test_a_controller_that_starts_again(
    slurm: Cluster, waters: Waters, slow_springs: CalculatorSettings, tmp_path: Path
) -> None:
    def restart() -> None:
        slurm.kill("slurmctld")
        time.sleep(6)
        slurm.start("slurmctld")

    labelled(slow_springs, tmp_path, waters(LABELS), restart)
    assert made_again(tmp_path) == 0


def test_a_program_that_is_killed(
    slurm: Cluster, waters: Waters, slow_springs: CalculatorSettings, tmp_path: Path
) -> None:
    """Its jobs end by themselves, and the next run pays for what was not finished, and for what was being worked on."""
    frames = waters(LABELS)
    write_structures(tmp_path / "frames.extxyz", frames)
    given = [str(tmp_path), slow_springs.model_dump_json(), SETTINGS.model_dump_json()]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    program = subprocess.Popen([sys.executable, "-c", _LABELLING, *given], env=os.environ | {"PYTHONPATH": path})
    until(lambda: len(calls(tmp_path)) >= 4, 120)
    orphans = slurm.jobs()
    program.kill()
    program.wait()
    labelled(slow_springs, tmp_path, frames, lambda: None)
    assert made_again(tmp_path) <= 2
    assert len(orphans) == 1
    until(lambda: not slurm.jobs(), 60)
