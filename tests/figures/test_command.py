"""``almlip figure``: everything from the table alone, the same bytes each time, text as text."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import matplotlib.colors
import numpy as np
import pytest
from matplotlib import pyplot as plt
from power_law_sweep import sweep, written
from typer.testing import CliRunner

from almlip_jax.cli import app
from almlip_jax.errors import InputError
from almlip_jax.evaluation.comparison import evolution
from almlip_jax.evaluation.tidy import CALIBRATION
from almlip_jax.figures.command import MAKERS, make
from almlip_jax.figures.evolution import calibration_evolution
from almlip_jax.figures.style import SELECTOR_COLORS, selector_lines


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    return written(tmp_path_factory.mktemp("table") / "results.csv", sweep(seeds=3, rounds=3))


@pytest.fixture(scope="module")
def made(table, tmp_path_factory) -> dict[str, Any]:
    """What the command says of everything, as JSON."""
    folder = tmp_path_factory.mktemp("figures")
    told = folder / "all.json"
    result = CliRunner().invoke(app, ["figure", "all", str(table), "--out", str(folder / "out"), "--json", str(told)])
    assert result.exit_code == 0, result.output
    return json.loads(told.read_text())


def test_all_figures_and_tables_come_from_one_command(made):
    assert made["skipped"] == {} and all(Path(path).stat().st_size > 0 for path in made["written"])
    assert len({Path(path).stem for path in made["written"]}) == len(MAKERS)
    assert len(made["rows"]) == 4 * 3 and {row["selector"] for row in made["rows"]} == {"random", "lcmd", "top_k"}
    assert any("3 seeds Wilcoxon's test cannot" in note for note in made["notes"])


def test_the_same_table_gives_the_same_bytes(table, made, tmp_path):
    before = {Path(path).name: Path(path) for path in made["written"]}
    for name in ("profiles", "tables"):
        for path in map(Path, make(name, [table], tmp_path)["written"]):
            assert path.read_bytes() == before[path.name].read_bytes(), path


def test_text_in_vector_files_is_text(made):
    (path,) = (path for path in made["written"] if path.endswith("learning_curves_forces_rmse.pdf"))
    content = Path(path).read_bytes()
    assert b"/Type0" in content or b"/TrueType" in content  # type 42: fonts that programs can edit
    assert b"/Type3" not in content


def test_selectors_look_the_same_everywhere_and_not_like_each_other():
    names = ["random", "lcmd", "top_k", "my_own", "top_k (energy_std)", "plain", "gate", "bias", "in_loop"]
    lines = selector_lines(names)
    assert lines["top_k (energy_std)"]["color"] == lines["top_k"]["color"] == SELECTOR_COLORS["top_k"]
    assert len({line["color"] for line in lines.values()}) == len(lines) - 1
    again = selector_lines(names[::-1])
    assert all(again[name]["color"] == lines[name]["color"] for name in names)
    looks = {(line["color"], line["marker"], str(line["linestyle"])) for line in lines.values()}
    assert len(looks) == len(lines)
    named = {
        name: color for name, color in SELECTOR_COLORS.items() if name not in ("chain", "threshold", "top_fraction")
    }
    for one, other in combinations(named.values(), 2):
        assert np.linalg.norm(np.subtract(matplotlib.colors.to_rgb(one), matplotlib.colors.to_rgb(other))) > 0.1


def test_what_a_table_lacks_is_skipped_or_one_sentence(tmp_path):
    bare = sweep(seeds=2, rounds=2)
    bare[[*CALIBRATION, "sigma_batch"]] = np.nan
    path = written(tmp_path / "bare.csv", bare)
    found = make("all", [path], tmp_path / "out")
    assert set(found["skipped"]) == {"uncertainty_evolution", "calibration_evolution", "ranking_evolution"}
    with pytest.raises(InputError, match="sigma_batch"):
        make("uncertainty_evolution", [path], tmp_path / "out")
    with pytest.raises(InputError, match="no figure 'pie'"):
        make("pie", [path], tmp_path / "out")


def test_metrics_of_calibration_are_drawn_in_their_units_as_means_over_seeds(tmp_path):
    table = sweep(seeds=3, rounds=4)
    table["crps"] = 0.01 * (1 + table["round"]) * (1 + table["seed"])
    figure = calibration_evolution({name: evolution(table, name) for name in ("crps", "auroc")})
    crps, auroc = figure.axes[:2]
    assert crps.get_ylabel() == "CRPS (meV/Å) ↓" and auroc.get_ylabel() == "AUROC ↑"
    line = crps.lines[0]
    np.testing.assert_allclose(line.get_ydata(), 20.0 * (1 + np.asarray(line.get_xdata())), rtol=1e-12)
    plt.close(figure)
    found = make("ranking_evolution", [written(tmp_path / "table.csv", table)], tmp_path / "out")
    assert {Path(path).name for path in found["written"]} == {"ranking_evolution.pdf", "ranking_evolution.png"}
