"""Labelling: in the order of the requests, once each, and whatever a label source does the others go on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import label_calculators as trouble
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from label_calculators import KILLED, assert_same_labels, calls, made

from almlip_jax.errors import InputError
from almlip_jax.oracles import (
    Label,
    Labeller,
    LabelResult,
    LabelStore,
    LocalSettings,
    StorageError,
    TBLiteSettings,
    label_structures,
    rattle,
)
from almlip_jax.oracles.finite_differences import check_derivatives
from almlip_jax.oracles.processes import WorkerProcess, ask_patiently
from almlip_jax.oracles.scratch import Scratch, remove_left_behind
from almlip_jax.oracles.sources.calculator import CalculatorSettings
from almlip_jax.oracles.sources.labelled_file import FileSettings
from almlip_jax.oracles.sources.mean import MeanSettings
from almlip_jax.oracles.worker import Failure, LabelTask
from almlip_jax.process_table import is_alive
from almlip_jax.structures.io import write_structures

Waters = Callable[..., list[Atoms]]
TRAIN = {"purpose": "train"}
TWO = LocalSettings(workers=2)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[LabelStore]:
    with LabelStore(tmp_path / "labels.db") as opened:
        yield opened


def test_results_and_rows_are_in_the_order_of_the_requests(
    waters: Waters, springs: CalculatorSettings, store: LabelStore
) -> None:
    frames = waters(1, trouble.SLOW) + waters(4)
    arrived: list[str] = []
    results = label_structures(
        frames, springs, store, executor=TWO, provenance=TRAIN, on_label=lambda result: arrived.append(result.identity)
    )
    requested = [result.identity for result in results]
    assert arrived != requested and sorted(arrived) == sorted(requested)
    for result, frame in zip(results, frames, strict=True):
        assert result.atoms is not None and not result.cached and result.seconds > 0
        np.testing.assert_array_equal(result.atoms.calc.results["forces"], -frame.positions)
    assert [row.label.identity for row in store.labelled()] == requested


def test_nothing_is_labelled_twice(
    waters: Waters, springs: CalculatorSettings, store: LabelStore, tmp_path: Path
) -> None:
    frames = waters(3)
    with Labeller(springs, store, TWO) as labeller:
        first = labeller.label([frames[0], frames[1], frames[0]], TRAIN)
        again = labeller.label([frames[2], frames[1], frames[0]], TRAIN)
    assert sorted(calls(tmp_path)) == [0.001, 0.002, 0.003]
    assert [result.cached for result in first] == [False, False, False]
    assert [result.cached for result in again] == [False, True, True]
    assert first[0].atoms is not None and again[2].atoms is not None and first[2].atoms is not None
    assert_same_labels(first[0].atoms, again[2].atoms)
    assert_same_labels(first[0].atoms, first[2].atoms)
    assert store.count_calls() == 3


def test_requested_structures_keep_what_they_carry(zundel: Atoms, store: LabelStore) -> None:
    zundel.info["walker"] = 7
    (result,) = label_structures([zundel], TBLiteSettings(), store, executor=TWO, provenance=TRAIN)
    assert result.atoms is not None and result.atoms.info["walker"] == 7


@pytest.mark.parametrize(
    "charge, reason",
    [
        (trouble.RAISE, "RuntimeError: no convergence"),
        (trouble.NAN, "not finite"),
        (trouble.SHAPE, "shape"),
        (trouble.HUGE, "max_force"),
        (trouble.ABORT, r"crashed \(SIGABRT: about to abort\)"),
        (trouble.HANG, "timed out after 2 s"),
    ],
)
def test_trouble_becomes_a_failed_row_and_the_others_go_on(
    charge: int, reason: str, waters: Waters, springs: CalculatorSettings, store: LabelStore
) -> None:
    oracle = springs.model_copy(update={"timeout": 2.0})
    frames = waters(1, charge) + waters(3)
    with Labeller(oracle, store, LocalSettings(workers=1)) as labeller:
        results = labeller.label(frames, {"purpose": "train", "walker": 4})
        again = labeller.label(frames, TRAIN)
    assert results[0].atoms is None and results[0].error is not None
    assert all(result.error is None for result in results[1:])
    (failed,) = store.labelled(failed=True)
    import re

    assert re.search(reason, str(failed.label.error)) and failed.provenance["walker"] == 4
    assert again[0].cached and again[0].error == results[0].error
    assert store.count_calls() == 4


def test_tries_of_a_worker_that_crashed_and_of_the_next_one_add_up() -> None:
    """Every try is a paid call, also those that a worker makes by itself."""
    outcomes = [Failure("crashed"), Label("a", error="no convergence", calls=3)]

    class Crashing:
        def ask(self, _: object) -> object:
            return outcomes.pop(0)

    found = ask_patiently(cast(WorkerProcess, Crashing()), LabelTask(Atoms("H"), "a"), 3)
    assert found.calls == 4 and not outcomes


@pytest.mark.parametrize("charge", [trouble.RAISE, trouble.ABORT])
def test_attempts(charge: int, waters: Waters, springs: CalculatorSettings, store: LabelStore, tmp_path: Path) -> None:
    oracle = springs.model_copy(update={"attempts": 3})
    (result,) = label_structures(waters(1, charge), oracle, store, executor=TWO, provenance=TRAIN)
    assert result.error is not None and len(calls(tmp_path)) == 3 and store.count_calls() == 3


def test_a_hung_label_ends_with_all_it_started(
    waters: Waters, springs: CalculatorSettings, store: LabelStore, tmp_path: Path
) -> None:
    oracle = springs.model_copy(update={"timeout": 1.5})
    (result,) = label_structures(waters(1, trouble.SPAWN), oracle, store, executor=TWO, provenance=TRAIN)
    assert "timed out" in str(result.error)
    started = trouble.children(tmp_path)
    assert len(started) == 2 and not any(is_alive(pid) for pid in started)


def test_a_worker_killed_from_outside_is_tried_again(
    waters: Waters, springs: CalculatorSettings, store: LabelStore, tmp_path: Path
) -> None:
    (result,) = label_structures(waters(1, trouble.KILLED), springs, store, executor=TWO, provenance=TRAIN)
    assert result.error is None and len(calls(tmp_path)) == 3 and store.count_calls() == 3
    (tmp_path / "calls.log").unlink()
    frames = waters(2, trouble.KILLED)[1:]
    always = springs.model_copy(update={"parameters": {**springs.parameters, "patience": 99}})
    (result,) = label_structures(frames, always, store, executor=TWO, provenance=TRAIN)
    assert "killed from outside (SIGKILL" in str(result.error) and len(calls(tmp_path)) == 3


def test_parallel_labels_have_the_bits_of_serial_ones(zundel: Atoms, tmp_path: Path) -> None:
    frames = rattle(zundel, 12, np.random.default_rng(0), stdev=0.05)

    def labelled(name: str, order: list[Atoms], workers: int) -> list[LabelResult]:
        with LabelStore(tmp_path / name) as store:
            return label_structures(
                order, TBLiteSettings(), store, executor=LocalSettings(workers=workers), provenance=TRAIN
            )

    for one, two in zip(labelled("a.db", frames, 1), labelled("b.db", frames[::-1], 2)[::-1], strict=True):
        assert one.atoms is not None and two.atoms is not None and one.identity == two.identity
        assert_same_labels(one.atoms, two.atoms)


def test_label_source_that_cannot_be_used_is_one_sentence(
    waters: Waters, springs: CalculatorSettings, store: LabelStore
) -> None:
    oracle = springs.model_copy(update={"calculator": "no_such_module:Springs"})
    with Labeller(oracle, store, TWO) as labeller, pytest.raises(InputError, match="'no_such_module:Springs' cannot"):
        labeller.label(waters(2), TRAIN)
    assert store.summary()["train"]["pending"] == 2  # nothing was paid, so nothing has failed


@pytest.mark.parametrize("reuse", [True, False])
def test_a_calculator_that_is_reused_is_made_once_in_each_worker(
    reuse: bool, waters: Waters, springs: CalculatorSettings, store: LabelStore, tmp_path: Path
) -> None:
    oracle = springs.model_copy(update={"reuse": reuse, "parameters": {**springs.parameters, "delay": 0.05}})
    results = label_structures(waters(8), oracle, store, executor=TWO, provenance=TRAIN)
    assert [result.error for result in results] == [None] * 8
    processes = made(tmp_path)
    assert len(set(processes)) == 2
    assert len(processes) == (2 if reuse else 8)


def test_calculator_that_cannot_be_made_fails_its_labels(waters: Waters, store: LabelStore) -> None:
    oracle = CalculatorSettings(calculator="label_calculators:Unimportable")
    (result,) = label_structures(waters(1), oracle, store, executor=TWO, provenance=TRAIN)
    assert result.error == "OSError: licence server not found"


def test_no_space_for_results_stops_before_anything_is_paid(
    waters: Waters, springs: CalculatorSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from almlip_jax.oracles import executor
    from almlip_jax.oracles.worker import Context

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    class Here(executor.InlineBackend):
        def __init__(self, oracle: CalculatorSettings, spool: Path) -> None:
            self._context = Context(oracle, oracle.build(), spool)

    monkeypatch.setattr(executor, "build_backend", lambda oracle, settings, spool: Here(oracle, spool))
    with LabelStore(tmp_path / "labels.db") as store, Labeller(springs, store) as labeller:
        with monkeypatch.context() as patch:
            patch.setattr(os, "posix_fallocate", full)
            with pytest.raises(StorageError, match="disk is full"):
                labeller.label(waters(2), TRAIN)
        assert calls(tmp_path) == [] and not list(store.spool.glob("*.part"))
        assert all(result.error is None for result in labeller.label(waters(2), TRAIN))


def test_an_interrupted_call_leaves_nothing_running(
    waters: Waters, springs: CalculatorSettings, store: LabelStore, tmp_path: Path
) -> None:
    def interrupt(_: LabelResult) -> None:
        raise KeyboardInterrupt

    def children() -> set[str]:
        found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
        return set("".join(path.read_text() for path in found).split())

    others, start = children(), time.monotonic()  # tests before this one may have left a process that is ending
    with Labeller(springs.model_copy(update={"attempts": 3}), store, TWO) as labeller:
        with pytest.raises(KeyboardInterrupt):
            labeller.label(waters(1, trouble.HANG) + waters(1) + waters(5, 1), TRAIN, on_label=interrupt)
    assert time.monotonic() - start < 15  # the timeout is 20 s
    assert children() <= others
    assert 1 <= store.count_calls() < 7  # what had arrived is stored


def test_labelled_file_serves_as_the_label_source(waters: Waters, tmp_path: Path, store: LabelStore) -> None:
    frames = waters(4)
    pool = [label.attach(frame) for label, frame in zip(_labels(frames), frames, strict=True)]
    write_structures(tmp_path / "pool.extxyz", pool[:3])
    oracle = FileSettings(path=tmp_path / "pool.extxyz")
    results = label_structures(frames, oracle, store, provenance=[{"purpose": "train", "n": n} for n in range(4)])
    for result, frame in zip(results[:3], pool, strict=False):
        assert result.atoms is not None
        assert_same_labels(result.atoms, frame)
    assert "is not in" in str(results[3].error) and store.count_calls() == 4
    assert [row.provenance["n"] for row in store.labelled()] == [0, 1, 2]


def _labels(frames: list[Atoms]) -> list:
    from almlip_jax.oracles import Label

    return [Label("", float(n), np.full((len(frame), 3), n / 7)) for n, frame in enumerate(frames)]


@pytest.mark.parametrize("lost", ["worker", "both"])
def test_what_a_killed_worker_wrote_is_removed(lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    settings = CalculatorSettings(calculator="label_calculators:Writer", charge_key="info", timeout=20)
    worker = WorkerProcess(settings, None, 1, None)
    fine, killed = Atoms("H", info={"charge": 0}), Atoms("H", info={"charge": KILLED})
    assert worker.start() and not list(tmp_path.glob("almlip-label-*"))  # nothing before there is something to write
    assert worker.ask(LabelTask(fine, "fine")).error is None
    (folder,) = tmp_path.glob("almlip-label-*")
    assert (folder / "written").exists()
    if lost == "worker":
        assert worker.ask(LabelTask(killed, "killed")).killed
    else:  # the folder of a worker whose starter was killed with it: the next that starts clears after them
        remove_left_behind()
        assert folder.exists()  # it is at work
        process = worker._process
        assert process is not None
        process.kill()
        process.wait()
        assert folder.exists()
        remove_left_behind()
    assert not list(tmp_path.glob("almlip-label-*"))
    worker.close()


def test_what_a_killed_script_wrote_is_removed(tmp_path: Path) -> None:
    """One that calls a label source itself, without a worker."""
    code = (
        "import os, signal, sys; from pathlib import Path; from almlip_jax.oracles.scratch import Scratch;"
        "scratch = Scratch(Path(sys.argv[1])); scratch.folder; os.kill(os.getpid(), signal.SIGKILL)"
    )
    mine = Scratch(tmp_path)
    assert mine.folder.exists()
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], env={"PYTHONPATH": ":".join(sys.path)})
    assert len(list(tmp_path.glob("almlip-label-*"))) == 2
    remove_left_behind(tmp_path)
    assert list(tmp_path.glob("almlip-label-*")) == [mine.folder]
    del mine
    assert not list(tmp_path.glob("almlip-label-*"))


def test_forces_are_held_against_differences_of_the_energy(waters: Waters, springs: CalculatorSettings) -> None:
    (water,) = waters(1)
    water.set_constraint(FixAtoms([0, 1, 2]))  # of dynamics, not of labels
    found = check_derivatives(water, springs, LocalSettings(workers=1))
    assert found.agrees and len(found.compared) == 3
    forces = -water.positions
    for one in found.compared:
        assert one.force == pytest.approx(forces[one.atom, one.axis]) == pytest.approx(one.difference, abs=1e-9)
        assert abs(one.force) == np.max(np.abs(forces[one.atom]))
    assert found.stresses == ()
    doubled = springs.model_copy(update={"calculator": "label_calculators:Doubled"})
    assert not check_derivatives(water, doubled, LocalSettings(workers=1)).agrees
    with pytest.raises(InputError, match="nothing to compare"):
        check_derivatives(water, FileSettings(path=Path("labels.extxyz")))


def test_stresses_are_held_against_differences_of_the_energy() -> None:
    """The largest normal stress and the largest shear, of the cell with its atoms."""
    copper = bulk("Cu", a=3.5)
    copper.set_cell(copper.cell.array @ (np.eye(3) + [[0, 0.03, 0], [0, 0, 0.06], [0, 0, 0.02]]), scale_atoms=True)
    copper.rattle(0.05, seed=1)
    copper.set_constraint(FixAtoms([0]))
    settings = CalculatorSettings(calculator="label_calculators:Mistaken")
    found = check_derivatives(copper, settings, LocalSettings(workers=1), components=1)
    assert [one.agrees for one in (*found.compared, *found.stresses)] == [True, True, False] and not found.agrees
    true = dict(zip(("xx", "yy", "zz", "yz", "xz", "xy"), EMT().get_property("stress", copper), strict=True))
    for one in found.stresses:
        assert one.difference == pytest.approx(true[one.component], rel=2e-3)
    assert found.stresses[0].stress == pytest.approx(max(true["xx"], true["yy"], true["zz"], key=abs))


def test_strained_cells_keep_their_kpoints() -> None:
    """Of a spacing that gives the strained cell fewer or more."""
    settings = CalculatorSettings(
        code="gpaw", parameters={"mode": "lcao"}, kspacing=2 * np.pi / (3 * 4.0 - 1e-6), gamma_centred=False
    )
    crystal = Atoms("He", cell=np.diag([4.0, 4.0, 9.0]), pbc=[True, True, False])
    assert settings.with_grid_of(crystal).kpts == (3, 3, 1) and settings.with_grid_of(crystal).kspacing is None
    mean = MeanSettings(of=(settings, settings)).with_grid_of(crystal)
    assert [getattr(part, "kpts", None) for part in mean.of] == [(3, 3, 1)] * 2
