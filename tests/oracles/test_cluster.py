"""Labelling through Parsl, on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import label_calculators as trouble
import numpy as np
import pytest
from ase import Atoms
from label_calculators import assert_same_labels
from pydantic import ValidationError

from almlip_jax.cluster import ParslLocalSettings
from almlip_jax.errors import InputError
from almlip_jax.oracles import ExecutorSettings, Labeller, LabelStore, LocalSettings, MDRun, run_label_md
from almlip_jax.oracles.sources.calculator import CalculatorSettings

Waters = Callable[..., list[Atoms]]


def test_executor_settings_are_chosen_by_kind_and_checked() -> None:
    assert isinstance(ExecutorSettings.parse({"kind": "local"}), LocalSettings)
    with pytest.raises(ValidationError, match="did you mean 'partition'"):
        ExecutorSettings.parse({"kind": "slurm", "partitions": "x"})
    with pytest.raises(ValidationError, match="walltime"):
        ExecutorSettings.parse({"kind": "slurm", "walltime": "an hour"})


def test_an_executor_of_another_package_labels(
    with_desks: None, waters: Waters, springs: CalculatorSettings, tmp_path: Path
) -> None:
    executor = ExecutorSettings.parse({"kind": "desks"})
    with LabelStore(tmp_path / "labels.db") as store, Labeller(springs, store, executor) as labeller:
        results = labeller.label(waters(2), {"purpose": "train"})
        assert store.count_calls() == 2
    energies = [result.atoms.get_potential_energy() for result in results if result.atoms is not None]
    assert energies == [float(np.sum(frame.positions**2) / 2) for frame in waters(2)]


@pytest.mark.slow
def test_labels_and_dynamics_through_parsl(waters: Waters, springs: CalculatorSettings, tmp_path: Path) -> None:
    pytest.importorskip("parsl")
    oracle = springs.model_copy(update={"timeout": 3.0})
    frames = waters(4) + waters(1, trouble.ABORT) + waters(1, trouble.HANG)
    runs = [MDRun(300, 10)]
    results, trajectories = {}, {}
    for name, executor in {"local": LocalSettings(workers=2), "parsl": ParslLocalSettings(workers_per_node=2)}.items():
        with LabelStore(tmp_path / f"{name}.db") as store, Labeller(oracle, store, executor) as labeller:
            results[name] = labeller.label(frames, {"purpose": "train"})
            trajectories[name] = run_label_md(frames[0], labeller, runs, seed=0, purpose="initial")
            assert store.count_calls() == 16
            assert [row.label.identity for row in store.labelled("train")] == [r.identity for r in results[name][:4]]
    for local, remote in zip(results["local"], results["parsl"], strict=True):
        assert local.error == remote.error
        if local.atoms is not None and remote.atoms is not None:
            assert_same_labels(local.atoms, remote.atoms)
    assert [result.error is None for result in results["parsl"]] == [True] * 4 + [False] * 2
    for frame, same in zip(trajectories["local"][0].frames, trajectories["parsl"][0].frames, strict=True):
        assert_same_labels(frame, same)


@pytest.mark.slow
def test_label_source_that_cannot_be_used_is_one_sentence_through_parsl(
    waters: Waters, springs: CalculatorSettings, tmp_path: Path
) -> None:
    pytest.importorskip("parsl")
    oracle = springs.model_copy(update={"calculator": "no_such_module:Springs"})
    with LabelStore(tmp_path / "labels.db") as store, Labeller(oracle, store, ParslLocalSettings()) as labeller:
        with pytest.raises(InputError, match="no_such_module"):
            labeller.label(waters(1), {"purpose": "train"})
