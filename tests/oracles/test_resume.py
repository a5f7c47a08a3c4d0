"""A run that is killed loses no label and pays for none twice, but for those it was killed in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from label_calculators import SPAWN, assert_same_labels, calls, children

from almlip_jax.oracles import Labeller, LabelStore, LocalSettings, MDRun, run_label_md
from almlip_jax.oracles.sources.calculator import CalculatorSettings
from almlip_jax.process_table import is_alive
from almlip_jax.structures.io import write_structures

Waters = Callable[..., list[Atoms]]
WORKERS = 2

_LABEL = """
import sys
from pathlib import Path
from almlip_jax.oracles import *
from almlip_jax.oracles import SourceSettings
from almlip_jax.structures.io import read_structures
folder = Path(sys.argv[1])
frames = read_structures(folder / "frames.extxyz")
with LabelStore(folder / "labels.db") as store:
    with Labeller(SourceSettings.parse(sys.argv[2]), store, LocalSettings(workers=2)) as labeller:
        print("ready", flush=True)
        if sys.argv[3] == "label":
            labeller.label(frames, {"purpose": "train"})
        else:
            runs = [MDRun(300, 40, friction=0.02), MDRun(600, 40, friction=0.02)]
            run_label_md(frames[0], labeller, runs, seed=5, purpose=sys.argv[3])
"""


def _killed_after(count: int, what: str, folder: Path, oracle: CalculatorSettings) -> None:
    """Starts labelling in a process of its own and kills that when the label source was called often enough."""
    log = folder / "calls.log"
    before = len(calls(folder))
    process = subprocess.Popen(
        [sys.executable, "-c", _LABEL, str(folder), oracle.model_dump_json(), what],
        env=dict(os.environ, PYTHONPATH=os.pathsep.join(entry or os.getcwd() for entry in sys.path)),
        stdout=subprocess.PIPE,
    )
    deadline = time.monotonic() + 60
    while not log.exists() or len(calls(folder)) < before + count:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture
def slow(springs: CalculatorSettings) -> CalculatorSettings:
    return springs.model_copy(update={"parameters": {**springs.parameters, "delay": 0.02}})


def test_killed_labelling_goes_on(waters: Waters, slow: CalculatorSettings, tmp_path: Path) -> None:
    frames = waters(30)
    write_structures(tmp_path / "frames.extxyz", frames)
    _killed_after(8, "label", tmp_path, slow)
    _killed_after(6, "label", tmp_path, slow)
    with LabelStore(tmp_path / "labels.db") as store, Labeller(slow, store, LocalSettings(workers=WORKERS)) as labeller:
        found = sum(labeller.identity(frame) in store for frame in frames)
        results = labeller.label(frames, {"purpose": "train"})
        identities = [row.label.identity for row in store.labelled()]
        assert store.count_calls() == 30
    assert found >= 8 + 6 - 2 * WORKERS
    assert identities == [result.identity for result in results]
    paid = calls(tmp_path)
    assert len(set(paid)) == len(paid) == 30  # workers that outlived their program were waited for
    assert all(np.array_equal(r.atoms.get_forces(), -f.positions) for r, f in zip(results, frames, strict=True))


@pytest.mark.parametrize("purpose", ["initial", "test"])
def test_killed_dynamics_repeat_to_the_bit(
    purpose: str, waters: Waters, springs: CalculatorSettings, slow: CalculatorSettings, tmp_path: Path
) -> None:
    (start,) = waters(1)
    runs = [MDRun(300, 40, friction=0.02), MDRun(600, 40, friction=0.02)]
    whole = tmp_path / "whole"
    whole.mkdir()
    quick = springs.model_copy(update={"parameters": {"log": str(whole / "calls.log")}})
    with LabelStore(whole / "labels.db") as store, Labeller(quick, store, LocalSettings(workers=2)) as labeller:
        expected = run_label_md(start, labeller, runs, seed=5, purpose=purpose)
    write_structures(tmp_path / "frames.extxyz", [start])
    _killed_after(20, purpose, tmp_path, slow)
    _killed_after(20, purpose, tmp_path, slow)
    before = len(calls(tmp_path))
    with LabelStore(tmp_path / "labels.db") as store, Labeller(slow, store, LocalSettings(workers=2)) as labeller:
        trajectories = run_label_md(start, labeller, runs, seed=5, purpose=purpose)
        rows = [row.provenance["step"] for row in store.labelled() if "step" in row.provenance]
        assert store.count_calls() == (81 if purpose == "initial" else 0)
    for trajectory, uninterrupted in zip(trajectories, expected, strict=True):
        assert len(trajectory.frames) == 40 and trajectory.error is None
        for frame, same in zip(trajectory.frames, uninterrupted.frames, strict=True):
            assert_same_labels(frame, same)
    assert rows == [*range(1, 41), *range(1, 41)]
    assert 40 <= before < 81 and len(calls(tmp_path)) == len(calls(whole))
    assert not list((tmp_path / "labels.db.spool" / "md").iterdir())


def _gone(pids: list[int]) -> bool:
    deadline = time.monotonic() + 20
    while any(is_alive(pid) for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not any(is_alive(pid) for pid in pids)


def test_what_a_killed_program_left_hanging_ends_in_time(
    waters: Waters, springs: CalculatorSettings, tmp_path: Path
) -> None:
    write_structures(tmp_path / "frames.extxyz", waters(1, SPAWN))
    hanging = springs.model_copy(update={"timeout": 3.0})
    _killed_after(1, "label", tmp_path, hanging)
    while not (started := children(tmp_path)):
        time.sleep(0.01)
    assert len(started) == 2 and all(is_alive(pid) for pid in started)
    assert _gone(started)


def test_what_a_killed_worker_left_behind_ends_with_the_next_run(
    waters: Waters, springs: CalculatorSettings, tmp_path: Path
) -> None:
    write_structures(tmp_path / "frames.extxyz", waters(1, SPAWN))
    _killed_after(1, "label", tmp_path, springs)
    while not (started := children(tmp_path)):
        time.sleep(0.01)
    worker, program = started
    os.kill(worker, signal.SIGKILL)
    assert _gone([worker]) and is_alive(program)
    with LabelStore(tmp_path / "labels.db") as store, Labeller(springs, store, LocalSettings(workers=1)) as labeller:
        assert store.summary()["train"]["cut_off"] == 1 and store.count_calls() == 0
        labeller.label(waters(1), {"purpose": "train"})
    assert _gone([program])


def test_a_terminated_program_ends_its_label_sources(
    waters: Waters, springs: CalculatorSettings, tmp_path: Path
) -> None:
    write_structures(tmp_path / "frames.extxyz", waters(1, SPAWN))
    config = {
        "system": {"structures": "frames.extxyz"},
        "oracle": springs.model_dump(mode="json"),
        "initial": {"rattle": {"count": 1}},
    }
    (tmp_path / "label.yaml").write_text(json.dumps(config))
    command = ["-m", "almlip_jax.cli", "label", "label.yaml", "frames.extxyz", "--out", "out.extxyz"]
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    process = subprocess.Popen(
        [sys.executable, *command], cwd=tmp_path, env=dict(os.environ, PYTHONPATH=path), stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 60
    while not (started := children(tmp_path)) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.02)
    assert len(started) == 2
    process.terminate()
    assert process.wait(20) != 0 and _gone(started)


def test_dynamics_nobody_asks_for_any_more_are_kept(waters: Waters, slow: CalculatorSettings, tmp_path: Path) -> None:
    write_structures(tmp_path / "frames.extxyz", waters(1))
    _killed_after(20, "initial", tmp_path, slow)
    time.sleep(0.5)  # workers finish the label at hand
    paid = len(calls(tmp_path))
    with LabelStore(tmp_path / "labels.db") as store, Labeller(slow, store, LocalSettings(workers=2)) as labeller:
        run_label_md(waters(1)[0], labeller, [MDRun(100, 3)], seed=5, purpose="initial")
        assert len(calls(tmp_path)) == paid + 3
        assert paid - WORKERS <= store.count_calls() - 3 <= paid
