"""The tutorials, run as a reader would: files are written, commands called and scripts run in their order."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

import almlip_jax as al
from almlip_jax import cli
from almlip_jax.campaign.config import TrainConfig
from almlip_jax.config import load_settings

TUTORIALS = Path(__file__).parents[1] / "docs" / "tutorials"


def follow(name: str) -> dict[str, Any]:
    """Does what a tutorial says in the working directory; the names that its scripts have made."""
    names: dict[str, Any] = {"__name__": "__main__"}
    text = (TUTORIALS / f"{name}.md").read_text()
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        title = block.partition("\n")[0].removeprefix("# ")
        if language == "sh":
            for line in block.splitlines():
                program, *words = shlex.split(line, comments=True)
                done = CliRunner().invoke(cli.app, words)
                assert program == "almlip" and done.exit_code == 0, done.output
        elif language == "python":
            if title.endswith(".py"):
                Path(title).write_text(block)  # another one may import it
            exec(compile(block, title, "exec"), names)
        else:
            Path(title).write_text(block)
    return names


def test_every_tutorial_is_followed():
    assert {page.stem for page in TUTORIALS.glob("*.md")} == {"molecule", "crystal", "pool", "eigen", "script", "model"}


@pytest.mark.slow
def test_a_molecule(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    water = follow("molecule")["water"]
    assert water.get_distance(0, 1) == pytest.approx(0.959, abs=0.01)
    assert water.get_angle(1, 0, 2) == pytest.approx(107.2, abs=2.0)
    assert json.loads(Path("errors.json").read_text())["forces_rmse"] < 0.2
    assert Path("runs/water/report.html").exists()


@pytest.mark.slow
def test_a_crystal(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = follow("crystal")
    assert names["exact"] == pytest.approx((3.59, 134.0), rel=0.01)
    assert names["learned"][0] == pytest.approx(names["exact"][0], rel=0.005)
    assert names["learned"][1] == pytest.approx(names["exact"][1], rel=0.25)


@pytest.mark.slow
def test_a_labelled_pool_and_its_figures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = follow("pool")["results"]
    assert len(results) == 3 * 4 * 3 and np.isfinite(results["forces_rmse"]).all()
    by_labels = results.groupby("labels")["forces_rmse"].mean()
    assert list(by_labels.index) == [10, 20, 30] and by_labels[30] < by_labels[10]
    drawn = {path.stem for path in Path("figures").glob("*.pdf")}
    assert any(name.startswith("learning_curves") for name in drawn)
    assert any(name.startswith("paired_ratio") for name in drawn)


@pytest.mark.slow
def test_a_larger_ion_from_a_smaller_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rounds = follow("eigen")["rounds"]
    assert [labels for labels, _ in rounds][:2] == [0, 8]
    assert rounds[-1][1] < 0.5 * rounds[0][1]


@pytest.mark.slow
def test_a_script_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = follow("script")
    assert len(names["dataset"]) == 20 and len(names["pool"]) == 40
    errors = np.concatenate(names["errors"])
    assert np.sqrt(np.mean(errors**2)) < 0.3
    assert Path("potential/potential.json").exists()
    assert len(names["exploration"].status) == 2


def test_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_models", raising=False)
    names = follow("model")
    assert names["remarks"] == []
    data, potential = names["data"], names["potential"]
    seen = potential.evaluate(data)
    truth, found = (np.concatenate([atoms.get_forces() for atoms in data]), np.concatenate(seen.forces))
    assert np.sqrt(np.mean((found - truth) ** 2)) < 0.5 * np.std(truth)  # a few steps teach something
    assert max(seen.scores["extrapolation_grade"]) < 1.01  # trained on: inside
    again = al.load("potential").evaluate(data)
    np.testing.assert_array_equal(np.concatenate(again.forces), found)
    assert load_settings(TrainConfig, Path("model.yaml"), []).model == names["learner"].model
