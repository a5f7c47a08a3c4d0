"""Dipoles from the label source to the figures: a campaign that looks for their errors, and a sweep over its labels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from tiny_campaign import SECTIONS, tiny_config

from almlip_jax.campaign import run_campaign
from almlip_jax.campaign.report import write_report
from almlip_jax.campaign.rundir import RunDirectory
from almlip_jax.campaign.status import campaign_status, render_status
from almlip_jax.figures.command import make
from almlip_jax.files import read_csv
from almlip_jax.oracles.sources.xtb import TBLiteSettings
from almlip_jax.potential import Potential
from almlip_jax.structures.io import read_structures, write_structures
from almlip_jax.sweep import SweepConfig, run_sweep

pytestmark = pytest.mark.slow
MODEL: dict[str, Any] = {**SECTIONS["model"], "l_max": 1, "dipole": True}
TRAINING: dict[str, Any] = {**SECTIONS["training"], "max_steps": 600, "loss": {"dipole": 10.0}}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """A campaign on water that labels what its members disagree about in dipoles."""
    folder = tmp_path_factory.mktemp("dipoles")
    config = tiny_config(
        folder,
        oracle={"kind": "tblite", "dipole": True},
        initial={"rattle": {"count": 20, "stdev": 0.05}, "md": []},
        model=MODEL,
        training=TRAINING,
        selection={"batch": 3, "selector": {"kind": "top_k", "score": "dipole_std"}},
        stopping={"max_rounds": 1, "share_below": None, "target_error": {"metric": "dipole_rmse", "value": 1e-9}},
    )
    outcome = run_campaign(config, folder / "run")
    assert outcome.finished and not outcome.converged and outcome.rule == "max_rounds"
    return RunDirectory(folder / "run")


def test_a_campaign_learns_them_and_tells_their_errors(run):
    frames = read_structures(run.round(1).dataset, require_labels=True)
    label = TBLiteSettings(dipole=True).build()
    assert len(frames) == 23
    for frame in (frames[0], frames[-1]):
        np.testing.assert_allclose(frame.calc.results["dipole"], label(frame).further["dipole"], atol=1e-6)
    test = read_structures(run.test, require_labels=True)
    true = np.array([frame.calc.results["dipole"] for frame in test])
    predicted = Potential.load(run.round(1).potential).evaluate(test).further["dipole"]
    hot = np.array([frame.info["group"] == "600K" for frame in test])
    error = float(np.sqrt(np.mean((predicted - true)[hot] ** 2)))
    assert read_csv(run.metrics)[-1]["dipole_rmse_600K"] == pytest.approx(error, rel=1e-4)
    learned = np.array([frame.calc.results["dipole"] for frame in frames])
    assert error < 0.5 * np.std(learned - learned.mean(axis=0))
    screen = Console(file=io.StringIO(), width=200)
    screen.print(render_status(campaign_status(run.path)))
    assert "dipole" in screen.file.getvalue()  # type: ignore[attr-defined]
    assert "dipole" in write_report(run.path).read_text().split("<h2>Config")[0]


def test_a_sweep_over_its_labels_compares_their_errors(run, tmp_path: Path):
    test = read_structures(run.test, require_labels=True)
    write_structures(tmp_path / "test.extxyz", test)
    system = {
        "pool": run.round(1).dataset,
        "tests": {"test": tmp_path / "test.extxyz"},
        "initial": 8,
        "model": MODEL,
        "training": TRAINING,
    }
    config = SweepConfig.model_validate(
        {
            "folder": tmp_path,
            "systems": {"water": system},
            "selectors": {"random": {"kind": "random"}, "top_k": {"kind": "top_k", "score": "dipole_std"}},
            "seeds": 2,
            "batch_sizes": [6],
            "ensemble_sizes": [2],
            "rounds": 1,
        }
    )
    run_sweep(config, tmp_path / "out")
    rows = read_csv(tmp_path / "out" / "results.csv")
    assert len(rows) == 2 * 2 * 2 and all(0 < row["dipole_mae"] <= row["dipole_rmse"] for row in rows)
    first, last = ([row["dipole_rmse"] for row in rows if row["round"] == n] for n in (0, 1))
    assert np.mean(last) < np.mean(first)
    made = make("learning_curves", [tmp_path / "out" / "results.csv"], tmp_path / "figures", quantity="dipole_rmse")
    assert any("dipole_rmse" in Path(path).name for path in made["written"])
