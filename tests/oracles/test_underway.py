"""Labels that are made while their caller does something else: each once, none lost, in the order of the requests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import label_calculators as trouble
import numpy as np
import pytest
from ase import Atoms
from label_calculators import calls

import almlip_jax
from almlip_jax.errors import InputError
from almlip_jax.oracles import Label, Labeller, LabelResult, LabelStore, LocalSettings, PendingLabels
from almlip_jax.oracles.sources.calculator import CalculatorSettings
from almlip_jax.oracles.sources.external import ExternalSettings
from almlip_jax.oracles.sources.labelled_file import FileSettings
from almlip_jax.oracles.worker import Context, LabelTask
from almlip_jax.structures.io import read_structures, write_structures

Waters = Callable[..., list[Atoms]]
TRAIN = {"purpose": "train"}
TWO = LocalSettings(workers=2)


def until(holds: Callable[[], bool], seconds: float = 60.0) -> None:
    """Waits for something."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_labels_are_made_meanwhile_and_waited_for(waters: Waters, springs: CalculatorSettings, tmp_path: Path) -> None:
    frames = waters(2, trouble.SLOW) + waters(3) + waters(1, trouble.RAISE)
    counted: list[int] = []
    arrived: list[LabelResult] = []
    with LabelStore(tmp_path / "labels.db") as store, Labeller(springs, store, TWO) as labeller:
        store.watch(lambda: counted.append(threading.get_ident()))
        assert labeller.begin(frames, TRAIN) is None and store.summary()["train"]["pending"] == 6
        until(lambda: len(calls(tmp_path)) == 6)
        assert store.count_calls() == 0, "the store is touched by nobody but its owner"
        labeller.land()
        landed = store.count_calls()
        assert landed >= 3
        results = labeller.label(frames, TRAIN, on_label=arrived.append)
        assert len(arrived) == 6 - landed and store.count_calls() == 6
        assert [result.cached for result in labeller.label(frames, TRAIN)] == [True] * 6
    assert set(counted) == {threading.get_ident()}
    assert len(calls(tmp_path)) == 6 and not list(store.spool.glob("*.json"))
    for result, frame in zip(results[:5], frames, strict=False):
        assert result.atoms is not None
        np.testing.assert_array_equal(result.atoms.calc.results["forces"], -frame.positions)
    assert "no convergence" in str(results[5].error)


def test_what_is_under_way_is_given_up_when_the_workers_are_closed(
    waters: Waters, springs: CalculatorSettings, tmp_path: Path
) -> None:
    """Nothing of it has failed, what had arrived is stored, and the rest is made when it is asked for again."""
    frames = waters(3) + waters(2, trouble.HANG) + waters(2, 1)
    threads = threading.active_count()
    with LabelStore(tmp_path / "labels.db") as store, Labeller(springs, store, TWO) as labeller:
        labeller.begin(frames, TRAIN)
        until(lambda: len(calls(tmp_path)) == 5)
        start = time.monotonic()
    assert time.monotonic() - start < 15  # the timeout is 20 s
    until(lambda: threading.active_count() <= threads)
    again = waters(3) + waters(2, 1)
    with LabelStore(tmp_path / "labels.db") as store, Labeller(springs, store, TWO) as labeller:
        assert store.summary()["train"]["failed"] == 0 and store.count_calls() == 3
        assert [result.error for result in labeller.label(again, TRAIN)] == [None] * 5
    assert len(calls(tmp_path)) == 7


_PROGRAM = """
import sys, time
from pathlib import Path
from ase.io import read
from almlip_jax.oracles import Labeller, LabelStore, LocalSettings
from almlip_jax.oracles.sources.calculator import CalculatorSettings
folder = Path(sys.argv[1])
springs = CalculatorSettings.model_validate_json((folder / "springs.json").read_text())
frames = read(folder / "frames.extxyz", ":")
with LabelStore(folder / "labels.db") as store, Labeller(springs, store, LocalSettings(workers=2)) as labeller:
    labeller.begin(frames, {"purpose": "train"})
    (folder / "begun").touch()
    time.sleep(600)
"""


def test_what_lies_in_the_spool_is_not_paid_again(waters: Waters, springs: CalculatorSettings, tmp_path: Path) -> None:
    """As when a job ends after it has left a label there, and before it could say so."""
    context = Context(springs, springs.build(), tmp_path)
    first, again = (LabelTask(waters(1)[0], "a").run(context) for _ in range(2))
    assert isinstance(first, Label) and isinstance(again, Label) and first.energy == again.energy
    assert len(calls(tmp_path)) == 1


@pytest.mark.slow
def test_a_killed_program_loses_no_label_that_was_under_way(
    waters: Waters, springs: CalculatorSettings, tmp_path: Path
) -> None:
    oracle = springs.model_copy(update={"parameters": {**springs.parameters, "delay": 0.5}})
    (tmp_path / "springs.json").write_text(oracle.model_dump_json())
    write_structures(tmp_path / "frames.extxyz", waters(6))
    frames = read_structures(tmp_path / "frames.extxyz")
    places = [str(Path(__file__).parent), str(Path(almlip_jax.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(places)}
    program = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(tmp_path)], env=environment)
    until(lambda: len(calls(tmp_path)) == 3)
    program.send_signal(signal.SIGKILL)
    program.wait()
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store, TWO) as labeller:
        labeller.begin(frames, TRAIN)
        assert [result.error for result in labeller.label(frames, TRAIN)] == [None] * 6
        assert store.count_calls() == 6
    assert len(calls(tmp_path)) == 6, "what workers of the killed program were at is not made again"


def test_a_label_source_that_cannot_be_used_says_so_meanwhile(
    waters: Waters, springs: CalculatorSettings, tmp_path: Path
) -> None:
    oracle = springs.model_copy(update={"calculator": "no_such_module:Springs"})
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store, TWO) as labeller:
        labeller.begin(waters(2), TRAIN)
        deadline = time.monotonic() + 60
        with pytest.raises(InputError, match="'no_such_module:Springs' cannot"):
            while time.monotonic() < deadline:
                labeller.land()
                time.sleep(0.02)
        assert store.summary()["train"]["pending"] == 2


def test_labels_made_elsewhere_are_asked_for_at_once(waters: Waters, tmp_path: Path) -> None:
    oracle, frames = ExternalSettings(method="by hand", folder=tmp_path), waters(2)
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store) as labeller:
        assert "2 structure(s) wait for labels from elsewhere" in str(labeller.begin(frames, TRAIN))
        labeller.land()
        with pytest.raises(PendingLabels):
            labeller.label(frames, TRAIN)
        (requested,) = (tmp_path / "requested").glob("*.extxyz")
        done = [Label("", 0.0, np.zeros((3, 3))).attach(frame) for frame in read_structures(requested)]
        write_structures(tmp_path / "results" / "done.extxyz", done)
        assert labeller.begin(frames, TRAIN) is None
        assert [result.error for result in labeller.label(frames, TRAIN)] == [None] * 2


def test_labels_that_are_looked_up_may_be_under_way_too(waters: Waters, tmp_path: Path) -> None:
    frames = [Label("", 1.0, np.zeros((3, 3))).attach(frame) for frame in waters(3)]
    write_structures(tmp_path / "pool.extxyz", frames[:2])
    oracle = FileSettings(path=tmp_path / "pool.extxyz")
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store) as labeller:
        labeller.begin(frames, TRAIN)
        assert [result.error is None for result in labeller.label(frames, TRAIN)] == [True, True, False]
